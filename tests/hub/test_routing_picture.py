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
"""The picture of the routing: its colours and bars against the numbers, its texts, every kind of model."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ct_moe.errors_ct_moe import ModelError, VolumeError
from ct_moe.hub.picture import GAP, YELLOW
from ct_moe.hub.routing_picture import BAR, EXPERT_COLOURS, MARGIN, draw_routing, tinted
from ct_moe.image_processing_ct_moe import CTMoEImageProcessor
from ct_moe.volume_ct_moe import Volume


# What a viewer without green or red cones sees: Machado, Oliveira and Fernandes 2009, on linear RGB.
SIGHT = {
    "normal": np.eye(3),
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
}


def a_volume(num_slices: int = 10, **kwargs) -> Volume:
    """Soft tissue with air at the back."""
    hu = np.full((num_slices, 56, 56), 40, dtype=np.int16)
    hu[:, 42:] = -1000
    return Volume(hu, (5.0, 2.0, 2.0), **kwargs)


def a_processor(**kwargs) -> CTMoEImageProcessor:
    return CTMoEImageProcessor(**{"size": 56, "patch_size": 14, **kwargs})


def a_routing(num_slices: int = 10, num_layers: int = 2, experts: int = 4, task: str | None = "report") -> dict:
    """As the pipeline makes it: 4 x 4 patches, the row at the back is air, experts in turn from patch to patch."""
    maps = np.arange(num_slices * 16).reshape(num_slices, 4, 4) % experts
    maps[:, 3] = -1
    maps = maps.astype(np.int16)
    load = [float((maps == expert).sum() / (maps >= 0).sum()) for expert in range(experts)]
    layer = {"shared_load": load, "shared_entropy": 0.7, "shared_agreement": None if num_slices == 1 else 0.5}
    layer |= {"task_load": load if task else [0.0] * experts, "task_entropy": 0.0, "task_agreement": None}
    scores = np.arange(1, num_slices + 1) / np.arange(1, num_slices + 1).sum()
    return {
        "task": task,
        "task_probabilities": {"report": 0.5, "vqa_closed": 0.3, "vqa_open": 0.2},
        "slice_scores": scores.tolist(),
        "slice_positions_mm": [5.0 * index for index in range(num_slices)],
        "layers": [{"layer": 3 + 2 * index, **layer} for index in range(num_layers)],
        "notice": "Routing is not evidence.",
        "maps": [{"shared": maps, "task": maps if task else np.full_like(maps, -1)} for _ in range(num_layers)],
    }


def without(routing: dict, *names: str) -> dict:
    return {name: value for name, value in routing.items() if name not in names}


@pytest.fixture
def written(monkeypatch) -> list[str]:
    """What is written into the picture; a text outside its section or over another one fails at once."""
    texts, boxes, draw_text = [], {}, ImageDraw.ImageDraw.text

    def text(self, place, words, fill=None, font=None, anchor=None, **kwargs):
        left, top, right, bottom = self.textbbox(place, words, font=font, anchor=anchor)
        width, height = self.im.size
        assert min(left, top, width - right, height - bottom) >= -1, f"{words!r} is cut off"
        # The drawer is kept, so that its id is not given to the next one.
        for other, (x0, y0, x1, y1) in boxes.setdefault(id(self), (self, []))[1]:
            assert left >= x1 or x0 >= right or top >= y1 or y0 >= bottom, f"{words!r} over {other!r}"
        boxes[id(self)][1].append((words, (left, top, right, bottom)))
        texts.append(words)
        return draw_text(self, place, words, fill, font, anchor=anchor, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return texts


def rows_of(picture: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    """Number of pixels of a colour per row of the picture."""
    return (np.asarray(picture) == colour).all(-1).sum(1)


def test_patches_have_the_colour_of_their_expert_and_air_has_none():
    processor, volume, routing = a_processor(), a_volume(), a_routing()
    routing["maps"] = [{"shared": np.full((10, 4, 4), -1, dtype=np.int16)} for _ in range(2)]
    routing["maps"][0]["shared"][0, 1, 2] = 2  # one patch of the first slice
    picture = np.asarray(draw_routing(volume, processor, routing, columns=2))
    grey = round((40 - (40 - 200)) / 400 * 255)  # 40 HU in a window of 40 +- 200 HU
    blended = [round((grey + channel) / 2) for channel in EXPERT_COLOURS[2]]
    found = np.argwhere((picture == blended).all(-1))
    edge = round(len(found) ** 0.5)
    assert np.ptp(found, axis=0).tolist() == [edge - 1, edge - 1]  # one square
    (y, x), tile = found[0], 4 * edge
    assert x == MARGIN + 2 * edge  # in the first tile, third column of patches
    assert tile == 392
    plain = picture[y - edge : y - edge + tile, MARGIN : MARGIN + tile].copy()  # top of the tile: one patch above
    assert plain[edge + 5, edge + 5].tolist() == [grey] * 3
    assert plain[3 * edge + 5, edge + 5].tolist() == [0] * 3  # air
    legend = (picture[: y - edge] == EXPERT_COLOURS[2]).all(-1)
    assert legend.sum() == 24 * 23


def test_tinting_leaves_other_patches_alone():
    tile = np.random.default_rng(0).integers(0, 256, (30, 30), dtype=np.uint8)
    experts = np.array([[0, -1, 7], [-1, 8, -1], [1, 2, 3]], dtype=np.int16)
    picture = tinted(tile, experts)
    for row in range(3):
        for column in range(3):
            place = np.s_[row * 10 : row * 10 + 10, column * 10 : column * 10 + 10]
            expected = np.repeat(tile[place][..., None], 3, axis=-1).astype(float)
            if (expert := experts[row, column]) >= 0:
                expected = (expected + EXPERT_COLOURS[expert % 8]) / 2
            assert np.abs(picture[place] - expected).max() <= 0.5


def test_bars_are_proportional():
    routing = {"task_probabilities": {"report": 0.5, "vqa": 0.25}, "task": "report", "slice_scores": [0.25, 0.75]}
    picture = draw_routing(a_volume(2), a_processor(), routing)
    lengths = rows_of(picture, BAR)
    assert 125 in lengths  # a quarter of 500 pixels
    assert 250 in rows_of(picture, YELLOW)
    tile = 392
    assert rows_of(picture, YELLOW)[-1] == 0
    yellow = np.asarray(picture)[:, MARGIN + tile + GAP : MARGIN + tile + GAP + tile] == YELLOW
    assert yellow.all(-1).sum(1).max() >= tile - 2  # the best slice has a full bar, less the line of the even share
    assert round(tile / 3) - 2 <= (np.asarray(picture)[:, MARGIN : MARGIN + tile] == BAR).all(-1).sum(1).max()


def test_slice_with_the_best_score_is_shown(written):
    routing = a_routing(64)
    routing["slice_scores"] = [0.01] * 64
    routing["slice_scores"][40] = 0.37
    draw_routing(a_volume(64), a_processor(), routing, columns=4)
    assert [text for text in written if text.startswith("slice ")] == [
        f"slice {index + 1}, {5 * index:+.1f} mm" for index in (0, 21, 40, 63)
    ]
    assert "score 37.0 %, highest" in written
    assert "even 1.6 %" in written


def test_says_what_it_is_and_of_which_layers_and_task(written):
    picture = draw_routing(a_volume(), a_processor(), a_routing(num_layers=5), title="A scan")
    lines = " ".join(written)
    assert "Routing, not evidence" in written
    assert "it does not show why the text says what it says." in lines
    assert "A scan" in written
    assert "50.0 %  taken" in written
    assert "MoE layers shown: 3, 7, 11 (the first, the middle and the last of 5)." in lines
    assert "Layer 7: experts of the task report" in written
    assert [written.count(f"layer {number}") for number in (3, 5, 7, 9, 11)] == [2] * 5  # both groups
    assert written.count("25.0 %") == 2 * 5 * 4
    assert "entropy (1.39)" in written
    assert picture.width <= 2200


VARIANTS = {
    "no scores": without(a_routing(), "slice_scores"),
    "no layers": {**without(a_routing(), "maps", "task"), "layers": []},
    "no tasks": {**without(a_routing(), "task"), "task_probabilities": None},
    "no task group": a_routing(task=None),
    "nothing but slices": {"task_probabilities": None, "slice_scores": None, "layers": []},
    "groups of one expert": {**a_routing(), "layers": [{"layer": 3}, {"layer": 5}], "maps": [{}, {}]},
    "one expert": a_routing(experts=1),
    "9 experts": a_routing(experts=9),
    "64 experts": a_routing(experts=64),
    "12 layers": a_routing(num_layers=12),
    "long names": {**a_routing(task="W" * 200), "task_probabilities": {"W" * 200: 1.0}},
    "one slice": a_routing(1),
    "64 slices": a_routing(64),
}
SAID = {
    "no scores": "does not score slices",
    "no layers": "no MoE layer",
    "no tasks": "no experts per task",
    "no task group": "no task group",
    "groups of one expert": "not routed patch by patch",
    "9 experts": "expert 8 has that of expert 0",
}


@pytest.mark.parametrize("columns", [1, 6, 20])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_model_is_drawn(written, name, columns):
    num_slices = len(VARIANTS[name].get("slice_positions_mm") or range(10))
    draw_routing(a_volume(num_slices), a_processor(), VARIANTS[name], columns=columns)
    assert SAID.get(name, "") in " ".join(written)


@pytest.mark.parametrize("size", [28, 112, 196, 448])
def test_slices_of_any_size_have_room_for_captions(written, size):
    routing = without(a_routing(), "layers", "maps")
    for columns in (6, 10):
        draw_routing(a_volume(), a_processor(size=size), routing, columns=columns)


def test_display_images_have_no_millimetres_and_no_sides(written):
    volume = Volume(np.full((10, 20, 20), 0.5, dtype=np.float32), (1.0, 1.0, 1.0))
    draw_routing(volume, a_processor(intensity="display"), a_routing())
    assert not {"R", "L", "A", "P", "feet", "head"} & set(written)
    assert "slice number" in written
    assert "slice 1" in written


def test_windows_of_the_head_show_the_brain(written):
    draw_routing(a_volume(), a_processor(windows="head"), a_routing())
    assert any(text.startswith("Window: brain") for text in written)


def test_routing_of_another_scan_is_refused():
    processor, routing = a_processor(), a_routing()
    with pytest.raises(ModelError, match="10 slices, but the scan has 11"):
        draw_routing(a_volume(11), processor, routing)
    with pytest.raises(ModelError, match="positions"):
        draw_routing(a_volume(), processor, {**routing, "slice_positions_mm": list(range(10))})
    with pytest.raises(ModelError, match=r"\(10, 4, 4\), but the scan has \(10, 2, 2\)"):
        draw_routing(a_volume(), a_processor(patch_size=28), routing)
    everywhere = np.zeros((10, 4, 4), dtype=np.int16)
    with pytest.raises(ModelError, match="40 routed patches are air"):
        draw_routing(a_volume(), processor, {**routing, "maps": [{"shared": everywhere}] * 2})


def test_layers_without_maps_and_scores_that_are_no_numbers_are_refused():
    with pytest.raises(ModelError, match=r'0 maps for 2 MoE layers\. Call the pipeline with return_routing="maps"'):
        draw_routing(a_volume(), a_processor(), without(a_routing(), "maps"))
    with pytest.raises(ModelError, match="no numbers"):
        draw_routing(a_volume(), a_processor(), {**a_routing(), "slice_scores": [float("nan")] * 10})


def test_saved_as_png_or_not_at_all(tmp_path):
    picture = draw_routing(a_volume(), a_processor(), a_routing(), tmp_path / "routing.png")
    saved = Image.open(tmp_path / "routing.png")
    assert saved.format == "PNG"
    assert np.array_equal(np.asarray(saved), np.asarray(picture))
    assert not saved.info
    with pytest.raises(VolumeError, match="cannot be written"):
        draw_routing(a_volume(), a_processor(), a_routing(), tmp_path / "missing" / "routing.png")
    assert [file.name for file in tmp_path.iterdir()] == ["routing.png"]


@pytest.mark.parametrize(("first", "apart"), [(4, 16), (8, 13)])
@pytest.mark.parametrize("sight", SIGHT)
def test_colours_differ_from_each_other_and_from_grey_for_the_colour_blind(sight, first, apart):
    for grey in range(0, 256, 15):
        blended = (np.array([*EXPERT_COLOURS[:first], [grey] * 3]) + grey) / 510
        linear = np.where(blended <= 0.04045, blended / 12.92, ((blended + 0.055) / 1.055) ** 2.4)
        seen = (linear @ np.array(SIGHT[sight]).T).clip(0, 1)
        to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
        xyz = seen @ np.array(to_xyz).T / [0.9505, 1, 1.089]
        f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        lab = np.stack([116 * f[:, 1], 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=-1)
        distances = np.linalg.norm(lab[:, None] - lab[None], axis=-1) + 1000 * np.eye(first + 1)
        assert distances.min() >= apart
