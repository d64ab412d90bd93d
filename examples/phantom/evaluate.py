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
"""Measure a model on held-out phantoms: questions, reports, and the controls that show whether it looks at the scan.

    python examples/phantom/evaluate.py --model examples/demo_model --data phantoms

Writes scores.json and answers.jsonl into --out, and prints a table.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from ct_moe import CTMoEError, CTMoEForConditionalGeneration, CTMoEProcessor, DataError
from ct_moe.trainers.phantoms.benchmark import evaluate_phantoms, format_scores
from ct_moe.trainers.phantoms.controls import CONTROL_NAMES
from ct_moe.trainers.volume_cache import VolumeCache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a CT-MoE model")
    parser.add_argument("--data", required=True, type=Path, help="folder written by ct-moe phantom")
    parser.add_argument("--split", default="test", choices=["validation", "test"])
    parser.add_argument("--scans", type=int, default=None, help="the first so many scans")
    parser.add_argument("--controls", default=",".join((*CONTROL_NAMES, "flipped")), help="names, or nothing")
    parser.add_argument("--group", default=None, help="send every row to the experts of this task, whatever it asks")
    parser.add_argument("--without-experts", action="store_true", help="leave out what the experts add")
    parser.add_argument("--out", default=None, type=Path, help="folder for scores.json and answers.jsonl")
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    try:
        run(args)
    except CTMoEError as error:
        sys.exit(f"evaluate: error: {error}")


def run(args: argparse.Namespace) -> None:
    processor = CTMoEProcessor.from_pretrained(args.model)
    model = CTMoEForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    if args.group is not None and args.group not in model.config.tasks:
        known = ", ".join(model.config.tasks) or "none"
        raise DataError("--group", f"{args.group!r} is no task of the model", f"Name one of its tasks: {known}")
    if args.without_experts:
        leave_out_experts(model)
    result = evaluate_phantoms(
        model,
        processor,
        args.data,
        split=args.split,
        scans=args.scans,
        controls=[name for name in args.controls.split(",") if name],
        tasks=("vqa_closed", "vqa_open", "report", "plane"),
        task=None if args.group is None else lambda row: args.group,
        volume_cache=VolumeCache(args.data / "slices", processor.image_processor),
        batch_size=args.batch,
    )
    answers = result.pop("answers")
    print(format_scores(result))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "scores.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        with (args.out / "answers.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(answer) + "\n" for answer in answers)


@torch.no_grad()
def leave_out_experts(model: CTMoEForConditionalGeneration) -> None:
    """Make all routed experts give zero: what stays is the FFN beside them."""
    down = [weights for name, weights in model.named_parameters() if ".moe.experts.down_proj" in name]
    if not down:
        raise DataError("--without-experts", "the model has no experts", "Leave the option out")
    for weights in down:
        weights.zero_()


if __name__ == "__main__":
    main()
