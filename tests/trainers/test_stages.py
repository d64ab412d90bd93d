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
"""The table of stages: exactly the parameters that a stage trains change, bit for bit."""

import pytest
import torch

from ct_moe import CTMoEForConditionalGeneration, TrainingError
from ct_moe.trainers import (
    CTMoESFTTrainer,
    Stage1Config,
    Stage2Config,
    format_parts,
    prepare_stage,
    trained_parts,
)
from ct_moe.trainers.stages import part_of_parameters, plain_name


# The table of design section 4, written by hand: what changes in each stage.
STAGES = {
    "stage 1": (Stage1Config, {"volume_layers", "shared_group", "task_router", "projector", "language_model"}),
    "stage 2": (Stage2Config, {"task_router", "task_groups", "projector", "language_model"}),
}


def expected_part(name: str) -> str:
    """Part of a tensor of the tiny model, told anew: its volume layers are 1 and 2, its MoE layer is 2."""
    if "embed_tokens" in name:
        return "input_embeddings"
    if "language_model" in name or "lm_head" in name:
        return "language_model"
    if "projector" in name or "slice_scoring" in name:
        return "projector"
    if "task_router" in name:
        return "task_router"
    if "guide_encoder" in name or "scale_embedding" in name or "shared_router" in name:
        return "shared_group"
    if "group_router" in name:
        return "task_groups"
    if "experts" in name:
        return "experts"
    if "layers.1." in name or "layers.2." in name:
        return "ffns" if "mlp" in name else "volume_layers"
    return "slice_layers"


def train(model, processor, rows, stage):
    """The trained tensors by plain name, LoRA merged, and the prepared model."""
    prepared = prepare_stage(model, stage)
    trainer = CTMoESFTTrainer(model=prepared, args=stage, train_dataset=rows, processing_class=processor)
    trainer.train()
    merged = prepared.merge_and_unload() if hasattr(prepared, "merge_and_unload") else prepared
    return {name: parameter.detach().clone() for name, parameter in merged.named_parameters()}


def changed_parts(before: dict, after: dict, num_shared: int) -> tuple[set[str], set[str]]:
    """Parts with a tensor that changed, and parts with one that did not; experts by their rows."""
    changed, same = set(), set()

    def note(part, old, new):
        (same if torch.equal(old, new) else changed).add(part)

    assert before.keys() == after.keys()
    for name, old in before.items():
        part = expected_part(name)
        if part == "experts":
            note("shared_group", old[:num_shared], after[name][:num_shared])
            note("task_groups", old[num_shared:], after[name][num_shared:])
        else:
            note(part, old, after[name])
    return changed, same


@pytest.mark.parametrize("language_model", ["lora", "full"])
@pytest.mark.parametrize("stage_name", STAGES)
def test_a_stage_changes_exactly_its_parts(trained_model, rows, settings, stage_name, language_model):
    model, processor = trained_model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    config, trained = STAGES[stage_name]
    stage = config(**settings, train_language_model=language_model, weight_decay=0.1)
    after = train(model, processor, rows, stage)

    changed, same = changed_parts(before, after, model.config.vision_config.num_shared_experts)
    assert changed == trained
    # LoRA is on the linear layers of the language model only.
    assert same & trained == ({"language_model"} if language_model == "lora" else set())
    lora = {name for name in before if ".language_model.layers." in name and before[name].ndim == 2}
    if language_model == "lora":
        kept = {name for name in before if expected_part(name) == "language_model" and name not in lora}
        assert all(torch.equal(before[name], after[name]) for name in kept)
        assert not any(torch.equal(before[name], after[name]) for name in lora)


def test_the_same_model_in_memory_goes_through_both_stages(trained_model, rows, settings):
    model, processor = trained_model
    shared = model.config.vision_config.num_shared_experts
    tensors = [{name: parameter.detach().clone() for name, parameter in model.named_parameters()}]
    for config, _ in STAGES.values():
        tensors.append(train(model, processor, rows, config(**settings, train_language_model="full")))
    for before, after, (_, trained) in zip(tensors, tensors[1:], STAGES.values()):
        changed, same = changed_parts(before, after, shared)
        assert changed == trained
        assert not same & trained


@pytest.mark.parametrize(
    ("part", "mode", "expected"),
    [
        ("slice_layers", "full", {"slice_layers"}),
        ("slice_layers", "lora", {"slice_layers"}),
        ("volume_layers", "lora", {"volume_layers"}),
        ("volume_layers", "full", {"volume_layers"}),
        ("ffns", "lora", {"ffns"}),
        ("ffns", "full", {"ffns"}),
        ("shared_group", "full", {"shared_group"}),
        ("task_router", "full", {"task_router"}),
        ("task_groups", "full", {"task_groups"}),
        ("projector", "full", {"projector"}),
        ("language_model", "full", {"language_model"}),
        ("language_model", "lora", {"language_model"}),
    ],
)
def test_every_row_of_the_table_can_be_trained_alone(trained_model, rows, settings, part, mode, expected):
    model, processor = trained_model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    frozen = dict.fromkeys(["task_router", "projector", "language_model"], "frozen") | {"task_groups": "frozen"}
    choices = {f"train_{name}": choice for name, choice in (frozen | {part: mode}).items()}
    other = {"train_volume_layers": "frozen", "train_shared_group": "frozen"}
    stage = Stage1Config(**{**settings, **other, **choices, "weight_decay": 0.1})
    after = train(model, processor, rows, stage)
    changed, _ = changed_parts(before, after, model.config.vision_config.num_shared_experts)
    assert changed == expected


def test_frozen_modules_inside_a_trained_one_stay_frozen_in_an_adapter(trained_model, rows, settings):
    # The embeddings hold W_s, which belongs to the shared group.
    model, processor = trained_model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    stage = Stage2Config(**settings, train_slice_layers="full")
    after = train(model, processor, rows, stage)
    name = "model.vision_tower.embeddings.scale_embedding.weight"
    assert torch.equal(before[name], after[name])
    name = "model.vision_tower.embeddings.class_embedding"
    assert not torch.equal(before[name], after[name])


def test_the_table_counts_every_parameter_once(trained_model, settings):
    model, _ = trained_model
    total = sum(parameter.numel() for parameter in model.parameters())
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = expected_part(name)
        if part == "experts":
            shared = 4 * parameter[0].numel()
            sizes["shared_group"] = sizes.get("shared_group", 0) + shared
            sizes["task_groups"] = sizes.get("task_groups", 0) + parameter.numel() - shared
        else:
            sizes[part] = sizes.get(part, 0) + parameter.numel()
    for config, trained in STAGES.values():
        stage = config(**settings)
        parts = trained_parts(prepare_stage(model, stage), stage)
        assert {part.name: part.total for part in parts} == sizes
        assert sum(part.total for part in parts) == total
        full = trained - {"language_model"}
        assert {part.name: part.trained for part in parts if part.trained} == {name: sizes[name] for name in full}
        # A and B of rank 16 on four linear layers of each of the two layers of width 128.
        shapes = [(128, 256), (128, 128), (128, 512), (256, 128)]
        assert {part.name: part.lora for part in parts if part.lora} == {
            "language_model": 2 * 16 * sum(inner + outer for inner, outer in shapes)
        }
        text = format_parts(parts)
        assert f"{sizes['projector']:,}" in text
        assert f"{total:,}" not in text  # something is trained
        model = CTMoEForConditionalGeneration(model.config)


def test_names_of_an_adapter_lead_back_to_the_model(trained_model, settings):
    model, _ = trained_model
    plain = part_of_parameters(model)
    prepared = prepare_stage(model, Stage1Config(**settings, train_slice_layers="lora"))
    wrapped = part_of_parameters(prepared)
    assert {plain_name(name) for name in wrapped if "lora_" not in name} == set(plain)
    assert all(plain[plain_name(name)] == part for name, part in wrapped.items() if "lora_" not in name)


def test_the_first_stage_leaves_the_task_groups_out(trained_model, rows, settings):
    from ct_moe.trainers import CTMoEDataCollator

    model, processor = trained_model
    batch = CTMoEDataCollator(processor)([rows[0], rows[2]])
    inputs = {
        name: value for name, value in batch.items() if not name.startswith(("row_", "num_", "failed_", "labels"))
    }
    with torch.no_grad():
        with_groups = model(**inputs, output_router_logits=True)
        prepare_stage(model, Stage1Config(**settings, train_language_model="frozen"))
        without = model(**inputs, output_router_logits=True)
        for layer in model.model.vision_tower.layers:
            if layer.moe is not None:
                layer.moe.experts.down_proj[4:] = layer.moe.experts.down_proj_bias[4:] = 0
        prepare_stage(model, Stage2Config(**settings, train_language_model="frozen"))
        silenced = model(**inputs, output_router_logits=True)
    assert with_groups.routing.router_logits[0].shape[-1] == 8
    assert without.routing.router_logits[0].shape[-1] == 4
    assert (with_groups.logits - without.logits).abs().max() > 1e-3
    torch.testing.assert_close(without.logits, silenced.logits, rtol=0, atol=1e-6)
    # The router still says where the prompt would go.
    assert torch.equal(with_groups.routing.task_index, without.routing.task_index)


def test_a_model_without_a_shared_group_is_dense_in_the_first_stage(settings):
    from tests.modeling_ct_moe.tiny_model import tiny_model, volume_inputs

    model = tiny_model({"shared_group": False})
    inputs = volume_inputs(model.config, [3, 2]) | {"task_ids": torch.tensor([0, 1])}
    dense = tiny_model({"moe_layers": []})
    dense.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        groups = model.get_image_features(**inputs).last_hidden_state
        prepare_stage(model, Stage1Config(**settings, train_language_model="frozen"))
        features = model.eval().get_image_features(**inputs).last_hidden_state
        assert torch.equal(features, dense.get_image_features(**inputs).last_hidden_state)
    assert not torch.equal(features, groups)
    # Nothing of its experts is trained, and nothing is held.
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".experts." in name)


def test_nothing_to_train_is_refused(trained_model, settings):
    model, _ = trained_model
    parts = ["volume_layers", "shared_group", "task_router", "projector", "language_model"]
    with pytest.raises(TrainingError, match="every part of this model is frozen"):
        prepare_stage(model, Stage1Config(**settings, **{f"train_{part}": "frozen" for part in parts}))


@pytest.mark.parametrize(
    ("setting", "finding"),
    [
        ({"train_projector": "lora"}, "'lora' is unknown"),
        ({"train_task_groups": "on"}, "'on' is unknown"),
        ({"lora_r": 0}, "lora_r"),
        ({"dtype": "float8"}, "'float8' is unknown"),
        ({"quantization": "4bit", "train_language_model": "full"}, "on quantised weights"),
        ({"merge_adapter": False, "train_task_groups": "off"}, "cannot say that the task groups are off"),
        ({"max_length": 512}, "could cut visual tokens"),
        ({"remove_unused_columns": True}, "column of the task"),
        ({"packing": True}, "not possible with scans"),
        ({"assistant_only_loss": True}, "messages form"),
        ({"label_smoothing_factor": 0.1}, "bypasses the routing losses"),
        ({"on_error": "ignore"}, "'ignore' is unknown"),
        ({"max_failed_share": 2.0}, "is no share"),
        ({"learning_rates": {"vision": 1e-3}}, "'vision' is no part"),
        ({"learning_rates": {"projector": "fast"}}, "projector has 'fast'"),
        ({"generate_samples": -1}, "generate_samples"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_set(settings, setting, finding):
    with pytest.raises(TrainingError, match=finding):
        Stage2Config(**{**settings, **setting})
