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
"""Defaults of design section 2.6, what follows from them, and what is refused when it is set."""

import pytest
from tiny_model import tiny_config
from transformers import LlamaConfig

from ct_moe.configuration_ct_moe import CTMoEConfig, CTMoEVisionConfig
from ct_moe.errors_ct_moe import ModelError


def test_defaults_are_those_of_the_design():
    config = CTMoEConfig()
    vision = config.vision_config
    assert (config.tasks, config.pool) == (["report", "vqa_closed", "vqa_open"], [2, 2, 2])
    assert (config.slice_scoring, config.format_version) == ("none", 1)
    assert (config.router_balance_coef, config.router_z_coef, config.task_coef) == (0.01, 0.001, 0.1)
    assert (vision.depth_rotary_fraction, vision.depth_wavelengths_mm) == (0.5, [40.0, 2000.0])
    assert (vision.num_experts, vision.num_experts_per_tok, vision.norm_topk_prob) == (4, 1, False)
    assert vision.moe_intermediate_size == vision.hidden_size // 4
    assert (vision.shared_group, vision.guide_interaction, vision.guide_size) == (True, "film", 256)
    assert vision.router_jitter == 0.01


@pytest.mark.parametrize(
    ("feature_layer", "read", "volume_layers", "moe_layers"),
    [
        (-2, 23, range(11, 23), [12, 14, 16, 18, 20, 22]),  # CLIP ViT-L in LLaVA: the last of 24 is never read
        (-1, 24, range(12, 24), [13, 15, 17, 19, 21, 23]),
        (12, 12, range(6, 12), [7, 9, 11]),
        (-24, 1, [0], [0]),
        (2, 2, [1], [1]),
    ],
)
def test_the_upper_half_counts_the_layers_that_are_read(feature_layer, read, volume_layers, moe_layers):
    config = CTMoEVisionConfig(feature_layer=feature_layer)
    assert config.num_read_layers == read
    assert config.volume_layers == list(volume_layers)
    assert config.moe_layers == moe_layers


def test_a_chosen_set_of_layers_is_kept():
    config = CTMoEVisionConfig(volume_layers=[3, 5, 22], moe_layers=[5])
    assert (config.volume_layers, config.moe_layers) == ([3, 5, 22], [5])
    assert CTMoEVisionConfig(volume_layers=[3, 5, 22]).moe_layers == [5]
    assert CTMoEVisionConfig(volume_layers=[]).moe_layers == []
    assert CTMoEVisionConfig(moe_layers=[]).moe_layers == []


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("feature_layer", {"feature_layer": -25}),
        ("feature_layer", {"feature_layer": 25}),
        ("feature_layer", {"feature_layer": 0}),
        ("volume_layers", {"volume_layers": [22, 23]}),  # layer 23 is not read at feature layer -2
        ("volume_layers", {"volume_layers": [5, 3]}),
        ("volume_layers", {"volume_layers": [3, 3]}),
        ("volume_layers", {"volume_layers": [-1]}),
        ("moe_layers", {"moe_layers": [10]}),  # a slice layer
        ("moe_layers", {"volume_layers": [], "moe_layers": [12]}),
        ("hidden_size", {"hidden_size": 1020}),
        ("depth_rotary_fraction", {"depth_rotary_fraction": 1.1}),
        ("depth_wavelengths_mm", {"depth_wavelengths_mm": (2000, 40)}),
        ("depth_wavelengths_mm", {"depth_wavelengths_mm": (0, 40)}),
        ("depth_wavelengths_mm", {"depth_wavelengths_mm": [40]}),
        ("num_experts", {"num_experts": 0}),
        ("num_experts", {"num_task_experts": 0}),
        ("num_experts", {"num_experts_per_tok": 0}),
        ("num_experts_per_tok", {"num_experts_per_tok": 5}),
        ("num_experts_per_tok", {"num_experts_per_tok": 3, "num_task_experts": 2}),
        ("norm_topk_prob", {"norm_topk_prob": True}),
        ("router_jitter", {"router_jitter": 1}),
    ],
    ids=str,
)
def test_what_cannot_be_built_is_refused_by_name(field, fields):
    with pytest.raises(ModelError, match=rf"^{field}: "):
        CTMoEVisionConfig(**fields)


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("tasks", {"tasks": ["report", "report"]}),
        ("pool", {"pool": (2, 2)}),
        ("pool", {"pool": (2, 0, 2)}),
        ("tgis_alpha", {"tgis_alpha": 1.5}),
        ("tgis_temperature", {"tgis_temperature": 0}),
        ("volume_encoder_config", {"volume_encoder_config": {}}),
        ("volume_encoder_config", {"slice_scoring": "tgis", "volume_encoder_config": {"pool": [2, 2]}}),
        ("volume_encoder_config", {"slice_scoring": "tgis", "volume_encoder_config": {"hidden_size": 100}}),
        ("volume_encoder_config", {"slice_scoring": "tgis", "volume_encoder_config": {"num_slices": 2}}),
        ("volume_layers", {"slice_scoring": "tgis", "volume_encoder_config": {}}),
        ("config.json", {"format_version": 2}),
        ("shared_group", {"tasks": [], "vision_config": {"shared_group": False}}),
    ],
    ids=str,
)
def test_a_whole_model_that_cannot_be_built_is_refused_by_name(field, fields):
    with pytest.raises(ModelError, match=rf"^{field}: "):
        CTMoEConfig(**fields)


def test_one_expert_per_group_takes_any_number_per_token():
    """A group of one has no router: its weight is 1, whatever the others take."""
    config = CTMoEVisionConfig(num_experts=1, num_task_experts=4, num_experts_per_tok=2)
    assert (config.num_experts, config.num_task_experts) == (1, 4)
    assert CTMoEVisionConfig(num_experts=1, num_experts_per_tok=2).num_task_experts == 1


def test_whole_numbers_stand_for_fractions_too():
    config = tiny_config(
        {"depth_rotary_fraction": 1, "router_jitter": 0, "depth_wavelengths_mm": [40, 2000]}, task_coef=0
    )
    assert config.vision_config.depth_rotary_dim == 16
    assert config.vision_config.depth_wavelengths_mm == [40.0, 2000.0]


def test_the_tasks_of_the_model_are_the_groups_of_its_encoder():
    assert tiny_config(tasks=["report", "vqa"]).vision_config.num_tasks == 2
    assert tiny_config(tasks=[]).vision_config.num_tasks == 0
    config = tiny_config(tasks=["report"])
    assert CTMoEConfig(**{**config.to_dict(), "tasks": ["a", "b", "c", "d"]}).vision_config.num_tasks == 4


def test_tied_embeddings_of_the_language_model_are_those_of_the_model():
    assert not CTMoEConfig().tie_word_embeddings
    assert CTMoEConfig(text_config=LlamaConfig(tie_word_embeddings=True)).tie_word_embeddings


def test_every_auto_class_is_named_with_its_file():
    assert {
        name: CTMoEConfig().auto_map[name] for name in ("AutoConfig", "AutoModel", "AutoModelForImageTextToText")
    } == {
        "AutoConfig": "configuration_ct_moe.CTMoEConfig",
        "AutoModel": "modeling_ct_moe.CTMoEForConditionalGeneration",
        "AutoModelForImageTextToText": "modeling_ct_moe.CTMoEForConditionalGeneration",
    }
