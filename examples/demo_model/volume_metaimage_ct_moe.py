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
"""MetaImage (.mha, .mhd) and NRRD (.nrrd, .nhdr): a text header and raw or deflated voxels.

Read here rather than through SimpleITK: two short text headers are no reason for a native dependency of 50 MB, and its
readers allocate what a header asks for.
"""

import re
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .volume_ct_moe import LoadContext, StoredVolume
from .volume_files_ct_moe import open_path, path_entry
from .volume_voxels_ct_moe import VoxelStream, check_end, read_voxels, three_axes


# A header is some hundred bytes; dumps of whole DICOM headers reach some ten thousand.
MAX_HEADER_BYTES = 1 << 20

_META_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip
_NRRD_TYPES = {
    "signed char": "i1", "int8": "i1", "int8_t": "i1", "uchar": "u1", "unsigned char": "u1", "uint8": "u1",
    "uint8_t": "u1", "short": "i2", "short int": "i2", "signed short": "i2", "signed short int": "i2", "int16": "i2",
    "int16_t": "i2", "ushort": "u2", "unsigned short": "u2", "unsigned short int": "u2", "uint16": "u2",
    "uint16_t": "u2", "int": "i4", "signed int": "i4", "int32": "i4", "int32_t": "i4", "uint": "u4",
    "unsigned int": "u4", "uint32": "u4", "uint32_t": "u4", "float": "f4", "double": "f8",
}  # fmt: skip
_NRRD_SPACES = {
    "left-posterior-superior": (1, 1, 1), "lps": (1, 1, 1), "right-anterior-superior": (-1, -1, 1), "ras": (-1, -1, 1),
    "left-anterior-superior": (1, -1, 1), "las": (1, -1, 1),
}  # fmt: skip
_EXPORT = "Export it again, or as NIfTI"


def is_metaimage(start: bytes) -> bool:
    """Whether a file that starts so is a MetaImage."""
    return re.match(rb"\s*(ObjectType|NDims|Comment|ObjectSubType)\s*=", start) is not None


def is_nrrd(start: bytes) -> bool:
    """Whether a file that starts so is NRRD."""
    return re.match(rb"NRRD000\d", start) is not None


def read_metaimage(file: BinaryIO, folder: Path | None, context: LoadContext) -> StoredVolume:
    """Reads a MetaImage; its data file, if it is another one, must lie in the same folder."""
    fields, start = {}, 0
    for line in _lines(file, context):
        start += len(line)
        key, _, value = line.decode("latin-1").partition("=")
        fields[key.strip()] = value.strip()
        if key.strip() == "ElementDataFile":  # always the last
            break
    else:
        raise context.error("the MetaImage header does not end", _EXPORT)

    dims = _numbers(fields.get("DimSize", ""), None, "DimSize", context, int)
    if fields.get("ElementNumberOfChannels", "1") != "1":
        raise context.error("voxels have several channels", "Load the CT itself, not a picture made from it")
    shape = three_axes(dims, context)
    dtype = _type(_META_TYPES, fields.get("ElementType", ""), context)
    big = fields.get("BinaryDataByteOrderMSB", fields.get("ElementByteOrderMSB", "False")).lower() == "true"
    if fields.get("BinaryData", "True").lower() != "true":
        raise context.error("voxels are written as text", _EXPORT)
    for name, identity in (("ElementToIntensityFunctionSlope", 1), ("ElementToIntensityFunctionOffset", 0)):
        if name in fields and _numbers(fields[name], 1, name, context) != [identity]:
            raise context.error(f"{name} is set, which readers treat differently", _EXPORT)

    rank = len(dims)
    spacing = _first(fields, ("ElementSpacing", "ElementSize"), " ".join("1" * rank))
    if "ElementSpacing" not in fields and "ElementSize" not in fields:
        raise context.error("no voxel size", _EXPORT)
    spacing = _numbers(spacing, rank, "ElementSpacing", context)[:3]
    matrix = _first(fields, ("TransformMatrix", "Rotation", "Orientation"), None)
    if matrix is None:
        axes = np.eye(3)
        if context.intensity == "hu":
            context.doubt("no TransformMatrix: the orientation is unknown", _EXPORT)
    else:  # one row per axis
        axes = np.array(_numbers(matrix, rank * rank, "TransformMatrix", context)).reshape(rank, rank)[:3, :3]
    origin = _numbers(_first(fields, ("Offset", "Position", "Origin"), "0 " * rank), rank, "Offset", context)[:3]
    if min(spacing) <= 0:
        raise context.error(f"voxel size {spacing}", _EXPORT)
    if not np.allclose(np.linalg.norm(axes, axis=1), 1, atol=1e-3):
        raise context.error("TransformMatrix holds no directions", _EXPORT)
    affine = np.eye(4)
    affine[:3, :3] = axes.T * spacing
    affine[:3, 3] = origin

    codec = "zlib" if fields.get("CompressedData", "False").lower() == "true" else "raw"
    name = fields["ElementDataFile"]
    if name.upper() == "LOCAL":
        stream = VoxelStream(file, context, start, codec)
    else:
        data = _sibling(name, folder, context)
        stream = VoxelStream(data, context, _meta_skip(fields, data, shape, dtype, context), codec)
    return _read(stream, shape, dtype.newbyteorder(">" if big else "<"), affine, "metaimage", context)


def read_nrrd(file: BinaryIO, folder: Path | None, context: LoadContext) -> StoredVolume:
    """Reads an NRRD file; its data file, if it is another one, must lie in the same folder."""
    fields, start = {}, 0
    for line in _lines(file, context):
        start += len(line)
        text = line.decode("latin-1").strip()
        if not text:
            break
        key, separator, value = text.partition(": ")
        if separator and not text.startswith("#"):
            fields[key.lower()] = value.strip()

    sizes = _numbers(fields.get("sizes", ""), None, "sizes", context, int)
    shape = three_axes(sizes, context)
    dtype = _type(_NRRD_TYPES, fields.get("type", "").lower(), context)
    directions = fields.get("space directions")
    if directions is None:
        spacings = fields.get("spacings")
        if spacings is None:
            raise context.error("no voxel size", _EXPORT)
        if context.intensity == "hu":
            context.doubt("no space directions: the orientation is unknown", _EXPORT)
        axes, sign = np.diag(_numbers(spacings, len(sizes), "spacings", context)[:3]), (1, 1, 1)
    else:
        space = fields.get("space", "").lower()
        if space not in _NRRD_SPACES:
            raise context.error("the space is not one of a patient's", "Store it as left-posterior-superior")
        vectors = re.findall(r"\(([^)]*)\)", directions)
        if len(vectors) != 3:
            raise context.error(f"{len(vectors)} space directions", _EXPORT)
        axes = np.array([_numbers(vector.replace(",", " "), 3, "space directions", context) for vector in vectors]).T
        sign = _NRRD_SPACES[space]
    origin = re.sub(r"[(),]", " ", fields.get("space origin", "0 0 0"))
    affine = np.eye(4)
    affine[:3, :3] = axes
    affine[:3, 3] = _numbers(origin, 3, "space origin", context)
    affine = np.diag([*sign, 1.0]) @ affine

    codec = {"raw": "raw", "gzip": "gzip", "gz": "gzip"}.get(fields.get("encoding", "").lower())
    if codec is None or any(fields.get(key, "0") != "0" for key in ("line skip", "byte skip", "lineskip", "byteskip")):
        raise context.error("the encoding is not raw or gzip from the first byte on", _EXPORT)
    name = _first(fields, ("data file", "datafile"), None)
    stream = VoxelStream(file, context, start, codec)
    if name is not None:
        stream = VoxelStream(_sibling(name, folder, context), context, 0, codec)
    big = fields.get("endian", "little").lower() == "big"
    return _read(stream, shape, dtype.newbyteorder(">" if big else "<"), affine, "nrrd", context)


def _read(stream: VoxelStream, shape, dtype: np.dtype, affine: np.ndarray, name: str, context) -> StoredVolume:
    voxels = read_voxels(stream, shape[::-1], dtype, 1.0, 0.0, context)
    check_end(stream, voxels, context)
    facts = {
        "format": name,
        "stored_shape": list(shape),
        "stored_dtype": dtype.newbyteorder("=").name,
        "rescale": [1.0, 0.0],
    }
    return StoredVolume(voxels, affine, facts)


def _lines(file: BinaryIO, context: LoadContext):
    """The lines of the header, as long as it may be one."""
    file.seek(0)
    read = 0
    while read < MAX_HEADER_BYTES:
        line = file.readline(MAX_HEADER_BYTES)
        if not line:
            return
        read += len(line)
        yield line
    raise context.error("the header does not end", _EXPORT)


def _numbers(text: str, count: int | None, what: str, context: LoadContext, kind: type = float) -> list:
    try:
        numbers = [kind(part) for part in text.split()]
    except (ValueError, OverflowError):
        numbers = []
    if not numbers or (count is not None and len(numbers) != count) or not np.isfinite(np.array(numbers, float)).all():
        raise context.error(f"{what} is not {count or 'some'} numbers", _EXPORT)
    return numbers


def _first(fields: dict, names: tuple[str, ...], default: str | None) -> str | None:
    return next((fields[name] for name in names if name in fields), default)


def _type(types: dict, name: str, context: LoadContext) -> np.dtype:
    if name not in types:
        raise context.error(f"voxel type {re.sub(r'[^A-Za-z0-9_ ]', '?', name)[:40]!r} is not supported", _EXPORT)
    return np.dtype(types[name])


def _sibling(name: str, folder: Path | None, context: LoadContext) -> BinaryIO:
    """The data file beside a header; nowhere else, whatever the header says."""
    if folder is None or Path(name).name != name or name in ("", ".", "..") or "%" in name or name.upper() == "LIST":
        raise context.error("the voxels lie in other files", "Pass a file that holds them, or one beside its header")
    return open_path(path_entry(folder / name, context), context)


def _meta_skip(fields: dict, data: BinaryIO, shape, dtype: np.dtype, context: LoadContext) -> int:
    """HeaderSize: bytes before the voxels of a detached file, -1 for "the voxels are its end"."""
    skip = _numbers(fields.get("HeaderSize", "0"), 1, "HeaderSize", context, int)[0]
    if skip >= 0:
        return skip
    return max(0, data.seek(0, 2) - int(np.prod(shape, dtype=object)) * dtype.itemsize)
