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
"""Controls of the phantom benchmark: what each leaves of a scan, against the scan processed or reckoned anew."""

from pathlib import Path

import numpy as np
import pytest

from ct_moe import CTMoEImageProcessor, Volume
from ct_moe.trainers.phantoms.anatomy import draw_phantom
from ct_moe.trainers.phantoms.controls import (
    best_slab,
    blind,
    flipped,
    flipped_answer,
    other_scan,
    shuffled_slices,
    single_slice,
)
from ct_moe.trainers.phantoms.files import write_nifti


AIR = -1024


@pytest.fixture(scope="module")
def processor() -> CTMoEImageProcessor:
    return CTMoEImageProcessor(size={"height": 56, "width": 56})


@pytest.fixture(scope="module")
def phantom():
    return draw_phantom(1, findings=("nodule",))


@pytest.fixture(scope="module")
def scan(processor, phantom) -> dict[str, np.ndarray]:
    return processor.process_volume(Volume(phantom.hu, phantom.spacing))


def areas_by_slab(areas: list[float], count: int) -> np.ndarray:
    """mm2 per slice of a finding, shared among slabs by the part of each slice that a slab covers."""
    shares = np.zeros(count)
    for index, area in enumerate(areas):
        low, high = index * count / len(areas), (index + 1) * count / len(areas)
        for slab in range(count):
            shares[slab] += area * max(0, min(high, slab + 1) - max(low, slab)) / (high - low)
    return shares


def lesions_of(name: str, *areas: list[float]) -> dict:
    return {"name": name, "lesions": [{"slice_areas": list(lesion)} for lesion in areas]}


def blinded(processor, scan: dict) -> dict:
    return blind(processor)(scan, {})


def test_blind_leaves_nothing_of_the_scan(processor, phantom, scan):
    air = processor.process_volume(Volume(np.full_like(phantom.hu, AIR), phantom.spacing))
    seen = blinded(processor, scan)
    assert seen.keys() == scan.keys()
    assert not seen["patch_mask"].any()
    # One value per channel in every slab, for whatever scan.
    assert len(np.unique(seen["pixel_values"][:, 0])) == 1
    np.testing.assert_allclose(seen["pixel_values"], air["pixel_values"], atol=1e-6)
    for name in ("slice_mask", "slice_positions", "patch_mask", "volume_scale"):
        np.testing.assert_array_equal(seen[name], air[name], err_msg=name)
        assert seen[name].dtype == scan[name].dtype


def test_blind_tells_two_scans_of_one_size_from_each_other_by_nothing(processor, phantom, scan):
    noisy = phantom.hu + np.int16(30) * (np.arange(phantom.hu.shape[2]) % 2).astype(np.int16)
    other = processor.process_volume(Volume(noisy, phantom.spacing))
    np.testing.assert_array_equal(blinded(processor, scan)["pixel_values"], blinded(processor, other)["pixel_values"])


@pytest.mark.parametrize("number", [2, 3, 10])
def test_other_scan_never_gives_a_scan_its_own(number):
    names = [f"scans/{index}.nii.gz" for index in range(number)]
    rows = [{"images": name} for name in names for _ in range(2)]
    for seed in range(20):
        change = other_scan(lambda path: {"path": path}, rows, Path("data"), seed)
        given = [change({}, {"images": name})["path"] for name in names]
        own = [str(Path("data") / name) for name in names]
        assert sorted(given) == sorted(own)
        assert all(a != b for a, b in zip(given, own))
        # The order of the rows has no say.
        again = other_scan(lambda path: {"path": path}, rows[::-1], Path("data"), seed)
        assert [again({}, {"images": name})["path"] for name in names] == given


def test_other_scan_differs_between_seeds():
    rows = [{"images": str(index)} for index in range(8)]
    given = set()
    for seed in range(5):
        change = other_scan(lambda path: {"path": path}, rows, Path(), seed)
        given.add(tuple(change({}, row)["path"] for row in rows))
    assert len(given) > 1


def test_shuffled_slices_are_the_same_slices(scan):
    before = {name: values.copy() for name, values in scan.items()}
    seen = shuffled_slices(scan, {"images": "scan"})
    assert not np.array_equal(seen["pixel_values"], scan["pixel_values"])
    for name in ("slice_mask", "slice_positions", "volume_scale"):
        np.testing.assert_array_equal(seen[name], scan[name], err_msg=name)

    def slabs(values: dict) -> list[bytes]:
        return [
            pixels.tobytes() + mask.tobytes() for pixels, mask in zip(values["pixel_values"], values["patch_mask"])
        ]

    # Each slab keeps its own mask.
    assert sorted(slabs(seen)) == sorted(slabs(scan))
    assert slabs(shuffled_slices(scan, {"images": "scan"})) == slabs(seen)
    for name, values in before.items():
        np.testing.assert_array_equal(scan[name], values, err_msg=name)


@pytest.mark.parametrize(("seed", "split"), [(1, "train"), (2, "train"), (3, "validation"), (1, "test"), (5, "test")])
@pytest.mark.parametrize("slab_mm", [5.0, 20.0])
def test_single_slice_is_the_slab_with_most_of_the_nodules(processor, seed, split, slab_mm):
    phantom = draw_phantom(seed, split, findings=("nodule",))
    labels = phantom.labels()
    scan = processor.process_volume(Volume(phantom.hu, phantom.spacing), slab_mm=slab_mm)
    areas = np.sum([lesion["slice_areas"] for lesion in labels["findings"][0]["lesions"]], axis=0)
    shares = areas_by_slab(areas, len(scan["pixel_values"]))
    slab = int(shares.argmax())
    assert best_slab(labels, "where nodule", len(shares)) == slab

    seen = single_slice({"scan": labels})(scan, {"images": "scan", "template": "where nodule"})
    assert seen.keys() == scan.keys()
    for name in ("pixel_values", "slice_mask", "patch_mask"):
        np.testing.assert_array_equal(seen[name], scan[name][[slab]], err_msg=name)
    # The level in the scan, which positions tell, is no part of one slice.
    np.testing.assert_array_equal(seen["slice_positions"], [0])
    np.testing.assert_array_equal(seen["volume_scale"], scan["volume_scale"])


@pytest.mark.parametrize("orientation", ["RAS", "PIR", "LSP"])
def test_single_slice_shows_the_nodule_however_the_scan_is_stored(processor, phantom, scan, orientation, tmp_path):
    """A scan with the nodules against one without: the slab of the largest difference."""
    labels = phantom.labels()
    lesion = labels["findings"][0]["lesions"][0]
    labels["findings"][0]["lesions"] = [lesion]
    read = processor.process_volume(str(write_nifti(phantom, tmp_path / "scan.nii.gz", orientation)))
    np.testing.assert_allclose(read["pixel_values"], scan["pixel_values"], atol=1e-3)
    seen = single_slice({"scan": labels})(read, {"images": "scan", "template": "count nodule"})
    # Its voxels gone from the volume, the slab that changes most must be the one that is shown.
    hu = phantom.hu.copy()
    inside = np.flatnonzero(lesion["slice_areas"])
    hu[inside] = np.where(hu[inside] > -400, -830, hu[inside])
    emptied = processor.process_volume(Volume(hu, phantom.spacing))
    changed = np.flatnonzero((emptied["pixel_values"] != scan["pixel_values"]).any((1, 2, 3)))
    slabs = [slab for slab in changed if np.array_equal(read["pixel_values"][slab], seen["pixel_values"][0])]
    assert len(slabs) == 1
    # The middle of a sphere is where it covers most.
    assert abs(slabs[0] - changed.mean()) <= 1


def test_best_slab_by_hand():
    labels = {
        "shape": [8, 4, 4],
        "findings": [
            lesions_of("nodule", [0, 0, 0, 0, 0, 10, 30, 0], [0, 25, 0, 0, 0, 0, 0, 0]),
            lesions_of("ascites", [0, 0, 50, 60, 0, 0, 0, 0]),
        ],
    }
    assert best_slab(labels, "where nodule", 8) == 6
    assert best_slab(labels, "where nodule", 4) == 3
    assert best_slab(labels, "presence ascites", 8) == 3
    assert best_slab(labels, "presence ascites", 4) == 1
    # Neither the name of a finding of the scan nor that of any: all findings.
    assert best_slab(labels, "phase", 8) == 3
    assert best_slab(labels, "where renal stone", 8) == 3
    assert best_slab({**labels, "findings": []}, "phase", 8) == 4
    assert best_slab({**labels, "findings": []}, "phase", 1) == 0


def test_best_slab_shares_slices_between_slabs():
    """5 slices in 4 slabs of 1.25: slab 2 holds half of slice 2 and three quarters of slice 3, not both."""
    areas = [80, 0, 50, 50, 0]
    np.testing.assert_allclose(areas_by_slab(areas, 4), [80, 25, 62.5, 12.5])
    assert best_slab({"shape": [5, 4, 4], "findings": [lesions_of("nodule", areas)]}, "where nodule", 4) == 0


def test_best_slab_adds_up_what_lies_side_by_side():
    labels = {
        "shape": [3, 4, 4],
        "findings": [lesions_of("nodule", [30, 0, 0], [0, 20, 0]), lesions_of("effusion", [0, 20, 0])],
    }
    assert best_slab(labels, "phase", 3) == 1
    assert best_slab(labels, "count nodule", 3) == 0


def test_flipped_is_the_scan_of_a_mirrored_patient(processor, phantom, scan):
    mirrored = processor.process_volume(Volume(phantom.hu[:, :, ::-1].copy(), phantom.spacing))
    seen = flipped(scan, {})
    assert seen.keys() == scan.keys()
    np.testing.assert_allclose(seen["pixel_values"], mirrored["pixel_values"], atol=1e-4)
    np.testing.assert_array_equal(seen["patch_mask"], mirrored["patch_mask"])
    for name in ("slice_mask", "slice_positions", "volume_scale"):
        np.testing.assert_array_equal(seen[name], mirrored[name], err_msg=name)
    # No phantom is its own mirror image.
    assert not np.allclose(seen["pixel_values"], scan["pixel_values"], atol=0.1)


def test_flipping_twice_changes_nothing(scan):
    twice = flipped(flipped(scan, {}), {})
    for name, values in scan.items():
        np.testing.assert_array_equal(twice[name], values, err_msg=name)


@pytest.mark.parametrize(
    ("answer", "mirrored"),
    [
        ("left upper lobe", "right upper lobe"),
        ("right lower lobe", "left lower lobe"),
        ("right middle lobe", None),
        ("left kidney", "right kidney"),
        ("right pleura", "left pleura"),
        ("pleura of both sides", None),
        ("left lobe of the liver", None),
        ("right lobe of the liver", None),
        ("both kidneys", None),
        ("upper lobes", None),
        ("towards the head", None),
        ("neither", None),
        ("40 mm", None),
        ("left", "right"),
    ],
)
def test_flipped_answer(answer, mirrored):
    assert flipped_answer(answer) == mirrored
    if mirrored is not None:
        assert flipped_answer(mirrored) == answer
