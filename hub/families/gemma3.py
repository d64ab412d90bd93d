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
"""Gemma 3, the architecture of MedGemma: SigLIP, patches averaged to 256 tokens, bidirectional visual tokens."""

from transformers import PreTrainedConfig

from .family import Family, Rule, square


def _merge_size(config: PreTrainedConfig) -> int:
    vision = config.vision_config
    return square(vision.image_size) // square(vision.patch_size) // int(config.mm_tokens_per_image**0.5)


GEMMA3 = Family(
    model_type="gemma3",
    name="Gemma 3, MedGemma",
    towers=("siglip_vision_model",),
    text_types=("gemma3_text",),
    settings=lambda config: {
        "projector_layers": 1,
        "projector_norm": "offset_rms_norm",
        "projector_norm_eps": config.vision_config.layer_norm_eps,
        "multimodal_projector_bias": False,
        "merge_size": _merge_size(config),
        "merge_mode": "mean",
        "image_attention": "image",
    },
    vision=lambda config: {"feature_layer": -1, "post_layernorm": True},
    rules=[
        Rule(
            r"(?:model\.)?multi_modal_projector\.mm_input_projection_weight",
            "model.multi_modal_projector.linear_1.weight",
            "transpose",
        ),
        Rule(r"(?:model\.)?multi_modal_projector\.mm_soft_emb_norm\.(.+)", r"model.multi_modal_projector.norm.\1"),
    ],
    base_inputs=lambda pixels, input_ids, config: {
        "pixel_values": pixels,
        "token_type_ids": (input_ids == config.image_token_id).long(),
    },
    image_text=lambda token: (("<start_of_image>",), f"\n\n<start_of_image>{token}<end_of_image>\n\n"),
    image_tokens=("<image_soft_token>",),
    special="256 tokens per slice before pooling; visual tokens of a volume see each other in the language model",
    checkpoints=("google/medgemma-4b-it", "google/gemma-3-4b-it", "google/gemma-3-12b-it"),
)
