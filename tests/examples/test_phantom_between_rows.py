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
"""Rows of the demo model's last stage: what is asked again, and that its answer is still the right one."""

import random
import re
from collections import Counter

import pytest


DIRECTIONS = ["towards the head", "towards the feet", "towards the middle", "nowhere"]


@pytest.fixture(scope="module")
def between_rows(load_script):
    return load_script("between_rows")


def row(scan: int, task: str, template: str, answer: str = "", choices: list[str] | None = None) -> dict:
    prompt, completion = f"{template}?", f"{answer}."
    if choices:
        prompt += " Choices: " + " ".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", choices))
        completion = f"{answer}, {'ABCD'[choices.index(answer)]}."
    return {
        "images": f"{scan}.nii.gz",
        "task": task,
        "template": template,
        "prompt": prompt,
        "completion": completion,
        "answer": answer,
        "choices": choices,
    }


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Every second of 400 scans is asked about growth."""
    rng, rows = random.Random(0), []
    for scan in range(400):
        rows.append(row(scan, "report", "report", "Findings"))
        rows.append(row(scan, "vqa_closed", "phase", "arterial", ["arterial", "none", "venous", "delayed"]))
        if scan % 2:
            directions = rng.sample(DIRECTIONS, 4)
            rows.append(row(scan, "vqa_closed", "growth aneurysm", rng.choice(directions), directions))
            rows.append(row(scan, "vqa_open", "open width aneurysm lower", "45"))
        else:
            rows.append(row(scan, "vqa_closed", "count nodule", "two", ["one", "two", "three", "no"]))
            rows.append(row(scan, "vqa_open", "open phase", "arterial"))
    return rows


def test_every_answer_names_its_choice_and_its_letter(between_rows, rows):
    truth = {(row["images"], row["template"]): row["answer"] for row in rows}
    orders = {}
    for row in between_rows.between_rows(rows):
        if row["task"] != "vqa_closed":
            assert row in rows
            continue
        listed = dict(re.findall(r"([A-D])\. (.*?)(?= [A-D]\. |$)", row["prompt"].partition(" Choices: ")[2]))
        assert list(listed.values()) == row["choices"]
        text, letter = re.fullmatch(r"(.*), ([A-D])\.", row["completion"]).groups()
        assert listed[letter] == text == truth[row["images"], row["template"]]
        if row["template"].startswith("growth"):
            orders.setdefault(row["images"], set()).add(tuple(row["choices"]))
    assert sum(len(found) == 3 for found in orders.values()) > 150  # of 200: 24 orders rarely meet


def test_growth_is_asked_of_every_scan_and_three_times(between_rows, rows):
    asked = Counter(row["images"] for row in between_rows.between_rows(rows) if row["template"] == "growth aneurysm")
    assert asked == {f"{scan}.nii.gz": 3 for scan in range(1, 400, 2)}


def test_parts_of_the_other_rows_are_kept(between_rows, rows):
    chosen = between_rows.between_rows(rows)
    number = Counter(row["template"] for row in chosen)
    assert 200 < number["phase"] < 300  # all of 200 scans, 30 % of 200
    assert number["count nodule"] == 2 * (number["phase"] - 200)
    assert number["open width aneurysm lower"] > number["open phase"] > 0
    assert 0 < number["report"] < 80
    assert chosen == between_rows.between_rows(rows) != between_rows.between_rows(rows, seed=8)
