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
"""What costs no understanding of a scan, to stand beside a model: `majority`, `nearest_reports`, `labels_to_template`.

The fourth baseline, the model itself shown air, is `phantoms.controls.blind` given to `predict`.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm.auto import tqdm

from ct_moe import CTMoEError, DataError

from ..data_sets.ct_rate import ABNORMALITIES
from ..data_sets.item import LETTERS, Item


_SIDE = 8  # pixels of a slab, for the look of a scan
_SLABS = 8


def majority(train: Iterable[Item], items: Sequence[Item]) -> list[str]:
    """The usual answer in training to questions of this type; of a closed question the usual one among its choices."""
    counts: dict[tuple[str, str], Counter] = {}
    for item in train:
        counts.setdefault((item.task, item.kind), Counter())[item.answer or item.completion] += 1
    # Of equally frequent ones the first in the alphabet, so that the order of rows does not matter.
    usual = {kind: min(seen, key=lambda text: (-seen[text], text)) for kind, seen in counts.items()}
    texts = []
    for item in items:
        kind = (item.task, item.kind)
        if item.choices is None:
            texts.append(usual.get(kind, ""))
            continue
        seen = counts.get(kind, Counter())
        shown = [choice for choice in item.choices if choice]
        best = max(shown, key=lambda choice: seen[choice])  # the first of those that are equal
        texts.append(f"{LETTERS[item.choices.index(best)]}. {best}")
    return texts


def nearest_reports(
    train: Iterable[Item],
    items: Sequence[Item],
    read: Callable[[str], dict[str, np.ndarray]],
    progress: bool = True,
) -> list[str | None]:
    """The training report of the scan that looks most alike: small pictures of eight slabs, by correlation.

    Args:
        train: items of which the reports with a scan count. Every one of them is read: give a volume cache.
        items: of which the reports with a scan are answered; others get `None`.
        read: path -> processed scan, with `pixel_values`.

    Raises:
        DataError: no training scan can be read.
    """
    reports = [item for item in train if item.task == "report" and item.images]
    asked = [item for item in items if item.task == "report" and item.images]
    paths = list(dict.fromkeys(item.images[0] for item in (*reports, *asked)))

    def look(path: str) -> np.ndarray | None:
        try:
            return _look(read(path)["pixel_values"])
        except (CTMoEError, OSError):
            return None

    with ThreadPoolExecutor(os.cpu_count()) as threads:  # reading and unpacking, which take the time, let others run
        found = threads.map(look, paths)
        looks = dict(zip(paths, tqdm(found, total=len(paths), desc="looks", unit="scan", disable=not progress)))
    reports = [item for item in reports if looks[item.images[0]] is not None]
    if not reports:
        raise DataError("training scans", "none can be read", "Leave out the baseline nearest, or run: ct-moe check")
    known = np.stack([looks[item.images[0]] for item in reports])
    texts: list[str | None] = []
    for item in items:
        own = looks.get(item.images[0]) if item.task == "report" and item.images else None
        texts.append(None if own is None else reports[int((known @ own).argmax())].completion)
    return texts


def labels_to_template(items: Sequence[Item], labels: dict[str, Sequence[int]]) -> list[str | None]:
    """A report that lists the labels and denies the others: what the labels alone are worth as a text."""
    texts: list[str | None] = []
    for item in items:
        values = labels.get(item.id) if item.task == "report" else None
        if values is None:
            texts.append(None)
            continue
        there = [name for name, value in zip(ABNORMALITIES, values) if value]
        absent = [name.lower() for name, value in zip(ABNORMALITIES, values) if not value]
        sentences = [f"{name} is seen." for name in there] + [f"No {name}." for name in absent]
        impression = f"{', '.join(there)}." if there else "No abnormality."
        texts.append(f"Findings: {' '.join(sentences)}\nImpression: {impression}")
    return texts


def _look(pixel_values: np.ndarray) -> np.ndarray:
    """`(slabs, channels, height, width)` to a vector of length one and mean zero."""
    slabs, _, height, width = pixel_values.shape
    picture = np.asarray(pixel_values, dtype=np.float32).mean(1)
    rows, columns = (np.linspace(0, size, _SIDE + 1).astype(int) for size in (height, width))
    small = np.add.reduceat(np.add.reduceat(picture, rows[:-1], 1), columns[:-1], 2)
    chosen = np.linspace(0, slabs - 1, _SLABS).round().astype(int)
    vector = small[chosen].ravel()
    vector = vector - vector.mean()
    return vector / max(float(np.linalg.norm(vector)), 1e-12)
