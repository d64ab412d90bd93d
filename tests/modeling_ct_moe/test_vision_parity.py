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
"""One slice through the vision encoder gives what the base's own class in transformers gives, for every kind of ViT.

Every field that tells ViTs apart is on and off in some row of the table, so a field that did nothing would fail.
"""

import re

import pytest
import torch
from tiny_model import randomise
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    InternVLVisionConfig,
    InternVLVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from ct_moe.configuration_ct_moe import CTMoEVisionConfig
from ct_moe.modeling_ct_moe import CTMoEVisionModel


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
IMAGE = {"image_size": 12, "patch_size": 4}
# A feature layer reads hidden_states of that number; None reads last_hidden_state.
CLIP = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
SIGLIP = {
    "class_token": False,
    "patch_bias": True,
    "pre_layernorm": False,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
INTERNVIT = {
    "patch_bias": True,
    "pre_layernorm": False,
    "use_layer_scale": True,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
}
INTERNVIT_6B = {**INTERNVIT, "norm_type": "rms_norm", "qk_norm": True, "attention_bias": False}
INTERNVIT_6B_BASE = {"norm_type": "rms_norm", "use_qk_norm": True}

# Name -> base, its own fields, ours, the hidden state it is read at.
CASES = {
    "CLIP, second to last layer": ("clip", {}, {**CLIP, "feature_layer": -2}, -2),
    "CLIP, last layer": ("clip", {}, {**CLIP, "feature_layer": -1}, -1),
    "CLIP, counted from below": ("clip", {}, {**CLIP, "feature_layer": 1}, 1),
    "CLIP, exact GELU": ("clip", {"hidden_act": "gelu"}, {**CLIP, "hidden_act": "gelu", "feature_layer": -2}, -2),
    "SigLIP, second to last layer": ("siglip", {}, {**SIGLIP, "feature_layer": -2}, -2),
    "SigLIP, after its last norm": ("siglip", {}, {**SIGLIP, "feature_layer": -1, "post_layernorm": True}, None),
    "InternViT-300M": (
        "internvl",
        {"attention_bias": True, "use_mean_pooling": True},
        {**INTERNVIT, "feature_layer": -1},
        None,
    ),
    "InternViT, query and key norms only": (
        "internvl",
        {"attention_bias": True, "use_qk_norm": True},
        {**INTERNVIT, "qk_norm": True, "feature_layer": -1},
        -1,
    ),
    "InternViT-6B": ("internvl", INTERNVIT_6B_BASE, {**INTERNVIT_6B, "feature_layer": -1}, -1),
    "InternViT-6B, after a last norm": (
        "internvl",
        {**INTERNVIT_6B_BASE, "use_mean_pooling": False},
        {**INTERNVIT_6B, "feature_layer": -1, "post_layernorm": True},
        None,
    ),
}
BASES = {
    "clip": (CLIPVisionConfig, CLIPVisionModel),
    "siglip": (SiglipVisionConfig, SiglipVisionModel),
    "internvl": (InternVLVisionConfig, InternVLVisionModel),
}
NAMES = (  # base's name -> ours
    (r"^encoder\.layers?\.", "layers."),
    (r"pre_layrnorm", "pre_layernorm"),
    (r"^layernorm", "post_layernorm"),
    (r"cls_token", "class_embedding"),
    (r"position_embeddings$", "position_embedding.weight"),
    (r"patch_embeddings\.projection", "patch_embedding"),
    (r"\.attention\.projection_layer", ".self_attn.out_proj"),
    (r"\.attention\.", ".self_attn."),
    (r"layernorm_before", "layer_norm1"),
    (r"layernorm_after", "layer_norm2"),
    (r"lambda_([12])", r"layer_scale\1"),
)
OURS_ALONE = r"\.moe\.|scale_embedding"


def base_model(kind: str, fields: dict) -> torch.nn.Module:
    config_class, model_class = BASES[kind]
    image = {name: [value, value] for name, value in IMAGE.items()} if kind == "internvl" else IMAGE
    fields = {"vision_use_head": False, **fields} if kind == "siglip" else fields
    torch.manual_seed(0)
    return randomise(model_class(config_class(**SIZES, **image, **fields))).eval()


def our_model(base: torch.nn.Module, fields: dict) -> CTMoEVisionModel:
    """With the base's weights; only what the base never reads at this feature layer may be left over."""
    model = CTMoEVisionModel(CTMoEVisionConfig(**SIZES, **IMAGE, num_tasks=2, **fields)).eval()
    own = model.state_dict()
    state, left = {}, set()
    for name, value in base.state_dict().items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        if name in own:
            state[name] = value.reshape(own[name].shape)
        else:
            left.add(name)
    read = model.config.num_read_layers
    unread_layers = tuple(f"layers.{i}." for i in range(read, 4))
    assert all(name.startswith((*unread_layers, "post_layernorm")) for name in left), left
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert unexpected == []
    assert all(re.search(OURS_ALONE, name) for name in missing), missing
    return model


@pytest.mark.parametrize(("kind", "base_fields", "our_fields", "hidden_state"), CASES.values(), ids=CASES)
@torch.no_grad()
def test_one_slice_equals_the_base(kind, base_fields, our_fields, hidden_state):
    base = base_model(kind, base_fields)
    model = our_model(base, our_fields)
    pixel_values = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    outputs = base(pixel_values, output_hidden_states=True)
    expected = outputs.last_hidden_state if hidden_state is None else outputs.hidden_states[hidden_state]
    scale = {"volume_scale": torch.randn(3, 2)}  # its embedding is zero until trained
    features = model(pixel_values.unsqueeze(1), **scale, output_hidden_states=True)
    torch.testing.assert_close(features.last_hidden_state.squeeze(1), expected, rtol=0, atol=1e-5)
    assert expected.abs().max() > 0.5
    # Layer for layer as well, where slices are volumes of one.
    assert len(features.hidden_states) == model.config.num_read_layers + 1
    for ours, theirs in zip(features.hidden_states, outputs.hidden_states):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@torch.no_grad()
def test_slice_layers_see_the_slices_of_a_volume_one_by_one():
    """Without volume layers a volume of three slices is three images to the base."""
    base = base_model("clip", {})
    model = our_model(base, {**CLIP, "feature_layer": -1, "volume_layers": []})
    pixel_values = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([[0, 5_000, 10_000]], dtype=torch.int32)
    features = model(pixel_values.unsqueeze(0), slice_positions=positions).last_hidden_state.squeeze(0)
    torch.testing.assert_close(features, base(pixel_values).last_hidden_state, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"),
        ("layer_norm_eps", 1e-1),
        ("feature_layer", -1),
        ("patch_bias", False),
        ("norm_type", "layer_norm"),
        ("qk_norm", False),
        ("use_layer_scale", False),
        ("attention_bias", False),
        ("pre_layernorm", False),
        ("class_token", False),
        ("post_layernorm", False),
    ],
)
@torch.no_grad()
def test_no_field_is_without_effect(field, value):
    """A wrong value either leaves tensors of the base without a place or changes the result."""
    kind, base_fields, our_fields, hidden_state = {
        "patch_bias": CASES["InternViT-6B"],
        "norm_type": CASES["InternViT-6B"],
        "qk_norm": CASES["InternViT-6B"],
        "use_layer_scale": CASES["InternViT-6B"],
        "attention_bias": CASES["InternViT-300M"],
        "post_layernorm": CASES["SigLIP, after its last norm"],
    }.get(field, CASES["CLIP, second to last layer"])
    base = base_model(kind, base_fields)
    assert our_fields.get(field, getattr(CTMoEVisionConfig(), field)) != value
    try:
        model = our_model(base, {**our_fields, field: value})
    except (AssertionError, RuntimeError):
        return
    pixel_values = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    outputs = base(pixel_values, output_hidden_states=True)
    expected = outputs.last_hidden_state if hidden_state is None else outputs.hidden_states[hidden_state]
    found = model(pixel_values.unsqueeze(1)).last_hidden_state.squeeze(1)
    assert not torch.allclose(found, expected, rtol=0, atol=1e-4)
