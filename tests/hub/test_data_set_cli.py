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
"""The commands about data sets, as a user calls them."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from command_line import fail, invoke
from published import write_csv, write_ct_rate, write_version_1

from ct_moe import load_volume
from ct_moe.hub.cli import main
from ct_moe.trainers.data_sets.ct_rate import scan_path


NAME = "valid_7_a_1.nii.gz"


def test_rows_are_listed_for_another_system_and_its_answers_scored(tmp_path):
    root = write_ct_rate(tmp_path)
    items, out = tmp_path / "items.jsonl", tmp_path / "r.json"
    invoke("check", "ct-rate", root, "--split", "validation", "--items", items, "--out", tmp_path / "check.json")
    rows = [json.loads(line) for line in items.read_text(encoding="utf-8").splitlines()]
    assert [row["task"] for row in rows] == ["report"] * 3
    said = tmp_path / "said.csv"
    write_csv(said, ["id", "prediction"], *[[row["id"], "Emphysema."] for row in rows])
    printed = invoke("evaluate", "--predictions", said, "--data", "ct-rate", "--root", root, "--out", out)
    assert "built-in rules" in printed.output
    assert json.loads(out.read_text(encoding="utf-8"))["counts"]["scored"] == 3
    assert json.loads((tmp_path / "check.json").read_text(encoding="utf-8"))["left_out"] == 1


def test_a_list_of_rows_is_whole_or_not_there(tmp_path, monkeypatch, capsys):
    fail(monkeypatch, capsys, "check", "ct-rate", tmp_path, "--items", tmp_path / "items.jsonl")
    assert not list(tmp_path.iterdir())
    fail(monkeypatch, capsys, "check", "ct-rate", tmp_path, "--items", tmp_path / "nowhere" / "items.jsonl")


def test_scans_of_version_1_are_pointed_out_and_repaired(tmp_path):
    hu = np.linspace(-1000, 1500, 8 * 9 * 10).reshape(8, 9, 10).round()
    write_version_1(tmp_path, NAME, hu, (2.0, 0.7, 0.7))
    reports = tmp_path / "dataset" / "radiology_text_reports" / "validation_reports.csv"
    write_csv(reports, ["VolumeName", "Findings_EN", "Impressions_EN"], [NAME, "A nodule.", ""])
    assert "fix-ct-rate" in invoke("check", "ct-rate", tmp_path, "--split", "validation").output
    assert "1 scans repaired" in invoke("fix-ct-rate", tmp_path, "--split", "validation").output
    assert np.array_equal(load_volume(scan_path(tmp_path, NAME)).hu, hu)
    assert invoke("check", "ct-rate", tmp_path, "--split", "validation", "--scans", "load").exit_code == 0


def test_folders_are_refused_as_files_before_the_work(tmp_path, monkeypatch, capsys):
    root = write_ct_rate(tmp_path)
    (tmp_path / "taken.json").mkdir()
    for option in ("--out", "--items"):
        assert "is a folder" in fail(monkeypatch, capsys, "check", "ct-rate", root, option, tmp_path / "taken.json")
    said = tmp_path / "said.jsonl"
    said.write_text('{"prediction": "x", "reference": "x"}\n', encoding="utf-8")
    line = fail(monkeypatch, capsys, "evaluate", "--predictions", said, "--out", tmp_path / "taken.json")
    assert "is no .json file" in line


def test_scans_that_are_not_there_are_named_with_their_rows_and_end_in_an_error(
    model_folder, tmp_path, monkeypatch, capsys
):
    root, out = write_ct_rate(tmp_path), tmp_path / "r.json"
    shutil.rmtree(root / "dataset" / "valid_fixed")
    arguments = ["--model", model_folder, "--data", "ct-rate", "--root", root, "--out", out]
    monkeypatch.setattr(sys, "argv", ["ct-moe", "evaluate", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    error = capsys.readouterr().err
    assert stopped.value.code == 1
    assert "not answered: validation_reports.csv, line 2: valid_1_a_1.nii.gz: " in error
    assert "r.json: no row was answered" in error
    assert json.loads(out.read_text(encoding="utf-8"))["counts"]["unanswered"] == 3


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [("datasets", ["check", "own", "."]), ("accelerate", ["evaluate", "--predictions", "x.csv", "--out", "r.json"])],
)
def test_a_missing_package_is_named_with_what_brings_it(missing, arguments, tmp_path):
    code = f"import sys; sys.modules[{missing!r}] = None; from ct_moe.hub.cli import main; main()"
    run = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1
    assert f'error: {missing}: is not installed. Run: pip install "ct-moe[train' in run.stderr
