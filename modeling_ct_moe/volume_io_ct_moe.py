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
import stat
import warnings
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from nibabel.spatialimages import SpatialImage

from .errors_ct_moe import VolumeError
from .volume_ct_moe import MAX_VOLUME_BYTES, LoadContext, StoredVolume, Volume, VolumeWarning
from .volume_geometry_ct_moe import spacing_of, to_lps
from .volume_nifti_ct_moe import header_class, read_nibabel, read_nifti
from .volume_plausibility_ct_moe import check_hounsfield, clean_values
from .volume_voxels_ct_moe import VoxelStream


__all__ = ["MAX_VOLUME_BYTES", "Volume", "VolumeWarning", "load_volume"]

_FORMATS = "NIfTI (.nii, .nii.gz)"


def load_volume(
    source: Any,
    *,
    intensity: str = "hu",
    reorient: bool = True,
    check: str = "refuse",
    padding: str = "air",
    max_bytes: int | None = None,
) -> Volume:
    """Loads one CT volume.

    Args:
        source (`str`, `Path`, `bytes`, file object, nibabel image, `dict` or [`Volume`]):
            What to load. A `dict` is a row of a `datasets` Nifti column that was not decoded: `{"path": ...,
            "bytes": ...}`. A [`Volume`] is returned as it is.
        intensity (`str`, defaults to `"hu"`):
            `"hu"`: the values are Hounsfield units once rescaled as the file says. `"display"`: they never were
            (arrays scaled to [0, 1], pictures); nothing is asked of the values.
        reorient (`bool`, defaults to `True`):
            Whether to turn the axes to LPS. `False` keeps the file's axes, slowest first; `affine` then maps those.
        check (`str`, defaults to `"refuse"`):
            What happens to values and headers that are almost certainly not those of a CT scan: `"refuse"` raises,
            `"warn"` warns and loads, `"off"` loads without looking. What is merely odd is a warning unless `"off"`.
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
    _check_choice("intensity", intensity, ("hu", "display"))
    _check_choice("check", check, ("refuse", "warn", "off"))
    _check_choice("padding", padding, ("air", "keep"))
    context = LoadContext(_name_of(source), check, intensity, MAX_VOLUME_BYTES if max_bytes is None else max_bytes)
    try:
        with ExitStack() as files:
            stored = _read(source, context, files)
        clean_values(stored, context, padding)
        check_hounsfield(stored.voxels, context)
        voxels, affine = to_lps(stored, context, reorient)
    except MemoryError as error:
        raise context.error("not enough memory for the volume", "Crop it, or load it on a larger machine") from error
    if context.check == "off":
        context.warnings.clear()
    for finding in context.warnings:
        warnings.warn(f"{context.subject}: {finding}", VolumeWarning, stacklevel=2)
    meta = {**stored.facts, "intensity": intensity, "warnings": context.warnings}
    return Volume(voxels, spacing_of(affine), affine, meta)


def _check_choice(argument: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise VolumeError(argument, f"{value!r}", f"Pass one of {', '.join(map(repr, choices))}")


def _name_of(source: Any) -> str:
    """How errors name a source."""
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    if isinstance(source, dict):
        return str(source.get("path") or "dict")
    if hasattr(source, "read") and hasattr(source, "name") and isinstance(source.name, str):
        return source.name
    return type(source).__name__


def _read(source: Any, context: LoadContext, files: ExitStack) -> StoredVolume:
    if isinstance(source, dict):
        if source.get("bytes") is not None:
            source = source["bytes"]
        elif source.get("path") is not None:
            source = source["path"].split("::")[-1]  # "gzip://scan.nii::/path/scan.nii.gz", as `datasets` chains them
        else:
            raise context.error("neither path nor bytes", 'Pass {"path": ...} or {"bytes": ...}')
    if isinstance(source, (str, os.PathLike)):
        return _read_path(Path(source), context, files)
    if isinstance(source, SpatialImage):
        return read_nibabel(source, context)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _read_file(BytesIO(source), None, context, files)
    if hasattr(source, "read"):
        return _read_file(_seekable(source, context), None, context, files)
    raise context.error("not a scan", f"Pass a path, bytes, a file object or a nibabel image; files may be {_FORMATS}")


def _read_path(path: Path, context: LoadContext, files: ExitStack) -> StoredVolume:
    file = open_regular(path, context, files)
    return _read_file(file, path, context, files)


def open_regular(path: Path, context: LoadContext, files: ExitStack) -> BinaryIO:
    """Opens a file that is one: no folder, no pipe that never ends, no device."""
    try:
        is_file = stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError as error:
        raise context.error("no such file", "Check the path") from error
    except (OSError, ValueError) as error:  # a null byte in the name is a ValueError
        raise context.error(f"cannot be opened ({type(error).__name__})", "Check the path") from error
    if not is_file:
        raise context.error("not a regular file", "Pass the path of a scan")
    try:
        return files.enter_context(open(path, "rb"))
    except OSError as error:
        raise context.error(f"cannot be opened ({type(error).__name__})", "Check its permissions") from error


def _seekable(file: Any, context: LoadContext) -> BinaryIO:
    """The file object itself, or what it holds if it can only be read forwards."""
    if file.seekable():
        file.seek(0)
        return file
    content = file.read(context.max_bytes + 1)
    context.claim(len(content), "the stream")
    return BytesIO(content)


def _read_file(file: BinaryIO, path: Path | None, context: LoadContext, files: ExitStack) -> StoredVolume:
    stream = VoxelStream(file, context)
    if stream.stored_bytes == 0:
        raise context.error("the file is empty", "Copy or export it again")
    start = stream.read(540)
    file.seek(0)
    _, is_pair = header_class(start)
    if is_pair is False:
        return read_nifti(file, None, context)
    if is_pair:
        return read_nifti(file, _other_half(path, ".img", context, files), context)
    if path is not None and _stem_and_suffix(path)[1] == ".img":
        return read_nifti(_other_half(path, ".hdr", context, files), file, context)
    raise context.error("unknown format", f"Pass {_FORMATS}")


def _other_half(path: Path | None, suffix: str, context: LoadContext, files: ExitStack) -> BinaryIO | None:
    """The .hdr that lies beside an .img, or the other way round."""
    if path is None:
        return None
    stem, _ = _stem_and_suffix(path)
    for name in (stem + suffix, stem + suffix + ".gz"):
        if (path.parent / name).exists():
            return open_regular(path.parent / name, context, files)
    raise context.error(f"half of a NIfTI pair without its {suffix}", f"Put {stem}{suffix} beside it")


def _stem_and_suffix(path: Path) -> tuple[str, str]:
    name = path.name.removesuffix(".gz")
    return os.path.splitext(name)
