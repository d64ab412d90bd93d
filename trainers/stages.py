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
"""What a training stage trains: the table of design section 4, applied to a model.

- `TRAINABLE_PARTS`: the rows of the table and the choices each has.
- `prepare_stage`: a model -> the same with the right parameters trained, in a PEFT adapter where one is asked for.
- `use_task_groups`: switches the experts of the tasks on or off.
- `hold_frozen_experts`: keeps the experts of a frozen group as they are, which share tensors with trained ones.
- `trained_parts`: how many parameters of every part are trained and frozen, and `format_parts`, the same as text.
- `part_of_parameters`: parameter name -> part, for learning rates.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.hooks import RemovableHandle

from ct_moe import CTMoEForConditionalGeneration, TrainingError
from ct_moe.modeling_ct_moe import CTMoEExperts


if TYPE_CHECKING:
    from peft import PeftModel

    from .recipe import StageConfig


# Of the vision tower, unless said otherwise. LoRA is for pretrained layers: what is new and small is trained whole.
TRAINABLE_PARTS = {
    "slice_layers": ("frozen", "lora", "full"),  # and the embeddings of patches and positions
    "volume_layers": ("frozen", "lora", "full"),  # their attention and LayerNorms
    "ffns": ("frozen", "lora", "full"),  # pretrained FFNs of the volume layers
    "shared_group": ("frozen", "full"),  # its experts and routers, the guide, W_s, a second, 3D encoder
    "task_router": ("frozen", "full"),
    "task_groups": ("off", "frozen", "full"),  # experts and routers; off: they take no part at all
    "projector": ("frozen", "full"),  # and TG-IS
    "language_model": ("frozen", "lora", "full"),  # without its input embeddings, which the guide reads
}
ALWAYS_FROZEN = ("input_embeddings", "other")
# What PEFT and torch.compile put into names.
_WRAPPING = re.compile(r"^base_model\.model\.|_orig_mod\.|\.(base_layer|original_module)|\.modules_to_save\.[^.]+")
_EXPERTS = "experts"


@dataclass
class TrainedPart:
    """One row of the table: parameters of a part that are trained, and all it has. LoRA's own are in `lora`."""

    name: str
    mode: str
    trained: int
    total: int
    lora: int = 0


def prepare_stage(
    model: CTMoEForConditionalGeneration, stage: "StageConfig"
) -> "CTMoEForConditionalGeneration | PeftModel":
    """Make exactly the parts of a stage trainable, and switch the task groups on or off.

    Args:
        model: changed in place.
        stage: its `train_*` fields say what is trained, its `lora_*` fields how.

    Returns:
        The model, or a PEFT model around it if any part is trained by LoRA; fully trained modules are then in the
        adapter's `modules_to_save`.

    Raises:
        TrainingError: nothing would be trained, or a quantised language model is to be trained in full.
    """
    modes = {name: getattr(stage, f"train_{name}") for name in TRAINABLE_PARTS}
    quantized = getattr(model, "is_quantized", False)
    if quantized and modes["language_model"] == "full":
        raise TrainingError(
            "train_language_model", "full, on quantised weights", "Train it by lora, or load it unquantised"
        )
    use_task_groups(model, modes["task_groups"] != "off")
    parts = part_of_parameters(model)
    vision = model.config.vision_config
    groups = {"shared_group": vision.num_shared_experts, "task_groups": vision.num_task_experts * vision.num_tasks}
    trained_groups = [name for name, experts in groups.items() if experts and modes[name] == "full"]
    trained = {
        name for name, part in parts.items() if (trained_groups if part == _EXPERTS else modes.get(part) == "full")
    }
    lora = {part for part, mode in modes.items() if mode == "lora"}
    held = {"shared_group": (groups["shared_group"], None), "task_groups": (0, groups["shared_group"])}
    for experts in (module for module in model.modules() if isinstance(module, CTMoEExperts)):
        # First and last row of those that stay as they are.
        experts.held_rows = held[trained_groups[0]] if len(trained_groups) == 1 else None
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():  # not the packed weights of a quantised layer
            parameter.requires_grad_(name in trained)
    if lora:
        model = _with_adapter(model, stage, [name for name, part in parts.items() if part in lora], trained)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainingError("train_*", "every part of this model is frozen", "Train at least one part")
    return model


def use_task_groups(model: CTMoEForConditionalGeneration, active: bool) -> None:
    """Let the task groups take part, or leave them out (`use_task_groups` of the vision config). No weight changes."""
    for config in (model.config.vision_config, model.model.vision_tower.config):
        config.use_task_groups = active


def hold_frozen_experts(model: nn.Module) -> list[RemovableHandle]:
    """Make the gradient of every expert of a frozen group zero.

    All experts of a layer are one tensor, so that one call runs them; in a stage that trains the shared group or the
    task groups only, the other rows of it must stay. Call it when the parameters are the ones that are optimised:
    after FSDP2 has replaced them. Such parameters must have no weight decay either.

    Returns:
        Hooks, to be removed at the end: a later stage of the same model holds other rows.
    """
    hooks = []
    for module in model.modules():
        held = getattr(module, "held_rows", None) if isinstance(module, CTMoEExperts) else None
        if held is None:
            continue
        for parameter in module.parameters():
            if not parameter.requires_grad:
                continue
            shape = _whole_shape(parameter)
            mask = torch.ones(shape[0], *[1] * (len(shape) - 1), device=parameter.device)
            mask[slice(*held)] = 0
            if isinstance(parameter, DTensor):
                # FSDP2 writes the gradient of its shards itself, past the hooks of autograd.
                shard = _local_rows(parameter, mask)
                hook = parameter.register_post_accumulate_grad_hook(
                    lambda parameter, shard=shard: parameter.grad.to_local().mul_(shard)
                )
            else:
                hook = parameter.register_hook(lambda gradient, mask=mask: gradient * mask.to(gradient.dtype))
            hooks.append(hook)
    return hooks


def trained_parts(model: nn.Module, stage: "StageConfig") -> list[TrainedPart]:
    """The table of a prepared model, a row per part in the order of the design; parts that it has not are left out."""
    modes = {name: getattr(stage, f"train_{name}") for name in TRAINABLE_PARTS}
    rows = {name: TrainedPart(name, mode, 0, 0) for name, mode in modes.items()}
    rows |= {name: TrainedPart(name, "frozen", 0, 0) for name in ALWAYS_FROZEN}
    shared = model.config.vision_config.num_shared_experts
    for name, part in part_of_parameters(model).items():
        parameter = model.get_parameter(name)
        shape = _whole_shape(parameter)
        count = shape.numel()
        if "lora_" in name:
            rows[part].lora += count
        elif ".original_module." in name:
            continue  # the frozen copy of a module that the adapter trains
        elif part == _EXPERTS:
            per_expert = count // shape[0]
            for group, experts in (("shared_group", shared), ("task_groups", shape[0] - shared)):
                rows[group].total += experts * per_expert
                rows[group].trained += experts * per_expert * (modes[group] == "full")
        else:
            rows[part].total += count
            rows[part].trained += count * parameter.requires_grad
    return [row for row in rows.values() if row.total]


def format_parts(parts: Iterable[TrainedPart]) -> str:
    """The table as text, to be printed before training."""
    parts = list(parts)
    total = TrainedPart(
        "all", "", sum(p.trained for p in parts), sum(p.total for p in parts), sum(p.lora for p in parts)
    )
    lines = [f"{'part':<18}{'mode':<8}{'trained':>15}{'LoRA':>13}{'frozen':>15}"]
    for part in [*parts, total]:
        name = part.name.replace("_", " ")
        lines.append(f"{name:<18}{part.mode:<8}{part.trained:>15,}{part.lora:>13,}{part.total - part.trained:>15,}")
    return "\n".join(lines)


def part_of_parameters(model: nn.Module) -> dict[str, str]:
    """Part of every parameter by name; `experts` are rows of two parts (shared group, task groups)."""
    volume_layers = set(model.config.vision_config.volume_layers)
    embeddings = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    return {
        name: "input_embeddings" if id(parameter) in embeddings else _part(plain_name(name), volume_layers)
        for name, parameter in model.named_parameters()
    }


def plain_name(name: str) -> str:
    """A parameter's name in the model itself, without what PEFT or torch.compile put into it."""
    return _WRAPPING.sub("", name)


def _part(name: str, volume_layers: set[int]) -> str:
    """The table, read by name: the first pattern that fits."""
    if name.startswith(("model.language_model.", "lm_head.")):
        return "language_model"
    if name.startswith(("model.multi_modal_projector.", "model.volume_projector.", "model.slice_scoring.")):
        return "projector"
    if name.startswith("model.task_router."):
        return "task_router"
    if name.startswith(("model.guide_encoder.", "model.volume_encoder.")) or ".scale_embedding." in name:
        return "shared_group"
    if ".moe." in name:
        parts = {"experts": _EXPERTS, "shared_router": "shared_group", "group_router": "task_groups"}
        return parts[name.partition(".moe.")[2].partition(".")[0]]
    layer = re.match(r"model\.vision_tower\.layers\.(\d+)\.(\w+)", name)
    if layer is None:
        return "other" if ".post_layernorm." in name else "slice_layers"
    if int(layer[1]) not in volume_layers:
        return "slice_layers"
    if layer[2] == "mlp":
        return "ffns"
    return "volume_layers" if layer[2] in ("self_attn", "layer_norm1", "layer_norm2") else "other"


def _with_adapter(
    model: CTMoEForConditionalGeneration, stage: "StageConfig", lora_names: list[str], trained: set[str]
) -> "PeftModel":
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if getattr(model, "is_quantized", False):
        # Casts what is not quantised to float32; checkpointing is the trainer's business.
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(
        r=stage.lora_r,
        lora_alpha=stage.lora_alpha,
        lora_dropout=stage.lora_dropout,
        use_rslora=stage.use_rslora,
        use_dora=stage.use_dora,
        target_modules=_linear_pattern(model, lora_names),
        modules_to_save=sorted(_modules_to_save(model, trained)) or None,
        # No task_type: the wrapper for CAUSAL_LM has an argument `task_ids` of its own and would keep ours.
    )
    # FSDP2 wants one dtype per layer, ZeRO-3 one for all that it gathers at once.
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=not stage.shards_parameters)
    for name, parameter in peft_model.named_parameters():
        if ".modules_to_save." in name:
            parameter.requires_grad_(plain_name(name) in trained)  # a module may hold parameters of a frozen part
    return peft_model


def _linear_pattern(model: nn.Module, names: list[str]) -> str:
    """A pattern of the linear layers among parameters, the numbers of layers in it joined."""
    owners = sorted({name.rpartition(".")[0] for name in names})
    linear = [name for name in owners if isinstance(model.get_submodule(name), nn.Linear) and name != "lm_head"]
    layers: dict[tuple[str, str], list[str]] = {}
    alone = []
    for name in linear:
        match = re.fullmatch(r"(.*\.layers)\.(\d+)\.(.*)", name)
        if match is None:
            alone.append(re.escape(name))
        else:
            layers.setdefault((match[1], match[3]), []).append(match[2])
    by_layers: dict[tuple[str, str], list[str]] = {}
    for (stack, leaf), numbers in layers.items():
        by_layers.setdefault((stack, "|".join(sorted(numbers, key=int))), []).append(leaf)
    joined = [
        rf"{re.escape(stack)}\.({numbers})\.({'|'.join(map(re.escape, leaves))})"
        for (stack, numbers), leaves in by_layers.items()
    ]
    return "|".join([*joined, *alone])


def _modules_to_save(module: nn.Module, trained: set[str], prefix: str = "") -> Iterator[str]:
    """The largest modules that are trained whole, or hold a trained parameter themselves."""
    names = {f"{prefix}{name}" for name, _ in module.named_parameters()}
    if not names & trained:
        return
    own = {f"{prefix}{name}" for name, _ in module.named_parameters(recurse=False)}
    if prefix and not isinstance(module, nn.ModuleList) and (names <= trained or own & trained):
        yield prefix.rstrip(".")
        return
    for name, child in module.named_children():
        yield from _modules_to_save(child, trained, f"{prefix}{name}.")


def _whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of a tensor that may be packed (quantised, two numbers to a byte) or spread over processes (ZeRO-3)."""
    quantized = getattr(parameter, "quant_state", None)
    return getattr(parameter, "ds_shape", parameter.shape) if quantized is None else quantized.shape


def _local_rows(parameter: DTensor, mask: torch.Tensor) -> torch.Tensor:
    """The part of a mask over the first axis that belongs to this process's shard."""
    full = mask.expand(parameter.shape).contiguous()
    return distribute_tensor(full, parameter.device_mesh, parameter.placements).to_local()
