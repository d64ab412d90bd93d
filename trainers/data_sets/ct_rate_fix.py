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
"""Scans of CT-RATE's version 1 to those of version 2: `fix_scans`.

Version 1 stores the numbers of the scanner with an empty header; slope, intercept, voxel size and, in newer metadata,
the direction of rows and columns are in the metadata.
What is written is int16 HU with them in the header, in the folders of version 2, and marked as done.
"""

import errno
import json
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from tqdm.auto import tqdm

from ct_moe import DataError, VolumeError
from ct_moe.hub.whole_file import whole_file

from .ct_rate import SPLITS, scan_path
from .files import read_csv


_COLUMNS = ("VolumeName", "RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing")
# What a damaged file makes of its reader. The last three: numbers of a header that no array can have.
_UNREADABLE = (OSError, ValueError, EOFError, zlib.error, ImageFileError, HeaderDataError, WrapStructError)
_UNREADABLE += (TypeError, OverflowError, MemoryError)
_ORIENTATION = "ImageOrientationPatient"  # older metadata have no such column
_MARK = b"fixed"  # in the header's description, as the publishers' own repair writes it


def fix_scans(
    root: str | Path, split: str, *, out: str | Path | None = None, progress: bool = True
) -> tuple[int, dict[str, str]]:
    """Write every scan of version 1 that is there, and is not there in version 2 yet, as one of version 2.

    Args:
        root: folder of the download.
        split: "train" or "validation".
        out: where `dataset/train_fixed/...` is made; by default in `root`.
        progress: whether to show a bar.

    Returns:
        How many were written, and what could not be done, by VolumeName or line of the metadata.

    Raises:
        DataError: the metadata are missing or lack a column, or the split is unknown.
    """
    root, out = Path(root), Path(root if out is None else out)
    if split not in SPLITS:
        raise DataError(str(root), f"has no split {split}", f"Use one of {', '.join(SPLITS)}")
    scans, texts = SPLITS[split]
    file = root / "dataset" / "metadata" / f"{texts}_metadata.csv"
    rows = list(read_csv(file, _COLUMNS))
    written, failed = 0, {}
    for line, row in tqdm(rows, desc="scans", unit="scan", disable=not progress):
        if isinstance(row, str):
            failed[f"line {line}"] = row
            continue
        name = row["VolumeName"].strip()
        target = scan_path(out, name)
        if target is None:
            failed[f"line {line}"] = "is not of the form train_1_a_1.nii.gz"
            continue
        source = root / "dataset" / scans / target.parent.parent.name / target.parent.name / name
        if target.exists() or not source.is_file():
            continue
        try:
            fix_scan(source, target, *_geometry(row))
            written += 1
        except _UNREADABLE as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise DataError(str(out), "the disk is full", "Make room; the same command goes on") from error
            failed[name] = error.finding if isinstance(error, VolumeError) else f"{type(error).__name__}"
    return written, failed


def fix_scan(
    source: Path,
    target: Path,
    slope: float,
    intercept: float,
    spacing: tuple[float, float, float],
    directions: np.ndarray | None = None,
) -> None:
    """Write one scan as int16 HU.

    Args:
        source, target: files.
        slope, intercept: of the scanner's numbers.
        spacing: (x, y, z) in mm.
        directions: in its columns where x, y and z grow to, in LPS; by default to the left, the back and the head.

    Raises:
        VolumeError: the scan is in HU already, has a rescaling of its own, or does not fit into 16 bits.
    """
    image = nib.load(source)
    if image.header["descrip"].item().startswith(_MARK):
        raise VolumeError(str(source), "is a repaired scan already", "Move it to the folder of version 2")
    own = (image.dataobj.slope, image.dataobj.inter)
    if own != (1.0, 0.0):
        finding = f"has the rescaling {own[0]:g}, {own[1]:g} of its own"
        raise VolumeError(str(source), finding, "It is no scan of version 1: leave it as it is")
    stored = np.asanyarray(image.dataobj)
    # The scanner's numbers are 0 or more where the intercept is -1024 or -8192. What is far below is HU.
    if intercept <= -1000 and float(stored.min()) < -500:
        raise VolumeError(str(source), "is in HU already", "Never rescale twice: move it to the folder of version 2")
    hu = np.rint(stored.astype(np.float64) * slope + intercept)
    if hu.min() < -32768 or hu.max() > 32767:
        raise VolumeError(str(source), f"gives {hu.min():.0f} to {hu.max():.0f} HU", "Check its line of the metadata")
    affine = np.eye(4)
    directions = np.eye(3) if directions is None else directions
    affine[:3, :3] = np.diag([-1.0, -1.0, 1.0]) @ directions @ np.diag(spacing)  # NIfTI counts in RAS
    # Where it lay in the scanner is not known: the origin is its middle.
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(hu.shape[:3]) - 1) / 2)
    fixed = nib.Nifti1Image(hu.astype(np.int16), affine)
    fixed.header.set_xyzt_units("mm")
    fixed.header["descrip"] = _MARK
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as part:
        nib.save(fixed, part)


def _geometry(row: dict[str, str]) -> tuple[float, float, tuple[float, float, float], np.ndarray]:
    """Slope, intercept, (x, y, z) and directions of a line of the metadata. Lists are texts: "[0.7, 0.7]"."""
    try:
        x, y = json.loads(row["XYSpacing"])
        numbers = [float(value) for value in (row["RescaleSlope"], row["RescaleIntercept"], x, y, row["ZSpacing"])]
    except (ValueError, TypeError):
        numbers = [np.nan]
    if not np.isfinite(numbers).all() or min(numbers[0], *numbers[2:]) <= 0:
        raise VolumeError(row["VolumeName"], "its metadata have no slope or voxel size", "Leave it out")
    return numbers[0], numbers[1], tuple(numbers[2:]), _directions(row)


def _directions(row: dict[str, str]) -> np.ndarray:
    """Unit vectors in LPS of rows, columns and slices, which are stacked along the normal of the first two."""
    if _ORIENTATION not in row:
        return np.eye(3)
    try:
        along = np.array(json.loads(row[_ORIENTATION]), dtype=np.float64).reshape(2, 3)
    except (ValueError, TypeError):
        along = np.full((2, 3), np.nan)
    if not np.allclose(along @ along.T, np.eye(2), atol=1e-2):
        raise VolumeError(row["VolumeName"], f"its {_ORIENTATION} is no orientation", "Leave it out")
    directions = np.column_stack([*along, np.cross(*along)])
    if abs(directions[2, 2]) < 0.99:
        raise VolumeError(row["VolumeName"], f"its slices are not axial, by its {_ORIENTATION}", "Leave it out")
    return directions
