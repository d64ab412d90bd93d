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
"""Look through a download before training starts: `check_data_set`."""

import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm

from ct_moe import DataError, VolumeError, load_volume
from ct_moe.hub.whole_file import whole_file

from .catalogue import DataSet, find_data_set, licence_text, read_items
from .ct_rate import SPLITS, labels_file, no_chest_file, read_labels
from .item import BadRow, Item


@dataclass
class CheckReport:
    """What a download holds.

    Attributes:
        items: rows that can be used, by task.
        kinds: the same by type of question.
        scans: different scans that they name.
        bad_rows: lines that give no item.
        left_out: lines that the publishers leave out as well.
        missing: scans that are not there.
        broken: (file, finding) of scans and files of labels that cannot be loaded.
        lost: items whose scan is missing or broken.
        rows_of: of these scans the first rows that need them, (file, line) each.
        by_letter: closed questions whose texts do not tell the right choice: scored by the letter alone.
        notes: what is not there and not needed for training.
    """

    items: Counter = field(default_factory=Counter)
    kinds: Counter = field(default_factory=Counter)
    scans: int = 0
    bad_rows: list[BadRow] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)
    lost: int = 0
    left_out: int = 0
    rows_of: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    by_letter: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        return not (self.bad_rows or self.missing or self.broken) and bool(self.items)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; it holds paths and no texts."""
        return {
            "items": dict(self.items),
            "kinds": dict(self.kinds),
            "scans": self.scans,
            "left_out": self.left_out,
            "bad_rows": [{"file": bad.file, "line": bad.line, "finding": bad.finding} for bad in self.bad_rows],
            "missing": self.missing,
            "broken": [{"scan": scan, "finding": finding} for scan, finding in self.broken],
            "lost_items": self.lost,
            "rows_of": {scan: [f"{file}, line {line}" for file, line in rows] for scan, rows in self.rows_of.items()},
            "by_letter": self.by_letter,
            "notes": self.notes,
        }


def check_data_set(
    name: str,
    root: str | Path,
    split: str,
    *,
    scans: Literal["none", "there", "load"] = "there",
    intensity: Literal["hu", "display"] = "hu",
    items: Path | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> CheckReport:
    """Read every line of a split and look at every scan that it names.

    Args:
        name, root, split: as in `read_items`.
        scans: "none" reads the texts alone; "there" also asks whether every scan is there and holds something; "load"
            loads them all, as training will: a voxel that is no HU, a cut file, a missing slice shows now.
        intensity: of one's own scans; a published data set has its own.
        items: file for all rows that can be used, as JSONL; it is whole or not there.
        workers: scans that are loaded at a time; by default one per core.
        progress: whether to show bars.

    Raises:
        DataError: as in `read_items`.
    """
    report, named = CheckReport(), Counter()
    rows_of: dict[str, list[tuple[str, int]]] = {}
    labels = _look_beside(report, name, Path(root), split)
    unlabelled = 0
    with _items_file(items) as write:
        for item in tqdm(read_items(name, root, split), desc="rows", unit="row", disable=not progress):
            if isinstance(item, BadRow) and item.is_left_out:
                report.left_out += 1
            elif isinstance(item, BadRow):
                report.bad_rows.append(item)
            else:
                write(item)
                report.items[item.task] += 1
                report.kinds[item.kind] += 1
                report.by_letter += item.letter is not None
                unlabelled += labels is not None and Path(item.images[0]).name not in labels
                for image in set(item.images):
                    named[image] += 1
                    if len(rows := rows_of.setdefault(image, [])) < _ROWS:
                        rows.append(item.where)
    report.scans = len(named)
    if unlabelled:
        report.notes.append(f"{unlabelled:,} reports have no labels: clinical scores leave them out")
    if scans == "none":
        return report
    look = _is_there if scans == "there" else _loader(find_data_set(name).intensity or intensity)
    local = [path for path in named if "://" not in path]
    for path, finding in _mapped(look, local, workers or os.cpu_count() or 1, progress):
        if finding is None:
            continue
        report.lost += named[path]
        report.rows_of[path] = rows_of[path]
        if finding == _MISSING:
            report.missing.append(path)
        else:
            report.broken.append((path, finding))
    return report


def check_text(report: CheckReport, data_set: DataSet, split: str, most: int = 10) -> str:
    """The report for people: counts, and the first `most` of everything that is wrong."""
    lines = [f"{data_set.title}, {split}. Licence: {licence_text(data_set)}."]
    lines += [f"{count:>9,} rows of {task}" for task, count in sorted(report.items.items())] or ["no row"]
    lines.append(f"{report.scans:>9,} scans")
    if report.left_out:
        lines.append(f"{report.left_out:>9,} lines left out, as the publishers do")

    def listed(what: str, found: list) -> None:
        if found:
            lines.append(f"{len(found):>9,} {what}")
            lines.extend(f"          {entry}" for entry in found[:most])
            if len(found) > most:
                lines.append(f"          and {len(found) - most:,} more")

    listed("lines that cannot be used", report.bad_rows)

    def told(scan: str, finding: str = "") -> str:
        rows = report.rows_of.get(scan, [])
        needed = "; ".join(f"{Path(file).name}, line {line}" for file, line in rows)
        return f"{scan}{finding}" + (f" (needed by {needed}{' ...' if len(rows) == _ROWS else ''})" if rows else "")

    listed("missing scans", [told(scan) for scan in report.missing])
    listed("files that cannot be loaded", [told(scan, f": {finding}") for scan, finding in report.broken])
    if report.by_letter:
        lines.append(
            f"{report.by_letter:>9,} closed questions scored by the letter: their texts do not tell the choice"
        )
    lines += [f"          note: {note}" for note in report.notes]
    if report.lost:
        lines.append(f"{report.lost:>9,} rows lose their scan: training leaves them out and says so")
    return "\n".join(lines)


@contextmanager
def _items_file(path: Path | None) -> Iterator[Callable[[Item], None]]:
    """Yield what writes an item; the file takes its name when all are written."""
    if path is None:
        yield lambda item: None
        return
    with whole_file(path) as part, part.open("w", encoding="utf-8") as file:
        yield lambda item: print(json.dumps({name: getattr(item, name) for name in _TOLD}), file=file)


_TOLD = ("id", "images", "prompt", "task", "kind")
_MISSING = "is not there"
_AROUND = 0.1  # what resizing may overshoot [0, 1] by
_ROWS = 3  # that are named of a scan
_OF_CHEST = ("ct-rate", "ct-rate-vqa", "radgenome", "3d-rad")


def _look_beside(report: CheckReport, name: str, root: Path, split: str) -> dict[str, list[int]] | None:
    """Note which files of CT-RATE are not there that evaluation reads besides; the labels, if there are some."""
    files = "train" if split == "train" else "validation"
    if name in _OF_CHEST and not (file := no_chest_file(root, files)).is_file():
        report.notes.append(f"no {file.relative_to(root)}: scans of no chest are not left out")
    if name != "ct-rate" or split not in SPLITS:
        return None
    file = labels_file(root, split)
    if not file.is_file():
        report.notes.append(f"no {file.relative_to(root)}: evaluation will compute no clinical scores")
        return None
    try:
        return read_labels(root, split)
    except DataError as error:
        report.broken.append((str(file), error.finding))
        return None


def _is_there(path: str) -> str | None:
    try:
        found = Path(path).stat()
    except FileNotFoundError:
        return _MISSING
    except OSError as error:
        return error.strerror or type(error).__name__
    return "is empty" if Path(path).is_file() and not found.st_size else None


def _loader(intensity: str) -> Callable[[str], str | None]:
    def load(path: str) -> str | None:
        if finding := _is_there(path):
            return finding
        try:
            values = load_volume(path, intensity=intensity).hu
        except VolumeError as error:
            return error.finding
        except OSError as error:
            return error.strerror or type(error).__name__
        low, high = float(values.min()), float(values.max())
        if intensity == "display" and (low < -_AROUND or high > 1 + _AROUND):
            return f"values from {low:g} to {high:g}, not in [0, 1]: is it in HU?"
        return None

    return load


def _mapped(
    look: Callable[[str], str | None], paths: list[str], workers: int, progress: bool
) -> Iterator[tuple[str, str | None]]:
    """In threads: reading and unpacking, which take the time, let others run."""
    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as threads:
        warnings.simplefilter("ignore")  # of what is merely odd
        found = threads.map(look, paths)
        yield from zip(paths, tqdm(found, total=len(paths), desc="scans", unit="scan", disable=not progress))
