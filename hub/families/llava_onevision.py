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
"""LLaVA-OneVision: a SigLIP tower read at its last layer, and a learned token behind every image."""

import torch

from .family import Family, Rule, one_feature_layer
from .llava import PROJECTOR


LLAVA_ONEVISION = Family(
    model_type="llava_onevision",
    name="LLaVA-OneVision",
    towers=("siglip_vision_model",),
    text_types=("qwen2",),
    settings=lambda config: {
        "projector_hidden_act": config.projector_hidden_act,
        "multimodal_projector_bias": config.multimodal_projector_bias,
        "separators": "end",
    },
    vision=lambda config: {"feature_layer": config.vision_feature_layer},
    rules=[*PROJECTOR, Rule(r"(?:model\.)?image_newline", "model.end_token")],
    refuse=lambda raw: one_feature_layer(raw, -1, ("full",), "full"),
    # As one of several images: a single one would be cut into tiles and seen twice.
    base_inputs=lambda pixels, input_ids, config: {
        "pixel_values": pixels[:, None],
        "image_sizes": torch.tensor([pixels.shape[-2:]]),
        "batch_num_images": torch.tensor([2]),
    },
    special="a learned token ends a volume",
    checkpoints=("llava-hf/llava-onevision-qwen2-0.5b-ov-hf", "llava-hf/llava-onevision-qwen2-7b-ov-hf"),
)
