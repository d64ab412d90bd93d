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
"""What the tower of the phantoms' 2D base is taught: shifted slices, the patches that show a lesion, its width."""

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from ct_moe.trainers.phantoms.data_set import write_phantoms


@pytest.fixture(scope="module")
def pretrain_base(load_script):
    return load_script("pretrain_base")


@pytest.fixture(scope="module")
def dataset(pretrain_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "phantoms"
    write_phantoms(folder, n=12, validation=0, test=0, workers=1, progress=False)
    return pretrain_base.SliceTexts(folder, None, seed=0)


def test_slices_are_shifted_and_their_edges_repeated(pretrain_base):
    images = torch.randn(3, 3, 32, 32)
    offsets = torch.tensor([[0, 0], [5, -7], [-16, 16]])
    moved = pretrain_base.shifted(images, offsets)
    for image, result, (down, right) in zip(images, moved, offsets.tolist()):
        for y, x in ((0, 0), (3, 30), (16, 16), (31, 9)):
            source = image[:, min(max(y + down, 0), 31), min(max(x + right, 0), 31)]
            torch.testing.assert_close(result[:, y, x], source, rtol=0, atol=0)


def test_a_patch_shows_a_lesion_whose_inner_part_reaches_into_it(pretrain_base):
    torch.manual_seed(0)
    lesions = torch.cat(
        [torch.randint(-1, 3, (40, 2, 1)), torch.rand(40, 2, 2) * 150 - 10, torch.rand(40, 2, 1) * 20 + 1], 2
    )
    offsets = torch.randint(-16, 17, (40, 2))
    shown = pretrain_base.shown(lesions, offsets).reshape(40, 8, 8, 3)
    steps = torch.arange(0, 128.001, 0.25)  # a fine grid of points, each in one patch or on the edge of several
    for pair, offset, patches in zip(lesions, offsets, shown):
        wanted = torch.zeros(8, 8, 3)
        for number, y, x, radius in pair.tolist():
            if number < 0:
                continue
            away = (steps[:, None] - y + offset[0]).hypot(steps - x + offset[1])
            for row in range(8):
                for column in range(8):
                    least = away[row * 64 : row * 64 + 65, column * 64 : column * 64 + 65].min()
                    wanted[row, column, int(number)] += least < 0.4 * radius - 0.2
                    # Within the grid's fineness of the limit either is right.
                    if abs(least - 0.4 * radius) <= 0.2:
                        wanted[row, column, int(number)] += patches[row, column, int(number)]
        torch.testing.assert_close(patches, wanted.clamp(max=1), rtol=0, atol=0)


def test_small_lesions_lie_where_the_tower_is_told(pretrain_base, dataset):
    """In the pixels: a nodule and a stone are brighter than what surrounds them, a liver lesion is darker."""
    numbers, sides = set(), []
    for slab, lesions in enumerate(dataset.lesions.tolist()):
        for number, y, x, radius in lesions:
            if number < 0:
                continue
            name = pretrain_base.SMALL[int(number)]
            channel = 0 if name == "nodule" else 2 if name == "renal stone" else 1
            image = dataset.pixel_values[slab, channel].float().numpy()
            rows, columns = np.indices(image.shape) + 0.5
            away = np.hypot(rows - y, columns - x)
            inner, around = (
                image[away < max(1, 0.5 * radius)].mean(),
                np.median(image[(away > radius) & (away < 2 * radius + 2)]),
            )
            sides.append((around - inner if name == "liver lesion" else inner - around) > 0.03)
            numbers.add(name)
    assert numbers == set(pretrain_base.SMALL)
    assert np.mean(sides) > 0.9  # in a slab that holds little of one, it may be hidden by its neighbours


def test_the_tower_is_taught_the_width_of_a_slab_not_of_the_lesion(pretrain_base, dataset):
    first = dataset.num_findings
    told = dataset.targets[:, first : first + 2 * len(pretrain_base.WIDTHS)].reshape(len(dataset), 2, -1)
    varied = 0
    for number, name in enumerate(("consolidation", "aneurysm")):
        for scan, labels in enumerate(dataset.labels):
            lesions = [lesion for found in labels["findings"] if found["name"] == name for lesion in found["lesions"]]
            slabs = [index for index, place in enumerate(dataset.places) if place[0] == scan]
            for index in slabs if lesions else ():
                _, low, high = dataset.slab(index)
                areas = lesions[0]["slice_areas"]
                part = areas[
                    int(low * len(areas)) : max(int(low * len(areas)) + 1, int(np.ceil(high * len(areas) - 1e-9)))
                ]
                width = 2 * (np.mean(part) / np.pi) ** 0.5
                for least, reached in zip(pretrain_base.WIDTHS, told[index, number].tolist()):
                    if abs(width - least) > 3:
                        assert reached == (width > least), (name, scan, index, width)
            varied += len({tuple(told[index, number].tolist()) for index in slabs}) > 2
    assert varied > 3


def test_a_lesion_and_its_patch_move_together(pretrain_base):
    lesions = torch.tensor([[[0.0, 70.0, 40.0, 4.0]]]).expand(9, 1, 4)
    images = torch.zeros(9, 3, 128, 128)
    images[:, :, 68:72, 38:42] = 1
    offsets = torch.cartesian_prod(torch.tensor([-15, 0, 15]), torch.tensor([-15, 0, 15]))
    bright = pretrain_base.shifted(images, offsets).mean(1).reshape(9, 8, 16, 8, 16).amax((2, 4)).flatten(1)
    shown = pretrain_base.shown(lesions, offsets)
    assert (shown[..., 0] <= bright).all()
    assert (shown[..., 0].sum(1) >= 1).all()
    assert not shown[..., 1:].any()


def test_both_losses_fall(pretrain_base, dataset):
    """On slabs that are shown again and again, at the scores of the slice and of its patches."""
    torch.manual_seed(0)
    tower = CLIPVisionModel(CLIPVisionConfig(**pretrain_base.VISION))
    targets, lesions = dataset.targets, dataset.lesions
    head = torch.nn.Linear(pretrain_base.VISION["hidden_size"], targets.shape[1] + len(pretrain_base.SMALL))
    batch = torch.nonzero(lesions[:, 0, 0] >= 0)[:8, 0]
    patches = pretrain_base.shown(lesions[batch], torch.zeros(8, 2))
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=1e-3)
    losses = []
    for _ in range(40):
        losses.append(pretrain_base.tower_losses(tower, head, dataset.pixel_values[batch], targets[batch], patches))
        sum(losses[-1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    for first, last in zip(losses[0], losses[-1]):
        assert last < 0.5 * first


def test_pretraining_shifts_slices_and_changes_all_that_a_llava_reads(pretrain_base, dataset, monkeypatch):
    seen = {"shifted": [], "shown": []}
    for name in seen:
        original = getattr(pretrain_base, name)

        def listening(values, offsets, name=name, original=original):
            seen[name].append(offsets)
            return original(values, offsets)

        monkeypatch.setattr(pretrain_base, name, listening)
    tower = CLIPVisionModel(CLIPVisionConfig(**pretrain_base.VISION))
    before = {name: value.clone() for name, value in tower.named_parameters()}
    pretrain_base.pretrain_tower(tower, dataset, steps=2, batch_size=8, lr=1e-3)
    changed = {name for name, value in tower.named_parameters() if (value != before[name]).any()}
    assert {name for name in before if "layers.4" not in name and "post_layernorm" not in name} <= changed
    assert len(seen["shifted"]) == 2
    for moved, told in zip(seen["shifted"], seen["shown"], strict=True):
        assert torch.equal(moved, told)
        assert moved.any()


def test_scans_without_small_lesions(pretrain_base, dataset):
    healthy = object.__new__(pretrain_base.SliceTexts)
    healthy.places, healthy.fields = dataset.places[:3], dataset.fields
    healthy.labels = [labels | {"findings": []} for labels in dataset.labels]
    assert not pretrain_base.shown(healthy._small_lesions(), torch.zeros(3, 2)).any()
