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
"""Data files to training rows: one schema, checked before the first step.

- `ROW_FEATURES`: the schema.
- `load_rows`: a file, folder, Hub id or data set in memory -> rows.
- `check_tasks`: no row has a task that the model lacks.
- `interleave_tasks`: the tasks in turn, as many rows of every one.
- `count_tasks`: rows per task.

Errors name rows by number and never quote them: a row's texts and paths may tell who the patient is.
"""

import operator
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, LargeList, List, Nifti, Value

from ct_moe import DataError

from .data_sets.catalogue import DATA_SETS, ITEM_FEATURES, data_set_rows
from .data_sets.messages import UnusableError, completion_messages, prompt_messages, task_name


_SCANS = List(Nifti(decode=False))

# images: paths and URLs of the scans; none in a text-only row. prompt: messages that end with a user's, the guide.
# completion: one assistant message. task: None for an unlabelled row. row: number in the source, from 1.
ROW_FEATURES = Features({**ITEM_FEATURES, "row": Value("int64")})

# By suffix: the builder of `datasets` and its options. An answer "NA" in a CSV cell is not a missing one.
_READERS = {
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".json": ("json", {"parse_agent_traces": False}),
    ".jsonl": ("json", {"parse_agent_traces": False}),
    ".parquet": ("parquet", {}),
}


def load_rows(
    source: str | Path | Dataset | IterableDataset,
    *,
    split: str = "train",
    streaming: bool = False,
    revision: str | None = None,
    name: str | None = None,
) -> Dataset | IterableDataset:
    """Read a data set and bring its rows into the form of `ROW_FEATURES`; other columns are dropped.

    Columns:

    - `images` (a list of paths or one path; in CSV and TSV several are separated by `;`) or `image` (one path). An
      empty cell or list is a row without scan. Relative paths start at the folder of the data file, at the data
      folder or at the root of the Hub repository; in a data set in memory they stay. Whether the scans exist shows
      when they are read. A `datasets.Nifti` column remains one, undecoded: its values are `{"path", "bytes"}`.
    - `prompt` and `completion`: text, or a list of messages whose content is text or a list of text blocks. Blocks
      `{"type": "image"}` are left out: TRL puts the scans before the first user message. Write a column one way: in
      JSON where texts and lists are mixed, `datasets` makes a number of the text "5".
    - `task`, optional: a name; missing or empty for an unlabelled row.

    TRL's `messages` form is refused: there nothing separates the question, which steers the experts, from its answer.

    What is written where: `datasets` leaves a copy of the texts, and of scans that are inside a parquet file, in
    `HF_DATASETS_CACHE` (`~/.cache/huggingface/datasets`). Point that at a protected folder, or set `streaming`, which
    copies nothing of a local file. The rows themselves are kept in memory and add nothing to it.

    Args:
        source: .csv, .tsv, .json, .jsonl or .parquet file; folder of `Dataset.save_to_disk`; folder laid out like a
            dataset repository; Hub id `owner/name`; `NAME:FOLDER` for the download of a data set of `DATA_SETS`, such
            as `ct-rate:/data/CT-RATE`, or several of these, separated by commas; data set in memory.
        split: of a folder, Hub id or published data set. A file or a single saved `Dataset` is taken whole.
        streaming: read and check rows as they are needed; otherwise all are read and checked now.
        revision: branch, tag or commit of a Hub repository.
        name: configuration of a folder or Hub id that has several.

    Returns:
        Rows with the features `ROW_FEATURES`, where for a `Nifti` column `images` is `List(Nifti(decode=False))`.
        `row` is kept in rows that come from here already. Where several workers of a DataLoader stream a data set of
        several files, each counts the rows that it reads.

    Raises:
        DataError: the source is missing, unreadable or empty, a column is missing, or rows cannot be used; the first
            of these are named. Streamed rows raise it when they are reached, and a file that is damaged further on
            raises what `datasets` raises.
    """
    if isinstance(source, (Dataset, IterableDataset)):
        return _to_rows(source, _Reader("data set"), streaming)
    if not isinstance(source, (str, os.PathLike)):
        raise DataError("data set", f"is a {type(source).__name__}", "Pass a path, a Hub id, or one split of it")
    source, suffix = os.fspath(source), Path(source).suffix.lower()
    published = [part.strip().partition(":") for part in source.split(",")]
    if all(root and name in DATA_SETS for name, _, root in published):
        parts = [data_set_rows(name, root, split, streaming=streaming) for name, _, root in published]
        return _to_rows(datasets.concatenate_datasets(parts), _Reader(source), streaming)
    folder = os.path.abspath(source)
    if os.path.isdir(source):
        rows = _read_folder(folder, split, streaming, name)
    elif suffix in _READERS:
        rows, folder = _read_file(source, *_READERS[suffix], streaming), os.path.dirname(folder)
    elif os.path.isfile(source):
        raise DataError(source, f"unknown file type {suffix or 'without suffix'}", f"Use {', '.join(_READERS)}")
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        folder = f"hf://datasets/{source}" + (f"@{revision}" if revision else "")
        with _reading(source, "Check the name and split, the network and, for a private repository, `hf auth login`"):
            rows = datasets.load_dataset(source, name, split=split, revision=revision, streaming=streaming)
    else:
        raise DataError(source, "there is no such file or folder", "Check the path; a Hub id has the form owner/name")
    return _to_rows(rows, _Reader(source, folder, split_cells=suffix in (".csv", ".tsv")), streaming)


def check_tasks(
    rows: Dataset | IterableDataset, tasks: list[str], *, source: str = "data set"
) -> Dataset | IterableDataset:
    """Refuse rows whose task is none of `tasks`; unlabelled rows pass.

    Args:
        rows: from `load_rows`.
        tasks: names of the model's tasks.
        source: what the error says it is about.

    Returns:
        The rows. Streamed ones are checked when they are reached.

    Raises:
        DataError: it names the first rows with another task.
    """
    if isinstance(rows, IterableDataset):
        return rows.map(partial(_check_task, tasks=tasks, source=source), features=rows.features)
    column = _column(rows, "task")
    unknown = pc.and_(column.is_valid(), pc.invert(pc.is_in(column, value_set=pa.array(tasks, pa.string()))))
    if pc.any(unknown).as_py():
        found = zip(_column(rows, "row").filter(unknown).to_pylist(), column.filter(unknown).to_pylist())
        raise _refusal(source, [_unknown_task(row, task, tasks) for row, task in found], len(rows))
    return rows


def interleave_tasks(
    rows: Dataset | IterableDataset, seed: int = 0, *, tasks: list[str] | None = None
) -> Dataset | IterableDataset:
    """Take one row of every task in turn until all rows were seen, so that a pass has as many of every task.

    Rows of smaller tasks come again, each about as often as the others of its task. Unlabelled rows count as one
    more task, the last. Streamed rows end with the first turn that is not needed any more, which may be in the
    middle of a round; their source is read as many times at once as there are tasks, and until every task was met,
    or to the end, before the first row.

    Args:
        rows: from `load_rows`.
        seed: of the order inside each task. Streamed rows keep theirs: shuffle them before.
        tasks: names in the order of their turns; needed for streamed rows. By default in alphabetical order.

    Returns:
        The rows in turn, or `rows` where fewer than two tasks have any.

    Raises:
        DataError: a row has a task that is none of `tasks`, or streamed rows come without `tasks`.
    """
    if isinstance(rows, IterableDataset):
        if tasks is None:
            raise DataError("tasks", "missing for streamed rows", "Name the tasks that they may have")
        checked = check_tasks(rows, tasks)  # no row is left out silently
        met = _tasks_met(checked, {*tasks, None})
        parts = [
            checked.filter(partial(operator.eq, task), input_columns="task") for task in [*tasks, None] if task in met
        ]
    else:
        tasks = list(count_tasks(rows)) if tasks is None else tasks
        found = np.array(_column(check_tasks(rows, tasks), "task").to_pylist(), dtype=object)
        rng = np.random.default_rng(seed)
        places = [np.flatnonzero(found == task) for task in [*tasks, None]]
        parts = [rows.select(rng.permutation(some)) for some in places if len(some)]
    return rows if len(parts) < 2 else datasets.interleave_datasets(parts, stopping_strategy="all_exhausted")


def count_tasks(rows: Dataset) -> dict[str, int]:
    """Rows per task, names in alphabetical order. Unlabelled rows are not counted."""
    counts = pc.value_counts(_column(rows, "task").drop_null())
    return dict(sorted((entry["values"], entry["counts"]) for entry in counts.to_pylist()))


@contextmanager
def _reading(source: str, remedy: str) -> Iterator[None]:
    """Turns what `datasets` and the libraries below it raise into a `DataError`."""
    try:
        yield
    except DataError:
        raise
    except (datasets.exceptions.DatasetsError, OSError, ValueError, pa.ArrowException, StopIteration) as error:
        if isinstance(error, datasets.exceptions.DatasetGenerationError):
            error = error.__cause__ or error
        # What empty JSON, CSV and parquet files come to in `datasets`, which has no error of its own for them.
        no_data = ("corresponds to no data", "BatchSize must be greater than 0")
        if isinstance(error, StopIteration) or any(part in str(error) for part in no_data):
            raise _empty(source) from None
        # Without the cause: Arrow's errors quote the value that they could not convert.
        raise DataError(source, f"cannot be read ({_reason(error)})", remedy) from None


def _reason(error: BaseException) -> str:
    """The error's message where it is known to quote nothing, else its type."""
    kind, message = type(error).__name__, " ".join(str(error).split())
    quotes_nothing = ("UnicodeDecodeError", "ParserError", "EmptyDataError", "DatasetNotFoundError")
    if kind in quotes_nothing or message.startswith(("Unknown split", "Bad split", "JSON parse error")):
        return message.partition(" in row ")[0].rstrip(".")  # JSON's row number counts from the start of a block
    return kind


def _read_file(path: str, kind: str, options: dict[str, Any], streaming: bool) -> Dataset | IterableDataset:
    if not os.path.isfile(path):
        raise DataError(path, "there is no such file", "Check the path")
    read = partial(datasets.load_dataset, kind, data_files={"train": path}, split="train", **options)
    with _reading(path, "Repair the file, or export it again as UTF-8"):
        if kind == "csv":
            start = pd.read_csv(path, sep=options.get("sep", ","), nrows=1, dtype=str)
            if start.empty:
                raise _empty(path)
            if not isinstance(start.index, pd.RangeIndex):  # what pandas makes of a column without name
                raise DataError(path, "rows have more cells than the header", "Name all columns; quote the texts")
            read = partial(read, features=Features(dict.fromkeys(start, Value("string"))))  # "1" is no number
        return read(streaming=streaming)


def _read_folder(path: str, split: str, streaming: bool, name: str | None) -> Dataset | IterableDataset:
    with _reading(path, "Check the folder, its splits and configurations"):
        if not any(Path(path, mark).is_file() for mark in ("state.json", "dataset_dict.json")):
            return datasets.load_dataset(path, name, split=split, streaming=streaming)
        rows = datasets.load_from_disk(path)
    if isinstance(rows, datasets.DatasetDict):
        if split not in rows:
            raise DataError(path, f"no split {split!r}, only {', '.join(rows)}", "Name one of these")
        rows = rows[split]
    return rows


def _to_rows(rows: Dataset | IterableDataset, reader: "_Reader", streaming: bool) -> Dataset | IterableDataset:
    rows = rows.with_format(None)
    if isinstance(rows, Dataset) and not len(rows):
        raise _empty(reader.source)
    if isinstance(rows, Dataset) and streaming:
        rows = rows.to_iterable_dataset()
    with _reading(reader.source, "Repair the data set, or export it again"):
        columns = list(rows.features or next(iter(rows), ()))
        if not columns:
            raise _empty(reader.source)
        reader.take_columns(columns, rows.features or {})
        columns = [column for column in columns if column in (reader.images, "prompt", "completion", "task", "row")]
        rows = rows.select_columns(columns)
        features = Features({**ROW_FEATURES, "images": _SCANS if reader.nifti else ROW_FEATURES["images"]})
        if isinstance(rows, IterableDataset):
            if reader.nifti:
                single = isinstance(rows.features[reader.images], Nifti)
                rows = rows.cast_column(reader.images, _SCANS.feature if single else _SCANS)
            if next(iter(rows), None) is None:
                raise _empty(reader.source)
            return rows.map(reader, with_indices=True, remove_columns=columns, features=features)

    bad = []
    if reader.nifti:
        # Scans inside a data set may be larger than the memory. They stay out of the map, which copies.
        scans, reader.bad_scans = _scan_lists(_column(rows, reader.images), reader.folder)
        columns.remove(reader.images)
        rows = rows.select_columns(columns)
        features.pop("images")
    mapped = rows.map(
        reader,
        with_indices=True,
        fn_kwargs={"bad": bad},
        remove_columns=columns,
        features=features,
        keep_in_memory=True,
        load_from_cache_file=False,
        # By default all arguments are hashed, to find the result in the cache where it never is.
        new_fingerprint=datasets.fingerprint.generate_random_fingerprint(),
    )
    if bad:
        raise _refusal(reader.source, bad, len(rows))
    if reader.nifti:
        mapped = mapped.add_column("images", scans, feature=_SCANS)
    return mapped.select_columns(list(ROW_FEATURES))


@dataclass
class _Reader:
    """Turns rows of one source into rows of `ROW_FEATURES`. The workers of a DataLoader get copies of it."""

    source: str  # what errors are about
    folder: str | None = None  # where relative paths start
    split_cells: bool = False  # "a.nii;b.nii" in the column `images` is two paths
    images: str = "images"  # name of that column
    nifti: bool = False
    numbered: bool = False  # these are rows of `load_rows` already
    task_names: list[str] | None = None  # of a ClassLabel column
    bad_scans: dict[int, tuple[str, str, str]] = field(default_factory=dict)  # found beforehand, by index of the row

    def take_columns(self, columns: list[str], features: dict[str, Any]) -> None:
        """Check that the columns are there and note what kind they are."""
        images = [column for column in ("images", "image") if column in columns]
        missing = [column for column in ("prompt", "completion") if column not in columns]
        chats = [column for column in ("messages", "conversations") if column in columns]
        if missing and chats:
            finding = f"has the form `{chats[0]}`, where the text that steers the experts could contain the answer"
            remedy = "Split it into `prompt` (up to the last question) and `completion` (the answer)"
            raise DataError(self.source, finding, remedy)
        missing = missing if images else ["images", *missing]
        if missing:
            found = ", ".join(column[:40] for column in columns[:20])
            if self.split_cells and len(missing) == 3:  # a file without header: these are a patient's data
                found = "no known name; is the header missing?"
            remedy = "Rename or add columns; an empty `images` is a row without scan"
            raise DataError(self.source, f"no column {', '.join(missing)}; found: {found}", remedy)
        if len(images) == 2:
            raise DataError(self.source, "has both `image` and `images`", "Remove one of these columns")
        self.images = images[0]
        leaf = features.get(self.images)
        leaf = leaf.feature if isinstance(leaf, (List, LargeList)) else leaf
        if not isinstance(leaf, (Value, datasets.Json, Nifti, type(None))):
            finding = f"column {self.images} holds {type(leaf).__name__} values"
            raise DataError(self.source, finding, "Use paths or Nifti values")
        self.nifti = isinstance(leaf, Nifti)
        self.numbered = set(columns) == set(ROW_FEATURES) and features.get("row") == ROW_FEATURES["row"]
        if isinstance(features.get("task"), datasets.ClassLabel):
            self.task_names = features["task"].names

    def __call__(self, example: dict[str, Any], index: int, bad: list[tuple] | None = None) -> dict[str, Any]:
        """One row. A bad one is added to `bad` and its place left empty; without `bad` it is raised."""
        row = {"images": [], "prompt": [], "completion": [], "task": None}
        row["row"] = example["row"] if self.numbered else index + 1
        try:
            if index in self.bad_scans:
                raise UnusableError(*self.bad_scans[index])
            row["images"] = self._scans(example.get(self.images))
            row["prompt"] = prompt_messages(example["prompt"])
            row["completion"] = completion_messages(example["completion"])
            row["task"] = self._task(example.get("task"))
        except UnusableError as error:
            if bad is None:
                raise _refusal(self.source, [(row["row"], *error.args)]) from None
            bad.append((row["row"], *error.args))
        if self.images not in example:
            row.pop("images")
        return row

    def _scans(self, value: Any) -> list[str | dict[str, Any]]:
        if isinstance(value, str):
            parts = value.split(";") if self.split_cells and self.images == "images" else [value]
            value = [part.strip() for part in parts if part.strip()]
        elif not isinstance(value, list):
            value = [] if value is None else [value]
        if self.nifti:
            scans = [scan or {"bytes": None, "path": None} for scan in value]
            return [
                {**scan, "path": _placed_scan(scan["path"], scan["bytes"] is not None, self.folder)} for scan in scans
            ]
        for scan in value:
            if not isinstance(scan, str) or not scan.strip():
                found = (
                    f"an entry of type {type(scan).__name__}"
                    if scan and not isinstance(scan, str)
                    else "an empty entry"
                )
                raise UnusableError(self.images, f"has {found}", "Write a path or a list of paths")
        return [_placed(scan, self.folder) for scan in value]

    def _task(self, value: Any) -> str | None:
        if self.task_names is not None and value is not None:
            return self.task_names[value] if value >= 0 else None  # -1 is how `datasets` marks a missing label
        return task_name(value)


def _placed(path: str, folder: str | None) -> str:
    if folder is None or "://" in path or os.path.isabs(path):
        return path
    return f"{folder}/{path}" if "://" in folder else os.path.normpath(os.path.join(folder, path))


def _placed_scan(path: str | None, has_bytes: bool, folder: str | None) -> str | None:
    """The path of a Nifti value. That of bytes is only their name."""
    if not has_bytes and not path:
        raise UnusableError("images", "has an empty entry", "Put a scan there, or leave the entry out")
    return path if has_bytes else _placed(path, folder)


def _scan_lists(column: pa.ChunkedArray, folder: str | None) -> tuple[pa.ChunkedArray, dict[int, tuple]]:
    """A Nifti column as lists with placed paths, its bytes not copied; and errors by the index of their row."""
    chunks, errors, start = [], {}, 0
    for chunk in column.chunks:
        if pa.types.is_struct(chunk.type):
            lengths, scans = chunk.is_valid().cast(pa.int32()), chunk.drop_null() if chunk.null_count else chunk
        else:
            lengths, scans = pc.fill_null(pc.list_value_length(chunk), 0), chunk.flatten()
        lengths = lengths.to_numpy()
        indices = np.repeat(np.arange(start, start + len(chunk)), lengths).tolist()  # of the row of every scan
        contents, paths = scans.flatten()  # the two fields of the structs
        placed = []
        for index, path, has_bytes in zip(indices, paths.to_pylist(), contents.is_valid().to_pylist()):
            try:
                placed.append(_placed_scan(path, has_bytes, folder))
            except UnusableError as error:
                placed.append(None)
                errors[index] = error.args
        structs = pa.StructArray.from_arrays([contents, pa.array(placed, pa.string())], names=["bytes", "path"])
        offsets = pa.array([0, *np.cumsum(lengths)], pa.int32())
        chunks.append(pa.ListArray.from_arrays(offsets, structs))
        start += len(chunk)
    return pa.chunked_array(chunks), errors


def _column(rows: Dataset, name: str) -> pa.ChunkedArray:
    return rows.select_columns(name).with_format("arrow")[:][name]


def _check_task(example: dict[str, Any], *, tasks: list[str], source: str) -> dict[str, Any]:
    if example["task"] is not None and example["task"] not in tasks:
        raise _refusal(source, [_unknown_task(example["row"], example["task"], tasks)])
    return example


def _unknown_task(row: int, task: str, tasks: list[str]) -> tuple[int, str, str, str]:
    """Shows the name only if it looks like one: where columns are mixed up it is a report."""
    finding = f"is {task!r}" if re.fullmatch(r"[\w.-]{1,32}", task) else "is no name"
    return row, "task", f"{finding}, which the model does not have", f"Use {', '.join(tasks)}, or leave it empty"


def _tasks_met(rows: Iterable[dict[str, Any]], tasks: set[str | None]) -> set[str | None]:
    met = set()
    for row in rows:
        met.add(row["task"])
        if met == tasks:
            break
    return met


def _empty(source: str) -> DataError:
    return DataError(source, "has no rows", "Check that this is the right file and split")


def _refusal(source: str, bad: list[tuple[int, str, str, str]], total: int | None = None) -> DataError:
    """One error for all bad rows, (row, column, finding, remedy) each, naming the first five."""
    finding = "; ".join(f"row {row}, {column}: {finding}" for row, column, finding, _ in bad[:5])
    if total is not None:
        finding = f"{len(bad)} of {total} rows cannot be used: {finding}" + ("; ..." if len(bad) > 5 else "")
    return DataError(source, finding, ". ".join(dict.fromkeys(remedy for *_, remedy in bad[:5])))
