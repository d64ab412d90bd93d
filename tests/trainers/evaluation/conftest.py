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
"""Texts that several tests score."""

import json

import pytest


@pytest.fixture(scope="session")
def shared_reports(test_data) -> list[str]:
    """Published CT reports: one real, the others from templates."""
    folder = test_data / "text"
    lines = (folder / "synthetic_ct_reports.jsonl").read_text(encoding="utf-8").splitlines()
    real = json.loads((folder / "merlin_demo_report.json").read_text(encoding="utf-8"))
    return [record["report"] for record in (real, *map(json.loads, lines))]
