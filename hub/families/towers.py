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
"""Vision towers: where their tensors and the fields of their configs go.

A tower's names follow `vision_tower.` in a base's files; some layouts have `model.` before it and `vision_model.`
after it.
"""

from transformers import PreTrainedConfig

from .family import Rule, Tower, square


_FIELDS = [
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
    "initializer_range",
]
_SAME = dict(zip(_FIELDS, _FIELDS))
_PLAIN = {
    "class_token": False,
    "patch_bias": True,
    "pre_layernorm": False,
    "post_layernorm": False,
    "attention_bias": True,
    "norm_type": "layer_norm",
    "qk_norm": False,
    "use_layer_scale": False,
    "post_norm_type": "layer_norm",
    "gated_mlp": False,
    "fused_qkv": False,
    "temporal_patch_size": 1,
    "position_embedding": True,
    "position_grid": None,
    "rotary_theta": None,
    "window_size": None,
    "full_attention_layers": [],
    "deepstack_layers": [],
}


def _sizes(config: PreTrainedConfig) -> dict[str, int]:
    return {name: square(getattr(config, name)) for name in ("image_size", "patch_size")}


def _square_only(config: PreTrainedConfig) -> str | None:
    for name in ("image_size", "patch_size"):
        value = getattr(config, name)
        if not isinstance(value, int) and len(set(value)) > 1:
            return f"{name} {list(value)}, which is not square"
    return None


CLIP = Tower(
    rules=[
        Rule(r"embeddings\.(.+)", r"embeddings.\1"),
        Rule(r"pre_layrnorm\.(.+)", r"pre_layernorm.\1"),  # the library's spelling
        Rule(r"encoder\.layers\.(.+)", r"layers.\1"),
    ],
    unread=[(r"post_layernorm\..+", "post-layernorm: LLaVA reads features before it")],
    fields=_SAME,
    constants={**_PLAIN, "class_token": True, "patch_bias": False, "pre_layernorm": True},
    settings=_sizes,
)

SIGLIP = Tower(
    rules=[
        Rule(r"embeddings\.(.+)", r"embeddings.\1"),
        Rule(r"encoder\.layers\.(.+)", r"layers.\1"),
        Rule(r"post_layernorm\.(.+)", r"post_layernorm.\1"),
    ],
    unread=[
        (r"post_layernorm\..+", "post-layernorm: the base reads features before it"),
        (r"head\..+", "pooling head: the base reads features of patches"),
    ],
    fields={name: name for name in _FIELDS if name != "initializer_range"},
    constants=_PLAIN,
    settings=_sizes,
)

INTERNVIT = Tower(
    rules=[
        Rule(r"embeddings\.cls_token", "embeddings.class_embedding", "squeeze"),
        Rule(r"embeddings\.position_embeddings", "embeddings.position_embedding.weight", "squeeze"),
        Rule(r"embeddings\.patch_embeddings\.projection\.(.+)", r"embeddings.patch_embedding.\1"),
        Rule(r"encoder\.layer\.(\d+)\.attention\.projection_layer\.(.+)", r"layers.\1.self_attn.out_proj.\2"),
        Rule(r"encoder\.layer\.(\d+)\.attention\.(.+)", r"layers.\1.self_attn.\2"),
        Rule(r"encoder\.layer\.(\d+)\.layernorm_before\.(.+)", r"layers.\1.layer_norm1.\2"),
        Rule(r"encoder\.layer\.(\d+)\.layernorm_after\.(.+)", r"layers.\1.layer_norm2.\2"),
        Rule(r"encoder\.layer\.(\d+)\.lambda_([12])", r"layers.\1.layer_scale\2"),
        Rule(r"encoder\.layer\.(\d+)\.mlp\.(.+)", r"layers.\1.mlp.\2"),
        Rule(r"layernorm\.(.+)", r"post_layernorm.\1"),
    ],
    unread=[
        (r"embeddings\.mask_token", "mask token: of pretraining"),
        (r"layernorm\..+", "last layernorm: the base reads features before it"),
    ],
    fields=_SAME | {"attention_bias": "attention_bias", "norm_type": "norm_type", "qk_norm": "use_qk_norm"},
    constants={**_PLAIN, "class_token": True, "use_layer_scale": True},
    settings=_sizes,
    refuse=lambda config: (
        _square_only(config)
        or (None if config.use_absolute_position_embeddings else "no absolute position embeddings")
    ),
)

DINOV2 = Tower(
    rules=[
        Rule(r"embeddings\.cls_token", "embeddings.class_embedding", "squeeze"),
        Rule(r"embeddings\.position_embeddings", "embeddings.position_embedding.weight", "squeeze"),
        Rule(r"embeddings\.patch_embeddings\.projection\.(.+)", r"embeddings.patch_embedding.\1"),
        Rule(r"encoder\.layer\.(\d+)\.attention\.attention\.(q|k|v)\w+\.(.+)", r"layers.\1.self_attn.\2_proj.\3"),
        Rule(r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(.+)", r"layers.\1.self_attn.out_proj.\2"),
        Rule(r"encoder\.layer\.(\d+)\.norm([12])\.(.+)", r"layers.\1.layer_norm\2.\3"),
        Rule(r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1", r"layers.\1.layer_scale\2"),
        Rule(r"encoder\.layer\.(\d+)\.mlp\.(.+)", r"layers.\1.mlp.\2"),
        Rule(r"layernorm\.(.+)", r"post_layernorm.\1"),
    ],
    unread=[(r"embeddings\.mask_token", "mask token: of pretraining")],
    fields={name: name for name in _FIELDS if name not in ("intermediate_size", "attention_dropout")}
    | {"attention_dropout": "attention_probs_dropout_prob", "attention_bias": "qkv_bias"},
    constants={**_PLAIN, "class_token": True, "use_layer_scale": True},
    settings=lambda config: _sizes(config) | {"intermediate_size": int(config.hidden_size * config.mlp_ratio)},
    refuse=lambda config: _square_only(config) or ("a SwiGLU FFN (giant)" if config.use_swiglu_ffn else None),
)

_QWEN_RULES = [
    Rule(r"patch_embed\.proj\.(.+)", r"embeddings.patch_embedding.\1"),
    Rule(r"blocks\.(\d+)\.norm([12])\.(.+)", r"layers.\1.layer_norm\2.\3"),
    Rule(r"blocks\.(\d+)\.attn\.qkv\.(.+)", r"layers.\1.self_attn.qkv.\2"),
    Rule(r"blocks\.(\d+)\.attn\.proj\.(.+)", r"layers.\1.self_attn.out_proj.\2"),
]
_QWEN_FIELDS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "num_channels": "in_channels",
    "hidden_act": "hidden_act",
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "initializer_range": "initializer_range",
}
_QWEN_CONSTANTS = {**_PLAIN, "layer_norm_eps": 1e-6, "fused_qkv": True}

QWEN2_5_VL = Tower(
    rules=[
        *_QWEN_RULES,
        Rule(r"blocks\.(\d+)\.mlp\.gate_proj\.(.+)", r"layers.\1.mlp.gate.\2"),
        Rule(r"blocks\.(\d+)\.mlp\.up_proj\.(.+)", r"layers.\1.mlp.fc1.\2"),
        Rule(r"blocks\.(\d+)\.mlp\.down_proj\.(.+)", r"layers.\1.mlp.fc2.\2"),
        Rule(r"merger\.ln_q\.(.+)", r"post_layernorm.\1"),
    ],
    unread=[],
    fields=_QWEN_FIELDS,
    constants={
        **_QWEN_CONSTANTS,
        "patch_bias": False,
        "norm_type": "rms_norm",
        "post_norm_type": "rms_norm",
        "gated_mlp": True,
        "position_embedding": False,
    },
    settings=lambda config: {
        "rotary_theta": config.rope_parameters["rope_theta"],
        "window_size": config.window_size // config.patch_size,
        "full_attention_layers": list(config.fullatt_block_indexes),
    },
)

QWEN3_VL = Tower(
    rules=[
        *_QWEN_RULES,
        Rule(r"pos_embed\.(.+)", r"embeddings.position_embedding.\1"),
        Rule(r"blocks\.(\d+)\.mlp\.linear_fc([12])\.(.+)", r"layers.\1.mlp.fc\2.\3"),
        Rule(r"merger\.norm\.(.+)", r"post_layernorm.\1"),
    ],
    unread=[],
    fields=_QWEN_FIELDS,
    constants=_QWEN_CONSTANTS,
    settings=lambda config: {
        "rotary_theta": config.rope_parameters["rope_theta"],
        "position_grid": int(config.num_position_embeddings**0.5),
        "deepstack_layers": list(config.deepstack_visual_indexes),
    },
)

TOWERS: dict[str, Tower] = {
    "qwen2_5_vl_vision": QWEN2_5_VL,
    "qwen3_vl_vision": QWEN3_VL,
    "dinov2": DINOV2,
    "clip_vision_model": CLIP,
    "siglip_vision_model": SIGLIP,
    "internvl_vision": INTERNVIT,
}
