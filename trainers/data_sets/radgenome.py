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
"""RadGenome-ChestCT (arXiv 2404.16754): questions about regions of CT-RATE's scans.

```
ROOT/dataset/radgenome_files/train_vqa_presence.csv     Volumename, Anatomy, Finding, Presence; others likewise
ROOT/dataset/qa_templates/presence_template.json        wordings for training with {abnormality} and {region}
ROOT/dataset/train_preprocessed/train_1/train_1a/train_1_a_1.nii.gz
```

The files hold no questions. In training each is one of the published wordings, chosen by scan and row, the same every
time. The validation split is asked and scored as the publishers do (their src/global_inference.py): one wording per
part, the location and the region of a size as the whole path of the anatomy, and "No Findings" for an abnormality that
is empty; only the marks of their own model, such as "<Size>", are left out. Scans are those of this download or, where
it has none, of a CT-RATE download in the same ROOT. The licence has changed from version to version, and the scans are
CT-RATE's: not for commercial use.
"""

import json
from collections.abc import Iterator
from functools import lru_cache
from os.path import isfile
from pathlib import Path

from ct_moe import DataError

from .ct_rate import NO_CHEST, SCAN_NAME, SPLITS, no_chest, patient_of, scan_path
from .files import read_csv
from .item import BadRow, Item, pick


# Kind: (column of what is asked about, column of the answer). `None`: of the whole scan.
PARTS = {
    "abnormality": (None, "Abnormality"),
    "location": ("Abnormality", "Anatomy"),
    "presence": ("Finding", "Presence"),
    "size": ("Abnormality", "Size"),
    "disorders": (None, "Disorders"),
}
_EVALUATED = {
    "abnormality": "What are the abnormalities in the {region}?",
    "location": "Where is the {abnormality} located in the image?",
    "presence": "Is there any sign of {abnormality} in the {region}?",
    "size": "What is the approximate size of the {abnormality} in the {path}?",
    "disorders": "What are the abnormalities in the scan?",
}
_NOTHING = "No Findings"


def read_vqa(root: Path, split: str) -> Iterator[Item | BadRow]:
    """Open questions of all five parts, one after the other."""
    if split not in SPLITS:
        raise DataError(str(root), f"has no split {split}", f"Use one of {', '.join(SPLITS)}")
    for part in PARTS:
        yield from _read_part(root, split, part)


def _read_part(root: Path, split: str, part: str) -> Iterator[Item | BadRow]:
    asked, answered = PARTS[part]
    wordings = [_EVALUATED[part]]
    if split == "train":
        wordings = _wordings(root / "dataset" / "qa_templates" / f"{part}_template.json")
    name = f"{split}_case_disorders.csv" if part == "disorders" else f"{split}_vqa_{part}.csv"
    file = root / "dataset" / "radgenome_files" / name
    left_out = no_chest(root, split)
    columns = ["Volumename", answered] + [asked] * bool(asked) + ["Anatomy"] * (part != "disorders")
    for line, row in read_csv(file, columns):
        if isinstance(row, str):
            yield BadRow(str(file), line, row)
            continue
        volume = row["Volumename"].strip()
        if volume in left_out:
            yield BadRow(str(file), line, NO_CHEST, is_left_out=True)
            continue
        path = _scan(root, volume)
        about, answer = _said(row[asked]) if asked else "", _said(row[answered])
        anatomy = "" if part == "disorders" else row["Anatomy"].strip().strip("/")
        if part == "abnormality":
            answer = answer or _NOTHING
        if path is None or not answer or (asked and not about) or (part != "disorders" and not anatomy):
            finding = "Volumename is not of the form train_1_a_1.nii.gz" if path is None else "an empty text"
            yield BadRow(str(file), line, finding)
            continue
        question = pick(wordings, f"{volume} {line}")
        for place, text in (("abnormality", about), ("region", anatomy.rpartition("/")[2]), ("path", anatomy)):
            question = question.replace(f"{{{place}}}", text)
        yield Item(
            id=f"radgenome-{split}-{part}-{line}",
            images=[str(path)],
            prompt=" ".join(question.split()),
            completion=_trained(answer) if split == "train" else _scored(part, answer),
            task="vqa_open",
            kind=part,
            patient=patient_of(volume),
            where=(str(file), line),
        )


def _said(text: str) -> str:
    return "" if text.strip().lower() == "nan" else text.strip()


def _trained(answer: str) -> str:
    return answer[0].upper() + answer[1:].rstrip(".") + "."


def _scored(part: str, answer: str) -> str:
    """As the publishers write it, who lower what follows the first letter of a location and of disorders."""
    if part in ("location", "disorders"):
        answer = answer.capitalize()
    return f"{answer}." if part in ("location", "size") else answer


def _wordings(file: Path) -> list[str]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(str(file), f"cannot be read ({type(error).__name__})", "Download qa_templates too") from error
    lists = content.values() if isinstance(content, dict) else [content]
    wordings = [text for texts in lists if isinstance(texts, list) for text in texts if isinstance(text, str)]
    if not wordings:
        raise DataError(str(file), "holds no wordings", "Download qa_templates again")
    return wordings


@lru_cache(maxsize=1 << 16)  # many rows are about one scan
def _scan(root: Path, name: str) -> Path | None:
    parts = SCAN_NAME.fullmatch(name)
    if parts is None:
        return None
    split, patient, scan, _ = parts.groups()
    # Without an underscore before the letter: so the publishers' preprocessing names these folders.
    own = root / "dataset" / f"{split}_preprocessed" / f"{split}_{patient}" / f"{split}_{patient}{scan}" / name
    of_ct_rate = scan_path(root, name)
    return own if isfile(own) or not isfile(of_ct_rate) else of_ct_rate
