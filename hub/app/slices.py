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
"""Pictures for the page: every slice in the model's windows, and what the experts and the slice scores say of it.

Every picture has its mark burned in: copied out of the page, it still says what it is.
"""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ct_moe.image_processing_ct_moe import CTMoEImageProcessor
from ct_moe.volume_ct_moe import Volume

from ..picture import GREY, evenly_chosen, grey_levels, mark_sides, side_letters, wrap
from ..routing_picture import EXPERT_COLOURS, draw_routing


MARK = "machine-made, not a medical device"
MIN_PIXELS, MAX_PIXELS = 384, 512


def slice_pictures(volume: Volume, image_processor: CTMoEImageProcessor) -> dict[str, Any]:
    """What the viewer of the page shows: the model's slices and windows, in the resolution of the scan.

    Returns:
        **windows**: a name per window; **slices**: per slice, from feet to head, a data URI per window; **positions**:
        mm from the first slice, `None` where millimetres are unknown; **field_mm**, **slab_mm**, likewise.
    """
    in_hu = image_processor.intensity == "hu"
    pixels = min(MAX_PIXELS, max(MIN_PIXELS, *volume.hu.shape[1:]))
    seen = image_processor.process_volume(volume, size=pixels, patch_size=pixels)
    letters = side_letters(volume.affine) if in_hu else {}
    windows = 3 if in_hu else 1  # the channels of display images are equal
    field_mm, slab_mm = (np.exp(seen["volume_scale"]) * (400, 5)).tolist() if in_hu else (None, None)
    return {
        "windows": [name.split(",")[0] for name in image_processor.channel_names[:windows]],
        "slices": [
            [
                _data_uri(marked(Image.fromarray(tile), letters))
                for tile in grey_levels(planes, image_processor)[:windows]
            ]
            for planes in seen["pixel_values"]
        ],
        "positions": (seen["slice_positions"] / 1000).tolist() if in_hu else None,
        "field_mm": field_mm,
        "slab_mm": slab_mm,
    }


def routing_data(routing: dict[str, Any]) -> dict[str, Any]:
    """What the viewer lays over the slices, from `result["routing"]` with maps.

    Returns:
        **scores**: one per slice, or `None`; **maps**: name and experts `[slice][row][column]`, -1 for none, per layer
        and group that routed anything; **colours**: of the experts, (red, green, blue).
    """
    maps = []
    for layer, groups in zip(routing["layers"], routing["maps"]):
        for group, experts in groups.items():
            if (experts >= 0).any():
                owner = "shared" if group == "shared" else f"task {routing['task']}"
                maps.append({"name": f"layer {layer['layer']}, {owner}", "experts": experts.tolist()})
    return {"scores": routing["slice_scores"], "maps": maps, "colours": EXPERT_COLOURS}


def routing_picture(scan, image_processor: CTMoEImageProcessor, routing: dict[str, Any], scope: str) -> str:
    """`draw_routing` with the mark and the model's scope, as a data URI."""
    picture = draw_routing(scan, image_processor, routing, title=f"Model trained for: {scope}")
    return _data_uri(marked(picture, {}), "PNG")


def contact_sheet(scan, image_processor: CTMoEImageProcessor, columns: int = 4, edge: int = 220) -> bytes:
    """JPEG of some slices, a row per window, as the model saw them; for a document."""
    slices = scan["pixel_values"]
    shown = evenly_chosen(len(slices), columns)
    in_hu = image_processor.intensity == "hu"
    letters = side_letters(scan.affine) if in_hu else {}
    tiles = grey_levels(slices[shown], image_processor)[:, : 3 if in_hu else 1]
    sheet = Image.new("RGB", (tiles.shape[0] * edge, tiles.shape[1] * edge))
    for column, windows in enumerate(tiles):
        for row, tile in enumerate(windows):
            picture = marked(Image.fromarray(tile).resize((edge, edge)), letters)
            sheet.paste(picture, (column * edge, row * edge))
    return _encoded(sheet, "JPEG")


def marked(picture: Image.Image, letters: dict[str, str]) -> Image.Image:
    """The picture in colour with the patient's sides and `MARK` in it."""
    picture = picture.convert("RGB")
    width, height = picture.size
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=max(9, min(width, 800) // 36))
    if letters:
        mark_sides(draw, 0, 0, width, letters, ImageFont.load_default(size=max(12, width // 24)))
    for number, line in enumerate(reversed(wrap(MARK, font, width - 8))):
        place = (4, height - 4 - number * (font.size + 3))
        draw.rectangle(draw.textbbox(place, line, font, anchor="ld"), "black")
        draw.text(place, line, GREY, font, anchor="ld")
    return picture


def _data_uri(picture: Image.Image, file_format: str = "JPEG") -> str:
    return f"data:image/{file_format.lower()};base64,{base64.b64encode(_encoded(picture, file_format)).decode()}"


def _encoded(picture: Image.Image, file_format: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, file_format, quality=88, optimize=file_format == "PNG")
    return file.getvalue()
