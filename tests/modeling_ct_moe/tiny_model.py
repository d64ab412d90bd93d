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
"""A tiny CT-MoE and its inputs. Its experts are not zero, so that every part of it shows in the output."""

import torch
from transformers import Phi3Config

from ct_moe.configuration_ct_moe import CTMoEConfig
from ct_moe.modeling_ct_moe import CTMoEForConditionalGeneration


IMAGE_TOKEN = 5
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
    "guide_size": 12,
    "moe_intermediate_size": 8,
    "volume_layers": [1, 2, 3],
    "moe_layers": [2, 3],
}
VOLUME_INPUTS = (
    "pixel_values",
    "slice_mask",
    "slice_positions",
    "patch_mask",
    "volume_scale",
    "guide_input_ids",
    "guide_attention_mask",
    "task_ids",
)
SLICE_INPUTS = ("pixel_values", "slice_mask", "slice_positions", "patch_mask")


def tiny_config(vision: dict | None = None, **kwargs) -> CTMoEConfig:
    text_config = Phi3Config(
        vocab_size=99,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    kwargs = {"image_token_id": IMAGE_TOKEN, "pool": (2, 2, 2), **kwargs}
    return CTMoEConfig(vision_config={**VISION, **(vision or {})}, text_config=text_config, **kwargs)


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Moves every parameter off its initial value, as training would, the zero-initialised ones above all."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.25
    return model


def tiny_model(vision: dict | None = None, **kwargs) -> CTMoEForConditionalGeneration:
    """In eval mode, with trained-looking parameters."""
    torch.manual_seed(0)
    return randomise(CTMoEForConditionalGeneration(tiny_config(vision, **kwargs))).eval()


def volume_inputs(config: CTMoEConfig, slices: list[int], seed: int = 0, air: float = 0.3) -> dict[str, torch.Tensor]:
    """One row per volume of `slices` real slices at uneven millimetres, with a share of air patches and a guide."""
    generator = torch.Generator().manual_seed(seed)
    vision = config.vision_config
    volumes, most, grid, size = len(slices), max(slices), vision.grid_size, vision.image_size
    gaps = torch.randint(2_000, 90_000, (volumes, most), generator=generator)
    gaps[:, 0] = 0
    guide_lengths = torch.randint(2, 7, (volumes,), generator=generator)
    return {
        "pixel_values": torch.randn(volumes, most, 3, size, size, generator=generator),
        "slice_mask": torch.arange(most) < torch.tensor(slices)[:, None],
        "slice_positions": gaps.cumsum(dim=1).int(),
        "patch_mask": torch.rand(volumes, most, grid, grid, generator=generator) >= air,
        "volume_scale": torch.randn(volumes, 2, generator=generator),
        "guide_input_ids": torch.randint(10, 99, (volumes, 6), generator=generator),
        "guide_attention_mask": (torch.arange(6) < guide_lengths[:, None]).long(),
    }


def prompt_inputs(config: CTMoEConfig, rows: list[list[int]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Left-padded prompts; a row lists the slices of its volumes, and an empty one has none."""
    generator = torch.Generator().manual_seed(seed)
    prompts = []
    for volumes in rows:
        words = torch.randint(10, 99, (3 + len(volumes),), generator=generator).tolist()
        for number, slices in enumerate(volumes):
            words = [*words, *[IMAGE_TOKEN] * config.num_visual_tokens(slices), 11 + number]
        prompts.append([*words, *torch.randint(10, 99, (4,), generator=generator).tolist()])
    longest = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts]),
        "attention_mask": torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
    }


def one_volume(inputs: dict[str, torch.Tensor], volume: int) -> dict[str, torch.Tensor]:
    """That volume as a batch of one, its padded slices cut off."""
    slices = int(inputs["slice_mask"][volume].sum())
    row = {name: inputs[name][volume : volume + 1] for name in VOLUME_INPUTS if name in inputs}
    return {name: value[:, :slices] if name in SLICE_INPUTS else value for name, value in row.items()}
