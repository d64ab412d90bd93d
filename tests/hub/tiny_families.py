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
"""Tiny checkpoints of every family, built with the library's own classes and written in its own format."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Gemma3Config,
    GenerationConfig,
    InternVLConfig,
    LlavaConfig,
    LlavaOnevisionConfig,
    PaliGemmaConfig,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2ForCausalLM,
    Qwen3VLConfig,
    SiglipImageProcessorPil,
)

from ct_moe.hub.tiny_base import _train_tokenizer, radiology_sentences


_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
    "vision_use_head": False,
}
_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "pad_token_id": 0,
}
_CHAT = """\
{%- for message in messages -%}
  {{- '<|' + message['role'] + '|>\\n' -}}
  {%- for block in message['content'] -%}
    {%- if block['type'] == 'image' -%}{{- 'IMAGE\\n' -}}{%- else -%}{{- block['text'] -}}{%- endif -%}
  {%- endfor -%}
  {{- '<|end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""


def build_family(name: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> Path:
    """Write a tiny checkpoint; `changes` are fields of its config, nested ones as `text_config={...}`."""
    if name == "phi3_v":
        return build_phi3_v(folder, seed, dtype)
    make, placeholder, written = _FAMILIES[name]
    tokenizer = _train_tokenizer(radiology_sentences())
    marks = re.findall("<[^<>]+>", placeholder + written)
    tokenizer.add_special_tokens({"additional_special_tokens": sorted({*marks, "<img>", "</img>"})})
    config = make(tokenizer, tokenizer.convert_tokens_to_ids(placeholder), changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
        _stir(model)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    model.to(dtype).save_pretrained(folder)
    size = getattr(config.vision_config, "image_size", 64)
    side = size if isinstance(size, int) else size[0]
    _write_processor(folder, tokenizer, side)
    if name != "paligemma":  # which has no chat template
        tokenizer.chat_template = _CHAT.replace("IMAGE", written)
    tokenizer.save_pretrained(folder)
    return folder


def build_phi3_v(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """In the published names and with the published fields of the config; the library has no class for it."""
    tokenizer = _train_tokenizer(radiology_sentences())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image|>"]})
    text = _text("phi3", tokenizer, {}, original_max_position_embeddings=64)
    half = text.hidden_size // text.num_attention_heads // 2
    text.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "long_factor": [1.1 + 0.1 * i for i in range(half)],
        "short_factor": [1.0 + 0.01 * i for i in range(half)],
    }
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower, model = CLIPVisionModel(vision), Phi3ForCausalLM(text)
        prefix, width = "model.vision_embed_tokens.", 4 * vision.hidden_size
        tensors = {
            f"{prefix}img_projection.0.weight": 0.05 * torch.randn(text.hidden_size, width),
            f"{prefix}img_projection.0.bias": torch.randn(text.hidden_size),
            f"{prefix}img_projection.2.weight": 0.1 * torch.randn(text.hidden_size, text.hidden_size),
            f"{prefix}img_projection.2.bias": torch.randn(text.hidden_size),
            f"{prefix}glb_GN": torch.randn(1, 1, width),
            f"{prefix}sub_GN": torch.randn(1, 1, 1, width),
        }
    names = {name.removeprefix("vision_model."): tensor for name, tensor in tower.state_dict().items()}
    tensors |= {f"{prefix}img_processor.vision_model.{name}": tensor for name, tensor in names.items()}
    tensors |= model.state_dict()
    folder.mkdir()
    save_file({name: tensor.contiguous().to(dtype) for name, tensor in tensors.items()}, folder / "model.safetensors")
    raw = text.to_dict()
    scaling = raw.pop("rope_parameters")
    config = {
        **raw,
        "model_type": "phi3_v",
        "architectures": ["Phi3VForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_phi3_v.Phi3VConfig"},
        "embd_layer": {
            "embedding_cls": "image",
            "hd_transform_order": "sub_glb",
            "projection_cls": "mlp",
            "use_hd_transform": True,
            "with_learnable_separator": True,
        },
        "img_processor": {"model_name": "openai/clip-vit-large-patch14-336", "name": "clip_vision_model"},
        "rope_theta": scaling.pop("rope_theta"),
        "rope_scaling": {"type": "su", **{name: value for name, value in scaling.items() if name != "rope_type"}},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    _write_processor(folder, tokenizer, 56)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


def build_dinov2(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    """A language model without a token for images, and a tower."""
    content = json.loads(_train_tokenizer(radiology_sentences()).backend_tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<image>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<|end|>", pad_token="<|endoftext|>"
    )
    tower = Dinov2Config(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=4, mlp_ratio=2, image_size=56, patch_size=14
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        models = Qwen2ForCausalLM(_text("qwen2", tokenizer, {"text_config": {"vocab_size": 1100}})), Dinov2Model(tower)
        _stir(models[0]), _stir(models[1])
    folders = folder / "language_model", folder / "tower"
    for model, place in zip(models, folders):
        model.to(dtype).save_pretrained(place)
    tokenizer.chat_template = _CHAT.replace("message['content']", "[{'type': 'text', 'text': message['content']}]")
    tokenizer.save_pretrained(folders[0])
    _write_processor(folders[1], tokenizer, 56)
    return folders


@torch.no_grad()
def _stir(model: torch.nn.Module) -> None:
    """Move biases, norm scales and zeros to where a swapped or forgotten one would be noticed."""
    for parameter in model.parameters():
        if parameter.ndim == 1 or min(parameter.shape) == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
        elif not parameter.any():  # the projection of Gemma 3 starts from zeros
            parameter.normal_(std=0.1)


def _write_processor(folder: Path, tokenizer: PreTrainedTokenizerFast, side: int) -> None:
    SiglipImageProcessorPil(
        size={"height": side, "width": side}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]
    ).save_pretrained(folder)


def _text(kind: str, tokenizer: PreTrainedTokenizerFast, changes: dict, **fields) -> AutoConfig:
    vocabulary = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    return AutoConfig.for_model(kind, **{**_TEXT, **vocabulary, **fields, **changes.pop("text_config", {})})


def _llava_siglip(tokenizer, image_token_id, changes):
    text = _text("qwen2", tokenizer, changes)
    return LlavaConfig(
        vision_config={**_SIGLIP, "vision_use_head": True, **changes.pop("vision_config", {})},
        text_config=text,
        image_token_index=image_token_id,
        **{"vision_feature_layer": -2, "vision_feature_select_strategy": "full", **changes},
    )


def _llava_onevision(tokenizer, image_token_id, changes):
    text = _text("qwen2", tokenizer, changes)
    return LlavaOnevisionConfig(
        vision_config={**_SIGLIP, **changes.pop("vision_config", {})},
        text_config=text,
        image_token_index=image_token_id,
        video_token_index=image_token_id - 1,
        image_grid_pinpoints=[[56, 56], [112, 112]],
        **changes,
    )


def _gemma3(tokenizer, image_token_id, changes):
    # A window shorter than the prompt, and both kinds of layers.
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    text = _text("gemma3_text", tokenizer, changes, sliding_window=8, layer_types=kinds, query_pre_attn_scalar=16)
    return Gemma3Config(
        vision_config={**_SIGLIP, **changes.pop("vision_config", {})},
        text_config=text,
        image_token_index=image_token_id,
        mm_tokens_per_image=4,
        **changes,
    )


def _paligemma(tokenizer, image_token_id, changes):
    text = _text("gemma", tokenizer, changes)
    return PaliGemmaConfig(
        vision_config={**_SIGLIP, "projection_dim": 64, **changes.pop("vision_config", {})},
        text_config=text,
        image_token_index=image_token_id,
        projection_dim=64,
        **changes,
    )


def _internvl(tokenizer, image_token_id, changes):
    text = _text("qwen3" if changes.pop("qwen3", False) else "qwen2", tokenizer, changes)
    vision = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": [56, 56],
        "patch_size": [14, 14],
        "attention_bias": True,
        "use_mask_token": True,
        **changes.pop("vision_config", {}),
    }
    return InternVLConfig(vision_config=vision, text_config=text, image_token_id=image_token_id, **changes)


def _internvl_6b(tokenizer, image_token_id, changes):
    """In the manner of InternViT-6B: RMS norms, also of queries and keys, no biases there; a norm at the end."""
    vision = {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False, "use_mean_pooling": False}
    changes |= {"vision_config": vision, "qwen3": True, "vision_feature_layer": -1}
    return _internvl(tokenizer, image_token_id, changes)


def _qwen2_5_vl(tokenizer, image_token_id, changes):
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text = _text("qwen2_5_vl_text", tokenizer, changes, rope_parameters=rope)
    vision = {
        "depth": 4,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_heads": 4,
        "out_hidden_size": 64,
        "patch_size": 14,
        "window_size": 56,
        "fullatt_block_indexes": [1, 3],
        **changes.pop("vision_config", {}),
    }
    return Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text.to_dict(),
        image_token_id=image_token_id,
        video_token_id=image_token_id - 1,
        tie_word_embeddings=False,
        **changes,
    )


def _qwen3_vl(tokenizer, image_token_id, changes):
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2], "mrope_interleaved": True}
    text = _text("qwen3_vl_text", tokenizer, changes, rope_parameters=rope)
    vision = {
        "depth": 4,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_heads": 4,
        "out_hidden_size": 64,
        "patch_size": 16,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 2],
        **changes.pop("vision_config", {}),
    }
    return Qwen3VLConfig(
        vision_config=vision,
        text_config=text.to_dict(),
        image_token_id=image_token_id,
        video_token_id=image_token_id - 1,
        tie_word_embeddings=False,
        **changes,
    )


# The config, the placeholder that visual tokens replace, and what the chat template writes for an image.
_FAMILIES = {
    "llava with siglip": (_llava_siglip, "<image>", "<image>"),
    "llava_onevision": (_llava_onevision, "<image>", "<image>"),
    "gemma3": (_gemma3, "<image_soft_token>", "<start_of_image>"),
    "paligemma": (_paligemma, "<image>", "<image>"),
    "qwen2_5_vl": (_qwen2_5_vl, "<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>"),
    "qwen3_vl": (_qwen3_vl, "<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>"),
    "internvl with rms norms": (_internvl_6b, "<IMG_CONTEXT>", "<IMG_CONTEXT>"),
    "internvl": (_internvl, "<IMG_CONTEXT>", "<IMG_CONTEXT>"),
}
FAMILIES = sorted([*_FAMILIES, "phi3_v", "dinov2"])
