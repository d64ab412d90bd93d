"""Arrays, MetaImage, NRRD, `datasets` rows and URLs."""

import gzip
import http.server
import io
import pickle
import threading
import warnings
import zipfile

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ct_moe import volume_download_ct_moe, volume_voxels_ct_moe
from ct_moe.errors_ct_moe import VolumeError
from ct_moe.volume_io_ct_moe import Volume, VolumeWarning, load_volume


SPACING = (2.5, 0.7, 0.8)


def body(dtype=np.int16) -> np.ndarray:
    hu = np.full((6, 8, 10), -1000)
    hu[1:-1, 2:-3, 3:-2] = 40
    return (hu + np.arange(hu.size).reshape(hu.shape) % 7).astype(dtype)


def npy(array, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def npz(save=np.savez, **arrays) -> bytes:
    file = io.BytesIO()
    save(file, **arrays)
    return file.getvalue()


# Arrays


@pytest.mark.parametrize("array", [body(), body(np.float32), body(">i4"), body(np.float16), np.asfortranarray(body())])
@pytest.mark.parametrize("shape", [(6, 8, 10), (1, 6, 8, 10), (1, 1, 6, 8, 10), (6, 8, 10, 1)])
@pytest.mark.parametrize("save", [lambda array: array, npy])
def test_arrays_and_npy_files(array, shape, save):
    array = array.reshape(shape, order="A")
    hu = np.reshape(array, (6, 8, 10))
    volume = load_volume(save(array), spacing=SPACING)
    np.testing.assert_allclose(volume.hu, hu.astype(np.float32))
    assert volume.hu.dtype == (np.float32 if array.dtype.kind == "f" else np.int16)
    assert volume.spacing == pytest.approx(SPACING)
    np.testing.assert_allclose(volume.affine, np.diag([0.8, 0.7, 2.5, 1]))
    assert volume.meta["stored_shape"] == [10, 8, 6]


def test_an_array_needs_its_spacing():
    for source in (body(), npy(body()), npz(hu=body())):
        with pytest.raises(VolumeError, match=r"an array has no voxel size\. Pass spacing=\(z, y, x\) in mm"):
            load_volume(source)
    for spacing in (1, (1, 2), (1, 2, 0), (1, 2, np.nan), "abc", ("a", 1, 2)):
        with pytest.raises(VolumeError, match="spacing="):
            load_volume(body(), spacing=spacing)
    with pytest.raises(VolumeError, match="has its own voxel size"):
        load_volume(nib.Nifti1Image(body().T, np.eye(4)), spacing=SPACING)


def test_display_arrays_as_m3d_has_them():
    array = np.random.default_rng(0).random((1, 32, 16, 16), np.float32)
    volume = load_volume(npy(array), intensity="display", reorient=False)
    np.testing.assert_array_equal(volume.hu, array[0])
    assert volume.meta["spacing_known"] is False
    assert volume.meta["intensity"] == "display"
    with pytest.raises(VolumeError, match="scaled image or a mask"):
        load_volume(npy(array), spacing=SPACING)


def test_npz_files():
    affine = np.array([[0.8, 0, 0, 5], [0, 0.7, 0, 6], [0, 0, 2.5, 7], [0, 0, 0, 1]])
    for save in (np.savez, np.savez_compressed):
        volume = load_volume(npz(save, hu=body(), spacing=np.array(SPACING)))
        np.testing.assert_array_equal(volume.hu, body())
        assert volume.spacing == pytest.approx(SPACING)
        volume = load_volume(npz(save, hu=body(), affine=affine))
        np.testing.assert_array_equal(volume.affine, affine)
    several = npz(first=body(), second=body() + 1)
    with pytest.raises(VolumeError, match=r"2 arrays \(first, second\)\. Choose one by its name"):
        load_volume(several, spacing=SPACING)
    np.testing.assert_array_equal(load_volume(several, spacing=SPACING, series="second").hu, body() + 1)
    np.testing.assert_array_equal(load_volume(several, spacing=SPACING, series=1).hu, body())
    with pytest.raises(VolumeError, match="affine is not 4 x 4"):
        load_volume(npz(hu=body(), affine=np.eye(3)))


class Explosive:
    def __reduce__(self):
        return (pytest.fail, ("something was unpickled",))


@pytest.mark.parametrize(
    ("content", "finding"),
    [
        (npy(np.array([Explosive()], dtype=object), allow_pickle=True), "type object"),
        (npz(hu=np.array([Explosive()], dtype=object)), "type object"),
        (npz(hu=body(), spacing=np.array([Explosive()], dtype=object)), "spacing.npy holds no geometry"),
        (pickle.dumps(body()), "unknown format"),
        (npy(body()[0]), "is no volume"),
        (npy(np.zeros((2, 6, 8, 10), np.int16)), "is no volume"),
        (npy(np.zeros((0, 8, 10), np.int16)), "is no volume"),
        (npy(body().astype(complex)), "type complex128"),
        (npy(np.zeros((6, 8, 10), "S3")), r"type \|S3"),
        (npy(np.zeros((6, 8, 10), "i2,i2")), "RGB"),
        (npy(body())[:-10], "too early"),
        (npy(body())[:20], "header is damaged"),
        (npy(body()) + bytes(10_000), "more voxels than the header says"),
        (npy(body()).replace(b"(6, 8, 10)", b"(6, 8, -1)"), "is no volume|damaged"),
        (npy(body()).replace(b"(6, 8, 10), ", b"(60000,60000,60000)"), r"over the limit|damaged"),
        (npy(body()).replace(b"'fortran_order'", b"'__import__(1)'"), "header is damaged"),
        (b"\x93NUMPY\x09\x09" + npy(body())[8:], "header is damaged"),
    ],
)
def test_npy_files_that_are_refused(content, finding):
    with pytest.raises(VolumeError, match=finding):
        load_volume(content, spacing=SPACING if b"spacing.npy" not in content else None)


def test_the_callers_array_is_not_changed_or_copied():
    hu = body()
    assert np.shares_memory(load_volume(hu, spacing=SPACING).hu, hu)
    hu[0, 0, 0] = -3024
    volume = load_volume(hu, spacing=SPACING)
    assert volume.hu[0, 0, 0] == -1024
    assert hu[0, 0, 0] == -3024


# MetaImage and NRRD


def written_by_sitk(path, oblique=False, dtype="int16", compressed=True):
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.GetImageFromArray(body(dtype))
    image.SetSpacing(SPACING[::-1])
    image.SetOrigin((-12.5, 3, 44))
    if oblique:
        turn = sitk.Euler3DTransform((0, 0, 0), 0.1, -0.2, 0.15)
        image.SetDirection(turn.GetMatrix())
    else:
        image.SetDirection((-1, 0, 0, 0, 0, 1, 0, 1, 0))
    sitk.WriteImage(image, str(path), useCompression=compressed)
    image = sitk.DICOMOrient(image, "LPS")
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image), affine


@pytest.mark.parametrize("name", ["scan.mha", "scan.mhd", "scan.nrrd", "scan.nhdr", "scan.nii.gz"])
@pytest.mark.parametrize("oblique", [False, True])
@pytest.mark.parametrize("dtype", ["int16", "float32", "int32"])
@pytest.mark.parametrize("compressed", [False, True])
def test_what_simpleitk_writes_is_read_back(tmp_path, name, oblique, dtype, compressed):
    hu, affine = written_by_sitk(tmp_path / name, oblique, dtype, compressed)
    volume = load_volume(tmp_path / name)
    np.testing.assert_array_equal(volume.hu, hu)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-4)


MHA = {
    "ObjectType": "Image",
    "NDims": "3",
    "BinaryDataByteOrderMSB": "False",
    "TransformMatrix": "1 0 0 0 1 0 0 0 1",
    "Offset": "0 0 0",
    "ElementSpacing": "0.8 0.7 2.5",
    "DimSize": "10 8 6",
    "ElementType": "MET_SHORT",
    "ElementDataFile": "LOCAL",
}
NRRD = {
    "type": "short",
    "dimension": "3",
    "space": "left-posterior-superior",
    "sizes": "10 8 6",
    "space directions": "(0.8,0,0) (0,0.7,0) (0,0,2.5)",
    "endian": "little",
    "encoding": "raw",
    "space origin": "(0,0,0)",
}


def mha(data=None, **changes) -> bytes:
    fields = {key: value for key, value in {**MHA, **changes}.items() if value is not None}
    last = fields.pop("ElementDataFile", None)
    lines = [f"{key} = {value}" for key, value in fields.items()]
    if last is not None:
        lines.append(f"ElementDataFile = {last}")
    return "\n".join([*lines, ""]).encode() + (body().tobytes() if data is None else data)


def nrrd(data=None, **changes) -> bytes:
    changes = {key.replace("_", " "): value for key, value in changes.items()}
    fields = {key: value for key, value in {**NRRD, **changes}.items() if value is not None}
    lines = ["NRRD0004", "# a comment", *(f"{key}: {value}" for key, value in fields.items())]
    return "\n".join([*lines, "", ""]).encode() + (body().tobytes() if data is None else data)


@pytest.mark.parametrize(
    "content",
    [
        mha(),
        mha(body(">i2").tobytes(), BinaryDataByteOrderMSB="True"),
        mha(
            NDims="4",
            DimSize="10 8 6 1",
            ElementSpacing="0.8 0.7 2.5 1",
            TransformMatrix=" ".join(map(str, np.eye(4).ravel())),
            Offset="0 0 0 0",
        ),
        nrrd(),
        nrrd(body(">i2").tobytes(), endian="big"),
        nrrd(gzip.compress(body().tobytes()), encoding="gzip"),
        nrrd(space="right-anterior-superior", space_directions="(-0.8,0,0) (0,-0.7,0) (0,0,2.5)"),
    ],
)
def test_headers_written_by_hand(content):
    volume = load_volume(content)
    np.testing.assert_array_equal(volume.hu, body())
    np.testing.assert_allclose(volume.affine, np.diag([0.8, 0.7, 2.5, 1]), atol=1e-12)


@pytest.mark.parametrize(
    ("content", "finding"),
    [
        (mha(ElementDataFile=None, ElementType=None), "header does not end|no header"),
        (mha(DimSize="10 8"), "is not 3-D"),
        (mha(DimSize="10 8 6 2"), "is not 3-D"),
        (mha(DimSize="10 8 -6"), "is empty"),
        (mha(DimSize="a b c"), "DimSize is not"),
        (mha(DimSize="99999 99999 99999"), "over the limit"),
        (mha(DimSize="10 8 7"), "header promises|too early"),
        (mha(DimSize="10 8 2"), "more voxels than the header says"),
        (mha(ElementType="MET_STRING"), "voxel type 'MET_STRING'"),
        (mha(ElementNumberOfChannels="3"), "several channels"),
        (mha(ElementSpacing="0 1 1"), "voxel size"),
        (mha(ElementSpacing="nan 1 1"), "ElementSpacing is not"),
        (mha(ElementSpacing=None), "no voxel size"),
        (mha(TransformMatrix="0 0 0 0 1 0 0 0 1"), "holds no directions"),
        (mha(TransformMatrix="1 0 0 1 0 0 0 0 1"), "same way"),
        (mha(TransformMatrix=None), "orientation is unknown"),
        (mha(BinaryData="False"), "written as text"),
        (mha(ElementToIntensityFunctionSlope="2"), "ElementToIntensityFunctionSlope is set"),
        (mha(CompressedData="True"), "zlib stream is damaged"),
        (mha(ElementDataFile="/etc/passwd"), "voxels lie in other files"),
        (mha(ElementDataFile="LIST"), "voxels lie in other files"),
        (nrrd(sizes="10 8"), "is not 3-D"),
        (nrrd(sizes="10 8 60000000"), "over the limit"),
        (nrrd(type="block"), "voxel type 'block'"),
        (nrrd(space="scanner-xyz"), "not one of a patient's"),
        (nrrd(space_directions="(1,0,0) (0,1,0)"), "2 space directions"),
        (nrrd(space_directions="none"), "0 space directions"),
        (nrrd(space_directions="(a,0,0) (0,1,0) (0,0,1)"), "space directions is not 3 numbers"),
        (nrrd(space_directions=None), "no voxel size"),
        (nrrd(space_directions=None, spacings="1 1 1"), "orientation is unknown"),
        (nrrd(encoding="bzip2"), "not raw or gzip"),
        (nrrd(encoding="raw", byte_skip="4"), "not raw or gzip"),
        (nrrd(encoding="gzip"), "gzip stream is damaged"),
        (nrrd(data_file="../../secret"), "voxels lie in other files"),
        (nrrd(data_file="slice%03d.raw 1 3 1"), "voxels lie in other files"),
        (b"NRRD0004\n" + b"a" * 3_000_000, "header does not end"),
    ],
)
def test_headers_that_are_refused(content, finding):
    with pytest.raises(VolumeError, match=finding):
        load_volume(content)


def test_a_data_file_lies_beside_its_header(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/scan.mhd").write_bytes(mha(b"", ElementDataFile="scan.raw"))
    (tmp_path / "deep/scan.raw").write_bytes(body().tobytes())
    np.testing.assert_array_equal(load_volume(tmp_path / "deep/scan.mhd").hu, body())
    (tmp_path / "deep/scan.mhd").write_bytes(mha(b"", ElementDataFile="scan.raw", HeaderSize="-1"))
    (tmp_path / "deep/scan.raw").write_bytes(b"a header" + body().tobytes())
    np.testing.assert_array_equal(load_volume(tmp_path / "deep/scan.mhd").hu, body())
    (tmp_path / "scan.raw").write_bytes(body().tobytes())
    (tmp_path / "deep/scan.mhd").write_bytes(mha(b"", ElementDataFile="../scan.raw"))
    with pytest.raises(VolumeError, match="voxels lie in other files"):
        load_volume(tmp_path / "deep/scan.mhd")
    (tmp_path / "deep/scan.mhd").write_bytes(mha(b"", ElementDataFile="gone.raw"))
    with pytest.raises(VolumeError, match=r"no such file: gone\.raw"):
        load_volume(tmp_path / "deep/scan.mhd")


# The decoder


def test_without_isal_the_voxels_are_the_same(tmp_path, monkeypatch):
    image = nib.Nifti1Image(body().T, np.diag([-0.8, -0.7, 2.5, 1]))
    image.to_filename(tmp_path / "scan.nii.gz")
    (tmp_path / "scan.mha").write_bytes(
        mha(volume_voxels_ct_moe.zlib.compress(body().tobytes()), CompressedData="True")
    )
    fast = [load_volume(tmp_path / name).hu for name in ("scan.nii.gz", "scan.mha")]
    monkeypatch.setattr(volume_voxels_ct_moe, "igzip", None)
    monkeypatch.setattr(volume_voxels_ct_moe, "isal_zlib", None)
    for name, hu in zip(("scan.nii.gz", "scan.mha"), fast):
        np.testing.assert_array_equal(load_volume(tmp_path / name).hu, hu)
    (tmp_path / "scan.nii.gz").write_bytes((tmp_path / "scan.nii.gz").read_bytes()[:-40])
    with pytest.raises(VolumeError, match="gzip stream is damaged"):
        load_volume(tmp_path / "scan.nii.gz")


@settings(max_examples=30, deadline=None)
@given(
    data=st.binary(max_size=4000),
    repeat=st.integers(1, 400),
    chunk=st.integers(1, 5000),
    fast=st.booleans(),
)
def test_zlib_streams_are_read_whole_in_any_pieces(data, repeat, chunk, fast):
    from ct_moe.volume_ct_moe import LoadContext

    content = data * repeat
    stream = volume_voxels_ct_moe.VoxelStream(
        io.BytesIO(volume_voxels_ct_moe.zlib.compress(content)), LoadContext("test"), codec="zlib"
    )
    if not fast:
        stream._file._inflate = volume_voxels_ct_moe.zlib.decompressobj()
    pieces = []
    while piece := stream.read(chunk):
        pieces.append(piece)
    assert b"".join(pieces) == content


# Rows of `datasets`


def test_values_of_a_datasets_nifti_column(tmp_path):
    datasets = pytest.importorskip("datasets")
    affine = np.diag([-0.8, -0.7, 2.5, 1])
    path = tmp_path / "scan.nii.gz"
    nib.Nifti1Image(body().T, affine).to_filename(path)
    content = {"path": None, "bytes": path.read_bytes()}
    rows = datasets.Dataset.from_dict({"scan": [str(path)]})
    embedded = datasets.Dataset.from_dict({"scan": [content]})
    for dataset in (rows, embedded):
        for decode in (True, False):
            value = dataset.cast_column("scan", datasets.Nifti(decode=decode))[0]["scan"]
            volume = load_volume(value)
            np.testing.assert_array_equal(volume.hu, body())
            assert volume.spacing == pytest.approx(SPACING)


def test_chained_paths_of_datasets(tmp_path):
    nib.Nifti1Image(body().T, np.diag([-0.8, -0.7, 2.5, 1])).to_filename(tmp_path / "scan.nii.gz")
    volume = load_volume({"path": f"gzip://scan.nii::{tmp_path}/scan.nii.gz", "bytes": None})
    np.testing.assert_array_equal(volume.hu, body())
    with pytest.raises(VolumeError, match="a file inside an archive"):
        load_volume({"path": "zip://scan.nii.gz::/data/scans.zip", "bytes": None})


# URLs


@pytest.fixture
def server(tmp_path):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path))

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_urls_are_fetched_and_leave_nothing_behind(server, tmp_path, monkeypatch):
    (tmp_path / "served").mkdir()
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    nib.Nifti1Image(body().T, np.diag([-0.8, -0.7, 2.5, 1])).to_filename(tmp_path / "served/scan.nii.gz")
    volume = load_volume(f"{server}/served/scan.nii.gz")
    np.testing.assert_array_equal(volume.hu, body())
    with pytest.raises(VolumeError, match="the server answers 404") as caught:
        load_volume(f"{server}/served/other.nii.gz?token=SECRET#part")
    assert "SECRET" not in str(caught.value)
    (tmp_path / "served/large.nii").write_bytes(bytes(3_000_000))
    with pytest.raises(VolumeError, match="over the limit"):
        load_volume(f"{server}/served/large.nii", max_bytes=1_000_000)
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "finding"),
    [
        ("http://127.0.0.1:9/scan.nii.gz", "cannot be fetched"),
        ("https://[bad/scan", "cannot be fetched"),
        ("ftp://example.org/scan.nii", "unknown kind of URL"),
        ("hf://", "not a valid Hub address"),
        ("hf://buckets/a/b/c", "buckets are not read"),
        ("hf://datasets/me/scans", "a whole repository"),
    ],
)
def test_urls_that_lead_nowhere(url, finding):
    with pytest.raises(VolumeError, match=finding):
        load_volume(url)


def test_hub_addresses_go_through_the_hubs_cache(tmp_path, monkeypatch):
    nib.Nifti1Image(body().T, np.diag([-0.8, -0.7, 2.5, 1])).to_filename(tmp_path / "scan.nii.gz")
    asked = []

    def download(**arguments):
        asked.append(arguments)
        return str(tmp_path / "scan.nii.gz")

    monkeypatch.setattr(volume_download_ct_moe, "hf_hub_download", download)
    np.testing.assert_array_equal(load_volume("hf://datasets/me/scans@v1/deep/scan.nii.gz").hu, body())
    assert asked == [{"filename": "deep/scan.nii.gz", "repo_id": "me/scans", "repo_type": "dataset", "revision": "v1"}]


def test_a_hub_file_that_is_not_cached_offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(VolumeError, match="cannot be fetched from the Hub"):
        load_volume("hf://datasets/me/nothing-here/scan.nii.gz")


# All of them


@pytest.mark.parametrize("content", [npy(body()), mha(), nrrd(), npz(hu=body(), spacing=np.array(SPACING))])
def test_file_objects_of_every_kind(content, tmp_path):
    class Forwards(io.RawIOBase):
        """A stream that cannot be rewound, as of a network response."""

        def __init__(self):
            self.inner = io.BytesIO(content)

        def readable(self):
            return True

        def readinto(self, view):
            return self.inner.readinto(view)

    options = {"spacing": SPACING} if content[:6] == b"\x93NUMPY" else {}
    (tmp_path / "scan").write_bytes(content)
    with open(tmp_path / "scan", "rb") as file:
        for source in (content, bytearray(content), io.BytesIO(content), file, Forwards()):
            np.testing.assert_array_equal(load_volume(source, **options).hu, body())


def test_file_objects_that_cannot_be_read(tmp_path):
    (tmp_path / "scan.npy").write_bytes(npy(body()))
    with open(tmp_path / "scan.npy", "rb") as file:
        pass
    with pytest.raises(VolumeError, match=r"scan\.npy: cannot be read \(ValueError\)"):
        load_volume(file, spacing=SPACING)
    with open(tmp_path / "scan.npy", encoding="latin-1") as file, pytest.raises(VolumeError, match='mode "rb"'):
        load_volume(file, spacing=SPACING)


def test_warnings_say_where_the_scan_is_used():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_volume(np.clip(body(), -150, None), spacing=SPACING)
    assert [warning.category for warning in caught] == [VolumeWarning]
    assert caught[0].filename == __file__


def test_meta_is_json(tmp_path):
    import json

    volume = load_volume(npz(hu=body(), spacing=np.array(SPACING)))
    assert isinstance(volume, Volume)
    assert json.loads(json.dumps(volume.meta)) == volume.meta


def test_members_of_an_npz_cannot_lie_about_their_size():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("hu.npy", npy(body())[:-100])
    with pytest.raises(VolumeError, match=r"too early|header promises"):
        load_volume(file, spacing=SPACING)
