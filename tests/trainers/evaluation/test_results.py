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
"""Scores of a set of texts: groups of types, questions that only a letter answers, and scorers of anybody's."""

import json

import pytest

from ct_moe import DataError
from ct_moe.trainers.data_sets.item import Item
from ct_moe.trainers.evaluation.evaluate import evaluate
from ct_moe.trainers.evaluation.results import format_results, model_index, score_predictions


def opened(kind, answer, patient):
    return Item("", [], "", answer, "vqa_open", kind, patient, ("", 0))


def test_a_task_of_3d_rad_has_the_mean_of_its_files():
    kinds = ["size, Lung nodule"] * 6 + ["size, Aorta"] * 2 + ["side, Lung"] * 2
    items = [opened(kind, "word", f"p{i}") for i, kind in enumerate(kinds)]
    texts = ["word"] * 3 + ["no"] * 3 + ["word"] * 2 + ["no"] * 2
    result = score_predictions(items, texts)
    group = result["open"]["groups"]["size"]
    assert (group["kinds"], group["rows"]) == (2, 8)
    assert group["rouge1"]["mean"] == pytest.approx((50 + 100) / 2)  # over all its rows it would be 62.5
    low, high = group["rouge1"]["interval"]
    assert low < 75 < high
    assert result["open"]["groups"]["side"]["rouge1"]["mean"] == 0
    assert "bleu1, mean over size" in format_results(result)
    assert score_predictions([opened("size", "word", "p")], ["word"])["open"]["groups"] == {}


def test_a_question_that_only_its_letter_answers_is_counted():
    asked = {"images": [], "prompt": "", "completion": "B. none", "task": "vqa_closed", "kind": "phase"}
    rest = {"patient": "p", "where": ("", 0), "choices": ["none", "none", "venous"], "answer": "none"}
    items = [Item(id=str(i), letter="B", **asked, **rest) for i in range(4)]
    result = score_predictions(items, ["B. none", "A. none", "none", "A. B."])
    assert result["closed"]["by_letter"] == 4
    means = {name: summary["mean"] for name, summary in result["closed"]["metrics"].items()}
    assert means == {"strict": 25, "letter": 25, "m3d": 50}
    assert "4 closed questions are scored by the letter" in format_results(result)


SCORERS = """
def raises(texts, references):
    raise RuntimeError(texts[0])

def words(texts, references):
    return texts

def nothing(texts, references):
    return None

def some(texts, references):
    return [float("nan"), *[1] * (len(texts) - 1)]
"""


@pytest.fixture
def said(tmp_path, monkeypatch):
    (tmp_path / "of_mine.py").write_text(SCORERS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = [{"prediction": "Jane Doe", "reference": "x", "patient": p} for p in "abc"]
    file = tmp_path / "said.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("name", "finding"), [("raises", "RuntimeError"), ("words", "ValueError"), ("nothing", "TypeError")]
)
def test_a_scorer_that_fails_is_named_and_quotes_nobody(name, finding, said, tmp_path):
    with pytest.raises(DataError, match=f"scorer of_mine:{name}: raises {finding}") as raised:
        evaluate(tmp_path / "r.json", predictions=said, scorers=[f"of_mine:{name}"], baselines=[])
    assert "Doe" not in str(raised.value)
    assert raised.value.__suppress_context__


def test_a_row_without_a_number_leaves_no_mean_and_no_nan(said, tmp_path):
    evaluate(tmp_path / "r.json", predictions=said, scorers=["of_mine:some"], baselines=[])

    def refuse(constant):
        raise AssertionError(constant)

    result = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"), parse_constant=refuse)
    summary = result["open"]["metrics"]["of_mine:some"]
    assert summary == {"mean": None, "interval": None, "mean_of_kinds": None, "mean_of_kinds_interval": None}
    assert "of_mine:some has no mean" in format_results(result)
    index = model_index(result, name="m", data="d", data_id="d", split="test")
    assert "of_mine" not in json.dumps(index)
