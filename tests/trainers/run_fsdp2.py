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
"""Two steps of a stage with FSDP2 over gloo: torchrun run_fsdp2.py JSON.

Keys: model, out, stage, language_model, rows (a list of toy rows per process). One process alone has all of them, a
loss for each list. Writes the whole parameters after the steps, and which were sharded.
"""

import json
import os
import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ct_moe.hub.folder import load_folder
from ct_moe.trainers import CTMoEDataCollator, Stage1Config, Stage2Config, prepare_stage
from ct_moe.trainers.stages import hold_frozen_experts


def main() -> None:
    task = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    world = int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model, processor, _ = load_folder(task["model"], dtype="float32")
    config = Stage1Config if task["stage"] == 1 else Stage2Config
    settings = {"output_dir": task["out"], "use_cpu": True, "lora_dropout": 0.0}
    stage = config(**settings, train_language_model=task["language_model"])
    torch.manual_seed(0)
    network = prepare_stage(model, stage)
    if world > 1:
        mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
        names = {"CTMoEVisionLayer", "CTMoEVisionEmbeddings", "Phi3DecoderLayer"}
        for module in list(network.modules()):
            if type(module).__name__ in names:
                fully_shard(module, mesh=mesh)
        fully_shard(network, mesh=mesh)
    hold_frozen_experts(network)
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.05)
    collator = CTMoEDataCollator(processor)
    mine = task["rows"][rank : rank + 1] if world > 1 else task["rows"]
    network.train()
    for _ in range(2):
        for rows in mine:
            batch = collator(rows)
            for name in ("row_names", "row_tasks", "num_volumes", "failed_rows"):
                batch.pop(name)
            (network(**batch).loss / len(mine)).backward()
        optimizer.step()
        optimizer.zero_grad()
    sharded = [name for name, p in network.named_parameters() if isinstance(p, DTensor)]
    whole = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone().contiguous()
        for name, p in network.named_parameters()
    }
    if rank == 0:
        save_file(whole, task["out"])
        print(json.dumps({"world": dist.get_world_size(), "sharded": len(sharded), "parameters": len(whole)}))
    dist.barrier()
    # All is written. Without the teardown, in which gloo now and then aborts when the other process has gone first.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
