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
"""Design section 2.3 again, one token and one expert at a time, with nothing shared with the model but its weights."""

import math
from dataclasses import dataclass, field

import torch


def layer_norm(vector: torch.Tensor, norm: torch.nn.LayerNorm) -> torch.Tensor:
    centred = vector - vector.mean()
    return centred / torch.sqrt(centred.square().mean() + norm.eps) * norm.weight + norm.bias


def slow_guide(model, token_ids: list[int]) -> torch.Tensor:
    """g of one prompt, zeros for an empty one; no gradient reaches the embeddings."""
    encoder = model.model.guide_encoder
    if encoder is None or not token_ids:
        return torch.zeros(model.config.vision_config.guide_size)
    embeds = [model.get_input_embeddings().weight[token].detach() for token in token_ids]
    scores = torch.stack([embed @ encoder.query / math.sqrt(len(embed)) for embed in embeds])
    pooled = sum(weight * embed for weight, embed in zip(scores.softmax(dim=0), embeds))
    return encoder.proj.weight @ layer_norm(pooled, encoder.norm) + encoder.proj.bias


def slow_task(model, guide: torch.Tensor, has_guide: bool, task_id: int) -> tuple[int, torch.Tensor]:
    """Group of one volume, -1 for none, and the factor (1 + q_t - stopgrad(q_t)) of its output."""
    if not model.config.tasks:
        return -1, torch.tensor(1.0)
    if task_id >= 0:
        return task_id, torch.tensor(1.0)
    if not has_guide:
        return -1, torch.tensor(1.0)
    router = model.model.task_router
    probs = (router.weight @ guide + router.bias).softmax(dim=0)
    task = max(range(len(probs)), key=lambda j: probs[j].item())
    return task, 1 + probs[task] - probs[task].detach()


@dataclass
class Trace:
    """What the routers of one layer said: per group name, volume and routed token the logits and chosen experts."""

    logits: dict = field(default_factory=dict)
    chosen: dict = field(default_factory=dict)


def slow_moe_layer(model, layer_idx: int, states, routed, guides, tasks, gates) -> tuple[torch.Tensor, Trace]:
    """y of `states` (V, tokens, D): the FFN of every token, and the experts of those that are `routed`."""
    config = model.config.vision_config
    layer = model.model.vision_tower.layers[layer_idx]
    experts, act, trace = layer.moe.experts, layer.mlp.act_fn, Trace()

    def expert(number, x):
        inner = act(experts.up_proj[number] @ x + experts.up_proj_bias[number])
        return experts.down_proj[number] @ inner + experts.down_proj_bias[number]

    def group(name, router, row, first, count, x, key):
        """sum over the top k of w_e * Expert_e(x)."""
        if count == 1:
            return expert(first, x)
        guide = guides[key[0]]
        scaled = x
        if config.guide_interaction == "film":
            scaled = x * (1 + router.guide_scale[row] @ guide)
        logits = torch.stack([router.weight[row, e] @ scaled for e in range(count)])
        if config.guide_interaction in ("film", "bias"):
            logits = logits + torch.stack([router.guide_bias[row, e] @ guide for e in range(count)])
        probs = logits.exp() / logits.exp().sum()
        best = sorted(range(count), key=lambda e: -probs[e].item())[: config.num_experts_per_tok]
        trace.logits[name, *key], trace.chosen[name, *key] = logits, best
        total = sum(probs[e] for e in best) if config.norm_topk_prob else 1.0
        return sum(probs[e] / total * expert(first + e, x) for e in best)

    rows = []
    for volume in range(len(states)):
        for token, x in enumerate(states[volume]):
            y = layer.mlp.fc2(act(layer.mlp.fc1(x)))
            key = (volume, token)
            if routed[volume][token]:
                if config.shared_group:
                    y = y + group("shared", layer.moe.shared_router, 0, 0, config.num_experts, x, key)
                if (task := tasks[volume]) >= 0:
                    first = (config.num_experts if config.shared_group else 0) + task * config.num_task_experts
                    router = layer.moe.group_router
                    output = group("task", router, task, first, config.num_task_experts, x, key)
                    y = y + gates[volume] * output
            rows.append(y)
    return torch.stack(rows).view_as(states), trace


def slow_routed(inputs: dict, class_tokens: int) -> list[list[bool]]:
    """Which tokens are routed: those of real slices that are not air; a class token goes with its slice."""
    rows = []
    for slices, patches in zip(inputs["slice_mask"].tolist(), inputs["patch_mask"].flatten(2).tolist()):
        rows.append([real and flag for real, row in zip(slices, patches) for flag in [True] * class_tokens + row])
    return rows
