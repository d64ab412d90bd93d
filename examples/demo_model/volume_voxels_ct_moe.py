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
"""Voxels from a stream into one array, at the speed of the decoder and with nothing beside the array.

The size is checked before anything is allocated; a stream that ends early, or a gzip that is broken, is an error.
"""

import gzip
import io
import os
import zipfile
import zlib
from typing import BinaryIO

import numpy as np

from .volume_ct_moe import LoadContext


try:
    from isal import igzip, isal_zlib
except ImportError:  # three times slower, same voxels
    igzip = isal_zlib = None


# A deflate stream cannot hold more than this many bytes per byte, so a smaller file lies about its size.
MAX_DEFLATE_RATIO = 1032

# Small enough to stay in the processor's cache while it is rescaled, large enough to cost no calls.
BLOCK_BYTES = 1 << 20

GZIP_MAGIC = b"\x1f\x8b"

_DECODE_ERRORS = (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile) + (
    (isal_zlib.error,) if isal_zlib else ()
)


class VoxelStream:
    """Bytes read from front to back, decompressed on the way.

    Args:
        file (`BinaryIO`): seekable.
        context (`LoadContext`): for the errors.
        start (`int`, *optional*, defaults to 0): where to begin.
        codec (`str`, *optional*): "gzip", "zlib" or "raw"; gzip or raw by the first two bytes if it is not given.
        stored_bytes (`int`, *optional*): how much there is, if the file is not to be asked.
    """

    def __init__(
        self,
        file: BinaryIO,
        context: LoadContext,
        start: int = 0,
        codec: str | None = None,
        stored_bytes: int | None = None,
    ):
        self.context = context
        self.stored_bytes = file.seek(0, os.SEEK_END) - start if stored_bytes is None else stored_bytes
        file.seek(start)
        if codec is None:
            codec = "gzip" if file.read(2) == GZIP_MAGIC else "raw"
            file.seek(start)
        self.codec = codec
        self._file = file
        if codec == "gzip":
            self._file = igzip.open(file) if igzip else io.BufferedReader(gzip.GzipFile(fileobj=file))
        elif codec == "zlib":
            self._file = _ZlibReader(file)
        self.position = 0

    @property
    def most_bytes(self) -> int:
        """More than this the stream cannot give, whatever its header says."""
        return self.stored_bytes * (1 if self.codec == "raw" else MAX_DEFLATE_RATIO)

    def read(self, num_bytes: int) -> bytes:
        """Up to `num_bytes`; fewer only at the end."""
        buffer = bytearray(num_bytes)
        return bytes(buffer[: self.readinto(memoryview(buffer))])

    def readinto(self, view: memoryview) -> int:
        """Fills the view and returns how many bytes there were."""
        filled = 0
        while filled < len(view):
            try:
                count = self._file.readinto(view[filled : filled + BLOCK_BYTES])
            except _DECODE_ERRORS as error:
                what = "the file cannot be read" if self.codec == "raw" else f"the {self.codec} stream is damaged"
                raise self.context.error(
                    f"{what} after {self.position + filled} bytes ({type(error).__name__})", "Copy or export it again"
                ) from error
            if not count:
                break
            filled += count
        self.position += filled
        return filled

    def skip(self, num_bytes: int) -> None:
        """Reads and forgets."""
        buffer = memoryview(bytearray(min(num_bytes, BLOCK_BYTES)))
        while num_bytes > 0:
            count = self.readinto(buffer[:num_bytes])
            if not count:
                return
            num_bytes -= count


class _ZlibReader:
    """A zlib stream as a file: what `gzip` is for a gzip stream."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._inflate = (isal_zlib or zlib).decompressobj()

    def readinto(self, view: memoryview) -> int:
        """Fills some of the view; 0 only at the end."""
        while not self._inflate.eof:
            stored = self._inflate.unconsumed_tail or self._file.read(BLOCK_BYTES)
            data = self._inflate.decompress(stored, len(view))
            if data:
                view[: len(data)] = data
                return len(data)
            if not stored:
                raise EOFError("the stream ends before its end marker")
        return 0


def read_voxels(
    stream: VoxelStream,
    shape: tuple[int, int, int],
    dtype: np.dtype,
    slope: float,
    intercept: float,
    context: LoadContext,
) -> np.ndarray:
    """Reads `shape` voxels of `dtype` and returns `value * slope + intercept` as int16 or float32.

    Whole numbers that fit stay int16; floating-point files, fractional rescales and larger numbers give float32.
    Where the file holds what is returned (int16 or float32, no rescale) it is read straight into the result.
    """
    count = int(np.prod(shape, dtype=object))
    stored_bytes = count * dtype.itemsize
    # The result can be wider than what is stored, never narrower than int16.
    context.claim(max(stored_bytes, count * (4 if dtype.kind == "f" else 2)), "the volume")
    if stored_bytes > stream.most_bytes:
        raise context.error(
            f"the header promises {stored_bytes} bytes of voxels, the file has {stream.stored_bytes} in all",
            "It is truncated or its dimensions are wrong: copy or export it again",
        )
    if dtype.newbyteorder("=") in (np.int16, np.float32) and (slope, intercept) == (1, 0):
        voxels = np.empty(count, dtype)
        _expect(stream.readinto(memoryview(voxels).cast("B")), stored_bytes, context)
        if not dtype.isnative:
            voxels = voxels.byteswap(inplace=True).view(dtype.newbyteorder("="))
        return voxels.reshape(shape)

    rescale = Rescale(dtype, slope, intercept)
    voxels = np.empty(count, rescale.result_dtype)
    block = np.empty(max(1, min(count, BLOCK_BYTES // dtype.itemsize)), dtype)
    for start in range(0, count, len(block)):
        part = block[: count - start]
        _expect(stream.readinto(memoryview(part.view(np.uint8)).cast("B")), part.nbytes, context)
        values = rescale(part)
        if voxels.dtype == np.int16 and not fits_int16(values):
            context.claim(count * 6, "the volume")
            voxels = voxels.astype(np.float32)
        voxels[start : start + len(part)] = values
    return voxels.reshape(shape)


def voxels_of(array: np.ndarray, slope: float, intercept: float, context: LoadContext) -> tuple[np.ndarray, bool]:
    """An array in memory as int16 or float32, and whether the result is a copy. The caller's array is not changed."""
    check_type(array.dtype, context)
    if array.dtype in (np.int16, np.float32) and array.dtype.isnative and (slope, intercept) == (1, 0):
        return np.asarray(array), False
    rescale = Rescale(array.dtype, slope, intercept)
    context.claim(array.size * rescale.result_dtype.itemsize, "the volume")
    voxels = np.empty(array.shape, rescale.result_dtype)
    for index, part in enumerate(array):
        values = rescale(part)
        if voxels.dtype == np.int16 and not fits_int16(values):
            context.claim(array.size * 6, "the volume")
            voxels = voxels.astype(np.float32)
        voxels[index] = values
    return voxels, True


def three_axes(dims, context: LoadContext) -> tuple[int, int, int]:
    """The three dimensions of a volume; further ones may only be 1."""
    dims = [int(size) for size in dims]
    while len(dims) > 3 and dims[-1] == 1:
        dims.pop()
    if len(dims) != 3:
        raise context.error(f"shape {tuple(dims)} is not 3-D", "Pass one volume: split a time series first")
    if min(dims) < 1:
        raise context.error(f"shape {tuple(dims)} is empty", "The header is damaged: export the scan again")
    return tuple(dims)


def check_type(dtype: np.dtype, context: LoadContext) -> None:
    """Refuses colours, complex numbers and objects."""
    if dtype.fields is not None:
        raise context.error("voxels are RGB colours", "Load the CT itself, not a picture made from it")
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise context.error(f"voxels are of type {dtype}", "Export the scan as int16 or float32")


def check_end(stream: VoxelStream, voxels: np.ndarray, context: LoadContext) -> None:
    """Reads one slice further: a gzip stream checks its sum at its end, and a header that promises less lies."""
    more = stream.read(min(voxels[0].nbytes, 1 << 24) + 1)
    if len(more) > voxels[0].nbytes:
        context.doubt("the file holds more voxels than the header says", "The header is damaged: export it again")


class Rescale:
    """`value * slope + intercept`, in whole numbers where all three are whole.

    Args:
        dtype (`np.dtype`): of the stored values.
        slope, intercept (`float`): of the file.
    """

    def __init__(self, dtype: np.dtype, slope: float, intercept: float):
        whole = dtype.kind in "iub" and float(slope).is_integer() and float(intercept).is_integer()
        # Beyond these the sum could leave int64, and nothing so large is a CT's rescale.
        self.whole = whole and abs(slope) <= 2**15 and abs(intercept) <= 2**31 and dtype.itemsize <= 4
        self.result_dtype = np.dtype(np.int16 if self.whole else np.float32)
        narrow = dtype.itemsize <= 2 and abs(slope) <= 2**10 and abs(intercept) <= 2**20  # fits int32
        self._wide = np.float64 if not self.whole else np.int32 if narrow else np.int64
        self.slope = self._wide(slope)
        self.intercept = self._wide(intercept)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        values = values.astype(self._wide)
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is looked for at the end
            if self.slope != 1:
                values *= self.slope
            if self.intercept != 0:
                values += self.intercept
            return values if self.whole else values.astype(np.float32)


def fits_int16(values: np.ndarray) -> bool:
    """Whether whole numbers can be stored as int16."""
    return values.size == 0 or (values.min() >= -32768 and values.max() <= 32767)


def _expect(found: int, wanted: int, context: LoadContext) -> None:
    if found < wanted:
        raise context.error(
            f"the voxels end {wanted - found} bytes too early", "The file is truncated: copy or export it again"
        )
