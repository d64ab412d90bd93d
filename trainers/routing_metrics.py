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
"""What the logs say about routing: the routing losses, loss per task, task router, load and entropy of the experts."""

import math

import torch

from ct_moe.configuration_ct_moe import CTMoEVisionConfig
from ct_moe.modeling_ct_moe import CTMoERoutingOutput
from ct_moe.routing_ct_moe import routing_statistics


LOSSES = ("aux_loss", "balance_loss", "z_loss", "task_loss")


def batch_sums(
    routing: CTMoERoutingOutput | None,
    nll: torch.Tensor,
    num_tokens: torch.Tensor,
    row_tasks: torch.Tensor,
    task_ids: torch.Tensor | None,
    num_volumes: int,
    num_tasks: int,
) -> torch.Tensor:
    """Sums of one batch that may be added over processes and batches, float64; `sums_to_metrics` reads them.

    Args:
        routing: of the batch's volumes; None for a batch without.
        nll: `(batch_size,)` negative log-likelihood of every row.
        num_tokens: `(batch_size,)` tokens it is a sum over.
        row_tasks: `(batch_size,)`, -100 for none.
        task_ids: `(V,)` labels of the volumes.
        num_volumes: volumes that count; 0 where the batch only fills a gap.
        num_tasks: of the model.
    """
    tasks = torch.where(row_tasks < 0, num_tasks, row_tasks)  # unlabelled rows come last
    tokens_of_task = nll.new_zeros(num_tasks + 1, dtype=torch.float64).index_add_(0, tasks, num_tokens.double())
    nll_of_task = torch.zeros_like(tokens_of_task).index_add_(0, tasks, nll.double())
    losses = nll_of_task.new_zeros(len(LOSSES))
    correct = nll_of_task.new_zeros(2)  # right choices, labelled volumes
    if routing is not None and num_volumes:
        if routing.aux_loss is not None:
            losses = torch.stack([getattr(routing, name).double() for name in LOSSES]) * num_volumes
        if routing.task_logits is not None and task_ids is not None:
            labelled = task_ids >= 0
            right = (routing.task_logits.argmax(dim=-1) == task_ids) & labelled
            correct = torch.stack([right.sum(), labelled.sum()]).double()
    volumes = torch.full_like(losses[:1], num_volumes)
    return torch.cat([losses, volumes, correct, nll_of_task, tokens_of_task]).detach()


def sums_to_metrics(sums: torch.Tensor, tasks: list[str], training: bool) -> dict[str, float]:
    """Means by name: what is in no batch has no entry."""
    values = sums.tolist()
    losses, values = values[: len(LOSSES)], values[len(LOSSES) :]
    (volumes, right, labelled), values = values[:3], values[3:]
    metrics = {}
    if training and volumes:
        metrics |= {name: total / volumes for name, total in zip(LOSSES, losses)}
    if labelled:
        metrics["task_router_accuracy"] = right / labelled
    nll, tokens = values[: len(tasks) + 1], values[len(tasks) + 1 :]
    for task, task_nll, task_tokens in zip([*tasks, "unlabelled"], nll, tokens):
        if task_tokens:
            metrics[f"loss_{task}"] = task_nll / task_tokens
    return metrics


def language_sums(sums: torch.Tensor, num_tasks: int) -> tuple[float, float]:
    """Negative log-likelihood and number of tokens over all tasks."""
    nll, tokens = sums[len(LOSSES) + 3 :].split(num_tasks + 1)
    return nll.sum().item(), tokens.sum().item()


def expert_metrics(routing: CTMoERoutingOutput | None, config: CTMoEVisionConfig) -> dict[str, torch.Tensor]:
    """Load of the busiest and of the idlest expert (even is 1) and the routers' entropy (1 is undecided), per group.

    Means over layers and volumes.
    """
    metrics = {}
    layers = [] if routing is None else routing_statistics(routing, config)
    for group in ("shared", "task"):
        loads = [layer[f"{group}_load"] for layer in layers if f"{group}_load" in layer]
        if loads:
            load = torch.stack(loads).mean(dim=1)  # (layers, E)
            experts = load.shape[-1]
            entropy = torch.stack([layer[f"{group}_entropy"] for layer in layers]).mean() / math.log(experts)
            metrics[f"{group}_load_max"] = load.amax(dim=-1).mean() * experts
            metrics[f"{group}_load_min"] = load.amin(dim=-1).mean() * experts
            metrics[f"{group}_entropy"] = entropy
    return metrics
