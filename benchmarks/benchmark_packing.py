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
"""What it is worth that questions about one scan share its pass through the vision encoder.

    OMP_NUM_THREADS=1 python benchmarks/benchmark_packing.py [--model DIR] [--questions 8] [--slices 24]

A step (forward and backward pass, without reading) on the same questions about the same scans: as rows of their own,
as one would train without packing, and packed. Ratios are medians over rounds in which both ran in turn; beside them
the floating-point operations, and the largest difference of the losses of a model that routes nothing by the text,
where both must agree.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch.utils.flop_counter import FlopCounterMode

from ct_moe import Volume
from ct_moe.hub.folder import load_folder
from ct_moe.trainers import CTMoEDataCollator
from ct_moe.trainers.packing import pack_rows
from ct_moe.trainers.rows import ROW_FEATURES


QUESTIONS = ["Is there a pleural effusion?", "Where is the lung nodule?", "How many liver lesions are there?"]
ANSWERS = ["Yes, there is one on the left side.", "In the right upper lobe.", "Two."]
ROUTING = ("guide_input_ids", "guide_attention_mask", "task_ids")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).parents[1] / "examples" / "demo_model"))
    parser.add_argument("--questions", type=int, default=8, help="about every scan")
    parser.add_argument("--scans", type=int, default=2)
    parser.add_argument("--slices", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    model, processor, _ = load_folder(args.model, dtype="float32")
    model.train()
    model.config.vision_config.router_jitter = 0.0
    batches = {name: batch_of(rows, processor, args) for name, rows in rows_of(args).items()}
    seconds = {name: [] for name in batches}
    for round_ in range(args.rounds + 1):
        for name, batch in batches.items():
            started = time.perf_counter()
            step(model, batch)
            if round_:  # the first one warms up
                seconds[name].append(time.perf_counter() - started)
    work = {name: operations(model, batch) for name, batch in batches.items()}
    ratio = statistics.median(apart / packed for apart, packed in zip(*seconds.values()))
    print(f"{args.scans} scans of {args.slices} slices, {args.questions} questions about each, {args.model}")
    for name in batches:
        median = statistics.median(seconds[name])
        texts = args.scans * args.questions / median
        print(f"{name:>8}: {median:.3f} s a step, {texts:.1f} questions/s, {work[name] / 1e12:.3f} TFLOP")
    fewer = work["apart"] / work["packed"]
    print(f"packed: {ratio:.2f} times as many questions a second, {fewer:.2f} times fewer FLOPs")
    losses = [step(model, {k: v for k, v in batch.items() if k not in ROUTING}) for batch in batches.values()]
    print(f"difference of the losses without text in the routing: {abs(losses[0] - losses[1]):.1e}")


def rows_of(args: argparse.Namespace) -> dict[str, Dataset]:
    rows = [
        {
            "images": [str(scan)],
            "prompt": [{"role": "user", "content": f"{QUESTIONS[number % 3]} ({number})"}],
            "completion": [{"role": "assistant", "content": ANSWERS[number % 3]}],
            "task": "vqa_open",
            "row": scan * args.questions + number,
        }
        for scan in range(args.scans)
        for number in range(args.questions)
    ]
    rows = Dataset.from_list(rows, features=ROW_FEATURES)
    return {"apart": rows, "packed": pack_rows(rows, args.questions)}


def batch_of(rows: Dataset, processor, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """With a made-up scan in place of every path: reading is not what is measured."""
    spacing = (processor.image_processor.slab_mm, 4.0, 4.0)
    scans = {}
    for scan in range(args.scans):
        hu = np.random.default_rng(scan).normal(0, 300, (args.slices, 96, 96)).astype(np.float32)
        volume = Volume(hu, spacing, np.diag([4.0, 4.0, spacing[0], 1.0]), {"intensity": "hu"})
        scans[str(scan)] = processor.image_processor.process_volume(volume)
    collator = CTMoEDataCollator(processor)
    collator.process = scans.__getitem__
    return {name: value for name, value in collator(rows.to_list()).items() if isinstance(value, torch.Tensor)}


def step(model, batch: dict[str, torch.Tensor]) -> float:
    model.zero_grad()
    loss = model(**{name: value for name, value in batch.items() if name != "row_tasks"}).loss
    loss.backward()
    return loss.item()


def operations(model, batch: dict[str, torch.Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        step(model, batch)
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
