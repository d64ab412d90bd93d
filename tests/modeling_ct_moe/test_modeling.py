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
"""The whole model: batches, backends, checkpointing, number formats, and what may not depend on what."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_model import (
    IMAGE_TOKEN,
    VOLUME_INPUTS,
    one_volume,
    prompt_inputs,
    tiny_config,
    tiny_model,
    volume_inputs,
)

from ct_moe.errors_ct_moe import ModelError
from ct_moe.modeling_ct_moe import CTMoEForConditionalGeneration


SLICES = [4, 1, 3]


def batch(config, **kwargs) -> dict[str, torch.Tensor]:
    return {**prompt_inputs(config, [[n] for n in SLICES]), **volume_inputs(config, SLICES, **kwargs)}


def real_logits(model, inputs) -> torch.Tensor:
    """Of every token that is not padding."""
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()]


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("vision", [{}, {"class_token": False, "num_experts_per_tok": 2}], ids=str)
def test_a_batch_of_scans_of_different_lengths_gives_the_logits_of_each_scan_alone(vision):
    model = tiny_model(vision)
    inputs = batch(model.config)
    with torch.no_grad():
        together = model(**inputs).logits
        for row in range(len(SLICES)):
            real = inputs["attention_mask"][row].bool()
            prompt = {name: inputs[name][row : row + 1, real] for name in ("input_ids", "attention_mask")}
            alone = model(**prompt, **one_volume(inputs, row)).logits[0]
            torch.testing.assert_close(together[row, real], alone, rtol=0, atol=1e-5)


def test_what_padding_holds_changes_nothing():
    model = tiny_model()
    inputs = batch(model.config)
    expected = real_logits(model, inputs)
    padded = ~inputs["slice_mask"]
    assert padded.any()
    inputs["pixel_values"][padded] = 3 * torch.randn_like(inputs["pixel_values"][padded])
    inputs["slice_positions"][padded] = 123_456
    inputs["patch_mask"][padded] = ~inputs["patch_mask"][padded]
    assert torch.equal(real_logits(model, inputs), expected)


@pytest.mark.parametrize("name", ["pixel_values", "slice_positions", "patch_mask", "volume_scale", "guide_input_ids"])
def test_every_input_of_a_scan_matters_to_it_and_to_no_other(name):
    model = tiny_model()
    inputs = batch(model.config)
    changed = {**inputs, name: inputs[name].clone()}
    if name == "patch_mask":
        changed[name][0] = ~changed[name][0]
    elif name == "slice_positions":
        changed[name][0] *= 2
    else:
        changed[name][0] = changed[name][0].flip(0)
    with torch.no_grad():
        before, after = (
            model.get_image_features(**{n: x[n] for n in VOLUME_INPUTS if n in x}).pooler_output
            for x in (inputs, changed)
        )
    moved = [(ours - theirs).abs().max() > 1e-5 for ours, theirs in zip(before, after)]
    assert moved == [True, False, False]


def test_answer_tokens_change_no_routing_decision():
    model = tiny_model()
    inputs = batch(model.config)
    other = inputs["input_ids"].clone()
    other[:, -4:] = torch.tensor([[50, 51, 52, 53]])
    with torch.no_grad():
        first, second = (
            model(**{**inputs, "input_ids": ids}, output_router_logits=True) for ids in (inputs["input_ids"], other)
        )
    assert not torch.equal(first.logits, second.logits)
    assert torch.equal(first.routing.task_logits, second.routing.task_logits)
    for ours, theirs in zip(first.routing.router_logits, second.routing.router_logits, strict=True):
        assert torch.equal(ours, theirs)


def test_turning_a_patch_to_air_takes_that_token_from_the_experts_and_from_no_statistic_else():
    model = tiny_model({"moe_layers": [2]})
    inputs = volume_inputs(model.config, [3], air=0.0)
    with torch.no_grad():
        before = model.get_image_features(**inputs, output_router_logits=True)
        inputs["patch_mask"][0, 1, 2, 0] = False
        after = model.get_image_features(**inputs, output_router_logits=True)
    token = 10 + 1 + 2 * 3  # second slice, past its class token
    assert (before.routing.token_mask != after.routing.token_mask).nonzero().tolist() == [[0, token]]
    assert torch.equal(before.routing.router_logits[0], after.routing.router_logits[0])
    changed = (before.last_hidden_state != after.last_hidden_state).any(dim=-1).flatten()
    assert changed[token]


@pytest.mark.parametrize("class_token", [True, False])
def test_a_volume_of_air_passes(class_token):
    model = tiny_model({"class_token": class_token})
    inputs = batch(model.config)
    inputs["patch_mask"][0] = False
    expected = real_logits(model, inputs)
    assert expected.isfinite().all()
    inputs["patch_mask"][:] = False
    assert real_logits(model, inputs).isfinite().all()


def test_eager_attention_agrees_with_sdpa():
    model = tiny_model()
    inputs = batch(model.config)
    assert model.config.vision_config._attn_implementation == "sdpa"
    expected = real_logits(model, inputs)
    model.set_attn_implementation("eager")
    assert model.model.vision_tower.config._attn_implementation == "eager"
    torch.testing.assert_close(real_logits(model, inputs), expected, rtol=0, atol=1e-5)


def flex_attention_agrees():
    model = tiny_model()
    inputs = batch(model.config)
    expected = real_logits(model, inputs)
    model.set_attn_implementation("flex_attention")
    torch.testing.assert_close(real_logits(model, inputs), expected, rtol=0, atol=1e-4)


@pytest.mark.slow  # compiles for up to half a minute
def test_flex_attention_agrees_in_its_forward_pass(tmp_path):
    """In a process of its own with nothing compiled before: after other tests torch's code gave other numbers."""
    command = [sys.executable, "-c", "import test_modeling; test_modeling.flex_attention_agrees()"]
    folders = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    env = {"PYTHONPATH": folders, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("vision", [{}, {"num_experts_per_tok": 2, "num_experts": 3}, {"num_experts": 1}], ids=str)
def test_all_implementations_of_the_experts_agree_in_output_and_gradient(vision):
    model = tiny_model(vision)
    inputs = batch(model.config)
    assert model.config.vision_config._experts_implementation == "grouped_mm"
    results = {}
    for name in ("grouped_mm", "eager", "batched_mm"):
        model.set_experts_implementation(name)
        assert model.model.vision_tower.config._experts_implementation == name
        model.zero_grad()
        outputs = model(**inputs, labels=inputs["input_ids"])
        outputs.loss.backward()
        results[name] = outputs.logits[inputs["attention_mask"].bool()].detach(), gradients(model)
    for name in ("eager", "batched_mm"):
        torch.testing.assert_close(results[name][0], results["grouped_mm"][0], rtol=0, atol=1e-5)
        assert results[name][1].keys() == results["grouped_mm"][1].keys()
        for parameter, gradient in results[name][1].items():
            torch.testing.assert_close(gradient, results["grouped_mm"][1][parameter], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_gives_the_same_loss_and_gradients(reentrant):
    """With router jitter, which is drawn again when a layer is computed again."""
    results, calls = [], []
    for checkpointed in (False, True):
        model = tiny_model({"router_jitter": 0.2}).train()
        model.get_input_embeddings().weight.requires_grad_(True)
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        calls.append([])
        model.model.vision_tower.layers[3].mlp.register_forward_hook(lambda *_: calls[-1].append(1))
        inputs = batch(model.config)
        torch.manual_seed(0)
        outputs = model(**inputs, labels=inputs["input_ids"], task_ids=torch.tensor([1, -100, 0]), use_cache=False)
        outputs.loss.backward()
        results.append((outputs.loss.detach(), gradients(model)))
    assert [len(times) for times in calls] == [1, 2]
    torch.testing.assert_close(*(loss for loss, _ in results), rtol=1e-6, atol=1e-6)
    assert results[0][1].keys() == results[1][1].keys()
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-4, atol=1e-6)


def test_every_parameter_is_trained_in_a_batch_of_all_tasks():
    model = tiny_model().train()
    inputs = batch(model.config) | {"task_ids": torch.tensor([0, 1, 2])}
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("how", ["bfloat16", "bfloat16 features", "autocast"])
def test_routers_compute_in_float32_whatever_the_model_does(how):
    """Their logits are those of float32 arithmetic on what they were given, which bfloat16 arithmetic is far from."""
    model = tiny_model()
    inputs = batch(model.config)
    if how != "autocast":
        model.to(torch.bfloat16)
    if how == "bfloat16 features":
        inputs = {name: x.bfloat16() if x.is_floating_point() else x for name, x in inputs.items()}
    tower, seen = model.model.vision_tower, {}
    tower.layers[2].layer_norm2.register_forward_hook(lambda _, args, output: seen.update(x=output))
    tower.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        outputs = model(**inputs, output_router_logits=True)
    logits = outputs.routing.router_logits[0][..., :4]
    router, guide = tower.layers[2].moe.shared_router, seen["guide"].double()
    assert outputs.logits.isfinite().all()
    assert outputs.logits.dtype == torch.bfloat16
    assert logits.dtype == outputs.routing.task_logits.dtype == torch.float32
    scale, bias = (guide @ parameter[0].double().T for parameter in (router.guide_scale, router.guide_bias))
    scaled = seen["x"].double() * (1 + scale.unsqueeze(1))
    exact = scaled @ router.weight[0].double().T + bias.unsqueeze(1)
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)
    task_router = model.model.task_router
    exact = guide @ task_router.weight.double().T + task_router.bias.double()
    torch.testing.assert_close(outputs.routing.task_logits.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("experts", ["grouped_mm", "eager", "batched_mm"])
@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_low_precision_trains_and_stays_near_float32(how, experts):
    model = tiny_model({"router_jitter": 0.0})
    model.set_experts_implementation(experts)
    inputs = batch(model.config)
    features = {name: inputs[name] for name in VOLUME_INPUTS if name in inputs}
    with torch.no_grad():
        exact = torch.cat(model.get_image_features(**features).pooler_output)
    model.train()
    if how == "bfloat16":
        model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        outputs = model(**inputs, labels=inputs["input_ids"], task_ids=torch.tensor([0, 1, 2]))
    outputs.loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    # Some tokens go to another expert after rounding, so the bulk is compared.
    error = (outputs.image_hidden_states.float() - exact).abs().median() / exact.abs().median()
    assert error < 0.1


def test_prefix_hidden_states_give_the_same_features_without_the_early_layers():
    model = tiny_model()
    inputs = volume_inputs(model.config, SLICES)
    other_question = {"guide_input_ids": inputs["guide_input_ids"].flip(0), "guide_attention_mask": None}
    ran = []
    model.model.vision_tower.layers[1].register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        first = model.get_image_features(**inputs, output_prefix_hidden_states=True)
        asked_again = {**inputs, **other_question}
        whole = model.get_image_features(**asked_again)
        assert len(ran) == 2
        asked_again = {**asked_again, "pixel_values": None, "prefix_hidden_states": first.prefix_hidden_states}
        short = model.get_image_features(**asked_again, output_prefix_hidden_states=True)
        same = model.get_image_features(
            **{**inputs, "pixel_values": None}, prefix_hidden_states=first.prefix_hidden_states
        )
    assert len(ran) == 2
    assert torch.equal(short.last_hidden_state, whole.last_hidden_state)
    assert torch.equal(same.last_hidden_state, first.last_hidden_state)
    assert not torch.equal(short.last_hidden_state, first.last_hidden_state)
    assert torch.equal(short.prefix_hidden_states, first.prefix_hidden_states)
    assert whole.prefix_hidden_states is None
    for ours, theirs in zip(short.pooler_output, whole.pooler_output, strict=True):
        assert torch.equal(ours, theirs)


def test_a_further_question_runs_the_experts_of_the_first_moe_layer_and_what_follows():
    model = tiny_model()
    inputs = volume_inputs(model.config, SLICES)
    asked_again = {**inputs, "guide_input_ids": inputs["guide_input_ids"].flip(0), "guide_attention_mask": None}
    layer = model.model.vision_tower.layers[min(model.config.vision_config.moe_layers)]
    ran = []
    for module in (layer.self_attn, layer.mlp, layer.moe):
        module.register_forward_hook(lambda *called: ran.append(type(called[0]).__name__))
    with torch.no_grad():
        first = model.get_image_features(**inputs, output_prefix_hidden_states=True)
        whole = model.get_image_features(**asked_again)
        ran.clear()
        asked_again |= {"pixel_values": None, "moe_hidden_states": first.moe_hidden_states}
        short = model.get_image_features(**asked_again, output_prefix_hidden_states=True)
    assert ran == ["CTMoETextGuidedMoE"]
    assert torch.equal(short.last_hidden_state, whole.last_hidden_state)
    assert not torch.equal(short.last_hidden_state, first.last_hidden_state)
    assert torch.equal(short.moe_hidden_states, first.moe_hidden_states)
    assert short.prefix_hidden_states is None
    assert whole.moe_hidden_states is None
    with pytest.raises(ModelError, match="both or neither of pixel_values and"):
        model.get_image_features(**asked_again, prefix_hidden_states=first.prefix_hidden_states)


@pytest.mark.parametrize(
    "vision",
    [{"volume_layers": [], "moe_layers": []}, {"moe_layers": []}, {"volume_layers": [0, 3], "moe_layers": [0]}],
    ids=str,
)
def test_prefix_hidden_states_exist_wherever_the_first_moe_layer_is(vision):
    model = tiny_model(vision)
    inputs = volume_inputs(model.config, SLICES)
    with torch.no_grad():
        first = model.get_image_features(**inputs, output_prefix_hidden_states=True)
        assert (first.moe_hidden_states is None) == (not model.config.vision_config.moe_layers)
        for name in ("prefix_hidden_states", "moe_hidden_states"):
            if (kept := getattr(first, name)) is not None:
                again = model.get_image_features(**{**inputs, "pixel_values": None, name: kept})
                assert torch.equal(again.last_hidden_state, first.last_hidden_state)


def test_encoded_volumes_serve_instead_of_pixels():
    model = tiny_model()
    inputs = batch(model.config)
    prompts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        features = model.get_image_features(**{name: inputs[name] for name in VOLUME_INPUTS if name in inputs})
        outputs = model(**prompts, mm_encoder_outputs={"image": features})
        expected = model(**inputs)
    assert torch.equal(outputs.logits, expected.logits)
    assert torch.equal(outputs.routing.task_index, expected.routing.task_index)


def test_a_prompt_without_a_scan_is_the_language_model_alone():
    model = tiny_model()
    inputs = prompt_inputs(model.config, [[], []])
    assert not (inputs["input_ids"] == IMAGE_TOKEN).any()
    outputs = model(**inputs, labels=inputs["input_ids"])
    hidden = model.model.language_model(**inputs).last_hidden_state
    assert torch.equal(outputs.logits, model.lm_head(hidden))
    assert outputs.routing is None
    assert outputs.image_hidden_states is None


def test_a_fresh_model_answers_as_its_dense_copy():
    """Experts and physical scale start at nothing: the converted model is the base until it is trained."""
    torch.manual_seed(0)
    fresh = CTMoEForConditionalGeneration(tiny_config()).eval()
    dense = CTMoEForConditionalGeneration(tiny_config(vision={"moe_layers": []})).eval()
    dense.load_state_dict(fresh.state_dict(), strict=False)
    inputs = batch(fresh.config)
    unscaled = {**inputs, "volume_scale": None}
    assert torch.equal(real_logits(fresh, inputs), real_logits(dense, unscaled))


def test_hidden_states_and_attentions_can_be_asked_for():
    model = tiny_model()
    model.set_attn_implementation("eager")
    inputs = volume_inputs(model.config, [3, 2])
    with torch.no_grad():
        features = model.get_image_features(**inputs, output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in features.hidden_states] == [(6, 10, 32)] * 5
    assert torch.equal(features.hidden_states[-1].view(2, 3, 10, 32), features.last_hidden_state)
    assert [tuple(weights.shape) for weights in features.attentions] == [(6, 2, 10, 10)] + [(2, 2, 30, 30)] * 3
    padding_seen = features.attentions[1][1, :, :, 20:]
    assert not padding_seen.any()


def test_outputs_come_as_tuples_too():
    model = tiny_model()
    inputs = batch(model.config)
    with torch.no_grad():
        by_name = model(**inputs, labels=inputs["input_ids"])
        as_tuple = model(**inputs, labels=inputs["input_ids"], return_dict=False)
    assert torch.equal(as_tuple[0], by_name.loss)
    assert torch.equal(as_tuple[1], by_name.logits)
