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
"""What router logits mean: the losses of design section 2.3, and what can be told about where tokens went.

- `routing_losses`: load balance, z-loss and task cross-entropy of a batch, for training.
- `routing_statistics`: per MoE layer and group the load of every expert, entropy and agreement between slices.
- `routing_maps`: per MoE layer and group the first expert of every patch, for pictures.

Everything here counts the routed tokens only: neither air nor padding, and in a task group only the tokens of volumes
that were sent to one. None of it is evidence for what the model says.
"""

import torch
from torch import nn
from transformers.utils import ModelOutput

from .configuration_ct_moe import CTMoEConfig, CTMoEVisionConfig


def split_router_logits(logits: torch.Tensor, config: CTMoEVisionConfig) -> dict[str, torch.Tensor]:
    """The last dimension of router logits, by group: `shared`, `task`. Groups of one expert have none."""
    # CODEPATH: the ablation "task level only" has no shared router.
    shared = config.num_experts if config.shared_group and config.num_experts > 1 else 0
    parts = {"shared": logits[..., :shared], "task": logits[..., shared:]}
    return {name: part for name, part in parts.items() if part.shape[-1]}


def routing_losses(
    config: CTMoEConfig,
    router_logits: tuple[torch.Tensor, ...] | None,
    token_mask: torch.Tensor,
    task_logits: torch.Tensor | None,
    task_index: torch.Tensor | None,
    has_guide: torch.Tensor | None,
    task_ids: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The three losses of design section 2.3 and their weighted sum, each per volume and averaged over volumes.

    Args:
        config: gives the coefficients.
        router_logits: per MoE layer `(V, S * N, routed_experts)`, float32.
        token_mask: `(V, S * N)`, True for routed tokens.
        task_logits: `(V, num_tasks)`, None for a model without task groups.
        task_index: `(V,)`, the group of each volume, -1 for none.
        has_guide: `(V,)`, which volumes came with a prompt.
        task_ids: `(V,)`, labels, -100 for none.

    Returns:
        Scalars `aux_loss`, `balance_loss`, `z_loss`, `task_loss`.
    """
    zero = torch.zeros((), device=token_mask.device)
    balance_loss, z_loss, task_loss = zero, zero, zero
    if router_logits is not None:
        groups = split_router_logits(torch.stack(router_logits), config.vision_config)
        for name, logits in groups.items():
            group_mask = _tokens_of_group(name, token_mask, task_index)
            balance, z = _token_router_losses(logits, group_mask, config.vision_config.num_experts_per_tok)
            balance_loss, z_loss = balance_loss + balance, z_loss + z
    if task_logits is not None:
        labelled = task_ids >= 0
        cross_entropy = nn.functional.cross_entropy(task_logits, task_ids.clamp(min=0), reduction="none")
        task_loss = (cross_entropy * (has_guide & labelled)).mean()
        # E * sum f_e P_e of a volume that went to one of the groups: f is 1 for that one.
        top_probs = task_logits.softmax(dim=-1).amax(dim=-1)
        balance_loss = balance_loss + (task_logits.shape[-1] * top_probs * (has_guide & ~labelled)).mean()
    aux_loss = config.router_balance_coef * balance_loss + config.router_z_coef * z_loss + config.task_coef * task_loss
    return {"aux_loss": aux_loss, "balance_loss": balance_loss, "z_loss": z_loss, "task_loss": task_loss}


def routing_statistics(routing: ModelOutput, config: CTMoEVisionConfig) -> list[dict[str, torch.Tensor]]:
    """What each MoE layer did, in numbers per volume and group (`shared`, `task`).

    - `{group}_load` `(V, E)`: share of the routed tokens that each expert got. Even is 1 / E.
    - `{group}_entropy` `(V,)`: mean entropy of the router's softmax in nats, from 0 (sure) to log E (undecided).
    - `{group}_agreement` `(V,)`: share of its top-k experts that a patch has in common with the patch above it, in the
      next slice; 1 where anatomy is routed alike from slice to slice. Chance is k / E. NaN without such a pair.

    Args:
        routing: the [`CTMoERoutingOutput`] of a call with `output_router_logits=True`.
        config: the vision encoder's.

    Returns:
        One `dict` per MoE layer. A volume without a task group has zeros for it (NaN for the agreement).
    """
    statistics = []
    for layer_logits in routing.router_logits or ():
        layer = {}
        for name, logits in split_router_logits(layer_logits, config).items():
            mask = _tokens_of_group(name, routing.token_mask.bool(), routing.task_index)
            weight = mask.unsqueeze(-1)
            tokens = weight.sum(dim=1).clamp(min=1)
            probs = logits.softmax(dim=-1)
            chosen = _chosen_experts(logits, config.num_experts_per_tok)
            layer[f"{name}_load"] = (chosen * weight).sum(dim=1) / (tokens * config.num_experts_per_tok)
            layer[f"{name}_entropy"] = (torch.special.entr(probs) * weight).sum(dim=(1, 2)) / tokens.squeeze(-1)
            layer[f"{name}_agreement"] = _agreement(chosen, mask, config)
        statistics.append(layer)
    return statistics


def routing_maps(routing: ModelOutput, config: CTMoEVisionConfig) -> list[dict[str, torch.Tensor]]:
    """Which expert each patch prefers: per MoE layer and group int16 `(V, S, rows, columns)`, -1 where not routed.

    Experts are numbered within their group. `routing` must come from a call with `output_router_logits=True`.
    """
    maps = []
    for layer_logits in routing.router_logits or ():
        layer = {}
        for name, logits in split_router_logits(layer_logits, config).items():
            mask = _tokens_of_group(name, routing.token_mask.bool(), routing.task_index)
            first = logits.argmax(dim=-1).masked_fill(~mask, -1).to(torch.int16)
            layer[name] = _patches(first, config)
        maps.append(layer)
    return maps


def _patches(tokens: torch.Tensor, config: CTMoEVisionConfig) -> torch.Tensor:
    """`(V, S * N, ...)` to `(V, S, rows, columns, ...)`, class tokens left out."""
    grid = config.grid_size
    slices = tokens.unflatten(1, (-1, config.num_slice_tokens))
    return slices[:, :, -(grid**2) :].unflatten(2, (grid, grid))


def _agreement(chosen: torch.Tensor, mask: torch.Tensor, config: CTMoEVisionConfig) -> torch.Tensor:
    """`(V,)` from 0/1 choices `(V, S * N, E)`: shared experts of patches one above the other, both of them routed."""
    chosen, mask = _patches(chosen, config), _patches(mask, config)
    pairs = mask[:, 1:] & mask[:, :-1]
    common = (chosen[:, 1:] * chosen[:, :-1]).sum(dim=-1) / config.num_experts_per_tok
    return (common * pairs).sum(dim=(1, 2, 3)) / pairs.sum(dim=(1, 2, 3))


def _tokens_of_group(name: str, token_mask: torch.Tensor, task_index: torch.Tensor | None) -> torch.Tensor:
    """`token_mask` without the tokens of volumes that took part in no task group."""
    return token_mask if name == "shared" else token_mask & (task_index >= 0)[:, None]


def _chosen_experts(logits: torch.Tensor, num_experts_per_tok: int) -> torch.Tensor:
    """Float 0/1 tensor of the logits' shape: the experts that top-k takes."""
    index = logits.topk(num_experts_per_tok, dim=-1).indices
    return torch.zeros_like(logits).scatter_(-1, index, 1.0)


def _token_router_losses(
    logits: torch.Tensor, token_mask: torch.Tensor, num_experts_per_tok: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Switch load balance `E * sum_e f_e P_e` and z-loss of `(layers, V, S * N, E)` logits, mean over layers and V."""
    mask = token_mask.unsqueeze(-1)
    tokens = mask.sum(dim=1).clamp(min=1)  # (V, 1); a volume without tokens in the group adds 0
    load = (_chosen_experts(logits.detach(), num_experts_per_tok) * mask).sum(dim=2) / (tokens * num_experts_per_tok)
    probs = (logits.softmax(dim=-1) * mask).sum(dim=2) / tokens
    balance = logits.shape[-1] * (load * probs).sum(dim=-1)
    z = (logits.logsumexp(dim=-1, keepdim=True).square() * mask).sum(dim=(2, 3)) / tokens.squeeze(-1)
    return balance.mean(), z.mean()


__all__ = ["routing_losses", "routing_maps", "routing_statistics", "split_router_logits"]
