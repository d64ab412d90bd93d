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
"""The processes of an evaluation and what each of them does: `processes`, `share`."""

from collections.abc import Hashable, Sequence
from datetime import timedelta
from itertools import groupby

import torch
from accelerate import PartialState


# How long a process waits for the others, which may have hours of reports left: not the minutes of a training step.
_PATIENCE = timedelta(days=7)


def processes() -> PartialState:
    """The state of this process among those of a launcher; the first call sets up how they wait for each other."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)


def share(batches: Sequence[list[int]], groups: Sequence[Hashable], index: int, number: int) -> list[list[int]]:
    """The batches of process `index` of `number`: neighbours of one group together, the groups dealt in turn.

    Batches come sorted by task, and reports take far longer than answers: a piece in one would leave all of them to
    one process.

    Args:
        batches: of all processes.
        groups: what each is about; the next batch about the same scan finds it read.
        index, number: of the process, of all.
    """
    dealt = [[batches[i] for i in some] for _, some in groupby(range(len(batches)), key=groups.__getitem__)]
    return [batch for some in dealt[index::number] for batch in some]
