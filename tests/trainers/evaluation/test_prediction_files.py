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
"""Files of answers: what is wrong with a line is said by its number and counted, and the others are scored."""

import json

import pytest
from published import write_csv, write_m3d

from ct_moe import DataError
from ct_moe.trainers.data_sets.catalogue import read_items
from ct_moe.trainers.evaluation.evaluate import evaluate
from ct_moe.trainers.evaluation.prediction_files import read_predictions
from ct_moe.trainers.evaluation.results import format_results


def write_lines(file, *lines):
    file.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return file


def said(name, text="x", **rest):
    return {"id": name, "prediction": text, **rest}


def test_lines_are_counted_as_an_editor_counts_them(tmp_path):
    lines = [said("a"), "\n", "{broken\n", said(5), said("a"), {"id": "b"}, said("c", 5)]
    file = write_lines(tmp_path / "a.jsonl", *lines)
    found, bad = read_predictions(file)
    assert [(line, row["id"]) for line, row in found] == [(1, "a"), (4, 5)]
    assert [(row.line, row.finding) for row in bad] == [
        (3, "is no JSON object"),
        (5, "its id is that of line 1"),
        (6, "no prediction"),
        (7, "a prediction that is no text"),
    ]
    write_csv(tmp_path / "a.csv", ["id", "prediction"], ["a", "two\nlines"], ["a", "x"], ["b", "x", "Doe"], ["c", ""])
    found, bad = read_predictions(tmp_path / "a.csv")
    assert [(line, row["prediction"]) for line, row in found] == [(2, "two\nlines"), (6, "")]
    assert [(row.line, row.finding) for row in bad] == [
        (4, "its id is that of line 2"),
        (5, "3 cells for 2 columns"),
    ]


def test_many_ids_take_no_time(tmp_path):
    lines = [json.dumps(said(i)) + "\n" for i in range(20_000)] * 2
    found, bad = read_predictions(write_lines(tmp_path / "a.jsonl", *lines))
    assert (len(found), len(bad)) == (20_000, 20_000)
    assert bad[-1].finding == "its id is that of line 20000"


@pytest.mark.parametrize(
    ("lines", "finding"),
    [
        ([], "holds no predictions"),
        (["{\n"], "no line that can be used, the first is 1: is no JSON object"),
        ([{"id": "a"}], "no line that can be used, the first is 1: no prediction"),
        ([said("a")], "no line that can be used, the first is 1: no reference"),
    ],
)
def test_a_file_of_which_nothing_is_left_is_refused(lines, finding, tmp_path):
    file = write_lines(tmp_path / "a.jsonl", *lines)
    with pytest.raises(DataError, match=finding):
        evaluate(tmp_path / "r.json", predictions=file, baselines=[])
    assert not (tmp_path / "r.json").exists()


def test_bad_lines_and_unknown_ids_are_counted_and_the_others_scored(tmp_path):
    root = write_m3d(tmp_path)
    items = list(read_items("m3d-vqa", root, "test"))
    good = [said(item.id, item.completion) for item in items]
    settings = {"data": "m3d-vqa", "root": root, "baselines": []}
    file = write_lines(tmp_path / "a.jsonl", "{broken\n", *good[1:], said("other"), said("another"))
    result = evaluate(tmp_path / "r.json", predictions=file, **settings)
    counts = {"rows": 6, "scored": 5, "unanswered": 1, "bad_rows": 1, "left_out": 0, "unknown_ids": 2}
    assert result["counts"] == counts
    assert result["bad_rows"] == ["a.jsonl, line 1: is no JSON object"]
    assert result["unanswered"] == {items[0].id: "M3D_VQA_test.csv, line 2: no prediction"}
    assert "2 predictions have an id that is none of the split's, the first is line 7" in format_results(result)
    # Ids of the rest of the split are not unknown where a part of it is scored.
    file = write_lines(tmp_path / "a.jsonl", *good)
    assert evaluate(tmp_path / "r.json", predictions=file, rows=2, **settings)["counts"]["unknown_ids"] == 0
    # A row that nobody predicted is no bad line.
    with pytest.raises(DataError, match="2 of 6 rows have no prediction, the first is m3d-vqa-test-2-closed"):
        evaluate(tmp_path / "r.json", predictions=write_lines(file, "{broken\n", *good[2:]), **settings)


def test_lines_without_reference_are_counted(tmp_path):
    lines = [said("a", reference="x"), said("b"), said("c", choices=["x", "y"], answer="z")]
    result = evaluate(tmp_path / "r.json", predictions=write_lines(tmp_path / "a.jsonl", *lines), baselines=[])
    assert (result["counts"]["scored"], result["counts"]["bad_rows"]) == (1, 2)
    assert result["bad_rows"] == [
        "a.jsonl, line 2: no reference",
        "a.jsonl, line 3: no two to four choices with the answer",
    ]
