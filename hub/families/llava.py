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
"""LLaVA: a CLIP or SigLIP tower, a projector of two layers, and a causal language model."""

from collections.abc import Iterator
from typing import Any

from .family import Family, Rule, one_feature_layer


PROJECTOR = [Rule(r"(?:model\.)?multi_modal_projector\.(linear_[12]\..+)", r"model.multi_modal_projector.\1")]


def _refuse(raw: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    # CLIP has a class token that "default" leaves out; from SigLIP, which has none, that would take a patch.
    siglip = (raw.get("vision_config") or {}).get("model_type") == "siglip_vision_model"
    yield from one_feature_layer(raw, -2, ("full",) if siglip else ("default",), "default")


LLAVA = Family(
    model_type="llava",
    name="LLaVA",
    towers=("clip_vision_model", "siglip_vision_model"),
    text_types=("phi3", "llama", "mistral", "qwen2", "qwen3", "gemma"),
    settings=lambda config: {
        "projector_hidden_act": config.projector_hidden_act,
        "multimodal_projector_bias": config.multimodal_projector_bias,
    },
    vision=lambda config: {"feature_layer": config.vision_feature_layer},
    rules=PROJECTOR,
    refuse=_refuse,
    special="the plain form",
    checkpoints=("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf", "xtuner/llava-phi-3-mini-hf"),
)
