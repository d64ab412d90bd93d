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
"""From nothing to a report in one minute: a tiny base is built, converted, and reads a CT scan.

    python examples/demo.py [--scan scan.nii.gz] [--out demo-output]

The base has random weights, so the report is gibberish; everything around it is what a real model goes through.
Writes model/, report.json and slices.png (what the model saw) into the output folder.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

from ct_moe import CTMoEError, load_volume
from ct_moe.trainers.phantom import write_phantom


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scan", default="", help="a CT scan; by default a synthetic one is written and read")
    parser.add_argument("--out", default="demo-output", type=Path)
    args = parser.parse_args()
    try:
        run(args.scan, args.out)
    except CTMoEError as error:
        sys.exit(f"demo: error: {error}")


def run(scan: str, out: Path) -> None:
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    if not scan:
        scan = str(write_phantom(out / "phantom.nii.gz"))
        print(f"No scan was given: wrote a synthetic chest, {scan}")
    volume = load_volume(scan)  # before the slower steps: a scan that cannot be read should say so at once

    print("Loading the libraries ...", flush=True)
    from transformers import pipeline
    from transformers.utils import logging

    from ct_moe import CTMoEImageProcessor
    from ct_moe.hub.conversion import convert_base
    from ct_moe.hub.picture import draw_slices
    from ct_moe.hub.tiny_base import build_tiny_base

    logging.disable_progress_bar()  # of the library, for files that load in an instant
    for folder in (out / "base", out / "model"):  # of an earlier run
        shutil.rmtree(folder, ignore_errors=True)
    build_tiny_base(out / "base")
    print(convert_base(out / "base", out / "model", intended_scope="nothing: random weights"))

    reporter = pipeline("ct-report", model=str(out / "model"), trust_remote_code=True)
    result = reporter(volume, max_new_tokens=60, return_routing=True)
    result["scan"] = scan
    (out / "report.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    # Drawn at the image size of a real base, which shows more than the 56 pixels of the tiny one.
    draw_slices(volume, CTMoEImageProcessor(), out / "slices.png", title="What the model sees")

    print("\nThe weights are UNTRAINED (random): the text below means nothing.\n")
    print(f"Scan        {scan}: {result['num_slices']} slices of {result['slab_mm']:g} mm")
    print(f"Task        {result['task']}")
    print(f"Findings    {result['findings']}")
    print(f"Impression  {result['impression']}")
    print(f"Notice      {result['notice']}")
    print(f"\nWrote {out / 'report.json'} and {out / 'slices.png'} in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
