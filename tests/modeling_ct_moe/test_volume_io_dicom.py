"""DICOM series made for one question each: order, spacing, rescale, tilt, what is told apart and what is refused."""

import os
import struct
import sys
import warnings
import zipfile
import zlib
from io import BytesIO

import numpy as np
import pytest


pydicom = pytest.importorskip("pydicom")
imagecodecs = pytest.importorskip("imagecodecs")

from dicom_series import SERIES, body, compress, enhanced, series, set_pixels, slice_dataset, write  # noqa: E402

from ct_moe import volume_dicom_header_ct_moe, volume_dicom_pixels_ct_moe  # noqa: E402
from ct_moe.errors_ct_moe import VolumeError  # noqa: E402
from ct_moe.volume_io_ct_moe import VolumeWarning, load_volume  # noqa: E402


AFFINE = np.array([[0.8, 0, 0, -20], [0, 0.7, 0, -30], [0, 0, 2.5, 0], [0, 0, 0, 1]])


def quiet(source, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VolumeWarning)
        return load_volume(source, **options)


def zipped(folder, **options) -> BytesIO:
    file = BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, f"DICOM/{path.name}")
    return file


def as_bytes(dataset) -> bytes:
    file = BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


@pytest.mark.parametrize(
    "form",
    [
        lambda folder: folder,
        lambda folder: str(folder),
        lambda folder: sorted(folder.iterdir()),
        lambda folder: [str(path) for path in folder.iterdir()],
        lambda folder: [pydicom.dcmread(path) for path in folder.iterdir()],
        lambda folder: zipped(folder),
        lambda folder: zipped(folder, compression=zipfile.ZIP_DEFLATED).getvalue(),
        lambda folder: series(),
        lambda folder: enhanced(),
        lambda folder: as_bytes(enhanced()),
        lambda folder: BytesIO(as_bytes(enhanced())),
    ],
)
def test_every_form_of_a_series_gives_the_same_volume(tmp_path, form):
    folder = write(tmp_path / "scan", series())
    volume = load_volume(form(folder))
    np.testing.assert_array_equal(volume.hu, body())
    assert volume.hu.dtype == np.int16
    assert volume.spacing == pytest.approx((2.5, 0.7, 0.8))  # not the SliceThickness of 9
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-9)
    assert volume.meta["format"] == "dicom"
    assert volume.meta["slice_thickness_mm"] == 9
    assert "DOE" not in str(volume.meta)


def test_position_alone_gives_the_order(tmp_path):
    datasets = series(InstanceNumber=lambda number: 100 - number, SliceLocation=lambda number: -number)
    volume = load_volume(write(tmp_path / "scan", datasets, names=[f"{99 - n}" for n in range(6)]))
    np.testing.assert_array_equal(volume.hu, body())


@pytest.mark.parametrize("orientation", [[0, 1, 0, 0, 0, -1], [1, 0, 0, 0, 0, -1], [-1, 0, 0, 0, -1, 0]])
def test_other_planes_are_turned_to_lps(orientation):
    row, column = np.reshape(orientation, (2, 3))
    normal = np.cross(row, column)
    datasets = series(
        ImageOrientationPatient=orientation, ImagePositionPatient=lambda number: list(2.5 * number * normal)
    )
    volume = load_volume(datasets)
    assert np.allclose(np.diag(volume.affine[:3, :3]), volume.spacing[::-1])
    assert sorted(volume.spacing) == pytest.approx([0.7, 0.8, 2.5])
    # Voxel by voxel: what lies at a place in the patient is what the slice there holds.
    hu = body()
    for k, j, i in [(0, 0, 0), (1, 2, 3), (5, 9, 11), (3, 7, 4)]:
        place = 2.5 * k * normal + 0.7 * j * column + 0.8 * i * row
        x, y, z = np.rint(np.linalg.solve(volume.affine, [*place, 1])[:3]).astype(int)
        assert volume.hu[z, y, x] == hu[k, j, i]


def test_each_slice_is_rescaled_by_its_own_slope_and_intercept():
    datasets = series(RescaleIntercept=lambda number: -1024 + number, RescaleSlope=lambda number: 1 + number % 2)
    volume = load_volume(datasets, padding="keep")
    stored = body().astype(int) + 1024
    expected = np.stack([plane * (1 + n % 2) - 1024 + n for n, plane in enumerate(stored)])
    np.testing.assert_array_equal(volume.hu, expected)
    assert volume.hu.dtype == np.int16
    assert volume.meta["rescale"] == "per slice"
    fractional = load_volume(series(RescaleSlope=1.5, RescaleIntercept=-1011.5))
    assert fractional.hu.dtype == np.float32
    np.testing.assert_allclose(fractional.hu, stored * 1.5 - 1011.5)


def test_values_beyond_int16_become_float():
    datasets = series(RescaleSlope=100, RescaleIntercept=-100_000)
    volume = quiet(datasets, check="off", padding="keep")
    np.testing.assert_array_equal(volume.hu, (body().astype(int) + 1024) * 100 - 100_000)
    assert volume.hu.dtype == np.float32


def stored_as(dtype: str, allocated: int, stored: int, high: int, signed: int, offset: int, junk: int = 0):
    """The body with HU = stored value + offset in another pixel layout, with `junk` in the bits that hold no value."""
    datasets = []
    for dataset, plane in zip(series(), body()):
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = allocated, stored, high
        dataset.PixelRepresentation, dataset.RescaleIntercept = signed, offset
        values = (plane.astype(np.int64) - offset) & (2**stored - 1)
        values = (values << (high + 1 - stored)) | junk
        set_pixels(dataset, values.astype(dtype).tobytes())
        datasets.append(dataset)
    return datasets


@pytest.mark.parametrize(
    "layout",
    [
        ("<u2", 16, 16, 15, 0, -1024),
        ("<u2", 16, 16, 15, 1, 0),
        ("<u2", 16, 12, 11, 1, 0),
        ("<u2", 16, 12, 11, 0, -1024, 0xF000),
        ("<u2", 16, 12, 11, 1, 0, 0x7000),
        ("<u2", 16, 12, 15, 0, -1024, 0x000F),
        ("<u4", 32, 32, 31, 1, 0),
        ("<u4", 32, 24, 23, 0, -100_000),
    ],
)
def test_pixel_layouts(layout):
    np.testing.assert_array_equal(load_volume(stored_as(*layout)).hu, body())


def test_eight_bits_and_big_endian(tmp_path):
    hu = np.where(body() > 0, 50, -1000).astype(np.int16)
    datasets = []
    for dataset, plane in zip(series(hu), hu):
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
        dataset.RescaleSlope, dataset.RescaleIntercept = 5, -1000
        set_pixels(dataset, ((plane + 1000) // 5).astype(np.uint8).tobytes())
        datasets.append(dataset)
    np.testing.assert_array_equal(load_volume(datasets).hu, hu)

    datasets = series()
    for dataset, plane in zip(datasets, body()):
        dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.2"
        set_pixels(dataset, (plane + 1024).astype(">u2").tobytes())
    np.testing.assert_array_equal(load_volume(write(tmp_path / "scan", datasets)).hu, body())


@pytest.mark.parametrize(
    ("syntax", "signed"),
    [
        ("1.2.840.10008.1.2.4.90", False),
        ("1.2.840.10008.1.2.4.90", True),
        ("1.2.840.10008.1.2.4.80", False),
        ("1.2.840.10008.1.2.4.80", True),
        ("1.2.840.10008.1.2.4.70", False),  # the manifest has a signed one, which the encoder here cannot write
    ],
)
def test_compressed_pixels(tmp_path, syntax, signed):
    encode = {
        "90": lambda pixels: imagecodecs.jpeg2k_encode(pixels, level=0, codecformat="j2k"),
        "80": imagecodecs.jpegls_encode,
        "70": lambda pixels: imagecodecs.jpeg8_encode(pixels, lossless=True),
    }[syntax[-2:]]
    datasets = series(
        BitsStored=16, HighBit=15, PixelRepresentation=int(signed), RescaleIntercept=0 if signed else -1024
    )
    for dataset, plane in zip(datasets, body()):
        pixels = plane if signed else (plane + 1024).astype(np.uint16)
        if signed and syntax.endswith("80"):
            pixels = pixels.view(np.uint16)  # JPEG-LS knows no sign: the header says how to read the bits
        compress(dataset, encode(pixels), syntax)
    np.testing.assert_array_equal(load_volume(write(tmp_path / "scan", datasets)).hu, body())


def test_jpeg_2000_in_boxes():
    datasets = series()
    for dataset, plane in zip(datasets, body()):
        code = imagecodecs.jpeg2k_encode((plane + 1024).astype(np.uint16), level=0, codecformat="jp2")
        assert code[4:8] == b"jP  "
        compress(dataset, code, "1.2.840.10008.1.2.4.90")
    np.testing.assert_array_equal(load_volume(datasets).hu, body())


def test_compressed_multi_frame():
    dataset = enhanced()
    frames = [
        imagecodecs.jpeg2k_encode((plane + 1024).astype(np.uint16), level=0, codecformat="j2k")
        for plane in body()[::-1]
    ]
    compress(dataset, frames[0], "1.2.840.10008.1.2.4.90")
    dataset.PixelData = pydicom.encaps.encapsulate(frames)
    np.testing.assert_array_equal(load_volume(as_bytes(dataset)).hu, body())
    dataset.PixelData = pydicom.encaps.encapsulate(frames[:-2])
    with pytest.raises(VolumeError, match=r"frames are there|cannot be read"):
        load_volume(as_bytes(dataset))


def test_deflated_files(tmp_path):
    for name, dataset in enumerate(series()):
        dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
        dataset.save_as(tmp_path / str(name), enforce_file_format=True)
    np.testing.assert_array_equal(load_volume(tmp_path).hu, body())


def test_declared_padding_becomes_air():
    hu = body()
    hu[:, :, :2] = -1200
    datasets = series(
        hu, PixelRepresentation=1, RescaleIntercept=0, BitsStored=16, HighBit=15, PixelPaddingValue=-1200
    )
    for dataset, plane in zip(datasets, hu):
        set_pixels(dataset, plane.tobytes())
    volume = load_volume(datasets)
    np.testing.assert_array_equal(volume.hu, np.where(hu == -1200, -1024, hu))
    assert volume.meta["padding_voxels"] == (hu == -1200).sum()
    np.testing.assert_array_equal(load_volume(datasets, padding="keep").hu, hu)

    # The value -32768 minus 1024 is no int16: it must not turn the whole volume into float.
    datasets = series(PixelRepresentation=1, BitsStored=16, HighBit=15, PixelPaddingValue=-32768)
    for dataset, plane in zip(datasets, body()):
        stored = plane + 1024
        stored[:, :2] = -32768
        set_pixels(dataset, stored.astype("<i2").tobytes())
    volume = load_volume(datasets)
    assert volume.hu.dtype == np.int16
    assert (volume.hu[:, :, :2] == -1024).all()


def test_a_padding_value_that_could_be_tissue_is_left_alone():
    volume = load_volume(series(PixelPaddingValue=1024 + 45))
    np.testing.assert_array_equal(volume.hu, body())


def test_a_range_of_padding_values():
    datasets = series(PixelPaddingValue=4000, PixelPaddingRangeLimit=4095, RescaleSlope=2, RescaleIntercept=-2048)
    for dataset, plane in zip(datasets, body()):
        stored = (plane + 2048) // 2
        stored[0, :2] = 4050
        set_pixels(dataset, stored.astype("<u2").tobytes())
    assert (load_volume(datasets).hu[:, 0, :2] == -1024).all()


# Geometry


@pytest.mark.parametrize("tilt", [-18.0, 5.0, 27.0])
def test_a_gantry_tilt_is_undone(tilt):
    """A straight rod along the table stands still in the patient, although the tilted slices cut it obliquely."""
    angle = np.radians(tilt)
    column = np.array([0, np.cos(angle), np.sin(angle)])
    rod_y = 12.0  # mm, in the patient
    hu = np.full((20, 64, 16), -1000, np.int16)
    positions = []
    for number in range(20):
        origin = np.array([0.0, 0.0, 3.0 * number])
        for row in range(64):
            y = (origin + 0.7 * row * column)[1]
            hu[number, row, 5:9] = np.clip(1000 - 700 * abs(y - rod_y), -1000, 1000)
        positions.append(list(origin))
    datasets = series(
        hu, ImagePositionPatient=lambda number: positions[number], ImageOrientationPatient=[1, 0, 0, *column]
    )
    volume = quiet(datasets)
    assert any(f"gantry tilt of {abs(tilt):.1f} degrees" in finding for finding in volume.meta["warnings"])
    assert volume.spacing == pytest.approx((3 * np.cos(angle), 0.7, 0.8))
    axes = volume.affine[:3, :3] / volume.spacing[::-1]
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-9)
    profile = volume.hu[:, :, 6].astype(float) + 1024
    found = 0
    for z in range(volume.hu.shape[0]):
        if profile[z].max() > 1500:
            y = (profile[z] ** 4 @ np.arange(profile.shape[1])) / (profile[z] ** 4).sum()
            assert (volume.affine @ [6, y, z, 1])[1] == pytest.approx(rod_y, abs=0.35)
            found += 1
    assert found >= 15


def test_rounded_positions_are_even():
    exact = 0.625 * np.arange(6)
    volume = load_volume(series(ImagePositionPatient=lambda number: [-20, -30, round(exact[number] + 0.013, 1)]))
    np.testing.assert_array_equal(volume.hu, body())
    assert volume.spacing[0] == pytest.approx(0.62, abs=0.01)


def test_a_rounded_orientation_is_no_tilt():
    axes = [0.9998, 0.0175, 0, -0.0174, 0.9998, 0.002]
    volume = load_volume(series(ImageOrientationPatient=axes))
    np.testing.assert_array_equal(volume.hu, body())


def test_uneven_steps_are_resampled_with_a_warning():
    places = [0, 2, 4, 7, 9, 11]
    with pytest.warns(VolumeWarning, match=r"steps between slices from 2 to 3 mm; slices were interpolated to 2 mm"):
        volume = load_volume(series(ImagePositionPatient=lambda number: [-20, -30, places[number]]))
    hu = body().astype(float)
    assert volume.hu.shape[0] == 6
    np.testing.assert_array_equal(volume.hu[:3], hu[:3])
    np.testing.assert_allclose(volume.hu[3], hu[2] / 3 + hu[3] * 2 / 3, atol=0.51)
    assert volume.spacing[0] == 2


def test_large_gaps_are_refused():
    places = [0, 2, 4, 6, 8, 30]
    datasets = series(ImagePositionPatient=lambda number: [-20, -30, places[number]])
    with pytest.raises(VolumeError, match="steps between slices from 2 to 22 mm: slices are missing"):
        load_volume(datasets)
    assert quiet(datasets, check="warn").hu.shape[0] == 16


def test_slices_that_jump_sideways_are_refused():
    datasets = series(ImagePositionPatient=lambda number: [-20 + 40 * (number == 3), -30, 2.5 * number])
    with pytest.raises(VolumeError, match="shifted against each other"):
        load_volume(datasets)


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"ImageOrientationPatient": [1, 0, 0, 0, 0.5, 0]}, "not two perpendicular directions"),
        ({"ImageOrientationPatient": [1, 0, 0, 0.5, 0.866, 0]}, "not two perpendicular directions"),
        ({"PixelSpacing": [0, 0.8]}, r"pixel spacing 0 x 0\.8 mm"),
        ({"PixelSpacing": [-1, 0.8]}, "pixel spacing -1"),
        ({"PixelSpacing": [1e300, 0.8]}, "pixel spacing 1e"),
        ({"ImagePositionPatient": [0, 1e200, 0]}, "far outside of any scanner"),
        ({"RescaleSlope": 0}, "rescale slope 0"),
        ({"Rows": 0}, "0 x 12 pixels"),
        ({"Rows": 11}, "240 bytes of pixels where 264 are needed"),
        ({"BitsAllocated": 12}, "12 bits up to bit 11 of 12"),
        ({"BitsStored": 17}, "17 bits"),
        ({"HighBit": 3}, "12 bits up to bit 3"),
        ({"NumberOfFrames": 3}, "3 frames without a position"),
        ({"PixelData": b""}, "an image without pixels|0 bytes of pixels"),
    ],
)
def test_damaged_headers_name_the_file(tmp_path, change, finding):
    datasets = series()
    for keyword, value in change.items():
        setattr(datasets[2], keyword, value)
    write(tmp_path / "scan", datasets, names=list("abcdef"))
    with pytest.raises(VolumeError, match=rf"scan: c\b.*({finding})"):
        load_volume(tmp_path / "scan")


# What belongs together


def test_scouts_reports_and_pictures_are_left_out(tmp_path):
    scout = slice_dataset(body()[0], 99, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], SeriesInstanceUID="1.9")
    picture = slice_dataset(body()[0], SeriesInstanceUID="1.8", ImagePositionPatient=None)
    report = slice_dataset(body()[0], PixelData=None, Rows=None, Columns=None, Modality="SR")
    folder = write(tmp_path / "scan", [scout, *series(), picture, report])
    (folder / "README.txt").write_text("not DICOM")
    (folder / "deeper").mkdir()
    volume = load_volume(folder)
    np.testing.assert_array_equal(volume.hu, body())
    assert volume.meta["left_out"] == {"scouts": 1, "other_objects": 2, "pictures": 1}
    with pytest.raises(VolumeError, match="only scouts"):
        load_volume([scout])
    with pytest.raises(VolumeError, match="a dataset holds no image"):
        load_volume([*series(), report])


def test_several_series_are_listed_and_chosen(tmp_path):
    lung = series(SeriesInstanceUID="1.5", SeriesNumber=9, ConvolutionKernel="B70f")
    folder = write(tmp_path / "scan", [*lung, *series()[:4]])
    listed = (
        r"2 series or points in time: \[1\] series number 3, axial, 4 slices of 10 x 12, 2\.5 mm apart; "
        r"\[2\] series number 9, axial, 6 slices of 10 x 12, 2\.5 mm apart, kernel B70f\. "
        r"Choose one by its number in this list: series=1\."
    )
    with pytest.raises(VolumeError, match=listed) as caught:
        load_volume(folder)
    assert "1.5" not in str(caught.value).replace("2.5", "")  # UIDs identify
    assert load_volume(folder, series=1).hu.shape[0] == 4
    assert load_volume(folder, series=2).hu.shape[0] == 6
    assert load_volume(folder, series=SERIES).hu.shape[0] == 4
    for missing in (0, -1, 3, "1.7"):
        with pytest.raises(VolumeError, match="0 series match"):
            load_volume(folder, series=missing)
    with pytest.raises(VolumeError, match="series: "):
        load_volume(folder, series=1.5)


@pytest.mark.parametrize(
    "marks",
    [
        {"AcquisitionNumber": (1, 2)},
        {"TemporalPositionIdentifier": (1, 2)},
        {"AcquisitionTime": ("120000", "120130")},
        {"ContentTime": ("120000", "120130")},
    ],
)
def test_points_in_time_of_one_series_are_told_apart(marks):
    ((keyword, (first, second)),) = marks.items()
    later = body() + 5
    datasets = [*series(later, **{keyword: second}), *series(**{keyword: first})]
    with pytest.raises(VolumeError, match="2 series or points in time"):
        load_volume(datasets)
    np.testing.assert_array_equal(load_volume(datasets, series=1).hu, body())
    np.testing.assert_array_equal(load_volume(datasets, series=2).hu, later)


def test_slices_at_one_position_that_nothing_tells_apart():
    with pytest.raises(VolumeError, match="2 slices lie at the same position and nothing tells them apart"):
        load_volume([*series(), *series()])


def test_copies_are_taken_once(tmp_path):
    datasets = series()
    write(tmp_path / "scan", [*datasets, *datasets[:3]])
    with pytest.warns(VolumeWarning, match="3 files were there twice"):
        volume = load_volume(tmp_path / "scan")
    np.testing.assert_array_equal(volume.hu, body())


def test_one_instance_uid_for_all_slices_is_no_copy():
    np.testing.assert_array_equal(load_volume(series(SOPInstanceUID="1.2.3")).hu, body())


def test_a_single_slice_takes_its_thickness():
    with pytest.warns(VolumeWarning, match="a single slice; its thickness of 9 mm"):
        volume = load_volume(series()[2:3])
    assert volume.spacing[0] == 9
    with pytest.raises(VolumeError, match="single slice without a thickness"):
        load_volume(series(SliceThickness=None)[:1])


@pytest.mark.parametrize(
    ("change", "finding", "doubt"),
    [
        ({"Modality": "MR"}, "modality MR, not CT", True),
        ({"RescaleType": "MGML"}, "rescale type is not HU", True),
        ({"PhotometricInterpretation": "RGB"}, "colour pictures", False),
        ({"ImagePositionPatient": None}, "no position or orientation", False),
        ({"RescaleSlope": None, "RescaleIntercept": None}, "the rescale was forgotten", True),
    ],
)
def test_what_is_not_ct(change, finding, doubt):
    datasets = series(**change)
    with pytest.raises(VolumeError, match=finding):
        load_volume(datasets)
    if doubt:
        assert any(finding in warning for warning in quiet(datasets, check="warn").meta["warnings"])
        load_volume(datasets, intensity="display")


def test_a_modality_lut_is_refused():
    datasets = series()
    for dataset in datasets:
        dataset.ModalityLUTSequence = pydicom.Sequence([pydicom.Dataset()])
    with pytest.raises(VolumeError, match="table instead of a rescale"):
        load_volume(datasets)


def test_display_values_are_not_padded():
    datasets = series(Modality="MR", PixelPaddingValue=1024 + 900)
    np.testing.assert_array_equal(load_volume(datasets, intensity="display").hu, body())


# Damaged, hostile, missing


@pytest.mark.parametrize("cut", [1, 100, 300])
def test_truncated_files(tmp_path, cut):
    folder = write(tmp_path / "scan", series())
    path = sorted(folder.iterdir())[3]
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(VolumeError, match=f"{path.name}: .*(too early|are needed|without pixels)"):
        load_volume(folder)


def test_a_code_stream_of_another_size_is_not_decoded(tmp_path):
    datasets = series()
    for dataset in datasets:
        compress(
            dataset,
            imagecodecs.jpeg2k_encode(np.zeros((640, 480), np.uint16), codecformat="j2k"),
            "1.2.840.10008.1.2.4.90",
        )
    with pytest.raises(VolumeError, match="640 x 480 pixels in the code stream, 10 x 12 in the header"):
        load_volume(datasets)
    for dataset in datasets:
        compress(dataset, b"\xff\xd8 no picture", "1.2.840.10008.1.2.4.70")
    with pytest.raises(VolumeError, match="no picture in the code stream"):
        load_volume(datasets)
    for dataset in datasets:
        compress(dataset, struct.pack("<16L", 2, 64, 65, *[0] * 13) + b"\x80\x80", "1.2.840.10008.1.2.5")
    with pytest.raises(VolumeError, match="the pixels cannot be decoded"):
        load_volume(datasets)


def test_unknown_transfer_syntaxes_are_named():
    datasets = series()
    for dataset in datasets:
        compress(dataset, b"12", "1.2.840.10008.1.2.4.110")
    with pytest.raises(VolumeError, match=r"transfer syntax 1\.2\.840\.10008\.1\.2\.4\.110 is not supported"):
        load_volume(datasets)


def test_a_deflated_bomb_is_not_inflated(tmp_path):
    dataset = slice_dataset(body()[0])
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    dataset.save_as(tmp_path / "a", enforce_file_format=True)
    content = (tmp_path / "a").read_bytes()
    start = 132 + 12 + struct.unpack_from("<L", content, 140)[0]
    inflated = zlib.decompress(content[start:], -15)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = deflate.compress(inflated) + deflate.compress(bytes(300_000_000)) + deflate.flush()
    (tmp_path / "a").write_bytes(content[:start] + bomb)
    volume = quiet(tmp_path / "a")
    np.testing.assert_array_equal(volume.hu[0], body()[0])


def test_lying_sizes_are_refused_before_memory_is_taken():
    datasets = series(Rows=65535, Columns=65535)
    for dataset in datasets:
        code = imagecodecs.jpeg2k_encode(np.zeros((8, 8), np.uint16), codecformat="j2k")
        compress(dataset, code, "1.2.840.10008.1.2.4.90")
    with pytest.raises(VolumeError, match="over the limit"):
        load_volume(datasets)
    with pytest.raises(VolumeError, match="over the limit of 0 MB"):
        load_volume(series(), max_bytes=1000)


@pytest.mark.parametrize(
    ("module", "names", "remedy"),
    [
        (volume_dicom_header_ct_moe, ["pydicom", "read_dataset"], "pip install pydicom"),
        (volume_dicom_pixels_ct_moe, ["_JPEG_DECODERS"], "pip install imagecodecs"),
    ],
)
def test_missing_libraries_are_named(monkeypatch, tmp_path, module, names, remedy):
    dataset = slice_dataset(body()[0])
    compress(
        dataset,
        imagecodecs.jpeg2k_encode((body()[0] + 1024).astype(np.uint16), codecformat="j2k"),
        "1.2.840.10008.1.2.4.90",
    )
    dataset.save_as(tmp_path / "a", enforce_file_format=True)
    for name in names:
        value = dict.fromkeys(getattr(module, name)) if name == "_JPEG_DECODERS" else None
        monkeypatch.setattr(module, name, value)
    with pytest.raises(VolumeError, match=remedy):
        load_volume(tmp_path)


def test_folders_without_a_scan(tmp_path):
    with pytest.raises(VolumeError, match="no DICOM image"):
        load_volume(tmp_path)
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(VolumeError, match="no DICOM image"):
        load_volume(tmp_path)
    with pytest.raises(VolumeError, match="no DICOM image"):
        load_volume([])
    with pytest.raises(VolumeError, match=r"a\.txt holds no image"):
        load_volume([tmp_path / "a.txt"])
    with pytest.raises(VolumeError, match="a list that holds int"):
        load_volume([1, 2])


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links_out_of_the_folder_are_refused(tmp_path, monkeypatch):
    outside = write(tmp_path / "outside", series(), names=list("abcdef"))
    scan = write(tmp_path / "scan", series()[:5], names=list("abcde"))
    (scan / "inside").symlink_to(scan / "a")
    np.testing.assert_array_equal(load_volume(scan).hu, body()[:5])
    (scan / "f").symlink_to(outside / "f")
    with pytest.raises(VolumeError, match="f is a link that leads out of the folder"):
        load_volume(scan)
    (scan / "f").unlink()
    (scan / "more").symlink_to(outside)
    with pytest.raises(VolumeError, match="more is a link that leads out"):
        load_volume(scan)
    # A folder that the caller names may be a link; the Hub's cache is made of links and stays in itself.
    (tmp_path / "linked").symlink_to(outside)
    np.testing.assert_array_equal(load_volume(tmp_path / "linked").hu, body())
    snapshot = tmp_path / "cache" / "snapshot"
    snapshot.mkdir(parents=True)
    blobs = write(tmp_path / "cache" / "blobs", series())
    for path in blobs.iterdir():
        (snapshot / f"{path.name}.dcm").symlink_to(path)
    monkeypatch.setattr("ct_moe.volume_files_ct_moe.HF_HUB_CACHE", str(tmp_path / "cache"))
    np.testing.assert_array_equal(load_volume(snapshot).hu, body())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_pipes_do_not_hang(tmp_path):
    scan = write(tmp_path / "scan", series())
    os.mkfifo(scan / "pipe")
    np.testing.assert_array_equal(load_volume(scan).hu, body())
    with pytest.raises(VolumeError, match="not a regular file"):
        load_volume(scan / "pipe")


def hostile_zip(change) -> bytes:
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        change(archive)
    return file.getvalue()


def link_in_zip(archive):
    info = zipfile.ZipInfo("a")
    info.external_attr = 0o120777 << 16
    archive.writestr(info, "/etc/passwd")


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (lambda archive: archive.writestr("../a", b"x"), "leads out of it"),
        (lambda archive: archive.writestr("a/../../b", b"x"), "leads out of it"),
        (lambda archive: archive.writestr("/etc/a", b"x"), "leads out of it"),
        (lambda archive: archive.writestr("C:\\a", b"x"), "leads out of it"),
        (link_in_zip, "holds a link"),
        (lambda archive: archive.writestr("a", b"x", compress_type=zipfile.ZIP_BZIP2), "other than deflate"),
        (
            lambda archive: archive.writestr("a.zip", hostile_zip(lambda inner: inner.writestr("b", b"x"))),
            "in an archive",
        ),
        (lambda archive: archive.writestr("a.txt", b"hello"), "unknown format"),
        (lambda archive: (archive.writestr("a", b"hello"), archive.writestr("b", b"")), "no DICOM image"),
    ],
)
def test_hostile_zips(change, finding):
    with pytest.raises(VolumeError, match=finding):
        load_volume(hostile_zip(change))


def test_zip_bombs_and_damaged_zips(tmp_path):
    bomb = hostile_zip(lambda archive: archive.writestr("a", bytes(50_000_000), compress_type=zipfile.ZIP_DEFLATED))
    with pytest.raises(VolumeError, match="over the limit"):
        load_volume(bomb, max_bytes=10_000_000)
    content = zipped(write(tmp_path / "scan", series()), compression=zipfile.ZIP_DEFLATED).getvalue()
    with pytest.raises(VolumeError, match="zip archive is damaged"):
        load_volume(content[: len(content) // 2])
    damaged = bytearray(content)
    damaged[300:340] = b"\xff" * 40
    with pytest.raises(VolumeError, match=r"cannot be read|damaged"):
        load_volume(bytes(damaged))
    encrypted = bytearray(content)
    start = content.index(b"PK\1\2")
    encrypted[start + 8] |= 1
    with pytest.raises(VolumeError, match="encrypted"):
        load_volume(bytes(encrypted))


def test_a_zip_around_a_nifti_file(tmp_path):
    import nibabel as nib

    image = nib.Nifti1Image(body().T, np.diag([-0.8, -0.7, 2.5, 1]))
    content = hostile_zip(lambda archive: archive.writestr("scan.nii", image.to_bytes()))
    np.testing.assert_array_equal(load_volume(content).hu, body())


def test_no_patient_data_in_errors(tmp_path):
    for keyword, vr, value in (
        ("PixelSpacing", "DS", [0, 1]),
        ("Modality", "CS", "MR"),
        ("RescaleSlope", "LO", "SECRET-77"),
        ("Rows", "US", 13),
    ):
        datasets = series()
        datasets[1][keyword] = pydicom.DataElement(keyword, vr, value)
        with pytest.raises(VolumeError) as caught:
            load_volume(datasets)
        assert "SECRET" not in str(caught.value)
        assert "DOE" not in str(caught.value)
