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
"""Evaluation by generation: the first rows of a data set are answered and compared with their targets."""

from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object


if TYPE_CHECKING:
    from .sft_trainer import CTMoESFTTrainer


def generate_and_compare(trainer: "CTMoESFTTrainer", dataset: Any) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Answer the first `generate_samples` rows greedily, the task left to the prompt as for any user.

    Rows whose scans cannot be read are left out. Processes share the rows.

    Returns:
        `exact_match` and `token_f1`, means over the rows, and a record per row: its name, its labelled task, the
        generated text and its scores. Targets stay where they are: in the data set.
    """
    args, accelerator = trainer.args, trainer.accelerator
    rows = list(islice(iter(dataset), args.generate_samples))
    processes, batch_size = accelerator.num_processes, args.per_device_eval_batch_size
    share = -(-len(rows) // processes)
    mine = rows[accelerator.process_index * share :][:share]
    # Where parameters are sharded every process must run every forward pass.
    sharded = trainer.is_fsdp_enabled or (trainer.is_deepspeed_enabled and args.deepspeed_plugin.zero_stage == 3)
    was_training = trainer.model.training
    trainer.model.eval()
    records = []
    for start in range(0, share, batch_size):
        records += _answer(trainer, mine[start : start + batch_size], synced=sharded)
    trainer.model.train(was_training)
    records = gather_object(records)
    scores = {}
    if records:
        scores = {name: sum(record[name] for record in records) / len(records) for name in ("exact_match", "token_f1")}
    return scores, records


def exact_match(text: str, target: str) -> float:
    """1 where two texts are the same but for white space."""
    return float(text.split() == target.split())


def token_f1(text: str, target: str) -> float:
    """Harmonic mean of precision and recall over words, lower case, order ignored (as in SQuAD)."""
    words, wanted = Counter(text.lower().split()), Counter(target.lower().split())
    common = (words & wanted).total()
    return 2 * common / (words.total() + wanted.total()) if common else float(words == wanted)


def _answer(trainer: "CTMoESFTTrainer", rows: list[dict[str, Any]], synced: bool) -> list[dict[str, Any]]:
    inputs, rows = trainer.data_collator.prompt_inputs(rows)
    if not rows and not synced:
        return []
    inputs = trainer._prepare_inputs(inputs)
    model = trainer.accelerator.unwrap_model(trainer.model)
    with torch.no_grad(), trainer.compute_loss_context_manager():
        generated = model.generate(
            **inputs, max_new_tokens=trainer.args.generate_max_new_tokens, do_sample=False, synced_gpus=synced
        )
    texts = trainer.processing_class.batch_decode(
        generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    records = []
    for row, text in zip(rows, texts):
        content = row["completion"][-1]["content"]
        target = content if isinstance(content, str) else "\n".join(block["text"] for block in content)
        records.append(
            {
                "row": row["name"],
                "task": row.get("task"),
                "generated": text,
                "exact_match": exact_match(text, target),
                "token_f1": token_f1(text, target),
            }
        )
    return records
