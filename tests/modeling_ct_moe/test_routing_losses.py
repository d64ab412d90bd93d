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
"""The losses beside the language loss, counted one token at a time, and what they may and may not train."""

import itertools
import math

import pytest
import torch
from slow_moe import slow_guide, slow_routed
from tiny_model import one_volume, prompt_inputs, tiny_config, tiny_model, volume_inputs

from ct_moe.routing_ct_moe import routing_maps, routing_statistics


LOSSES = ("balance_loss", "z_loss", "task_loss", "aux_loss")
GROUPS = ("shared", "task")


def mean(values) -> float:
    return sum(values) / len(values)


def training_model(vision=None, **kwargs):
    """In training mode, without the noise that would hide what is compared."""
    return tiny_model({"router_jitter": 0.0, **(vision or {})}, **kwargs).train()


def batch(config):
    """Four volumes: by text, by label, without guide, by label and padded from 1 slice to 3."""
    inputs = volume_inputs(config, [3, 2, 3, 1])
    inputs["guide_attention_mask"][2] = 0
    return {**inputs, "task_ids": torch.tensor([-100, 1, -100, 2])}


def slow_losses(model, inputs, routing) -> dict[str, float]:
    """Switch balance and z-loss per layer, group and volume, cross-entropy and task balance per volume."""
    config, vision = model.config, model.config.vision_config
    k = vision.num_experts_per_tok
    shared = vision.num_experts if vision.shared_group and vision.num_experts > 1 else 0
    routed = slow_routed(inputs, int(vision.class_token))
    volumes = range(len(routed))
    balance, z = [], []
    for layer_logits in routing.router_logits or ():
        for volume in volumes:
            balance_of_volume = z_of_volume = 0.0
            for part in (slice(0, shared), slice(shared, None)):
                rows = [row[part] for row, keep in zip(layer_logits[volume].tolist(), routed[volume]) if keep]
                is_task_group = part.start == shared
                if not rows or not rows[0] or (is_task_group and routing.task_index[volume] < 0):
                    continue
                experts = range(len(rows[0]))
                load, probability, squares = [0.0 for _ in experts], [0.0 for _ in experts], 0.0
                for row in rows:
                    total = sum(math.exp(value) for value in row)
                    for e in sorted(experts, key=lambda e: -row[e])[:k]:
                        load[e] += 1 / (k * len(rows))
                    for e in experts:
                        probability[e] += math.exp(row[e]) / total / len(rows)
                    squares += math.log(total) ** 2 / len(rows)
                balance_of_volume += len(rows[0]) * sum(f * p for f, p in zip(load, probability))
                z_of_volume += squares
            balance.append(balance_of_volume)
            z.append(z_of_volume)
    task_losses, task_balance = [0.0 for _ in volumes], [0.0 for _ in volumes]
    for volume in volumes:
        kept = inputs["guide_attention_mask"][volume].bool()
        if not kept.any() or not config.tasks:
            continue
        guide = slow_guide(model, inputs["guide_input_ids"][volume][kept].tolist())
        router = model.model.task_router
        logits = (router.weight @ guide + router.bias).tolist()
        probs = [math.exp(value) / sum(map(math.exp, logits)) for value in logits]
        if (label := int(inputs["task_ids"][volume])) >= 0:
            task_losses[volume] = -math.log(probs[label])
        else:
            task_balance[volume] = len(probs) * max(probs)
    result = {
        "balance_loss": (mean(balance) if balance else 0.0) + mean(task_balance),
        "z_loss": mean(z) if z else 0.0,
        "task_loss": mean(task_losses),
    }
    weights = (config.router_balance_coef, config.router_z_coef, config.task_coef)
    return result | {"aux_loss": sum(weight * value for weight, value in zip(weights, result.values()))}


@pytest.mark.parametrize(
    ("vision", "tasks"),
    [
        ({}, None),
        ({"num_experts_per_tok": 2}, None),
        ({"num_experts": 2, "num_task_experts": 3}, None),
        ({"num_experts": 1}, None),
        ({"num_experts": 1, "num_task_experts": 3}, None),
        ({"shared_group": False}, None),
        ({}, []),
        ({"class_token": False}, ["report"]),
    ],
)
def test_losses_equal_loops_over_volumes_and_tokens(vision, tasks):
    model = training_model(vision, tasks=tasks, router_balance_coef=0.5, router_z_coef=0.25, task_coef=2.0)
    inputs = batch(model.config)
    if tasks:
        inputs["task_ids"] = torch.tensor([-100, 0, -100, 0])
    with torch.no_grad():
        routing = model.get_image_features(**inputs, output_router_logits=True).routing
        expected = slow_losses(model, inputs, routing)
    assert {name: routing[name].item() for name in LOSSES} == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_losses_of_a_batch_are_the_mean_over_its_volumes_alone():
    """So that accumulating gradients over micro-batches gives what one large batch gives."""
    model = training_model()
    inputs = batch(model.config)
    with torch.no_grad():
        together = model.get_image_features(**inputs).routing
        alone = [model.get_image_features(**one_volume(inputs, volume)).routing for volume in range(4)]
    for name in LOSSES:
        assert together[name].item() == pytest.approx(mean([one[name].item() for one in alone]), rel=1e-4), name


def test_gradients_accumulate_over_micro_batches():
    model = training_model()
    inputs = batch(model.config)
    model.get_image_features(**inputs).routing.aux_loss.backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for volume in range(4):
        (model.get_image_features(**one_volume(inputs, volume)).routing.aux_loss / 4).backward()
    assert len(together) > 20
    for name, parameter in model.named_parameters():
        if name in together:
            torch.testing.assert_close(parameter.grad, together[name], rtol=1e-3, atol=1e-5)


def test_balance_is_one_for_an_even_load_and_the_number_of_experts_for_one_that_takes_all():
    """The two ends of the Switch loss, per group: four shared experts; no task group without a guide."""
    model = training_model({"moe_layers": [3], "guide_interaction": "none"})
    inputs = volume_inputs(model.config, [2])
    inputs["guide_attention_mask"][:] = 0
    router = model.model.vision_tower.layers[3].moe.shared_router
    with torch.no_grad():
        router.weight.zero_()
        assert model.get_image_features(**inputs).routing.balance_loss.item() == pytest.approx(1.0)
        # A constant feature of the LayerNorm: every token prefers expert 2 by far.
        norm = model.model.vision_tower.layers[3].layer_norm2
        norm.weight[0], norm.bias[0], router.weight[0, 2, 0] = 0.0, 10.0, 10.0
        assert model.get_image_features(**inputs).routing.balance_loss.item() == pytest.approx(4.0)


def test_each_loss_changes_a_gradient_and_the_task_loss_trains_the_task_router_and_the_guide_only():
    model = training_model()
    inputs = batch(model.config)

    def trained_by(loss):
        model.zero_grad()
        model.get_image_features(**inputs).routing[loss].backward()
        return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}

    task = trained_by("task_loss")
    assert {name.split(".")[1] for name in task} == {"task_router", "guide_encoder"}
    for loss in ("balance_loss", "z_loss"):
        names = trained_by(loss)
        assert sum("shared_router" in name for name in names) == 6
        assert sum("group_router" in name for name in names) == 6


def test_the_loss_is_the_language_loss_plus_the_weighted_sum_in_training_only():
    model = training_model()
    inputs = {**volume_inputs(model.config, [2, 3]), **prompt_inputs(model.config, [[2], [3]])}
    outputs = model(**inputs, labels=inputs["input_ids"])
    following = inputs["input_ids"][:, 1:]
    language = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), following.flatten())
    assert outputs.loss.item() == pytest.approx((language + outputs.routing.aux_loss).item(), rel=1e-5)
    assert outputs.routing.aux_loss.item() > 0
    outputs = model.eval()(**inputs, labels=inputs["input_ids"])
    assert outputs.loss.item() == pytest.approx(language.item(), rel=1e-4)
    assert outputs.routing.aux_loss is None


@pytest.mark.parametrize("given", ["nothing", "labels", "empty guides"])
def test_training_without_guides_uses_the_shared_group_alone(given):
    model = training_model()
    inputs = batch(model.config)
    guides = {name: inputs.pop(name) for name in ("guide_input_ids", "guide_attention_mask")}
    labels = inputs.pop("task_ids")
    if given == "labels":
        inputs["task_ids"] = labels
    if given == "empty guides":
        inputs |= {**guides, "guide_attention_mask": torch.zeros_like(guides["guide_attention_mask"])}
    routing = model.get_image_features(**inputs, output_router_logits=True).routing
    assert routing.task_index.tolist() == ([-1, 1, -1, 2] if given == "labels" else [-1] * 4)
    assert routing.task_loss.item() == 0.0
    empty = {**inputs, **guides, "guide_attention_mask": torch.zeros_like(guides["guide_attention_mask"])}
    expected = slow_losses(model, {"task_ids": torch.full((4,), -100), **empty}, routing)
    assert routing.balance_loss.item() == pytest.approx(expected["balance_loss"], rel=1e-4)


@pytest.mark.parametrize("class_token", [True, False])
def test_a_volume_of_air_trains_without_a_number_out_of_range(class_token):
    model = training_model({"class_token": class_token})
    inputs = {**volume_inputs(model.config, [2]), **prompt_inputs(model.config, [[2]])}
    inputs["patch_mask"][:] = False
    outputs = model(**inputs, labels=inputs["input_ids"], task_ids=torch.tensor([1]))
    outputs.loss.backward()
    assert outputs.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    if not class_token:
        assert outputs.routing.balance_loss.item() == outputs.routing.z_loss.item() == 0.0
        assert outputs.routing.task_loss.item() > 0


def test_statistics_count_routed_tokens_of_the_groups_that_took_part():
    model = tiny_model({"num_experts_per_tok": 2})
    inputs = batch(model.config)
    with torch.no_grad():
        routing = model.get_image_features(**inputs, output_router_logits=True).routing
        statistics = routing_statistics(routing, model.config.vision_config)
    routed = slow_routed(inputs, 1)
    assert len(statistics) == 2
    for layer, logits in zip(statistics, routing.router_logits):
        assert set(layer) == {f"{group}_{name}" for group in GROUPS for name in ("load", "entropy", "agreement")}
        for volume in range(4):
            for name, part in (("shared", slice(0, 4)), ("task", slice(4, 8))):
                load, entropy = [0.0] * 4, 0.0
                rows = [row[part] for row, keep in zip(logits[volume].tolist(), routed[volume]) if keep]
                if name == "task" and volume == 2:
                    rows = []  # no guide, no label: no task group
                for row in rows:
                    for e in sorted(range(4), key=lambda e: -row[e])[:2]:
                        load[e] += 1 / (2 * len(rows))
                    probs = [math.exp(value) / sum(map(math.exp, row)) for value in row]
                    entropy -= sum(p * math.log(p) for p in probs) / len(rows)
                assert layer[f"{name}_load"][volume].tolist() == pytest.approx(load, abs=1e-5)
                assert float(layer[f"{name}_entropy"][volume]) == pytest.approx(entropy, abs=1e-5)


@pytest.mark.parametrize("k", [1, 2])
@torch.no_grad()
def test_agreement_and_maps_compare_each_patch_with_the_one_above_it(k):
    model = tiny_model({"num_experts_per_tok": k})
    inputs = batch(model.config)
    routing = model.get_image_features(**inputs, output_router_logits=True).routing
    vision = model.config.vision_config
    statistics, maps = routing_statistics(routing, vision), routing_maps(routing, vision)
    routed, per_slice = slow_routed(inputs, 1), vision.num_slice_tokens
    pairs_seen = 0
    for layer, pictures, logits in zip(statistics, maps, routing.router_logits):
        for volume, (name, part) in itertools.product(range(4), (("shared", slice(0, 4)), ("task", slice(4, 8)))):
            in_group = name == "shared" or routing.task_index[volume] >= 0
            best = {}
            for token, row in enumerate(logits[volume, :, part].tolist()):
                place = (token // per_slice, token % per_slice - 1)  # slice and patch; -1 is the class token
                if place[1] < 0:
                    continue
                keep = routed[volume][token] and in_group
                first = max(range(4), key=lambda e: row[e]) if keep else -1
                assert pictures[name][volume].flatten(1)[place] == first
                if keep:
                    best[place] = set(sorted(range(4), key=lambda e: -row[e])[:k])
            common = [
                len(experts & best[number + 1, patch]) / k
                for (number, patch), experts in best.items()
                if (number + 1, patch) in best
            ]
            pairs_seen += len(common)
            if common:
                assert float(layer[f"{name}_agreement"][volume]) == pytest.approx(mean(common), abs=1e-6)
            else:
                assert layer[f"{name}_agreement"][volume].isnan()
    assert pairs_seen > 20


def test_a_dense_model_has_no_routing_losses():
    model = training_model({"moe_layers": []})
    routing = model.get_image_features(**volume_inputs(model.config, [2])).routing
    assert [routing[name].item() for name in LOSSES] == [0.0] * 4
    assert tiny_config(vision={"moe_layers": []}).vision_config.num_tasks == 3
