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
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from ct_moe import CTMoEError, DataError

from ..collator import CTMoEDataCollator
from ..data_sets.item import Item
from ..volume_cache import VolumeCache
from .answering import generate_answers
from .processes import processes, share


MAX_NEW_TOKENS = {"report": 512, "vqa_closed": 32, "vqa_open": 256}  # other tasks: as open questions


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
    max_new_tokens: int | None = None,
    volume_cache: VolumeCache | None = None,
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
        max_new_tokens: longest answer; by default `MAX_NEW_TOKENS` by task.
        volume_cache: processed scans.
        progress: whether to show a bar.

    Returns:
        A [`Prediction`] per item, in order, in every process.

    Raises:
        DataError: the file is about something else, was changed, or another run is writing to it.
    """
    file, state = Path(file), processes()
    limits = MAX_NEW_TOKENS if max_new_tokens is None else dict.fromkeys(MAX_NEW_TOKENS, max_new_tokens)
    batches = _batches(items, batch_size)
    # Not of the scans' folders: they may be moved.
    asked = hashlib.sha256(json.dumps([[item.id, item.prompt] for item in items]).encode()).hexdigest()
    header = {"about": about, "items": len(items), "asked": asked, "batch_size": batch_size, "max_new_tokens": limits}
    with _sole_run(file, state):
        parts = _parts(file)
        done = _read(file, parts, header)
        state.wait_for_everyone()  # nobody writes before everybody has read
        left = [batch for batch in batches if not all(items[i].id in done for i in batch)]
        about_scan = [(items[batch[0]].task, items[batch[0]].images) for batch in left]
        if mine := share(left, about_scan, state.process_index, state.num_processes):
            # A new file each time: what was cut off in an old one stays as it is.
            part = file.with_name(f"{file.name}.part{max(map(_number, parts), default=0) + 1 + state.process_index}")
            answered = len(items) - sum(map(len, left))
            shown = progress and state.is_main_process
            with (
                part.open("x", encoding="utf-8") as out,
                tqdm(total=len(items), initial=answered, desc="answers", unit="row", disable=not shown) as bar,
            ):
                out.write(json.dumps(header) + "\n")
                for said in _answers(model, processor, items, mine, limits, change, volume_cache):
                    # One write, so that a batch is there or is not.
                    out.write("".join(json.dumps(vars(prediction)) + "\n" for prediction in said))
                    out.flush()
                    bar.update(min(len(said) * state.num_processes, bar.total - bar.n))
        state.wait_for_everyone()
        found = _read(file, _parts(file), header, with_errors=True)
        if missing := [item.id for item in items if item.id not in found]:
            raise DataError(str(file), f"lacks {len(missing)} answers, the first of {missing[0]}", "Run it again")
        state.wait_for_everyone()
        if state.is_main_process:
            lines = [json.dumps(header), *(json.dumps(vars(found[item.id])) for item in items)]
            whole = file.with_name(f"{file.name}.whole")
            whole.write_text("\n".join(lines) + "\n", encoding="utf-8")
            os.replace(whole, file)
            for part in _parts(file):
                part.unlink()
        state.wait_for_everyone()
    return [found[item.id] for item in items]


@contextmanager
def _sole_run(file: Path, state: PartialState) -> Iterator[None]:
    """Refuse a second run of the same file while one is under way. The system takes the lock of a killed one off."""
    if not state.is_main_process:
        yield
        return
    lock = FileLock(file.with_name(f"{file.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise DataError(str(file), "another run is writing to it", "Wait for it, or name another --out") from error
    try:
        yield
    finally:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


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
    name = re.compile(re.escape(file.name) + r"\.part(\d+)")
    return sorted((path for path in file.parent.iterdir() if name.fullmatch(path.name)), key=_number)


def _number(part: Path) -> int:
    return int(part.suffix.removeprefix(".part"))


def _read(
    file: Path, parts: Sequence[Path], header: dict[str, Any], with_errors: bool = False
) -> dict[str, Prediction]:
    """Answers that are there, by id. A last line that was cut off when the process was killed is none.

    A scan that could not be read may be there now: without `with_errors` it counts as not answered.
    """
    found: dict[str, Prediction] = {}
    for part in [*([file] if file.exists() else []), *parts]:
        *whole, _ = part.read_text(encoding="utf-8").split("\n")
        if not whole:
            continue
        try:
            first, *records = map(json.loads, whole)
            if first != json.loads(json.dumps(header)):
                other = [name for name in header if not isinstance(first, dict) or first.get(name) != header[name]]
                finding = f"holds answers of another run (other {', '.join(other)})"
                raise DataError(str(part), finding, "Name another --out, or remove it")
            for record in records:
                prediction = Prediction(**record)
                if prediction.text is not None or (with_errors and prediction.id not in found):
                    found[prediction.id] = prediction
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(str(part), "is no file of answers", "Name another --out, or remove it") from error
    return found


def _answers(model, processor, items, batches, limits, change, volume_cache) -> Iterator[list[Prediction]]:
    collator = CTMoEDataCollator(processor, volume_cache=volume_cache)
    read = lru_cache(maxsize=4)(collator.process)  # many questions are about one scan
    groups = {None: None, **dict(enumerate(model.config.tasks))}
    model.eval()
    for batch in batches:
        asked = [items[i] for i in batch]
        failed: dict[str, str] = {}
        rows = []
        for item in asked:
            prompt = item.prompt if isinstance(item.prompt, list) else [{"role": "user", "content": item.prompt}]
            try:
                images = [read(image) for image in item.images]
            except (CTMoEError, OSError) as error:
                failed[item.id] = _reason(error)
                continue
            images = images if change is None else [change(image) for image in images]
            rows.append({"images": images, "prompt": prompt, "id": item.id})
        limit = limits.get(asked[0].task, limits["vqa_open"])
        answers = generate_answers(model, collator, rows, limit) if rows else []
        said = {
            row["id"]: Prediction(row["id"], answer.text.strip(), groups[answer.task])
            for row, answer in zip(rows, answers)
        }
        yield [said.get(item.id) or Prediction(item.id, None, None, failed[item.id]) for item in asked]


def _reason(error: CTMoEError | OSError) -> str:
    """Without the folders of this machine, which answers and results are not to tell."""
    if isinstance(error, CTMoEError):
        return f"{Path(error.subject).name}: {error.finding}"
    return error.strerror or type(error).__name__
