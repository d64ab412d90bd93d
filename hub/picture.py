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
"""A picture of what the model will see of a scan: the slices that the image processor makes, window by window.

`hub/routing_picture.py` draws with the same helpers: `evenly_chosen`, `grey_levels`, `side_letters`, `mark_sides`,
`wrap`, `save_png`.
"""

import math
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ct_moe.errors_ct_moe import VolumeError
from ct_moe.image_processing_ct_moe import CTMoEImageProcessor

from .whole_file import whole_file


MIN_TILE, GAP, MARGIN = 224, 2, 8  # pixels
BACKGROUND = (34, 34, 38)  # not black, so that the edges of a slice show
WHITE, GREY, YELLOW = (235, 235, 235), (175, 175, 175), (255, 210, 90)


def draw_slices(
    scan, image_processor: CTMoEImageProcessor, out: str | os.PathLike | None = None, columns: int = 6, title: str = ""
) -> Image.Image:
    """Draws a scan as the model will see it: pixel for pixel, one row per window, slices evenly chosen from all.

    Slices run from feet to head, as the model reads them. Letters at the edges are the patient's sides (radiological
    convention: patient right on the viewer's left).

    Args:
        scan: a `Volume`, or anything `load_volume` takes.
        image_processor: makes the slices; its settings decide windows, slabs and field of view.
        out: where to save the picture as PNG. Nothing is left there if that fails.
        columns: how many slices to show; all of them if the scan has fewer.
        title: first line of the picture. The file name is not put there: it may hold a patient's name.

    Raises:
        VolumeError: the scan cannot be loaded, or the picture cannot be written.
    """
    volume = image_processor.fetch_images(scan)
    inputs = image_processor(volume)
    slices = inputs["pixel_values"][0].numpy()  # (S, 3, height, width)
    shown = evenly_chosen(len(slices), columns)
    pixels = slices.shape[-1]

    tiles = grey_levels(slices[shown], image_processor)
    zoom = -(-MIN_TILE // pixels)  # whole pixels only: nothing is smoothed
    tiles = tiles.repeat(zoom, axis=2).repeat(zoom, axis=3)

    captions = [f"{index + 1} of {len(slices)}" for index in shown]
    row_titles, letters, field_mm = image_processor.channel_names, {}, None
    if image_processor.intensity == "hu":
        positions_mm = inputs["slice_positions"][0].numpy() / 1000
        captions = [f"{text}, {positions_mm[index]:+.1f} mm" for index, text in zip(shown, captions)]
        field_mm, slab_mm = np.exp(inputs["volume_scale"][0].numpy()) * (400, 5)
        letters = side_letters(volume.affine)
        summary = (
            f"Slabs: {len(slices)} of {slab_mm:.2f} mm, from {len(volume.hu)} slices of {volume.spacing[0]:.2f} mm. "
            f"Field of view {field_mm:.0f} x {field_mm:.0f} mm on {pixels} x {pixels} pixels. "
            f"{1 - inputs['patch_mask'].float().mean().item():.0%} of the patches are air."
        )
    else:
        tiles, row_titles = tiles[:, :1], row_titles[:1]  # the channels are equal
        summary = f"Slabs: {len(slices)}, from {len(volume.hu)} slices. Millimetres and orientation are unknown."
    picture = _compose(tiles, [title, summary] if title else [summary], captions, row_titles, letters, field_mm)
    if out is not None:
        save_png(picture, Path(out))
    return picture


def evenly_chosen(num_slices: int, columns: int) -> np.ndarray:
    """Indices of `columns` slices from the first to the last, or of all slices if there are fewer."""
    return np.unique(np.linspace(0, num_slices - 1, max(1, columns)).round().astype(int))


def grey_levels(slices: np.ndarray, image_processor: CTMoEImageProcessor) -> np.ndarray:
    """`pixel_values` of shape (..., 3, height, width) as uint8: from the lower to the upper edge of each window."""
    mean, std = (np.reshape(v, (3, 1, 1)) for v in (image_processor.image_mean, image_processor.image_std))
    return np.rint((slices * std + mean).clip(0, 1) * 255).astype(np.uint8)


def _compose(
    tiles: np.ndarray,
    header: list[str],
    captions: list[str],
    row_titles: list[str],
    letters: dict[str, str],
    field_mm: float | None,
) -> Image.Image:
    """Lays out tiles (columns, rows, edge, edge) uint8 under a header, column captions and row titles."""
    edge = tiles.shape[-1]
    width = 2 * MARGIN + tiles.shape[0] * (edge + GAP) - GAP
    font = ImageFont.load_default(size=edge // 18)
    line_height = 3 * (edge // 18) // 2
    header = [line for text in header for line in wrap(text, font, width - 2 * MARGIN)]
    top = MARGIN + line_height * (len(header) + 1)
    picture = Image.new("RGB", (width, top + tiles.shape[1] * (line_height + edge) + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(picture)

    for index, line in enumerate(header):
        draw.text((MARGIN, MARGIN + index * line_height), line, WHITE, font)
    for row, row_title in enumerate(row_titles):
        y = top + row * (line_height + edge)
        draw.text((MARGIN, y + line_height / 2), row_title, WHITE, font, anchor="lm")
        for column in range(tiles.shape[0]):
            x = MARGIN + column * (edge + GAP)
            picture.paste(Image.fromarray(tiles[column, row]), (x, y + line_height))
            mark_sides(draw, x, y + line_height, edge, letters, font)
            if row == 0:
                draw.text((x + edge / 2, top - line_height / 2), captions[column], GREY, font, anchor="mm")
        if field_mm:
            _mark_scale(draw, MARGIN + edge - 6, y + line_height + edge - 8, edge, field_mm, font)
    return picture


def mark_sides(draw: ImageDraw.ImageDraw, x: int, y: int, edge: int, letters: dict[str, str], font) -> None:
    """Writes `side_letters` inside the edges of a square slice whose top left corner is (x, y)."""
    places = {
        "left": (3, edge / 2),
        "right": (edge - 3, edge / 2),
        "top": (edge / 2, 3),
        "bottom": (edge / 2, edge - 3),
    }
    anchors = {"left": "lm", "right": "rm", "top": "ma", "bottom": "md"}
    for side, letter in letters.items():
        place = (x + places[side][0], y + places[side][1])
        draw.text(place, letter, YELLOW, font, anchor=anchors[side], stroke_width=2, stroke_fill="black")


def _mark_scale(draw: ImageDraw.ImageDraw, right: float, bottom: float, edge: int, field_mm: float, font) -> None:
    """A bar that ends at (right, bottom): 50 mm, or the power of ten that fits a small field."""
    length_mm = 50 if field_mm > 150 else 10 ** math.floor(math.log10(field_mm / 2))
    left = right - length_mm * edge / field_mm
    draw.rectangle((left - 1, bottom - 3, right + 1, bottom + 1), fill="black")
    draw.rectangle((left, bottom - 2, right, bottom), fill=YELLOW)
    middle = ((left + right) / 2, bottom - 6)
    draw.text(middle, f"{length_mm:g} mm", YELLOW, font, anchor="md", stroke_width=2, stroke_fill="black")


def side_letters(affine: np.ndarray) -> dict[str, str]:
    """The patient's side at each edge of a slice, from the affine, so that native planes get their own."""
    letters = {}
    for axis, (before, after) in enumerate((("left", "right"), ("top", "bottom"))):
        direction = affine[:3, axis]
        main = int(np.abs(direction).argmax())
        sides = ("RL", "AP", "FH")[main]  # towards negative and positive LPS
        letters[before], letters[after] = sides if direction[main] > 0 else sides[::-1]
    return letters


def wrap(text: str, font, width: int) -> list[str]:
    """Lines of at most `width` pixels, broken at spaces."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def save_png(picture: Image.Image, out: Path) -> None:
    """Writes all of the file or, with a `VolumeError`, nothing."""
    try:
        with whole_file(out) as part:
            picture.save(part, format="PNG", optimize=True)
    except OSError as error:
        raise VolumeError(
            str(out), f"cannot be written ({error.strerror})", "Choose a file in a folder that exists"
        ) from error
