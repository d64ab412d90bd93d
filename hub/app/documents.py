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
"""Report and answers as documents to take away: one `dict`, from which JSON, PDF and DICOM SR are made.

Nothing of the patient or of the file is in it: the page never knew more than voxels.
"""

import json
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ct_moe

from .answers import OpenScan


STATUS = "Unverified and partial: no person has read or signed it."


def make_document(scan: OpenScan) -> dict[str, Any]:
    """All that was said about a scan, with where it comes from. `scan` has a report or an answer.

    Returns:
        **report** (or `None`) and **answers**, each with prompt, text, task and reused visual work; **scan**: what the
        model saw of it; **model**: name, revision, scope; **status**, **notice**, **created** (UTC), **id** (random).
    """
    first = scan.report or scan.answers[0]
    model = first["model"]
    return {
        "title": "Machine-made reading of a CT scan",
        "status": STATUS,
        "notice": first["notice"],
        "scope": first["scope"],
        "report": None if scan.report is None else _said(scan.report, "findings", "impression"),
        "answers": [_said(answer, "question", "answer") for answer in scan.answers],
        "scan": {name: first[name] for name in ("num_slices", "slab_mm", "warnings", "processing")},
        "model": {
            # The name of a folder, and not where it lies on the server.
            "name": Path(model).name if Path(model).is_dir() else model,
            "revision": first["revision"],
            "scope": first["scope"],
            "software": f"ct-moe {ct_moe.__version__}",
        },
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "id": str(uuid.uuid4()),
    }


def as_json(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def _said(result: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: result[name] for name in (*names, "prompt", "text", "task", "reused", "routing")}
