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
"""The phantom examples from an empty folder to tables: every command of examples/phantom, with very few steps."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ct_moe import load_volume


pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples" / "phantom"


def run(folder: Path, *command: object) -> str:
    result = subprocess.run([sys.executable, *map(str, command)], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Phantoms and a base."""
    folder = tmp_path_factory.mktemp("phantom")
    run(folder, "-m", "ct_moe.hub.cli", "phantom", "phantoms", "--n", 6, "--validation", 2, "--test", 2)
    base = [EXAMPLES / "pretrain_base.py", "--data", "phantoms"]
    few = ["--tower-steps", 2, "--tower-batch", 8, "--steps", 2, "--batch", 4]
    run(folder, *base, "--out", "phantom-base", *few)
    return folder


@pytest.fixture(scope="module")
def demo_model(folder):
    for name, stages in (("recipe.yaml", 2), ("recipe_between.yaml", 1)):
        recipe = (EXAMPLES / name).read_text(encoding="utf-8")
        recipe, found = re.subn(r"max_steps: \d+", "max_steps: 2", recipe)
        assert found == stages
        recipe, found = re.subn(r"train_batch_size: \d+", "train_batch_size: 4", recipe)
        assert found == 1
        (folder / name).write_text(recipe, encoding="utf-8")
    recipes = ["--recipe", "recipe.yaml", "--between-recipe", "recipe_between.yaml"]
    run(folder, EXAMPLES / "train_demo.py", *recipes, "--out", "demo_model")
    return folder / "demo_model"


def test_demo_model_is_that_of_the_last_stage_which_trains_words_alone(folder, demo_model):
    last = folder / "phantom-run" / "stage2_between"
    report = json.loads((last / "training_report.json").read_text(encoding="utf-8"))
    assert {part["name"] for part in report["parts"] if part["trained"]} == {"projector", "language_model"}
    weights, before, written = (
        load_file(path / "model.safetensors") for path in (last, last.parent / "stage2", demo_model)
    )
    assert all(torch.equal(written[name], value.bfloat16()) for name, value in weights.items())
    changed = {name for name, value in weights.items() if not torch.equal(value, before[name])}
    assert any("language_model" in name for name in changed)
    assert not any("vision_tower" in name for name in changed)


def test_demo_model_is_small_and_loads_with_its_own_code(folder, demo_model):
    assert (demo_model / "model.safetensors").stat().st_size <= 10e6
    code = demo_model / "modeling_ct_moe.py"
    assert code.is_symlink()
    assert code.resolve() == (EXAMPLES.parents[1] / "modeling_ct_moe" / "modeling_ct_moe.py").resolve()
    script = (
        "from transformers import pipeline\n"
        "reporter = pipeline('ct-report', model='demo_model', trust_remote_code=True)\n"
        "print(reporter('phantoms/test/scans/00000.nii.gz', max_new_tokens=4)['num_slices'])"
    )
    slices = int(run(folder, "-c", script))
    extent = load_volume(folder / "phantoms/test/scans/00000.nii.gz")
    assert slices == min(24, -(-extent.hu.shape[0] * extent.spacing[0] // 18))


def test_demo_model_is_measured_with_controls_and_a_ceiling(folder, demo_model):
    table = run(folder, EXAMPLES / "evaluate.py", "--model", demo_model, "--data", "phantoms", "--out", "scores")
    scores = json.loads((folder / "scores" / "scores.json").read_text(encoding="utf-8"))
    lines = (folder / "scores" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    answers = list(map(json.loads, lines))
    assert scores["plane"]["n"] == sum(answer["kind"] == "plane" for answer in answers) == 2
    closed = [answer for answer in answers if answer["task"] == "vqa_closed" and answer["kind"] != "plane"]
    assert scores["closed"]["n"] == len(closed)
    assert scores["closed"]["accuracy"] == pytest.approx(sum(answer["right"] for answer in closed) / len(closed))
    assert {"blind", "other_scan", "shuffled_slices", "single_slice", "flipped"} == set(scores["controls"])
    assert "blind" in table
    forced = ["--model", demo_model, "--data", "phantoms", "--controls", "", "--group", "vqa_open", "--out", "forced"]
    run(folder, EXAMPLES / "evaluate.py", *forced)
    lines = (folder / "forced" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    tasks = json.loads((demo_model / "config.json").read_text(encoding="utf-8"))["tasks"]
    assert {json.loads(line)["group"] for line in lines} == {tasks.index("vqa_open")}
    run(
        folder, EXAMPLES / "ceiling.py", "--model", demo_model, "--data", "phantoms", "--epochs", 16, "--out", "scores"
    )
    assert 0 <= json.loads((folder / "scores" / "ceiling.json").read_text(encoding="utf-8"))["macro_f1"] <= 1


def test_arms_of_the_ablations_run_and_are_not_run_twice(folder, demo_model):
    """Few of them, with one of every claim, since each takes long: the fast tests build and prepare all."""
    taught = [EXAMPLES / "teach_base.py", "--data", "phantoms", "--model", demo_model, "--layers", "layers"]
    taught += ["--scans", 2, "--steps", 2, "--batch", 4, "--reader", "reader", "--reader-steps", 1]
    run(folder, *taught, "--reader-batch", 1, "--out", "taught-base")
    start = ["--out", "start", "--split", "validation", "--steps", 0, 0, "--only", "f", "--seeds", 1]
    run(folder, EXAMPLES / "ablations.py", *start)
    (file,) = (folder / "start" / "validation" / "untrained").glob("*.json")
    record = json.loads(file.read_text(encoding="utf-8"))
    assert record["steps"] == [0, 0]
    assert record["closed"]["right"]
    whole = [EXAMPLES / "ablations.py", "--out", "ablations"]
    whole += ["--steps", 1, 1, "--batch", 2, "--seeds", 1]
    run(folder, *whole, "--only", "df")
    command = [*whole, "--part", "1/5"]
    planned = run(folder, *command, "--list").splitlines()
    assert {line.split("(")[1][0] for line in planned} >= set("abcde")
    assert [line.split(")")[1] for line in planned if line.startswith("done")] == [" one stage, seed 0"]
    run(folder, *command)
    files = {file: file.stat().st_mtime_ns for file in (folder / "ablations" / "test").glob("*.json")}
    assert len(files) == len(planned) + 2
    assert run(folder, *command) == ""
    assert files == {file: file.stat().st_mtime_ns for file in files}
    names = []
    for file in files:
        record = json.loads(file.read_text(encoding="utf-8"))
        names.append(record["arm"]["name"])
        assert record["steps"] == [1, 1]
        assert record["all_train_scans"] == 6
        assert ("other_groups" in record) == (record["arm"]["name"] in ("both levels", "label-free routing"))
        assert len(record.get("other_groups", {"report": "00"})["report"]) == 2  # scans
    run(folder, EXAMPLES / "results.py", "--out", "ablations", "--write", "results")
    tables = (folder / "results" / "ABLATIONS.md").read_text(encoding="utf-8")
    assert all(name in tables for name in names)
