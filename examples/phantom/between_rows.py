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
"""The rows of the demo model's last stage: training rows in which questions between slices are asked more often.

Which way a lesion widens is asked of 1434 of 52,438 training rows. The visual tokens tell it, but the language model
needs to be asked far more often than that before it finds it there.
"""

import random
from collections.abc import Iterable
from typing import Any

from ct_moe.trainers.phantoms.texts import with_choices


# Of a closed template: how many times more it is asked of the same scan, with its choices in another order.
ASKED_AGAIN = {"growth": 2, "count": 1, "extent aneurysm": 1}
# Shares of the scans whose rows of a task are kept, so that nothing is forgotten. Closed: of scans without growth.
CLOSED, OPEN_WIDTHS, OPEN_OTHERS, REPORTS = 0.3, 0.22, 0.06, 0.09


def between_rows(rows: Iterable[dict[str, Any]], seed: int = 7) -> list[dict[str, Any]]:
    """Choose from the rows of `ct-moe phantom`, and ask again.

    Args:
        rows: lines of `train.jsonl`.
        seed: of the choice and the orders.

    Returns:
        All closed questions of the scans that are asked about growth, some more than once, and those of `CLOSED` of
        the others; open questions and reports of a part of the scans.
    """
    rng = random.Random(seed)
    scans: dict[str, list] = {}
    for row in rows:
        scans.setdefault(row["images"], []).append(row)
    chosen = []
    for of_scan in scans.values():
        closed, opened, reports = (
            [row for row in of_scan if row["task"] == task] for task in ("vqa_closed", "vqa_open", "report")
        )
        if any(row["template"].startswith("growth") for row in closed) or rng.random() < CLOSED:
            chosen += closed
            for row in closed:
                times = sum(number for name, number in ASKED_AGAIN.items() if row["template"].startswith(name))
                chosen += [in_another_order(row, rng) for _ in range(times)]
        widths = any("width" in row["template"] for row in opened)
        if rng.random() < (OPEN_WIDTHS if widths else OPEN_OTHERS):
            chosen += opened
        if rng.random() < REPORTS:
            chosen += reports
    return chosen


def in_another_order(row: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A closed question with its choices drawn in a new order, and the letter that the answer then has."""
    choices = rng.sample(row["choices"], len(row["choices"]))
    prompt, completion = with_choices(row["prompt"].partition(" Choices: ")[0], row["answer"], choices)
    return row | {"prompt": prompt, "completion": completion, "choices": choices}
