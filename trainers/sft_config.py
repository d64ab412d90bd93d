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
"""Settings of `CTMoESFTTrainer`: TRL's, with the defaults that volumes need, and a few of its own."""

import os
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import SFTConfig

from ct_moe import TrainingError

from .stages import TRAINABLE_PARTS


@dataclass
class CTMoESFTConfig(SFTConfig):
    r"""Settings of [`CTMoESFTTrainer`]; all others are [`~trl.SFTConfig`]'s.

    Parameters:
        > Parameters that control the model

        learning_rates (`dict[str, float]`, *optional*):
            Learning rates that differ from `learning_rate`, by part of the model as in `stages.TRAINABLE_PARTS`; the
            two groups of experts share one, that of `shared_group` or `task_groups`, whichever is trained.

        > Parameters that control the data

        on_error (`str`, *optional*, defaults to `"skip"`):
            What happens to a row whose scan cannot be read: `"skip"` leaves it out, counts it and lists it in
            `skipped_rows.jsonl` of the output folder; `"raise"` ends the run.
        max_failed_share (`float`, *optional*, defaults to 0.05):
            The run stops when more than this share of the rows seen could not be read, judged from the 100th row on
            (from the last one of a smaller data set).
        volume_cache (`str`, *optional*):
            Folder in which processed scans are kept, so that the next epoch does not read and resample them again. It
            holds the voxels of patients.
        volume_cache_gb (`float`, *optional*, defaults to 100):
            Most gigabytes it may take.

        > Parameters that control the training

        generate_samples (`int`, *optional*, defaults to 8):
            Rows of the evaluation set whose text is generated at every evaluation, and compared with the target. 0:
            none.
        generate_max_new_tokens (`int`, *optional*, defaults to 256):
            Longest text generated for them.

    > [!NOTE]
    > These parameters have default values different from [`~trl.SFTConfig`]: `max_length` is `None`, since cutting a
    > sequence would cut visual tokens; `remove_unused_columns` is `False`, since the task is a column;
    > `bf16` is `False` without an accelerator; `learning_rate` 1e-4, `lr_scheduler_type` cosine and `warmup_steps`
    > 0.03 (of all steps) are those of M3D-LaMed; `dataloader_num_workers` is 2.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "learning_rates"]

    learning_rate: float = 1e-4
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.03
    max_length: int | None = None
    remove_unused_columns: bool = False
    dataloader_num_workers: int = 2

    learning_rates: dict[str, float] | str | None = None
    on_error: Literal["skip", "raise"] = "skip"
    max_failed_share: float = 0.05
    volume_cache: str | None = None
    volume_cache_gb: float = 100.0
    generate_samples: int = 8
    generate_max_new_tokens: int = 256
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Off: a loss that is no number ends the run instead of being averaged away."}
    )

    @property
    def shards_parameters(self) -> bool:
        """Whether parameters are spread over processes (FSDP, ZeRO-3)."""
        # Not the library's is_fsdp_enabled, which also asks for fsdp_cpu_ram_efficient_loading.
        return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true") or is_deepspeed_zero3_enabled()

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and torch.accelerator.is_available()
        if self.disable_tqdm is None:
            self.disable_tqdm = False  # else the library's own verbosity would decide
        if self.dataloader_num_workers > 0:
            # A new worker would read every scan again to know its content in the cache. And workers forked at every
            # epoch beside the threads of DDP now and then never started.
            self.dataloader_persistent_workers = True
        super().__post_init__()
        for name, finding, remedy in self._unsupported():
            raise TrainingError(name, finding, remedy)

    def _unsupported(self):
        """What cannot work is refused when it is set, not when it is used."""
        if self.max_length is not None:
            yield "max_length", f"{self.max_length} could cut visual tokens", "Leave it at None"
        if self.remove_unused_columns:
            yield "remove_unused_columns", "True would drop the column of the task", "Leave it at False"
        if self.packing or self.padding_free:
            yield "packing, padding_free", "not possible with scans", "Leave them at False"
        if self.assistant_only_loss:
            yield (
                "assistant_only_loss",
                "needs rows in the messages form",
                "Use prompt and completion",
            )
        if self.label_smoothing_factor > 0:
            yield "label_smoothing_factor", "bypasses the routing losses", "Leave it at 0"
        if self.on_error not in ("skip", "raise"):
            yield "on_error", f"{self.on_error!r} is unknown", "Choose skip or raise"
        if not 0 <= self.max_failed_share <= 1:
            yield "max_failed_share", f"{self.max_failed_share} is no share", "Choose a number from 0 to 1"
        if self.generate_samples < 0 or self.generate_max_new_tokens < 1:
            yield "generate_samples, generate_max_new_tokens", "below 0 or below 1", "Choose more"
        if self.save_only_model:
            yield "save_only_model", "True, and a run could not go on as it was", "Leave it at False"
        if self.model_init_kwargs:
            yield "model_init_kwargs", "is read by no one", "Load the model yourself, or use dtype and quantization"
        if min(self.per_device_train_batch_size, self.gradient_accumulation_steps) < 1:
            yield "per_device_train_batch_size, gradient_accumulation_steps", "below 1", "Choose 1 or more"
        if not isinstance(self.learning_rates, dict | None):
            yield "learning_rates", f"{self.learning_rates!r}", "Give numbers by part, such as {projector: 2.0e-5}"
            return
        for part, rate in (self.learning_rates or {}).items():
            if part not in TRAINABLE_PARTS:
                yield "learning_rates", f"{part!r} is no part", f"Choose from {', '.join(TRAINABLE_PARTS)}"
            if not isinstance(rate, (int, float)) or rate < 0:
                yield "learning_rates", f"{part} has {rate!r}", "Give numbers from 0 on, such as 2.0e-5"


__all__ = ["CTMoESFTConfig"]
