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
"""The paper's claims on phantoms: every arm trained with the same budget, scored on the same held-out scans.

    python examples/phantom/ablations.py --data phantoms --base phantom-base --out phantom-ablations

Runs what is not there yet, one after the other, and can be cut off and started again at any time, also on several
machines that share or later merge --out: `--part 1/3` does every third run. `--list` shows all and which are done.
`--split validation` is for choosing settings; results of the test split are written once and never overwritten.
`python examples/phantom/results.py --out phantom-ablations` turns the runs into the table and plots of RESULTS.md.

The primary endpoint, named before the first run: accuracy of all closed questions of the test split together.
"""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from pretrain_base import SLICES
from torch import nn
from torch.utils.data import SequentialSampler
from train_demo import SETTINGS, make_model
from transformers import AutoConfig, LlavaForConditionalGeneration

from ct_moe import CTMoEError, CTMoEForConditionalGeneration, CTMoEProcessor
from ct_moe.trainers.packing import pack_rows
from ct_moe.trainers.phantoms.benchmark import evaluate_phantoms
from ct_moe.trainers.recipe import StageConfig, load_recipe
from ct_moe.trainers.rows import check_tasks, interleave_tasks, load_rows
from ct_moe.trainers.sft_trainer import CTMoESFTTrainer
from ct_moe.trainers.stages import prepare_stage
from ct_moe.trainers.volume_cache import VolumeCache


TASKS = ("report", "vqa_closed", "vqa_open")
EXPERTS, WIDTH = SETTINGS["num_experts"], SETTINGS["moe_intermediate_size"]  # per group; of each
GROUPS = 1 + len(TASKS)
DENSE = {"moe_layers": []}
ALL_SLICES = SLICES["max_slices"]  # pz = all
STEPS = (150, 75)  # of stage 1 and stage 2, 16 rows each; all else as in the recipe of the demo model
RECIPE = Path(__file__).with_name("recipe.yaml")
SCORED_SCANS = 160
ADDED = (".moe.", "guide_encoder.", "task_router.", "slice_scoring.")  # parts that the base does not have


@dataclass
class Arm:
    """One way to build and train the model.

    Attributes:
        question: letter of the claim.
        name: of the arm.
        seeds: how many runs.
        convert: settings of the conversion, in place of those of the demo model.
        scans: training scans; `None` for all.
        scratch: forget the pretrained weights; the same network, scans and steps.
        two_stages: False: one stage of the same length that trains everything both stages train.
        groups: what the expert groups of a row are: "task" or "scan" (a hash of the scan's name).
        labelled: whether rows tell their task in training.
        task_embedding: a learned vector per task, added before the first layer that has experts in other arms.
        wrong_group: also score the model with the next task's group forced.
    """

    question: str
    name: str
    seeds: int = 3
    convert: dict[str, Any] = field(default_factory=dict)
    scans: int | None = None
    scratch: bool = False
    two_stages: bool = True
    groups: str = "task"
    labelled: bool = True
    task_embedding: bool = False
    wrong_group: bool = False


def arms() -> list[Arm]:
    """Every arm, in the order in which they run: the shared reference first."""
    reference = Arm("c", "both levels", seeds=5, wrong_group=True)
    found = [reference]
    # (c) What the experts bring. One expert without a router is a dense layer beside the FFN.
    one = {"tasks": [], "num_experts": 1}
    found += [
        replace(
            reference,
            name="dense, equal total",
            convert=one | {"moe_intermediate_size": GROUPS * EXPERTS * WIDTH},
            wrong_group=False,
        ),
        replace(
            reference,
            name="dense, equal active",
            convert=one | {"moe_intermediate_size": 2 * WIDTH},
            wrong_group=False,
        ),
        replace(
            reference,
            name="dense with a task embedding",
            convert={"num_experts": 1, "moe_intermediate_size": 2 * WIDTH},
            task_embedding=True,
            wrong_group=False,
        ),
        replace(
            reference,
            name="token level",
            convert={
                "tasks": [],
                "num_experts": GROUPS * EXPERTS,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": WIDTH,
            },
            wrong_group=False,
        ),
        replace(
            reference,
            name="task level",
            convert={"num_experts": 1, "moe_intermediate_size": EXPERTS * WIDTH},
            wrong_group=False,
        ),
        replace(reference, name="both levels, groups by scan", groups="scan", wrong_group=False),
    ]
    # (d) Two stages.
    found.append(Arm("d", "one stage", seeds=5, two_stages=False))
    # (a) Reuse of the 2D pretraining, by the number of scans.
    for scans in (50, 200, 800, None):
        found += [
            Arm("a", f"reused, {scans or 'all'} scans", scans=scans),
            Arm("a", f"from scratch, {scans or 'all'} scans", scans=scans, scratch=True),
        ]
    # (b) Attention across slices, without experts.
    for pz in (1, ALL_SLICES):
        for name, layers in (("none", []), ("upper half", [2, 3]), ("all", [0, 1, 2, 3])):
            for fraction in (0.5, 0.0) if layers else (0.5,):
                rotary = "" if fraction else ", no rotary"
                found.append(
                    Arm(
                        "b",
                        f"volume layers: {name}{rotary}, pz {'all' if pz > 1 else 1}",
                        convert={
                            **DENSE,
                            "volume_layers": layers,
                            "depth_rotary_fraction": fraction,
                            "pool": [pz, 2, 2],
                        },
                    )
                )
    # (e) Slice scores.
    found += [
        Arm("e", "TG-IS, published", convert={"slice_scoring": "tgis", "tgis_variant": "paper"}),
        Arm("e", "TG-IS, normalised", convert={"slice_scoring": "tgis", "tgis_temperature": 0.8}),
    ]
    # (f) Tasks nobody named.
    found.append(Arm("f", "label-free routing", labelled=False))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("phantoms"), help="folder written by ct-moe phantom")
    parser.add_argument("--base", type=Path, default=Path("phantom-base"), help="written by pretrain_base.py")
    parser.add_argument("--out", type=Path, default=Path("phantom-ablations"))
    parser.add_argument("--only", default="", help="letters of the claims to run, such as cd")
    parser.add_argument("--seeds", type=int, default=5, help="at most so many seeds of every arm")
    parser.add_argument("--part", default="1/1", help="I/N: every N-th run, from the I-th")
    parser.add_argument("--split", default="test", choices=["validation", "test"])
    parser.add_argument("--steps", type=int, nargs=2, default=STEPS, help="of stage 1 and stage 2")
    parser.add_argument("--list", action="store_true", help="show all runs and which are done")
    args = parser.parse_args()
    runs = [
        (arm, seed)
        for arm in arms()
        for seed in range(min(arm.seeds, args.seeds))
        if not args.only or arm.question in args.only
    ]
    runs.sort(key=lambda run: run[1])  # the first seed of every arm before the second of any
    part, parts = map(int, args.part.split("/"))
    runs = runs[part - 1 :: parts]
    if args.list:
        for arm, seed in runs:
            done = "done" if result_file(args.out, args.split, arm, seed).is_file() else "-"
            print(f"{done:5}({arm.question}) {arm.name}, seed {seed}")
        return
    try:
        for number, (arm, seed) in enumerate(runs, 1):
            file = result_file(args.out, args.split, arm, seed)
            if file.is_file():
                continue
            print(f"{number} of {len(runs)}: ({arm.question}) {arm.name}, seed {seed}", flush=True)
            result = run(arm, seed, args)
            file.parent.mkdir(parents=True, exist_ok=True)
            part_file = file.with_suffix(".part")
            part_file.write_text(json.dumps(result) + "\n", encoding="utf-8")
            part_file.replace(file)
            scores = result["scores"]
            print(
                f"  closed {100 * scores['closed']['accuracy']:.1f} %, between slices "
                f"{100 * scores['closed']['kinds']['between_slices']:.1f} %, {result['seconds']:.0f} s",
                flush=True,
            )
    except CTMoEError as error:
        sys.exit(f"ablations: error: {error}")


def result_file(out: Path, split: str, arm: Arm, seed: int) -> Path:
    name = "".join(c if c.isalnum() else "-" for c in arm.name)
    return out / split / f"{arm.question}_{name}_{seed}.json"


def run(arm: Arm, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Convert, train both stages, score."""
    started = time.monotonic()
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder, base = Path(temporary) / "model", args.base
        if arm.scratch:
            base = forget(base, Path(temporary) / "base")
        make_model(base, folder, **{**SETTINGS, "tasks": list(TASKS), **arm.convert})
        processor = CTMoEProcessor.from_pretrained(folder)
        model = CTMoEForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        redraw_added(model, seed)
        if arm.task_embedding:
            add_task_embedding(model)
        steps = train(model, processor, arm, seed, args, Path(temporary))
    trained = time.monotonic()
    cache = VolumeCache(args.data / "slices", processor.image_processor)
    settings = {"split": args.split, "scans": SCORED_SCANS, "controls": (), "tasks": ("vqa_closed", "vqa_open")}
    settings |= {"volume_cache": cache, "batch_size": 32, "progress": False}

    def task_of(row: dict) -> str | None:
        if arm.groups == "scan":
            return TASKS[scan_hash(row["images"])]
        return row["task"] if arm.task_embedding else None

    scores = evaluate_phantoms(model, processor, args.data, task=task_of, **settings)
    record = {
        "arm": {"question": arm.question, "name": arm.name},
        "seed": seed,
        "steps": steps,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "threads": torch.get_num_threads(),
        "seconds_training": round(trained - started, 1),
        "scores": scores,
    }
    if arm.wrong_group:
        following = dict(zip(TASKS, (*TASKS[1:], TASKS[0])))
        wrong = evaluate_phantoms(model, processor, args.data, task=lambda row: following[row["task"]], **settings)
        record["wrong_group"] = wrong
    return {**record, "seconds": round(time.monotonic() - started, 1)}


def forget(base: Path, folder: Path) -> Path:
    """The base with random weights, drawn as the library draws them."""
    shutil.copytree(base, folder)
    config = AutoConfig.from_pretrained(base, dtype="float32")
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


@torch.no_grad()
def redraw_added(model: CTMoEForConditionalGeneration, seed: int) -> None:
    """Other random weights in what the base does not have, for every run: conversion alone always draws the same."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        # Not what starts at one or zero, such as norms and the experts' outputs.
        if any(part in name for part in ADDED) and parameter.std() > 0:
            parameter.copy_(parameter.mean() + parameter.std() * torch.randn(parameter.shape, generator=generator))


def train(model, processor, arm: Arm, seed: int, args: argparse.Namespace, folder: Path) -> list[int]:
    """Both stages in memory; returns their steps."""
    rows = load_rows(args.data / "train.jsonl")
    if arm.scans is not None:
        kept = set(sorted({row[0] for row in rows["images"]})[: arm.scans])
        rows = rows.filter(lambda row: row["images"][0] in kept)
    stages = stage_configs(model, arm, seed, args, folder)
    for stage in stages:
        prepare_stage(model, stage)
        if arm.task_embedding:
            model.task_embedding.requires_grad_(True)
        data = stage_rows(rows, arm, stage, args)
        if arm.groups == "scan":
            data = data.map(lambda row: {"task": TASKS[scan_hash(row["images"][0])]})
        if not arm.labelled or not model.config.tasks:
            data = data.map(lambda row: {"task": None})
        data = check_tasks(data, list(model.config.tasks))
        InOrder(model=model, args=stage, train_dataset=data, processing_class=processor).train()
    return [stage.max_steps for stage in stages]


def stage_rows(rows: Dataset, arm: Arm, stage: StageConfig, args: argparse.Namespace) -> Dataset:
    """The rows of every step, in order. All arms see the same: packed by task as in stage 1, then as in stage 2."""
    recipe = load_recipe(RECIPE)
    parts = []
    for number, (half, steps) in enumerate(zip((recipe.stage1, recipe.stage2), args.steps), 1):
        if arm.two_stages and not isinstance(stage, type(half)):
            continue
        packed = pack_rows(rows, half.questions_per_scan, stage.seed)
        if half.even_tasks:
            packed = interleave_tasks(packed, stage.seed)
        rng = np.random.default_rng([stage.seed, number])
        needed = steps * stage.per_device_train_batch_size
        passes = [rng.permutation(len(packed)) for _ in range(-(-needed // len(packed)))]
        parts.append(packed.select(np.concatenate(passes)[:needed]))
    return concatenate_datasets(parts)


class InOrder(CTMoESFTTrainer):
    """Takes the rows as they come: they are in random order already."""

    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)


def stage_configs(model, arm: Arm, seed: int, args: argparse.Namespace, folder: Path) -> list[StageConfig]:
    """The stages of the demo model's recipe, shortened."""
    settings = {
        "output_dir": str(folder),
        "volume_cache": str(args.data / "slices"),
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "no",
        "logging_steps": 50,
        "disable_tqdm": True,
        "seed": seed,
        "stage1.max_steps": args.steps[0],
        "stage2.max_steps": args.steps[1],
    }
    if arm.task_embedding or not (model.config.vision_config.moe_layers and model.config.tasks):
        settings["stage2.train_task_groups"] = "off"
    if not arm.two_stages:
        settings |= {"stage2.train_volume_layers": "full", "stage2.train_shared_group": "full"}
        settings["stage2.max_steps"] = sum(args.steps)
    recipe = load_recipe(RECIPE, [f"{name}={json.dumps(value)}" for name, value in settings.items()])
    return [recipe.stage1, recipe.stage2] if arm.two_stages else [recipe.stage2]


def scan_hash(name: str) -> int:
    """Number of a group, from the scan's name alone."""
    return hashlib.sha256(Path(name).name.encode()).digest()[0] % len(TASKS)


def add_task_embedding(model: CTMoEForConditionalGeneration) -> None:
    """A vector per task on every token, before the first layer with experts."""
    tower = model.model.vision_tower
    model.task_embedding = nn.Embedding(len(TASKS), model.config.vision_config.hidden_size)
    nn.init.zeros_(model.task_embedding.weight)
    chosen: list[torch.Tensor] = []

    def remember(module, inputs, named) -> None:
        chosen[:] = [named["task_index"]]

    def add(module, inputs):
        hidden_states, num_slices, *rest = inputs
        vectors = model.task_embedding(chosen[0].clamp(min=0)).repeat_interleave(num_slices, dim=0)
        return hidden_states + vectors[:, None].to(hidden_states.dtype), num_slices, *rest

    tower.register_forward_pre_hook(remember, with_kwargs=True)
    tower.layers[min(model.config.vision_config.moe_layers)].register_forward_pre_hook(add)


if __name__ == "__main__":
    main()
