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
"""Several rows about the same scans as one: they share one pass of the scans through the vision encoder.

Most of the work of a step is visual, and data sets ask many questions of a scan. In a packed row every conversation
sees the scans and itself, none of the others (`segment_ids` of the model), so its loss is that of the row alone, save
that all are routed by the prompt of the first.
"""

import itertools
import json
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset
from torch.nn.utils.rnn import pad_sequence

from ct_moe import TrainingError

from .rows import ROW_FEATURES


_CONVERSATION = {name: ROW_FEATURES[name] for name in ("prompt", "completion", "row")}
PACKED_FEATURES = Features({**ROW_FEATURES, "packed": [_CONVERSATION]})


def pack_rows(
    rows: Dataset | IterableDataset, questions_per_scan: int, seed: int = 0, *, across_tasks: bool = False
) -> Dataset:
    """Join rows of one task about the same scans, at most `questions_per_scan` of them in one.

    Args:
        rows: from `load_rows`. Those without scans, and those whose system message differs, stay apart.
        questions_per_scan: 1 leaves all as they are.
        seed: of the order in which rows are taken together.
        across_tasks: join rows of different tasks too. A pack has the task of its first row, which is any of them.

    Returns:
        Rows with the column `packed` beside those of the first of each pack: what the others say.

    Raises:
        TrainingError: streamed rows, or scans inside the data set, whose paths are only names.
    """
    if questions_per_scan == 1:
        return rows
    for found, wrong in (
        ("streamed rows", isinstance(rows, IterableDataset)),
        ("scans inside the data set", rows.features["images"] != ROW_FEATURES["images"]),
    ):
        if wrong:
            raise TrainingError("questions_per_scan", f"{questions_per_scan}, with {found}", "Leave it at 1")
    table = rows.to_list()
    packs = defaultdict(list)
    for index in np.random.default_rng(seed).permutation(len(rows)).tolist():
        packs[_shared(table[index], index, across_tasks)].append(index)
    packs = [
        pack[i : i + questions_per_scan] for pack in packs.values() for i in range(0, len(pack), questions_per_scan)
    ]
    others = [[{name: table[index][name] for name in _CONVERSATION} for index in pack[1:]] for pack in packs]
    # In memory, as all rows are: no copy of them in a cache.
    first = rows.select([pack[0] for pack in packs]).flatten_indices(keep_in_memory=True)
    return first.add_column("packed", others, feature=PACKED_FEATURES["packed"])


def append_conversations(
    batch: dict[str, Any],
    conversations: list[list[tuple[list[int], list[int]]]],
    image_token_id: int,
    pad_token_id: int,
) -> dict[str, Any]:
    """Put further conversations behind those of a batch.

    Args:
        batch: with `input_ids`, `attention_mask` and `labels`, padded on the right.
        conversations: for every row the tokens of the prompt, from the last placeholder of a scan on, and of the
            answer, of each further conversation.
        image_token_id: of that placeholder.
        pad_token_id: for rows that are shorter than the longest.

    Returns:
        The batch with these, `position_ids` and `segment_ids`.
    """
    columns = {name: [] for name in ("input_ids", "attention_mask", "labels", "position_ids", "segment_ids")}
    for row, further in enumerate(conversations):
        length = int(batch["attention_mask"][row].sum())
        ids, labels = (batch[name][row, :length].tolist() for name in ("input_ids", "labels"))
        shared = length - ids[::-1].index(image_token_id) if further else 0
        positions, segments = list(range(length)), [0] * shared + [1] * (length - shared)
        for number, (asked, said) in enumerate(further, 2):
            ids += asked + said
            labels += [-100] * len(asked) + said
            positions += range(shared, shared + len(asked + said))
            segments += [number] * len(asked + said)
        for name, values in zip(columns, (ids, [1] * len(ids), labels, positions, segments)):
            columns[name].append(torch.tensor(values))
    padding = {"input_ids": pad_token_id, "labels": -100}
    return batch | {
        name: pad_sequence(values, batch_first=True, padding_value=padding.get(name, 0))
        for name, values in columns.items()
    }


def _shared(row: dict[str, Any], index: int, across_tasks: bool) -> str:
    """Equal for rows that may be packed together."""
    if not row["images"]:
        return str(index)
    system = list(itertools.takewhile(lambda message: message["role"] != "user", row["prompt"]))
    return json.dumps([row["images"], system, None if across_tasks else row["task"]])
