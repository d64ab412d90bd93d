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
"""Files are read row by row; what is broken in them is named by its line and neither lost nor merged."""

import pytest
from published import write_ct_rate

from ct_moe import DataError
from ct_moe.trainers.data_sets.check import check_data_set
from ct_moe.trainers.data_sets.files import read_csv, read_table
from ct_moe.trainers.data_sets.item import BadRow


def rows_of(path, text, **kwargs):
    path.write_text(text, encoding="utf-8")
    return list(read_csv(path, ["a", "b"], **kwargs))


def test_lines_are_those_where_rows_start(tmp_path):
    text = 'a,b\n\n1,"x\ny"\n\n2,z\n3\n4,5,,\n'
    found = [(3, {"a": "1", "b": "x\ny"}), (6, {"a": "2", "b": "z"}), (7, {"a": "3", "b": ""})]
    assert rows_of(tmp_path / "a.csv", text) == [*found, (8, {"a": "4", "b": "5"})]


def test_a_row_with_more_cells_than_the_header_is_a_bad_one(tmp_path):
    assert rows_of(tmp_path / "a.csv", "a,b\n1,2,Doe\n3,4\n") == [
        (2, "3 cells for 2 columns"),
        (3, {"a": "3", "b": "4"}),
    ]


@pytest.mark.parametrize(
    "rest",
    [
        '2,"never closed\n3,x\n4,y\n',  # would swallow what follows
        '2,"never closed\n3,"x"\n4,y\n',  # would merge two rows
        f"2,{'Doe' * 60_000}\n3,x\n",  # longer than a cell may be
    ],
    ids=["to the end", "into the next", "long"],
)
def test_broken_quotes_and_endless_cells_are_named_by_line(rest, tmp_path):
    with pytest.raises(DataError, match=r"a\.csv: line 4: .*Is a quote there not closed") as raised:
        rows_of(tmp_path / "a.csv", f'a,b\n1,"x\ny"\n{rest}')
    assert "Doe" not in str(raised.value)


def test_a_report_with_a_cell_too_many_is_reported_and_not_merged(tmp_path):
    file = write_ct_rate(tmp_path) / "dataset" / "radiology_text_reports" / "train_reports.csv"
    with file.open("a", encoding="utf-8") as lines:
        lines.write("train_3_a_1.nii.gz,,,A mass, of 5 mm,None.\n")  # a comma without quotes
    report = check_data_set("ct-rate", tmp_path, "train", progress=False)
    assert report.bad_rows == [BadRow(str(file), 7, "6 cells for 5 columns")]


def test_lines_of_json_are_objects(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n\n[1]\n{broken\n' + "[" * 100_000 + "\n", encoding="utf-8")
    wrong = "is no JSON object"
    assert list(read_table(file)) == [(1, {"a": 1}), (3, wrong), (4, wrong), (5, wrong)]
