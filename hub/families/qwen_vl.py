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
"""Qwen2.5-VL and Qwen3-VL: rotary positions in the plane, 2 x 2 patches merged, positions of three axes in the text.

Their towers take pictures of any size. A CT slice has one size, `IMAGE_SIZE` unless another is asked for, and every
slice is a picture of its own: the temporal patch sees it twice, as the base does with a still image.
"""

from typing import Any

import torch
from transformers import PreTrainedConfig

from .family import Family, Rule


IMAGE_SIZE = 448  # pixels: whole windows of 112, and whole pairs of patches of 14 and of 16
_TEXT_RULES = (
    Rule(r"lm_head\.weight", "lm_head.weight"),
    Rule(r"model\.language_model\.(.+)", r"model.language_model.\1"),
    Rule(r"model\.((?:embed_tokens|layers|norm)\..+)", r"model.language_model.\1"),
)


def _settings(config: PreTrainedConfig) -> dict[str, Any]:
    vision = config.vision_config
    return {
        "projector_hidden_act": "gelu",
        "projector_hidden_size": vision.hidden_size * vision.spatial_merge_size**2,
        "merge_size": vision.spatial_merge_size,
        "merge_mode": "stack",
        "position_axes": 3,
    }


def _base_inputs(pixels: torch.Tensor, input_ids: torch.Tensor, config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """A slice as the base's processor cuts it: a row per patch, the patches of a merged token side by side."""
    vision = config.vision_config
    patch, merge, frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    side = pixels.shape[-1] // patch
    cut = pixels[0].reshape(-1, side // merge, merge, patch, side // merge, merge, patch)
    cut = cut.permute(1, 4, 2, 5, 0, 3, 6).flatten(0, 3)  # (patches, channels, patch, patch)
    return {
        "pixel_values": cut.unsqueeze(2).expand(-1, -1, frames, -1, -1).flatten(1),
        "image_grid_thw": torch.tensor([[1, side, side]]),
        "mm_token_type_ids": (input_ids == config.image_token_id).int(),
    }


QWEN2_5_VL = Family(
    model_type="qwen2_5_vl",
    name="Qwen2.5-VL",
    towers=("qwen2_5_vl", "qwen2_5_vl_vision"),
    text_types=("qwen2_5_vl_text",),
    settings=_settings,
    vision=lambda config: {"feature_layer": -1, "post_layernorm": True},
    rules=[
        Rule(r"(?:model\.)?visual\.merger\.mlp\.0\.(.+)", r"model.multi_modal_projector.linear_1.\1"),
        Rule(r"(?:model\.)?visual\.merger\.mlp\.2\.(.+)", r"model.multi_modal_projector.linear_2.\1"),
    ],
    text_rules=_TEXT_RULES,
    tower_prefix=r"(?:model\.)?visual\.",
    image_tokens=("<|image_pad|>",),
    image_size=IMAGE_SIZE,
    base_inputs=_base_inputs,
    special="windows in most layers of the tower, which span the slices in its volume layers",
    checkpoints=("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"),
)

QWEN3_VL = Family(
    model_type="qwen3_vl",
    name="Qwen3-VL",
    towers=("qwen3_vl", "qwen3_vl_vision"),
    text_types=("qwen3_vl_text",),
    settings=_settings,
    vision=lambda config: {"feature_layer": -1, "post_layernorm": True},
    rules=[
        Rule(r"(?:model\.)?visual\.merger\.linear_fc([12])\.(.+)", r"model.multi_modal_projector.linear_\1.\2"),
        Rule(
            r"(?:model\.)?visual\.deepstack_merger_list\.(\d+)\.norm\.(.+)",
            r"model.deepstack_projectors.\1.norm.\2",
        ),
        Rule(
            r"(?:model\.)?visual\.deepstack_merger_list\.(\d+)\.linear_fc([12])\.(.+)",
            r"model.deepstack_projectors.\1.linear_\2.\3",
        ),
    ],
    text_rules=_TEXT_RULES,
    tower_prefix=r"(?:model\.)?visual\.",
    image_tokens=("<|image_pad|>",),
    image_size=IMAGE_SIZE,
    base_inputs=_base_inputs,
    special="the first layers of the language model read earlier layers of the tower as well",
    checkpoints=("Qwen/Qwen3-VL-2B-Instruct", "Qwen/Qwen3-VL-4B-Instruct", "Qwen/Qwen3-VL-8B-Instruct"),
)
