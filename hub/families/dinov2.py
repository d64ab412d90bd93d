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
"""A DINOv2 tower with any causal language model: the one case in which the projector is new and has to be trained.

- `combine`: the configs of both as one.
- `place_image_token`: which token of the language model stands for visual tokens.
"""

import re
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AddedToken,
    AutoModel,
    AutoModelForCausalLM,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from ct_moe import ConversionError

from .family import Family, Rule


MODEL_TYPE = "dinov2"
_KNOWN = ("<image>", "<|image_pad|>", "<|image|>", "<image_soft_token>", "<IMG_CONTEXT>")
_RESERVED = r"<\|?(reserved_special_token|placeholder|unused|extra)_?\d+\|?>"


def combine(tower: PreTrainedConfig, text: PreTrainedConfig, image_token_id: int) -> LlavaConfig:
    config = LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=image_token_id,
        vision_feature_layer=-1,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    config.model_type = MODEL_TYPE
    return config


def place_image_token(tokenizer: PreTrainedTokenizerBase, vocab_size: int, name: str) -> int:
    """Number of the placeholder: one that the tokenizer has, a reserved one, or a new one in a free row.

    The embedding of a placeholder is never read, so a row without training serves.

    Raises:
        ConversionError: the embeddings have no row to spare.
    """
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    free = [token for token in added if re.fullmatch(_RESERVED, token)]
    for token in (*_KNOWN, *sorted(free, key=added.get)):
        if token in added:
            return added[token]
    if len(tokenizer) >= vocab_size:
        raise ConversionError(
            name,
            f"all {vocab_size} rows of the embeddings have a token, and none is reserved",
            "Name a language model with a spare row, such as Qwen2.5 or Llama 3",
        )
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<image>", special=True)]})
    return tokenizer.convert_tokens_to_ids("<image>")


def run_base(
    folder: Path, config: LlavaConfig, dtype: torch.dtype, input_ids, pixels, tower_folder: Path, converted: Path
) -> torch.Tensor:
    """Logits of both parts as the library runs them, with the converted model's projector between them."""
    tower = AutoModel.from_pretrained(tower_folder, dtype=dtype).float()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).float()
    image = tower(pixels).last_hidden_state[0, 1:]
    prefix = "model.multi_modal_projector.linear_"
    with_projector = {}
    for file in sorted(converted.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            names = [name for name in weights.keys() if name.startswith(prefix)]
            with_projector |= {name.removeprefix(prefix): weights.get_tensor(name).float() for name in names}
    image = nn.functional.linear(image, with_projector["1.weight"], with_projector["1.bias"])
    image = nn.functional.linear(nn.functional.gelu(image), with_projector["2.weight"], with_projector["2.bias"])
    embeds = model.get_input_embeddings()(input_ids)
    embeds = embeds.masked_scatter((input_ids == config.image_token_id).unsqueeze(-1), image)
    return model(inputs_embeds=embeds).logits


DINOV2 = Family(
    model_type=MODEL_TYPE,
    name="DINOv2 with a causal language model",
    towers=("dinov2",),
    text_types=("llama", "mistral", "phi3", "qwen2", "qwen3", "gemma", "gemma2"),
    settings=lambda config: {"projector_hidden_act": "gelu"},
    vision=lambda config: {"feature_layer": -1, "post_layernorm": True},
    rules=[],
    fresh=[(r"model\.multi_modal_projector\..+", "projector, new: train it before anything else")],
    text_rules=(
        Rule(r"lm_head\.weight", "lm_head.weight"),
        Rule(r"model\.(.+)", r"model.language_model.\1"),
    ),
    run_base=run_base,
    special="two checkpoints; the projector is new and says nothing before it is trained",
    checkpoints=("facebook/dinov2-large with Qwen/Qwen2.5-7B-Instruct",),
)
