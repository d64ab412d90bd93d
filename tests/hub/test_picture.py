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
"""The picture of what the model sees: its pixels, its layout, its sides."""

import numpy as np
import pytest
from PIL import Image

from ct_moe.errors_ct_moe import VolumeError
from ct_moe.hub.picture import GAP, MARGIN, MIN_TILE, draw_slices
from ct_moe.image_processing_ct_moe import CTMoEImageProcessor
from ct_moe.volume_ct_moe import Volume


def a_volume(**kwargs) -> Volume:
    """Bone in the front right quarter of soft tissue."""
    hu = np.full((10, 56, 56), 40, dtype=np.int16)
    hu[:, :28, :28] = 1000
    return Volume(hu, (5.0, 2.0, 2.0), **kwargs)


def texts_of(monkeypatch) -> list[str]:
    """What is written into the picture, without reading pixels."""
    from PIL import ImageDraw

    written, draw_text = [], ImageDraw.ImageDraw.text

    def text(self, place, words, *args, **kwargs):
        written.append(words)
        return draw_text(self, place, words, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return written


def test_pixels_are_the_models_own():
    processor = CTMoEImageProcessor(size=224, num_slices=10)
    picture = np.asarray(draw_slices(a_volume(), processor, columns=4))
    assert picture.shape[1] == 2 * MARGIN + 4 * 224 + 3 * GAP
    header = picture.shape[0] - MARGIN - 224  # the last row is the bone window, -770 to 1730 HU
    tile = picture[header : header + 224, MARGIN : MARGIN + 224]
    assert tile[60, 60].tolist() == [round(1770 / 2500 * 255)] * 3  # front right: top left
    assert tile[60, 170].tolist() == tile[150, 60].tolist() == [round(810 / 2500 * 255)] * 3


def test_small_slices_are_enlarged_by_whole_pixels():
    picture = draw_slices(a_volume(), CTMoEImageProcessor(size=28, num_slices=2))
    assert picture.width == 2 * MARGIN + 2 * MIN_TILE + GAP


def test_captions_say_position_window_and_slab(monkeypatch):
    written = texts_of(monkeypatch)
    draw_slices(a_volume(), CTMoEImageProcessor(size=224, num_slices=5), columns=3, title="A scan")
    lines = " ".join(written)
    assert "A scan" in written
    assert "Slabs: 5 of 10.00 mm, from 10 slices of 5.00 mm" in lines
    assert "Field of view 112 x 112 mm on 224 x 224 pixels" in lines
    assert "1 of 5, +0.0 mm" in written
    assert "3 of 5, +20.0 mm" in written
    assert "5 of 5, +40.0 mm" in written
    assert "lung C -600 W 1500 HU, mean" in written
    assert "10 mm" in written
    assert [written.count(letter) for letter in "RLAP"] == [9, 9, 9, 9]


def test_native_planes_have_their_own_sides(monkeypatch):
    written = texts_of(monkeypatch)
    coronal = np.eye(4)
    coronal[:3, :3] = [[-1, 0, 0], [0, 0, 1], [0, -1, 0]]  # x to the right, y to the feet, z to the back
    draw_slices(a_volume(affine=coronal), CTMoEImageProcessor(size=224, num_slices=1))
    places = [letter for letter in written if letter in list("RLAPFH")]
    assert places == ["L", "R", "H", "F"] * 3  # left, right, top, bottom


def test_display_images_have_one_row_and_no_sides(monkeypatch):
    written = texts_of(monkeypatch)
    volume = Volume(np.full((4, 20, 20), 0.5, dtype=np.float32), (1.0, 1.0, 1.0))
    draw_slices(volume, CTMoEImageProcessor(size=224, intensity="display"))
    assert not set("RLAP") & set(written)
    assert written.count("display, 0 to 1") == 1
    assert "Millimetres and orientation are unknown." in " ".join(written)


def test_saved_as_png_or_not_at_all(tmp_path, test_data):
    scan = str(test_data / "totalseg" / "example_ct_sm.nii.gz")
    picture = draw_slices(scan, CTMoEImageProcessor(size=112), tmp_path / "picture.png")
    saved = Image.open(tmp_path / "picture.png")
    assert saved.format == "PNG"
    assert np.array_equal(np.asarray(saved), np.asarray(picture))
    assert not saved.info  # no file name, no patient
    with pytest.raises(VolumeError, match="cannot be written"):
        draw_slices(scan, CTMoEImageProcessor(size=112), tmp_path / "missing" / "picture.png")
    assert [file.name for file in tmp_path.iterdir()] == ["picture.png"]
