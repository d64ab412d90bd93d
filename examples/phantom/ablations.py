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

    python examples/phantom/pretrain_base.py --data phantoms --out phantom-base
    python examples/phantom/teach_base.py --data phantoms --out taught-base
    python examples/phantom/ablations.py --data phantoms --base phantom-base --taught taught-base

Runs what is not there yet, one after the other, and can be cut off and started again at any time. `--part 1/3` does
every third run: parts can run at the same time, on one machine or on several that share or later merge --out. On a
machine with several GPUs give each process one of them (CUDA_VISIBLE_DEVICES). `--list` shows all and which are done.
`--split validation` is for choosing settings; results of the test split are written once and never overwritten.
`python examples/phantom/results.py --out phantom-ablations` turns the runs into the table and plots of RESULTS.md.

In (a) all arms start with the 2D base, in all others with the taught base, whose language model can read the tower:
from the 2D base it would learn, within the eight minutes of a run, to tell the phase and half of the abnormalities,
and no arm could show how well it tells the rest. A record keeps which questions were answered rightly, not the words.

The primary endpoint, named before the first run: accuracy of all closed questions of the test split together.
"""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from pretrain_base import SLICES, VISION
from torch import nn
from torch.utils.data import SequentialSampler
from train_demo import SETTINGS, make_model
from transformers import AutoConfig, LlavaForConditionalGeneration

from ct_moe import (
    CTMoEError,
    CTMoEForConditionalGeneration,
    CTMoEProcessor,
    CTMoEVisionConfig,
    DataError,
    TrainingError,
)
from ct_moe.hub.whole_file import whole_file
from ct_moe.trainers.evaluation.answering import Answer, answer_rows
from ct_moe.trainers.evaluation.closed_questions import score_closed
from ct_moe.trainers.evaluation.cut_numbers import cut_percent
from ct_moe.trainers.native_bfloat16 import has_native_bfloat16
from ct_moe.trainers.packing import pack_rows
from ct_moe.trainers.phantoms.benchmark import read_split
from ct_moe.trainers.recipe import Stage2Config, StageConfig, TwoStageRecipe, load_recipe
from ct_moe.trainers.rows import check_tasks, interleave_tasks, load_rows
from ct_moe.trainers.sft_trainer import CTMoESFTTrainer
from ct_moe.trainers.stages import ALWAYS_FROZEN, TRAINABLE_PARTS, part_of_parameters, prepare_stage
from ct_moe.trainers.volume_cache import VolumeCache


TASKS = ("report", "vqa_closed", "vqa_open")
EXPERTS, WIDTH = SETTINGS["num_experts"], SETTINGS["moe_intermediate_size"]  # per group; of each
GROUPS = 1 + len(TASKS)
DENSE = {"moe_layers": []}
NO_EXPERTS, LARGE_EXPERTS = "no experts", "both levels, as wide as the FFN, in both volume layers"
ALL_SLICES = SLICES["max_slices"]  # pz = all
POOL = [ALL_SLICES, 2, 2]  # unless an arm says otherwise: else the language model can join the slices itself
STEPS = (40, 60)  # of stage 1 and stage 2
FEWER = (40, 20)  # of the arms that have no experts to train in stage 2, but the whole tower
FROM_2D = (50, 10)  # of those that start from the 2D base and train everything, which takes longest
BATCH = 4  # rows per step
RATES = 0.07  # of the recipe's learning rates for what is pretrained: those are for 32 rows, and unsettle a good start
SCARCITY = (15, 60, 480)  # training scans of (a): with the last, every row has its own
REUSE = {"reused": "nothing", "vision from scratch": "vision", "from scratch": "everything"}
RECIPE = Path(__file__).with_name("recipe.yaml")
SCORED_SCANS = 144
ADDED = (".moe.", "guide_encoder.", "task_router.", "slice_scoring.")  # parts that the base does not have
TOWER = ("slice_layers", "volume_layers", "ffns")  # the pretrained parts of the vision tower


@dataclass
class Arm:
    """One way to build and train the model.

    Attributes:
        question: letter of the claim.
        name: of the arm.
        seeds: how many runs.
        convert: settings of the conversion, in place of those of the demo model.
        steps: of stage 1 and stage 2.
        rates: share of the recipe's learning rates for pretrained parts; not for the projector of arms with slice
            scores, which have its rate.
        scans: training scans; `None` for all.
        taught: start with the taught base; otherwise with the pretrained one.
        forgotten: pretrained weights that are drawn anew: "nothing", "vision" (tower and projector) or "everything".
        trained: in both stages: "recipe" (what the recipe says, but for the slice layers, which stay frozen), "tower"
            (the whole vision tower too) or "everything", the input embeddings too.
        two_stages: False: one stage of the same length that trains everything both stages train.
        across_tasks: pack rows of all tasks about a scan together in stage 1, as the recipe does.
        groups: what the expert groups of a row are: "task" or "scan" (a hash of the scan's name).
        labelled: whether rows tell their task in training.
        task_embedding: a learned vector per task, added before the first layer that has experts in other arms.
        equal_scores: TG-IS in which all slices have the same score.
        wrong_group: also score the model's closed answers with the next task's group forced.
        note_groups: also note the groups that reports and open questions are routed to.
    """

    question: str
    name: str
    seeds: int = 3
    convert: dict[str, Any] = field(default_factory=dict)
    steps: tuple[int, int] = STEPS
    rates: float = RATES
    scans: int | None = None
    taught: bool = True
    forgotten: str = "nothing"
    trained: str = "recipe"
    two_stages: bool = True
    across_tasks: bool = True
    groups: str = "task"
    labelled: bool = True
    task_embedding: bool = False
    equal_scores: bool = False
    wrong_group: bool = False
    note_groups: bool = False


def arms() -> list[Arm]:
    """Every arm, in the order in which they run: the shared reference first."""
    found = [Arm("c", "both levels", seeds=5, wrong_group=True, note_groups=True)]
    # (c) What the experts bring. One expert without a router is a dense layer beside the FFN.
    one = {"tasks": [], "num_experts": 1}
    found += [
        Arm("c", "dense, equal total", 5, one | {"moe_intermediate_size": GROUPS * EXPERTS * WIDTH}),
        Arm("c", "dense, equal active", 5, one | {"moe_intermediate_size": 2 * WIDTH}),
        Arm(
            "c",
            "dense with a task embedding",
            5,
            {"num_experts": 1, "moe_intermediate_size": 2 * WIDTH},
            task_embedding=True,
        ),
        Arm("c", "token level", 5, {"tasks": [], "num_experts": GROUPS * EXPERTS, "num_experts_per_tok": 2}),
        Arm("c", "task level", 5, {"num_experts": 1, "moe_intermediate_size": EXPERTS * WIDTH}),
        Arm("c", "both levels, groups by scan", 5, groups="scan"),
        # To find out why the others are alike: added when the first two seeds of each were there.
        Arm("c", NO_EXPERTS, convert={"tasks": [], **DENSE}),
        Arm("c", LARGE_EXPERTS, convert={"moe_layers": [2, 3], "moe_intermediate_size": VISION["intermediate_size"]}),
    ]
    # (d) Two stages. One stage routes by task from the first step on, and so has rows of one task; with all tasks in a
    # row two stages would see three times as many texts.
    found += [
        Arm("d", "two stages, rows of one task", seeds=5, across_tasks=False),
        Arm("d", "one stage", seeds=5, two_stages=False, across_tasks=False),
    ]
    # (a) Reuse of the 2D pretraining, by the number of scans. What is random must be trained: the arms that reuse it
    # train the same, with the same learning rates.
    for scans in SCARCITY:
        for name, forgotten in REUSE.items():
            found.append(
                Arm(
                    "a",
                    f"{name}, {scans} scans",
                    steps=FROM_2D,
                    rates=1.0,
                    scans=scans,
                    taught=False,
                    forgotten=forgotten,
                    trained="everything",
                )
            )
    # (b) Attention across slices, without experts. All train the whole tower, in both stages and with one learning
    # rate: the recipe treats volume layers and others differently, and the arms differ in which layers those are.
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
                        steps=FEWER,
                        trained="tower",
                    )
                )
    # (e) Slice scores. TG-IS does not weigh the pooled 3D features but appends the weighted 2D features, so mean
    # pooling is TG-IS with equal scores and not the model without, which has half as many visual tokens.
    tgis = {"slice_scoring": "tgis"}
    found += [
        Arm("e", "mean pooling", convert=tgis, equal_scores=True),
        Arm("e", "TG-IS, published", convert=tgis | {"tgis_variant": "paper"}),
        Arm("e", "TG-IS, normalised", convert=tgis),
    ]
    # (f) Tasks nobody named.
    found.append(Arm("f", "label-free routing", labelled=False, note_groups=True))
    return found


def settings_of(arm: Arm) -> dict[str, Any]:
    """Of the conversion."""
    return {**SETTINGS, "pool": POOL, "tasks": list(TASKS), **arm.convert}


def vision_config(arm: Arm) -> CTMoEVisionConfig:
    """Of the trained models of an arm."""
    settings = settings_of(arm)
    known = {field.name for field in fields(CTMoEVisionConfig)}
    own = {name: value for name, value in settings.items() if name in known}
    groups = {"num_tasks": len(settings["tasks"]), "use_task_groups": not arm.task_embedding}
    return CTMoEVisionConfig(**VISION, feature_layer=-2, **groups, **own)


def active_expert_parameters(config: CTMoEVisionConfig) -> int:
    """Parameters of the experts that a token goes through, in all layers; routers are left out."""
    width, hidden = config.moe_intermediate_size, config.hidden_size
    active = 0
    for experts in (config.num_shared_experts, config.num_task_experts if config.routes_tasks else 0):
        active += min(experts, config.num_experts_per_tok)  # a group of one has no choice
    return len(config.moe_layers) * active * (2 * hidden * width + width + hidden)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("phantoms"), help="folder written by ct-moe phantom")
    parser.add_argument("--base", type=Path, default=Path("phantom-base"), help="written by pretrain_base.py")
    parser.add_argument("--taught", type=Path, default=Path("taught-base"), help="written by teach_base.py")
    parser.add_argument("--out", type=Path, default=Path("phantom-ablations"))
    parser.add_argument("--only", default="", help="letters of the claims to run, such as cd")
    parser.add_argument("--seeds", type=int, default=5, help="at most so many seeds of every arm")
    parser.add_argument("--part", default="1/1", help="I/N: every N-th run, from the I-th")
    parser.add_argument("--split", default="test", choices=["validation", "test"])
    parser.add_argument(
        "--steps", type=int, nargs=2, help="of both stages, in place of those of the arm; 0 0: the start, untrained"
    )
    parser.add_argument("--batch", type=int, default=BATCH, help="rows per step")
    parser.add_argument("--rates", type=float, help="share of the learning rates of pretrained parts")
    parser.add_argument("--list", action="store_true", help="show all runs and which are done")
    args = parser.parse_args()
    runs = [
        (arm, seed)
        for arm in arms()
        for seed in range(min(arm.seeds, args.seeds))
        if not args.only or arm.question in args.only
    ]
    runs.sort(key=lambda run: run[1])  # the first seed of every arm before the second of any
    try:
        runs = part_of(runs, args.part)
        if args.steps and any(args.steps) and min(args.steps) < 1:
            raise DataError("--steps", f"{args.steps} trains half a model", "Give both stages steps, or none")
    except CTMoEError as error:
        sys.exit(f"ablations: error: {error}")
    if args.list:
        for arm, seed in runs:
            done = "done" if result_file(args, arm, seed).is_file() else "-"
            print(f"{done:5}({arm.question}) {arm.name}, seed {seed}")
        return
    try:
        if torch.cuda.device_count() > 1:  # the trainer would multiply the batch by their number
            raise TrainingError("GPUs", f"{torch.cuda.device_count()} are seen", "Show one: CUDA_VISIBLE_DEVICES=0")
        for number, (arm, seed) in enumerate(runs, 1):
            file = result_file(args, arm, seed)
            if file.is_file():
                continue
            print(f"{number} of {len(runs)}: ({arm.question}) {arm.name}, seed {seed}", flush=True)
            result = run(arm, seed, args)
            file.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(file) as part:
                part.write_text(json.dumps(result) + "\n", encoding="utf-8")
            print(f"  closed {cut_percent(result['closed']['accuracy'])} %, {result['seconds']:.0f} s", flush=True)
    except CTMoEError as error:
        sys.exit(f"ablations: error: {error}")


def part_of(runs: list, part: str) -> list:
    """Every N-th run from the I-th, of "I/N"."""
    number, _, parts = part.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise DataError("--part", f"{part!r} is no part", "Write I/N, with I from 1 to N")
    return runs[int(number) - 1 :: int(parts)]


def result_file(args: argparse.Namespace, arm: Arm, seed: int) -> Path:
    """OUT/test/..., OUT/test/untrained/... with no steps."""
    name = "".join(c if c.isalnum() else "-" for c in arm.name)
    untrained = args.steps and not any(args.steps)
    folder = args.out / args.split / ("untrained" if untrained else "")
    return folder / f"{arm.question}_{name}_{seed}.json"


def run(arm: Arm, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Convert, train both stages, score."""
    started = time.monotonic()
    cuda = torch.cuda.is_available()
    rates = arm.rates if args.rates is None else args.rates
    args = argparse.Namespace(**{**vars(args), "steps": args.steps or arm.steps, "rates": rates})
    base = args.taught if arm.taught else args.base
    rows, _ = read_split(args.data, args.split, SCORED_SCANS)
    asked = [row for row in rows if row["task"] == "vqa_closed"]
    # Of what is read, not of what is there at the end.
    files = hashes(base, args) | {"questions": keep_questions(asked, args.out / args.split)}
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        if arm.forgotten != "nothing":
            base = forget(base, Path(temporary) / "base", keep_language=arm.forgotten == "vision")
        make_model(base, folder, **settings_of(arm))
        processor = CTMoEProcessor.from_pretrained(folder)
        experts = read_recipe().stage1.experts_implementation
        model = CTMoEForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, experts_implementation=experts
        )
        redraw_added(model, seed)
        if arm.task_embedding:
            add_task_embedding(model)
        if arm.equal_scores:
            nn.init.zeros_(model.model.slice_scoring.text_weight)
        scans = train(model, processor, arm, seed, args, Path(temporary)) if any(args.steps) else {}
    trained = time.monotonic()
    model.to("cuda" if cuda else "cpu")
    how = {
        "folder": args.data,
        "volume_cache": VolumeCache(args.data / "slices", processor.image_processor),
        "batch_size": 128 if cuda else 32,
        "progress": False,
    }

    def task_of(row: dict) -> str | None:
        if arm.groups == "scan":
            return TASKS[scan_hash(row["images"])]
        return row["task"] if arm.task_embedding else None

    record = {
        "arm": {"question": arm.question, "name": arm.name},
        "seed": seed,
        "steps": list(args.steps),
        "batch": args.batch,
        "rates": args.rates,
        **scans,
        "hashes": files,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "threads": torch.get_num_threads(),
        "bfloat16": has_native_bfloat16(model.device),
        "seconds_training": round(trained - started, 1),
        "closed": scored(asked, answer_rows(model, processor, asked, task=task_of, **how)),
    }
    if arm.wrong_group:
        following = dict(zip(TASKS, (*TASKS[1:], TASKS[0])))
        answers = answer_rows(model, processor, asked, task=lambda row: following[row["task"]], **how)
        record["wrong_group"] = scored(asked, answers)
    if arm.note_groups:
        others = [row for row in rows if row["task"] != "vqa_closed"]
        # The group is chosen before the first token, and no more are asked for.
        limits = dict.fromkeys(TASKS, 1)
        answers = answer_rows(model, processor, others, max_new_tokens=limits, **how)
        record["other_groups"] = {
            task: digits(answer.task for row, answer in zip(others, answers) if row["task"] == task)
            for task in TASKS
            if task != "vqa_closed"
        }
    return {**record, "seconds": round(time.monotonic() - started, 1)}


def keep_questions(asked: list[dict], folder: Path) -> str:
    """Write questions.jsonl, to which the digits of all records belong; first digits of its SHA-256."""
    names = ("images", "kind", "template")
    content = "".join(json.dumps({name: row[name] for name in names}) + "\n" for row in asked)
    file = folder / "questions.jsonl"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as part:
            part.write_text(content, encoding="utf-8")
    elif file.read_text(encoding="utf-8") != content:
        raise DataError(str(file), "has other questions", "Score all runs on the same --data, or name another --out")
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def scored(asked: list[dict], answers: list[Answer]) -> dict[str, Any]:
    """Accuracy, and per question a digit: 1 where the answer is right; and that of its group, or - without groups."""
    right = [score["strict"] for score in score_closed(asked, [answer.text for answer in answers])]
    groups = digits(answer.task for answer in answers)
    return {"accuracy": sum(right) / len(right), "right": digits(map(int, right)), "groups": groups}


def digits(values: Iterable[int | None]) -> str:
    return "".join("-" if value is None else str(value) for value in values)


def hashes(base: Path, args: argparse.Namespace) -> dict[str, str]:
    """First digits of the SHA-256 of all that runs must have in common to be compared."""
    files = {
        "base": base / "model.safetensors",
        "train": args.data / "train.jsonl",
        args.split: args.data / f"{args.split}.jsonl",
        "recipe": RECIPE,
    }
    found = {}
    for name, path in files.items():
        try:
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        except OSError as error:
            remedy = "Make it as the top of ablations.py says, or name it by --data, --base or --taught"
            raise DataError(str(path), f"cannot be read ({type(error).__name__})", remedy) from error
    return found


def forget(base: Path, folder: Path, *, keep_language: bool) -> Path:
    """The base with random weights, drawn as the library draws them; `keep_language` keeps the language model's."""
    shutil.copytree(base, folder)
    config = AutoConfig.from_pretrained(base, dtype="float32")
    model = LlavaForConditionalGeneration(config)
    if keep_language:
        known = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
        model.model.language_model.load_state_dict(known.model.language_model.state_dict())
        model.lm_head.load_state_dict(known.lm_head.state_dict())
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def redraw_added(model: CTMoEForConditionalGeneration, seed: int) -> None:
    """Other random weights in what the base does not have, for every run: conversion alone always draws the same."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        # Not what starts at one or zero, such as norms and the experts' outputs, nor a single number.
        if any(part in name for part in ADDED) and parameter.numel() > 1 and parameter.std() > 0:
            drawn = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.copy_(parameter.mean() + parameter.std() * drawn)


def train(model, processor, arm: Arm, seed: int, args: argparse.Namespace, folder: Path) -> dict[str, int]:
    """Both stages in memory; returns how many scans were trained on, and how many there are."""
    rows = load_rows(args.data / "train.jsonl")
    scans = sorted({row[0] for row in rows["images"]})
    kept = set(scans[: arm.scans])
    if len(kept) < len(scans):
        rows = rows.filter(lambda row: row["images"][0] in kept)
    for stage in stage_configs(model, arm, seed, args, folder):
        prepare(model, arm, stage)
        data = stage_rows(rows, arm, stage, args)
        if arm.groups == "scan":
            data = data.map(lambda row: {"task": TASKS[scan_hash(row["images"][0])]})
        if not arm.labelled or not model.config.tasks:
            data = data.map(lambda row: {"task": None})
        data = check_tasks(data, list(model.config.tasks))
        trainer = InOrder(model=model, args=stage, train_dataset=data, processing_class=processor)
        trainer.train()
        if trainer.signals.ended_early:  # its weights are of no use to compare
            raise TrainingError(
                "the run", "was stopped by SIGTERM", "Start again: this run begins anew, no other does"
            )
        # What accelerate and TRL put around the forward pass: a second trainer would leave out bfloat16 for its sake.
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
            vars(model).pop(name, None)
    return {"train_scans": len(kept), "all_train_scans": len(scans)}


def prepare(model: CTMoEForConditionalGeneration, arm: Arm, stage: StageConfig) -> None:
    """Make the parts of a stage trainable, with what an arm has beyond the table of stages.py."""
    prepare_stage(model, stage)
    if arm.trained == "everything":
        for name, part in part_of_parameters(model).items():
            if part in ALWAYS_FROZEN:
                model.get_parameter(name).requires_grad_(True)
    if arm.equal_scores:
        model.model.slice_scoring.requires_grad_(False)  # at zero, where all slices count alike
    if arm.task_embedding:  # when task groups are: a row of stage 1 is about several tasks
        model.model.task_router.task_embedding.requires_grad_(isinstance(stage, Stage2Config))


def stage_rows(rows: Dataset, arm: Arm, stage: StageConfig, args: argparse.Namespace) -> Dataset:
    """The rows of every step, in order. All arms see the same: packed by task as in stage 1, then as in stage 2."""
    recipe = read_recipe()
    parts = []
    for number, (half, steps) in enumerate(zip((recipe.stage1, recipe.stage2), args.steps), 1):
        if arm.two_stages and not isinstance(stage, type(half)):
            continue
        across_tasks = half.pack_across_tasks and arm.across_tasks
        packed = pack_rows(rows, half.questions_per_scan, stage.seed, across_tasks=across_tasks)
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
        "save_strategy": "no",
        "logging_steps": 50,
        "disable_tqdm": True,
        "seed": seed,
        "per_device_train_batch_size": args.batch,
        "stage1.train_slice_layers": "frozen",  # a run must end in minutes
        "stage1.max_steps": args.steps[0],
        "stage2.max_steps": args.steps[1],
    }
    if arm.task_embedding or not (model.config.vision_config.moe_layers and model.config.tasks):
        # Where others train their task groups, these train the experts that they have.
        settings |= {"stage2.train_task_groups": "off", "stage2.train_shared_group": "full"}
    if arm.trained != "recipe":
        settings |= {f"{stage}.train_{part}": "full" for stage in ("stage1", "stage2") for part in TOWER}
    if arm.trained == "everything":
        settings["stage2.train_shared_group"] = "full"
    if not arm.two_stages:
        first = read_recipe(settings).stage1
        modes = {part: getattr(first, f"train_{part}") for part in TRAINABLE_PARTS}
        settings |= {f"stage2.train_{part}": mode for part, mode in modes.items() if mode not in ("frozen", "off")}
        settings["stage2.max_steps"] = sum(args.steps)
    recipe = read_recipe(settings)
    # What stage 2 trains beyond the recipe has the rates of stage 1. Where the whole tower is trained, all of it has
    # that of the volume layers, and what no recipe can train (input embeddings) that of its neighbours.
    first = recipe.stage1.learning_rates
    recipe.stage2.learning_rates = first | recipe.stage2.learning_rates
    if arm.trained != "recipe":
        for stage in (recipe.stage1, recipe.stage2):
            stage.learning_rates |= dict.fromkeys((*TOWER, "other"), first["volume_layers"])
            stage.learning_rates["input_embeddings"] = stage.learning_rates["language_model"]
    for stage in (recipe.stage1, recipe.stage2):
        if "slice_scoring" not in arm.convert:  # which is new, and has the projector's rate
            stage.learning_rates["projector"] = stage.learning_rate
        stage.learning_rates = {part: args.rates * rate for part, rate in stage.learning_rates.items()}
    return [recipe.stage1, recipe.stage2] if arm.two_stages else [recipe.stage2]


def read_recipe(settings: dict[str, Any] | None = None) -> TwoStageRecipe:
    """The demo model's, for the device that is there."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = dict(settings or {}, use_cpu=device == "cpu", bf16=has_native_bfloat16(device))
    settings["dataloader_num_workers"] = 1 if settings["use_cpu"] else 2  # other parts may run beside this one
    return load_recipe(RECIPE, [f"{name}={json.dumps(value)}" for name, value in settings.items()])


def scan_hash(name: str) -> int:
    """Number of a group, from the scan's name alone."""
    return hashlib.sha256(Path(name).name.encode()).digest()[0] % len(TASKS)


def add_task_embedding(model: CTMoEForConditionalGeneration) -> None:
    """A vector per task on every token, before the first layer with experts."""
    tower = model.model.vision_tower
    embedding = nn.Embedding(len(TASKS), model.config.vision_config.hidden_size)
    nn.init.zeros_(embedding.weight)
    # A part of the router: trained with the learning rate of what is new.
    model.model.task_router.task_embedding = embedding
    chosen: list[torch.Tensor] = []

    def remember(module, inputs, named) -> None:
        chosen[:] = [named["task_index"]]

    def add(module, inputs):
        hidden_states, num_slices, *rest = inputs
        vectors = embedding(chosen[0].clamp(min=0)).repeat_interleave(num_slices, dim=0)
        return hidden_states + vectors[:, None].to(hidden_states.dtype), num_slices, *rest

    tower.register_forward_pre_hook(remember, with_kwargs=True)
    tower.layers[min(model.config.vision_config.moe_layers)].register_forward_pre_hook(add)


if __name__ == "__main__":
    main()
