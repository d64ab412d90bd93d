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
"""DICOM headers: from one file, or one dataset in memory, to its frames.

A frame is one slice: what places it, what it belongs to, and where its pixels are. The frames of an enhanced
multi-frame file take their geometry from its functional groups. pydicom cuts the header into elements; their values
are converted here, because only a few are needed and a damaged one must not warn, but be refused.
"""

import math
import re
import struct
import threading
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO

import numpy as np

from .volume_ct_moe import LoadContext
from .volume_dicom_pixels_ct_moe import DEFLATED, NATIVE_SYNTAXES, PixelLayout
from .volume_files_ct_moe import READ_ERRORS, BytesEntry, Entry, InflatedEntry


try:
    import pydicom
    from pydicom.filereader import read_dataset
except ImportError:
    pydicom = read_dataset = None


# A declared padding value in this range of HU could be tissue: it is then left alone.
POSSIBLE_HU = (-1000, 4096)

# The header of almost every slice fits in here, so that its pixels are not read twice.
HEAD_BYTES = 1 << 16

# An inflated header has to end somewhere.
MAX_DEFLATED_HEADER = 1 << 22

_PIXEL_DATA = 0x7FE00010
_PIXEL_TAGS = frozenset((_PIXEL_DATA, 0x7FE00009, 0x7FE00008))  # the other two hold floating-point numbers
_IMAGE_TYPE, _SOP_INSTANCE, _MODALITY, _SERIES = 0x00080008, 0x00080018, 0x00080060, 0x0020000E
_SERIES_NUMBER, _ACQUISITION_NUMBER, _TEMPORAL_POSITION = 0x00200011, 0x00200012, 0x00200100
_ACQUISITION_DATE, _ACQUISITION_TIME, _CONTENT_TIME = 0x00080022, 0x00080032, 0x00080033
_POSITION, _ORIENTATION, _PIXEL_SPACING = 0x00200032, 0x00200037, 0x00280030
_THICKNESS, _STEP, _KERNEL = 0x00180050, 0x00180088, 0x00181210
_SAMPLES, _PHOTOMETRIC, _NUM_FRAMES, _ROWS, _COLUMNS = 0x00280002, 0x00280004, 0x00280008, 0x00280010, 0x00280011
_BITS_ALLOCATED, _BITS_STORED, _HIGH_BIT, _SIGNED = 0x00280100, 0x00280101, 0x00280102, 0x00280103
_PADDING, _PADDING_LIMIT = 0x00280120, 0x00280121
_INTERCEPT, _SLOPE, _RESCALE_TYPE, _MODALITY_LUT = 0x00281052, 0x00281053, 0x00281054, 0x00283000
_SHARED_GROUPS, _FRAME_GROUPS = 0x52009229, 0x52009230
_TAGS = [value for name, value in list(globals().items()) if re.fullmatch(r"_[A-Z_]+", name) and type(value) is int]

# The functional groups of an enhanced file, and what is read from each.
_FRAME_TYPE, _STACK, _TEMPORAL_INDEX, _FRAME_ACQUISITION = 0x00089007, 0x00209056, 0x00209128, 0x00209156
_MACROS = {
    0x00209113: (_POSITION,),
    0x00209116: (_ORIENTATION,),
    0x00289110: (_PIXEL_SPACING, _THICKNESS, _STEP),
    0x00289145: (_INTERCEPT, _SLOPE, _RESCALE_TYPE),
    0x00209111: (_STACK, _TEMPORAL_INDEX, _FRAME_ACQUISITION),
    0x00189329: (_FRAME_TYPE,),
}

# What tells points in time of one series apart, the most explicit first.
_TIMES = (
    (_TEMPORAL_POSITION,),
    (_TEMPORAL_INDEX,),
    (_ACQUISITION_NUMBER,),
    (_FRAME_ACQUISITION,),
    (_STACK,),
    (_ACQUISITION_DATE, _ACQUISITION_TIME),
    (_CONTENT_TIME,),
)

# pydicom warns through the process-wide filters, which threads must not swap at the same time.
_PYDICOM_LOCK = threading.Lock()


@dataclass
class Frame:
    """One slice.

    Args:
        pixels (`PixelLayout`): where and how its pixels are stored.
        position (`np.ndarray` of shape `(3,)`, *optional*): LPS mm of the first pixel's centre. This, `orientation`
            and `pixel_spacing` are all there or all `None`.
        orientation (`np.ndarray` of shape `(2, 3)`, *optional*): unit vectors along a row and down a column.
        pixel_spacing (`tuple[float, float]`, *optional*): mm between rows, between columns.
        thickness, step (`float`, *optional*): SliceThickness and SpacingBetweenSlices, mm.
        series, instance (`str`): UIDs, for telling apart, never for showing.
        series_number, modality, kernel, rescale_type (`str`): "" if not stated.
        scout, colour, has_lut (`bool`): a localizer; more than grey; values mapped by a table.
        times (`tuple[str, ...]`): what may tell points in time apart.
    """

    pixels: PixelLayout
    position: np.ndarray | None
    orientation: np.ndarray | None
    pixel_spacing: tuple[float, float] | None
    thickness: float | None
    step: float | None
    series: str
    instance: str
    series_number: str
    modality: str
    kernel: str
    rescale_type: str
    scout: bool
    colour: bool
    has_lut: bool
    times: tuple[str, ...]


def is_dicom(start: bytes) -> bool:
    """Whether a file that starts so is DICOM: the magic word, or an element that files without it begin with."""
    return start[128:132] == b"DICM" or (start[:2] in (b"\x02\0", b"\x08\0") and start[2] <= 0x18 and start[3] == 0)


def is_dataset(source) -> bool:
    """Whether this is a pydicom dataset."""
    return pydicom is not None and isinstance(source, pydicom.Dataset)


def source_name(source) -> str:
    """How errors name one of several files or datasets."""
    return "a dataset" if is_dataset(source) else source.name


def read_header(source, context: LoadContext) -> list[Frame]:
    """The frames of an `Entry` or a pydicom dataset; none if it is not an image."""
    if pydicom is None:
        raise context.error(
            "DICOM is read with pydicom, which is not installed", "Run `pip install pydicom imagecodecs`"
        )
    name = source_name(source)
    damaged = "The file is damaged: copy or export it again"
    try:
        dataset, syntax, entry, offset, length = (_take_apart if is_dataset(source) else _parse)(source, context)
        if dataset is None or _ROWS not in dataset:
            return []
        if offset is None:
            raise context.error(f"{name}: an image without pixels", damaged)
        return _frames(dataset, syntax, entry, offset, length)
    except READ_ERRORS as error:
        raise context.error(f"{name} cannot be read ({type(error).__name__})", damaged) from error
    except _BadValue as error:
        raise context.error(f"{name}: {error}", damaged) from error


def _parse(entry: Entry, context: LoadContext):
    """Header of a file up to its pixels: `(dataset, syntax, entry of the pixels, offset of their value, length)`."""
    head = entry.head(HEAD_BYTES)
    if not is_dicom(head):
        return None, None, entry, None, None
    syntax, start = _file_meta(head)
    if syntax == DEFLATED:
        entry = InflatedEntry(entry, start)
        head, start = entry.head(MAX_DEFLATED_HEADER), 0
    dataset, offset, length = _read_header(head, start, syntax)
    if offset is None and syntax != DEFLATED and entry.size > len(head):
        context.claim(entry.size, entry.name)
        dataset, offset, length = _read_header(entry.read(), start, syntax)
    if offset is not None and length is not None and syntax != DEFLATED:
        length = min(length, entry.size - offset)  # a truncated file promises more than it holds
    return dataset, syntax, entry, offset, length


def _read_header(content: bytes, start: int, syntax: str):
    """The dataset up to its pixel data, and offset and length of their value (`None`: cut into fragments)."""
    file = BytesIO(content)
    file.seek(start)
    implicit = syntax in ("", NATIVE_SYNTAXES[0])  # where this is wrong pydicom finds out
    try:
        with _quiet_pydicom():
            dataset = read_dataset(
                file,
                implicit,
                syntax != NATIVE_SYNTAXES[2],
                stop_when=lambda tag, vr, length: tag in _PIXEL_TAGS,
                specific_tags=_TAGS,
            )
    except Exception as error:  # pydicom raises nearly every kind on damaged headers, RecursionError included
        raise _BadValue(f"the header cannot be read ({type(error).__name__})") from error
    implicit, little = dataset.original_encoding
    order = "<" if little else ">"
    element = file.read(8)
    if len(element) < 8:
        return dataset, None, None
    group, number = struct.unpack_from(f"{order}HH", element)
    tag = group << 16 | number
    if tag not in _PIXEL_TAGS:
        return dataset, None, None
    if tag != _PIXEL_DATA:
        raise _BadValue("pixels are floating-point numbers (a parametric map?)")
    if implicit:
        (length,) = struct.unpack(f"{order}4xL", element)
    elif element[4:6] in (b"OB", b"OW", b"UN"):
        (length,) = struct.unpack(f"{order}L", file.read(4).ljust(4, b"\0"))
    else:
        raise _BadValue("pixels are neither bytes nor words")
    return dataset, file.tell(), None if length == 0xFFFFFFFF else length


def _file_meta(head: bytes) -> tuple[str, int]:
    """Transfer syntax UID ("" if none is stated) and where the dataset starts."""
    position = 132 if head[128:132] == b"DICM" else 0
    syntax = ""
    while position + 8 <= len(head):
        group, element, vr, length = struct.unpack_from("<HH2sH", head, position)
        if group != 2:
            break
        position += 8
        if vr in (b"OB", b"OW", b"UN", b"UT", b"SQ") and position + 4 <= len(head):
            (length,) = struct.unpack_from("<L", head, position)
            position += 4
        if element == 0x0010:
            syntax = head[position : position + length].decode("ascii", "replace").strip("\0 ")
        position += length
    return syntax, position


def _take_apart(dataset, context: LoadContext):
    """A pydicom dataset in memory, as `_parse` gives a file."""
    meta = getattr(dataset, "file_meta", None)  # only datasets that come from a file have one
    syntax = str(meta.get("TransferSyntaxUID", "")) if meta is not None else ""
    if not syntax:
        syntax = NATIVE_SYNTAXES[2] if dataset.original_encoding[1] is False else NATIVE_SYNTAXES[1]
    if syntax == DEFLATED:  # pydicom has inflated it
        syntax = NATIVE_SYNTAXES[1]
    pixels = dataset.get_item(_PIXEL_DATA)
    if pixels is None or not isinstance(pixels.value, bytes):
        return dataset, syntax, None, None, None
    length = len(pixels.value) if syntax in NATIVE_SYNTAXES else None
    return dataset, syntax, BytesEntry("a dataset", memoryview(pixels.value)), 0, length


class _BadValue(Exception):
    """A value in a header that makes no sense; its text never quotes the value of a text tag."""


@contextmanager
def _quiet_pydicom():
    """pydicom warns about every oddity it can read past, often quoting the value; those are no news here."""
    with _PYDICOM_LOCK, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"pydicom\b|.*volume_dicom_header_ct_moe")
        yield


class _Elements:
    """The elements of a frame, unconverted: those of its functional groups before those of the file.

    Args:
        layers (`list[dict]`): tag to pydicom element; the first layer that has a tag counts.
    """

    def __init__(self, layers: list[dict]):
        self.layers = layers

    def element(self, tag: int):
        """The element of a tag, or `None` if it is missing or empty."""
        for layer in self.layers:
            element = layer.get(tag)
            if element is not None and element.value not in (None, b"", ""):
                return element
        return None

    def texts(self, tag: int) -> list[str]:
        """The parts of a text value; a file's raw bytes and pydicom's converted values look the same afterwards."""
        element = self.element(tag)
        if element is None:
            return []
        value = element.value
        if isinstance(value, bytes):
            value = value.decode("ascii", "replace")
        if isinstance(value, str):
            return [part.strip("\0 ") for part in value.split("\\")]
        parts = value if hasattr(value, "__iter__") else [value]
        return [str(part).strip("\0 ") for part in parts]

    def text(self, tag: int) -> str:
        return "\\".join(self.texts(tag))

    def numbers(self, tag: int, count: int) -> tuple[float, ...] | None:
        """Decimal strings as finite numbers."""
        texts = self.texts(tag)
        if not any(texts):
            return None
        try:
            numbers = tuple(map(float, texts))
        except ValueError:
            numbers = ()
        if len(numbers) != count or not all(map(math.isfinite, numbers)):
            raise _BadValue(f"{_keyword(tag)} is not {count} number{'s' * (count > 1)}")
        return numbers

    def number(self, tag: int, default: float | None = None) -> float | None:
        numbers = self.numbers(tag, 1)
        return default if numbers is None else numbers[0]

    def integer(self, tag: int, default: int | None = None, signed: bool = False) -> int | None:
        """A 16-bit binary value, read as `signed` says whatever its VR says, or an integer string."""
        element = self.element(tag)
        if element is None:
            return default
        if isinstance(element.value, bytes) and tag != _NUM_FRAMES:
            if len(element.value) != 2:
                raise _BadValue(f"{_keyword(tag)} is not one 16-bit value")
            return int.from_bytes(element.value, "little" if element.is_little_endian else "big", signed=signed)
        try:
            number = int(self.texts(tag)[0])
        except (ValueError, IndexError) as error:
            raise _BadValue(f"{_keyword(tag)} is not an integer") from error
        return number - 65536 if signed and 32768 <= number <= 65535 else number


def _keyword(tag: int) -> str:
    return pydicom.datadict.keyword_for_tag(tag)


def _layer(dataset) -> dict:
    """Tag to element; `values()` gives them as they are, where indexing would convert them."""
    return {int(element.tag): element for element in dataset.values()}


def _sequence(dataset, tag: int) -> list:
    """The items of a sequence."""
    if tag not in dataset:
        return []
    try:
        with _quiet_pydicom():
            items = list(dataset[tag].value)
    except Exception as error:  # as in `_read_header`
        raise _BadValue(f"{_keyword(tag)} cannot be read ({type(error).__name__})") from error
    if not all(map(is_dataset, items)):
        raise _BadValue(f"{_keyword(tag)} is no sequence")
    return items


def _frames(dataset, syntax: str, entry: Entry, offset: int, length: int | None) -> list[Frame]:
    """Reads one image's header."""
    top = _layer(dataset)
    num_frames = _Elements([top]).integer(_NUM_FRAMES, 1)
    shared = _group_layer(_sequence(dataset, _SHARED_GROUPS))
    per_frame = _sequence(dataset, _FRAME_GROUPS)
    if num_frames < 1 or (per_frame and len(per_frame) != num_frames):
        raise _BadValue(f"{num_frames} frames, but geometry for {len(per_frame)}")
    if num_frames > 1 and not per_frame:
        raise _BadValue(f"{num_frames} frames without a position for each")
    file = (syntax, entry, offset, length, num_frames)
    return [
        _frame(_Elements([_group_layer(per_frame[number : number + 1]), shared, top]), number, *file)
        for number in range(num_frames)
    ]


def _group_layer(groups: list) -> dict:
    """The elements of functional groups that are read, without the sequences around them."""
    layer = {}
    for group in groups:
        for macro, tags in _MACROS.items():
            for item in _sequence(group, macro):
                layer |= {tag: element for tag, element in _layer(item).items() if tag in tags}
    return layer


def _frame(
    header: _Elements, number: int, syntax: str, entry: Entry, offset: int, length: int | None, num_frames: int
) -> Frame:
    rows, columns = header.integer(_ROWS, 0), header.integer(_COLUMNS, 0)
    bits_allocated = header.integer(_BITS_ALLOCATED, 16)
    bits_stored = header.integer(_BITS_STORED, bits_allocated)
    high_bit = header.integer(_HIGH_BIT, bits_stored - 1)
    signed = header.integer(_SIGNED, 0)
    if min(rows, columns) < 1:
        raise _BadValue(f"{rows} x {columns} pixels")
    whole_bytes = bits_allocated in (8, 16, 32)
    if not whole_bytes or not 1 <= bits_stored <= high_bit + 1 <= bits_allocated or signed not in (0, 1):
        raise _BadValue(f"{bits_stored} bits up to bit {high_bit} of {bits_allocated}, sign {signed}")
    slope, intercept = header.number(_SLOPE, 1.0), header.number(_INTERCEPT, 0.0)
    if slope == 0 or abs(slope) > 1e6 or abs(intercept) > 1e9:
        raise _BadValue(f"rescale slope {slope:g}, intercept {intercept:g}")
    pixels = PixelLayout(
        entry, offset, number, num_frames, syntax, rows, columns, bits_allocated, bits_stored, high_bit, bool(signed),
        slope, intercept, _padding_range(header, bool(signed), slope, intercept),
    )  # fmt: skip
    if pixels.native and (length is None or length < num_frames * pixels.native_bytes):
        raise _BadValue(f"{length or 0} bytes of pixels where {num_frames * pixels.native_bytes} are needed")
    if syntax == DEFLATED and num_frames > 1:
        raise _BadValue("several frames in the deflated transfer syntax, which is not supported")

    position, orientation = header.numbers(_POSITION, 3), header.numbers(_ORIENTATION, 6)
    spacing = header.numbers(_PIXEL_SPACING, 2)
    if spacing is not None and min(spacing) <= 0:
        raise _BadValue(f"pixel spacing {spacing[0]:g} x {spacing[1]:g} mm")
    instance = header.text(_SOP_INSTANCE)
    placed = None not in (position, orientation, spacing)
    return Frame(
        pixels=pixels,
        position=np.array(position) if placed else None,
        orientation=_unit_axes(orientation) if placed else None,
        pixel_spacing=spacing if placed else None,
        thickness=header.number(_THICKNESS),
        step=header.number(_STEP),
        series=header.text(_SERIES),
        instance=f"{instance} {number}" if instance else "",
        series_number=re.sub(r"[^0-9-]", "", header.text(_SERIES_NUMBER))[:16],
        modality=re.sub(r"[^A-Z]", "", header.text(_MODALITY))[:16],
        kernel=re.sub(r"[^A-Za-z0-9+_. -]", "", header.text(_KERNEL))[:16],
        rescale_type=header.text(_RESCALE_TYPE),
        scout="LOCALIZER" in header.texts(_IMAGE_TYPE) or "LOCALIZER" in header.texts(_FRAME_TYPE),
        colour=header.integer(_SAMPLES, 1) != 1 or header.text(_PHOTOMETRIC) not in ("MONOCHROME1", "MONOCHROME2", ""),
        has_lut=header.element(_MODALITY_LUT) is not None,
        times=tuple("".join(map(header.text, tags)) for tags in _TIMES),
    )


@lru_cache(maxsize=64)
def _unit_axes(orientation: tuple[float, ...]) -> np.ndarray:
    """Row and column direction, made exactly perpendicular: they are written with few decimals."""
    axes = np.array(orientation).reshape(2, 3)
    lengths = np.linalg.norm(axes, axis=1)
    if not (np.abs(lengths - 1) < 0.05).all() or abs(axes[0] @ axes[1]) > 0.05:
        raise _BadValue("ImageOrientationPatient is not two perpendicular directions")
    row = axes[0] / lengths[0]
    column = axes[1] - (axes[1] @ row) * row
    return np.array([row, column / np.linalg.norm(column)])


def _padding_range(header: _Elements, signed: bool, slope: float, intercept: float) -> tuple[int, int] | None:
    """Stored values that mean "nothing measured", unless they could be tissue."""
    value = header.integer(_PADDING, None, signed)
    if value is None:
        return None
    limit = header.integer(_PADDING_LIMIT, value, signed)
    low, high = min(value, limit), max(value, limit)
    could_be_tissue = any(POSSIBLE_HU[0] <= end * slope + intercept <= POSSIBLE_HU[1] for end in (low, high))
    return None if could_be_tissue else (low, high)
