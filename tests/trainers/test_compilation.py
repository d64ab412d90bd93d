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
"""Training with `torch_compile`, in a process of its own and with nothing in the compiler's cache.

Compiled code has ended a process that ran other tests before, and one that found what others had compiled.
"""

import json

import pytest


@pytest.mark.slow
def test_compilation_changes_no_loss(run_stage, rows, tmp_path):
    # The same batch in both steps, so that nothing is compiled for other shapes: the second loss tells the gradients.
    rows = rows.to_list()[:2] * 2
    logs = {}
    for out in ("plain", "compiled"):
        extra = {"torch_compile": out == "compiled", "max_steps": 2, "even_tasks": False}
        extra |= {"train_sampling_strategy": "sequential", "train_language_model": "full"}
        code, output = run_stage(out, rows, 1, **extra)
        assert code == 0, output
        assert any((tmp_path / "compiled-code").rglob("*.so")) == (out == "compiled")
        logs[out] = json.loads((tmp_path / out / "training_report.json").read_text())["log"][:2]
    names = ("loss", "aux_loss", "task_loss")
    losses = [[log[name] for log in logs[out] for name in names] for out in ("plain", "compiled")]
    assert losses[0][0] != losses[0][3]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
