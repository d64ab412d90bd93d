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
import base64
import io

import numpy as np
from PIL import Image

from ct_moe import CTMoEImageProcessor
from ct_moe.hub.app import slices
from ct_moe.hub.app.slices import contact_sheet, marked, routing_data, routing_picture, slice_pictures


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


def test_every_slice_of_the_model_is_there_in_its_three_windows(reader, phantom_volume):
    shown = slice_pictures(phantom_volume, reader.image_processor)
    seen = reader.image_processor.process_volume(phantom_volume)
    assert len(shown["slices"]) == len(seen["pixel_values"]) == len(shown["positions"])
    assert shown["windows"] == ["lung C -600 W 1500 HU", "soft tissue C 40 W 400 HU", "bone C 480 W 2500 HU"]
    middle = [np.asarray(decoded(uri).convert("L"), float) for uri in shown["slices"][len(shown["slices"]) // 2]]
    assert {picture.shape for picture in middle} == {(384, 384)}
    # The same pictures as the model's own, which are coarser: compared in the middle, away from the marks.
    own = slices.grey_levels(seen["pixel_values"][len(shown["slices"]) // 2], reader.image_processor)
    for ours, theirs in zip(middle, own):
        small = np.asarray(Image.fromarray(ours.astype(np.uint8)).resize(theirs.shape[::-1]), float)
        inside = slice(len(small) // 4, -len(small) // 4)
        assert np.abs(small[inside, inside] - theirs[inside, inside]).mean() < 12


def test_display_images_have_one_window_and_no_millimetres(phantom_volume):
    volume = type(phantom_volume)(np.random.default_rng(0).random((6, 20, 20), np.float32), (1, 1, 1))
    processor = CTMoEImageProcessor(size=28, intensity="display")
    shown = slice_pictures(volume, processor)
    assert shown["windows"] == ["display"]
    assert {len(uris) for uris in shown["slices"]} == {1}
    assert (shown["positions"], shown["field_mm"], shown["slab_mm"]) == (None, None, None)


def test_the_mark_is_in_the_pixels_of_every_picture(reader, phantom_volume, read_scan, monkeypatch):
    routing = routed(reader, phantom_volume)

    def pictures() -> list[np.ndarray]:
        made = [
            decoded(slice_pictures(phantom_volume, reader.image_processor)["slices"][0][0]),
            decoded(routing_picture(read_scan, reader.image_processor, routing, reader.scope)),
            Image.open(io.BytesIO(contact_sheet(read_scan, reader.image_processor))),
        ]
        return [np.asarray(picture.convert("L"), float) for picture in made]

    with_mark = pictures()
    assert "machine-made, not a medical device" in slices.MARK
    monkeypatch.setattr(slices, "MARK", "")
    for marked_, plain in zip(with_mark, pictures()):
        changed = np.abs(marked_ - plain) > 60
        assert changed.sum() > 100
        assert changed[: len(changed) // 4].sum() < changed.sum()


def test_a_mark_stays_inside_a_small_picture():
    picture = np.asarray(marked(Image.new("L", (96, 96)), {"left": "R"}))
    assert picture[60:].max() > 100
    assert picture[:, -2:].max() < 100


def test_routing_names_its_layers_and_groups_and_holds_an_expert_per_patch(reader, phantom_volume):
    data = routing_data(routed(reader, phantom_volume))
    layer = reader.reporter.model.config.vision_config.moe_layers[0]
    assert [each["name"] for each in data["maps"]] == [f"layer {layer}, shared", f"layer {layer}, task report"]
    grid = np.array(data["maps"][0]["experts"])
    seen = reader.image_processor.process_volume(phantom_volume)
    assert grid.shape == seen["patch_mask"].shape
    assert ((grid >= 0) == seen["patch_mask"]).all()


def routed(reader, volume) -> dict:
    return reader.reporter(volume, return_routing="maps", max_new_tokens=1)["routing"]
