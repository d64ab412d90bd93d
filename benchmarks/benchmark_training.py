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
"""Samples per second and peak memory of each training stage: experts, activation checkpointing, volume cache.

    OMP_NUM_THREADS=1 python benchmarks/benchmark_training.py --rounds 2

Every combination runs in a process of its own, all of them in turn, round by round. A ratio is the median over the
rounds of the ratios within a round, to the stage's dense model (`moe_layers=[]`) without checkpointing and cache; in
brackets that of processor time, which other work on the machine disturbs less. The first epoch warms up, and fills the
cache where there is one.

- step: median seconds of a step in the later epochs, its data loaded already;
- epoch 1, later: seconds of an epoch; scans are read in the same process, hence not beside the steps;
- samples/s: over the later epochs, with reading;
- peak MB: resident memory above what the imports take; on an accelerator what torch allocated, weights included;
- TFLOP: of the matrix products of a forward and backward pass, those that checkpointing computes again included.

The models are small, with random weights. --real takes the widths of CLIP ViT-L/14-336 and Phi-3-mini and is meant for
an accelerator, with --peak-tflops for the share of its peak that a step reaches. Trained in full in float32 that model
needs 66 GB before activations: choose --language-model lora or --dtype bfloat16 where there is less.
"""

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import TrainerCallback, set_seed
from transformers.utils import logging

from ct_moe.hub.conversion import convert_base
from ct_moe.hub.folder import load_folder
from ct_moe.hub.tiny_base import build_tiny_base, radiology_sentences
from ct_moe.trainers import CTMoESFTTrainer, Stage1Config, Stage2Config, prepare_stage
from ct_moe.trainers.phantoms.chest import write_phantom


# Of tower and language model: width, width inside an MLP, layers, heads; then pixels and vocabulary.
SMALL = (256, 1024, 8, 4), (256, 1024, 4, 4), 112, 1024
REAL = (1024, 4096, 24, 16), (3072, 8192, 32, 32), 336, 32064
MODELS = {"dense": {"moe_layers": []}, "TGH-MoE": {}}
QUESTIONS = {"report": "Write the report.", "vqa_closed": "Is there a nodule?", "vqa_open": "Where is the nodule?"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3, help="at least 2")
    parser.add_argument("--scans", type=int, default=4, help="rows of an epoch, each with a scan of its own")
    parser.add_argument("--scan-shape", type=int, nargs=3, default=[60, 512, 512], help="slices, rows, columns")
    parser.add_argument("--slices", type=int, default=12, help="that a scan is reduced to")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--language-model", default="full", choices=["full", "lora", "frozen"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights in memory")
    parser.add_argument("--real", action="store_true", help="widths of CLIP ViT-L/14-336 and Phi-3-mini")
    parser.add_argument("--layers", type=int, help="of tower and language model, to try --real")
    parser.add_argument("--peak-tflops", type=float, help="of the accelerator, in the dtype it computes in")
    parser.add_argument("--prepare", help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.set_verbosity_error()
    if args.prepare:
        return _prepare(args, Path(args.prepare))
    if args.measure:
        return print(json.dumps(_measure(args, **args.measure)))

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{'ViT-L/14-336, Phi-3-mini' if args.real else 'small'}, language model {args.language_model}, {args.dtype},"
    )
    print(f"{args.scans} scans of {args.scan_shape} to {args.slices} slices, batch {args.batch}, {where}\n")
    cases = list(itertools.product([1, 2], MODELS, [False, True], [False, True]))
    runs = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder, suppress(KeyboardInterrupt):  # prints what there is
        _run(["--prepare", folder])  # not here: the peak of a process counts that of the one that starts it
        for _, case in itertools.product(range(args.rounds), cases):
            settings = dict(zip(("stage", "model", "checkpointing", "cache"), case), folder=folder)
            runs[case].append(_run(["--measure", json.dumps(settings)]))
            print(*case, runs[case][-1], file=sys.stderr, flush=True)
    _print(args, runs)


def _run(more: list[str]) -> dict | None:
    """What another process measures; None where the accelerator's memory is not enough."""
    child = subprocess.run([sys.executable, __file__, *sys.argv[1:], *more], capture_output=True, text=True)
    if child.returncode and "OutOfMemoryError" not in child.stderr:
        sys.exit(child.stderr)
    return json.loads(child.stdout.splitlines()[-1]) if more[0] == "--measure" and not child.returncode else None


def _print(args: argparse.Namespace, runs: dict[tuple, list[dict | None]]) -> None:
    print(f"{'':37}{'step s':>7}{'ratio':>13}{'epoch 1':>9}{'later':>7}{'ratio':>13}{'samples/s':>11}", end="")
    print(f"{'peak MB':>9}{'ratio':>7}{'TFLOP':>8}{'of peak':>9}")
    for (stage, model, checkpointing, cache), measured in runs.items():
        name = f"{stage}, {model:7}{', checkpointing' if checkpointing else '':15}{', cache' if cache else ''}"
        pairs = [(run, base) for run, base in zip(measured, runs[stage, "dense", False, False]) if run and base]
        measured = [run for run in measured if run]
        if not pairs:
            print(f"stage {name:31}  {measured[0] if measured else 'out of memory'}")
            continue
        of = {key: statistics.median(run[key] for run in measured) for key in measured[0]}
        to = {key: statistics.median(run[key] / base[key] for run, base in pairs) for key in of}
        share = f"{of['tflop'] / of['step'] / args.peak_tflops:9.1%}" if args.peak_tflops else ""
        print(
            f"stage {name:31}{of['step']:7.2f}{to['step']:6.2f} ({to['step_cpu']:.2f}){of['first']:9.2f}"
            f"{of['later']:7.2f}{to['later']:6.2f} ({to['later_cpu']:.2f}){args.scans / of['later']:11.3f}"
            f"{of['peak']:9.0f}{to['peak']:7.2f}{of['tflop']:8.3f}{share}"
        )


def _prepare(args: argparse.Namespace, folder: Path) -> None:
    """Scans and both models."""
    for seed in range(args.scans):
        write_phantom(folder / f"scan{seed}.nii.gz", seed=seed, shape=tuple(args.scan_shape))
    tower, language_model, pixels, vocabulary = REAL if args.real else SMALL
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    layers = {"num_hidden_layers": args.layers} if args.layers else {}
    vision = {**dict(zip(names, tower)), "image_size": pixels, **layers}
    text = {**dict(zip(names, (*language_model, language_model[-1]))), "vocab_size": vocabulary, **layers}
    dtype = torch.bfloat16 if args.real else torch.float32  # on disk
    base = build_tiny_base(folder / "base", vision=vision, text=text, dtype=dtype)
    for name, settings in MODELS.items():
        convert_base(base, folder / name, parity=False, progress=False, **settings)


class Clock(TrainerCallback):
    """Seconds and processor seconds of every step and epoch. What a step waits for its data is in the epoch alone."""

    def __init__(self):
        self.steps, self.epochs = [], []

    def on_epoch_begin(self, *_, **__):
        self.epoch = _now()

    def on_step_begin(self, *_, **__):
        self.step = _now()

    def on_step_end(self, *_, **__):
        self.steps.append(_now() - self.step)

    def on_epoch_end(self, *_, **__):
        self.epochs.append(_now() - self.epoch)


def _measure(args, folder: str, stage: int, model: str, checkpointing: bool, cache: bool) -> dict[str, float]:
    imports = _peak_mb()
    folder, cuda = Path(folder), torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as out:
        config = (Stage1Config if stage == 1 else Stage2Config)(
            output_dir=out,
            use_cpu=not cuda,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch,
            save_strategy="no",
            report_to="none",
            logging_steps=1000,
            dataloader_num_workers=0,
            activation_checkpointing=checkpointing,
            volume_cache=f"{out}/cache" if cache else None,
            disable_tqdm=True,
            generate_samples=0,
            train_language_model=args.language_model,
            dtype=args.dtype,
        )
        set_seed(0)
        network, processor, _ = load_folder(str(folder / model), dtype=args.dtype)
        processor.image_processor.num_slices = args.slices
        clock = Clock()
        trainer = CTMoESFTTrainer(
            model=prepare_stage(network, config),
            args=config,
            train_dataset=_rows(folder, args.scans),
            processing_class=processor,
            callbacks=[clock],
        )
        trainer.train()
        peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else _peak_mb() - imports
        steps = clock.steps[len(clock.steps) // args.epochs :]
        times = {"step": np.median(steps, axis=0), "later": np.median(clock.epochs[1:], axis=0)}
        times = {f"{name}{kind}": time[i] for name, time in times.items() for i, kind in enumerate(("", "_cpu"))}
        return {**times, "first": clock.epochs[0][0], "peak": peak, "tflop": _tflop(trainer)}


def _rows(folder: Path, scans: int) -> Dataset:
    """One about each scan, the tasks in turn, with an answer of the length of a short report."""
    rows = []
    for number, task in zip(range(scans), itertools.cycle(QUESTIONS)):
        prompt = [{"role": "user", "content": QUESTIONS[task]}]
        completion = [{"role": "assistant", "content": " ".join(radiology_sentences()[::40])}]
        scan = str(folder / f"scan{number}.nii.gz")
        rows.append({"images": [scan], "prompt": prompt, "completion": completion, "task": task})
    return Dataset.from_list(rows)


def _tflop(trainer: CTMoESFTTrainer) -> float:
    """Of the matrix products, attention over slices and over the volume among them, in a step without optimizer."""

    def grouped_mm(a_shape, b_shape, *args, out_shape=None, **kwargs):
        return 2 * a_shape[0] * a_shape[1] * b_shape[-1]  # each row of `a` (or column, for a gradient) has one expert

    aten = torch.ops.aten
    counted = {
        aten._grouped_mm: grouped_mm,
        aten._scaled_dot_product_flash_attention_for_cpu: lambda *of, **_: sdpa_flop_count(*of[:3]),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *of, **_: sdpa_backward_flop_count(*of[:4]),
    }
    trainer.model.train()
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with FlopCounterMode(display=False, custom_mapping=counted) as counter, trainer.compute_loss_context_manager():
        trainer.compute_loss(trainer.model_wrapped, inputs).backward()
    return counter.get_total_flops() / 1e12


def _now() -> np.ndarray:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return np.array([time.perf_counter(), time.process_time()])


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts in KB


if __name__ == "__main__":
    main()
