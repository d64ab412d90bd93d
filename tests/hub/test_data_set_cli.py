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

import numpy as np
from command_line import fail, invoke
from published import write_csv, write_ct_rate, write_version_1

from ct_moe import load_volume
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
