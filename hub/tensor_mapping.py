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
"""Which tensor of a base's files becomes which tensor of CT-MoE: the tables, and the proof that nothing is left over.

- `TOWERS`: per kind of vision tower, the names of its tensors and the fields of its config.
- `plan_tensors`: every tensor of both sides accounted for, or an error that names the first that is not.
"""

import re
from typing import Any, NamedTuple

import torch
from transformers import LlavaConfig

from ct_moe import ConversionError, CTMoEConfig, CTMoEForConditionalGeneration


SUPPORTED = (
    "LLaVA bases (model_type llava) with a CLIP tower (clip_vision_model), one vision feature layer, the select "
    'strategy "default", an MLP projector and a phi3 or llama language model'
)
TEXT_TYPES = ["phi3", "llama"]

# Names of a base's tensors in its files -> names in CT-MoE. Patterns match whole names and cover every layout:
# the original one, which the library writes to this day (`language_model.model.`), that of its own modules
# (`model.language_model.`), and both with and without the `vision_model` that CLIP towers once had inside.
_TOWER = r"(?:model\.)?vision_tower\.(?:vision_model\.)?"
_LLAVA_RULES = [
    (r"(?:language_model\.)?(lm_head\.weight)", r"\1"),
    (r"language_model\.model\.(.+)", r"model.language_model.\1"),
    (r"model\.language_model\.(.+)", r"model.language_model.\1"),
    (r"(?:model\.)?(multi_modal_projector\..+)", r"model.\1"),
]
_BUFFER_RULES = [
    (r".*\.position_ids", "a buffer, computed anew"),
    (r".*\.rotary_emb\.inv_freq", "a buffer, computed anew"),
]
# The parameters a base does not have, by the part of the model they belong to.
_ADDED_RULES = [
    (r"model\.vision_tower\.embeddings\.scale_embedding\..+", "scale embedding"),
    (r"model\.vision_tower\.layers\.\d+\.moe\.experts\..+", "experts"),
    (r"model\.vision_tower\.layers\.\d+\.moe\.(shared|group)_router\..+", "expert routers"),
    (r"model\.guide_encoder\..+", "guide encoder"),
    (r"model\.task_router\..+", "task router"),
    (r"model\.slice_scoring\..+", "slice scoring"),
    (r"model\.volume_encoder\..+", "3D encoder"),
    (r"model\.volume_projector\..+", "projector of the 3D encoder"),
]


class Tower(NamedTuple):
    """How one kind of vision tower is converted.

    rules: names in its files -> names in CT-MoE; unread: names its base's forward never reads -> the reason; fields:
    what `CTMoEVisionConfig` takes over under the same name; constants: what all towers of the kind share.
    """

    rules: list[tuple[str, str]]
    unread: list[tuple[str, str]]
    fields: list[str]
    constants: dict[str, Any]


TOWERS = {
    "clip_vision_model": Tower(
        rules=[
            (_TOWER + r"embeddings\.(.+)", r"model.vision_tower.embeddings.\1"),
            (_TOWER + r"pre_layrnorm\.(.+)", r"model.vision_tower.pre_layernorm.\1"),  # the library's spelling
            (_TOWER + r"encoder\.layers\.(.+)", r"model.vision_tower.layers.\1"),
        ],
        unread=[(_TOWER + r"post_layernorm\..+", "post-layernorm: LLaVA reads features before it")],
        fields=[
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_channels",
            "image_size",
            "patch_size",
            "hidden_act",
            "layer_norm_eps",
            "attention_dropout",
            "initializer_range",
        ],
        constants={
            "class_token": True,
            "patch_bias": False,
            "pre_layernorm": True,
            "post_layernorm": False,
            "attention_bias": True,
            "norm_type": "layer_norm",
            "qk_norm": False,
            "use_layer_scale": False,
        },
    ),
}


class TensorPlan(NamedTuple):
    """reused: names in the files -> names in CT-MoE; unread: names in the files -> the reason; added: names in CT-MoE
    by the part of the model. Each tensor of the files is in one of the first two, each of CT-MoE in the first or last.
    """

    reused: dict[str, str]
    unread: dict[str, str]
    added: dict[str, list[str]]


def plan_tensors(shapes: dict[str, tuple[int, ...]], config: CTMoEConfig, base: LlavaConfig) -> TensorPlan:
    """Which tensor goes where; every one of both sides is accounted for, or the conversion ends here."""
    with torch.device("meta"):
        targets = {
            key: tuple(tensor.shape) for key, tensor in CTMoEForConditionalGeneration(config).state_dict().items()
        }
    tower = TOWERS[base.vision_config.model_type]
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    reused, unread = {}, {}
    for key, shape in shapes.items():
        target = _first_match(tower.rules + _LLAVA_RULES, key)
        reason = _first_match(tower.unread + _BUFFER_RULES, key) or _above_feature_layer(target, config)
        if reason is None and target in tied:
            reason = "tied: the base reads its input embeddings in its place"
        if reason is not None:
            unread[key] = reason
            continue
        if target not in targets:
            raise ConversionError(key, "a tensor of the base that fits nowhere in CT-MoE", f"Supported: {SUPPORTED}")
        if shape != targets[target]:
            raise ConversionError(
                key,
                f"shape {list(shape)} in the base's files, {list(targets[target])} by its config ({target})",
                "Files and config do not belong together: download the base again",
            )
        if target in reused.values():
            raise ConversionError(key, f"a second tensor of the base for {target}", "Remove one of the two layouts")
        reused[key] = target

    filled = set(reused.values())
    added = {}
    for target in targets:
        if target in filled | tied:
            continue
        group = _first_match(_ADDED_RULES, target)
        if group is None:
            raise ConversionError(
                target, "no tensor of the base's files fills it", "The base is incomplete: download it again"
            )
        added.setdefault(group, []).append(target)
    return TensorPlan(reused, unread, added)


def _first_match(rules: list[tuple[str, str]], key: str) -> str | None:
    for pattern, replacement in rules:
        match = re.fullmatch(pattern, key)
        if match:
            return match.expand(replacement)
    return None


def _above_feature_layer(target: str | None, config: CTMoEConfig) -> str | None:
    """The reason why a tower's layer is unread, None for every other tensor and for layers the tower does not have."""
    layer = re.match(r"model\.vision_tower\.layers\.(\d+)\.", target or "")
    vision = config.vision_config
    if layer and vision.num_read_layers <= int(layer[1]) < vision.num_hidden_layers:
        return f"layer {layer[1]} of {vision.num_hidden_layers}: above feature layer {vision.feature_layer}"
    return None
