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
"""The README's table of bases, from what the families say of themselves and what their checkpoints come to."""

from collections.abc import Mapping

import torch

from ct_moe import CTMoEConfig, CTMoEForConditionalGeneration

from . import FAMILIES


NUM_SLICES = 32  # of the volume whose visual tokens are counted


def families_table(configs: Mapping[str, CTMoEConfig]) -> str:
    """Markdown, a row per checkpoint that a family names.

    Args:
        configs: checkpoint -> the config that its conversion has without any override.
    """
    counted = f"visual tokens of {NUM_SLICES} slices"
    rows = [
        f"| family | checkpoints known to fit | {counted} | weights in bfloat16 | special |",
        "|---|---|---|---|---|",
    ]
    for family in FAMILIES.values():
        name, special = family.name, family.special
        for checkpoint in family.checkpoints:
            config = configs[checkpoint]
            ids = " with ".join(f"`{part}`" for part in checkpoint.split(" with "))
            tokens, size = config.num_visual_tokens(NUM_SLICES), 2 * _num_parameters(config) / 1e9
            rows.append(f"| {name} | {ids} | {tokens:,} | {size:.1f} GB | {special} |")
            name = special = ""  # once for all of its checkpoints
    return "\n".join(rows) + "\n"


def _num_parameters(config: CTMoEConfig) -> int:
    """Of the converted model, with what the conversion adds; a tied head counts once."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in CTMoEForConditionalGeneration(config).parameters())
