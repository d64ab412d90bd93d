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
"""Data of one's own: a CSV, TSV or JSONL file of scans and texts, or a folder of scans with a report beside each.

Columns `images` (paths from the file's folder; in CSV several separated by `;`), `prompt`, `completion` and `task` as
for training, and for evaluation, where they are wanted: `id`, `patient`, `kind`, and of closed questions `choices` (a
list; in CSV separated by `|`) and `answer` (one of them). In a folder `scan.nii.gz` has its report in `scan.txt`.
"""

from collections.abc import Iterator
from os.path import isdir
from pathlib import Path
from typing import Any

from ct_moe import DataError
from ct_moe.pipeline_ct_moe import REPORT_PROMPT

from .files import read_table
from .item import LETTERS, BadRow, Item
from .messages import UnusableError, completion_messages, prompt_messages, task_name


_SCANS = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd", ".npz", ".npy", ".zip")


def read_own(root: Path, split: str) -> Iterator[Item | BadRow]:
    """Rows of a file, or of `SPLIT.csv`, `.tsv` or `.jsonl` in a folder, or else the folder's scans and reports."""
    if isdir(root):
        for suffix in (".jsonl", ".csv", ".tsv"):
            if (root / f"{split}{suffix}").is_file():
                root = root / f"{split}{suffix}"
                break
        else:
            yield from _read_folder(root / split if (root / split).is_dir() else root)
            return
    for line, row in _lines(root):
        item = row if isinstance(row, str) else _item(root, line, row)
        yield BadRow(str(root), line, item) if isinstance(item, str) else item


def are_choices(choices: Any) -> bool:
    """Whether these are two to four different texts."""
    is_list = isinstance(choices, list) and 2 <= len(choices) <= len(LETTERS)
    return is_list and all(isinstance(choice, str) for choice in choices) and len(set(choices)) == len(choices)


def _lines(file: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    if file.suffix.lower() not in (".jsonl", ".csv", ".tsv"):
        raise DataError(str(file), "is no folder and no .csv, .tsv or .jsonl file", "Write one of these")
    for line, row in read_table(file, ("prompt", "completion")):
        if isinstance(row, dict) and file.suffix.lower() != ".jsonl":
            row = {name: value for name, value in row.items() if value}
            if "images" in row:
                row["images"] = [part.strip() for part in row["images"].split(";") if part.strip()]
            if "choices" in row:
                row["choices"] = [part.strip() for part in row["choices"].split("|")]
        yield line, row


def _item(file: Path, line: int, row: dict[str, Any]) -> Item | str:
    images, choices, answer = row.get("images", row.get("image")), row.get("choices"), row.get("answer")
    if isinstance(images, str):
        images = [images] if images.strip() else []
    images = [] if images is None else images
    if not isinstance(images, list) or not all(isinstance(image, str) and image.strip() for image in images):
        return "images is no list of paths"
    try:  # what training would refuse is not scored either
        prompt, task = prompt_messages(row.get("prompt")), task_name(row.get("task"))
        completion = completion_messages(row.get("completion"))[0]["content"].strip()
    except UnusableError as error:
        column, finding, _ = error.args
        return f"{column} {finding}"
    if isinstance(row["prompt"], str):
        prompt = row["prompt"]
    if choices is not None:
        if not are_choices(choices):
            return f"choices are no list of 2 to {len(LETTERS)} different texts"
        if answer not in choices:
            return "the answer is none of the choices"
    task = task or ("vqa_closed" if choices else "report" if prompt == REPORT_PROMPT else "vqa_open")
    images = [image if "://" in image else str(file.parent / image) for image in images]
    return Item(
        id=f"{file.stem}-{line}" if row.get("id") is None else str(row["id"]),
        images=images,
        prompt=prompt,
        completion=completion,
        task=task,
        kind=str(row.get("kind") or task),
        patient=str(row["patient"] if row.get("patient") is not None else images[0] if images else f"line {line}"),
        where=(str(file), line),
        answer=answer if choices else None,
        choices=choices,
    )


def _read_folder(folder: Path) -> Iterator[Item | BadRow]:
    scans: list[tuple[str, Path]] = []
    for path in sorted(folder.iterdir()):
        suffix = next((suffix for suffix in _SCANS if path.name.lower().endswith(suffix)), None)
        if suffix or path.is_dir():
            scans.append((path.name[: -len(suffix)] if suffix else path.name, path))
    if not any((folder / f"{name}.txt").is_file() for name, _ in scans):
        finding = "holds no scan with a report of the same name (scan.nii.gz, scan.txt)"
        raise DataError(str(folder), finding, "Write such reports, or a CSV or JSONL file")
    first: dict[str, Path] = {}
    for number, (name, path) in enumerate(scans, 1):
        if first.setdefault(name, path) != path:
            yield BadRow(str(path), number, f"its report is that of {first[name].name}")
            continue
        try:
            report = (folder / f"{name}.txt").read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            yield BadRow(str(path), number, f"its report cannot be read ({type(error).__name__})")
            continue
        if not report:
            yield BadRow(str(path), number, "its report is empty")
            continue
        yield Item(name, [str(path)], REPORT_PROMPT, report, "report", "report", name, (str(path), number))
