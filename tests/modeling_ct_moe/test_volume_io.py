"""`load_volume` on NIfTI: geometry, value types, plausibility and every way to be refused."""

import gzip
import pickle
import struct
import warnings
from io import BytesIO

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ct_moe.errors_ct_moe import VolumeError
from ct_moe.volume_io_ct_moe import Volume, VolumeWarning, load_volume


LPS_AFFINE = np.array([[-0.8, 0, 0, 12.0], [0, -0.7, 0, 34.0], [0, 0, 2.5, -56.0], [0, 0, 0, 1]])  # RAS mm of LPS axes

# How the same HU may lie in a file: type, slope (None: not scaled), intercept.
STORAGES = [
    *((dtype, None, 0) for dtype in ("int16", "float32", ">i2", "int32", "float64")),
    *(("uint16", 1, -1024), ("int16", 0.5, -1000), ("uint8", 16, -1024), ("int16", 1, -24)),
]


def body(shape=(9, 11, 13), dtype=np.int16) -> np.ndarray:
    """A lump of tissue in air with a bone in one corner, so that no two axes look alike; axes (z, y, x)."""
    hu = np.full(shape, -1000, np.float64)
    hu[2:-2, 3:-3, 3:-2] = 40
    hu[0, 0, 0] = 900
    hu += np.arange(hu.size).reshape(shape) % 7
    return hu.astype(dtype)


def nifti(hu=None, affine=LPS_AFFINE, dtype=None, slope=None, intercept=0.0) -> nib.Nifti1Image:
    """`hu` in (z, y, x) as a NIfTI image; with a slope, stored so that the file's rescale gives `hu` back."""
    hu = body() if hu is None else hu
    image = nib.Nifti1Image(hu.T, affine, dtype=dtype)
    if slope is not None:
        image = nib.Nifti1Image(np.round((hu.T - intercept) / slope).astype(dtype), affine)
        image.header.set_slope_inter(slope, intercept)
    return image


def header_bytes(image=None, **fields) -> bytes:
    """An image as bytes, with header fields overwritten."""
    content = bytearray((image or nifti()).to_bytes())
    header = nib.Nifti1Header(bytes(content[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    content[:348] = header.binaryblock
    return bytes(content)


def with_slope(image, slope, intercept) -> bytes:
    return header_bytes(image, scl_slope=slope, scl_inter=intercept)


def test_a_nifti_file_becomes_an_lps_volume(tmp_path):
    nifti().to_filename(tmp_path / "scan.nii.gz")
    volume = load_volume(tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(volume.hu, body())
    assert volume.hu.dtype == np.int16
    assert volume.spacing == pytest.approx((2.5, 0.7, 0.8))
    np.testing.assert_allclose(volume.affine, np.diag([-1, -1, 1, 1]) @ LPS_AFFINE, atol=1e-6)
    assert volume.meta["stored_orientation"] == "LPS"
    assert volume.meta["format"] == "nifti"
    assert volume.meta["warnings"] == []


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz", "scan.img", "scan.hdr"])
@pytest.mark.parametrize("as_type", [str, lambda path: path])
def test_files_and_pairs_by_path(tmp_path, name, as_type):
    image = nifti() if ".nii" in name else nib.Nifti1Pair(body().T, LPS_AFFINE)
    image.to_filename(tmp_path / name)
    np.testing.assert_array_equal(load_volume(as_type(tmp_path / name)).hu, body())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda path: path.read_bytes(),
        lambda path: gzip.compress(path.read_bytes()),
        lambda path: BytesIO(path.read_bytes()),
        lambda path: nib.load(path),
        lambda path: nifti(),
        lambda path: nib.Nifti1Image.from_bytes(path.read_bytes()),
        lambda path: nib.Nifti2Image(body().T, LPS_AFFINE).to_bytes(),
        lambda path: {"path": str(path), "bytes": None},
        lambda path: {"path": None, "bytes": path.read_bytes()},
    ],
)
def test_other_forms_give_the_same_volume(tmp_path, wrap):
    nifti().to_filename(tmp_path / "scan.nii")
    expected = load_volume(tmp_path / "scan.nii")
    volume = load_volume(wrap(tmp_path / "scan.nii"))
    np.testing.assert_array_equal(volume.hu, expected.hu)
    np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-5)


def test_a_volume_is_returned_as_it_is():
    volume = Volume(body(), (2.5, 0.7, 0.8))
    assert load_volume(volume) is volume
    namesake = type("Volume", (), vars(volume))()
    assert load_volume(namesake).hu is volume.hu  # remote code has a copy of the class for each entry point
    np.testing.assert_array_equal(volume.affine, np.diag([0.8, 0.7, 2.5, 1]))


@settings(max_examples=40, deadline=None)
@given(
    codes=st.permutations([0, 1, 2]),
    flips=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    storage=st.sampled_from(STORAGES),
)
def test_the_way_a_scan_is_stored_does_not_matter(codes, flips, storage):
    dtype, slope, intercept = storage
    hu = np.round(body() / 16) * 16  # exact in every storage above
    original = nib.Nifti1Image(hu.T, LPS_AFFINE)
    turned = original.as_reoriented(np.column_stack([codes, np.where(flips, -1, 1)]))
    if slope is None:
        array = np.asarray(turned.dataobj).astype(dtype)
        content = nib.Nifti1Image(array, turned.affine).to_bytes()
    else:
        array = np.round((np.asarray(turned.dataobj) - intercept) / slope).astype(dtype)
        content = with_slope(nib.Nifti1Image(array, turned.affine), slope, intercept)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VolumeWarning)  # for the -1000 that the property does not look at
        volume = load_volume(content)
    np.testing.assert_allclose(volume.hu, hu, atol=1e-3)
    np.testing.assert_allclose(volume.affine, np.diag([-1, -1, 1, 1]) @ LPS_AFFINE, atol=1e-4)
    assert volume.spacing == pytest.approx((2.5, 0.7, 0.8))


def test_reorient_false_keeps_the_files_axes():
    turned = nifti().as_reoriented([[2, -1], [0, 1], [1, 1]])
    volume = load_volume(turned, reorient=False)
    np.testing.assert_array_equal(volume.hu, np.asarray(turned.dataobj).T)
    np.testing.assert_allclose(volume.affine, np.diag([-1, -1, 1, 1]) @ turned.affine, atol=1e-6)


def test_whole_numbers_stay_int16_and_others_become_float32():
    assert load_volume(nifti(body().astype(np.int32))).hu.dtype == np.int16
    assert load_volume(with_slope(nifti(body()), 1, -10)).hu.dtype == np.int16
    assert load_volume(with_slope(nifti(body()), 1.5, 0)).hu.dtype == np.float32
    large = body().astype(np.int32)
    large[4, 4, 4] = 40000
    volume = load_volume(nifti(large))
    assert volume.hu.dtype == np.float32
    assert volume.hu.max() == 40000


def test_an_image_in_memory_is_not_changed():
    hu = body()
    hu[0, 0, :5] = -3024
    image = nifti(hu.copy())
    assert load_volume(image).hu[0, 0, 0] == -1024
    np.testing.assert_array_equal(np.asarray(image.dataobj).T, hu)


def test_padding_becomes_air_or_is_kept():
    hu = body()
    hu[0, 0, :5] = -3024
    volume = load_volume(nifti(hu))
    assert volume.meta["padding_voxels"] == 5
    assert volume.hu.min() == -1024
    np.testing.assert_array_equal(load_volume(nifti(hu), padding="keep").hu, hu)


def test_voxels_that_are_no_numbers_become_air_with_a_warning():
    hu = body(dtype=np.float32)
    hu[1, 1, 1] = np.nan
    hu[1, 1, 2] = np.inf
    with pytest.warns(VolumeWarning, match="2 voxels were not finite"):
        volume = load_volume(nifti(hu))
    assert volume.hu[1, 1, 1] == volume.hu[1, 1, 2] == -1024


def test_values_beyond_all_measure_are_refused():
    hu = body(dtype=np.float32)
    hu[1, 1, 1] = 3e38
    with pytest.raises(VolumeError, match=r"to 3e\+38 are no intensities"):
        load_volume(nifti(hu), check="off")
    with pytest.raises(VolumeError, match="no voxel is a finite number"):
        load_volume(nifti(np.full((3, 4, 5), np.nan, np.float32)))


def test_units_other_than_millimetres_are_converted():
    affine = LPS_AFFINE.copy()
    affine[:3] /= 1000
    with pytest.warns(VolumeWarning, match="lengths are in metres"):
        volume = load_volume(header_bytes(nifti(affine=affine), xyzt_units=1))
    assert volume.spacing == pytest.approx((2.5, 0.7, 0.8))


def test_an_oblique_scan_keeps_its_rotation_and_warns():
    angle = np.radians(20)
    turn = np.array([[1, 0, 0, 0], [0, np.cos(angle), -np.sin(angle), 0], [0, np.sin(angle), np.cos(angle), 0]])
    affine = np.vstack([turn, [0, 0, 0, 1]]) @ LPS_AFFINE
    with pytest.warns(VolumeWarning, match=r"20\.0 degrees off"):
        volume = load_volume(nifti(affine=affine))
    np.testing.assert_array_equal(volume.hu, body())
    np.testing.assert_allclose(volume.affine, np.diag([-1, -1, 1, 1]) @ affine, atol=1e-5)
    assert volume.spacing == pytest.approx((2.5, 0.7, 0.8))
    assert volume.meta["oblique_deg"] == pytest.approx(20)


def test_a_sheared_affine_is_straightened():
    affine = LPS_AFFINE.copy()
    affine[1, 2] = 0.7  # each slice one pixel further to the front than the one below
    hu = body()
    straight = np.full((9, 19, 13), -1024, np.int16)
    for z in range(9):
        straight[z, 8 - z : 19 - z] = hu[z]
    with pytest.warns(VolumeWarning, match="gantry tilt"):
        volume = load_volume(nifti(affine=affine))
    np.testing.assert_array_equal(volume.hu, straight)
    assert volume.spacing == pytest.approx((2.5, 0.7, 0.8))
    # The first voxel of the first slice has not moved in the world.
    before = np.diag([-1, -1, 1, 1]) @ affine @ [0, 0, 0, 1]
    np.testing.assert_allclose(volume.affine @ [0, 8, 0, 1], before, atol=1e-5)


@pytest.mark.parametrize(
    ("hu", "finding"),
    [
        (np.clip(body() + 1024, 0, None), "rescale was forgotten"),
        (np.clip(body() / 8 + 125, 0, 255).astype(np.uint8), "grey levels or labels"),
        ((body(dtype=np.float32) + 1100) / 3000, "scaled image or a mask"),
        (np.clip(body() / 2 + 500, -40, None).astype(np.int16), "neither air nor fat"),
        (np.full((4, 4, 4), 7, np.int16), "every voxel is 7"),
        (np.where(body() > 0, -990 - body() % 5, -2048).astype(np.int16), "rescale was applied twice"),
    ],
)
def test_values_that_cannot_be_hounsfield_units(hu, finding):
    image = nib.Nifti1Image(np.ascontiguousarray(hu.T), LPS_AFFINE)
    with pytest.raises(VolumeError, match=finding):
        load_volume(image, padding="keep")
    with pytest.warns(VolumeWarning, match=finding):
        volume = load_volume(image, check="warn", padding="keep")
    assert any(finding in warning for warning in volume.meta["warnings"])
    assert load_volume(image, check="off", padding="keep").meta["warnings"] == []
    assert load_volume(image, intensity="display").meta["intensity"] == "display"


def test_odd_values_warn():
    with pytest.warns(VolumeWarning, match="no air"):
        load_volume(nifti(np.clip(body(), -150, None)))


@pytest.mark.parametrize(
    ("fields", "finding"),
    [
        ({"magic": b"nope"}, "unknown format"),
        ({"dim": [3, 0, 11, 9, 1, 1, 1, 1]}, "is empty"),
        ({"dim": [3, -5, 11, 9, 1, 1, 1, 1]}, "is empty"),
        ({"dim": [2, 13, 99, 1, 1, 1, 1, 1]}, "not 3-D"),
        ({"dim": [4, 13, 11, 3, 3, 1, 1, 1]}, "not 3-D"),
        ({"dim": [0, 13, 11, 9, 1, 1, 1, 1]}, "says 0 dimensions"),
        ({"dim": [3, 13, 11, 10, 1, 1, 1, 1]}, "too early"),
        ({"dim": [3, 13, 11, 90, 1, 1, 1, 1]}, "header promises"),
        ({"dim": [3, 32767, 32767, 32767, 1, 1, 1, 1]}, "over the limit"),
        ({"dim": [3, 13, 11, 4, 1, 1, 1, 1]}, "more voxels than the header says"),
        ({"datatype": 128, "bitpix": 24}, "RGB"),
        ({"datatype": 32, "bitpix": 64}, "complex64"),
        ({"datatype": 777}, "unknown voxel type 777"),
        ({"bitpix": 32}, "32 bits per voxel"),
        ({"pixdim": [1, 0, 1, 1, 0, 0, 0, 0]}, "voxel size"),
        ({"pixdim": [1, np.nan, 1, 1, 0, 0, 0, 0]}, "voxel size"),
        ({"srow_x": [0, 0, 0, 0]}, "voxel size"),
        ({"srow_x": [np.inf, 0, 0, 0]}, "no coordinates"),
        ({"srow_x": [1, 1, 0, 0], "srow_y": [0, 0, 0, 0]}, "same way"),
        ({"srow_x": [-800, 0, 0, 0]}, "is no CT scan's"),
        ({"vox_offset": -1}, "start at byte -1"),
        ({"vox_offset": np.nan}, "start at byte nan"),
        ({"vox_offset": 1e30}, "start at byte 1e"),
        ({"scl_slope": 1, "scl_inter": np.inf}, "intercept inf"),
        ({"scl_slope": 1e30}, "slope 1e"),
        ({"sform_code": 0, "qform_code": 0}, "orientation is unknown"),
    ],
)
def test_headers_that_are_refused(fields, finding):
    with pytest.raises(VolumeError, match=finding):
        load_volume(header_bytes(**fields))


def test_a_fourth_dimension_of_one_is_no_matter():
    content = header_bytes(dim=[5, 13, 11, 9, 1, 1, 1, 1])
    assert load_volume(content).hu.shape == (9, 11, 13)


@pytest.mark.parametrize("keep", [0, 1, 2, 100, 347, 348, 351, 400])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_truncated_files(keep, pack):
    with pytest.raises(VolumeError, match=r"empty|unknown format|holds no NIfTI|truncated|too early"):
        load_volume(pack(nifti().to_bytes()[:keep]) if keep else b"")


def test_a_damaged_gzip_is_not_half_loaded(tmp_path):
    packed = gzip.compress(nifti(np.resize(body(), (40, 40, 40))).to_bytes())
    path = tmp_path / "scan.nii.gz"
    for content in (packed[:-9], packed[: len(packed) // 2], packed[:-8] + b"\0\0\0\0" + packed[-4:]):
        path.write_bytes(content)
        with pytest.raises(VolumeError, match=r"scan\.nii\.gz: (the gzip stream is damaged|the header promises)"):
            load_volume(path)


def test_a_gzip_bomb_is_refused_before_it_takes_memory():
    header = header_bytes(dim=[3, 2000, 2000, 2000, 1, 1, 1, 1])[:352]
    bomb = gzip.compress(header + bytes(10_000_000))
    with pytest.raises(VolumeError, match="over the limit"):
        load_volume(bomb)
    with pytest.raises(VolumeError, match=r"header promises 16000000000 bytes"):
        load_volume(bomb, max_bytes=10**11)


def test_the_memory_limit_is_an_argument():
    with pytest.raises(VolumeError, match=r"over the limit of 0 MB\. Pass a larger max_bytes"):
        load_volume(nifti().to_bytes(), max_bytes=1000)


@pytest.mark.parametrize(
    ("make", "finding"),
    [
        (lambda folder: folder / "missing.nii", "no such file"),
        (lambda folder: "a\0b.nii", "cannot be opened"),
        (lambda folder: 5, "not a scan"),
        (lambda folder: None, "not a scan"),
        (lambda folder: {"path": None, "bytes": None}, "neither path nor bytes"),
        (lambda folder: b"\x89PNG\r\n\x1a\n" + bytes(600), "unknown format"),
        (lambda folder: "/dev/zero", "not a regular file"),
    ],
)
def test_what_is_no_scan(tmp_path, make, finding):
    with pytest.raises(VolumeError, match=finding):
        load_volume(make(tmp_path))


@pytest.mark.parametrize("option", [{"intensity": "pet"}, {"check": "no"}, {"padding": "zero"}])
def test_options_are_checked(option):
    with pytest.raises(VolumeError, match="Pass one of"):
        load_volume(nifti(), **option)


def test_analyze_headers_are_refused(tmp_path):
    nib.AnalyzeImage(body().T, LPS_AFFINE).to_filename(tmp_path / "scan.img")
    with pytest.raises(VolumeError, match=r"scan\.hdr: unknown format"):
        load_volume(tmp_path / "scan.hdr")


def test_a_pair_without_its_other_half(tmp_path):
    nib.Nifti1Pair(body().T, LPS_AFFINE).to_filename(tmp_path / "scan.img")
    (tmp_path / "scan.img").unlink()
    with pytest.raises(VolumeError, match=r"without its \.img"):
        load_volume(tmp_path / "scan.hdr")


def test_patient_data_does_not_leave_the_header():
    content = header_bytes(descrip=b"DOE^JANE 1970-01-01", db_name=b"DOE")
    volume = load_volume(content)
    assert "DOE" not in str(volume.meta)


def test_volumes_check_themselves_and_survive_pickling():
    volume = pickle.loads(pickle.dumps(Volume(body(), (1, 1, 1))))
    np.testing.assert_array_equal(volume.hu, body())
    for arguments in (
        (body()[0], (1, 1, 1)),
        (body().astype(np.float64), (1, 1, 1)),
        (body(), (1, 0, 1)),
        (body(), (1, 1)),
        (body(), (1, np.nan, 1)),
        (body(), (1, 1, 1), np.eye(3)),
        ([[[1]]], (1, 1, 1)),
    ):
        with pytest.raises(VolumeError):
            Volume(*arguments)


def test_sform_and_qform_that_disagree_warn():
    image = nifti()
    image.set_qform(np.diag([0.8, 0.7, 2.5, 1]), code=1)
    image.set_sform(LPS_AFFINE, code=2)
    with pytest.warns(VolumeWarning, match="sform and qform"):
        load_volume(image.to_bytes())


def test_big_endian_headers():
    content = bytearray(nib.Nifti1Image(body().T, LPS_AFFINE, nib.Nifti1Header(endianness=">")).to_bytes())
    assert struct.unpack(">i", content[:4])[0] == 348
    np.testing.assert_array_equal(load_volume(bytes(content)).hu, body())
