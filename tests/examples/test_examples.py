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
"""The recipe and the script in examples/, and a whole training run on real scans from the command line."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from ct_moe.pipeline_ct_moe import REPORT_PROMPT
from ct_moe.trainers import Stage1Config, Stage2Config, TwoStageRecipe, load_recipe


EXAMPLES = Path(__file__).parents[2] / "examples"
REAL_SCANS = [
    "totalseg/example_ct_sm.nii.gz",
    "totalseg/example_ct_dicom",
    "totalseg/pulmonary_ct_cropped.nii.gz",
    "elastix/3DCT_lung_baseline_small.mha",
    "cip/ct-64.nrrd",
    "lidc/LIDC-IDRI-0001",
]
MR_SCAN = "totalseg/example_mr_sm.nii.gz"  # no CT: refused


def run(*command: str | Path, cwd: Path) -> str:
    """Output of a command, which must succeed. In the folder `cwd`, as a user would type it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hf")}
    command = [str(part) for part in command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(stage: Path) -> list[float]:
    report = json.loads((stage / "training_report.json").read_text())
    return [entry["loss"] for entry in report["log"] if "loss" in entry]


def test_the_recipe_says_what_the_stages_are_made_with():
    path = EXAMPLES / "recipe.yaml"
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe = load_recipe(path, ["use_cpu=true"])
    assert isinstance(recipe.stage1, Stage1Config)
    assert isinstance(recipe.stage2, Stage2Config)
    stages = {name: written.pop(name) for name in ("stage1", "stage2")}
    own = {field.name for field in fields(TwoStageRecipe)}
    for name in own & set(written):
        assert getattr(recipe, name) == written.pop(name), name
    for name, settings in stages.items():
        for setting, value in {**written, **settings}.items():
            found = getattr(getattr(recipe, name), setting)
            if setting == "report_to":
                assert found == []
            else:
                assert getattr(found, "value", found) == value, (name, setting)  # of an enum
        assert getattr(recipe, name).output_dir == f"{recipe.output_dir}/{name}-training"


def test_the_recipe_shows_the_defaults_of_what_is_trained():
    """What is written under a stage is what a recipe without these lines would do."""
    written = yaml.safe_load((EXAMPLES / "recipe.yaml").read_text(encoding="utf-8"))
    for name, stage in (("stage1", Stage1Config), ("stage2", Stage2Config)):
        defaults = stage(output_dir="unused", use_cpu=True, report_to="none", activation_checkpointing=False)
        for setting, value in written[name].items():
            if setting != "max_steps":  # of the demonstration
                assert getattr(defaults, setting) == value, (name, setting)


def test_the_recipe_quotes_the_prompt_of_the_pipeline():
    text = " ".join((EXAMPLES / "recipe.yaml").read_text(encoding="utf-8").replace("\n#", "\n").split())
    assert REPORT_PROMPT in text


@pytest.mark.slow
def test_own_data_trains_and_reads_a_scan(tmp_path):
    script = EXAMPLES / "own_data.py"
    output = run(sys.executable, script, cwd=tmp_path)
    assert f"Asked   {REPORT_PROMPT}" in output
    assert "not a medical device" in output
    out = tmp_path / "own-data"
    for stage in ("stage1", "stage2"):
        assert losses(out / "run" / stage)[-1] < losses(out / "run" / stage)[0]
    # The same command again does nothing anew, and the command line goes on with what the script made.
    assert "stage1 is finished" in run(sys.executable, script, cwd=tmp_path)
    run(
        *(sys.executable, "-m", "ct_moe.hub.cli", "train", "--config", EXAMPLES / "recipe.yaml", "--stage", "1"),
        *("--set", "max_steps=1", "--set", "stage1.max_steps=1"),
        cwd=tmp_path,
    )
    assert (tmp_path / "runs" / "first" / "stage1" / "config.json").is_file()


@pytest.mark.slow
def test_own_data_ends_with_one_line(tmp_path):
    (tmp_path / "rows.csv").write_text("images,prompt\na.nii.gz,What?\n")
    (tmp_path / "file").touch()
    for options, words in (
        (["--data", "rows.csv", "--model", "model"], "no column completion"),
        (["--recipe", "missing.yaml", "--data", "rows.csv", "--model", "model"], "missing.yaml"),
        (["--out", "file"], "file: File exists"),
    ):
        command = [sys.executable, str(EXAMPLES / "own_data.py"), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path)
        assert done.returncode == 1
        *_, last = done.stderr.splitlines()  # libraries may say something of their own before
        assert last.startswith("own_data: error: "), done.stderr
        assert words in last
        assert "Traceback" not in done.stderr


def real_rows(test_data: Path) -> list[dict]:
    """Every scan in every task, with made-up texts that say what scan it is, and the MR once."""
    rows = []
    for number, name in enumerate(REAL_SCANS):
        scan = {"images": [str(test_data / name)]}
        report = f"Findings: Scan number {number}. Impression: Made up."
        rows.append({**scan, "prompt": REPORT_PROMPT, "completion": report, "task": "report"})
        answer = "Yes" if number % 2 else "No"
        rows.append({**scan, "prompt": "Is this scan odd?", "completion": answer, "task": "vqa_closed"})
        rows.append({**scan, "prompt": "Which scan is it?", "completion": f"Scan {number}", "task": "vqa_open"})
    rows.append({**rows[0], "images": [str(test_data / MR_SCAN)]})
    return rows


LOAD = """
import sys
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
for folder in sys.argv[1:]:
    model, info = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert type(model).__name__ == "CTMoEForConditionalGeneration", type(model)
    assert not any(info.values()), info
    AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    assert AutoProcessor.from_pretrained(folder, trust_remote_code=True).tasks == model.config.tasks
    assert "ct_moe" not in sys.modules  # the folder's own code
"""


@pytest.mark.slow
def test_both_stages_on_real_scans(test_data, model_folder, tmp_path):
    rows = real_rows(test_data)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = yaml.safe_load((EXAMPLES / "recipe.yaml").read_text(encoding="utf-8"))
    settings |= {"model": str(model_folder), "train_data": "rows.jsonl", "output_dir": "run"}
    settings |= {"volume_cache": "cache", "max_failed_share": 0.5, "logging_steps": 1, "learning_rate": 1.0e-3}
    settings |= {"per_device_train_batch_size": 4, "lr_scheduler_type": "constant", "warmup_steps": 0}
    for stage in ("stage1", "stage2"):  # 19 rows are 5 steps
        settings[stage] |= {"max_steps": 10, "learning_rates": None}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    ct_moe = (sys.executable, "-m", "ct_moe.hub.cli")
    output = run(*ct_moe, "train", "--config", "recipe.yaml", cwd=tmp_path)
    assert "stage2: wrote run/stage2" in output

    for stage in ("stage1", "stage2"):
        report = json.loads((tmp_path / "run" / stage / "training_report.json").read_text())
        assert report["rows"] == {"report": 7, "vqa_closed": 6, "vqa_open": 6}
        assert report["steps"] == 10
        assert str(test_data) not in json.dumps(report)
        skipped = tmp_path / "run" / f"{stage}-training" / "skipped_rows.jsonl"
        listed = [json.loads(line) for line in skipped.read_text().splitlines()]
        assert report["rows_skipped"] == len(listed) >= 1
        for record in listed:
            assert record["row"] == f"row {len(rows)}"
            assert MR_SCAN in record["error"]
            assert "this is not CT" in record["error"]
        log = losses(tmp_path / "run" / stage)
        assert sum(log[-3:]) < sum(log[:3]), log

    run(sys.executable, "-c", LOAD, "run/stage1", "run/stage2", cwd=tmp_path)
    scan = test_data / "totalseg/example_ct_sm.nii.gz"
    options = ("--model", "run/stage2", "--out", "reports.jsonl", "--max-new-tokens", "20")
    run(*ct_moe, "report", scan, *options, cwd=tmp_path)
    (record,) = map(json.loads, (tmp_path / "reports.jsonl").read_text().splitlines())
    assert record["text"]
    assert record["task"] == "report"
    assert record["prompt"] == REPORT_PROMPT
    assert record["scope"] == settings["intended_scope"]


def test_the_code_of_the_demo_model_is_the_packages():
    """Links, so that the shipped weights never run an older state of the code."""
    folder = Path(__file__).parents[2] / "examples" / "demo_model"
    files = sorted(folder.glob("*.py"))
    assert [file.name for file in files] == sorted(
        file.name for file in (folder.parents[1] / "modeling_ct_moe").glob("*_ct_moe.py")
    )
    assert all(file.is_symlink() for file in files)
