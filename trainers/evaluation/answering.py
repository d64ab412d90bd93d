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
"""What a model says to rows of a data set: `answer_rows`."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import BatchFeature

from ct_moe.hub.reusable_states import reusable_states, starts_from_prefix

from ..collator import CTMoEDataCollator
from ..native_bfloat16 import has_native_bfloat16
from ..volume_cache import VolumeCache


MAX_NEW_TOKENS = {"report": 256, "vqa_closed": 16, "vqa_open": 32}


@dataclass
class Answer:
    """One answer.

    Attributes:
        text: what the model wrote.
        task: index of the expert group that the prompt chose; `None` for a model without task groups.
    """

    text: str
    task: int | None


def answer_rows(
    model,
    processor,
    rows: Sequence[dict[str, Any]],
    *,
    folder: str | Path = ".",
    volume_cache: VolumeCache | None = None,
    change: Callable[[dict[str, np.ndarray], dict[str, Any]], dict[str, np.ndarray]] | None = None,
    task: Callable[[dict[str, Any]], str | None] | None = None,
    batch_size: int = 16,
    max_new_tokens: dict[str, int] | None = None,
    bf16: bool | None = None,
    progress: bool = True,
) -> list[Answer]:
    """Answer every row greedily; the prompt alone chooses the task, as for any user.

    Args:
        model: a `CTMoEForConditionalGeneration`.
        processor: its processor.
        rows: dicts with `images` (one path), `prompt` (text) and `task`.
        folder: where relative paths start.
        volume_cache: processed scans.
        change: what is done to a processed scan before the model sees it: (arrays, row) -> arrays. For controls.
        task: name of the task to force for a row, or `None`.
        batch_size: rows that go through the model together.
        max_new_tokens: by task.
        bf16: arithmetic in bfloat16, weights as they are; by default where `has_native_bfloat16`.
        progress: whether to show a bar.

    Returns:
        An [`Answer`] per row, in order.
    """
    bf16 = has_native_bfloat16(model.device) if bf16 is None else bf16
    limits = {**MAX_NEW_TOKENS, **(max_new_tokens or {})}
    collator = CTMoEDataCollator(processor, volume_cache=volume_cache)
    read = lru_cache(maxsize=4)(collator.process)  # many questions are about one scan
    answers: list[Answer | None] = [None] * len(rows)
    # Rows of one task together, since the longest answer of a batch keeps the others waiting; questions of a scan too.
    order = sorted(range(len(rows)), key=lambda i: (rows[i]["task"], rows[i]["images"]))
    bar = tqdm(total=len(rows), desc="answers", unit="row", disable=not progress)
    was_training = model.training
    model.eval()
    start = 0
    try:
        while start < len(order):
            kind = rows[order[start]]["task"]
            chosen = [i for i in order[start : start + batch_size] if rows[i]["task"] == kind]
            batch = [rows[i] for i in chosen]
            scans = [read(str(Path(folder) / row["images"])) for row in batch]
            if change is not None:
                scans = [change(scan, row) for scan, row in zip(scans, batch)]
            forced = None if task is None else [task(row) for row in batch]
            asked = [
                {"images": [scan], "prompt": [{"role": "user", "content": row["prompt"]}]}
                for row, scan in zip(batch, scans)
            ]
            for i, answer in zip(chosen, generate_answers(model, collator, asked, limits[kind], forced, bf16)):
                answers[i] = answer
            start += len(chosen)
            bar.update(len(chosen))
    finally:
        bar.close()
        model.train(was_training)
    return answers


@torch.inference_mode()
def generate_answers(
    model,
    collator: CTMoEDataCollator,
    rows: Sequence[dict[str, Any]],
    max_new_tokens: int,
    tasks: list[str | None] | None = None,
    bf16: bool = False,
) -> list[Answer]:
    """Answer rows together, greedily.

    Args:
        model: a `CTMoEForConditionalGeneration`.
        collator: with its processor.
        rows: `images` (processed scans; one that several rows share is encoded once up to the experts) and `prompt`
            (messages).
        max_new_tokens: of all of them.
        tasks: names of tasks to force, or `None`.
        bf16: arithmetic in bfloat16, weights as they are.
    """
    inputs = BatchFeature(collator.encode_prompts(list(rows), tasks)).to(model.device)
    text = {name: inputs.pop(name) for name in ("input_ids", "attention_mask")}
    chosen = None
    with torch.autocast(model.device.type, torch.bfloat16) if bf16 else nullcontext():
        if inputs:
            features = _encode(model, inputs, [scan for row in rows for scan in row["images"]])
            chosen = None if features.routing is None else features.routing.task_index
        given = {"mm_encoder_outputs": {"image": features}} if inputs else {}
        generated = model.generate(**text, **given, max_new_tokens=max_new_tokens, do_sample=False)
    texts = collator.processor.batch_decode(generated[:, text["input_ids"].shape[1] :], skip_special_tokens=True)
    # Of a row with several scans the first one's group: all have the same guide.
    first = np.cumsum([0, *(len(row["images"]) for row in rows)])
    return [
        Answer(text, int(chosen[first[i]]) if chosen is not None and rows[i]["images"] else None)
        for i, text in enumerate(texts)
    ]


def _encode(model, inputs: dict[str, torch.Tensor], scans: Sequence[dict[str, np.ndarray]]):
    """Visual features for every row of `inputs`, of which each scan goes once through what no prompt steers."""
    ids = [id(scan) for scan in scans]
    distinct = list(dict.fromkeys(ids))
    if len(distinct) == len(ids) or not starts_from_prefix(model.config):
        return model.get_image_features(**inputs, return_dict=True)
    first_rows = [ids.index(scan) for scan in distinct]
    once = {name: values[first_rows] for name, values in inputs.items()}
    kept = reusable_states(model.get_image_features(**once, output_prefix_hidden_states=True, return_dict=True))
    of_row = [distinct.index(scan) for scan in ids]
    again = {
        name: states[:, of_row] if name == "moe_hidden_states" else states[of_row] for name, states in kept.items()
    }
    return model.get_image_features(**{**inputs, "pixel_values": None}, **again, return_dict=True)
