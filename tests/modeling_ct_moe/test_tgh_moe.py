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
"""The TGH-MoE layer, its decisions and its gradients against the slow reference, for every way to build it."""

import pytest
import torch
from slow_moe import slow_guide, slow_moe_layer, slow_routed, slow_task
from tiny_model import tiny_config, tiny_model, volume_inputs

from ct_moe.errors_ct_moe import ModelError


# Name -> vision fields and tasks. The reference knows them all.
VARIANTS = {
    "as designed": ({}, None),
    "two experts per token": ({"num_experts_per_tok": 2}, None),
    "two, renormalised": ({"num_experts_per_tok": 2, "norm_topk_prob": True}, None),
    "guide as bias": ({"guide_interaction": "bias"}, None),
    "routers without guide": ({"guide_interaction": "none"}, None),
    "one expert per group": ({"num_experts": 1}, None),
    "one expert per task, as in the paper": ({"num_task_experts": 1, "num_experts_per_tok": 2}, ["report", "vqa"]),
    "more task than shared experts": ({"num_experts": 2, "num_task_experts": 3, "num_experts_per_tok": 2}, None),
    "one shared expert": ({"num_experts": 1, "num_task_experts": 3}, None),
    "task level only": ({"shared_group": False, "num_experts": 1}, None),
    "task groups with routers, no shared group": ({"shared_group": False}, None),
    "token level only": ({}, []),
    "token level only, without guide": ({"guide_interaction": "none"}, []),
    "no class token": ({"class_token": False, "patch_bias": True}, None),
}
variants = pytest.mark.parametrize(("vision", "tasks"), VARIANTS.values(), ids=VARIANTS)


def batch(config, **kwargs):
    """Four volumes: routed by text, by label, without a guide, and (padded to 3 slices) by text again."""
    inputs = volume_inputs(config, [3, 3, 2, 1], **kwargs)
    inputs["guide_attention_mask"][2] = 0
    return {**inputs, "task_ids": torch.tensor([-100, 1, -100, -100])}


def slow_routing(model, inputs):
    """Guides, tasks and gates of the batch."""
    guides, tasks, gates = [], [], []
    for ids, mask, task_id in zip(inputs["guide_input_ids"], inputs["guide_attention_mask"], inputs["task_ids"]):
        tokens = [int(token) for token, keep in zip(ids, mask) if keep]
        guide = slow_guide(model, tokens)
        task, gate = slow_task(model, guide, bool(tokens), int(task_id))
        guides, tasks, gates = [*guides, guide], [*tasks, task], [*gates, gate]
    return guides, tasks, gates


def run_both(model, inputs, layer_idx):
    """The FFN slot of one layer, fast and slow, and what the routers said."""
    layer, seen = model.model.vision_tower.layers[layer_idx], {}
    hooks = [
        layer.layer_norm2.register_forward_hook(lambda _, args, output: seen.update(residual=args[0], x=output)),
        layer.register_forward_hook(lambda _, args, output: seen.update(output=output[0])),
    ]
    features = model.get_image_features(**inputs, output_router_logits=True)
    for hook in hooks:
        hook.remove()
    fast = seen["output"].view_as(seen["x"]) - seen["residual"]
    guides, tasks, gates = slow_routing(model, inputs)
    routed = slow_routed(inputs, int(model.config.vision_config.class_token))
    slow, trace = slow_moe_layer(model, layer_idx, seen["x"], routed, guides, tasks, gates)
    return features, tasks, routed, fast, slow, trace


@variants
def test_output_and_decisions_equal_loops_over_tokens_and_experts(vision, tasks):
    model = tiny_model(vision, tasks=tasks)
    config = model.config.vision_config
    with torch.no_grad():
        features, task_index, routed, fast, slow, trace = run_both(model, batch(model.config), layer_idx=3)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    routing = features.routing
    assert routing.token_mask.tolist() == routed
    if tasks is None or tasks:
        assert routing.task_index.tolist() == task_index
        assert task_index[1:3] == [1, -1]
    shared = config.num_experts if config.shared_group and config.num_experts > 1 else 0
    for (name, volume, token), logits in trace.logits.items():
        fast_logits = routing.router_logits[1][volume, token]
        fast_logits = fast_logits[:shared] if name == "shared" else fast_logits[shared:]
        torch.testing.assert_close(fast_logits, logits, rtol=1e-4, atol=1e-5)
    if not trace.logits:
        assert routing.router_logits is None


@variants
def test_gradients_equal_those_of_the_loops(vision, tasks):
    """Through the last layer alone: the features come out of it, so the guide acts on them there only."""
    vision = {**vision, "moe_layers": [3], "router_jitter": 0.0}
    model = tiny_model(vision, tasks=tasks).train()
    inputs = batch(model.config)
    *_, fast, slow, _ = run_both(model, inputs, layer_idx=3)
    parameters = dict(model.named_parameters())
    random = torch.randn(fast.shape, generator=torch.Generator().manual_seed(0))
    gradients = [
        torch.autograd.grad((output * random).sum(), parameters.values(), allow_unused=True, retain_graph=True)
        for output in (fast, slow)
    ]
    reached = set()
    for name, fast_gradient, slow_gradient in zip(parameters, *gradients):
        assert (fast_gradient is None) == (slow_gradient is None), name
        if slow_gradient is not None:
            # To 1e-5 of the largest entry: float32 sums of hundreds of terms, in another order.
            largest = slow_gradient.abs().max().item()
            assert torch.allclose(fast_gradient, slow_gradient, rtol=0, atol=1e-5 * max(largest, 1)), name
            reached.add(name)
    # Through x as well, down to the patches.
    tower = "model.vision_tower."
    assert {f"{tower}embeddings.patch_embedding.weight", f"{tower}layers.3.mlp.fc1.weight"} <= reached
    assert {name for name in parameters if ".moe.experts." in name} <= reached


def test_every_router_gets_a_gradient_from_the_language_side():
    model = tiny_model()
    inputs = volume_inputs(model.config, [3, 3, 2, 1]) | {"task_ids": torch.tensor([0, 1, 2, -100])}
    torch.cat(model.get_image_features(**inputs).pooler_output).square().sum().backward()
    routers = {n: p for n, p in model.named_parameters() if "router" in n or "guide_encoder" in n}
    assert len(routers) == 2 * 6 + 2 + 5
    for name, parameter in routers.items():
        if "group_router" in name:  # one row per task, and all three are in the batch
            assert parameter.grad.flatten(1).any(dim=1).all(), name
        else:
            assert parameter.grad.any(), name


def test_a_label_keeps_the_language_loss_out_of_the_task_router():
    model = tiny_model()
    inputs = volume_inputs(model.config, [2, 2])

    def task_gradient(**task_ids):
        model.zero_grad()
        torch.cat(model.get_image_features(**inputs, **task_ids).pooler_output).square().sum().backward()
        return model.model.task_router.weight.grad

    labelled = task_gradient(task_ids=torch.tensor([0, 2]))
    assert labelled is None or not labelled.any()
    assert task_gradient(task_ids=torch.tensor([0, -100])).any()


@torch.no_grad()
def test_the_guide_embeddings_get_no_gradient_through_the_guide():
    model = tiny_model()
    with torch.enable_grad():
        features = model.get_image_features(**volume_inputs(model.config, [2]))
        torch.cat(features.pooler_output).sum().backward()
    assert model.get_input_embeddings().weight.grad is None


@torch.no_grad()
def test_a_fresh_model_computes_what_it_computes_without_experts():
    torch.manual_seed(0)
    model = type(tiny_model())(tiny_config()).eval()
    dense = type(model)(tiny_config(vision={"moe_layers": []})).eval()
    missing, unexpected = dense.load_state_dict(model.state_dict(), strict=False)
    assert missing == []
    assert all(".moe." in name or "guide_encoder" in name or "task_router" in name for name in unexpected)
    inputs = volume_inputs(model.config, [3, 2])
    with_experts, without = (m.get_image_features(**inputs).last_hidden_state for m in (model, dense))
    assert torch.equal(with_experts, without)


@torch.no_grad()
def test_air_and_padding_never_reach_the_experts():
    model = tiny_model()
    inputs = volume_inputs(model.config, [3, 2])
    rows = []
    for layer in (2, 3):
        experts = model.model.vision_tower.layers[layer].moe.experts
        experts.register_forward_pre_hook(lambda module, args: rows.append([arg.shape[0] for arg in args]))
    model.get_image_features(**inputs)
    expected = int(inputs["patch_mask"].flatten(2).sum(-1)[inputs["slice_mask"]].sum()) + 5  # class tokens
    assert rows == [[expected] * 3] * 2


@torch.no_grad()
def test_only_the_group_of_the_task_acts():
    """Changing another task's experts, or its router, changes nothing."""
    model = tiny_model()
    inputs = volume_inputs(model.config, [2]) | {"task_ids": torch.tensor([1])}
    before = model.get_image_features(**inputs).last_hidden_state
    for layer in (2, 3):
        moe, per_group = model.model.vision_tower.layers[layer].moe, model.config.vision_config.num_experts
        for group in (0, 2):
            first = per_group * (1 + group)
            moe.experts.down_proj[first : first + per_group] += 1
            moe.group_router.weight[group] += 1
    assert torch.equal(model.get_image_features(**inputs).last_hidden_state, before)
    moe.experts.down_proj[2 * per_group : 3 * per_group] += 1
    assert not torch.equal(model.get_image_features(**inputs).last_hidden_state, before)


@torch.no_grad()
def test_without_a_guide_only_the_shared_group_acts():
    model = tiny_model()
    inputs = volume_inputs(model.config, [2, 2])
    unguided = {name: value for name, value in inputs.items() if not name.startswith("guide")}
    empty = inputs | {"guide_attention_mask": torch.zeros_like(inputs["guide_attention_mask"])}
    results = [model.get_image_features(**x) for x in (unguided, empty)]
    assert torch.equal(results[0].last_hidden_state, results[1].last_hidden_state)
    for result in results:
        assert result.routing.task_index.tolist() == [-1, -1]
    for layer in (2, 3):
        experts = model.model.vision_tower.layers[layer].moe.experts
        experts.down_proj[model.config.vision_config.num_experts :] += 1
    assert torch.equal(model.get_image_features(**unguided).last_hidden_state, results[0].last_hidden_state)


@torch.no_grad()
def test_words_beyond_the_guide_mask_do_not_steer():
    model = tiny_model()
    inputs = volume_inputs(model.config, [2, 3])
    other = inputs["guide_input_ids"].where(inputs["guide_attention_mask"].bool(), 77)
    assert not torch.equal(other, inputs["guide_input_ids"])
    before, after = (
        model.get_image_features(**inputs | {"guide_input_ids": ids}).last_hidden_state
        for ids in (inputs["guide_input_ids"], other)
    )
    assert torch.equal(before, after)


@torch.no_grad()
def test_jitter_is_drawn_in_training_only():
    model = tiny_model({"router_jitter": 0.3})
    inputs = volume_inputs(model.config, [2])

    def logits():
        return model.get_image_features(**inputs, output_router_logits=True).routing.router_logits[0]

    assert torch.equal(logits(), logits())
    model.train()
    assert not torch.equal(logits(), logits())


def test_guide_rows_must_match_the_volumes():
    model = tiny_model()
    inputs = volume_inputs(model.config, [2, 2])
    inputs["guide_input_ids"] = inputs["guide_input_ids"][:1]
    inputs["guide_attention_mask"] = inputs["guide_attention_mask"][:1]
    with pytest.raises(ModelError, match="1 rows for 2 volumes"):
        model.get_image_features(**inputs)


@torch.no_grad()
def test_the_config_can_ask_for_router_logits_and_the_call_decides():
    model = tiny_model(output_router_logits=True)
    inputs = volume_inputs(model.config, [2])
    assert len(model.get_image_features(**inputs).routing.router_logits) == 2
    assert model.get_image_features(**inputs, output_router_logits=False).routing.router_logits is None
    model.config.output_router_logits = False
    assert model.get_image_features(**inputs).routing.router_logits is None
