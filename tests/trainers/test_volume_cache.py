# Copyright 2026 The CT-MoE authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The cache of processed scans: the same bits, the right key, its bound, and many processes at once."""

import gzip
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import sys
import time
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from filelock import FileLock
from torch.utils.data import DataLoader, Dataset

from ct_moe import CTMoEImageProcessor, TrainingError, VolumeError, load_volume
from ct_moe.trainers.phantoms.chest import write_phantom
from ct_moe.trainers.volume_cache import VolumeCache


SMALL = {"size": 28, "patch_size": 14}
REAL_SCANS = {
    "nifti": "totalseg/example_ct_sm.nii.gz",
    "dicom": "ibsi/STS_002_CT",
    "metaimage": "elastix/3DCT_lung_baseline_small.mha",
    "nrrd": "cip/ct-64.nrrd",
}


@pytest.fixture(scope="module")
def phantom(tmp_path_factory) -> Path:
    return write_phantom(tmp_path_factory.mktemp("phantom") / "chest.nii.gz", shape=(12, 64, 64))


@pytest.fixture
def scan(phantom, tmp_path) -> Path:
    """A copy of the phantom that a test may change."""
    return Path(shutil.copy(phantom, tmp_path / "scan.nii.gz"))


@pytest.fixture
def cache(tmp_path) -> VolumeCache:
    return VolumeCache(tmp_path / "cache", CTMoEImageProcessor(**SMALL))


def write_nifti(path: Path, depth: int, seed: int = 0, edge: int = 8) -> Path:
    """A scan of a few kilobytes whose entry grows with its depth."""
    hu = np.random.default_rng(seed).integers(-1000, 1000, (edge, edge, depth), dtype=np.int16)
    nib.save(nib.Nifti1Image(hu, np.diag([40.0, 40.0, 5.0, 1.0])), path)
    return path


def assert_same(row, expected):
    assert row.keys() == expected.keys()
    for name, values in expected.items():
        assert row[name].dtype == values.dtype
        assert row[name].shape == values.shape
        assert row[name].tobytes() == values.tobytes()


def entries(cache: VolumeCache) -> list[Path]:
    return sorted(cache.folder.glob("*.safetensors"))


def parts(cache: VolumeCache) -> list[Path]:
    return sorted(set(cache.folder.iterdir()) - set(entries(cache)) - {cache.folder / "lock"})


def total_size(cache: VolumeCache) -> int:
    return sum(path.stat().st_size for path in entries(cache))


def is_hit(cache: VolumeCache, source) -> bool:
    """Whether reading a scan finds it in the cache; either way the row must be right."""
    hits, misses = cache.hits, cache.misses
    row = cache.read(source)
    assert (cache.hits - hits) + (cache.misses - misses) == 1
    assert_same(row, cache.image_processor.process_volume(source))
    return cache.hits > hits


# ---- the same bits


def test_a_cached_row_is_the_fresh_one_bit_for_bit(cache, phantom):
    assert [is_hit(cache, phantom) for _ in range(3)] == [False, True, True]
    assert (cache.hits, cache.misses) == (2, 1)
    assert len(entries(cache)) == 1
    assert not parts(cache)
    again = VolumeCache(cache.folder, CTMoEImageProcessor(**SMALL))
    assert is_hit(again, str(phantom))


@pytest.mark.parametrize("name", REAL_SCANS)
def test_real_scans_are_cached_bit_for_bit(cache, test_data, name):
    source = test_data / REAL_SCANS[name]
    assert [is_hit(cache, source) for _ in range(2)] == [False, True]


def test_display_images_are_cached_bit_for_bit(tmp_path):
    np.save(tmp_path / "image.npy", np.random.default_rng(0).random((5, 20, 20), dtype=np.float32))
    cache = VolumeCache(tmp_path / "cache", CTMoEImageProcessor(**SMALL, intensity="display"))
    assert [is_hit(cache, tmp_path / "image.npy") for _ in range(2)] == [False, True]


def test_rows_are_the_callers_own(cache, phantom):
    processor = cache.image_processor
    rows = [cache.read(phantom) for _ in range(3)]
    assert np.array_equal(processor(rows)["pixel_values"], processor([phantom] * 3)["pixel_values"])
    for row in rows:
        for values in row.values():
            values[...] = 0
    assert is_hit(cache, phantom)


# ---- the key: what is in the files, not what they are called


def test_name_and_time_do_not_matter(cache, scan):
    cache.read(scan)
    os.utime(scan, (1, 1))
    assert is_hit(cache, scan)
    moved = scan.rename(scan.with_name("another.nii.gz"))
    assert is_hit(cache, moved)
    scan.symlink_to(moved)
    assert is_hit(cache, scan)


def test_changed_content_is_another_scan(cache, scan):
    cache.read(scan)
    write_phantom(scan, seed=1, shape=(12, 64, 64))
    assert [is_hit(cache, scan) for _ in range(2)] == [False, True]


def test_a_folder_is_known_by_its_files(cache, test_data, tmp_path):
    folder = Path(shutil.copytree(test_data / REAL_SCANS["dicom"], tmp_path / "series"))
    cache.read(folder)
    assert not is_hit(cache, sorted(folder.iterdir()))  # a list is read more strictly than a folder
    deeper = folder / "deeper"
    deeper.mkdir()
    for number, file in enumerate(sorted(folder.glob("*.dcm"), reverse=True)):
        file.rename((deeper if number % 2 else folder) / f"slice{number}")
    assert is_hit(cache, folder)
    files = sorted(path for path in folder.rglob("slice*"))
    assert is_hit(cache, files)
    assert is_hit(cache, [str(path) for path in reversed(files)])
    max(files, key=lambda path: pydicom.dcmread(path).ImagePositionPatient[2]).unlink()
    assert not is_hit(cache, folder)


def test_the_forms_of_one_file_share_an_entry(cache, scan):
    cache.read(scan)
    for source in (
        str(scan),
        scan.read_bytes(),
        {"path": str(scan), "bytes": None},
        {"path": None, "bytes": scan.read_bytes()},
        {"path": "elsewhere.nii.gz", "bytes": scan.read_bytes()},
        {"path": f"gzip://scan.nii::{scan}", "bytes": None},
    ):
        assert is_hit(cache, source)


def detached_scans(folder: Path, phantom: Path) -> dict[str, Path]:
    """The phantom in every form whose voxels lie beside a header."""
    image = nib.load(phantom)
    array = np.asarray(image.dataobj)
    for suffix in ("img", "img.gz"):
        nib.save(nib.Nifti1Pair(array, image.affine, image.header), folder / f"pair_{suffix[-2:]}.{suffix}")
    stored = sitk.ReadImage(str(phantom))
    itk = sitk.GetImageFromArray(sitk.GetArrayFromImage(stored))  # without the header's other fields
    itk.CopyInformation(stored)
    for name in ("meta.mhd", "nrrd.nhdr"):
        sitk.WriteImage(itk, str(folder / name))
        sitk.WriteImage(itk, str(folder / f"packed_{name}"), useCompression=True)
    for name, old in (("meta.mhd", "meta.raw"), ("nrrd.nhdr", "nrrd.raw")):
        header = (folder / name).read_text(encoding="latin-1").replace(old, "other voxels.bin")
        (folder / f"renamed_{name}").write_text(header, encoding="latin-1")
        shutil.copy(folder / old, folder / "other voxels.bin")
    return {
        "header of a pair": folder / "pair_mg.hdr",
        "image of a pair": folder / "pair_mg.img",
        "packed header": folder / "pair_gz.hdr.gz",
        **{name: folder / name for name in ("meta.mhd", "packed_meta.mhd", "renamed_meta.mhd")},
        **{name: folder / name for name in ("nrrd.nhdr", "packed_nrrd.nhdr", "renamed_nrrd.nhdr")},
    }


@pytest.fixture
def opened():
    """Paths of the files that were opened since the list was last cleared."""
    paths, is_on = [], [True]

    def note(event, arguments):
        if is_on[0] and event == "open" and isinstance(arguments[0], (str, os.PathLike)):
            paths.append(os.fspath(arguments[0]))

    sys.addaudithook(note)
    yield paths
    is_on[0] = False  # an audit hook stays


@pytest.mark.parametrize(
    "form",
    ["header of a pair", "image of a pair", "packed header"]
    + [f"{prefix}{name}" for name in ("meta.mhd", "nrrd.nhdr") for prefix in ("", "packed_", "renamed_")]
    + ["folder", "list", "zip", "nifti", "nrrd", "metaimage"],
)
def test_every_file_that_loading_reads_is_part_of_the_key(cache, phantom, test_data, tmp_path, opened, form):
    folder = tmp_path / "scans"
    folder.mkdir()
    if form in ("nifti", "nrrd", "metaimage"):
        source = Path(shutil.copy(test_data / REAL_SCANS[form], folder))
    elif form in ("folder", "list", "zip"):
        for file in sorted((test_data / REAL_SCANS["dicom"]).glob("*.dcm"))[:3]:  # 22, 23 and 24 are neighbours
            shutil.copy(file, folder)
        source = {"folder": folder, "list": sorted(folder.iterdir()), "zip": folder / "series.zip"}[form]
        if form == "zip":
            with zipfile.ZipFile(source, "w") as archive:
                for file in folder.glob("*.dcm"):
                    archive.write(file)
    else:
        source = detached_scans(folder, phantom)[form]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # three slices of a series are odd
        assert [is_hit(cache, source) for _ in range(2)] == [False, True]
        opened.clear()
        load_volume(source)
        read = {path for path in opened if path.startswith(str(folder))}
        assert len(read) == {"folder": 3, "list": 3}.get(form, 2 if "." in form or "pa" in form else 1)
        for path in map(Path, sorted(read)):
            content = bytearray(path.read_bytes())
            content[-3] ^= 1
            path.write_bytes(content)
            hits = cache.hits
            with suppress(VolumeError):
                cache.read(source)
            assert cache.hits == hits
            content[-3] ^= 1
            path.write_bytes(content)
            assert is_hit(cache, source)


def test_both_halves_of_a_pair_are_the_same_scan(cache, phantom, tmp_path):
    forms = detached_scans(tmp_path, phantom)
    cache.read(forms["header of a pair"])
    assert is_hit(cache, forms["image of a pair"])
    (tmp_path / "pair_mg.txt").write_text("notes")
    assert is_hit(cache, forms["image of a pair"])


def test_headers_that_cannot_be_followed_are_refused_as_ever(cache, phantom, tmp_path):
    forms = detached_scans(tmp_path, phantom)
    (tmp_path / "deeper").mkdir()
    for name in ("meta.mhd", "nrrd.nhdr"):
        cache.read(forms[name])
        moved = forms[name].rename(tmp_path / "deeper" / name)  # without its data
        with pytest.raises(VolumeError):
            cache.read(moved)


# ---- the key: settings


DISPLAY = {"intensity": "display"}


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({}, {"size": 56}),
        ({}, {"patch_size": 7}),
        ({}, {"image_mean": [0.4, 0.4, 0.4]}),
        ({}, {"image_std": [0.2, 0.3, 0.2]}),
        ({}, {"slab_mm": 40.0}),
        ({}, {"max_slices": 5}),
        ({}, {"num_slices": 6}),
        ({}, {"slab_reduction": "max"}),
        ({}, {"slab_reduction": ["mean", "mean", "max"]}),
        ({}, {"windows": "wide"}),
        ({}, {"windows": [[-600, 1500], [40, 400], [480, 2400]]}),
        ({}, {"reorient": False}),
        ({}, {"crop_body": True}),
        ({}, DISPLAY),
        (DISPLAY, {"nominal_mm": 4.0}),
        (DISPLAY, {"max_slices": 5}),
        (DISPLAY, {"slab_reduction": "nearest"}),
        (DISPLAY, {"reorient": False}),
    ],
)
def test_a_setting_that_changes_the_row_changes_the_key(tmp_path, scan, settings, changes):
    if settings:
        scan = tmp_path / "image.npy"
        np.save(scan, np.random.default_rng(0).random((12, 20, 24), dtype=np.float32))
    VolumeCache(tmp_path / "cache", CTMoEImageProcessor(**{**SMALL, **settings})).read(scan)
    changed = VolumeCache(tmp_path / "cache", CTMoEImageProcessor(**{**SMALL, **settings, **changes}))
    if changes == DISPLAY:
        with pytest.raises(VolumeError, match=r"where \[0, 1\] is expected"):
            changed.read(scan)
        return
    assert [is_hit(changed, scan) for _ in range(2)] == [False, True]


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({}, {"nominal_mm": 4.0}),
        ({}, {"return_tensors": "np"}),
        ({}, {"windows": [[-600, 1500], [40, 400], [480, 2500]]}),
        ({}, {"slab_reduction": ["mean", "mean", "mean"]}),
        ({}, {"slab_mm": 5}),
        ({"num_slices": 4}, {"slab_mm": 2.5}),
        ({"num_slices": 4}, {"max_slices": 3}),
        (DISPLAY, {"windows": "head"}),
        (DISPLAY, {"slab_mm": 1.0}),
    ],
)
def test_a_setting_that_changes_nothing_does_not_change_the_key(tmp_path, scan, settings, changes):
    if settings == DISPLAY:
        scan = tmp_path / "image.npy"
        np.save(scan, np.random.default_rng(0).random((12, 20, 24), dtype=np.float32))
    VolumeCache(tmp_path / "cache", CTMoEImageProcessor(**{**SMALL, **settings})).read(scan)
    changed = VolumeCache(tmp_path / "cache", CTMoEImageProcessor(**{**SMALL, **settings, **changes}))
    assert is_hit(changed, scan)


def test_a_saved_processor_finds_the_same_entries(cache, scan, tmp_path):
    cache.read(scan)
    cache.image_processor.save_pretrained(tmp_path / "processor")
    loaded = CTMoEImageProcessor.from_pretrained(tmp_path / "processor")
    assert "auto_map" in loaded.to_dict()
    assert is_hit(VolumeCache(cache.folder, loaded), scan)


def test_settings_count_as_they_are_when_a_scan_is_read(cache, scan):
    cache.read(scan)
    cache.image_processor.num_slices = 3
    assert not is_hit(cache, scan)


# ---- what is not cached


def test_images_in_memory_are_processed_each_time(cache, scan):
    for source in (load_volume(scan), nib.load(scan)):
        assert not any(is_hit(cache, source) for _ in range(2))
    assert cache.misses == 4
    assert not entries(cache)


@pytest.mark.parametrize(
    "source",
    [
        "missing.nii.gz",
        "empty.nii.gz",
        "a\0b",
        {"path": None, "bytes": None},
        {},
        [],
        b"",
        b"text",
        5,
        "ftp://a/b.nii",
    ],
)
def test_errors_of_the_scan_pass_through_and_store_nothing(cache, tmp_path, source):
    (tmp_path / "empty.nii.gz").touch()
    if isinstance(source, str) and source.endswith(".gz"):
        source = str(tmp_path / source)
    with pytest.raises(VolumeError) as expected:
        cache.image_processor.process_volume(source)
    with pytest.raises(VolumeError) as found:
        cache.read(source)
    assert str(found.value) == str(expected.value)
    assert (cache.hits, cache.misses, entries(cache), parts(cache)) == (0, 0, [], [])


def test_a_pipe_is_refused_without_waiting(cache, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(VolumeError, match="not a regular file"):
        cache.read(tmp_path / "pipe")


class ReplacedWhileRead(CTMoEImageProcessor):
    """As if another program wrote to the scan after it was hashed."""

    def process_volume(self, volume, **kwargs):
        write_phantom(volume, seed=5, shape=(12, 64, 64))
        return super().process_volume(volume, **kwargs)


def test_a_scan_that_changes_while_it_is_read_is_not_stored(tmp_path, scan):
    cache = VolumeCache(tmp_path / "cache", ReplacedWhileRead(**SMALL))
    expected = cache.read(scan)
    assert not entries(cache)
    assert_same(CTMoEImageProcessor(**SMALL).process_volume(scan), expected)


# ---- the bound


def test_the_least_recently_used_are_evicted_and_the_bound_holds(tmp_path):
    rng = np.random.default_rng(7)
    processor = CTMoEImageProcessor(size=14, patch_size=7)
    scans = [write_nifti(tmp_path / f"{i}.nii", int(rng.integers(1, 41)), seed=i) for i in range(12)]
    rows = [processor.process_volume(scan) for scan in scans]
    unbounded = VolumeCache(tmp_path / "all", processor)
    sizes = {}
    for scan in scans:
        before = set(entries(unbounded))
        unbounded.read(scan)
        (new,) = set(entries(unbounded)) - before
        sizes[scan] = new.name, new.stat().st_size
    assert len({size for _, size in sizes.values()}) > 8

    bound = 250_000
    cache, held = VolumeCache(tmp_path / "cache", processor, max_gb=bound / 1e9), []
    (cache.folder / "model.safetensors").write_bytes(b"not an entry" * 100_000)
    for turn in range(120):
        index = int(rng.integers(len(scans)))
        name, size = sizes[scans[index]]
        hits = cache.hits
        assert_same(cache.read(scans[index]), rows[index])
        assert cache.hits - hits == ((name, size) in held), turn
        if (name, size) in held:
            held.remove((name, size))
        while sum(size for _, size in held) + size > bound:
            held.pop(0)
        held.append((name, size))
        found = {path.name: path.stat().st_size for path in entries(cache) if path.name != "model.safetensors"}
        assert found == dict(held)
        assert sum(found.values()) <= bound
        time.sleep(0.012)  # the clock of the file system ticks that slowly
    assert 20 < cache.hits < 100
    assert (cache.folder / "model.safetensors").stat().st_size == 1_200_000
    VolumeCache(cache.folder, processor, max_gb=100_000 / 1e9)
    while sum(size for _, size in held) > 100_000:
        held.pop(0)
    assert {path.name for path in entries(cache)} == {name for name, _ in held} | {"model.safetensors"}


def test_caches_that_seldom_look_keep_the_bound_together(tmp_path, monkeypatch):
    scans = [write_nifti(tmp_path / f"{i}.nii", 1, seed=i, edge=16) for i in range(90)]
    processor = CTMoEImageProcessor(size=14, patch_size=7)
    looked = []
    iterdir = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda folder: looked.append(folder) or iterdir(folder))
    first = VolumeCache(tmp_path / "cache", processor)
    first.read(scans[0])
    (entry,) = entries(first)
    first.read(scans[1])
    looked.clear()
    for scan in scans[2:20]:
        first.read(scan)
    assert first.folder not in looked  # 100 GB of room for a few kB
    bound = 60 * entry.stat().st_size
    caches = [VolumeCache(first.folder, processor, max_gb=bound / 1e9) for _ in range(3)]
    for number, scan in enumerate(scans[20:]):
        caches[number % 3].read(scan)
        assert total_size(first) <= bound
    assert total_size(first) > 0.8 * bound


def test_an_entry_larger_than_the_bound_is_not_stored(tmp_path):
    processor = CTMoEImageProcessor(size=14, patch_size=7)
    small, large = write_nifti(tmp_path / "small.nii", 2), write_nifti(tmp_path / "large.nii", 40)
    cache = VolumeCache(tmp_path / "cache", processor, max_gb=50_000 / 1e9)
    cache.read(small)
    assert not any(is_hit(cache, large) for _ in range(2))
    assert is_hit(cache, small)
    assert not parts(cache)


class MadeByAnother(CTMoEImageProcessor):
    """As if another process stored the same scan while this one processed it."""

    def process_volume(self, volume, **kwargs):
        VolumeCache(self.folder, CTMoEImageProcessor(size=14, patch_size=7), self.max_gb).read(volume)
        return super().process_volume(volume, **kwargs)


def test_an_entry_that_two_processes_make_takes_its_room_once(tmp_path):
    scans = [write_nifti(tmp_path / f"{i}.nii", 20, seed=i) for i in range(2)]
    processor = MadeByAnother(size=14, patch_size=7)
    processor.folder, processor.max_gb = tmp_path / "cache", 110_000 / 1e9  # two of 47 kB
    cache = VolumeCache(processor.folder, processor, processor.max_gb)
    for scan in scans:
        cache.read(scan)
    assert (cache.hits, cache.misses, len(entries(cache))) == (0, 2, 2)
    assert all(is_hit(VolumeCache(cache.folder, CTMoEImageProcessor(size=14, patch_size=7)), scan) for scan in scans)


@pytest.mark.parametrize("max_gb", [0, -1, 0.0, float("nan"), "1", None, True])
def test_a_bound_that_is_none_is_refused(tmp_path, max_gb):
    with pytest.raises(TrainingError, match="max_gb"):
        VolumeCache(tmp_path / "cache", CTMoEImageProcessor(**SMALL), max_gb=max_gb)
    assert not (tmp_path / "cache").exists()


# ---- damage


def test_a_damaged_entry_is_made_again(cache, phantom):
    cache.read(phantom)
    (entry,) = entries(cache)
    content = entry.read_bytes()
    rng = np.random.default_rng(0)
    damaged = [b"", content[:-1], content + b"\0", content[: len(content) // 2], bytes(len(content))]
    damaged += [content[:position] for position in (3, 8, 100)] + [content[:8] + b"\xff" + content[9:]]
    damaged += [rng.bytes(len(content)), content[:-64] + bytes(64)]
    header = int.from_bytes(content[:8], "little")
    for position in [*rng.integers(0, 8 + header, 60), *rng.integers(8 + header, len(content), 30)]:
        flipped = bytearray(content)
        flipped[position] ^= 1 << rng.integers(8)
        damaged.append(bytes(flipped))
    for name in (b"BF16", b"F8_E4M3", b"F64", b"I32"):
        damaged.append(content.replace(b'"F32"', b'"%s"' % name, 1))
    for broken in damaged:
        entry.write_bytes(broken)
        assert not is_hit(cache, phantom)
        assert entry.read_bytes() == content
    assert is_hit(cache, phantom)


def test_an_entry_that_is_gone_is_made_again(cache, phantom):
    cache.read(phantom)
    entries(cache)[0].unlink()
    assert [is_hit(cache, phantom) for _ in range(2)] == [False, True]


# ---- the folder


def test_only_the_owner_may_read(tmp_path, phantom):
    old = os.umask(0)
    try:
        cache = VolumeCache(tmp_path / "deep" / "cache", CTMoEImageProcessor(**SMALL))
        cache.read(phantom)
    finally:
        os.umask(old)
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    files = list(cache.folder.iterdir())
    assert len(files) == 2
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in files)


def test_a_folder_that_is_there_keeps_its_mode(tmp_path):
    (tmp_path / "cache").mkdir(mode=0o750)
    os.chmod(tmp_path / "cache", 0o750)
    assert VolumeCache(tmp_path / "cache", CTMoEImageProcessor()).folder.stat().st_mode & 0o777 == 0o750


def test_nothing_of_the_patient_is_kept(cache, test_data, tmp_path):
    image = nib.load(write_phantom(tmp_path / "phantom.nii", shape=(12, 64, 64)))
    image.header["descrip"] = b"DOE^JANE 1970"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"DOE^JANE 1970 born"))
    (tmp_path / "patient_77").mkdir()
    nib.save(image, tmp_path / "patient_77" / "Doe_Jane.nii.gz")
    cache.read(tmp_path / "patient_77" / "Doe_Jane.nii.gz")
    series = test_data / REAL_SCANS["dicom"]
    cache.read(series)
    secrets = [b"DOE^JANE", b"Doe_Jane", b"patient_77", b"nii", bytes(tmp_path), series.name.encode(), b"dcm"]
    dataset = pydicom.dcmread(next(series.glob("*.dcm")))
    secrets += [str(dataset[tag].value).encode() for tag in ("PatientID", "SeriesInstanceUID", "StudyInstanceUID")]
    assert min(map(len, secrets)) >= 3
    assert len(entries(cache)) == 2
    for file in cache.folder.iterdir():
        content = file.name.encode() + b" "
        stored = file.read_bytes()
        if file.suffix == ".safetensors":  # three letters may turn up among random voxels
            header = int.from_bytes(stored[:8], "little")
            assert not any(secret in stored for secret in secrets if len(secret) > 6)
            stored = stored[8 : 8 + header]
        assert not any(secret in content + stored for secret in secrets)


def test_a_folder_that_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "cache", tmp_path / ("x" * 300)):
        with pytest.raises(TrainingError, match="cannot be used as a cache"):
            VolumeCache(folder, CTMoEImageProcessor())


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "cache").mkdir(mode=0o500)
    image_processor = CTMoEImageProcessor()
    user = os.geteuid()
    if user == 0:  # who may write anywhere
        os.seteuid(65534)
    try:
        with pytest.raises(TrainingError, match="PermissionError"):
            VolumeCache(tmp_path / "cache", image_processor)
    finally:
        os.seteuid(user)


def test_a_disk_that_is_full_costs_time_but_not_the_run(cache, phantom):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    expected = cache.image_processor.process_volume(phantom)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.warns(UserWarning, match="processed each time, not kept") as caught:
            rows = [cache.read(phantom) for _ in range(3)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(caught) == 1
    for row in rows:
        assert_same(row, expected)
    assert (cache.hits, cache.misses, entries(cache), parts(cache)) == (0, 3, [], [])
    assert [is_hit(cache, phantom) for _ in range(2)] == [False, True]


def test_a_folder_that_disappears_costs_time_but_not_the_run(cache, phantom):
    cache.read(phantom)
    shutil.rmtree(cache.folder)
    with pytest.warns(UserWarning, match="processed each time, not kept") as caught:
        assert not any(is_hit(cache, phantom) for _ in range(2))
    assert len(caught) == 1


def test_parts_of_killed_processes_are_removed_when_they_are_old(cache):
    for name, age in (("ct_moe_old.part", 3700), ("ct_moe_new.part", 3500), ("other.txt", 9999)):
        (cache.folder / name).touch()
        os.utime(cache.folder / name, (time.time() - age,) * 2)
    VolumeCache(cache.folder, cache.image_processor)
    assert [path.name for path in parts(cache)] == ["ct_moe_new.part", "other.txt"]


# ---- several processes


def test_a_copy_in_another_process_counts_for_itself(cache, phantom):
    cache.read(phantom)
    copy = pickle.loads(pickle.dumps(cache))
    assert (copy.hits, copy.misses, copy.folder) == (0, 0, cache.folder)
    assert is_hit(copy, phantom)
    assert (cache.hits, cache.misses) == (0, 1)


class Scans(Dataset):
    def __init__(self, cache: VolumeCache, paths: list[Path]):
        self.cache, self.paths = cache, paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.cache.read(self.paths[index]), self.cache.hits


@pytest.mark.slow
def test_workers_of_a_data_loader_share_the_cache(cache, phantom, tmp_path):
    paths = [write_phantom(tmp_path / f"{seed}.nii.gz", seed=seed, shape=(12, 64, 64)) for seed in range(4)]
    expected = [cache.image_processor.process_volume(path) for path in paths]
    scans = Scans(cache, paths)
    kwargs = {"batch_size": None, "num_workers": 2, "multiprocessing_context": "spawn", "collate_fn": list}
    for epoch in range(2):
        items = list(DataLoader(scans, **kwargs))
        assert len(entries(cache)) == 4
        assert [hits > 0 for _, hits in items] == [epoch == 1] * 4
        for (row, _), fresh in zip(items, expected):
            assert_same(row, fresh)


def read_at_random(cache: VolumeCache, paths: list[Path], seed: int, bound: int, start, results):
    rng = np.random.default_rng(seed)
    expected = [cache.image_processor.process_volume(path) for path in paths]
    start.wait(timeout=120)
    for _ in range(150):
        index = int(rng.integers(len(paths)))
        assert_same(cache.read(paths[index]), expected[index])
        if rng.random() < 0.05:  # as a disk that is going bad
            with suppress(FileNotFoundError, IndexError):
                os.truncate(entries(cache)[0], 1000)
        with FileLock(cache.folder / "lock"), suppress(FileNotFoundError):
            assert total_size(cache) <= bound
    results.put((cache.hits, cache.misses))


@pytest.mark.slow
def test_processes_that_share_a_small_cache_all_get_the_right_rows(tmp_path):
    paths = [write_nifti(tmp_path / f"{i}.nii.gz", 4 + i, seed=i, edge=32) for i in range(10)]
    bound = 1_500_000  # about five of them
    cache = VolumeCache(tmp_path / "cache", CTMoEImageProcessor(size=56, patch_size=14), max_gb=bound / 1e9)
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    shared = bound, context.Barrier(4), results
    processes = [context.Process(target=read_at_random, args=(cache, paths, seed, *shared)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0] * 4
    counts = [results.get() for _ in processes]
    assert all(hits + misses == 150 for hits, misses in counts)
    assert all(hits > 20 and misses > 20 for hits, misses in counts)
    assert not parts(cache)
    assert 0 < total_size(cache) <= bound
    for path in paths:
        assert_same(cache.read(path), cache.image_processor.process_volume(path))


def write_for_ever(cache: VolumeCache, source: bytes):
    content = bytearray(gzip.decompress(source))
    for number in range(100_000):
        content[-4:] = number.to_bytes(4, "little")  # the last two voxels: another scan each time
        cache.read(bytes(content))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ct_moe.volume_io_ct_moe.VolumeWarning")
def test_a_killed_writer_leaves_a_cache_that_works(tmp_path):
    scan = write_nifti(tmp_path / "scan.nii.gz", 64, edge=16)
    cache = VolumeCache(tmp_path / "cache", CTMoEImageProcessor(size=224, patch_size=14), max_gb=0.2)
    context = multiprocessing.get_context("spawn")
    left = 0
    for _ in range(3):
        process = context.Process(target=write_for_ever, args=(cache, scan.read_bytes()))
        process.start()
        stored = len(entries(cache)) + 1
        deadline = time.monotonic() + 120
        known = set(parts(cache))
        while len(entries(cache)) < min(stored, 4) or not set(parts(cache)) - known:
            assert time.monotonic() < deadline
            assert process.is_alive()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        left += len(set(parts(cache)) - known)
    assert left > 0  # at least one was killed while it was writing
    assert total_size(cache) <= 0.2e9
    again = VolumeCache(cache.folder, cache.image_processor, max_gb=0.2)
    for entry in entries(again):
        assert again._load(entry) is not None
    assert [is_hit(again, scan) for _ in range(2)] == [False, True]
    assert len(parts(again)) == left
    for part in parts(again):
        os.utime(part, (0, 0))
    assert not parts(VolumeCache(cache.folder, cache.image_processor, max_gb=0.2))
    assert is_hit(again, scan)
