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
"""Pixels of DICOM frames, native or compressed, as HU in one array.

Native pixels are read straight into their slice of the result; compressed frames are decoded in threads. The size that
a code stream states is compared with the header before the decoder sees it.
"""

import os
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from itertools import islice

import numpy as np

from .volume_ct_moe import AIR_HU, LoadContext
from .volume_files_ct_moe import READ_ERRORS, Entry
from .volume_plausibility_ct_moe import padding_to_air
from .volume_voxels_ct_moe import Rescale, fits_int16


try:
    from pydicom.encaps import generate_frames
except ImportError:
    generate_frames = None
try:
    from imagecodecs import jpeg2k_decode, jpeg8_decode, jpegls_decode
except ImportError:
    jpeg2k_decode = jpeg8_decode = jpegls_decode = None


NATIVE_SYNTAXES = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99")
BIG_ENDIAN = "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
RLE = "1.2.840.10008.1.2.5"
_JPEG_DECODERS = {
    **dict.fromkeys(("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"), jpeg8_decode),
    **dict.fromkeys(("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"), jpeg8_decode),
    **dict.fromkeys(("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"), jpegls_decode),
    **dict.fromkeys(("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"), jpeg2k_decode),
}
KNOWN_SYNTAXES = (*NATIVE_SYNTAXES, RLE, *_JPEG_DECODERS)

# Few enough to share the work out evenly, enough that handing it out costs nothing.
FRAMES_PER_JOB = 4

# What a codec takes per pixel while it works: JPEG 2000 transforms in 32 bits and returns another array.
DECODER_BYTES = 12

_JPEG_2000_START = b"\xff\x4f\xff\x51"  # start of code stream, size marker
_DAMAGED = "The file is damaged: copy or export it again"


@dataclass
class PixelLayout:
    """How the pixels of a frame are stored.

    Args:
        entry (`Entry`): the file, and `offset` the position of the pixel data's value in it.
        frame, num_frames (`int`): which of the file's frames, and how many it has.
        syntax (`str`): transfer syntax UID.
        rows, columns, bits_allocated, bits_stored, high_bit (`int`): as in the header.
        signed (`bool`): pixel representation 1.
        slope, intercept (`float`): to HU.
        padding (`tuple[int, int]`, *optional*): smallest and largest stored value that means "not measured".
    """

    entry: Entry
    offset: int
    frame: int
    num_frames: int
    syntax: str
    rows: int
    columns: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    slope: float
    intercept: float
    padding: tuple[int, int] | None

    @property
    def native(self) -> bool:
        return self.syntax in NATIVE_SYNTAXES

    @property
    def dtype(self) -> np.dtype:
        """Of native pixels."""
        order = ">" if self.syntax == BIG_ENDIAN else "<"
        return np.dtype(f"{order}{'i' if self.signed else 'u'}{self.bits_allocated // 8}")

    @property
    def native_bytes(self) -> int:
        return self.rows * self.columns * self.bits_allocated // 8


def read_frames(layouts: list[PixelLayout], context: LoadContext) -> tuple[np.ndarray, int]:
    """Reads frames of one size.

    Returns:
        `(np.ndarray, int)`: HU of shape `(frames, rows, columns)`, int16 if every value fits and is whole, else
        float32, and, with `context.pads`, how many pixels were padding and became air.
    """
    rows, columns = layouts[0].rows, layouts[0].columns
    whole = all(float(v).is_integer() for layout in layouts for v in (layout.slope, layout.intercept))
    threads = min(8, os.cpu_count() or 1, len(layouts))
    codes = _codes_of_shared_files(layouts, context)
    for dtype in (np.int16, np.float32) if whole else (np.float32,):
        scratch = 0 if all(each.native for each in layouts) else threads * rows * columns * DECODER_BYTES
        context.claim(len(layouts) * rows * columns * np.dtype(dtype).itemsize + scratch, "the volume")
        voxels = np.empty((len(layouts), rows, columns), dtype)
        jobs = list(zip(layouts, codes, voxels))
        with ThreadPoolExecutor(threads) as pool:
            work = [
                pool.submit(_read_some, jobs[start : start + FRAMES_PER_JOB], context)
                for start in range(0, len(jobs), FRAMES_PER_JOB)
            ]
            try:
                padded = [count for job in work for count in job.result()]
            finally:  # after a failure the rest need not be decoded
                pool.shutdown(wait=True, cancel_futures=True)
        if None not in padded:
            return voxels, sum(padded)
    raise AssertionError("float32 holds every value")


def _read_some(jobs: list[tuple], context: LoadContext) -> list[int | None]:
    return [_read_frame(*job, context) for job in jobs]


def _read_frame(layout: PixelLayout, code: bytes | None, out: np.ndarray, context: LoadContext) -> int | None:
    """Fills one slice; returns the number of padding pixels, or `None` if the values do not fit the slice's type."""
    straight = layout.native and layout.dtype.itemsize == 2 and out.dtype == np.int16
    if straight:
        stored = out.reshape(-1).view(layout.dtype.newbyteorder("="))
        _read_native(layout, memoryview(stored).cast("B"), context)
        if layout.syntax == BIG_ENDIAN:
            stored.byteswap(inplace=True)
    elif layout.native:
        stored = np.empty(out.size, layout.dtype)
        _read_native(layout, memoryview(stored.view(np.uint8)), context)
    else:
        code = _codes_of(layout, context)[0] if code is None else code
        stored = _decode(layout, code, context).reshape(-1)
    stored = _stored_bits(stored, layout)
    flat = out.reshape(-1)
    declared = None
    if context.pads and layout.padding is not None:
        declared = (stored >= layout.padding[0]) & (stored <= layout.padding[1])
        # As large a value as -32768 would not be int16 once rescaled; what stands here instead is of no matter.
        np.copyto(stored, 0, where=declared)

    in_place = straight and layout.slope == 1 and _add_in_place(stored, layout.intercept)
    if not in_place:  # else `flat` is the memory of `stored`
        values = Rescale(stored.dtype, layout.slope, layout.intercept)(stored)
        if out.dtype == np.int16 and not fits_int16(values):
            return None
        flat[:] = values
    if not context.pads:
        return 0
    count = 0
    if declared is not None:
        np.copyto(flat, AIR_HU, where=declared)
        count = int(np.count_nonzero(declared))
    return count + padding_to_air(flat)


def _add_in_place(stored: np.ndarray, intercept: float) -> bool:
    """Adds a whole intercept to 16-bit values if the sums are int16, in the two's complement that both types share."""
    low, high = int(stored.min()) + intercept, int(stored.max()) + intercept
    if low < -32768 or high > 32767:
        return False
    if intercept:
        bits = stored.view(np.uint16)
        bits += np.uint16(int(intercept) & 0xFFFF)
    return True


def _read_native(layout: PixelLayout, view: memoryview, context: LoadContext) -> None:
    try:
        found = layout.entry.readinto(layout.offset + layout.frame * layout.native_bytes, view)
    except READ_ERRORS as error:
        raise context.error(f"{layout.entry.name} cannot be read ({type(error).__name__})", "Copy it again") from error
    if found < len(view):
        raise context.error(
            f"{layout.entry.name}: the pixels end {len(view) - found} bytes too early",
            "The file is truncated: copy or export it again",
        )


def _stored_bits(stored: np.ndarray, layout: PixelLayout) -> np.ndarray:
    """Only the bits that hold the value, with its sign: the others may hold an overlay, or anything."""
    width = stored.dtype.itemsize * 8
    shift = layout.high_bit + 1 - layout.bits_stored if layout.native else 0
    as_signed, as_unsigned = (np.dtype(f"{kind}{stored.dtype.itemsize}") for kind in "iu")
    if layout.bits_stored >= width:
        return stored.view(as_signed if layout.signed else as_unsigned)
    bits = stored.view(as_unsigned)
    bits <<= as_unsigned.type(width - layout.bits_stored - shift)
    stored = bits.view(as_signed) if layout.signed else bits
    stored >>= stored.dtype.type(width - layout.bits_stored)  # an arithmetic shift carries the sign
    return stored


def _codes_of_shared_files(layouts: list[PixelLayout], context: LoadContext) -> list[bytes | None]:
    """The code stream of each compressed frame that shares a file with others, so that the file is cut up once."""
    files = {id(layout.entry): layout for layout in layouts if layout.num_frames > 1 and not layout.native}
    for layout in files.values():
        context.hold(layout.entry.size, layout.entry.name)
    codes = {key: _codes_of(layout, context) for key, layout in files.items()}
    return [codes[id(layout.entry)][layout.frame] if id(layout.entry) in codes else None for layout in layouts]


def _codes_of(layout: PixelLayout, context: LoadContext) -> list[bytes]:
    """The code streams of all frames of a file."""
    try:
        buffer = BytesIO(layout.entry.read())
        buffer.seek(layout.offset)
        codes = list(islice(generate_frames(buffer, number_of_frames=layout.num_frames), layout.num_frames))
    except (*READ_ERRORS, ValueError, struct.error) as error:
        raise context.error(
            f"{layout.entry.name}: the compressed pixels cannot be read ({type(error).__name__})", _DAMAGED
        ) from error
    if len(codes) < layout.num_frames:
        raise context.error(f"{layout.entry.name}: {len(codes)} of {layout.num_frames} frames are there", _DAMAGED)
    return codes


def _decode(layout: PixelLayout, code: bytes, context: LoadContext) -> np.ndarray:
    """One compressed frame as an array of 8 or 16 bits."""
    name = layout.entry.name
    if layout.syntax == RLE:
        pixels = _decode_rle(code, layout)
    else:
        decoder = _JPEG_DECODERS[layout.syntax]
        if decoder is None:
            raise context.error(f"{name} holds compressed pixels", "Run `pip install imagecodecs`")
        if code[4:8] == b"jP  ":  # boxes around the code stream: not DICOM, but seen
            code = code[max(0, code.find(_JPEG_2000_START)) :]
        size = _code_stream_size(code)
        if size != (layout.rows, layout.columns):
            found = "no picture" if size is None else f"{size[0]} x {size[1]} pixels"
            raise context.error(
                f"{name}: {found} in the code stream, {layout.rows} x {layout.columns} in the header", _DAMAGED
            )
        try:
            pixels = decoder(code)
        except Exception as error:  # each codec has its own family of errors, and none is narrower than Exception
            raise context.error(f"{name}: the pixels cannot be decoded ({type(error).__name__})", _DAMAGED) from error
    if pixels is None or pixels.shape != (layout.rows, layout.columns) or pixels.dtype.kind not in "iu":
        raise context.error(f"{name}: the pixels cannot be decoded", _DAMAGED)
    if pixels.dtype.itemsize * 8 < layout.bits_stored:
        raise context.error(
            f"{name}: {pixels.dtype.itemsize * 8} bits in the code stream, {layout.bits_stored} in the header",
            _DAMAGED,
        )
    return np.require(pixels, requirements=("C", "W"))


def _code_stream_size(code: bytes) -> tuple[int, int] | None:
    """Rows and columns that a JPEG, JPEG-LS or JPEG 2000 stream states, read from its first markers."""
    try:
        if code[:4] == _JPEG_2000_START:
            right, bottom, left, top = struct.unpack_from(">IIII", code, 8)
            return bottom - top, right - left
        position = 2
        while code[position] == 0xFF:
            marker = code[position + 1]
            if marker == 0xFF:  # fill byte
                position += 1
            elif marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
                return struct.unpack_from(">HH", code, position + 5)
            else:
                position += 2 + struct.unpack_from(">H", code, position + 2)[0]
    except (IndexError, struct.error):
        pass
    return None


def _decode_rle(code: bytes, layout: PixelLayout) -> np.ndarray | None:
    """DICOM's run-length coding: one PackBits segment per byte of the pixel, the most significant first."""
    count, num_bytes = layout.rows * layout.columns, layout.bits_allocated // 8
    if len(code) < 64:
        return None
    num_segments, *offsets = struct.unpack("<16L", code[:64])
    if num_segments != num_bytes:
        return None
    planes = np.empty((count, num_bytes), np.uint8)
    ends = [*offsets[1:num_segments], len(code)]
    for plane, (start, end) in enumerate(zip(offsets, ends)):
        values = _unpack_bits(code[start:end], count)
        if len(values) < count:
            return None
        planes[:, num_bytes - 1 - plane] = np.frombuffer(values, np.uint8, count)
    return planes.view(f"<u{num_bytes}").reshape(layout.rows, layout.columns)


def _unpack_bits(code: bytes, count: int) -> bytearray:
    """Runs and literals until `count` bytes are there or the segment ends."""
    values = bytearray()
    position = 0
    while position < len(code) - 1 and len(values) < count:
        header = code[position]
        if header < 128:
            values += code[position + 1 : position + 2 + header]
            position += header + 2
        else:
            if header > 128:
                values += code[position + 1 : position + 2] * (257 - header)
            position += 2 if header > 128 else 1
    return values
