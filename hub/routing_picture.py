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
"""A picture of where a scan went inside the model: task, slice scores, experts. Routing, not evidence."""

import math
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ct_moe.errors_ct_moe import ModelError
from ct_moe.image_processing_ct_moe import CTMoEImageProcessor

from .picture import (
    BACKGROUND,
    GAP,
    GREY,
    WHITE,
    YELLOW,
    evenly_chosen,
    grey_levels,
    mark_sides,
    save_png,
    side_letters,
    wrap,
)


# Orange, blue, light blue, red, cream, green, violet, plum. Blended into any grey, they stay at least 13 CIELAB units
# apart from each other and from that grey (the first four 16), for normal, deuteranopic and protanopic eyes.
EXPERT_COLOURS = (
    (230, 159, 0), (0, 51, 255), (86, 180, 233), (204, 0, 0), (255, 226, 140), (40, 160, 80), (106, 13, 173),
    (128, 38, 128),
)  # fmt: skip
TINT = 0.5  # share of the expert's colour in a tinted pixel; the rest is the slice
MARGIN, MIN_WIDTH, MAX_WIDTH = 20, 1400, 2200  # pixels
MIN_TILE, MAX_TILE = 190, 400  # room for a caption comes first: many columns make the picture wider than MAX_WIDTH
DARK, TRACK, BAR = (20, 20, 20), (62, 62, 70), (150, 170, 190)
TEXT, SMALL = (ImageFont.load_default(size=size) for size in (21, 18))

NOT_EVIDENCE = (
    "This picture shows which parts of the network processed which parts of the scan; it does not show why the text "
    "says what it says."
)
TASK_WORDS = (
    "Guessed from the words of the request alone, not from the scan. The caller can also set the task, as is done for "
    "reports; then the guess decides nothing."
)
EXPERT_WORDS = (
    "The network cuts a slice into square patches. In a mixture-of-experts (MoE) layer, a router sends each patch to "
    "one or a few of several small networks, the experts; the tint names the expert it preferred. Patches without a "
    "tint are air (nothing above -900 HU) and go nowhere. An expert has no medical meaning by itself, and every row "
    "has its own: expert 0 of one row has nothing in common with expert 0 of another."
)
LOAD_WORDS = (
    "Load: share of the routed tokens (patches, and one class token per slice if the model has them) that an expert "
    "got. Entropy: how undecided the router was, from 0 (sure) to the number in brackets (all experts alike). "
    "Agreement: how much of its choice a patch shares with the patch at the same place in the next slice; 1 where all "
    "slices are routed alike."
)
UNUSED = {"shared": "no patch of this scan was routed", "task": "no task group was used for this scan"}


def draw_routing(
    scan,
    image_processor: CTMoEImageProcessor,
    routing: dict,
    out: str | os.PathLike | None = None,
    columns: int = 6,
    title: str = "",
) -> Image.Image:
    """Draws what `routing` says of a scan, over the slices that the model saw.

    From top to bottom: what the picture is not; task probabilities; slices with their scores, and the scores of all
    slices; which expert each patch preferred, in up to three MoE layers (first, middle, last); the load of every
    expert in all of them. What a model does not have is said in words. Slices with more pixels than there is room for
    are reduced.

    Args:
        scan: a `Volume`, or anything `load_volume` takes.
        image_processor: the model's; its slices are those that `routing` speaks of.
        routing: `result["routing"]` of the pipeline, called with `return_routing="maps"`.
        out: where to save the picture as PNG. Nothing is left there if that fails.
        columns: how many slices to show; all of them if the scan has fewer. The slice with the best score is one.
        title: a line under the banner. The file name is not put there: it may hold a patient's name.

    Raises:
        ModelError: `routing` has layers without maps, or cannot be of this scan and this image processor.
        VolumeError: the scan cannot be loaded, or the picture cannot be written.
    """
    volume = image_processor.fetch_images(scan)
    inputs = image_processor(volume)
    _check(routing, inputs)
    num_slices, in_hu = inputs["pixel_values"].shape[1], image_processor.intensity == "hu"
    shown = _shown_slices(num_slices, columns, routing.get("slice_scores"))
    # Display images never had millimetres, directions or sides.
    positions_mm = inputs["slice_positions"][0].numpy() / 1000 if in_hu else None
    letters = side_letters(volume.affine) if in_hu else {}
    feet_to_head = in_hu and image_processor.reorient

    channel = _reading_channel(image_processor)
    tiles = _tiles(grey_levels(inputs["pixel_values"][0, shown].numpy(), image_processor)[:, channel])
    edge, layers, task = tiles.shape[-1], routing.get("layers") or [], routing.get("task")
    tables = [table for group in UNUSED for table in _load_tables(layers, group, task)]
    page = _Page(max([MIN_WIDTH, len(tiles) * (edge + GAP) + 2 * MARGIN, *(t.width + 2 * MARGIN for t in tables)]))

    _draw_banner(page, title)
    _draw_tasks(page, routing.get("task_probabilities"), task)
    page.heading(f"Slices: {len(shown)} of {num_slices}{', from feet to head' if feet_to_head else ''}")
    origin = "counted from the first slice" if in_hu else "unknown"
    page.words(f"Window: {image_processor.channel_names[channel]}. Millimetres are {origin}.")
    draw = page.canvas(28)
    for column, index in enumerate(shown):
        place = f"slice {index + 1}" + (f", {positions_mm[index]:+.1f} mm" if in_hu else "")
        draw.text((MARGIN + column * (edge + GAP) + edge / 2, 14), place, WHITE, SMALL, anchor="mm")
    page.tiles(_in_colour(tiles), letters)
    if routing.get("slice_scores") is None:
        page.words("This model does not score slices.")
    else:
        scores = np.array(routing["slice_scores"])
        _draw_scores(page, scores, shown, edge)
        _draw_all_scores(page, scores, shown, positions_mm, feet_to_head)

    page.heading("Experts: which one each part of a slice preferred")
    if layers:
        _draw_maps(page, tiles, shown, letters, routing)
    else:
        page.words("This model has no MoE layer: all parts of the scan were processed by the same network.")
    if tables:
        page.heading("Load of every expert, by MoE layer")
        page.words(LOAD_WORDS)
        page.flow(tables)
    picture = page.picture()
    if out is not None:
        save_png(picture, Path(out))
    return picture


def tinted(tile: np.ndarray, experts: np.ndarray) -> np.ndarray:
    """A grey slice (edge, edge) in colour (edge, edge, 3): tinted by `experts` (rows, columns), plain where -1."""
    rows, columns = (np.arange(len(tile)) * size // len(tile) for size in experts.shape)
    experts = experts[rows][:, columns]
    colours = np.array(EXPERT_COLOURS)[experts % len(EXPERT_COLOURS)]
    pixels = _in_colour(tile)
    return np.where(experts[..., None] < 0, pixels, np.rint((1 - TINT) * pixels + TINT * colours).astype(np.uint8))


class _Page:
    """Sections of one width, each an image of its own, stacked at the end: none can be drawn over another."""

    def __init__(self, width: int):
        self.width, self.sections = width, []

    def canvas(self, height: int, colour: tuple[int, int, int] = BACKGROUND) -> ImageDraw.ImageDraw:
        self.sections.append(Image.new("RGB", (self.width, height), colour))
        return ImageDraw.Draw(self.sections[-1])

    def heading(self, text: str) -> None:
        draw = self.canvas(64)
        draw.line((MARGIN, 14, self.width - MARGIN, 14), TRACK, 2)
        draw.text((MARGIN, 42), text, WHITE, ImageFont.load_default(size=28), anchor="lm")

    def words(self, text: str, colour: tuple[int, int, int] = GREY) -> None:
        lines = wrap(text, TEXT, self.width - 2 * MARGIN)
        draw = self.canvas(28 * len(lines) + 8)
        for index, line in enumerate(lines):
            draw.text((MARGIN, 28 * index + 16), line, colour, TEXT, anchor="lm")

    def tiles(self, tiles: np.ndarray, letters: dict[str, str]) -> None:
        """One row of tiles (columns, edge, edge, 3) uint8."""
        edge = tiles.shape[1]
        draw = self.canvas(edge + 6)
        for column, tile in enumerate(tiles):
            x = MARGIN + column * (edge + GAP)
            self.sections[-1].paste(Image.fromarray(tile), (x, 0))
            mark_sides(draw, x, 0, edge, letters, SMALL)

    def flow(self, images: list[Image.Image]) -> None:
        """Side by side, and on as many lines as they need."""
        x = self.width
        for image in images:
            if x + image.width > self.width - MARGIN:
                x = MARGIN
                self.canvas(max(other.height for other in images) + 8)
            self.sections[-1].paste(image, (x, 0))
            x += image.width + 40

    def picture(self) -> Image.Image:
        picture = Image.new("RGB", (self.width, sum(section.height for section in self.sections) + MARGIN), BACKGROUND)
        y = 0
        for section in self.sections:
            picture.paste(section, (0, y))
            y += section.height
        return picture


def _check(routing: dict, inputs) -> None:
    """Routing of another scan is drawn as easily as this one's, so whatever can tell them apart is compared."""
    remedy = "Pass the scan and the image processor that the routing was made with"
    positions_mm, patch_mask = inputs["slice_positions"][0].numpy() / 1000, inputs["patch_mask"][0].numpy()
    for name in ("slice_scores", "slice_positions_mm"):
        if routing.get(name) is not None and len(routing[name]) != len(positions_mm):
            finding = f"{len(routing[name])} slices, but the scan has {len(positions_mm)}"
            raise ModelError(f"routing[{name!r}]", finding, remedy)
    given_mm = routing.get("slice_positions_mm")
    if given_mm is not None and not np.allclose(given_mm, positions_mm, rtol=0, atol=0.01):
        raise ModelError("routing['slice_positions_mm']", "not the positions of the scan's slices", remedy)
    probabilities = (routing.get("task_probabilities") or {}).values()
    if not np.isfinite([*probabilities, *(routing.get("slice_scores") or [])]).all():
        raise ModelError("routing", "probabilities or scores that are no numbers", "Run the model in float32")

    layers, maps = routing.get("layers") or [], routing.get("maps") or []
    if len(maps) != len(layers):
        finding = f"{len(maps)} maps for {len(layers)} MoE layers"
        raise ModelError("routing['maps']", finding, 'Call the pipeline with return_routing="maps"')
    for layer, groups in zip(layers, maps):
        for experts in groups.values():
            name = f"routing['maps'] of layer {layer['layer']}"
            if experts.shape != patch_mask.shape:
                finding = f"(slices, rows, columns) = {experts.shape}, but the scan has {patch_mask.shape}"
                raise ModelError(name, finding, remedy)
            if in_air := int(((experts >= 0) & ~patch_mask).sum()):
                raise ModelError(name, f"{in_air} routed patches are air in this scan", remedy)


def _shown_slices(num_slices: int, columns: int, scores: list[float] | None) -> np.ndarray:
    """Evenly chosen, except that the slice with the best score takes the place of the one nearest to it."""
    shown = evenly_chosen(num_slices, columns)
    if scores is not None:
        best = int(np.argmax(scores))
        shown[np.abs(shown - best).argmin()] = best
    return shown


def _reading_channel(image_processor: CTMoEImageProcessor) -> int:
    """The window in which most organs can be told apart; the middle one where windows have no names."""
    if image_processor.intensity == "display":
        return 0
    names = image_processor.channel_names
    named = [index for start in ("soft tissue", "brain") for index, name in enumerate(names) if name.startswith(start)]
    return [*named, 1][0]


def _tiles(slices: np.ndarray) -> np.ndarray:
    """Slices (columns, pixels, pixels) uint8 enlarged by whole pixels, or reduced if they are too large."""
    count, pixels = slices.shape[:2]
    edge = min(MAX_TILE, max(MIN_TILE, (MAX_WIDTH - 2 * MARGIN) // count - GAP))
    if pixels <= edge:
        zoom = max(edge // pixels, -(-MIN_TILE // pixels))
        return slices.repeat(zoom, axis=1).repeat(zoom, axis=2)
    return np.stack([np.asarray(Image.fromarray(plane).resize((edge, edge))) for plane in slices])


def _in_colour(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=-1)


def _draw_banner(page: _Page, title: str) -> None:
    font = ImageFont.load_default(size=22)
    lines = wrap(NOT_EVIDENCE, font, page.width - 2 * MARGIN)
    draw = page.canvas(80 + 34 * len(lines), YELLOW)
    draw.text(
        (MARGIN, 40), "Routing, not evidence", DARK, ImageFont.load_default(size=46), anchor="lm", stroke_width=1
    )
    for index, line in enumerate(lines):
        draw.text((MARGIN, 86 + 34 * index), line, DARK, font, anchor="lm")
    page.canvas(8)
    if title:
        page.words(title, WHITE)


def _draw_tasks(page: _Page, probabilities: dict[str, float] | None, taken: str | None) -> None:
    page.heading("Task: which kind of request the network saw")
    if not probabilities:
        words = "No probabilities: the model has no experts per task, or was given no words to guess from."
        page.words(f"{words} Taken: {_cut(taken)}." if taken else words)
        return
    page.words(TASK_WORDS)
    draw = page.canvas(34 * len(probabilities))
    left = MARGIN + 20 + max(TEXT.getlength(_cut(name)) for name in probabilities)
    for row, (name, probability) in enumerate(probabilities.items()):
        y, colour = 34 * row + 17, YELLOW if name == taken else BAR
        draw.text((MARGIN, y), _cut(name), WHITE, TEXT, anchor="lm")
        _draw_bar(draw, left, y - 10, 500, 20, probability, colour)
        text = f"{_percent(probability)}{'  taken' if name == taken else ''}"
        draw.text((left + 515, y), text, YELLOW if name == taken else WHITE, TEXT, anchor="lm")


def _draw_scores(page: _Page, scores: np.ndarray, shown: np.ndarray, edge: int) -> None:
    """A bar under each slice that is shown."""
    top, even = scores.max(), 1 / len(scores)
    draw = page.canvas(50)
    for column, index in enumerate(shown):
        x, colour = MARGIN + column * (edge + GAP), YELLOW if scores[index] == top else BAR
        _draw_bar(draw, x, 4, edge, 14, scores[index] / top, colour)
        draw.line((x + edge * even / top, 2, x + edge * even / top, 19), WHITE, 2)
        text = f"score {_percent(scores[index])}{', highest' if scores[index] == top else ''}"
        draw.text((x + edge / 2, 35), text, YELLOW if scores[index] == top else WHITE, SMALL, anchor="mm")
    page.words(
        "Score: the share of this slice in the weighted mean of all slices that the language model reads beside the "
        f"3D features. A full bar is the highest score, the white line the even share (1 of {len(scores)}, "
        f"{_percent(even)}). Below: the scores of all slices, in yellow those shown above."
    )


def _draw_all_scores(
    page: _Page, scores: np.ndarray, shown: np.ndarray, positions_mm: np.ndarray | None, feet_to_head: bool
) -> None:
    """One column per slice along z over an axis, the even share as a dashed line, a mark at every slice shown."""
    draw = page.canvas(200)
    left, right, high, low = MARGIN + 80, page.width - MARGIN - 130, 32, 132
    step, scale, numbered = (right - left) / len(scores), (low - high) / scores.max(), 0.0
    for index, score in enumerate(scores):
        x, colour = left + index * step, YELLOW if index in shown else BAR
        draw.rectangle((round(x), round(low - score * scale), max(round(x), round(x + step) - 2), low), colour)
        if index in shown:
            middle, half = x + step / 2, SMALL.getlength(str(index + 1)) / 2
            draw.polygon([(middle - 5, high - 11), (middle + 5, high - 11), (middle, high - 4)], YELLOW)
            if middle - half > numbered:  # a close neighbour has its mark only
                draw.text((middle, high - 21), str(index + 1), YELLOW, SMALL, anchor="mm")
                numbered = middle + half + 6
    even = low - scale / len(scores)
    for x in range(left, right, 12):
        draw.line((x, even, x + 6, even), WHITE, 2)
    draw.text((right + 10, even), f"even {_percent(1 / len(scores))}", WHITE, SMALL, anchor="lm")
    draw.text((left - 10, high), _percent(scores.max()), GREY, SMALL, anchor="rm")
    draw.text((left - 10, low), "0 %", GREY, SMALL, anchor="rm")

    values = np.arange(1, len(scores) + 1) if positions_mm is None else positions_mm
    per_slice = values[1] - values[0] if len(values) > 1 else 1
    draw.line((left, low + 2, right, low + 2), GREY, 1)
    for tick in _ticks(values[0], values[-1]):
        x = left + ((tick - values[0]) / per_slice + 0.5) * step
        draw.line((x, low + 2, x, low + 8), GREY, 1)
        draw.text((x, low + 20), f"{tick:g}", GREY, SMALL, anchor="mm")
    name = "slice number" if positions_mm is None else "mm from the first slice"
    draw.text(((left + right) / 2, low + 46), name, GREY, SMALL, anchor="mm")
    if feet_to_head:
        draw.text((left, low + 46), "feet", GREY, SMALL, anchor="lm")
        draw.text((right, low + 46), "head", GREY, SMALL, anchor="rm")


def _draw_maps(page: _Page, tiles: np.ndarray, shown: np.ndarray, letters: dict[str, str], routing: dict) -> None:
    layers, maps = routing["layers"], routing["maps"]
    few = len(layers) <= 3
    chosen = range(len(layers)) if few else (0, len(layers) // 2, len(layers) - 1)
    numbers = ", ".join(str(layers[index]["layer"]) for index in chosen)
    which = "all there are" if few else f"the first, the middle and the last of {len(layers)}"
    page.words(EXPERT_WORDS)
    page.words(f"MoE layers shown: {numbers} ({which}). Layers and experts are counted from 0.")
    counts = [len(layer.get(f"{group}_load") or []) for layer in layers for group in UNUSED]
    _draw_legend(page, max(counts + [int(experts.max()) + 1 for groups in maps for experts in groups.values()]))
    routed = []
    for group, unused in UNUSED.items():
        of_group = [groups[group] for groups in maps if group in groups]
        if any((experts >= 0).any() for experts in of_group):
            routed.append(group)
        else:
            why = unused if of_group else "not routed patch by patch (one expert for all patches, or none)"
            page.words(f"{group.capitalize()} experts: {why}.", WHITE)
    for index in chosen:
        for group in routed:
            page.words(f"Layer {layers[index]['layer']}: {_group_name(group, routing.get('task'))}", WHITE)
            experts = maps[index][group][shown]
            page.tiles(np.stack([tinted(*pair) for pair in zip(tiles, experts)]), letters)


def _draw_legend(page: _Page, count: int) -> None:
    entries = []
    for index, colour in enumerate(EXPERT_COLOURS[:count]):
        text = f"expert {', '.join(map(str, range(index, count, len(EXPERT_COLOURS))))}"
        entries.append(Image.new("RGB", (math.ceil(TEXT.getlength(text)) + 34, 30), BACKGROUND))
        draw = ImageDraw.Draw(entries[-1])
        draw.rectangle((0, 4, 23, 26), colour)
        draw.text((33, 15), text, WHITE, TEXT, anchor="lm")
    page.flow(entries)
    if count > (first := len(EXPERT_COLOURS)):
        page.words(f"Colours repeat after {first} experts: expert {first} has that of expert 0, and so on.")


def _load_tables(layers: list[dict], group: str, task: str | None) -> list[Image.Image]:
    """Tables of at most 16 experts each; none for a group without routers, or that this scan did not use."""
    rows = [layer for layer in layers if any(layer.get(f"{group}_load") or [])]
    count = len(rows[0][f"{group}_load"]) if rows else 0
    title = f"{_group_name(group, task)}; even share {_percent(1 / max(1, count))}"
    return [_load_table(rows, group, title, range(start, min(start + 16, count))) for start in range(0, count, 16)]


def _load_table(rows: list[dict], group: str, title: str, experts: range) -> Image.Image:
    """Rows are layers, columns experts."""
    line, left, cell = 32, 90, 74
    right, most = left + len(experts) * cell + 12, math.log(len(rows[0][f"{group}_load"]))
    columns = {"entropy": (right, f"entropy ({most:.2f})"), "agreement": (right + 140, "agreement")}
    image = Image.new("RGB", (max(right + 240, math.ceil(TEXT.getlength(title))), line * (len(rows) + 2)), BACKGROUND)
    draw = ImageDraw.Draw(image)
    draw.text((0, 16), title, WHITE, TEXT, anchor="lm")
    for x, expert in zip(range(left, right, cell), experts):
        draw.rectangle((x + 14, line + 9, x + 28, line + 23), EXPERT_COLOURS[expert % len(EXPERT_COLOURS)])
        draw.text((x + 36, line + 16), str(expert), WHITE, SMALL, anchor="lm")
    for x, name in columns.values():
        draw.text((x, line + 16), name, GREY, SMALL, anchor="lm")
    for y, layer in zip(range(2 * line, image.height, line), rows):
        draw.text((0, y + 16), f"layer {layer['layer']}", WHITE, SMALL, anchor="lm")
        for x, expert in zip(range(left, right, cell), experts):
            load = layer[f"{group}_load"][expert]
            shade = tuple(round(dark + load * (light - dark)) for dark, light in zip(TRACK, WHITE))
            draw.rectangle((x, y, x + cell - 3, y + line - 3), shade)
            draw.text((x + cell / 2 - 1, y + 15), _percent(load), WHITE if load < 0.4 else DARK, SMALL, anchor="mm")
        for name, (x, _) in columns.items():
            value = layer.get(f"{group}_{name}")
            draw.text((x, y + 16), "-" if value is None else f"{value:.2f}", WHITE, SMALL, anchor="lm")
    return image


def _group_name(group: str, task: str | None) -> str:
    if group == "shared":
        return "shared experts, which serve every task"
    return f"experts of the task {_cut(task)}" if task else "experts of the task that was taken"


def _draw_bar(draw: ImageDraw.ImageDraw, x: float, y: float, width: int, height: int, share: float, colour) -> None:
    draw.rectangle((x, y, x + width - 1, y + height - 1), TRACK)
    if filled := round(width * share):
        draw.rectangle((x, y, x + filled - 1, y + height - 1), colour)


def _ticks(first: float, last: float) -> np.ndarray:
    """Round numbers, at most about ten of them, one or more apart."""
    rough = max(last - first, 10) / 10
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return np.arange(math.ceil(first / step), last / step + 1e-6) * step


def _cut(text: str) -> str:
    """Names are the user's and may be long."""
    return text if len(text) <= 32 else f"{text[:31]}…"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
