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
"""What training makes of the routers, in toy runs: gradients, collapse, slices that are asked for."""

import pytest
import torch
from tiny_model import prompt_inputs, tiny_config, volume_inputs

from ct_moe import CTMoEForConditionalGeneration
from ct_moe.routing_ct_moe import routing_statistics


def fresh_model(vision=None, **fields) -> CTMoEForConditionalGeneration:
    """As converted, zero-initialised where the design says so, in training mode."""
    torch.manual_seed(0)
    return CTMoEForConditionalGeneration(tiny_config(vision, **fields)).train()


def test_the_language_loss_alone_reaches_every_router_from_the_second_step_on():
    model = fresh_model(router_balance_coef=0, router_z_coef=0, task_coef=0)
    assert model.config.vision_config.num_experts_per_tok == 1
    inputs = {**volume_inputs(model.config, [3, 3, 2, 2]), **prompt_inputs(model.config, [[3], [3], [2], [2]])}
    inputs["task_ids"] = torch.tensor([0, 1, 2, -100])
    routers = {n: p for n, p in model.named_parameters() if "_router." in n and "task_router" not in n}
    assert len(routers) == 2 * 2 * 3  # layers, shared and task, W and A and U
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def step():
        optimizer.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        # One row per task; the shared router has one.
        return {name: p.grad.flatten(1).abs().amax(dim=1) for name, p in routers.items()}

    assert not any(rows.any() for rows in step().values())  # the experts still add nothing
    optimizer.step()
    second = step()
    # A is multiplied by W x only, so it moves with the rest; no router waits for another step.
    assert all((rows > 0).all() for rows in second.values()), second
    assert model.model.task_router.weight.grad.any()  # by the unlabelled row


@pytest.mark.parametrize("balanced", [True, False], ids=["with balance loss", "without"])
def test_a_collapsed_router_recovers_with_the_balance_loss_and_not_without(balanced):
    """All tokens of every volume go to one expert of the shared group at first."""
    model = fresh_model(
        {"moe_layers": [3], "guide_interaction": "none", "router_jitter": 0.0},
        tasks=[],
        router_balance_coef=0.01 if balanced else 0.0,
        router_z_coef=0.0,
    )
    inputs = {**volume_inputs(model.config, [3, 3], air=0), **prompt_inputs(model.config, [[3], [3]])}
    layer = model.model.vision_tower.layers[3]
    with torch.no_grad():  # a constant feature of the norm, and one expert that likes it: by 3 nats, as after training
        layer.layer_norm2.weight[0], layer.layer_norm2.bias[0] = 0.0, 1.0
        layer.moe.shared_router.weight[0, :, 0] = 0.0
        layer.moe.shared_router.weight[0, 2, 0] = 3.0

    def load():
        with torch.no_grad():
            routing = model(**inputs, output_router_logits=True).routing
        return routing_statistics(routing, model.config.vision_config)[0]["shared_load"].mean(dim=0)

    assert load()[2] == 1.0
    optimizer = torch.optim.AdamW(model.model.vision_tower.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(200):
        optimizer.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    if balanced:
        assert load().max() < 0.5
        assert load().min() > 0.05
    else:
        assert load()[2] > 0.95
