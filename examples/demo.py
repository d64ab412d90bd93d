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
Writes model/, report.json, slices.png (what the model saw) and routing.png (which experts saw what) into the output
folder.
"""

import argparse
import json
import shutil
import sys
import tempfile
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
    phantom = out / "phantom.nii.gz"
    volume = load_volume(scan) if scan else None  # first: a scan that cannot be read should say so at once
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CTMoEError(str(out), f"cannot be used as a folder ({error.strerror})", "Name another") from error
    if volume is None:
        scan = str(write_phantom(phantom))
        print(f"No scan was given: wrote a synthetic chest, {scan}")
        volume = load_volume(scan)

    print("Loading the libraries ...", flush=True)
    from transformers import pipeline
    from transformers.utils import logging

    from ct_moe.hub.cli import printable
    from ct_moe.hub.conversion import convert_base
    from ct_moe.hub.picture import draw_slices
    from ct_moe.hub.routing_picture import draw_routing
    from ct_moe.hub.tiny_base import build_tiny_base

    logging.disable_progress_bar()  # of the library, for files that load in an instant
    if (out / "model" / "conversion_report.json").is_file():
        shutil.rmtree(out / "model")  # of an earlier run
    with tempfile.TemporaryDirectory() as temporary:
        base = build_tiny_base(Path(temporary) / "tiny-base")
        scope = "nothing: random weights"
        print(convert_base(base, out / "model", intended_scope=scope, slice_scoring="tgis", tgis_temperature=0.8))

    reporter = pipeline("ct-report", model=str(out / "model"), trust_remote_code=True)
    result = reporter(volume, max_new_tokens=60, return_routing="maps")
    draw_routing(volume, reporter.processor.image_processor, result["routing"], out / "routing.png")
    del result["routing"]["maps"]  # arrays, and drawn
    result["scan"] = scan
    (out / "report.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    title = "What the tiny demo model sees (a real base sees 336 x 336 pixels)"
    draw_slices(volume, reporter.processor.image_processor, out / "slices.png", title=title)

    print("\nThe weights are UNTRAINED (random): the text below means nothing.\n")
    print(f"Scan        {scan}: {result['num_slices']} slices of {result['slab_mm']:g} mm")
    print(f"Task        {result['task']}")
    print(f"Findings    {printable(result['findings'] or '(none in the text)')}")
    print(f"Impression  {result['impression'] or '(none in the text)'}")
    print(f"Notice      {result['notice']}")
    files = ", ".join(str(out / name) for name in ("report.json", "slices.png", "routing.png"))
    print(f"\nWrote {files} in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
