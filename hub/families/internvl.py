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
"""InternVL: InternViT with layer scale, pixel shuffle, and a Qwen language model."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, InternVLConfig

from .family import Family, Rule, one_feature_layer


def _read_config(folder: Path, raw: dict[str, Any]) -> InternVLConfig:
    """The published configs do not say whether the head is tied, and the library takes that for a tie. They mean what
    their language model's config says: Qwen2 with a head of its own."""
    config = AutoConfig.from_pretrained(folder)
    if "tie_word_embeddings" not in raw:
        config.tie_word_embeddings = config.text_config.tie_word_embeddings
    return config


INTERNVL = Family(
    model_type="internvl",
    name="InternVL",
    towers=("internvl_vision",),
    text_types=("qwen2", "qwen3", "llama"),
    settings=lambda config: {
        "projector_hidden_act": config.projector_hidden_act,
        "projector_norm": "layer_norm",
        "merge_size": round(1 / config.downsample_ratio),
        "merge_mode": "stack",
    },
    vision=lambda config: {
        "feature_layer": config.vision_feature_layer,
        # The last layernorm follows the last layer only.
        "post_layernorm": config.vision_feature_layer == -1 and not config.vision_config.use_mean_pooling,
    },
    rules=[
        Rule(r"(?:model\.)?multi_modal_projector\.layer_norm\.(.+)", r"model.multi_modal_projector.norm.\1"),
        Rule(r"(?:model\.)?multi_modal_projector\.(linear_[12]\..+)", r"model.multi_modal_projector.\1"),
    ],
    refuse=lambda raw: one_feature_layer(raw, -1, ("default",), "default"),
    read_config=_read_config,
    image_text=lambda token: ((token, "<image>"), f"<img>{token}</img>"),
    image_tokens=("<IMG_CONTEXT>",),
    special="2 x 2 patches stacked to one token",
    checkpoints=("OpenGVLab/InternVL3-1B-hf", "OpenGVLab/InternVL3-2B-hf", "OpenGVLab/InternVL3-8B-hf"),
)
