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
"""What `check` says beside bad lines: scans in the wrong unit, who needs a scan, and what evaluation will miss."""

import json
import shutil

import numpy as np
from published import write_ct_rate, write_m3d

from ct_moe.trainers.data_sets.catalogue import DATA_SETS
from ct_moe.trainers.data_sets.check import check_data_set, check_text


def test_arrays_in_hu_are_no_pictures_in_0_to_1(tmp_path):
    write_m3d(tmp_path)
    array = tmp_path / "M3D_Cap_npy" / "ct_case" / "000012" / "Coronal.npy"
    np.save(array, np.linspace(-1024, 3071, 32 * 64 * 64, dtype=np.float32).reshape(1, 32, 64, 64))
    report = check_data_set("m3d-cap", tmp_path, "train", scans="load", progress=False)
    assert report.broken == [(str(array), "values from -1024 to 3071, not in [0, 1]: is it in HU?")]


def test_scans_are_named_with_the_rows_that_need_them(tmp_path):
    write_ct_rate(tmp_path)
    scans = sorted((tmp_path / "dataset" / "train_fixed").rglob("*.nii.gz"))
    scans[2].unlink()
    report = check_data_set("ct-rate", tmp_path, "train", progress=False)
    file = tmp_path / "dataset" / "radiology_text_reports" / "train_reports.csv"
    assert report.rows_of == {str(scans[2]): [(str(file), 5)]}  # behind a cell with a line break
    assert f"{scans[2]} (needed by train_reports.csv, line 5)" in check_text(report, DATA_SETS["ct-rate"], "train")
    assert json.loads(json.dumps(report.as_dict()))["rows_of"] == {str(scans[2]): [f"{file}, line 5"]}
    scans[0].unlink()
    report = check_data_set("ct-rate-vqa", tmp_path, "train", progress=False)
    text = check_text(report, DATA_SETS["ct-rate-vqa"], "train")
    assert "(needed by train_vqa.json, line 2; train_vqa.json, line 2; train_vqa.json, line 2 ...)" in text


def test_names_that_no_file_can_have_are_reported(tmp_path):
    row = {"images": f"{'a' * 300}.nii.gz", "prompt": "Q?", "completion": "x"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row), encoding="utf-8")
    for scans in ("there", "load"):
        ((_, finding),) = check_data_set("own", tmp_path, "train", scans=scans, progress=False).broken
        assert finding == "File name too long"


def test_what_evaluation_will_miss_is_noted(tmp_path):
    data = write_ct_rate(tmp_path) / "dataset"
    labels = data / "multi_abnormality_labels" / "train_predicted_labels.csv"
    assert check_data_set("ct-rate", tmp_path, "train", progress=False).notes == []
    whole = labels.read_text(encoding="utf-8").splitlines(keepends=True)
    labels.write_text("".join(whole[:-1]), encoding="utf-8")
    report = check_data_set("ct-rate", tmp_path, "train", progress=False)
    assert (report.notes, report.is_whole) == (["1 reports have no labels: clinical scores leave them out"], True)
    labels.write_text("".join([*whole[:-1], whole[-1].replace(",0", ",x")]), encoding="utf-8")
    report = check_data_set("ct-rate", tmp_path, "train", progress=False)
    assert report.broken == [(str(labels), "line 4: a label that is neither 0 nor 1")]
    shutil.rmtree(labels.parent)
    shutil.rmtree(data / "metadata")
    report = check_data_set("ct-rate", tmp_path, "train", progress=False)
    text = check_text(report, DATA_SETS["ct-rate"], "train")
    assert report.is_whole
    assert "no dataset/metadata/no_chest_train.txt: scans of no chest are not left out" in text
    assert "no dataset/multi_abnormality_labels/train_predicted_labels.csv: evaluation will compute no" in text
