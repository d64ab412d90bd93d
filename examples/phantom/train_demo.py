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
"""Train the demo model: convert the pretrained base, run both stages of recipe.yaml, then recipe_between.yaml.

    ct-moe phantom phantoms --n 4000 --validation 100 --test 320
    python examples/phantom/pretrain_base.py --data phantoms --out phantom-base
    python examples/phantom/train_demo.py --data phantoms --base phantom-base --out demo_model

Cut off at any moment, the same command goes on where it was. Weights are bfloat16. The code beside them are links to
this package's, so that `AutoModel.from_pretrained("demo_model", trust_remote_code=True)` always runs what is in the
repository.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from between_rows import between_rows
from pretrain_base import SLICES

import ct_moe
from ct_moe import CTMoEError
from ct_moe.hub.conversion import convert_base
from ct_moe.hub.folder import load_folder, new_folder, write_folder
from ct_moe.hub.whole_file import whole_file
from ct_moe.trainers.native_bfloat16 import has_native_bfloat16
from ct_moe.trainers.recipe import TwoStageRecipe, load_recipe
from ct_moe.trainers.rows import load_rows
from ct_moe.trainers.two_stage import train_stage, train_two_stage


SETTINGS = {"num_experts": 4, "moe_intermediate_size": 48, "pool": [1, 2, 2]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("phantoms"), help="folder written by ct-moe phantom")
    parser.add_argument("--base", type=Path, default=Path("phantom-base"), help="written by pretrain_base.py")
    parser.add_argument("--work", type=Path, default=Path("phantom-run"), help="folder for checkpoints and logs")
    parser.add_argument("--recipe", type=Path, default=Path(__file__).with_name("recipe.yaml"), help="both stages")
    parser.add_argument(
        "--between-recipe", type=Path, default=Path(__file__).with_name("recipe_between.yaml"), help="the last stage"
    )
    parser.add_argument("--out", type=Path, required=True, help="new folder for the trained model")
    args = parser.parse_args()
    try:
        args.work.mkdir(parents=True, exist_ok=True)
        model = args.work / "converted"
        if not model.exists():
            make_model(args.base, model, **SETTINGS)
        settings = {
            "model": str(model),
            "train_data": str(args.data / "train.jsonl"),
            "output_dir": str(args.work),
            "volume_cache": str(args.data / "slices"),
            "use_cpu": not torch.cuda.is_available(),
            "bf16": has_native_bfloat16("cuda" if torch.cuda.is_available() else "cpu"),
            # One reads 32 scans in about half a second, in which a GPU could take five steps.
            "dataloader_num_workers": max(1, min(12, os.cpu_count() - 2)),
        }
        trained = train_two_stage(recipe=read_recipe(args.recipe, settings))
        work = args.work / "between"
        work.mkdir(exist_ok=True)
        write_between_rows(args.data / "train.jsonl", work / "rows.jsonl")
        settings |= {"model": str(trained), "train_data": str(work / "rows.jsonl"), "output_dir": str(work)}
        last = read_recipe(args.between_recipe, settings)
        rows, scope = load_rows(last.train_data), last.intended_scope
        out = args.work / "stage2_between"
        save_small(train_stage(last.model, last.stage2, rows, out, intended_scope=scope), args.out)
    except CTMoEError as error:
        sys.exit(f"train_demo: error: {error}")
    print(f"Wrote {args.out}. Measure it: python examples/phantom/evaluate.py --model {args.out} --data {args.data}")


def make_model(base: Path, folder: Path, **settings) -> None:
    """Convert the base to a model that sees the slices it was pretrained on."""
    convert_base(base, folder, parity=False, progress=False, **SLICES, **settings)


def read_recipe(recipe: Path, settings: dict) -> TwoStageRecipe:
    return load_recipe(recipe, [f"{name}={json.dumps(value)}" for name, value in settings.items()])


def write_between_rows(source: Path, out: Path) -> None:
    """A file of `between_rows`, whose paths start at its own folder."""
    with source.open(encoding="utf-8") as lines:
        chosen = between_rows(map(json.loads, lines))
    with whole_file(out) as part, part.open("w", encoding="utf-8") as file:
        for row in chosen:
            images = os.path.relpath(source.parent / row["images"], out.parent)
            file.write(json.dumps(row | {"images": images}) + "\n")


def save_small(trained: Path, out: Path) -> None:
    """Weights in bfloat16, config, processor, and links to the code."""
    model, processor, _ = load_folder(str(trained), dtype="bfloat16")
    code = Path(ct_moe.__file__).parent
    with new_folder(out) as folder:
        write_folder(model, processor, folder)
        for file in folder.glob("*.py"):
            file.unlink()
            file.symlink_to(os.path.relpath(code / file.name, out))


if __name__ == "__main__":
    main()
