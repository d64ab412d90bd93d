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
"""Answers of any system in a file, line by line: `read_predictions`, then `texts_of` a data set, or `own_items`.

A line that cannot be used is a `BadRow`: it is reported and counted, and the others are scored.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ct_moe import DataError

from ..data_sets.files import read_table
from ..data_sets.item import BadRow, Item
from ..data_sets.own import are_choices


Line = tuple[int, dict[str, Any]]


def read_predictions(file: Path) -> tuple[list[Line], list[BadRow]]:
    """Lines with `prediction` (those of `predict` call it `text`); and those without, or with an id that was there.

    Raises:
        DataError: the file cannot be read, or no line can be used.
    """
    found: list[Line] = []
    bad: list[BadRow] = []
    lines: dict[str, int] = {}
    for line, row in read_table(file):
        if isinstance(row, dict) and "about" in row and "asked" in row:  # the first line of what `predict` writes
            continue
        finding = row if isinstance(row, str) else _unusable(row)
        if finding is None and row.get("id") is not None:
            first = lines.setdefault(str(row["id"]), line)
            finding = None if first == line else f"its id is that of line {first}"
        if finding is None:
            found.append((line, {**row, "prediction": row.get("prediction", row.get("text"))}))
        else:
            bad.append(BadRow(str(file), line, finding))
    if not found:
        raise _nothing_left(file, bad)
    return found, bad


def texts_of(
    items: Sequence[Item], known: set[str], found: Sequence[Line], bad: Sequence[BadRow], file: Path
) -> tuple[list[str | None], list[int]]:
    """The text for every item, `None` where its line may be a bad one; and the lines of ids that nobody asked for.

    Args:
        items: what is scored.
        known: ids of the whole split, of which `items` may be a part.
        found, bad: from `read_predictions`.
        file: for errors.

    Raises:
        DataError: more items have no line than lines are bad: they were never predicted.
    """
    by_id = {str(row["id"]): row["prediction"] for _, row in found if row.get("id") is not None}
    missing = [item.id for item in items if item.id not in by_id]
    if len(missing) > len(bad) or len(missing) == len(items):
        finding = f"{len(missing)} of {len(items)} rows have no prediction, the first is {missing[0]}"
        raise DataError(str(file), finding, "Predict them: ct-moe check --items lists all; an empty text is wrong")
    unknown = [line for line, row in found if str(row.get("id")) not in known]
    return [by_id.get(item.id) for item in items], unknown


def own_items(found: Sequence[Line], bad: list[BadRow], file: Path) -> tuple[list[Item], list[str | None]]:
    """What lines with `reference` or `choices` and `answer` ask, and their texts. Others are added to `bad`."""
    items, texts = [], []
    for line, row in found:
        item = _own_item(file, line, row)
        if isinstance(item, str):
            bad.append(BadRow(str(file), line, item))
        else:
            items.append(item)
            texts.append(row["prediction"])
    if not items:
        raise _nothing_left(file, bad)
    return items, texts


def _unusable(row: dict[str, Any]) -> str | None:
    if "prediction" not in row and "text" not in row:
        return "no prediction"
    text = row.get("prediction", row.get("text"))
    return None if text is None or isinstance(text, str) else "a prediction that is no text"


def _own_item(file: Path, line: int, row: dict[str, Any]) -> Item | str:
    choices, answer, reference = row.get("choices"), row.get("answer"), row.get("reference")
    if isinstance(choices, str):
        choices = [part.strip() for part in choices.split("|")] if choices else None
    if choices is not None and (not are_choices(choices) or answer not in choices):
        return "no two to four choices with the answer"
    reference = reference or answer
    if not isinstance(reference, str) or not reference.strip():
        return "no reference"
    task = str(row.get("task") or ("vqa_closed" if choices else "vqa_open"))
    return Item(
        id=str(line if row.get("id") is None else row["id"]),
        images=[],
        prompt="",
        completion=reference,
        task=task,
        kind=str(row.get("kind") or task),
        patient=str(next((row[key] for key in ("patient", "id") if row.get(key) is not None), line)),
        where=(str(file), line),
        answer=answer if choices else None,
        choices=choices,
    )


def _nothing_left(file: Path, bad: Sequence[BadRow]) -> DataError:
    if not bad:
        return DataError(str(file), "holds no predictions", "Write one per line")
    finding = f"has no line that can be used, the first is {bad[0].line}: {bad[0].finding}"
    return DataError(str(file), finding, "Write id and prediction; without --data also reference")
