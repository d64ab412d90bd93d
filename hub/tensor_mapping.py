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
"""Which tensor of a base's files becomes which tensor of CT-MoE, and the proof that nothing is left over.

- `plan_tensors`: every tensor of both sides accounted for, or an error that names the first that is not.
- `change`, `change_back`: how a tensor that is stored otherwise is turned, exactly.
"""

import re
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedConfig

from ct_moe import ConversionError, CTMoEConfig, CTMoEForConditionalGeneration

from .families import FAMILIES, TOWERS
from .families.family import Rule


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


@dataclass(frozen=True)
class TensorPlan:
    """Each tensor of the files is in `reused` or `unread`, each of CT-MoE in `reused` or `added`.

    Attributes:
        reused: names in the files -> names in CT-MoE.
        unread: names in the files -> the reason.
        added: names in CT-MoE by the part of the model.
        changes: names in the files -> how they are stored otherwise.
        added_shapes: names in CT-MoE of what is added -> shapes.
    """

    reused: dict[str, str]
    unread: dict[str, str]
    added: dict[str, list[str]]
    changes: dict[str, str] = field(default_factory=dict)
    added_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


def plan_tensors(shapes: dict[str, tuple[int, ...]], config: CTMoEConfig, base: PreTrainedConfig) -> TensorPlan:
    """Which tensor goes where; every one of both sides is accounted for, or the conversion ends here."""
    with torch.device("meta"):
        targets = {
            key: tuple(tensor.shape) for key, tensor in CTMoEForConditionalGeneration(config).state_dict().items()
        }
    family, tower = FAMILIES[base.model_type], TOWERS[base.vision_config.model_type]
    prefix = family.tower_prefix
    tower_rules = [
        Rule(prefix + rule.pattern, f"model.vision_tower.{rule.target}", rule.change) for rule in tower.rules
    ]
    rules = [*tower_rules, *family.rules, *family.text_rules]
    never_read = [*((prefix + pattern, reason) for pattern, reason in tower.unread), *family.unread]
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    reused, unread, changes = {}, {}, {}
    for key, shape in shapes.items():
        target, how = _place(rules, key)
        reason = _first_match(_BUFFER_RULES, key) or _above_feature_layer(target, config)
        if reason is None and target not in targets:
            reason = _first_match(never_read, key)
        if reason is None and target in tied:
            reason = "tied: the base reads its input embeddings in its place"
        if reason is not None:
            unread[key] = reason
            continue
        if target not in targets:
            raise ConversionError(
                key,
                f"a tensor of the base that fits nowhere in CT-MoE, as {family.name} is known here",
                "Name a base of the published form",
            )
        if changed_shape(shape, how) != targets[target]:
            raise ConversionError(
                key,
                f"shape {list(shape)} in the base's files, {list(targets[target])} by its config ({target})",
                "Files and config do not belong together: download the base again",
            )
        if target in reused.values():
            raise ConversionError(key, f"a second tensor of the base for {target}", "Remove one of the two layouts")
        reused[key] = target
        if how:
            changes[key] = how

    filled = set(reused.values())
    added = {}
    for target in targets:
        if target in filled | tied:
            continue
        group = _first_match([*family.fresh, *_ADDED_RULES], target)
        if group is None:
            raise ConversionError(
                target, "no tensor of the base's files fills it", "The base is incomplete: download it again"
            )
        added.setdefault(group, []).append(target)
    shapes = {name: targets[name] for names in added.values() for name in names}
    return TensorPlan(reused, unread, added, changes, shapes)


def change(tensor: torch.Tensor, how: str) -> torch.Tensor:
    """A tensor of a base's files as CT-MoE stores it."""
    if how == "transpose":
        return tensor.t().contiguous()
    return tensor.reshape(changed_shape(tuple(tensor.shape), how)) if how else tensor


def change_back(tensor: torch.Tensor, how: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The inverse of `change`, for a tensor of `shape` in the base's files."""
    return tensor.t().contiguous() if how == "transpose" else tensor.reshape(shape)


def changed_shape(shape: tuple[int, ...], how: str) -> tuple[int, ...]:
    """That of the tensor in CT-MoE."""
    if how == "transpose":
        return shape[::-1]
    if how == "squeeze":
        while len(shape) > 1 and shape[0] == 1:
            shape = shape[1:]
    return shape


def _place(rules: list[Rule], key: str) -> tuple[str | None, str]:
    for rule in rules:
        match = re.fullmatch(rule.pattern, key)
        if match:
            return match.expand(rule.target), rule.change
    return None, ""


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
