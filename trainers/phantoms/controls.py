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
"""Controls of the phantom benchmark: what a model should fail at, or must turn around, when its scan is changed.

- `blind`: air in place of the scan.
- `other_scan`: the scan of another patient.
- `shuffled_slices`: the same slices in another order.
- `single_slice`: one slab alone, the one that shows most of what is asked about.
- `flipped`: left and right exchanged; the side in the answer must change (`flipped_answer`).

Each is a `change` for `answer_rows`.
"""

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ct_moe import Volume


Change = Callable[[dict[str, np.ndarray], dict[str, Any]], dict[str, np.ndarray]]


def blind(image_processor) -> Change:
    """As many slabs, of air, as `image_processor` shows it; the patch mask says that there is no tissue."""
    nothing = -1024 if image_processor.intensity == "hu" else 0
    air = Volume(np.full((1, 16, 16), nothing, dtype=np.float32), (image_processor.slab_mm, 25.0, 25.0))
    values = image_processor.process_volume(air)["pixel_values"][:, :, :1, :1]

    def change(scan: dict[str, np.ndarray], row: dict[str, Any]) -> dict[str, np.ndarray]:
        return {
            **scan,
            "pixel_values": np.broadcast_to(values, scan["pixel_values"].shape).copy(),
            "patch_mask": np.zeros_like(scan["patch_mask"]),
        }

    return change


def other_scan(read: Callable[[str], dict[str, np.ndarray]], rows: Sequence[dict], folder: Path, seed: int) -> Change:
    """The next scan in a random circle through all scans of the rows: nobody keeps their own."""
    names = sorted({row["images"] for row in rows})
    order = np.random.default_rng(seed).permutation(len(names))
    following = {names[a]: names[b] for a, b in zip(order, np.roll(order, 1))}
    return lambda scan, row: read(str(folder / following[row["images"]]))


def shuffled_slices(scan: dict[str, np.ndarray], row: dict[str, Any]) -> dict[str, np.ndarray]:
    """Positions stay, slabs change places, in an order that is always the same for a scan of this name."""
    order = np.random.default_rng(zlib.crc32(str(row["images"]).encode())).permutation(len(scan["pixel_values"]))
    return {**scan, "pixel_values": scan["pixel_values"][order], "patch_mask": scan["patch_mask"][order]}


def single_slice(labels: dict[str, dict]) -> Change:
    """The slab with most of the finding that the question names or, without one, of all findings; else the middle one.

    Chosen with the truth at hand: no rule for choosing one slice does better on average.

    Args:
        labels: `Phantom.labels()` by `images`.
    """

    def change(scan: dict[str, np.ndarray], row: dict[str, Any]) -> dict[str, np.ndarray]:
        slab = best_slab(labels[row["images"]], row["template"], len(scan["pixel_values"]))
        part = {name: scan[name][slab : slab + 1] for name in ("pixel_values", "slice_mask", "patch_mask")}
        return {**scan, **part, "slice_positions": scan["slice_positions"][:1]}

    return change


def best_slab(labels: dict, template: str, count: int) -> int:
    """Index of the slab, of so many, with most mm2 of what a question template asks about."""
    named = [finding for finding in labels["findings"] if finding["name"] in template] or labels["findings"]
    areas = np.sum([lesion["slice_areas"] for finding in named for lesion in finding["lesions"]] or [[0]], axis=0)
    if not areas.any():
        return count // 2
    # Slabs cut slices: the area up to each border, interpolated, tells what lies between two of them.
    sums = np.interp(np.linspace(0, len(areas), count + 1), np.arange(len(areas) + 1), [0, *np.cumsum(areas)])
    return int(np.argmax(np.diff(sums).round(6)))


def flipped(scan: dict[str, np.ndarray], row: dict[str, Any]) -> dict[str, np.ndarray]:
    """Left and right exchanged."""
    return {name: values[..., ::-1].copy() if name in _IMAGES else values for name, values in scan.items()}


def flipped_answer(answer: str) -> str | None:
    """The answer that a flipped scan must give; `None` for an answer without side, or one that has no mirror image.

    There is no left middle lobe, and the liver is drawn on the right.
    """
    words = answer.split()
    if "middle" in words or "liver" in words or not {"left", "right"} & set(words):
        return None
    return " ".join({"left": "right", "right": "left"}.get(word, word) for word in words)


_IMAGES = ("pixel_values", "patch_mask")
CONTROL_NAMES = ("blind", "other_scan", "shuffled_slices", "single_slice")
