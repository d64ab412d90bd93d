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
"""One stage in a process of its own, which may be told to die: python run_stage.py JSON.

Keys of the JSON: model, rows (file), out, stage (1 or 2), settings, die (`at`: step, save, signal, group; `step`).
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from ct_moe import CTMoEError
from ct_moe.trainers import Stage1Config, Stage2Config, load_rows, train_stage


class Die(TrainerCallback):
    def __init__(self, at: str, step: int):
        self.at, self.step = at, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and self.at in ("step", "signal"):
            os.kill(os.getpid(), signal.SIGKILL if self.at == "step" else signal.SIGTERM)
        if state.global_step == self.step and self.at == "group":
            # By another process, as a scheduler does: a worker that its parent signals ends as if it had been done.
            end = f"import os, signal; os.killpg({os.getpgrp()}, signal.SIGTERM)"
            subprocess.run([sys.executable, "-c", end], start_new_session=True, check=True)


def die_while_saving(step: int) -> None:
    """Killed after the weights and before the optimizer of a checkpoint are written."""
    from ct_moe.trainers import CTMoESFTTrainer

    save = CTMoESFTTrainer._save_optimizer_and_scheduler

    def killed(self, output_dir):
        if self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, output_dir)

    CTMoESFTTrainer._save_optimizer_and_scheduler = killed


def main() -> None:
    task = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    die = task.get("die")
    callbacks = [Die(**die)] if die else []
    if die and die["at"] == "group":
        os.setpgrp()  # a group of its own and its workers', without the test
    if die and die["at"] == "save":
        die_while_saving(die["step"])
    config = Stage1Config if task["stage"] == 1 else Stage2Config
    stage = config(**task["settings"])
    try:
        train_stage(task["model"], stage, load_rows(task["rows"]), Path(task["out"]), callbacks=callbacks)
    except CTMoEError as error:
        sys.exit(f"error: {error}")
    print(json.dumps({"processes": stage.world_size, "type": str(stage.distributed_state.distributed_type)}))


if __name__ == "__main__":
    main()
