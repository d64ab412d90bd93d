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
"""Rows of the training tests."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ct_moe.pipeline_ct_moe import REPORT_PROMPT


TASKS = ["report", "vqa_closed", "vqa_open"]
PROMPTS = {
    "report": REPORT_PROMPT,
    "vqa_closed": "Is there a nodule? Choices: A. Yes B. No",
    "vqa_open": "Where is the nodule?",
}
ANSWERS = {
    "report": ["Findings: a nodule.\nImpression: follow up.", "Findings: clear lungs.\nImpression: normal."],
    "vqa_closed": ["A. Yes", "B. No"],
    "vqa_open": ["right upper lobe", "nowhere"],
}


def row(number: int, task: str, answer: str, scans: list[str], prompt: str | None = None) -> dict:
    return {
        "images": scans,
        "prompt": [{"role": "user", "content": prompt or PROMPTS[task]}],
        "completion": [{"role": "assistant", "content": answer}],
        "task": task,
        "row": number,
    }


def write_rows(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """As a user's file has them: without numbers."""
    with Path(path).open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({name: value for name, value in row.items() if name != "row"}) + "\n")


def records(path: str | Path) -> list[dict[str, Any]]:
    """Of a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
