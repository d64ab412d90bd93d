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
"""Rows of one's own that training would refuse are bad rows everywhere, and nothing is dropped without a word."""

import json

import pytest
from published import write_own

from ct_moe import DataError
from ct_moe.trainers import load_rows
from ct_moe.trainers.data_sets.catalogue import DataSetWarning, read_items
from ct_moe.trainers.data_sets.check import check_data_set


ASSISTANT = {"role": "assistant", "content": "x"}


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"prompt": " "}, "prompt is blank"),
        ({"prompt": 5}, "prompt is of type int"),
        ({"prompt": [5]}, "prompt has a message without a known role"),
        ({"prompt": [{"role": "user", "content": 5}]}, "prompt has a message without text"),
        ({"prompt": [{"role": "user", "content": "Q?"}, ASSISTANT]}, "prompt does not end with a user message"),
        ({"completion": {}}, "completion is of type dict"),
        ({"completion": [ASSISTANT, ASSISTANT]}, "completion has 2 messages"),
        ({"completion": [{"role": "user", "content": "x"}]}, "completion is not by the assistant"),
        ({"completion": [{"role": "assistant", "content": None}]}, "completion has a message without text"),
        ({"task": ["vqa_open"]}, "task is of type list"),
        ({"images": [" "]}, "images is no list of paths"),
        ({"images": "a\0.nii"}, "a path with a NUL character"),
        ({"completion": "half \ud800"}, "a text with half a character"),
    ],
)
def test_rows_that_training_would_refuse_are_bad_rows(change, finding, tmp_path):
    file = write_own(tmp_path)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"images": "scan.nii.gz", "prompt": "Q?", "completion": "x", **change}) + "\n")
    for scans in ("none", "there", "load"):
        report = check_data_set("own", file, "train", scans=scans, progress=False)
        assert [(bad.line, bad.finding) for bad in report.bad_rows] == [(3, finding)]
    with pytest.warns(DataSetWarning, match=f"1 lines cannot be used, the first is .*line 3: {finding}"):
        assert len(load_rows(f"own:{file}")) == 2
    file.write_text(file.read_text(encoding="utf-8").splitlines()[-1], encoding="utf-8")
    with pytest.warns(DataSetWarning), pytest.raises(DataError, match="no row that can be used"):
        load_rows(f"own:{file}")


def test_messages_and_blocks_are_what_training_makes_of_them(tmp_path):
    blocks = [{"type": "image"}, {"type": "text", "text": "Any stones?"}]
    row = {
        "prompt": [{"role": "user", "content": blocks}],
        "completion": [ASSISTANT],
        "task": " triage ",
        "image": None,
    }
    (tmp_path / "train.jsonl").write_text(json.dumps(row), encoding="utf-8")
    (item,) = read_items("own", tmp_path, "train")
    assert item.prompt == [{"role": "user", "content": "Any stones?"}]
    assert (item.completion, item.task, item.images) == ("x", "triage", [])


def test_two_scans_of_one_name_are_reported(tmp_path):
    for name in ("a.nii.gz", "a.npy", "a.txt", "b.nii", "b.txt"):
        (tmp_path / name).write_text("text", encoding="utf-8")
    first, bad, other = read_items("own", tmp_path, "train")
    assert (first.id, other.id) == ("a", "b")
    assert bad.finding == "its report is that of a.nii.gz"
    assert bad.file.endswith("a.npy")
