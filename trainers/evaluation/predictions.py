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
"""Answers of a model to the items of a data set, kept as they come: `predict`.

Answers go to a JSONL file batch by batch. A run that was killed goes on with the batches that are missing, and several
processes share them. Batches are made of the whole list before any is answered, so that neither changes what a row
is answered together with: the texts are the same.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from ct_moe import CTMoEError, DataError

from ..collator import CTMoEDataCollator
from ..data_sets.item import Item
from ..volume_cache import VolumeCache
from .answering import generate_answers


MAX_NEW_TOKENS = {"report": 512, "vqa_closed": 32, "vqa_open": 64}


@dataclass
class Prediction:
    """What was said to one item.

    Attributes:
        id: of the item.
        text: `None` where a scan could not be read.
        group: name of the expert group that the prompt chose, if the model has some.
        error: why there is no text.
    """

    id: str
    text: str | None
    group: str | None = None
    error: str | None = None


def predict(
    model,
    processor,
    items: Sequence[Item],
    file: str | Path,
    *,
    about: dict[str, Any],
    change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] | None = None,
    batch_size: int = 8,
    max_new_tokens: dict[str, int] | None = None,
    volume_cache: VolumeCache | None = None,
    bf16: bool = False,
    progress: bool = True,
) -> list[Prediction]:
    """Answer all items greedily; the task is left to the prompt, as for any user.

    Args:
        model, processor: of CT-MoE.
        items: what to answer.
        file: JSONL to write, or to go on with.
        about: what the answers depend on (model, data set, settings): an existing file must be about the same.
        change: what is done to a processed scan before the model sees it. For controls.
        batch_size: items that go through the model together.
        max_new_tokens: by task.
        volume_cache: processed scans.
        bf16: arithmetic in bfloat16, weights as they are.
        progress: whether to show a bar.

    Returns:
        A [`Prediction`] per item, in order, in every process.

    Raises:
        DataError: the file is about something else, or was changed.
    """
    file, state = Path(file), PartialState(cpu=not torch.cuda.is_available())
    limits = {**MAX_NEW_TOKENS, **(max_new_tokens or {})}
    batches = _batches(items, batch_size)
    # Not of the scans' folders: they may be moved.
    asked = hashlib.sha256(json.dumps([[item.id, item.prompt] for item in items]).encode()).hexdigest()
    header = {"about": about, "items": len(items), "asked": asked, "batch_size": batch_size, "max_new_tokens": limits}
    done = _read_parts(file, header)
    state.wait_for_everyone()  # nobody writes before everybody has read
    left = [batch for batch in batches if not all(items[i].id in done for i in batch)]
    mine = left[state.process_index :: state.num_processes]
    part = file.with_name(f"{file.name}.part-{state.process_index}")
    collator = CTMoEDataCollator(processor, volume_cache=volume_cache)
    answered = len(items) - sum(map(len, left))
    if mine:
        model.eval()
        with (
            part.open("a", encoding="utf-8") as out,
            tqdm(
                total=len(items),
                initial=answered,
                desc="answers",
                unit="row",
                disable=not (progress and state.is_main_process),
            ) as bar,
        ):
            if not out.tell():
                out.write(json.dumps(header) + "\n")
            for batch in mine:
                rows = [items[i] for i in batch]
                said = _answer(model, collator, rows, limits[rows[0].task], change, bf16)
                # One write, so that a batch is there or is not.
                out.write("".join(json.dumps(vars(prediction)) + "\n" for prediction in said))
                out.flush()
                bar.update(min(len(rows) * state.num_processes, bar.total - bar.n))
    state.wait_for_everyone()
    done = _read_parts(file, header)
    if missing := [item.id for item in items if item.id not in done]:
        raise DataError(str(file), f"lacks {len(missing)} answers, the first of {missing[0]}", "Run it again")
    state.wait_for_everyone()
    if state.is_main_process:
        lines = [json.dumps(header), *(json.dumps(vars(done[item.id])) for item in items)]
        whole = file.with_name(f"{file.name}.whole")
        whole.write_text("\n".join(lines) + "\n", encoding="utf-8")
        os.replace(whole, file)
        for part in _parts(file):
            part.unlink()
    state.wait_for_everyone()
    return [done[item.id] for item in items]


def _batches(items: Sequence[Item], batch_size: int) -> list[list[int]]:
    """Indices: one task per batch, since its longest answer keeps the others waiting; questions of a scan together."""
    order = sorted(range(len(items)), key=lambda i: (items[i].task, items[i].images, items[i].id))
    batches: list[list[int]] = []
    for i in order:
        if not batches or len(batches[-1]) == batch_size or items[batches[-1][0]].task != items[i].task:
            batches.append([])
        batches[-1].append(i)
    return batches


def _parts(file: Path) -> list[Path]:
    return sorted(file.parent.glob(f"{file.name}.part-*"))


def _read_parts(file: Path, header: dict[str, Any]) -> dict[str, Prediction]:
    """Answers that are there, by id. A last line that was cut off when the process was killed is none."""
    found: dict[str, Prediction] = {}
    for part in [*([file] if file.exists() else []), *_parts(file)]:
        content = part.read_text(encoding="utf-8")
        lines = content.split("\n")
        whole, rest = lines[:-1], lines[-1]
        if rest:  # the cut line must not become one with what is appended
            part.write_text("".join(line + "\n" for line in whole), encoding="utf-8")
        if not whole:
            continue
        try:
            first, *records = map(json.loads, whole)
            if first != json.loads(json.dumps(header)):
                other = [name for name in header if not isinstance(first, dict) or first.get(name) != header[name]]
                finding = f"holds answers of another run (other {', '.join(other)})"
                raise DataError(str(part), finding, "Name another --out, or remove it")
            found.update({record["id"]: Prediction(**record) for record in records})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(str(part), "is no file of answers", "Name another --out, or remove it") from error
    return found


def _answer(model, collator: CTMoEDataCollator, items: list[Item], limit: int, change, bf16: bool) -> list[Prediction]:
    failed: dict[str, str] = {}
    rows = []
    for item in items:
        prompt = item.prompt if isinstance(item.prompt, list) else [{"role": "user", "content": item.prompt}]
        try:
            images = [collator.process(image) for image in item.images]
        except (CTMoEError, OSError) as error:
            failed[item.id] = str(error)
            continue
        images = images if change is None else [change(image) for image in images]
        rows.append({"images": images, "prompt": prompt, "id": item.id})
    answers = generate_answers(model, collator, rows, limit, bf16=bf16) if rows else []
    groups = {None: None, **dict(enumerate(model.config.tasks))}
    said = {
        row["id"]: Prediction(row["id"], answer.text.strip(), groups[answer.task])
        for row, answer in zip(rows, answers)
    }
    return [said.get(item.id) or Prediction(item.id, None, None, failed[item.id]) for item in items]
