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
"""The recipes of the published data sets: check, two steps of each stage and evaluate, on downloads in their form."""

import json
import re
from pathlib import Path

import pytest
from published import WRITERS
from typer.testing import CliRunner

from ct_moe.hub.cli import app
from ct_moe.trainers.data_sets.catalogue import DATA_SETS


pytestmark = pytest.mark.slow

RECIPES = Path(__file__).parents[2] / "examples" / "data_sets"
SMALL = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "bf16": False,
    "use_cpu": True,
    "dataloader_num_workers": 0,
    "stage1.max_steps": 2,
    "stage2.max_steps": 2,
    "disable_tqdm": True,
}


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "base"
    invoke("tiny-base", folder)
    return folder


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipe_from_check_to_results(recipe, base, tmp_path):
    text = recipe.read_text(encoding="utf-8")
    sources = [part.strip() for part in re.search(r"^train_data: (.*)$", text, re.MULTILINE)[1].split(",")]
    names = [source.partition(":")[0] for source in sources]
    root = tmp_path / "download"
    for write in dict.fromkeys(WRITERS[name] for name in names):
        write(root)
    for name in names:
        assert DATA_SETS[name].licence in invoke("check", name, root, "--scans", "load")
    # The settings that the recipe's own first lines convert with.
    command = re.search(r"^#   ct-moe convert BASE \S+(.*)$", text, re.MULTILINE)[1]
    settings = re.findall(r"--set (?:'([^']*)'|(\S+))", command)
    model = tmp_path / "model"
    invoke("convert", base, model, *(part for pair in settings for part in ("--set", "".join(pair))))
    changes = {
        **SMALL,
        "model": model,
        "train_data": ", ".join(f"{name}:{root}" for name in names),
        "output_dir": tmp_path / "run",
        "volume_cache": tmp_path / "cache",
    }
    invoke(
        "train",
        "--config",
        recipe,
        *(
            part
            for name, v in changes.items()
            for part in ("--set", f"{name}={json.dumps(str(v)) if isinstance(v, Path) else v}")
        ),
    )
    for name in names:
        out = tmp_path / f"{name}.json"
        printed = invoke(
            "evaluate", "--model", tmp_path / "run" / "stage2", "--data", name, "--root", root, "--out", out
        )
        result = json.loads(out.read_text(encoding="utf-8"))
        assert result["counts"]["scored"] == result["counts"]["rows"] > 0
        assert result["system"]["scope"] in text
        assert f"Wrote {out}" in printed.replace("\n", "")


def test_every_data_set_has_a_recipe():
    used = " ".join(path.read_text(encoding="utf-8") for path in RECIPES.glob("*.yaml"))
    assert all(f"{name}:/data" in used for name in DATA_SETS)
