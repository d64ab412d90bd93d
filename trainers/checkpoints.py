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
"""Runs that can be cut off at any moment: whole checkpoints, and a checkpoint when the machine asks for its place.

- `last_checkpoint`: the newest checkpoint that was written to its end.
- `mark_complete`: says so of one.
- `SaveOnSignal`: on SIGTERM the step is finished, saved and the run ends.
"""

import os
import re
import shutil
import signal
import threading
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


_COMPLETE = "checkpoint_is_complete"


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, None if there is none.

    A checkpoint is many files, and a run may be killed between any two of them.
    """
    checkpoints = {
        int(match[1]): path
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)) and (path / _COMPLETE).is_file()
    }
    return checkpoints[max(checkpoints)] if checkpoints else None


def mark_complete(checkpoint: str | Path, complete: bool = True) -> None:
    """Say that every process has written all of its files of a checkpoint, or that they are being written anew."""
    if complete:
        (Path(checkpoint) / _COMPLETE).touch()
    else:
        (Path(checkpoint) / _COMPLETE).unlink(missing_ok=True)


def remove_incomplete(output_dir: str | Path) -> None:
    """Remove checkpoints that were cut off while they were written: nothing can use them."""
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if path.is_dir() and not (path / _COMPLETE).is_file():
            shutil.rmtree(path)


class SaveOnSignal(TrainerCallback):
    """Ends the run with a checkpoint after the step in which any of its processes got SIGTERM.

    The library's own `enable_jit_checkpoint` may save between backward pass and optimizer step, where the random state
    is that of a step which will be done again: the resumed run would differ.
    """

    def __init__(self, accelerator):
        self.accelerator = accelerator
        self.ended_early = False  # the run, by all of its processes
        self._received = False
        self._previous = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.ended_early = self._received = False
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._process = os.getpid()
            self._previous = signal.signal(signal.SIGTERM, self._handle)

    def on_step_end(self, args, state, control, **kwargs):
        received = torch.tensor(int(self._received), device=self.accelerator.device)
        received = bool(self.accelerator.reduce(received, "sum").item())
        if received and state.global_step < state.max_steps:
            self.ended_early = control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        return control

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.ended_early:  # saved already, and there is no time for more
            control.should_save = control.should_evaluate = False
        return control

    def restore(self) -> None:
        """Give the signal back to whom it belonged."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None

    def _handle(self, number, frame):
        if os.getpid() == self._process:  # and not a DataLoader worker, which was forked with this handler
            self._received = True
