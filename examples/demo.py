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
"""From nothing to a report in a minute: the demo model reads a phantom it has never seen, and answers three questions.

    python examples/demo.py [--scan scan.nii.gz] [--out demo-output]

The model in examples/demo_model was trained on synthetic phantoms only (examples/phantom): what it says about a
phantom can be compared with the truth, which is printed beside it; what it says about a real scan means nothing.
Writes report.json, slices.png (what the model saw) and routing.png (which experts saw what) into the output folder.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

from ct_moe import CTMoEError, load_volume
from ct_moe.trainers.phantoms.anatomy import draw_phantom
from ct_moe.trainers.phantoms.files import write_nifti
from ct_moe.trainers.phantoms.texts import Question, questions, report_text


MODEL = Path(__file__).with_name("demo_model")
SEED = 2_000_003  # of no scan that the model was trained or measured on
QUESTIONS = (  # asked about a scan of the user's
    "Is there a pleural effusion?",
    "Where is the lung nodule?",
    "How many liver lesions are there?",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scan", default="", help="a CT scan; by default a phantom is drawn and read")
    parser.add_argument("--seed", type=int, default=SEED, help="of the phantom")
    parser.add_argument("--out", default="demo-output", type=Path)
    args = parser.parse_args()
    try:
        run(args.scan, args.seed, args.out)
    except CTMoEError as error:
        sys.exit(f"demo: error: {error}")


def run(scan: str, seed: int, out: Path) -> None:
    started = time.perf_counter()
    volume = load_volume(scan) if scan else None  # first: a scan that cannot be read should say so at once
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CTMoEError(str(out), f"cannot be used as a folder ({error.strerror})", "Name another") from error
    truth = None
    asked = [(question, None) for question in QUESTIONS]
    if volume is None:
        phantom = draw_phantom(seed, "test")
        scan = str(write_nifti(phantom, out / "phantom.nii.gz"))
        volume = load_volume(scan)
        rng = np.random.default_rng(seed)
        labels = phantom.labels()
        truth = report_text(labels, rng)
        asked = [(question.prompt, question.completion) for question in choose(questions(labels, rng), rng)]
        print(f"No scan was given: drew a phantom that the model has not seen, {scan}")

    print("Loading the libraries ...", flush=True)
    from transformers import pipeline
    from transformers.utils import logging

    from ct_moe.hub.cli import printable
    from ct_moe.hub.picture import draw_slices
    from ct_moe.hub.routing_picture import draw_routing

    logging.disable_progress_bar()  # of the library, for files that load in an instant
    reporter = pipeline("ct-report", model=str(MODEL), trust_remote_code=True)
    result = reporter(volume, return_routing="maps")
    draw_routing(volume, reporter.processor.image_processor, result["routing"], out / "routing.png")
    del result["routing"]["maps"]  # arrays, and drawn
    draw_slices(volume, reporter.processor.image_processor, out / "slices.png", title="What the demo model sees")
    answers = [reporter(volume, question=question) for question, _ in asked]
    result |= {"scan": scan, "truth": truth, "answers": []}

    print(f"\nScan      {scan}: {result['num_slices']} slices of {result['slab_mm']:.0f} mm")
    if truth is None:
        print("\nThe demo model was trained on synthetic phantoms ONLY: its words about this scan mean nothing.\n")
    show("Report", result["text"], truth, printable)
    for (question, right), answer in zip(asked, answers):
        show(question, answer["answer"], right, printable)
        result["answers"].append({"question": question, "answer": answer["answer"], "truth": right})
    print(f"\nScope     {result['scope']}\nNotice    {result['notice']}")
    (out / "report.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    files = ", ".join(str(out / name) for name in ("report.json", "slices.png", "routing.png"))
    print(f"\nWrote {files} in {time.perf_counter() - started:.0f} s")


def choose(pool: list[Question], rng: np.random.Generator) -> list[Question]:
    """Three questions: one that no single slice answers if there is one, one for a place, one about presence."""
    chosen: list[Question] = []
    for kind, closed in (("between_slices", True), ("location", True), ("abnormality", False), ("phase", True)):
        found = [question for question in pool if question.kind == kind and (question.choices is not None) == closed]
        if found and len(chosen) < 3:
            chosen.append(found[rng.integers(len(found))])
    return chosen


def show(asked: str, said: str, truth: str | None, printable) -> None:
    print(f"\n{asked}\n  model   {printable(said)}".replace("\nImpression", "\n          Impression"))
    if truth is not None:
        print(f"  truth   {truth}".replace("\nImpression", "\n          Impression"))


if __name__ == "__main__":
    main()
