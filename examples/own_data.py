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
"""Train both stages on scans and texts of your own, then read a scan with the trained model.

    python examples/own_data.py [--model ct-llava --data rows.csv --recipe my-recipe.yaml --out my-run]

The data file (CSV, TSV, JSON, JSONL, parquet) has the columns images, prompt, completion and task; paths of scans
start at its folder. Without --data it is made here, of synthetic scans, and without --model a tiny model with random
weights, so that all of it runs on two CPU cores in a minute or two; what comes out then means nothing. The settings
are those of examples/recipe.yaml. Cut off at any moment, the same command goes on where it was.
"""

import argparse
import csv
import json
import sys
import tempfile
from pathlib import Path

from ct_moe import CTMoEError
from ct_moe.pipeline_ct_moe import REPORT_PROMPT  # what pipeline("ct-report") asks: train the task "report" on it
from ct_moe.trainers.phantoms.chest import write_phantom


QUESTIONS = {  # task: prompt, completion
    "report": (
        REPORT_PROMPT,
        "Findings: One solid nodule of 12 mm in the right lung. No effusion. Impression: Nodule, to be followed up.",
    ),
    "vqa_closed": ("Is there a nodule in the left lung? Answer yes or no.", "No."),
    "vqa_open": ("Which lung holds the nodule?", "The right lung."),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="folder or Hub id of a converted or trained model")
    parser.add_argument("--data", default="", help="rows of images, prompt, completion and task")
    parser.add_argument("--recipe", default=Path(__file__).with_name("recipe.yaml"), type=Path, help="settings")
    parser.add_argument("--out", default="own-data", type=Path, help="folder for everything that is written")
    args = parser.parse_args()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        run(args.model, args.data, args.recipe, args.out)
    except CTMoEError as error:
        sys.exit(f"own_data: error: {error}")
    except OSError as error:
        sys.exit(f"own_data: error: {error.filename or args.out}: {error.strerror}. Name another folder with --out.")


def run(model: str, data: str, recipe_file: Path, out: Path) -> None:
    print("Loading the libraries ...", flush=True)
    try:
        from ct_moe.trainers.recipe import load_recipe
        from ct_moe.trainers.rows import load_rows
        from ct_moe.trainers.two_stage import train_two_stage
    except ModuleNotFoundError as error:
        raise CTMoEError(error.name, "is not installed", 'Run: pip install "ct-moe[train]"') from error
    from transformers import pipeline
    from transformers.utils import logging

    from ct_moe.hub.cli import printable

    logging.disable_progress_bar()  # of the library, for files that load in an instant
    untrained = not model
    model = model or make_tiny_model(out)
    data = data or make_data(out)
    places = {"model": model, "train_data": data, "output_dir": str(out / "run")}
    recipe = load_recipe(recipe_file, [f"{name}={json.dumps(value)}" for name, value in places.items()])

    rows = load_rows(data, split=recipe.train_split)  # first: what is wrong in the file shows before any training
    trained = train_two_stage(dataset=rows, recipe=recipe)
    for stage in ("stage1", "stage2"):
        report = json.loads((out / "run" / stage / "training_report.json").read_text(encoding="utf-8"))
        losses = [entry["loss"] for entry in report["log"] if "loss" in entry]
        skipped = f", {report['rows_skipped']} rows skipped" if report["rows_skipped"] else ""
        loss = f"loss {losses[0]:.3f} -> {losses[-1]:.3f}" if losses else "no loss logged"
        print(f"{stage}: {loss} in {report['steps']} steps{skipped}")

    scan = next((row["images"][0] for row in rows if row["images"]), None)
    if scan is None:
        return
    reporter = pipeline("ct-report", model=str(trained), trust_remote_code=True)
    result = reporter(scan, max_new_tokens=60 if untrained else 512)
    if untrained:
        print("\nThe model began with random weights and saw a few steps: the text below means nothing.")
    print(f"\nScan    {scan if isinstance(scan, str) else scan['path']}")
    print(f"Asked   {result['prompt']}\nText    {printable(result['text'])}\nNotice  {result['notice']}")
    print(f"\nThe trained model is in {trained}. Read more scans: ct-moe report SCAN --model {trained}")


def make_tiny_model(out: Path) -> str:
    """A tiny base with random weights, converted."""
    from ct_moe.hub.conversion import convert_base
    from ct_moe.hub.tiny_base import build_tiny_base

    if not (out / "model" / "conversion_report.json").is_file():
        with tempfile.TemporaryDirectory() as temporary:
            base = build_tiny_base(Path(temporary) / "tiny-base")
            convert_base(base, out / "model", parity=False, progress=False, intended_scope="nothing: random weights")
        print(f"No model was given: wrote a tiny one with random weights, {out / 'model'}")
    return str(out / "model")


def make_data(out: Path) -> str:
    """Four synthetic scans, and a row of every task for each of them."""
    rows = out / "rows.csv"
    (out / "scans").mkdir(exist_ok=True)
    names = [f"scans/phantom{seed}.nii.gz" for seed in range(4)]
    for seed, name in enumerate(names):
        if not (out / name).is_file():
            write_phantom(out / name, seed=seed, shape=(20, 96, 96))
    with rows.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["images", "prompt", "completion", "task"])
        writer.writerows([name, *texts, task] for name in names for task, texts in QUESTIONS.items())
    print(f"No data were given: wrote {rows}, {len(names)} synthetic scans with made-up texts")
    return str(rows)


if __name__ == "__main__":
    main()
