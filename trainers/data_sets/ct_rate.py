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
"""CT-RATE (arXiv 2403.17834), as it is published: reports, labels, metadata and questions about chest CT.

```
ROOT/dataset/train_fixed/train_1/train_1_a/train_1_a_1.nii.gz       scans of version 2, in HU; valid_fixed likewise
ROOT/dataset/radiology_text_reports/train_reports.csv               VolumeName, Findings_EN, Impressions_EN, ...
ROOT/dataset/multi_abnormality_labels/train_predicted_labels.csv    VolumeName and the 18 of `ABNORMALITIES`
ROOT/dataset/metadata/train_metadata.csv, no_chest_train.txt        slope, intercept and spacing of version 1
ROOT/dataset/vqa/train_vqa.json                                     conversations
```

Version 1 (`dataset/train/`) stores the scanner's numbers without slope, intercept and voxel size: those are in the
metadata. Version 2 is in HU already, though the metadata still list the slope and intercept of the scanner: rescaled
again, a scan with the intercept -8192 becomes all air. Only version 2 is read here; `ct_rate_fix.fix_scans` makes it
of version 1.

Not for commercial use (CC BY-NC-SA 4.0), nor are models trained on it.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from ct_moe import DataError
from ct_moe.pipeline_ct_moe import REPORT_PROMPT

from .files import read_csv, read_json_list
from .item import BadRow, Item, closed_item


# In the order of the label files and of the published classifier.
ABNORMALITIES = (
    "Medical material",
    "Arterial wall calcification",
    "Cardiomegaly",
    "Pericardial effusion",
    "Coronary artery wall calcification",
    "Hiatal hernia",
    "Lymphadenopathy",
    "Emphysema",
    "Atelectasis",
    "Lung nodule",
    "Lung opacity",
    "Pulmonary fibrotic sequela",
    "Pleural effusion",
    "Mosaic attenuation pattern",
    "Peribronchial thickening",
    "Consolidation",
    "Bronchiectasis",
    "Interlobular septal thickening",
)
NO_CHEST = "is of no chest, by the publishers' list"
# Names in the files: (of scans and labels, of reports and metadata).
SPLITS = {"train": ("train", "train"), "validation": ("valid", "validation")}
SCAN_NAME = re.compile(r"(train|valid)_(\d+)_([a-z]+)_(\d+)\.nii\.gz")
_NOTHING = ("", "not given.", "not given", "nan")
# What a question ends with in the published JSON, and the task it stands for.
_TOKENS = {
    "<report_generation>": "report",
    "<long_answer>": "vqa_open",
    "<short_answer>": "vqa_open",
    "<multiple_choice>": "vqa_closed",
}
_CHOICE = re.compile(r"\(([a-d])\)\s*")


def read_reports(root: Path, split: str) -> Iterator[Item | BadRow]:
    """One report per reconstruction, with findings and impression; scans that are of no chest are left out."""
    scans, texts = _names(root, split)
    file = root / "dataset" / "radiology_text_reports" / f"{texts}_reports.csv"
    left_out = no_chest(root, split)
    for line, row in read_csv(file, ("VolumeName", "Findings_EN", "Impressions_EN")):
        if isinstance(row, str):
            yield BadRow(str(file), line, row)
            continue
        name = row["VolumeName"].strip()
        if name in left_out:
            yield BadRow(str(file), line, NO_CHEST, is_left_out=True)
            continue
        path = scan_path(root, name)
        if path is None or not name.startswith(scans):
            yield BadRow(str(file), line, "VolumeName is not of the form train_1_a_1.nii.gz")
            continue
        findings, impression = (_said(row[column]) for column in ("Findings_EN", "Impressions_EN"))
        if not findings and not impression:
            yield BadRow(str(file), line, "neither findings nor impression")
            continue
        parts = [f"Findings: {findings}"] * bool(findings) + [f"Impression: {impression}"] * bool(impression)
        yield Item(
            id=f"ct-rate-{name.removesuffix('.nii.gz')}",
            images=[str(path)],
            prompt=REPORT_PROMPT,
            completion="\n".join(parts),
            task="report",
            kind="report",
            patient=patient_of(name),
            where=(str(file), line),
        )


def read_vqa(root: Path, split: str) -> Iterator[Item | BadRow]:
    """Questions of CT-CHAT: every turn of a conversation, after the turns before it. Entries without scan are none."""
    scans, _ = _names(root, split)
    file = root / "dataset" / "vqa" / f"{scans}_vqa.json"
    left_out = no_chest(root, split)
    for number, entry in read_json_list(file):
        if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list):
            yield BadRow(str(file), number, "no conversation")
            continue
        if not entry.get("image"):
            continue
        name = Path(str(entry["image"])).name.replace(".npz", ".nii.gz")
        path = scan_path(root, name)
        turns = entry["conversations"]
        if name in left_out:
            yield BadRow(str(file), number, NO_CHEST, is_left_out=True)
            continue
        if path is None or len(turns) % 2 or not all(_is_turn(turn) for turn in turns):
            finding = "turns that are no conversation" if path else "no scan of the form train_1_a_1.nii.gz"
            yield BadRow(str(file), number, finding)
            continue
        history: list[dict[str, str]] = []
        for turn in range(0, len(turns), 2):
            question, answer = turns[turn]["value"], turns[turn + 1]["value"].strip()
            task = next((task for token, task in _TOKENS.items() if token in question), "vqa_open")
            for token in (*_TOKENS, "<image>"):
                question = question.replace(token, "")
            item = _turn(
                question.strip(),
                answer,
                task,
                id=f"ct-rate-vqa-{split}-{number}-{turn // 2 + 1}",
                images=[str(path)],
                kind=str(turns[turn].get("type") or task),
                patient=patient_of(name),
                where=(str(file), number),
            )
            if isinstance(item, str):
                yield BadRow(str(file), number, f"turn {turn // 2 + 1}: {item}")
                break  # what follows would build on it
            said = item.prompt
            if history:
                item.prompt = [*history, {"role": "user", "content": said}]
            yield item
            history += [{"role": "user", "content": said}, {"role": "assistant", "content": item.completion}]


def _turn(question: str, answer: str, task: str, **rest) -> Item | str:
    if not question or not answer:
        return "an empty text"
    if task == "vqa_closed":
        # "What is seen? (a) One (b) Two ..." answered by "(b) Two".
        parts = _CHOICE.split(question)
        letters, choices = parts[1::2], [part.strip() for part in parts[2::2]]
        right = _CHOICE.match(answer)
        if right is None or letters != list("abcd"[: len(letters)]):
            return "no choices from (a) on" if right is not None else "an answer without its letter"
        return closed_item(parts[0].strip(), choices, right[1], None, **rest)
    return Item(prompt=question, completion=answer, task=task, **rest)


def read_labels(root: Path, split: str) -> dict[str, list[int]]:
    """The 18 labels of every scan, by VolumeName. They are a classifier's, of the reports, and not a doctor's.

    Raises:
        DataError: the file is missing, lacks a column, or has a label that is neither 0 nor 1.
    """
    file = labels_file(root, split)
    labels = {}
    for line, row in read_csv(file, ("VolumeName", *ABNORMALITIES)):
        values = [] if isinstance(row, str) else [row[name].strip() for name in ABNORMALITIES]
        if not values:
            raise DataError(str(file), f"line {line}: {row}", "Download it again")
        if not set(values) <= {"0", "1", "0.0", "1.0"}:
            raise DataError(str(file), f"line {line}: a label that is neither 0 nor 1", "Download it again")
        labels[row["VolumeName"].strip()] = [int(float(value)) for value in values]
    return labels


def labels_file(root: Path, split: str) -> Path:
    """What `read_labels` reads."""
    return root / "dataset" / "multi_abnormality_labels" / f"{_names(root, split)[0]}_predicted_labels.csv"


def scan_path(root: Path, name: str) -> Path | None:
    """Where version 2 keeps "train_1_a_1.nii.gz"; `None` for what is no such name."""
    parts = SCAN_NAME.fullmatch(name)
    if parts is None:
        return None
    split, patient, scan, _ = parts.groups()
    return root / "dataset" / f"{split}_fixed" / f"{split}_{patient}" / f"{split}_{patient}_{scan}" / name


def patient_of(name: str) -> str:
    """ "train_1" of "train_1_a_1.nii.gz"."""
    return "_".join(name.split("_")[:2])


@lru_cache(maxsize=8)
def no_chest(root: Path, split: str) -> frozenset[str]:
    """Scans that the publishers list as of no chest; none where the list was not downloaded."""
    file = no_chest_file(root, split)
    if not file.is_file():
        return frozenset()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(str(file), f"cannot be read ({type(error).__name__})", "Download it again") from error
    return frozenset(Path(line.strip()).name for line in lines if line.strip())


def no_chest_file(root: Path, split: str) -> Path:
    """What `no_chest` reads."""
    return root / "dataset" / "metadata" / f"no_chest_{_names(root, split)[0]}.txt"


def _names(root: Path, split: str) -> tuple[str, str]:
    if split not in SPLITS:
        raise DataError(str(root), f"has no split {split}", f"Use one of {', '.join(SPLITS)}")
    return SPLITS[split]


def _said(text: str) -> str:
    text = " ".join(text.split())
    return "" if text.lower() in _NOTHING else text


def _is_turn(turn) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("value"), str)
