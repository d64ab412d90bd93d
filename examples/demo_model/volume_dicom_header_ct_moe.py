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
from collections import namedtuple
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np

from .volume_ct_moe import LoadContext
from .volume_dicom_pixels_ct_moe import DEFLATED, NATIVE_SYNTAXES, PixelLayout
from .volume_files_ct_moe import READ_ERRORS, BytesEntry, Entry, InflatedEntry
from .volume_geometry_ct_moe import MAX_COORDINATE


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

_WANTED = frozenset(_TAGS)

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

# How an element starts in explicit VR: tag, VR, length, and the length that some VRs have instead.
_ELEMENT, _LENGTH = struct.Struct("<HH2sHL"), struct.Struct("<L")
_LONG_VRS = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_SHORT_VRS = frozenset(b"AE AS AT CS DA DS DT FL FD IS LO LT PN SH SL SS ST TM UI UL US".split())
_UNDEFINED = 0xFFFFFFFF

# pydicom warns through the process-wide filters, which threads must not swap at the same time.
_PYDICOM_LOCK = threading.Lock()

_Raw = namedtuple("_Raw", "value is_little_endian")


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
    return start[128:132] == b"DICM" or re.match(rb"[\x02\x08]\0[\0-\x18]\0", start) is not None


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
        header = _take_apart(source) if is_dataset(source) else _parse(source, context)
        if header is None or _ROWS not in header.elements:
            return []
        if header.offset is None:
            raise context.error(f"{name}: an image without pixels", damaged)
        return _frames(header)
    except READ_ERRORS as error:
        raise context.error(f"{name} cannot be read ({type(error).__name__})", damaged) from error
    except _BadValue as error:
        raise context.error(f"{name}: {error}", damaged) from error


@dataclass
class _Header:
    """One image's header.

    Args:
        elements (`dict`): tag to an unconverted element (what has `value` and `is_little_endian`).
        dataset (`pydicom.Dataset`, *optional*): for the sequences, if there are any that are read.
        offset (`int`, *optional*): where the pixel data's value starts in `entry`; `None` if there is none.
        length (`int`, *optional*): of the value; `None` if it is cut into fragments.
        syntax (`str`): transfer syntax UID.
        entry (`Entry`): where the pixels are.
    """

    elements: dict
    dataset: "pydicom.Dataset | None"
    offset: int | None
    length: int | None
    syntax: str
    entry: Entry


def _parse(entry: Entry, context: LoadContext) -> _Header | None:
    """The header of a file, if it is a DICOM file."""
    head = entry.head(HEAD_BYTES)
    if not is_dicom(head):
        return None
    syntax, start = _file_meta(head)
    if syntax == DEFLATED:
        inflated = InflatedEntry(entry, start)
        return _Header(*_read(inflated.head(MAX_DEFLATED_HEADER), 0, syntax), syntax, inflated)
    header = _Header(*_read(head, start, syntax), syntax, entry)
    if header.offset is None and entry.size > len(head):
        context.claim(entry.size, entry.name)
        header = _Header(*_read(entry.read(), start, syntax), syntax, entry)
    header.syntax = header.syntax or NATIVE_SYNTAXES[1]  # not stated: then pixels are not compressed
    if header.offset is not None and header.length is not None:
        header.length = min(header.length, entry.size - header.offset)  # a truncated file promises more than it holds
    return header


def _read(content: bytes, start: int, syntax: str) -> tuple[dict, Any, int | None, int | None]:
    """Elements and dataset up to the pixel data, and offset and length of its value."""
    found = _scan(content, start, syntax)
    if found is not None:
        return found
    file = BytesIO(content)
    file.seek(start)
    try:
        with _quiet_pydicom():
            dataset = read_dataset(
                file,
                syntax in ("", NATIVE_SYNTAXES[0]),  # implicit VR; where this is wrong pydicom finds out
                syntax != NATIVE_SYNTAXES[2],
                stop_when=lambda tag, vr, length: tag in _PIXEL_TAGS,
                specific_tags=_TAGS,
            )
    except Exception as error:  # pydicom raises nearly every kind on damaged headers, RecursionError included
        raise _BadValue(f"the header cannot be read ({type(error).__name__})") from error
    elements = _layer(dataset)
    implicit, little = dataset.original_encoding
    order = "<" if little else ">"
    element = file.read(12)
    if len(element) < 12:
        return elements, dataset, None, None
    group, number, vr, _, length = struct.unpack(f"{order}HH2sHL", element)
    tag, position = group << 16 | number, file.tell()
    if tag not in _PIXEL_TAGS:
        return elements, dataset, None, None
    if implicit:
        (length,) = struct.unpack_from(f"{order}L", element, 4)
        position -= 4
    return elements, dataset, *_pixel_data(tag, position, vr, length, implicit)


def _scan(content: bytes, start: int, syntax: str) -> tuple[dict, None, int, int | None] | None:
    """What `_read` gives, for the plain header that nearly every slice has, in a quarter of the time.

    `None` for everything else: big endian, elements of undefined length, functional groups, and whatever is not in
    order. pydicom then has the word.
    """
    if syntax == NATIVE_SYNTAXES[2]:
        return None
    implicit = syntax == NATIVE_SYNTAXES[0]
    elements: dict[int, _Raw] = {}
    position, last = start, 0
    while position + 12 <= len(content):
        group, number, vr, length, long_length = _ELEMENT.unpack_from(content, position)
        tag = group << 16 | number
        position += 8
        if implicit:
            (length,) = _LENGTH.unpack_from(content, position - 4)
        elif vr in _LONG_VRS:
            length = long_length
            position += 4
        elif vr not in _SHORT_VRS:
            return None
        if tag in _PIXEL_TAGS:
            return elements, None, *_pixel_data(tag, position, vr, length, implicit)
        if tag <= last or length == _UNDEFINED or tag in (_SHARED_GROUPS, _FRAME_GROUPS):
            return None
        if tag in _WANTED:
            elements[tag] = _Raw(content[position : position + length], True)
        position += length
        last = tag
    return None


def _pixel_data(tag: int, position: int, vr: bytes, length: int, implicit: bool) -> tuple[int, int | None]:
    """Offset and length of the pixel data's value, if its element is one that holds whole numbers."""
    if tag != _PIXEL_DATA:
        raise _BadValue("pixels are floating-point numbers (a parametric map?)")
    if not implicit and vr not in (b"OB", b"OW", b"UN"):
        raise _BadValue("pixels are neither bytes nor words")
    return position, None if length == _UNDEFINED else length


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


def _take_apart(dataset) -> _Header:
    """The header of a pydicom dataset in memory."""
    meta = getattr(dataset, "file_meta", None)  # only datasets that come from a file have one
    syntax = str(meta.get("TransferSyntaxUID", "")) if meta is not None else ""
    if not syntax:
        syntax = NATIVE_SYNTAXES[2] if dataset.original_encoding[1] is False else NATIVE_SYNTAXES[1]
    if syntax == DEFLATED:  # pydicom has inflated it
        syntax = NATIVE_SYNTAXES[1]
    pixels = dataset.get_item(_PIXEL_DATA)
    if pixels is None or not isinstance(pixels.value, bytes):
        return _Header(_layer(dataset), dataset, None, None, syntax, BytesEntry("a dataset", b""))
    length = len(pixels.value) if syntax in NATIVE_SYNTAXES else None
    entry = BytesEntry("a dataset", memoryview(pixels.value))
    return _Header(_layer(dataset), dataset, 0, length, syntax, entry)


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
    if dataset is None or tag not in dataset:
        return []
    try:
        with _quiet_pydicom():
            items = list(dataset[tag].value)
    except Exception as error:  # as in `_read_header`
        raise _BadValue(f"{_keyword(tag)} cannot be read ({type(error).__name__})") from error
    if not all(map(is_dataset, items)):
        raise _BadValue(f"{_keyword(tag)} is no sequence")
    return items


def _frames(header: _Header) -> list[Frame]:
    """Reads one image's header."""
    num_frames = _Elements([header.elements]).integer(_NUM_FRAMES, 1)
    shared = _group_layer(_sequence(header.dataset, _SHARED_GROUPS))
    per_frame = _sequence(header.dataset, _FRAME_GROUPS)
    if num_frames < 1 or (per_frame and len(per_frame) != num_frames):
        raise _BadValue(f"{num_frames} frames, but geometry for {len(per_frame)}")
    if num_frames > 1 and not per_frame:
        raise _BadValue(f"{num_frames} frames without a position for each")
    if num_frames > 1 and header.syntax == DEFLATED:
        raise _BadValue("several frames in the deflated transfer syntax, which is not supported")
    return [
        _frame(
            _Elements([_group_layer(per_frame[number : number + 1]), shared, header.elements]),
            header,
            number,
            num_frames,
        )
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


def _frame(elements: _Elements, header: _Header, number: int, num_frames: int) -> Frame:
    rows, columns = elements.integer(_ROWS, 0), elements.integer(_COLUMNS, 0)
    bits_allocated = elements.integer(_BITS_ALLOCATED, 16)
    bits_stored = elements.integer(_BITS_STORED, bits_allocated)
    high_bit = elements.integer(_HIGH_BIT, bits_stored - 1)
    signed = elements.integer(_SIGNED, 0)
    if min(rows, columns) < 1:
        raise _BadValue(f"{rows} x {columns} pixels")
    whole_bytes = bits_allocated in (8, 16, 32)
    if not whole_bytes or not 1 <= bits_stored <= high_bit + 1 <= bits_allocated or signed not in (0, 1):
        raise _BadValue(f"{bits_stored} bits up to bit {high_bit} of {bits_allocated}, sign {signed}")
    slope, intercept = elements.number(_SLOPE, 1.0), elements.number(_INTERCEPT, 0.0)
    if slope == 0 or abs(slope) > 1e6 or abs(intercept) > 1e9:
        raise _BadValue(f"rescale slope {slope:g}, intercept {intercept:g}")
    pixels = PixelLayout(
        entry=header.entry,
        offset=header.offset,
        frame=number,
        num_frames=num_frames,
        syntax=header.syntax,
        rows=rows,
        columns=columns,
        bits_allocated=bits_allocated,
        bits_stored=bits_stored,
        high_bit=high_bit,
        signed=bool(signed),
        slope=slope,
        intercept=intercept,
        padding=_padding_range(elements, bool(signed), slope, intercept),
    )
    if pixels.native and (header.length or 0) < num_frames * pixels.native_bytes:
        raise _BadValue(f"{header.length or 0} bytes of pixels where {num_frames * pixels.native_bytes} are needed")

    position, orientation = elements.numbers(_POSITION, 3), elements.numbers(_ORIENTATION, 6)
    spacing = elements.numbers(_PIXEL_SPACING, 2)
    if position is not None and max(map(abs, position)) > MAX_COORDINATE:
        raise _BadValue("ImagePositionPatient is far outside of any scanner")
    if spacing is not None and not (1 / MAX_COORDINATE < min(spacing) and max(spacing) < MAX_COORDINATE):
        raise _BadValue(f"pixel spacing {spacing[0]:g} x {spacing[1]:g} mm")
    instance = elements.text(_SOP_INSTANCE)
    placed = None not in (position, orientation, spacing)
    return Frame(
        pixels=pixels,
        position=np.array(position) if placed else None,
        orientation=_unit_axes(orientation) if placed else None,
        pixel_spacing=spacing if placed else None,
        thickness=elements.number(_THICKNESS),
        step=elements.number(_STEP),
        series=elements.text(_SERIES),
        instance=f"{instance} {number}" if instance else "",
        series_number=re.sub(r"[^0-9-]", "", elements.text(_SERIES_NUMBER))[:16],
        modality=re.sub(r"[^A-Z]", "", elements.text(_MODALITY))[:16],
        kernel=re.sub(r"[^A-Za-z0-9+_. -]", "", elements.text(_KERNEL))[:16],
        rescale_type=elements.text(_RESCALE_TYPE),
        scout="LOCALIZER" in elements.texts(_IMAGE_TYPE) or "LOCALIZER" in elements.texts(_FRAME_TYPE),
        colour=elements.integer(_SAMPLES, 1) != 1
        or elements.text(_PHOTOMETRIC) not in ("MONOCHROME1", "MONOCHROME2", ""),
        has_lut=elements.element(_MODALITY_LUT) is not None,
        times=tuple("".join(map(elements.text, tags)) for tags in _TIMES),
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


def _padding_range(elements: _Elements, signed: bool, slope: float, intercept: float) -> tuple[int, int] | None:
    """Stored values that mean "nothing measured", unless they could be tissue."""
    value = elements.integer(_PADDING, None, signed)
    if value is None:
        return None
    limit = elements.integer(_PADDING_LIMIT, value, signed)
    low, high = min(value, limit), max(value, limit)
    could_be_tissue = any(POSSIBLE_HU[0] <= end * slope + intercept <= POSSIBLE_HU[1] for end in (low, high))
    return None if could_be_tissue else (low, high)
