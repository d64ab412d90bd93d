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
"""The published weights of a second, 3D encoder: the ViT of M3D-CLIP (arXiv 2404.00578), which is MONAI's.

- `open_volume_encoder`: a folder or Hub id -> `EncoderSource`, refused by name if it is of another kind.
- `add_encoder_config`: the settings of a conversion and what the weights determine of them.
- `read_volume_encoder`: every tensor of the files accounted for -> the weights of `CTMoEVolumeEncoder`.
- `VolumeEncoderReport`: what was reused, and what is not read.

M3D-CLIP sees one channel u in [0, 1], CT-MoE three, x_c = (u_c - mean_c) / std_c with the base's mean and std. Its
patch embedding W u + b becomes that of u = mean_c(u_c), folded in float32:

    W_c = W std_c / 3        b' = b + sum_taps(W) mean_c(mean_c)

Equal channels give the published embedding, and three windows the mean of theirs. The fold belongs to the image
processor that is written beside it. All else is copied.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open

from ct_moe import ConversionError, CTMoEVolumeEncoderConfig

from .base_model import FileTensor, TensorCount, one_line, open_source, read_config_json, read_index


SUPPORTED = 'M3D-CLIP (model_type m3d_clip): a 3D ViT of MONAI with one input channel and pos_embed "perceptron"'

# What MONAI's ViT leaves no choice about; the channels are those after the fold.
_CONSTANTS = {
    "num_channels": 3,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "attention_bias": False,
    "qk_norm": False,
    "class_token": True,
}
_UNREAD_RULES = [
    (r"language_encoder\..+", "text encoder: the prompt is read by the base's language model"),
    (r"(mm_(vision|language)_proj\..+|logit_scale)", "contrastive head: features are read before it"),
    (r"vision_encoder\.norm\..+", "last norm: features are read before it (post_layernorm=False)"),
    (
        r"vision_encoder\.blocks\.\d+\.(norm_)?cross_attn\..+",
        "cross-attention: some versions of MONAI save it, its ViT never runs it",
    ),
]


class EncoderSource(NamedTuple):
    """An encoder of the supported kind. `commit` is None for a folder; `fields`: those of `CTMoEVolumeEncoderConfig`
    that its weights determine."""

    name: str
    commit: str | None
    folder: Path
    fields: dict[str, Any]


@dataclass(frozen=True)
class VolumeEncoderReport:
    """What became of an encoder, counted by the keys of its files; fields as in `ConversionReport`."""

    encoder: str
    revision: str | None
    reused: TensorCount
    unread: TensorCount
    unread_names: dict[str, str]

    def __str__(self) -> str:
        lines = [
            f"  3D encoder {self.encoder}{f' at {self.revision}' if self.revision else ''}",
            f"    reused {self.reused}",
            f"    unread {self.unread}",
            *(f"      {count:>3} {reason}" for reason, count in Counter(self.unread_names.values()).items()),
        ]
        return "\n".join(lines)


def open_volume_encoder(encoder: str | Path, revision: str | None = None) -> EncoderSource:
    """Find a folder in M3D-CLIP's format, or download it from the Hub: config and safetensors only."""
    return EncoderSource(*open_source(encoder, revision, _read_fields, ["*.json"]))


def add_encoder_config(overrides: dict[str, Any], source: EncoderSource) -> dict[str, Any]:
    """The overrides of a conversion, with a `volume_encoder_config` that fits the encoder's weights."""
    given = overrides.get("volume_encoder_config") or {}
    given = given.to_dict() if isinstance(given, CTMoEVolumeEncoderConfig) else given
    if not isinstance(given, dict):
        raise ConversionError("volume_encoder_config", f"{given!r} is not a JSON object", "Leave it out")
    for name, value in source.fields.items():
        found = given.get(name, value)
        if (list(found) if isinstance(found, tuple) else found) != value:
            raise ConversionError(
                "volume_encoder_config",
                f"{name} is {found!r}, and {value!r} with the weights of {source.name}",
                f"Leave out {name}, or the weights",
            )
    return {**overrides, "volume_encoder_config": {**given, **source.fields}}


def read_volume_encoder(
    source: EncoderSource,
    config: CTMoEVolumeEncoderConfig,
    image_mean: Sequence[float],
    image_std: Sequence[float],
) -> tuple[dict[str, torch.Tensor], VolumeEncoderReport]:
    """The state dict of a `CTMoEVolumeEncoder` in the dtype of the files (the fold in float32), and the report.

    `config` is what `add_encoder_config` led to; `image_mean` and `image_std` of the three channels are those of the
    image processor that will prepare its `pixel_values`.
    """
    tensors, layout = read_index(source.folder), _layout(config)
    unread = _check_tensors(tensors, layout, source.name)
    weights = {}
    for key, (target, _) in layout.items():
        with safe_open(tensors[key].file, "pt") as file:
            tensor = file.get_tensor(key)
        if "qkv" in key:
            # Queries, keys, values, each head by head as ours. Cloned: tensors that share memory would not be saved.
            for part, rows in zip("qkv", tensor.chunk(3)):
                weights[target.format(part)] = rows.clone()
        else:
            weights[target] = tensor
    for name, shape in {
        "class_embedding": (config.hidden_size,),
        "position_embedding": (*config.grid_size, config.hidden_size),  # flat in z, y, x order
        "patch_embedding.weight": (config.hidden_size, 1, *config.patch_size),  # likewise
    }.items():
        weights[f"embeddings.{name}"] = weights[f"embeddings.{name}"].reshape(shape)
    _fold_normalisation(weights, torch.tensor(image_mean), torch.tensor(image_std))

    report = VolumeEncoderReport(
        encoder=source.name,
        revision=source.commit,
        reused=sum((tensors[key].count for key in layout), start=TensorCount()),
        unread=sum((tensors[key].count for key in unread), start=TensorCount()),
        unread_names=unread,
    )
    return weights, report


def _read_fields(encoder: str | Path, folder: Path) -> dict[str, Any]:
    raw = read_config_json(encoder, folder)
    kinds = {
        "model_type": (raw.get("model_type"), "m3d_clip"),
        "in_channels": (raw.get("in_channels", 1), 1),
        "spatial_dims": (raw.get("spatial_dims", 3), 3),
        "pos_embed": (raw.get("pos_embed", "perceptron"), "perceptron"),
    }
    for name, (found, supported) in kinds.items():
        if found != supported:
            raise ConversionError(encoder, f"{name} {found!r} is not supported", f"Supported: {SUPPORTED}")
    try:
        num_slices, rows, columns = raw.get("img_size", [32, 256, 256])
        fields = {
            "hidden_size": raw.get("hidden_size", 768),
            "intermediate_size": raw.get("mlp_dim", 3072),
            "num_hidden_layers": raw.get("num_layers", 12),
            "num_attention_heads": raw.get("num_heads", 12),
            "num_slices": num_slices,
            "image_size": rows,
            "patch_size": raw.get("patch_size", [4, 16, 16]),
            **_CONSTANTS,
        }
        CTMoEVolumeEncoderConfig(**fields)
    except (StrictDataclassError, ValueError, TypeError, ArithmeticError) as error:
        raise ConversionError(
            folder / "config.json", f"not the config of an encoder: {one_line(error)}", "Download it again"
        ) from error
    if rows != columns:
        raise ConversionError(encoder, f"slices of {rows} x {columns} are not supported", "Name one for square slices")
    return fields


def _layout(config: CTMoEVolumeEncoderConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names in the files -> names here, and shapes in the files."""
    width, inner = config.hidden_size, config.intermediate_size
    layout = {
        "cls_token": ("embeddings.class_embedding", (1, 1, width)),
        "patch_embedding.position_embeddings": (
            "embeddings.position_embedding",
            (1, math.prod(config.grid_size), width),
        ),
    }
    modules = {
        "patch_embedding.patch_embeddings.1": ("embeddings.patch_embedding", (width, math.prod(config.patch_size)))
    }
    for index in range(config.num_hidden_layers):
        block, layer = f"blocks.{index}", f"layers.{index}"
        layout[f"{block}.attn.qkv.weight"] = (f"{layer}.self_attn.{{}}_proj.weight", (3 * width, width))
        modules |= {
            f"{block}.norm1": (f"{layer}.layer_norm1", (width,)),
            f"{block}.attn.out_proj": (f"{layer}.self_attn.out_proj", (width, width)),
            f"{block}.norm2": (f"{layer}.layer_norm2", (width,)),
            f"{block}.mlp.linear1": (f"{layer}.mlp.fc1", (inner, width)),
            f"{block}.mlp.linear2": (f"{layer}.mlp.fc2", (width, inner)),
        }
    if config.post_layernorm:
        modules["norm"] = ("post_layernorm", (width,))
    for name, (to, shape) in modules.items():
        layout |= {f"{name}.weight": (f"{to}.weight", shape), f"{name}.bias": (f"{to}.bias", shape[:1])}
    return {f"vision_encoder.{name}": place for name, place in layout.items()}


def _check_tensors(
    tensors: dict[str, FileTensor], layout: dict[str, tuple[str, tuple[int, ...]]], encoder: str
) -> dict[str, str]:
    """Every tensor of the layout is there in its shape; all others, each with the reason why it is not read."""
    for key, (_, shape) in layout.items():
        if key not in tensors:
            raise ConversionError(key, f"missing in {encoder}", "The encoder is incomplete: download it again")
        if tensors[key].shape != shape:
            raise ConversionError(
                key,
                f"shape {list(tensors[key].shape)} in the files of {encoder}, {list(shape)} by its config",
                "Files and config do not belong together: download the encoder again",
            )
    unread = {}
    for key in (key for key in tensors if key not in layout):
        reason = next((reason for pattern, reason in _UNREAD_RULES if re.fullmatch(pattern, key)), None)
        if reason is None:
            raise ConversionError(key, f"a tensor of {encoder} without a place here", f"Supported: {SUPPORTED}")
        unread[key] = reason
    return unread


def _fold_normalisation(weights: dict[str, torch.Tensor], mean: torch.Tensor, std: torch.Tensor) -> None:
    """From one channel in [0, 1] to three normalised ones, in place: the equations above."""
    weight, bias = (weights[f"embeddings.patch_embedding.{name}"].float() for name in ("weight", "bias"))
    weights["embeddings.patch_embedding.bias"] = bias + weight.sum(dim=(1, 2, 3, 4)) * mean.mean()
    weights["embeddings.patch_embedding.weight"] = weight * std.view(3, 1, 1, 1) / 3
