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
"""One call from a scan, in whatever form it exists, to a `Volume`: `load_volume(source)`.

Formats are told apart by their content, not by their name. What cannot be known is not guessed: it is refused with a
reason, or noted as a warning in `Volume.meta`.
"""

import os
import re
import warnings
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from nibabel.spatialimages import SpatialImage

from .errors_ct_moe import VolumeError
from .volume_arrays_ct_moe import NPY_MAGIC, read_array, read_npy, read_npz
from .volume_ct_moe import MAX_VOLUME_BYTES, LoadContext, StoredVolume, Volume, VolumeWarning
from .volume_dicom_ct_moe import read_dicom
from .volume_dicom_header_ct_moe import is_dataset, is_dicom
from .volume_download_ct_moe import fetch
from .volume_files_ct_moe import READ_ERRORS, BytesEntry, folder_entries, open_path, path_entry, zip_entries
from .volume_geometry_ct_moe import spacing_of, to_lps
from .volume_metaimage_ct_moe import is_metaimage, is_nrrd, read_metaimage, read_nrrd
from .volume_nifti_ct_moe import header_class, read_nibabel, read_nifti
from .volume_plausibility_ct_moe import check_hounsfield, clean_values
from .volume_voxels_ct_moe import VoxelStream


__all__ = ["MAX_VOLUME_BYTES", "Volume", "VolumeWarning", "load_volume"]

_ZIP_MAGIC = b"PK\3\4"
_FORMATS = "NIfTI, DICOM, MetaImage, NRRD, .npy, .npz or a zip of DICOM"


def load_volume(
    source: Any,
    *,
    series: int | str | None = None,
    spacing: tuple[float, float, float] | None = None,
    intensity: str = "hu",
    reorient: bool = True,
    check: str = "refuse",
    padding: str = "air",
    max_bytes: int | None = None,
) -> Volume:
    """Loads one CT volume.

    Args:
        source (`str`, `Path`, `bytes`, file object, `list`, `dict`, image, array or [`Volume`]):
            What to load:

            - a path or URL (`https://`, `hf://[datasets/]owner/name/path`) of a NIfTI file (.nii, .nii.gz, either half
              of a pair), a DICOM file (one slice, or an enhanced multi-frame volume), a folder or zip with the DICOM
              files of a series, a MetaImage (.mha, .mhd), NRRD, .npy or .npz file;
            - `bytes` or a binary file object with the content of such a file;
            - a `list` of DICOM paths or of pydicom datasets;
            - a nibabel image, a decoded value of a `datasets` Nifti column, or an undecoded one
              (`{"path": ..., "bytes": ...}`);
            - a `np.ndarray` of shape (z, y, x);
            - a [`Volume`], which is returned as it is.
        series (`int` or `str`, *optional*):
            Which of several DICOM series (or points in time) in one folder: its number in the list that the error
            gives, from 1, or its SeriesInstanceUID. For an .npz with several arrays, the array's name.
        spacing (`tuple[float, float, float]`, *optional*):
            Voxel size in mm, in array order (z, y, x), for arrays, .npy and .npz, which have none. With
            `intensity="display"` it may be missing; it is then 1 mm and `meta["spacing_known"]` is `False`.
        intensity (`str`, defaults to `"hu"`):
            `"hu"`: the values are Hounsfield units once rescaled as the file says. `"display"`: they never were
            (arrays scaled to [0, 1], pictures); nothing is asked of the values.
        reorient (`bool`, defaults to `True`):
            Whether to turn the axes to LPS: to the nearest ones, without resampling, so that an oblique scan keeps
            its voxels and its rotation stays in `affine` (with a warning above 15 degrees). `False` keeps the file's
            axes, slowest first; `affine` then maps those.
        check (`str`, defaults to `"refuse"`):
            What happens to values and headers that are almost certainly not those of a CT scan: `"refuse"` raises,
            `"warn"` warns and loads, `"off"` loads without a word. What is merely odd is a warning unless `"off"`.
        padding (`str`, defaults to `"air"`):
            `"air"` sets what lies outside the scanner's field of view (declared padding, and anything below
            -1400 HU) to -1024 HU, `"keep"` leaves it as it is stored.
        max_bytes (`int`, *optional*, defaults to `MAX_VOLUME_BYTES`):
            Most memory the volume may take. Refused before it is allocated.

    Returns:
        [`Volume`]: its array is a view of the stored one where turning the axes was enough, and, for an array or
        image in memory, of the caller's.

    Raises:
        [`VolumeError`]: for everything that is wrong with the source; it names the source, the finding and the remedy.
    """
    if isinstance(source, Volume):
        return source
    if type(source).__name__ == "Volume":  # of another copy of this file: remote code has one per entry point
        return Volume(source.hu, source.spacing, source.affine, source.meta)
    for name, value, choices in (
        ("intensity", intensity, ("hu", "display")),
        ("check", check, ("refuse", "warn", "off")),
        ("padding", padding, ("air", "keep")),
    ):
        if value not in choices:
            raise VolumeError(name, f"{value!r}", f"Pass one of {', '.join(map(repr, choices))}")
    if not (series is None or isinstance(series, str) or type(series) is int):
        raise VolumeError("series", f"{series!r}", "Pass a number or a SeriesInstanceUID")

    max_bytes = MAX_VOLUME_BYTES if max_bytes is None else max_bytes
    context = LoadContext(_name_of(source), series, spacing, intensity, check, padding, max_bytes)
    try:
        with context.files:
            stored = _read(source, context)
        if spacing is not None and stored.facts["format"] not in ("array", "npy", "npz"):
            raise context.error("has its own voxel size", "Pass spacing only with arrays, .npy and .npz")
        least = clean_values(stored, context)
        check_hounsfield(stored.voxels, least, context)
        voxels, affine = to_lps(stored, context, reorient)
    except MemoryError as error:
        raise context.error("not enough memory for the volume", "Crop it, or load it on a larger machine") from error
    if check == "off":
        context.warnings.clear()
    for finding in context.warnings:
        warnings.warn(f"{context.subject}: {finding}", VolumeWarning, stacklevel=2)
    meta = {**stored.facts, "intensity": intensity, "warnings": context.warnings}
    return Volume(voxels, spacing_of(affine), affine, meta)


def _name_of(source: Any) -> str:
    """How errors name a source; a URL without what may be a key in it."""
    if isinstance(source, (str, os.PathLike)):
        return re.sub(r"^(https?://)(?:[^/@]*@)?([^?#]*).*", r"\1\2", os.fspath(source), flags=re.DOTALL)
    if isinstance(source, dict):
        return _name_of(source.get("path") or "dict")
    if isinstance(source, (list, tuple)):
        return f"list of {len(source)}"
    if hasattr(source, "read") and hasattr(source, "name") and isinstance(source.name, str):
        return source.name
    return type(source).__name__


def _read(source: Any, context: LoadContext) -> StoredVolume:
    if isinstance(source, dict):
        if source.get("bytes") is not None:
            source = source["bytes"]
        elif source.get("path") is not None:
            source = _unchained(source["path"], context)
        else:
            raise context.error("neither path nor bytes", 'Pass {"path": ...} or {"bytes": ...}')
    if isinstance(source, str) and "://" in source:
        source = fetch(source, context)
    if isinstance(source, (str, os.PathLike)):
        return _read_path(Path(source), context)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _read_file(BytesIO(source), None, context)
    if hasattr(source, "read"):
        return _read_file(_seekable(source, context), None, context)
    if isinstance(source, np.ndarray):
        return read_array(source, context)
    if isinstance(source, SpatialImage):
        return read_nibabel(source, context)
    if is_dataset(source):
        source = [source]
    if isinstance(source, (list, tuple)):
        entries = [_listed(item, context) for item in source]
        return read_dicom(entries, context, strict=True)
    raise context.error(
        "not a scan", f"Pass a path, bytes, an image, or a list of DICOM files; files may be {_FORMATS}"
    )


def _unchained(path: str, context: LoadContext) -> str:
    """The file in "gzip://scan.nii::/path/scan.nii.gz", which is how `datasets` names what it would unpack."""
    first, *rest = path.split("::")
    if rest and not (len(rest) == 1 and first.startswith("gzip://")):
        raise context.error("a file inside an archive", "Cast the column with Nifti(decode=True), or unpack it")
    return rest[0] if rest else first


def _listed(item: Any, context: LoadContext) -> Any:
    """A member of a list: a DICOM file or dataset."""
    if isinstance(item, (str, os.PathLike)):
        return path_entry(Path(item), context)
    if is_dataset(item):
        return item
    raise context.error(f"a list that holds {type(item).__name__}", "Pass a list of DICOM paths or pydicom datasets")


def _read_path(path: Path, context: LoadContext) -> StoredVolume:
    try:
        is_folder = path.is_dir()
    except (OSError, ValueError):  # Python before 3.12 raises for a null byte in the name
        is_folder = False
    if is_folder:
        return read_dicom(folder_entries(path, context), context, strict=False)
    return _read_file(open_path(path_entry(path, context), context), path, context)


def _seekable(file: Any, context: LoadContext) -> BinaryIO:
    """The file object itself, or what it holds if it can only be read forwards."""
    try:
        if not isinstance(file.read(0), bytes):
            raise context.error("a text file object", 'Open it with mode "rb"')
        if hasattr(file, "readinto") and file.seekable():
            return file
        content = file.read(context.max_bytes + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, VolumeError):
            raise
        raise context.error(f"cannot be read ({type(error).__name__})", "Open the file again") from error
    context.hold(len(content), "the stream")
    return BytesIO(content)


def _read_file(file: BinaryIO, path: Path | None, context: LoadContext) -> StoredVolume:
    """Reads one file by what it starts with."""
    stream = VoxelStream(file, context)
    if stream.stored_bytes == 0:
        raise context.error("the file is empty", "Copy or export it again")
    start = stream.read(540)
    folder = None if path is None else path.parent
    kind, is_pair = header_class(start)
    if kind is None and stream.codec == "gzip":
        raise context.error("a gzip file that holds no NIfTI", "Unpack it")
    if start[:4] == _ZIP_MAGIC:
        return _read_zip(file, context)
    if start[:6] == NPY_MAGIC:
        file.seek(0)
        return read_npy(file, context)
    if is_pair is False:
        return read_nifti(file, None, context)
    if is_pair:
        return read_nifti(file, _other_half(path, ".img", context), context)
    if is_dicom(start):
        entry = path_entry(path, context) if path is not None else _in_memory(file, context)
        return read_dicom([entry], context, strict=True)
    if is_metaimage(start):
        return read_metaimage(file, folder, context)
    if is_nrrd(start):
        return read_nrrd(file, folder, context)
    if path is not None and _stem_and_suffix(path)[1] == ".img":
        return read_nifti(_other_half(path, ".hdr", context), file, context)
    raise context.error("unknown format", f"Pass {_FORMATS}")


def _in_memory(file: BinaryIO, context: LoadContext) -> BytesEntry:
    file.seek(0)
    content = file.read(context.max_bytes + 1)
    context.hold(len(content), "the file")
    return BytesEntry("the file", content)


def _read_zip(file: BinaryIO, context: LoadContext) -> StoredVolume:
    """A zip of DICOM files, an .npz, or a zip around one file of another format."""
    try:
        archive = context.files.enter_context(zipfile.ZipFile(file))
        entries = zip_entries(archive, context)
        if entries and all(entry.name.endswith(".npy") for entry in entries):
            return read_npz(entries, context)
        if any(entry.head(4) == _ZIP_MAGIC for entry in entries[:1]):
            raise context.error("an archive in an archive", "Unpack the outer one")
        if len(entries) == 1 and not is_dicom(entries[0].head(540)):
            context.hold(entries[0].size, "the file in the archive")
            return _read_file(BytesIO(entries[0].read()), None, context)
    except READ_ERRORS as error:
        raise context.error(f"the zip archive is damaged ({type(error).__name__})", "Copy or pack it again") from error
    return read_dicom(entries, context, strict=False)


def _other_half(path: Path | None, suffix: str, context: LoadContext) -> BinaryIO | None:
    """The .hdr that lies beside an .img, or the other way round."""
    if path is None:
        return None
    stem, _ = _stem_and_suffix(path)
    for name in (stem + suffix, stem + suffix + ".gz"):
        if (path.parent / name).exists():
            return open_path(path_entry(path.parent / name, context), context)
    raise context.error(f"half of a NIfTI pair without its {suffix}", f"Put {stem}{suffix} beside it")


def _stem_and_suffix(path: Path) -> tuple[str, str]:
    return os.path.splitext(path.name.removesuffix(".gz"))
