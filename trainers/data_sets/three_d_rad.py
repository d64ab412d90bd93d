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
"""3D-RAD (arXiv 2506.11147): questions in six tasks about CT-RATE's scans.

```
ROOT/3DRAD/train/Task3_Medical_Computation/Size.csv     Task, Subtask, VolumeName, Question, Answer, QuestionType,
                                                        AnswerChoice, Choice A ... Choice D
```

Unused cells hold "-". The scans are those of a CT-RATE download (version 2) in the same ROOT; the test files call them
test_1_a_1.nii.gz, which are CT-RATE's valid_1_a_1.nii.gz. The folders number the first two tasks the other way round
than the paper: the kind of a question is the folder's name without its number, and the file's. The paper's score of a
task is the mean over its files. Not for commercial use, as CT-RATE.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from ct_moe import DataError

from .ct_rate import NO_CHEST, no_chest, patient_of, scan_path
from .files import read_csv
from .item import BadRow, Item, closed_item


SPLITS = ("train", "test")
_COLUMNS = ("VolumeName", "Question", "Answer", "QuestionType", "AnswerChoice", *(f"Choice {c}" for c in "ABCD"))


def read_vqa(root: Path, split: str) -> Iterator[Item | BadRow]:
    """Open and closed questions of all tasks, in the order of the files' names."""
    if split not in SPLITS:
        raise DataError(str(root), f"has no split {split}", f"Use one of {', '.join(SPLITS)}")
    base = root / "3DRAD" if (root / "3DRAD").is_dir() else root  # the Hub repository has no such folder
    files = sorted((base / split).glob("Task*_*/*.csv"))
    if not files:
        raise DataError(str(base / split), "holds no Task folders", "Name the folder of the download")
    left_out = no_chest(root, "train" if split == "train" else "validation")
    for file in files:
        task = re.sub(r"^Task\d+_", "", file.parent.name).replace("_", " ").lower()
        kind = f"{task}, {file.stem.replace('_', ' ')}"
        for line, row in read_csv(file, _COLUMNS):
            if isinstance(row, str):
                yield BadRow(str(file), line, row)
                continue
            cells = {name: "" if row[name].strip() == "-" else row[name].strip() for name in _COLUMNS}
            name = re.sub(r"^test_", "valid_", cells["VolumeName"])
            path = scan_path(root, name)
            if name in left_out:
                yield BadRow(str(file), line, NO_CHEST, is_left_out=True)
                continue
            if path is None or not cells["Question"] or not cells["Answer"]:
                finding = "VolumeName is not of the form train_1_a_1.nii.gz" if path is None else "an empty text"
                yield BadRow(str(file), line, finding)
                continue
            common = {
                "id": f"3d-rad-{split}-{file.parent.name[:5]}-{file.stem}-{line}",
                "images": [str(path)],
                "kind": kind,
                "patient": patient_of(name),
                "where": (str(file), line),
            }
            if cells["QuestionType"].lower().startswith("open"):
                item = Item(prompt=cells["Question"], completion=cells["Answer"], task="vqa_open", **common)
            else:
                choices = [cells[f"Choice {letter}"] for letter in "ABCD"]
                if task == "existence detection":  # the paper asks these without choices and scores the text
                    opened = {**common, "id": f"{common['id']}-open"}
                    yield Item(prompt=cells["Question"], completion=cells["Answer"], task="vqa_open", **opened)
                item = closed_item(cells["Question"], choices, cells["AnswerChoice"], cells["Answer"], **common)
            yield BadRow(str(file), line, item) if isinstance(item, str) else item
