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
"""Phi-3-V, the base of arXiv 2604.10233: CLIP, 2 x 2 patches stacked, separators of rows and views, Phi-3.

The library has no class for it, and its own code is remote and old: its layout is written down here, and its forward
pass put together from the library's CLIP and Phi-3. An image is seen twice, in tiles and as a whole: a slice of the
tower's own size is one tile, and both views are the same.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlavaConfig, Phi3Config, Phi3ForCausalLM

from ct_moe import ConversionError

from .family import Family, Rule


_PREFIX = "model.vision_embed_tokens."
_TOWER = f"{_PREFIX}img_processor.vision_model."
_IMAGE_TOKEN = "<|image|>"
_HEAD_DIM = 64  # of CLIP
_VIT_LARGE = {  # openai/clip-vit-large-patch14-336, the tower of the published checkpoints
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


def read_config(folder: Path, raw: dict[str, Any]) -> LlavaConfig:
    """As of a LLaVA. The published config has only the name of the tower: its sizes are read off its tensors."""
    own = {"model_type", "embd_layer", "img_processor", "architectures", "auto_map", "transformers_version"}
    fields = {name: value for name, value in raw.items() if name not in own}
    if raw.get("rope_scaling"):
        # Published as "su": the library renames it, but only after filling in what longrope needs.
        fields["rope_scaling"] = {**raw["rope_scaling"], "type": "longrope", "rope_type": "longrope"}
    text = Phi3Config(**fields)
    config = LlavaConfig(
        vision_config=_vision_config(folder),
        text_config=text,
        image_token_index=_image_token_id(folder),
        vision_feature_layer=(raw.get("img_processor") or {}).get("layer_idx", -2),
        tie_word_embeddings=text.tie_word_embeddings,
    )
    config.model_type = "phi3_v"
    return config


def run_base(folder: Path, config: LlavaConfig, dtype: torch.dtype, input_ids, pixels, *_) -> torch.Tensor:
    """Logits of the published forward pass for one image of the tower's own size: tile, separator, whole."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            tensors |= {name: weights.get_tensor(name).to(dtype).float() for name in weights.keys()}
    tower, model = CLIPVisionModel(config.vision_config), Phi3ForCausalLM(config.text_config)
    named = {name.removeprefix(_TOWER): tensor for name, tensor in tensors.items() if name.startswith(_TOWER)}
    inside = "vision_model." if any(name.startswith("vision_model.") for name in tower.state_dict()) else ""
    tower.load_state_dict({inside + name: tensor for name, tensor in named.items() if "position_ids" not in name})
    text = {name: tensor for name, tensor in tensors.items() if not name.startswith(_PREFIX)}
    model.load_state_dict(text, strict=not config.tie_word_embeddings)
    tower.eval(), model.eval()

    features = tower(pixels, output_hidden_states=True).hidden_states[config.vision_feature_layer][0, 1:]
    side, width = int(len(features) ** 0.5) // 2, features.shape[-1]
    blocks = features.view(side, 2, side, 2, width).transpose(1, 2).reshape(side, side, 4 * width)
    rows = [torch.cat([row, tensors[f"{_PREFIX}sub_GN"].view(1, -1)]) for row in blocks]
    image = torch.cat(rows)
    image = torch.cat([image, tensors[f"{_PREFIX}glb_GN"].view(1, -1), image])
    for number in (0, 2):
        layer = f"{_PREFIX}img_projection.{number}."
        image = nn.functional.linear(image, tensors[f"{layer}weight"], tensors[f"{layer}bias"])
        image = nn.functional.gelu(image) if number == 0 else image
    embeds = model.get_input_embeddings()(input_ids)
    embeds = embeds.masked_scatter((input_ids == config.image_token_id).unsqueeze(-1), image)
    return model(inputs_embeds=embeds).logits


def _refuse(raw: dict[str, Any]):
    layers = raw.get("embd_layer") or {}
    for name, expected in (
        ("use_hd_transform", True),
        ("with_learnable_separator", True),
        ("hd_transform_order", "sub_glb"),
        ("projection_cls", "mlp"),
    ):
        if layers.get(name, expected) != expected:
            yield name, layers[name]


def _vision_config(folder: Path) -> CLIPVisionConfig:
    if not any(folder.glob("*.safetensors")):  # not downloaded yet; the plan compares every shape later
        return CLIPVisionConfig(**_VIT_LARGE)
    shapes = _tower_shapes(folder)
    width, channels, patch, _ = shapes["embeddings.patch_embedding.weight"]
    places = shapes["embeddings.position_embedding.weight"][0]
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=shapes["encoder.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("encoder.layers.")),
        num_attention_heads=width // _HEAD_DIM,
        num_channels=channels,
        patch_size=patch,
        image_size=patch * int((places - 1) ** 0.5),
    )


def _tower_shapes(folder: Path) -> dict[str, list[int]]:
    shapes = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():
                if name.startswith(_TOWER):
                    shapes[name.removeprefix(_TOWER)] = weights.get_slice(name).get_shape()
    needed = [f"embeddings.{part}_embedding.weight" for part in ("patch", "position")]
    for name in [*needed, "encoder.layers.0.mlp.fc1.weight"]:
        if name not in shapes:
            raise ConversionError(f"{_TOWER}{name}", "in none of the base's files", "Download the base again")
    return shapes


def _image_token_id(folder: Path) -> int:
    file = folder / "tokenizer.json"
    added = json.loads(file.read_text(encoding="utf-8")).get("added_tokens", []) if file.is_file() else []
    for token in added:
        if token["content"] == _IMAGE_TOKEN:
            return token["id"]
    raise ConversionError(file, f"has no token {_IMAGE_TOKEN}", "Add the tokenizer.json of the published base")


PHI3_V = Family(
    model_type="phi3_v",
    name="Phi-3-V",
    towers=("clip_vision_model",),
    text_types=("phi3",),
    settings=lambda config: {
        "projector_hidden_act": "gelu",
        "merge_size": 2,
        "merge_mode": "stack",
        "separators": "rows",
    },
    vision=lambda config: {"feature_layer": config.vision_feature_layer},
    rules=[
        Rule(r"model\.vision_embed_tokens\.img_projection\.0\.(.+)", r"model.multi_modal_projector.linear_1.\1"),
        Rule(r"model\.vision_embed_tokens\.img_projection\.2\.(.+)", r"model.multi_modal_projector.linear_2.\1"),
        Rule(r"model\.vision_embed_tokens\.sub_GN", "model.row_token", "squeeze"),
        Rule(r"model\.vision_embed_tokens\.glb_GN", "model.view_token", "squeeze"),
    ],
    unread=[(r"model\.vision_embed_tokens\.wte\.weight", "a second name of the input embeddings")],
    text_rules=(
        Rule(r"lm_head\.weight", "lm_head.weight"),
        Rule(r"model\.((?:embed_tokens|layers|norm)\..+)", r"model.language_model.\1"),
    ),
    tower_prefix=r"model\.vision_embed_tokens\.img_processor\.vision_model\.",
    refuse=_refuse,
    read_config=read_config,
    run_base=run_base,
    image_tokens=(_IMAGE_TOKEN,),
    special="2 x 2 patches stacked, a separator behind every row, and an overview of the volume behind it",
    checkpoints=("microsoft/Phi-3-vision-128k-instruct", "microsoft/Phi-3.5-vision-instruct"),
)
