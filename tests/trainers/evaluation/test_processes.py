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
"""Several processes: everyone gets as many reports, every batch is answered once, and nobody gives up waiting."""

import os
import subprocess
import sys
from itertools import pairwise

import pytest

from ct_moe.trainers.evaluation.processes import share


@pytest.mark.parametrize("number", [1, 2, 3])
def test_every_process_gets_reports_and_the_scans_of_its_own(number):
    # Sorted by task, as batches come: 12 reports, then answers, three batches about every scan.
    groups = [("report", i) for i in range(12)] + [("vqa_open", i // 3) for i in range(36)]
    batches = [[2 * i, 2 * i + 1] for i in range(len(groups))]
    shares = [share(batches, groups, index, number) for index in range(number)]
    assert sorted(batch for own in shares for batch in own) == batches
    of_batch = {tuple(batch): group for batch, group in zip(batches, groups)}
    for own in shares:
        found = [of_batch[tuple(batch)] for batch in own]
        assert sum(task == "report" for task, _ in found) == 12 // number
        assert sum(task == "vqa_open" for task, _ in found) == 36 // number
        # A scan is read once: its batches follow each other in one process.
        assert sum(a != b for a, b in pairwise(found)) == len(set(found)) - 1


def test_a_process_waits_longer_than_by_default(unused_tcp_port):
    code = (
        "import torch.distributed as dist\n"
        "from datetime import timedelta\n"
        "from ct_moe.trainers.evaluation.processes import processes\n"
        "assert processes().num_processes == 1\n"
        "backend = dist.group.WORLD._get_backend(processes().device)\n"
        "assert backend.options._timeout >= timedelta(days=1), backend.options._timeout\n"
    )
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    launched |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(unused_tcp_port), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], env={**os.environ, **launched}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
