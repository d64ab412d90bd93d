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
"""A data set of phantoms: whole or not there, the same every time, and what its rows say is what its files hold."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from drawn_phantom import coarse

from ct_moe import CTMoEError, DataError, ModelError, load_volume
from ct_moe.trainers import load_rows
from ct_moe.trainers.phantoms import data_set
from ct_moe.trainers.phantoms.anatomy import draw_phantom
from ct_moe.trainers.phantoms.data_set import write_phantoms


SIZES = {"train": 8, "validation": 2, "test": 3}


def write(out: Path, **changes) -> dict[str, int]:
    settings = {"n": SIZES["train"], "validation": SIZES["validation"], "test": SIZES["test"], "file_format": "both"}
    return write_phantoms(out, **{**settings, "workers": 1, "progress": False, **changes})


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A set of both formats, and what was returned for it."""
    with pytest.MonkeyPatch.context() as patch:
        coarse(patch)
        folder = tmp_path_factory.mktemp("phantoms") / "set"
        return folder, write(folder, seed=3)


def test_rows_load_for_training(written):
    folder, counts = written
    assert list(counts) == list(SIZES)
    for split, count in counts.items():
        rows = load_rows(folder / f"{split}.jsonl")
        assert len(rows) == count == len(lines(folder / f"{split}.jsonl"))
        tasks = Counter(rows["task"])
        assert tasks["report"] == SIZES[split]
        assert tasks["vqa_closed"] > 3 * SIZES[split]
        assert tasks["vqa_open"] > 2 * SIZES[split]
        for images in rows["images"]:
            (path,) = images
            assert Path(path).exists()
            assert Path(path).is_relative_to(folder)
        planes = load_rows(folder / f"{split}_plane.jsonl")
        assert len(planes) == SIZES[split]
        assert set(planes["task"]) == {"vqa_closed"}


def test_every_scan_reads_as_the_phantom_of_its_labels(written, monkeypatch):
    folder, _ = written
    coarse(monkeypatch)
    formats, orientations = Counter(), set()
    for split, size in SIZES.items():
        records = lines(folder / f"{split}_labels.jsonl")
        assert len(records) == size
        for index, record in enumerate(records):
            phantom = draw_phantom(3 * 1_000_003 + index, split)
            volume = load_volume(folder / record["images"])
            assert np.array_equal(volume.hu, phantom.hu)
            assert volume.spacing == pytest.approx(phantom.spacing, rel=1e-6)
            assert not volume.meta["warnings"]
            assert volume.meta["stored_orientation"] == record["orientation"]
            labels = json.loads(json.dumps(phantom.labels()))
            assert {name: record[name] for name in labels} == labels
            formats[volume.meta["format"]] += 1
            orientations.add(record["orientation"])
    assert len(orientations) > 4
    assert len(formats) == 2
    # Every fourth row names the series; both formats of every scan are there.
    assert [record["images"].endswith(".gz") for record in lines(folder / "train_labels.jsonl")] == [
        index % 4 != 3 for index in range(SIZES["train"])
    ]
    for split, size in SIZES.items():
        names = {path.name for path in (folder / split / "scans").iterdir()}
        assert names == {f"{index:05}{suffix}" for index in range(size) for suffix in ("", ".nii.gz")}


def test_left_is_left_when_read_from_disk(tmp_path, monkeypatch):
    coarse(monkeypatch)
    monkeypatch.setattr(data_set, "draw_phantom", lambda seed, split: draw_phantom(seed, split, ("renal stone",)))
    write(tmp_path / "set", n=12, validation=0, test=0, file_format="nifti")
    sides = set()
    for record in lines(tmp_path / "set" / "train_labels.jsonl"):
        volume = load_volume(tmp_path / "set" / record["images"])
        x = np.nonzero(volume.hu > 620)[2]  # denser than bone: the stone
        world = volume.affine[0, 3] + volume.affine[0, 0] * x  # LPS: the patient's left is positive
        assert np.abs(world).min() > 20
        found = {"left" if place > 0 else "right" for place in world}
        assert found == {lesion["side"] for lesion in record["findings"][0]["lesions"]}
        sides |= found
    assert sides == {"left", "right"}


def test_the_plane_of_every_row_is_that_of_its_file(written):
    folder, _ = written
    planes = set()
    for split in SIZES:
        for row in lines(folder / f"{split}_plane.jsonl"):
            stored = load_volume(folder / row["images"]).meta["stored_orientation"]
            # The last letter is the axis that slices are stacked along.
            assert row["answer"] == {"S": "axial", "I": "axial", "R": "sagittal", "L": "sagittal"}.get(
                stored[2], "coronal"
            )
            planes.add(row["answer"])
    assert planes == {"axial", "sagittal", "coronal"}


def test_the_same_arguments_give_the_same_bytes_and_another_seed_others(written, tmp_path, monkeypatch):
    folder, counts = written
    coarse(monkeypatch)
    assert write(tmp_path / "again", seed=3) == counts
    assert digests(tmp_path / "again") == digests(folder)
    write(tmp_path / "other", seed=4, n=1, validation=0, test=0)
    assert not {value for name, value in digests(tmp_path / "other").items()} & set(digests(folder).values())
    # A longer set begins with the same scans.
    write(tmp_path / "longer", seed=3, n=9, validation=0, test=0, file_format="nifti")
    longer = digests(tmp_path / "longer")
    for index in range(SIZES["train"]):
        name = f"train/scans/{index:05}.nii.gz"
        assert longer[name] == digests(folder)[name]


@pytest.mark.parametrize("file_format", ["nifti", "dicom"])
def test_one_format_alone_is_written(tmp_path, monkeypatch, file_format):
    coarse(monkeypatch)
    counts = write(tmp_path / "set", n=1, validation=0, test=0, file_format=file_format)
    assert list(counts) == ["train"]
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == [
        "train",
        "train.jsonl",
        "train_labels.jsonl",
        "train_plane.jsonl",
    ]
    (scan,) = (tmp_path / "set" / "train" / "scans").iterdir()
    assert scan.is_dir() == (file_format == "dicom")
    (rows,) = {row["images"] for row in lines(tmp_path / "set" / "train.jsonl")}
    assert tmp_path / "set" / rows == scan


def test_sizes_of_the_other_splits_have_defaults(tmp_path, monkeypatch):
    asked = {}

    def count(folder, split, size, *_):
        return asked.setdefault(split, size)

    monkeypatch.setattr(data_set, "_write_split", count)
    write(tmp_path / "few", n=8, validation=None, test=None)
    assert asked == {"train": 8, "validation": 4, "test": 4}
    asked.clear()
    write(tmp_path / "many", n=400, validation=None, test=None)
    assert asked == {"train": 400, "validation": 40, "test": 100}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 0}, "train scans: 0 is no number of scans"),
        ({"test": -1}, "test scans: -1 is no number of scans"),
        ({"seed": -1}, "seed: -1 is too small"),
        ({"workers": 0}, "workers: 0 is too small"),
        ({"file_format": "nrrd"}, "file_format: 'nrrd' is unknown. Use nifti, dicom or both"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(tmp_path, changes, message):
    with pytest.raises(DataError) as raised:
        write(tmp_path / "set", **changes)
    assert str(raised.value).startswith(message)
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_never_overwritten(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ModelError, match="is not an empty folder"):
        write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), CTMoEError, "No space left on device"),
        (KeyboardInterrupt("now"), KeyboardInterrupt, "now"),
        (RuntimeError("bug"), RuntimeError, "bug"),
    ],
)
def test_a_set_that_was_cut_off_is_not_there(tmp_path, monkeypatch, raised, expected, message):
    coarse(monkeypatch)
    write_nifti = data_set.write_nifti

    def fail(phantom, path, orientation):
        if "validation" in str(path):
            raise raised
        return write_nifti(phantom, path, orientation)

    monkeypatch.setattr(data_set, "write_nifti", fail)
    with pytest.raises(expected, match=message):
        write(tmp_path / "deep" / "set", n=1, file_format="nifti")
    assert not list(tmp_path.iterdir())


def script(tmp_path: Path, out: Path, *, guarded: bool = True, n: int = 6) -> list[str]:
    call = f"write_phantoms({str(out)!r}, n={n}, validation=0, test=0, workers=2)"
    path = tmp_path / "script.py"
    guard = "if __name__ == '__main__':\n    " if guarded else ""
    path.write_text(f"from ct_moe.trainers.phantoms.data_set import write_phantoms\n{guard}{call}\n")
    return [sys.executable, str(path)]


@pytest.mark.slow
def test_several_workers_write_the_same_bytes_as_one(tmp_path):
    done = subprocess.run(script(tmp_path, tmp_path / "two"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    write(tmp_path / "one", n=6, validation=0, test=0, file_format="nifti")
    assert digests(tmp_path / "two") == digests(tmp_path / "one")
    assert "6/6" in done.stderr


@pytest.mark.slow
def test_a_script_without_a_guard_ends_and_says_why(tmp_path):
    command = script(tmp_path, tmp_path / "set", guarded=False)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "DataError" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]


def children(pid: int) -> list[int]:
    """Processes that draw: not the resource tracker of multiprocessing."""
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [child for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def started(process: subprocess.Popen, scans: Path) -> list[int]:
    """Wait until the first scans are written; the workers."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if len(list(scans.glob(".set-*/train/scans/*"))) > 1:
            return children(process.pid)
        time.sleep(0.1)
    raise AssertionError("nothing was written")


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_and_leaves_nothing(tmp_path):
    command = script(tmp_path, tmp_path / "set", n=2000)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    worker, _ = started(process, tmp_path)
    os.kill(worker, signal.SIGKILL)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "a worker: ended before its scan was written" in error.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]


@pytest.mark.slow
def test_workers_end_with_a_killed_parent(tmp_path):
    process = subprocess.Popen(script(tmp_path, tmp_path / "set", n=2000), stderr=subprocess.DEVNULL)
    workers = started(process, tmp_path)
    assert len(workers) == 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and any(Path(f"/proc/{worker}").exists() for worker in workers):
        time.sleep(0.1)
    assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]
    assert not (tmp_path / "set").exists()
