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
"""Both levels of the hierarchy, either one, or none: one config field away from each other, and counted by hand."""

import pytest
import torch
from tiny_model import tiny_config, tiny_model, volume_inputs

from ct_moe import CTMoEForConditionalGeneration


# Widths of tiny_model.py: D = 32, experts of 8, guide of 12, text of 24; E = 4, G = 3, two MoE layers.
EXPERT = 2 * 32 * 8 + 8 + 32
ROUTER = 4 * 32 + 32 * 12 + 4 * 12  # W, A and U of one group
GUIDE = 24 + 2 * 24 + 24 * 12 + 12  # query, norm, projection
TASK_ROUTER = 3 * 12 + 3
# Name -> the one field, and the parameters it leaves.
ABLATIONS = {
    "both levels": ({}, {}, 2 * (16 * EXPERT + 4 * ROUTER) + GUIDE + TASK_ROUTER),
    "token level only": ({}, {"tasks": []}, 2 * (4 * EXPERT + ROUTER) + GUIDE),
    "task level only": ({"num_experts": 1}, {}, 2 * 4 * EXPERT + GUIDE + TASK_ROUTER),
    "none": ({"moe_layers": []}, {}, 0),
}
ablations = pytest.mark.parametrize(("vision", "fields", "count"), ABLATIONS.values(), ids=ABLATIONS)


@ablations
def test_each_has_the_parameters_that_are_counted_by_hand(vision, fields, count):
    model = tiny_model(vision, **fields)
    dense = tiny_model({"moe_layers": []})
    sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in (model, dense)]
    assert sizes[0] - sizes[1] == count


@ablations
@torch.no_grad()
def test_each_routes_on_its_level_alone(vision, fields, count):
    model = tiny_model(vision, **fields)
    inputs = volume_inputs(model.config, [3, 2])
    outputs = model.get_image_features(**inputs, output_router_logits=True)
    names = {
        name.split(".")[1] if ".layers." not in name else name.split(".")[5] for name, _ in model.named_parameters()
    }
    task_level, token_level = (
        "num_experts" in vision or count == ABLATIONS["both levels"][2],
        "num_experts" not in vision,
    )
    token_level = token_level and count > 0
    assert ("task_router" in names) == (outputs.routing.task_index is not None) == task_level
    assert (outputs.routing.router_logits is not None) == ("shared_router" in names) == token_level
    # Every expert that is there can matter.
    before = outputs.last_hidden_state
    for layer in model.config.vision_config.moe_layers:
        model.model.vision_tower.layers[layer].moe.experts.down_proj.neg_()
    assert torch.equal(model.get_image_features(**inputs).last_hidden_state, before) == (count == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@ablations
@torch.no_grad()
def test_each_is_its_base_when_fresh(vision, fields, count, dtype):
    """Bit for bit, with guides and air: what is added adds zero, whatever it is computed in."""
    torch.manual_seed(0)
    model = CTMoEForConditionalGeneration(tiny_config(vision, **fields)).to(dtype).eval()
    dense = CTMoEForConditionalGeneration(tiny_config({"moe_layers": []})).to(dtype).eval()
    missing, _ = dense.load_state_dict(model.state_dict(), strict=False)
    assert missing == []
    inputs = volume_inputs(model.config, [3, 2])
    with_experts, without = (m.get_image_features(**inputs).last_hidden_state for m in (model, dense))
    assert with_experts.dtype == dtype
    assert torch.equal(with_experts, without)
