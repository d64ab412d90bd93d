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
"""DICOM: from a heap of files to one stack of slices.

- Every frame of every file gives a `Frame`: geometry, rescale, and where its pixels are. Enhanced multi-frame files
  give theirs from the functional groups.
- Frames are sorted into stacks: one series, one plane, one size, one point in time. Scouts and pictures are left out.
- The stack that is asked for is put in order along the normal of its plane, by position alone: file names, instance
  numbers, SliceThickness and the tilt tag are not geometry.
- Slices that stand beside each other (gantry tilt) are shifted back, uneven steps are resampled, both with a warning.
"""

import math
import re
import struct
import threading
import warnings
from collections import Counter
from dataclasses import dataclass, field
from io import BytesIO

import numpy as np

from .volume_ct_moe import LoadContext, StoredVolume
from .volume_dicom_pixels_ct_moe import DEFLATED, KNOWN_SYNTAXES, NATIVE_SYNTAXES, PixelLayout, read_frames
from .volume_files_ct_moe import READ_ERRORS, BytesEntry, Entry, InflatedEntry
from .volume_geometry_ct_moe import MAX_TILT_DEG, SHEAR_TOLERANCE_DEG, resample_slices, straighten


try:
    import pydicom
    from pydicom.filereader import read_dataset
except ImportError:
    pydicom = read_dataset = None


# Steps between slices that differ by more than this factor leave gaps that no interpolation should hide.
MAX_STEP_RATIO = 3.0

# Positions are often written with one or two decimals; what deviates less than this share of a step is even.
STEP_TOLERANCE = 0.1

# A declared padding value in this range of HU could be tissue: it is then left alone.
POSSIBLE_HU = (-1000, 4096)

# The header of almost every slice fits in here, so that its pixels are not read twice.
HEAD_BYTES = 1 << 16

# An inflated header has to end somewhere.
MAX_DEFLATED_HEADER = 1 << 22

# Series that an error lists.
MAX_LISTED = 20

_PIXEL_TAGS = (0x7FE00010, 0x7FE00009, 0x7FE00008)
_IMAGE_TYPE, _SOP_INSTANCE, _MODALITY, _SERIES = 0x00080008, 0x00080018, 0x00080060, 0x0020000E
_SERIES_NUMBER, _ACQUISITION_NUMBER, _TEMPORAL_POSITION = 0x00200011, 0x00200012, 0x00200100
_ACQUISITION_DATE, _ACQUISITION_TIME, _CONTENT_TIME = 0x00080022, 0x00080032, 0x00080033
_POSITION, _ORIENTATION, _PIXEL_SPACING = 0x00200032, 0x00200037, 0x00280030
_THICKNESS, _SPACING_BETWEEN, _KERNEL = 0x00180050, 0x00180088, 0x00181210
_SAMPLES, _PHOTOMETRIC, _NUM_FRAMES, _ROWS, _COLUMNS = 0x00280002, 0x00280004, 0x00280008, 0x00280010, 0x00280011
_BITS_ALLOCATED, _BITS_STORED, _HIGH_BIT, _SIGNED = 0x00280100, 0x00280101, 0x00280102, 0x00280103
_PADDING, _PADDING_LIMIT = 0x00280120, 0x00280121
_INTERCEPT, _SLOPE, _RESCALE_TYPE, _MODALITY_LUT = 0x00281052, 0x00281053, 0x00281054, 0x00283000
_SHARED_GROUPS, _FRAME_GROUPS = 0x52009229, 0x52009230
_TAGS = [value for name, value in list(globals().items()) if re.fullmatch(r"_[A-Z_]+", name) and type(value) is int]

# The macros of an enhanced file that hold what a plain file has at its top, and the tags read from each.
_MACROS = {
    0x00209113: [_POSITION],
    0x00209116: [_ORIENTATION],
    0x00289110: [_PIXEL_SPACING, _THICKNESS, _SPACING_BETWEEN],
    0x00289145: [_INTERCEPT, _SLOPE, _RESCALE_TYPE],
}
_FRAME_CONTENT, _STACK_ID, _TEMPORAL_INDEX, _FRAME_ACQUISITION = 0x00209111, 0x00209056, 0x00209128, 0x00209156
_FRAME_TYPE_MACRO, _FRAME_TYPE = 0x00189329, 0x00089007

# What tells points in time (or phases, or reconstructions) of one series apart, the most explicit first.
_TIMES = ((_TEMPORAL_POSITION,), (_ACQUISITION_NUMBER,), (_ACQUISITION_DATE, _ACQUISITION_TIME), (_CONTENT_TIME,))

# pydicom warns through the process-wide filters, which threads must not swap at the same time.
_PYDICOM_LOCK = threading.Lock()


@dataclass
class Frame:
    """One slice: what places it, what it belongs to, and where its pixels are."""

    pixels: PixelLayout
    position: np.ndarray | None  # (3,) LPS mm of the first pixel's centre
    orientation: np.ndarray | None  # (2, 3) unit vectors: along a row, down a column
    pixel_spacing: tuple[float, float] | None  # mm between rows, between columns
    thickness: float | None
    step: float | None
    series: str
    series_number: str
    modality: str
    kernel: str
    rescale_type: str
    scout: bool
    colour: bool
    has_lut: bool
    times: tuple
    instance: str


@dataclass
class Stack:
    """Frames of one series in one plane and size."""

    frames: list[Frame] = field(default_factory=list)

    @property
    def normal(self) -> np.ndarray:
        return np.cross(*self.frames[0].orientation)

    def along(self) -> np.ndarray:
        """Position of each frame along the normal, in mm."""
        return np.array([frame.position for frame in self.frames]) @ self.normal

    def sort(self) -> None:
        self.frames = [self.frames[index] for index in np.argsort(self.along(), kind="stable")]

    def __str__(self) -> str:
        first = self.frames[0]
        along = np.sort(self.along())
        step = f", {(along[-1] - along[0]) / (len(along) - 1):.4g} mm apart" if len(along) > 1 else ""
        plane = ("sagittal", "coronal", "axial")[int(np.abs(self.normal).argmax())]
        kernel = f", kernel {first.kernel}" if first.kernel else ""
        number = f"series number {first.series_number}, " if first.series_number else ""
        size = f"{first.pixels.rows} x {first.pixels.columns}"
        return f"{number}{plane}, {len(along)} slice{'s' * (len(along) > 1)} of {size}{step}{kernel}"


def is_dicom(start: bytes) -> bool:
    """Whether a file that starts so is DICOM: the magic word, or an element that files without it begin with."""
    return start[128:132] == b"DICM" or (start[:2] in (b"\x02\0", b"\x08\0") and start[2] <= 0x18 and start[3] == 0)


def is_dataset(source) -> bool:
    """Whether this is a pydicom dataset."""
    return pydicom is not None and isinstance(source, pydicom.Dataset)


def read_dicom(
    sources: list, context: LoadContext, series: int | str | None, padding: str, strict: bool
) -> StoredVolume:
    """Reads one stack out of DICOM files.

    Args:
        sources (`list` of `Entry` or pydicom datasets): in any order.
        context (`LoadContext`): limits and findings.
        series (`int` or `str`, *optional*): which stack, if there are several: its number in the list that the error
            gives, from 1, or its SeriesInstanceUID.
        padding (`str`): "air" or "keep".
        strict (`bool`): whether each source was named by the caller, so that none may be anything but an image.
    """
    if pydicom is None:
        raise context.error(
            "DICOM is read with pydicom, which is not installed", "Run `pip install pydicom imagecodecs`"
        )
    frames, others = [], 0
    for source in sources:
        found = _frames_of(source, context)
        others += not found
        if strict and not found:
            raise context.error(f"{_name(source)} holds no image", "Pass image files only")
        frames += found
    if not frames:
        raise context.error("no DICOM image", "Pass a folder, zip or list of the slices of one CT series")

    left_out = {"scouts": sum(frame.scout for frame in frames), "other_objects": others}
    slices = [frame for frame in frames if not frame.scout]
    if not slices:
        raise context.error("only scouts (localizers), no slices", "Pass the series itself")
    placed = [frame for frame in slices if frame.position is not None and not frame.colour]
    if not placed:
        if all(frame.colour for frame in slices):
            raise context.error("the images are colour pictures", "Pass the CT series, not pictures made from it")
        raise context.error("the images have no position or orientation in the patient", "Pass the original series")
    left_out["pictures"] = len(slices) - len(placed)
    stack = _choose(_stacks(placed, context), series, context)
    volume = _assemble(stack, context, padding)
    volume.facts["left_out"] = {what: count for what, count in left_out.items() if count}
    return volume


def _name(source) -> str:
    return source.name if isinstance(source, Entry) else "a dataset"


# -- one file ---------------------------------------------------------------------------------------------------------


def _frames_of(source, context: LoadContext) -> list[Frame]:
    """The frames of one file or dataset; none if it is no image."""
    name = _name(source)
    damaged = "The file is damaged: copy or export it again"
    try:
        if isinstance(source, Entry):
            dataset, syntax, entry, offset, length = _parse(source, context)
        else:
            dataset, syntax, entry, offset, length = _take_apart(source)
        if dataset is None or dataset.get_item(_ROWS) is None:
            return []
        if offset is None:
            raise context.error(f"{name}: an image without pixels", damaged)
        return _frames(dataset, syntax, entry, offset, length, context)
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
        with _PYDICOM_LOCK, warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(pydicom\b|.*volume_dicom_ct_moe)")
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
    if (group << 16 | number) not in _PIXEL_TAGS:
        return dataset, None, None
    if group << 16 | number != _PIXEL_TAGS[0]:
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


def _take_apart(dataset):
    """A pydicom dataset in memory, as `_parse` gives a file."""
    meta = getattr(dataset, "file_meta", None)  # only datasets that come from a file have one
    syntax = str(meta.get("TransferSyntaxUID", "")) if meta is not None else ""
    if not syntax:
        syntax = NATIVE_SYNTAXES[2] if dataset.original_encoding[1] is False else NATIVE_SYNTAXES[1]
    if syntax == DEFLATED:  # pydicom has inflated it
        syntax = NATIVE_SYNTAXES[1]
    pixels = dataset.get_item(_PIXEL_TAGS[0])
    if pixels is None or not isinstance(pixels.value, bytes):
        return dataset, syntax, None, None, None
    length = len(pixels.value) if syntax in NATIVE_SYNTAXES else None
    return dataset, syntax, BytesEntry("a dataset", memoryview(pixels.value)), 0, length


# -- values -----------------------------------------------------------------------------------------------------------


class _BadValue(Exception):
    """A value in a header that makes no sense; its text never quotes the value of a text tag."""


def _item(datasets, tag: int):
    """The first dataset's element for a tag, unconverted."""
    for dataset in datasets:
        element = dataset.get_item(tag)
        if element is not None and element.value not in (None, b"", ""):
            return element
    return None


def _texts(datasets, tag: int) -> list[str]:
    """The parts of a text value; a file's raw bytes and pydicom's converted values look the same afterwards."""
    element = _item(datasets, tag)
    if element is None:
        return []
    value = element.value
    if isinstance(value, bytes):
        value = value.decode("ascii", "replace")
    if isinstance(value, str):
        value = value.split("\\")
    elif not isinstance(value, (list, tuple)) and not hasattr(value, "__iter__"):
        value = [value]
    return [str(part).strip("\0 ") for part in value]


def _text(datasets, tag: int) -> str:
    return "\\".join(_texts(datasets, tag))


def _numbers(datasets, tag: int, count: int) -> list[float] | None:
    """Decimal strings (or floats of a dataset in memory) as finite numbers; `None` if the tag is not there."""
    texts = _texts(datasets, tag)
    if not any(texts):
        return None
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        numbers = []
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise _BadValue(f"{pydicom.datadict.keyword_for_tag(tag)} is not {count} number{'s' * (count > 1)}")
    return numbers


def _number(datasets, tag: int, default: float | None) -> float | None:
    numbers = _numbers(datasets, tag, 1)
    return default if numbers is None else numbers[0]


def _integer(datasets, tag: int, default: int | None = None, signed: bool = False) -> int | None:
    """A 16-bit binary value (US or SS, read as `signed` says), or an integer string."""
    element = _item(datasets, tag)
    if element is None:
        return default
    value = element.value
    if isinstance(value, bytes) and len(value) == 2 and tag != _NUM_FRAMES:
        order = "<" if element.is_little_endian else ">"
        return struct.unpack(f"{order}{'h' if signed else 'H'}", value)[0]
    try:
        number = int(_texts(datasets, tag)[0])
    except (ValueError, IndexError) as error:
        raise _BadValue(f"{pydicom.datadict.keyword_for_tag(tag)} is not an integer") from error
    if signed and 32768 <= number <= 65535:
        number -= 65536
    return number


def _sequence(datasets, tag: int) -> list:
    """The items of a sequence."""
    for dataset in datasets:
        if dataset.get_item(tag) is not None:
            try:
                with _PYDICOM_LOCK, warnings.catch_warnings():
                    warnings.filterwarnings("ignore", module=r"(pydicom\b|.*volume_dicom_ct_moe)")
                    items = list(dataset[tag].value)
            except Exception as error:  # as in `_read_header`
                raise _BadValue(f"a sequence cannot be read ({type(error).__name__})") from error
            if all(isinstance(item, pydicom.Dataset) for item in items):
                return items
    return []


def _frames(dataset, syntax: str, entry: Entry, offset: int, length: int | None, context: LoadContext) -> list[Frame]:
    """Reads one image's header."""
    top = [dataset]
    num_frames = _integer(top, _NUM_FRAMES, 1)
    shared = _sequence(top, _SHARED_GROUPS)
    per_frame = _sequence(top, _FRAME_GROUPS)
    if num_frames < 1 or (per_frame and len(per_frame) != num_frames):
        raise _BadValue(f"{num_frames} frames, but geometry for {len(per_frame)}")
    if num_frames > 1 and not per_frame:
        raise _BadValue(f"{num_frames} frames without a position for each")
    return [
        _frame(top, per_frame[number : number + 1] + shared, number, num_frames, syntax, entry, offset, length)
        for number in range(num_frames)
    ]


def _frame(top, groups, number, num_frames, syntax, entry, offset, length) -> Frame:
    """Reads one frame: what its functional groups hold counts before what the file holds."""
    macros = {tag: [*_items_of(groups, macro), *top] for macro, tags in _MACROS.items() for tag in tags}
    content = [*_items_of(groups, _FRAME_CONTENT), *top]
    frame_type = _texts([*_items_of(groups, _FRAME_TYPE_MACRO)], _FRAME_TYPE)

    rows, columns = _integer(top, _ROWS), _integer(top, _COLUMNS)
    bits_allocated = _integer(top, _BITS_ALLOCATED, 16)
    bits_stored = _integer(top, _BITS_STORED, bits_allocated)
    high_bit = _integer(top, _HIGH_BIT, bits_stored - 1)
    signed = _integer(top, _SIGNED, 0)
    if not rows or not columns or min(rows, columns) < 1:
        raise _BadValue(f"{rows} x {columns} pixels")
    if (
        bits_allocated not in (8, 16, 32)
        or not 1 <= bits_stored <= high_bit + 1 <= bits_allocated
        or signed not in (0, 1)
    ):
        raise _BadValue(f"{bits_stored} bits up to bit {high_bit} of {bits_allocated}, sign {signed}")
    slope = _number(macros[_SLOPE], _SLOPE, 1.0)
    intercept = _number(macros[_INTERCEPT], _INTERCEPT, 0.0)
    if slope == 0 or abs(slope) > 1e6 or abs(intercept) > 1e9:
        raise _BadValue(f"rescale slope {slope:g}, intercept {intercept:g}")
    pixels = PixelLayout(
        entry, offset, number, num_frames, syntax, rows, columns, bits_allocated, bits_stored, high_bit, bool(signed),
        slope, intercept, _padding_range(top, bool(signed), slope, intercept),
    )  # fmt: skip
    if pixels.native and (length is None or length < num_frames * pixels.native_bytes):
        raise _BadValue(f"{length or 0} bytes of pixels where {num_frames * pixels.native_bytes} are needed")
    if syntax == DEFLATED and num_frames > 1:
        raise _BadValue("several frames in the deflated transfer syntax, which is not supported")

    position = _numbers(macros[_POSITION], _POSITION, 3)
    orientation = _numbers(macros[_ORIENTATION], _ORIENTATION, 6)
    spacing = _numbers(macros[_PIXEL_SPACING], _PIXEL_SPACING, 2)
    if spacing is not None and min(spacing) <= 0:
        raise _BadValue(f"pixel spacing {spacing[0]:g} x {spacing[1]:g} mm")
    placed = position is not None and orientation is not None and spacing is not None
    return Frame(
        pixels=pixels,
        position=np.array(position) if placed else None,
        orientation=_unit_axes(orientation) if placed else None,
        pixel_spacing=tuple(spacing) if placed else None,
        thickness=_number(macros[_THICKNESS], _THICKNESS, None),
        step=_number(macros[_SPACING_BETWEEN], _SPACING_BETWEEN, None),
        series=_text(top, _SERIES),
        series_number=re.sub(r"[^0-9-]", "", _text(top, _SERIES_NUMBER)),
        modality=re.sub(r"[^A-Z]", "", _text(top, _MODALITY))[:16],
        kernel=re.sub(r"[^A-Za-z0-9+_. -]", "", _text(top, _KERNEL))[:16],
        rescale_type=_text(macros[_RESCALE_TYPE], _RESCALE_TYPE),
        scout="LOCALIZER" in (*_texts(top, _IMAGE_TYPE), *frame_type),
        colour=_integer(top, _SAMPLES, 1) != 1 or _text(top, _PHOTOMETRIC) not in ("MONOCHROME1", "MONOCHROME2", ""),
        has_lut=_item(top, _MODALITY_LUT) is not None,
        times=(
            *("".join(_text(top, tag) for tag in tags) for tags in _TIMES),
            *(_text(content, tag) for tag in (_STACK_ID, _TEMPORAL_INDEX, _FRAME_ACQUISITION)),
        ),
        instance=_text(top, _SOP_INSTANCE) + (f" {number}" if num_frames > 1 else ""),
    )


def _items_of(groups: list, macro: int) -> list:
    return [item for group in groups for item in _sequence([group], macro)]


def _unit_axes(orientation: list[float]) -> np.ndarray:
    """Row and column direction, made exactly perpendicular: they are written with few decimals."""
    axes = np.array(orientation).reshape(2, 3)
    lengths = np.linalg.norm(axes, axis=1)
    if not (np.abs(lengths - 1) < 0.05).all() or abs(axes[0] @ axes[1]) > 0.05:
        raise _BadValue("ImageOrientationPatient is not two perpendicular directions")
    row = axes[0] / lengths[0]
    column = axes[1] - (axes[1] @ row) * row
    return np.array([row, column / np.linalg.norm(column)])


def _padding_range(top, signed: bool, slope: float, intercept: float) -> tuple[int, int] | None:
    """Stored values that mean "nothing measured", unless they could be tissue."""
    value = _integer(top, _PADDING, None, signed)
    if value is None:
        return None
    limit = _integer(top, _PADDING_LIMIT, value, signed)
    low, high = min(value, limit), max(value, limit)
    could_be_tissue = any(POSSIBLE_HU[0] <= end * slope + intercept <= POSSIBLE_HU[1] for end in (low, high))
    return None if could_be_tissue else (low, high)


# -- stacks -----------------------------------------------------------------------------------------------------------


def _stacks(frames: list[Frame], context: LoadContext) -> list[Stack]:
    """Sorts frames into stacks, in a fixed order."""
    stacks: list[Stack] = []
    for frame in frames:
        for stack in reversed(stacks):
            if _same_plane(stack.frames[0], frame):
                stack.frames.append(frame)
                break
        else:
            stacks.append(Stack([frame]))
    split = [part for stack in stacks for part in _split_times(stack, context)]
    for stack in split:
        stack.sort()

    def order(stack: Stack):
        first = stack.frames[0]
        return _natural(first.series_number), first.series, [_natural(time) for time in first.times]

    return sorted(split, key=order)


def _natural(text: str) -> tuple[float, str]:
    """Sorts numbers as numbers, before other texts."""
    try:
        return float(text), ""
    except ValueError:
        return math.inf, text


def _same_plane(first: Frame, second: Frame) -> bool:
    return (
        first.series == second.series
        and (first.pixels.rows, first.pixels.columns) == (second.pixels.rows, second.pixels.columns)
        and np.abs(first.orientation - second.orientation).max() < 1e-3
        and np.allclose(first.pixel_spacing, second.pixel_spacing, rtol=1e-3)
    )


def _split_times(stack: Stack, context: LoadContext) -> list[Stack]:
    """Takes copies out, and a stack with several slices at a place apart by what tells these slices apart."""
    unique = list({frame.instance or id(frame): frame for frame in stack.frames}.values())
    if len(unique) < len(stack.frames):
        context.warn(f"{len(stack.frames) - len(unique)} files were there twice")
        stack = Stack(unique)
    if not _places_repeat(stack):
        return [stack]
    for index in range(len(stack.frames[0].times)):
        parts: dict = {}
        for frame in stack.frames:
            parts.setdefault(frame.times[index], Stack()).frames.append(frame)
        if len(parts) > 1 and not any(map(_places_repeat, parts.values())):
            return list(parts.values())
    count = Counter(np.round(stack.along(), 2).tolist()).most_common(1)[0][1]
    raise context.error(
        f"{count} slices lie at the same position and nothing tells them apart ({stack})",
        "Pass the files of one volume: this is a repeated scan of one place, or several reconstructions in one series",
    )


def _places_repeat(stack: Stack) -> bool:
    along = np.sort(stack.along())
    return bool((np.diff(along) < 1e-2).any())


def _choose(stacks: list[Stack], series: int | str | None, context: LoadContext) -> Stack:
    chosen = stacks
    if isinstance(series, str):
        chosen = [stack for stack in stacks if stack.frames[0].series == series]
    elif series is not None:
        chosen = stacks[series - 1 : series] if series > 0 else []
    if len(chosen) == 1:
        return chosen[0]
    listed = "; ".join(f"[{stacks.index(stack) + 1}] {stack}" for stack in (chosen or stacks)[:MAX_LISTED])
    if len(chosen or stacks) > MAX_LISTED:
        listed += "; ..."
    what = (
        f"{len(stacks)} series or points in time"
        if series is None
        else f"{len(chosen)} series match series={series!r}"
    )
    raise context.error(f"{what}: {listed}", "Choose one by its number in this list: series=1")


# -- the volume -------------------------------------------------------------------------------------------------------


def _assemble(stack: Stack, context: LoadContext, padding: str) -> StoredVolume:
    """Checks the stack's geometry, then reads its pixels."""
    frames = stack.frames
    first = frames[0]
    _check_kind(frames, context)
    along, normal = stack.along(), stack.normal
    positions = np.array([frame.position for frame in frames])
    if len(frames) == 1:
        thickness = first.thickness or abs(first.step or 0)
        if not thickness > 0:
            raise context.error("a single slice without a thickness", "Pass the whole series")
        context.warn(f"a single slice; its thickness of {thickness:g} mm was taken as the spacing")
        step, even = thickness, True
    else:
        step, even = _step(along, context)

    # What remains of each slice's offset from the first one when the part along the normal is taken away: with a
    # tilted gantry it grows evenly.
    heights = along - along[0]
    beside = positions - positions[0] - np.outer(heights, normal)
    slope = heights @ beside / (heights @ heights) if len(frames) > 1 else np.zeros(3)
    tilt = float(np.degrees(np.arctan(np.linalg.norm(slope))))
    uneven = float(np.abs(beside - np.outer(heights, slope)).max()) > min(first.pixel_spacing)
    if tilt > MAX_TILT_DEG:
        raise context.error(f"slices are sheared by {tilt:.0f} degrees", "Check the geometry: no gantry tilts so far")
    if uneven:
        context.doubt("slices are shifted against each other in their plane", "Pass slices of one scan")

    voxels, padded = read_frames([frame.pixels for frame in frames], context, padding)
    origin = positions[0]
    rows_mm, columns_mm = first.pixel_spacing
    row, column = first.orientation
    if tilt > SHEAR_TOLERANCE_DEG or uneven:
        context.warn(f"gantry tilt of {tilt:.1f} degrees: slices were shifted in their plane to stand on each other")
        offsets = np.stack([beside @ column / rows_mm, beside @ row / columns_mm], axis=1)
        voxels, start = straighten(voxels, offsets, context)
        origin = origin + column * rows_mm * start[0] + row * columns_mm * start[1]
    if not even:
        count = int((along[-1] - along[0]) / step + 1.01)
        context.claim(count * voxels[0].nbytes + voxels.nbytes, "the resampled volume")
        voxels = resample_slices(voxels, along, step)

    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = row * columns_mm, column * rows_mm, normal * step
    affine[:3, 3] = origin
    rescales = {(frame.pixels.slope, frame.pixels.intercept) for frame in frames}
    facts = {
        "format": "dicom",
        "stored_shape": [first.pixels.columns, first.pixels.rows, len(frames)],
        "stored_dtype": first.pixels.dtype.newbyteorder("=").name,
        "rescale": list(rescales.pop()) if len(rescales) == 1 else "per slice",
        "modality": first.modality,
        "kernel": first.kernel,
        "slice_thickness_mm": first.thickness,
        "transfer_syntax": first.pixels.syntax,
        "padding_voxels": padded,
    }
    return StoredVolume(voxels, affine, facts)


def _check_kind(frames: list[Frame], context: LoadContext) -> None:
    """Is it CT, in HU, in a transfer syntax that can be read?"""
    for frame in frames:
        if frame.pixels.syntax and frame.pixels.syntax not in KNOWN_SYNTAXES:
            known = re.fullmatch(r"[0-9.]{1,64}", frame.pixels.syntax)
            name = pydicom.uid.UID(frame.pixels.syntax).name if known else "an invalid UID"
            raise context.error(
                f"transfer syntax {name} is not supported", "Convert the series to Explicit VR Little Endian"
            )
        if frame.has_lut:
            raise context.error(
                "values are mapped by a table instead of a rescale", "Export the series with HU values"
            )
    modalities = {frame.modality for frame in frames} - {"", "CT"}
    if modalities and context.intensity == "hu":
        context.doubt(f"modality {', '.join(sorted(modalities))}, not CT", 'For grey values pass intensity="display"')
    types = {frame.rescale_type for frame in frames} - {"", "HU", "US", "HU_MOD"}
    if types and context.intensity == "hu":
        context.doubt("the rescale type is not HU (a spectral map?)", 'For grey values pass intensity="display"')


def _step(along: np.ndarray, context: LoadContext) -> tuple[float, bool]:
    """Millimetres between slices of the volume, and whether the slices lie there already."""
    steps = np.diff(along)
    mean = (along[-1] - along[0]) / len(steps)
    off_grid = np.abs(along - along[0] - mean * np.arange(len(along))).max()
    if off_grid <= STEP_TOLERANCE * mean:
        return float(mean), True
    median = float(np.median(steps))
    finding = f"steps between slices from {steps.min():.4g} to {steps.max():.4g} mm"
    if steps.max() > MAX_STEP_RATIO * steps.min():
        context.doubt(
            f"{finding}: slices are missing, or two scans are mixed", "Pass the complete, evenly spaced series"
        )
    context.warn(f"{finding}; slices were interpolated to {median:.4g} mm")
    return median, False
