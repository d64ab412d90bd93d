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
"""The ceiling beside the demo model: a classifier of the same `pixel_values`, trained with the labels themselves.

    python examples/phantom/ceiling.py --data phantoms --model examples/demo_model

A small convolutional network sees every slab, takes the maximum over slabs and scores the ten findings. It needs no
words, and is told which scans have a finding but not where: a model whose tower was told that can be above it.
Thresholds come from the validation split.
"""

import argparse
import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ct_moe import CTMoEError, CTMoEProcessor
from ct_moe.trainers.native_bfloat16 import has_native_bfloat16
from ct_moe.trainers.phantoms.benchmark import read_split
from ct_moe.trainers.phantoms.labels import FINDINGS
from ct_moe.trainers.phantoms.scores import f1_score
from ct_moe.trainers.volume_cache import VolumeCache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder written by ct-moe phantom")
    parser.add_argument("--model", required=True, help="whose image processor is used")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--out", default=None, type=Path, help="folder for ceiling.json")
    args = parser.parse_args()
    try:
        scores = run(args.data, args.model, args.epochs)
    except CTMoEError as error:
        sys.exit(f"ceiling: error: {error}")
    print(f"macro F1 {scores['macro_f1']:.3f}")
    for name, f1 in scores["f1"].items():
        print(f"  {name:16}{f1:.2f}")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "ceiling.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")


def run(data: Path, model: str, epochs: int) -> dict:
    torch.manual_seed(0)
    cache = VolumeCache(data / "slices", CTMoEProcessor.from_pretrained(model).image_processor)
    scans, targets = read(data, "train", cache)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = Classifier().to(device)
    batches = max(1, len(scans) // 16)
    steps = epochs * batches
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in tqdm(range(steps), desc="ceiling"):
        if step % batches == 0:
            order = torch.randperm(len(scans))
        batch = order[step % batches * 16 :][:16]
        with torch.autocast(device.type, torch.bfloat16, enabled=has_native_bfloat16(device)):
            scores = network([scans[i].to(device) for i in batch])
        loss = nn.functional.binary_cross_entropy_with_logits(scores.float(), targets[batch].to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    network.eval().to("cpu")
    validation, wanted = predict(network, *read(data, "validation", cache))
    thresholds = [
        max(np.unique(scores), key=lambda threshold: f1_of(scores >= threshold, truth))
        for scores, truth in zip(validation.T, wanted.T)
    ]
    test, wanted = predict(network, *read(data, "test", cache))
    f1 = {name: f1_of(test[:, i] >= thresholds[i], wanted[:, i]) for i, name in enumerate(FINDINGS)}
    return {"macro_f1": float(np.mean(list(f1.values()))), "f1": f1, "epochs": epochs, "scans": len(scans)}


class Classifier(nn.Module):
    """(slabs, 3, height, width) of every scan -> one score per finding."""

    def __init__(self):
        super().__init__()
        widths = (3, 24, 48, 96, 128)
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.head = nn.Linear(2 * widths[-1], len(FINDINGS))

    def forward(self, scans: list[torch.Tensor]) -> torch.Tensor:
        hidden_states = torch.cat(scans).float()
        for convolution, norm in zip(self.convolutions, self.norms):
            hidden_states = norm(convolution(hidden_states)).relu()
        largest, mean = hidden_states.amax((2, 3)), hidden_states.mean((2, 3))
        counts = [len(scan) for scan in scans]
        pooled = [torch.cat([a.amax(0), b.mean(0)]) for a, b in zip(largest.split(counts), mean.split(counts))]
        return self.head(torch.stack(pooled))


def read(data: Path, split: str, cache: VolumeCache) -> tuple[list[torch.Tensor], torch.Tensor]:
    _, labels = read_split(data, split)
    scans = [torch.from_numpy(cache.read(str(data / name))["pixel_values"]).bfloat16() for name in sorted(labels)]
    found = [{finding["name"] for finding in labels[name]["findings"]} for name in sorted(labels)]
    return scans, torch.tensor([[float(name in names) for name in FINDINGS] for names in found])


@torch.inference_mode()
def predict(network: Classifier, scans: list[torch.Tensor], targets: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    scores = torch.cat([network(scans[start : start + 16]) for start in range(0, len(scans), 16)])
    return scores.numpy(), targets.numpy() > 0.5


def f1_of(said: np.ndarray, truth: np.ndarray) -> float:
    return f1_score((said & truth).sum(), said.sum(), truth.sum())


if __name__ == "__main__":
    main()
