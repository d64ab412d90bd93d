"""Every entry of the test data's MANIFEST.md has one outcome: it loads so, or is refused for that reason.

Shapes, spacings and HU statistics are the manifest's own (computed there with other readers), so padding is kept for
them. SimpleITK reads the same files as an independent witness.
"""

import warnings
from dataclasses import dataclass, field

import numpy as np
import pytest

from ct_moe.errors_ct_moe import VolumeError
from ct_moe.volume_io_ct_moe import VolumeWarning, load_volume


pydicom = pytest.importorskip("pydicom")
sitk = pytest.importorskip("SimpleITK")

CORNERSTONE = "cornerstone/CTImage.dcm"


@dataclass
class Loads:
    """What a file or folder gives: shape (z, y, x), spacing (z, y, x), min, max and percentiles of HU."""

    shape: tuple
    spacing: tuple
    low: float
    high: float
    percentiles: tuple | None = None
    orientation: str = "LPS"
    warns: str | None = None
    options: dict = field(default_factory=dict)
    same_as_sitk: bool = True  # it has no geometry for a multi-frame file, and stacks uneven slices evenly


@dataclass
class Refused:
    """Why a file or folder is refused."""

    finding: str
    options: dict = field(default_factory=dict)


EXPECTED = {
    "totalseg/example_ct.nii.gz": Loads(
        (112, 101, 122), (3, 3, 3), -1207, 3382, (-1023, -1003, -101, 68, 431), orientation="RAS"
    ),
    "totalseg/example_ct_sm.nii.gz": Loads(
        (30, 101, 122), (3, 3, 3), -1100, 1207, (-1023, -1003, -91, 62, 269), orientation="RAS"
    ),
    "totalseg/aorta_ct_cropped.nii.gz": Loads(
        (164, 126, 120), (1.5, 1.5, 1.5), -1078, 3343, (-1007, -866, -29, 499, 974)
    ),
    "totalseg/pulmonary_ct_cropped.nii.gz": Loads(
        (112, 102, 122), (1.5, 1.5, 1.5), -1064, 3343, (-978, -859, -56, 525, 1025)
    ),
    "totalseg/pulmonary_heart_mask.nii.gz": Refused("values from 0 to 1 are a scaled image or a mask"),
    "totalseg/example_seg.nii.gz": Refused("values from 0 to 117 are grey levels or labels"),
    "totalseg/example_seg_fast.nii.gz": Refused("values from 0 to 117 are grey levels or labels"),
    "totalseg/example_seg_dicom.nii.gz": Refused("values from 0 to 117 are grey levels or labels"),
    "totalseg/example_mr_sm.nii.gz": Refused("values from -47 to 833, neither air nor fat"),
    "totalseg/example_ct_dicom": Loads(
        (20, 512, 512), (2, 0.9765625, 0.9765625), -1024, 1839, (-1024, -1024, -981, 109, 496)
    ),
    "elastix/3DCT_lung_baseline_small.mha": Loads(
        (64, 78, 57), (5, 2.732, 2.732), -1130, 1379, (-1060, -1033, -88, 196, 520)
    ),
    "cip/ct-64.nrrd": Loads((79, 64, 64), (3.9873, 4.1719, 4.1719), -1007, 1095, (-1001, -997, -469, 74, 435)),
    "cip/crop_ct_2slices.nrrd": Loads((2, 349, 443), (0.5, 0.5859, 0.5859), -1009, 1221, (-944, -912, -571, 117, 608)),
    "lidc/LIDC-IDRI-0001": Loads(
        (8, 512, 512), (2.5, 0.703125, 0.703125), -2048, 3071, (-2048, -2048, -915, 103, 519)
    ),
    "ibsi/STS_002_CT": Loads((48, 143, 161), (3.27, 0.9766, 0.9766), -1000, 1156, (-948, -907, -90, 172, 514)),
    # A ramp from 0 to 141 is no CT; its geometry is, in both forms.
    "ibsi/orientation_phantom_dicom": Refused("values from 0 to 141 are grey levels or labels"),
    "ibsi/orientation_phantom_nifti/orientation.nii.gz": Refused("values from 0 to 141 are grey levels or labels"),
    "dcm_qa_ct/GE_tilt_varspacing": Refused(r"steps between slices from 1\.081 to 6\.999 mm"),
    "dcm_qa_ct/Philips_localizer": Refused("only scouts"),
    "dicom2nifti/sliceincrement_missing_slice": Loads(
        (5, 512, 512),
        (5, 0.4297, 0.4297),
        -1024,
        -770,
        None,
        warns="steps between slices from 5 to 10 mm",
        same_as_sitk=False,
    ),
    "dicom2nifti/notavolume_same_position": Refused(
        r"2 series or points in time: \[1\] .*1 slice of 512 x 512; \[2\]"
    ),
    "panimg/dicom_enhanced/volume.dcm": Loads((7, 512, 512), (4, 0.5117, 0.5117), -1024, 334, same_as_sitk=False),
    "panimg/dicom_enhanced/slice7.dcm": Loads(
        (1, 512, 512), (4, 0.5117, 0.5117), -1024, 308, (-1022, -1016, -1000, -980, 53), warns="a single slice"
    ),
    "panimg/dicom_enhanced": Refused(
        r"\[1\] series number 3, axial, 7 slices .*; \[2\] series number 3, axial, 1 slice"
    ),
    "panimg/dicom_4d": Refused("19 series or points in time"),
    # 2 x 3 pixels of zero: the rescale of each slice is what is left to look at.
    "panimg/dicom_intercept": Refused("values from 0 to 0.01 are a scaled image or a mask"),
    "panimg/dicom_slope": Refused("every voxel is 0"),
    "torchio/dicom": Refused("values from 0 to 696, neither air nor fat"),
    "lungmask": Loads((2, 512, 512), (1, 0.625, 0.625), -2048, 1502, (-2048, -2048, -415, 399, 692)),
    "rt-utils/oriented_data": Refused("values from -10 to 9.999, neither air nor fat"),
    "niivue/CT_pitch.nii.gz": Refused("values from 0 to 255 are grey levels or labels"),
    "niivue/ct_perfusion.nii.gz": Refused("voxels are RGB colours"),
    "pydicom/CT_small.dcm": Loads(
        (1, 128, 128), (5, 0.661468, 0.661468), -896, 1167, (-861, -823, 2, 348, 785), warns="a single slice"
    ),
    "pydicom/J2K_pixelrep_mismatch.dcm": Loads(
        (1, 512, 512),
        (5, 0.431, 0.431),
        -2000,
        1896,
        (-2000, -2000, -760, 544, 1264),
        warns="oblique",
    ),
    "pydicom/no_meta.dcm": Refused("unknown format"),
    CORNERSTONE: Loads((1, 512, 512), (5, 0.67578, 0.67578), -3024, 1378, warns="a single slice"),
    "cornerstone/CT2_J2KR": Loads((1, 512, 512), (10, 0.468, 0.468), -2048, 1433, warns="a single slice"),
}


def quiet(source, **options):
    """Loads without minding the warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VolumeWarning)
        return load_volume(source, **options)


def read_with_sitk(path):
    """The same volume by another reader: HU (z, y, x) and affine in LPS."""
    if path.is_dir():
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(path)))
        image = reader.Execute()
    else:
        image = sitk.ReadImage(str(path))
    image = sitk.DICOMOrient(image, "LPS")
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image), affine


@pytest.mark.parametrize("name", EXPECTED)
def test_every_entry_has_its_outcome(test_data, name):
    expected = EXPECTED[name]
    if isinstance(expected, Refused):
        with pytest.raises(VolumeError, match=expected.finding) as caught:
            load_volume(test_data / name)
        assert str(test_data / name) == caught.value.subject
        return
    volume = quiet(test_data / name, padding="keep")
    findings = volume.meta["warnings"]
    assert any(expected.warns in finding for finding in findings) if expected.warns else findings == []
    assert volume.hu.shape == expected.shape
    assert volume.hu.dtype == np.int16
    assert volume.spacing == pytest.approx(expected.spacing, rel=1e-3)
    assert volume.meta["stored_orientation"] == expected.orientation
    assert (volume.hu.min(), volume.hu.max()) == (expected.low, expected.high)
    if expected.percentiles:
        found = np.percentile(volume.hu, [0.5, 5, 50, 95, 99.5])
        np.testing.assert_allclose(found, expected.percentiles, atol=1)

    padded = quiet(test_data / name).hu
    np.testing.assert_array_equal(padded, np.where(volume.hu < -1400, -1024, volume.hu))


@pytest.mark.parametrize("name", [name for name, found in EXPECTED.items() if getattr(found, "same_as_sitk", False)])
def test_simpleitk_reads_the_same(test_data, name):
    volume = quiet(test_data / name, padding="keep")
    hu, affine = read_with_sitk(test_data / name)
    np.testing.assert_array_equal(volume.hu, hu)
    if len(hu) == 1:  # where there is no step, SimpleITK takes another tag than the thickness
        affine[:3, 2] *= volume.spacing[0] / np.linalg.norm(affine[:3, 2])
    np.testing.assert_allclose(volume.affine, affine, atol=2e-3)


@pytest.mark.parametrize("name", ["totalseg/example_ct_dicom", "lidc/LIDC-IDRI-0001", "ibsi/STS_002_CT"])
def test_a_dicom_series_and_its_nifti_are_one_volume(test_data, tmp_path, name):
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(test_data / name)))
    sitk.WriteImage(sitk.Cast(reader.Execute(), sitk.sitkInt16), str(tmp_path / "scan.nii.gz"))
    dicom, nifti = load_volume(test_data / name), load_volume(tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(nifti.hu, dicom.hu)
    np.testing.assert_allclose(nifti.affine, dicom.affine, atol=1e-3)
    assert nifti.spacing == pytest.approx(dicom.spacing, rel=1e-5)


@pytest.mark.parametrize(
    ("suffix", "tolerance"),
    [
        ("BigEndianExplicitTransferSyntax_1.2.840.10008.1.2.2", 0),
        ("DeflatedExplicitVRLittleEndianTransferSyntax_1.2.840.10008.1.2.1.99", 0),
        ("JPEG2000LosslessOnlyTransferSyntax_1.2.840.10008.1.2.4.90", 0),
        ("JPEG2000TransferSyntax_1.2.840.10008.1.2.4.91", 5),
        ("JPEGLSLosslessTransferSyntax_1.2.840.10008.1.2.4.80", 0),
        ("JPEGLSLossyTransferSyntax_1.2.840.10008.1.2.4.81", 1),
        ("JPEGProcess14SV1TransferSyntax_1.2.840.10008.1.2.4.70", 0),
        ("JPEGProcess2_4TransferSyntax_1.2.840.10008.1.2.4.51", 36),
        ("RLELosslessTransferSyntax_1.2.840.10008.1.2.5", 0),
    ],
)
def test_every_transfer_syntax_gives_the_same_slice(test_data, suffix, tolerance):
    expected = quiet(test_data / CORNERSTONE, padding="keep")
    volume = quiet(test_data / f"{CORNERSTONE}_{suffix}.dcm", padding="keep")
    difference = np.abs(volume.hu.astype(np.float32) - expected.hu)
    assert difference.max() <= tolerance + 0.5
    np.testing.assert_array_equal(volume.affine, expected.affine)


def test_labels_lie_on_the_organs_of_the_dicom_series(test_data):
    """Liver, spleen and aorta average what the manifest says only if rows, slices and sides are where they belong."""
    volume = load_volume(test_data / "totalseg/example_ct_dicom")
    labels = load_volume(test_data / "totalseg/example_seg_dicom.nii.gz", check="off")
    assert labels.meta["stored_orientation"] == "LAS"
    np.testing.assert_allclose(labels.affine, volume.affine, atol=1e-3)
    for label, mean in ((5, 89), (1, 80), (52, 177)):
        assert volume.hu[labels.hu == label].mean() == pytest.approx(mean, abs=1)


def test_a_crop_and_its_twin_agree_where_they_overlap(test_data):
    """The two chest crops are of one patient, shifted by (0, 0, 24) voxels."""
    aorta = load_volume(test_data / "totalseg/aorta_ct_cropped.nii.gz")
    pulmonary = load_volume(test_data / "totalseg/pulmonary_ct_cropped.nii.gz")
    x, y, z = np.rint(np.linalg.solve(aorta.affine, pulmonary.affine)[:3, 3]).astype(int)
    assert abs(z) == 24
    part = aorta.hu[z:, :, :][: pulmonary.hu.shape[0], : pulmonary.hu.shape[1], : pulmonary.hu.shape[2]]
    other = pulmonary.hu[: part.shape[0], : part.shape[1], : part.shape[2]]
    assert (x, y) == (0, 0)
    assert np.abs(part.astype(int) - other).max() <= 2


def test_the_small_crop_is_a_part_of_the_whole(test_data):
    whole = load_volume(test_data / "totalseg/example_ct.nii.gz")
    small = load_volume(test_data / "totalseg/example_ct_sm.nii.gz")
    np.testing.assert_array_equal(whole.hu[82:112], small.hu)


def test_the_phantom_pair_by_its_own_geometries(test_data):
    """DICOM and NIfTI of the ramp disagree in z and origin; each is right by its own header, as SimpleITK says."""
    for name in ("ibsi/orientation_phantom_dicom", "ibsi/orientation_phantom_nifti/orientation.nii.gz"):
        volume = load_volume(test_data / name, check="off")
        hu, affine = read_with_sitk(test_data / name)
        np.testing.assert_array_equal(volume.hu, hu)
        np.testing.assert_allclose(volume.affine, affine, atol=1e-3)
        assert volume.hu.shape == (64, 48, 32)
        assert volume.spacing == (2, 2, 2)


@pytest.mark.parametrize(
    ("name", "shape", "orientation", "oblique"),
    [
        ("torchio/dicom", (17, 128, 88), "RAS", 0),
        ("rt-utils/oriented_data", (3, 50, 100), "LPS", 28.3),
        ("niivue/CT_pitch.nii.gz", (58, 248, 175), "RAS", 16.5),
    ],
)
def test_geometry_of_what_is_refused_for_its_values(test_data, name, shape, orientation, oblique):
    volume = load_volume(test_data / name, check="off")
    hu, affine = read_with_sitk(test_data / name)
    np.testing.assert_allclose(volume.hu, hu, atol=1e-4)
    np.testing.assert_allclose(volume.affine, affine, atol=5e-3)
    assert volume.hu.shape == shape
    assert volume.meta["stored_orientation"] == orientation
    assert volume.meta["oblique_deg"] == pytest.approx(oblique, abs=0.1)


def test_a_multi_frame_file_and_its_last_slice(test_data):
    volume = load_volume(test_data / "panimg/dicom_enhanced/volume.dcm")
    single = quiet(test_data / "panimg/dicom_enhanced/slice7.dcm")
    place = np.linalg.solve(volume.affine, single.affine[:, 3])
    np.testing.assert_allclose(place[:2], 0, atol=1e-6)
    np.testing.assert_array_equal(volume.hu[round(place[2])], single.hu[0])
    from_folder = load_volume(test_data / "panimg/dicom_enhanced", series=1)
    np.testing.assert_array_equal(from_folder.hu, volume.hu)


def test_a_point_in_time_can_be_chosen(test_data):
    volume = load_volume(test_data / "panimg/dicom_4d", series=3, check="off")
    assert volume.hu.shape == (4, 2, 3)
    assert volume.spacing == pytest.approx((0.5, 0.43, 0.43))
    uid = pydicom.dcmread(test_data / "panimg/dicom_4d/1.dcm").SeriesInstanceUID
    assert load_volume(test_data / "panimg/dicom_4d", series=str(uid), check="off").hu.shape == (4, 2, 3)
    with pytest.raises(VolumeError, match="0 series match series=20"):
        load_volume(test_data / "panimg/dicom_4d", series=20)


def test_each_slice_has_its_own_rescale(test_data):
    volume = load_volume(test_data / "panimg/dicom_intercept", check="off")
    assert volume.hu.dtype == np.float32
    assert sorted(volume.hu.reshape(2, -1).mean(1)) == pytest.approx([0, 0.01])
    assert volume.meta["rescale"] == "per slice"


def test_a_tilted_and_uneven_series_on_request(test_data):
    folder = test_data / "dcm_qa_ct/GE_tilt_varspacing"
    volume = quiet(folder, check="warn", padding="keep")
    for finding in ("steps between slices", "interpolated to 6.999 mm", "gantry tilt of 18.5 degrees", "oblique"):
        assert any(finding in warning for warning in volume.meta["warnings"])
    assert volume.spacing == pytest.approx((6.9986, 0.488281, 0.488281), rel=1e-4)
    axes = volume.affine[:3, :3] / volume.spacing[::-1]
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-6)
    first = min((pydicom.dcmread(path) for path in folder.iterdir()), key=lambda d: d.ImagePositionPatient[2])
    column, row, slice_, _ = np.linalg.solve(volume.affine, [*first.ImagePositionPatient, 1])
    assert (slice_, column) == pytest.approx((0, 0), abs=1e-3)
    shown = volume.hu[0, round(row) : round(row) + 512]
    np.testing.assert_array_equal(shown[2:-2], first.pixel_array[2:-2])


def test_a_missing_slice_is_interpolated(test_data):
    folder = test_data / "dicom2nifti/sliceincrement_missing_slice"
    volume = quiet(folder)
    slices = sorted((pydicom.dcmread(path) for path in folder.iterdir()), key=lambda d: d.ImagePositionPatient[2])
    hu = [d.pixel_array.astype(np.float32) - 1024 for d in slices]
    gap = int(np.argmax(np.diff([d.ImagePositionPatient[2] for d in slices])))
    np.testing.assert_allclose(volume.hu[gap + 1], (hu[gap] + hu[gap + 1]) / 2, atol=0.51)
    assert volume.hu.shape[0] == 5


def test_the_decoder_keeps_the_sign(test_data):
    volume = quiet(test_data / "pydicom/J2K_pixelrep_mismatch.dcm", padding="keep")
    assert volume.hu[0, 0, 0] == -2000
    assert volume.hu[0, 256, 256] == 27


def test_no_patient_data_in_meta_or_errors(test_data):
    """Whatever the headers call the patient, place or people, is in no meta and no message."""
    for name, expected in EXPECTED.items():
        path = test_data / name
        files = [path] if path.is_file() else sorted(path.iterdir())
        secrets = set()
        for file in files[:3]:
            try:
                dataset = pydicom.dcmread(file, stop_before_pixels=True)
            except (pydicom.errors.InvalidDicomError, IsADirectoryError):
                continue
            for keyword in ("PatientName", "PatientID", "PatientBirthDate", "InstitutionName", "StudyInstanceUID"):
                secrets.add(str(dataset.get(keyword, "")))
            secrets.add(str(dataset.get("SeriesInstanceUID", "")))
            secrets.add(str(dataset.get("SeriesDescription", "")))
        try:
            text = str(quiet(path).meta)
        except VolumeError as error:
            text = error.finding + error.remedy
        for secret in secrets:
            assert len(secret) < 4 or secret not in text, (name, expected)


def test_the_quick_header_scan_finds_what_pydicom_finds(test_data, monkeypatch):
    """Every DICOM file of the manifest, with the scan and with pydicom alone, gives the same frames."""
    from ct_moe import volume_dicom_header_ct_moe as header
    from ct_moe.volume_ct_moe import LoadContext
    from ct_moe.volume_files_ct_moe import folder_entries

    context = LoadContext("test")
    entries = folder_entries(test_data, context)
    quick = header._scan
    scanned = 0
    for entry in entries:
        found = []
        for scan in (quick, lambda *arguments: None):
            monkeypatch.setattr(header, "_scan", scan)
            try:
                found.append(header.read_header(entry, context))
            except VolumeError as error:
                found.append(str(error))
        assert repr(found[0]) == repr(found[1]), entry.name
        scanned += bool(found[0])
    assert scanned > 190
