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
"""PaliGemma: SigLIP, one linear layer, and a prompt that sees all of itself."""

import torch

from .family import Family, Rule


# Of its processor, for bases without one: the image, the start, one question, a line break.
_TEMPLATE = """\
{%- for message in messages -%}
  {%- set content = message['content'] -%}
  {%- if content is string -%}{%- set content = [{'type': 'text', 'text': content}] -%}{%- endif -%}
  {%- if message['role'] == 'assistant' -%}
    {%- generation -%}
      {%- for block in content -%}{{- block['text'] -}}{%- endfor -%}{{- eos_token -}}
    {%- endgeneration -%}
  {%- else -%}
    {%- for block in content if block['type'] == 'image' -%}{{- '<image>' -}}{%- endfor -%}
    {{- bos_token -}}
    {%- for block in content if block['type'] == 'text' -%}{{- block['text'] -}}{%- endfor -%}
    {{- '\\n' -}}
  {%- endif -%}
{%- endfor -%}
"""

PALIGEMMA = Family(
    model_type="paligemma",
    name="PaliGemma",
    towers=("siglip_vision_model",),
    text_types=("gemma", "gemma2"),
    settings=lambda config: {
        "projector_layers": 1,
        "image_attention": "prompt",
        "first_position": 1,
    },
    vision=lambda config: {"feature_layer": -1, "post_layernorm": True},
    rules=[Rule(r"(?:model\.)?multi_modal_projector\.linear\.(.+)", r"model.multi_modal_projector.linear_1.\1")],
    base_inputs=lambda pixels, input_ids, config: {
        "pixel_values": pixels,
        "token_type_ids": torch.zeros_like(input_ids),
    },
    chat_template=_TEMPLATE,
    special="the whole prompt sees itself in the language model; positions count from 1",
    checkpoints=("google/paligemma-3b-pt-448", "google/paligemma2-3b-pt-448"),
)
