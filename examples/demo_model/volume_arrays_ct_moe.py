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
"""Arrays without a header of their own: numpy arrays, .npy and .npz. Nothing is ever unpickled.

Their axes are taken to be (z, y, x) in LPS, this package's own order, unless an .npz holds an `affine`.
"""

import re
from io import BytesIO
from typing import BinaryIO

import numpy as np

from .volume_ct_moe import LoadContext, StoredVolume
from .volume_files_ct_moe import ZipEntry
from .volume_voxels_ct_moe import VoxelStream, check_end, check_type, read_voxels, voxels_of


NPY_MAGIC = b"\x93NUMPY"

# Shape and type of a plain array take some hundred bytes.
MAX_HEADER_BYTES = 10_000


def read_array(array: np.ndarray, context: LoadContext) -> StoredVolume:
    """A numpy array of shape (z, y, x), or with leading or trailing axes of length one."""
    shape = _volume_shape(array.shape, context)
    check_type(array.dtype, context)
    affine, facts = _geometry(context.spacing, None, context)
    voxels, owned = voxels_of(array.reshape(shape), 1.0, 0.0, context)
    return StoredVolume(voxels, affine, {"format": "array", **_facts(shape, array.dtype), **facts}, owned)


def read_npy(file: BinaryIO, context: LoadContext) -> StoredVolume:
    """A .npy file."""
    affine, facts = _geometry(context.spacing, None, context)
    voxels, shape, dtype = _read_npy(VoxelStream(file, context, codec="raw"), context)
    return StoredVolume(voxels, affine, {"format": "npy", **_facts(shape, dtype), **facts})


def read_npz(entries: list[ZipEntry], context: LoadContext) -> StoredVolume:
    """The volume of an .npz archive, beside which `spacing` (z, y, x) and `affine` (LPS, index x, y, z) may lie.

    Args:
        entries (`list` of `ZipEntry`): the archive's members.
        context (`LoadContext`): its `spacing` counts more than the archive's own, its `series` is the name (or
            number, from 1) of the array if there are several.
    """
    members = {entry.name.removesuffix(".npy"): entry for entry in entries}
    small = {name: _small_array(members.pop(name), context) for name in ("spacing", "affine") if name in members}
    spacing, series = context.spacing, context.series
    if spacing is None and "spacing" in small:
        spacing = small["spacing"].ravel().tolist()
    affine, facts = _geometry(spacing, small.get("affine"), context)
    names = list(members)
    if series is None and len(names) == 1:
        name = names[0]
    elif isinstance(series, int) and 1 <= series <= len(names):
        name = names[series - 1]
    elif series in members:
        name = series
    else:
        listed = ", ".join(re.sub(r"[^\w.-]", "?", name) for name in names[:20])
        raise context.error(f"{len(names)} arrays ({listed})", 'Choose one by its name, as in series="name"')
    entry = members[name]
    with entry.open() as member:
        stream = VoxelStream(member, context, codec="raw", stored_bytes=entry.size)
        voxels, shape, dtype = _read_npy(stream, context)
    return StoredVolume(voxels, affine, {"format": "npz", **_facts(shape, dtype), **facts})


def _small_array(entry: ZipEntry, context: LoadContext) -> np.ndarray:
    with entry.open() as member:
        stream = VoxelStream(member, context, codec="raw", stored_bytes=entry.size)
        shape, fortran_order, dtype = _read_npy_header(stream, context)
        count = int(np.prod(shape, dtype=object))
        if dtype.kind not in "iuf" or not 1 <= count <= 16:
            raise context.error(f"{entry.name} holds no geometry", "Store spacing as 3 and affine as 4 x 4 numbers")
        content = stream.read(count * dtype.itemsize)
    if len(content) < count * dtype.itemsize:
        raise context.error(f"{entry.name} ends too early", "Save the array again")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran_order else "C").astype(np.float64)


def _read_npy(stream: VoxelStream, context: LoadContext) -> tuple[np.ndarray, tuple, np.dtype]:
    """Header and voxels of a .npy stream."""
    stored_shape, fortran_order, dtype = _read_npy_header(stream, context)
    check_type(dtype, context)
    shape = _volume_shape(stored_shape, context)
    voxels = read_voxels(stream, shape[::-1] if fortran_order else shape, dtype, 1.0, 0.0, context)
    check_end(stream, voxels, context)
    return voxels.T if fortran_order else voxels, shape, dtype


def _read_npy_header(stream: VoxelStream, context: LoadContext) -> tuple[tuple, bool, np.dtype]:
    """Shape, memory order and type. numpy parses the header, but would first read as much as it claims to be long."""
    magic = stream.read(8)
    size = stream.read(2 if magic[6:] == b"\1\0" else 4)
    length = int.from_bytes(size, "little")
    header = BytesIO(magic + size + stream.read(min(length, MAX_HEADER_BYTES)))
    try:
        version = np.lib.format.read_magic(header)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        return read_header[version](header, max_header_size=MAX_HEADER_BYTES)
    except Exception as error:  # numpy evaluates the header as a literal, and lets several kinds of error through
        raise context.error("the .npy header is damaged", "Save a plain array") from error


def _volume_shape(shape: tuple[int, ...], context: LoadContext) -> tuple[int, int, int]:
    """(z, y, x) from a shape that may have a channel or batch axis of length one on either side."""
    kept = list(shape)
    while len(kept) > 3 and kept[0] == 1:
        kept.pop(0)
    while len(kept) > 3 and kept[-1] == 1:
        kept.pop()
    if len(kept) != 3 or min(kept) < 1:
        raise context.error(f"shape {tuple(shape)} is no volume", "Pass an array of shape (z, y, x)")
    return tuple(kept)


def _geometry(spacing, affine: np.ndarray | None, context: LoadContext) -> tuple[np.ndarray, dict]:
    if affine is not None:
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise context.error("the affine is not 4 x 4 finite numbers", "Store one that maps (x, y, z) to LPS mm")
        return affine, {}
    if spacing is None:
        if context.intensity == "hu":
            raise context.error("an array has no voxel size", "Pass spacing=(z, y, x) in mm")
        return np.eye(4), {"spacing_known": False}
    try:
        steps = [float(step) for step in spacing]
    except (TypeError, ValueError):
        steps = []
    if len(steps) != 3 or not all(np.isfinite(step) and step > 0 for step in steps):
        raise context.error(f"spacing={spacing!r}", "Pass three positive numbers, mm in the order z, y, x")
    return np.diag([*steps[::-1], 1.0]), {}


def _facts(shape: tuple, dtype: np.dtype) -> dict:
    return {"stored_shape": list(shape[::-1]), "stored_dtype": dtype.newbyteorder("=").name, "rescale": [1.0, 0.0]}
