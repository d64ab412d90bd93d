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
"""Adding, removing and renaming tasks: every other weight stays, bit for bit, and so does what the model computes."""

import pytest
import torch
from tiny_model import tiny_model, volume_inputs

from ct_moe import CTMoEForConditionalGeneration, CTReportPipeline
from ct_moe.errors_ct_moe import ModelError
from ct_moe.hub.folder import load_folder, save_folder


# Name -> vision fields: every way in which a layer's experts and routers can be laid out.
LAYOUTS = {
    "as designed": {},
    "one expert per task": {"num_task_experts": 1},
    "more task than shared experts": {"num_experts": 2, "num_task_experts": 3},
    "no shared group": {"shared_group": False},
    "one shared expert": {"num_experts": 1, "num_task_experts": 3},
    "no guide in the routers": {"guide_interaction": "none"},
}
layouts = pytest.mark.parametrize("vision", LAYOUTS.values(), ids=LAYOUTS)


def task_tensors(model, task: str) -> dict[str, torch.Tensor]:
    """Every tensor of one task, read off by hand from the order of design section 2.3."""
    config, index = model.config.vision_config, model.config.tasks.index(task)
    first = config.num_experts * config.shared_group + config.num_task_experts * index
    tensors = {
        "task_router.weight": model.model.task_router.weight[index],
        "task_router.bias": model.model.task_router.bias[index],
    }
    for layer in config.moe_layers:
        moe = model.model.vision_tower.layers[layer].moe
        for name, parameter in moe.experts.named_parameters():
            tensors[f"{layer}.{name}"] = parameter[first : first + config.num_task_experts]
        if moe.group_router is not None:
            for name, parameter in moe.group_router.named_parameters():
                tensors[f"{layer}.router.{name}"] = parameter[index]
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def other_tensors(model) -> dict[str, torch.Tensor]:
    """Every tensor that belongs to no task."""
    config = model.config.vision_config
    shared = config.num_experts * config.shared_group
    tensors = {}
    for name, parameter in model.named_parameters():
        if "task_router" in name or "group_router" in name:
            continue
        tensors[name] = (parameter[:shared] if ".experts." in name else parameter).detach().clone()
    return tensors


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def answers(model, inputs, task: str | None) -> torch.Tensor:
    task_ids = {} if task is None else {"task_ids": torch.full((2,), model.config.tasks.index(task))}
    return model.get_image_features(**inputs, **task_ids).last_hidden_state


@layouts
@pytest.mark.parametrize("source", [None, "vqa_closed"])
@torch.no_grad()
def test_an_added_task_leaves_the_others_and_takes_no_prompt_from_them(vision, source):
    model = tiny_model(vision)
    inputs = volume_inputs(model.config, [3, 2])
    tasks = list(model.config.tasks)
    before = {task: task_tensors(model, task) for task in tasks}
    others, outputs = other_tensors(model), {task: answers(model, inputs, task) for task in [None, *tasks]}

    model.add_task("vqa_location", init_from=source)

    assert model.config.tasks == [*tasks, "vqa_location"]
    assert model.config.vision_config.num_tasks == model.model.vision_tower.config.num_tasks == 4
    assert all(same(task_tensors(model, task), before[task]) for task in tasks)
    assert same(other_tensors(model), others)
    for task in (None, *tasks):
        torch.testing.assert_close(answers(model, inputs, task), outputs[task], rtol=1e-5, atol=1e-6)
    added = task_tensors(model, "vqa_location")
    if source is None:
        assert not any(added[name].any() for name in added if "down_proj" in name)
    else:
        bias = added.pop("task_router.bias")
        assert bias == before[source].pop("task_router.bias") - 1
        assert same(added, before[source])
        torch.testing.assert_close(answers(model, inputs, "vqa_location"), outputs[source], rtol=1e-5, atol=1e-6)
    prompts = volume_inputs(model.config, [1] * 64, seed=1)
    assert model.get_image_features(**prompts).routing.task_index.max() < 3


@layouts
@pytest.mark.parametrize("task", ["report", "vqa_closed", "vqa_open"])
@torch.no_grad()
def test_a_removed_task_leaves_the_others(vision, task):
    model = tiny_model(vision)
    inputs = volume_inputs(model.config, [3, 2])
    kept = [name for name in model.config.tasks if name != task]
    before = {name: task_tensors(model, name) for name in kept}
    others, outputs = other_tensors(model), {name: answers(model, inputs, name) for name in kept}
    model.remove_task(task)
    assert model.config.tasks == kept
    assert all(same(task_tensors(model, name), before[name]) for name in kept)
    assert same(other_tensors(model), others)
    for name in kept:
        torch.testing.assert_close(answers(model, inputs, name), outputs[name], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_renamed_task_keeps_every_weight():
    model = tiny_model()
    before = dict(model.named_parameters())
    model.rename_task("vqa_open", "question")
    assert model.config.tasks == ["report", "vqa_closed", "question"]
    # The very same parameters, so that an optimizer goes on.
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in PEFT
@pytest.mark.parametrize("modules", [["moe"], ["task_router"], ["experts", "shared_router"]])
def test_experts_inside_an_adapter_are_not_regrouped(modules):
    from peft import LoraConfig, get_peft_model

    model = tiny_model()
    wrapped = get_peft_model(model, LoraConfig(target_modules=["qkv_proj"], modules_to_save=modules))
    with pytest.raises(ModelError, match="an adapter holds"):
        wrapped.base_model.model.add_task("new")


@torch.no_grad()
def test_add_and_remove_undo_each_other():
    model = tiny_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.add_task("new")
    model.remove_task("new")
    assert same(dict(model.named_parameters()), before)


@layouts
@torch.no_grad()
def test_a_changed_model_is_saved_and_loaded_as_any_other(vision, tmp_path):
    model = tiny_model(vision)
    model.add_task("vqa_location", init_from="vqa_closed")
    model.remove_task("report")
    model.save_pretrained(tmp_path)
    loaded, info = CTMoEForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not [*info["missing_keys"], *info["unexpected_keys"]]
    assert same(dict(loaded.named_parameters()), dict(model.named_parameters()))
    assert loaded.config.tasks == ["vqa_closed", "vqa_open", "vqa_location"]
    inputs = volume_inputs(model.config, [3, 2])
    for task in (None, *loaded.config.tasks):
        torch.testing.assert_close(answers(loaded, inputs, task), answers(model, inputs, task), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("guide", ["film", "none"])
@torch.no_grad()
def test_from_no_task_to_one_and_back(guide, tmp_path):
    """A model without tasks has neither task router nor, if nothing else reads the prompt, a guide."""
    model = tiny_model({"guide_interaction": guide}, tasks=[])
    assert (model.model.guide_encoder is None) == (guide == "none")
    inputs = volume_inputs(model.config, [3, 2])
    before = model.get_image_features(**inputs).last_hidden_state
    model.add_task("report")
    torch.testing.assert_close(model.get_image_features(**inputs).last_hidden_state, before, rtol=1e-5, atol=1e-6)
    assert model.get_image_features(**inputs).routing.task_index.tolist() == [0, 0]
    model.save_pretrained(tmp_path)
    _, info = CTMoEForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not [*info["missing_keys"], *info["unexpected_keys"]]
    model.remove_task("report")
    assert model.model.task_router is None
    assert (model.model.guide_encoder is None) == (guide == "none")
    torch.testing.assert_close(model.get_image_features(**inputs).last_hidden_state, before, rtol=1e-5, atol=1e-6)


def test_an_added_task_learns_and_frozen_parts_stay_frozen():
    model = tiny_model().to(torch.bfloat16).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("down_proj" in name)
    model.add_task("new", init_from="report")
    assert {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad} == {
        "down_proj",
        "down_proj_bias",
        "weight",  # the language model's down_proj
    }
    moe = model.model.vision_tower.layers[2].moe
    assert moe.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    inputs = volume_inputs(model.config, [3, 2])
    features = model.get_image_features(**inputs, task_ids=torch.tensor([3, 3]))
    torch.cat(features.pooler_output).square().sum().backward()
    assert moe.experts.down_proj.grad[16:].any()
    assert not moe.experts.down_proj.grad[4:16].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.add_task("report"), "repeats a name"),
        (lambda model: model.add_task(" "), "has an empty one"),
        (lambda model: model.add_task("new", init_from="vqa"), "'vqa' is unknown. Choose one of report, vqa_closed"),
        (lambda model: model.remove_task("vqa"), "'vqa' is unknown. Choose one of report, vqa_closed, vqa_open"),
        (lambda model: model.rename_task("vqa", "x"), "'vqa' is unknown"),
        (lambda model: model.rename_task("report", "vqa_open"), "repeats a name"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_changes(change, message):
    model = tiny_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ModelError, match=message):
        change(model)
    assert model.config.tasks == ["report", "vqa_closed", "vqa_open"]
    assert same(dict(model.named_parameters()), before)


def test_a_processor_that_names_other_tasks_is_refused_by_the_pipeline_and_on_saving(model_folder, tmp_path):
    model, processor, _ = load_folder(str(model_folder))
    model.rename_task("vqa_open", "question")
    with pytest.raises(ModelError, match=r"the processor names \['report', 'vqa_closed', 'vqa_open'\], the model"):
        CTReportPipeline(model=model, processor=processor, task="ct-report")
    with pytest.raises(ModelError, match=r"Set processor.tasks = model.config.tasks"):
        save_folder(model, processor, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_last_expert_group_cannot_be_removed():
    model = tiny_model({"shared_group": False}, tasks=["report"])
    with pytest.raises(ModelError, match="without a single expert"):
        model.remove_task("report")
