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
"""A data set of phantoms on disk: `write_phantoms`."""

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm.auto import tqdm

from ct_moe import DataError
from ct_moe.hub.folder import new_folder

from .anatomy import draw_phantom
from .files import ORIENTATIONS, plane_of, write_dicom, write_nifti
from .labels import SPLITS
from .texts import balanced, plane_row, questions, scan_rows


def write_phantoms(
    out: str | Path,
    *,
    n: int,
    seed: int = 0,
    validation: int | None = None,
    test: int | None = None,
    file_format: Literal["nifti", "dicom", "both"] = "nifti",
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, int]:
    """Write scans with reports, questions and labels; the same arguments give the same files.

    ```
    out/train/scans/00000.nii.gz ...     and 00000/ with a DICOM series, for "dicom" or "both"
    out/train.jsonl                      rows: images, prompt, completion, task; kind, template, answer, choices
    out/train_plane.jsonl                questions about the stored plane: need an image processor with reorient=False
    out/train_labels.jsonl               per scan: everything that is known of it (`Phantom.labels`)
    out/validation..., out/test...       likewise; the test split has acquisitions, wordings and combinations of
                                         attributes that the others do not have
    ```

    Args:
        out: folder; it must not exist or be empty.
        n: training scans.
        seed: another seed gives other scans.
        validation, test: scans of these splits; by default a tenth of `n` and a quarter, at least 4.
        file_format: "both" names the NIfTI files in the rows, except that every fourth row names the series.
        workers: processes that draw; by default one per core. More than one start a script anew: call this below
            `if __name__ == "__main__":` there.
        progress: whether to show a bar.

    Returns:
        Rows written per split.

    Raises:
        DataError: a number is not above 0, the format is unknown, the disk is full, or a worker was killed.
        ModelError: `out` holds something.
        CTMoEError: pydicom is not installed, for "dicom" and "both".
    """
    sizes = {
        "train": n,
        "validation": max(4, n // 10) if validation is None else validation,
        "test": max(4, n // 4) if test is None else test,
    }
    for name, size in sizes.items():
        if size < 0 or (name == "train" and size < 1):
            raise DataError(f"{name} scans", f"{size} is no number of scans", "Ask for 1 or more")
    if seed < 0 or (workers is not None and workers < 1):
        name, value = ("seed", seed) if seed < 0 else ("workers", workers)
        raise DataError(name, f"{value} is too small", "Use 0 or more for the seed, 1 or more for the workers")
    if file_format not in ("nifti", "dicom", "both"):
        raise DataError("file_format", f"{file_format!r} is unknown", "Use nifti, dicom or both")
    rows_written = {}
    try:
        with new_folder(out) as folder:
            for split, size in sizes.items():
                if size:
                    (folder / split / "scans").mkdir(parents=True)
                    rows_written[split] = _write_split(folder, split, size, seed, file_format, workers, progress)
    except OSError as error:
        finding = f"cannot be written ({error.strerror or type(error).__name__})"
        raise DataError(str(out), finding, "Check the space and the rights on that disk") from error
    return rows_written


def _write_split(out: Path, split: str, size: int, seed: int, file_format: str, workers, progress: bool) -> int:
    draw = partial(_write_scan, folder=out / split / "scans", split=split, seed=seed, file_format=file_format)
    with _mapped(draw, range(size), workers) as written:
        scans = list(tqdm(written, total=size, desc=f"{split} scans", unit="scan", disable=not progress))
    return _write_rows(out, split, scans, seed)


def _write_rows(out: Path, split: str, scans: list[tuple[str, dict]], seed: int) -> int:
    rng = np.random.default_rng([seed, SPLITS.index(split), 1])
    pools = [questions(labels, rng, split) for _, labels in scans]
    chosen = balanced(pools, closed=8, opened=8, rng=rng)
    rows = [
        row
        for (name, labels), taken in zip(scans, chosen)
        for row in scan_rows(f"{split}/scans/{name}", labels, taken, rng, split)
    ]
    _write_lines(out / f"{split}_labels.jsonl", ({"images": f"{split}/scans/{n}", **labels} for n, labels in scans))
    planes = [plane_row(f"{split}/scans/{name}", labels, rng, split) for name, labels in scans]
    _write_lines(out / f"{split}_plane.jsonl", planes)
    _write_lines(out / f"{split}.jsonl", rows)
    return len(rows)


def _write_scan(index: int, *, folder: Path, split: str, seed: int, file_format: str) -> tuple[str, dict]:
    """Draw and write scan `index`; its name in the rows, and its labels."""
    phantom = draw_phantom(seed * 1_000_003 + index, split)
    rng = np.random.default_rng([seed, SPLITS.index(split), index, 2])
    orientation = str(rng.choice(ORIENTATIONS[phantom.acquisition["unseen"]]))
    name, labels = f"{index:05}.nii.gz", phantom.labels()
    if file_format != "dicom":
        write_nifti(phantom, folder / name, orientation)
        labels["orientation"], labels["plane"] = orientation, plane_of(orientation)
    if file_format != "nifti":
        write_dicom(phantom, folder / f"{index:05}", name=f"{seed}-{split}-{index}")
        if file_format == "dicom" or index % 4 == 3:
            name, labels["orientation"], labels["plane"] = f"{index:05}", "LPS", "axial"
    return name, labels


@contextmanager
def _mapped(function: Callable, items: range, workers: int | None) -> Iterator[Iterable]:
    """`map` in several processes, which end when the block does."""
    workers = min(workers or os.cpu_count() or 1, len(items))
    if workers == 1:
        yield map(function, items)
        return
    # An executor, not a pool: a pool waits for ever for a worker that was killed.
    spawn = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_follow_parent)
    # Ctrl-C reaches every process of a terminal; only the parent is to answer. Workers inherit the mask. The tracker
    # of multiprocessing must run before: where it starts, it takes the mask off.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        results = executor.map(function, items)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        yield results
    except BrokenProcessPool as error:
        remedy = "Ask for fewer workers if memory ran out; a script must call this below `if __name__ == ...`"
        raise DataError("a worker", "ended before its scan was written", remedy) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """A worker whose parent was killed would wait for its next scan for ever."""

    def leave():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()


def _write_lines(path: Path, records) -> None:
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")
