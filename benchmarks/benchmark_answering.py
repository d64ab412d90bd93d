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
"""What it saves, in a whole evaluation, that a scan is encoded once for all questions about it.

    python benchmarks/benchmark_answering.py [--scans 12] [--model examples/demo_model]

Answers the questions about fresh phantoms with and without, in turn, and prints the ratio of the times. In both scans
are processed before the clock starts and read from the cache, and as many rows go through the model together.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from ct_moe.hub.folder import load_folder
from ct_moe.trainers.evaluation.answering import answer_rows
from ct_moe.trainers.phantoms.benchmark import read_split
from ct_moe.trainers.phantoms.data_set import write_phantoms
from ct_moe.trainers.volume_cache import VolumeCache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).parents[1] / "examples" / "demo_model"))
    parser.add_argument("--scans", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    model, processor, _ = load_folder(args.model, dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "phantoms"
        write_phantoms(data, n=2, validation=0, test=args.scans)
        rows = [row for row in read_split(data, "test", None)[0] if row["task"] != "report"]
        cache = VolumeCache(Path(folder) / "slices", processor.image_processor)
        settings = {"folder": data, "volume_cache": cache, "batch_size": args.batch_size, "progress": False}
        # Copies are scans of their own.
        ways = {"shared": settings, "each anew": {**settings, "change": lambda scan, row: dict(scan)}}
        answers = {name: answer_rows(model, processor, rows, **how) for name, how in ways.items()}
        seconds = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, how in ways.items():
                started = time.perf_counter()
                answer_rows(model, processor, rows, **how)
                seconds[name].append(time.perf_counter() - started)
    print(f"{len(rows)} questions about {args.scans} scans, {torch.get_num_threads()} threads")
    for name, found in seconds.items():
        print(f"{name:>10}  median {statistics.median(found):.2f} s, fastest {min(found):.2f} s")
    ratios = [anew / shared for anew, shared in zip(seconds["each anew"], seconds["shared"])]
    fastest = min(seconds["each anew"]) / min(seconds["shared"])
    print(f"each anew / shared: {statistics.median(ratios):.2f}, of the fastest {fastest:.2f}")
    same = sum(one == other for one, other in zip(*answers.values()))
    print(f"{same} of {len(rows)} answers are the same, word for word")


if __name__ == "__main__":
    main()
