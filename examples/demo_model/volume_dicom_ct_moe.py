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

- Frames are sorted into stacks: one series, one plane, one size, one point in time. Scouts and pictures are left out.
- The stack that is asked for is put in order along the normal of its plane, by position alone: file names, instance
  numbers, SliceThickness and the tilt tag are not geometry.
- Slices that stand beside each other (gantry tilt) are shifted back, uneven steps are resampled, both with a warning.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from .volume_ct_moe import LoadContext, StoredVolume
from .volume_dicom_header_ct_moe import Frame, read_header, source_name
from .volume_dicom_pixels_ct_moe import KNOWN_SYNTAXES, read_frames
from .volume_geometry_ct_moe import MAX_TILT_DEG, SHEAR_TOLERANCE_DEG, resample_slices, straighten


# Steps between slices that differ by more than this factor leave gaps that no interpolation should hide.
MAX_STEP_RATIO = 3.0

# Positions are often written with one or two decimals; what deviates less than this share of a step is even.
STEP_TOLERANCE = 0.1

# Series that an error lists.
MAX_LISTED = 20


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


def read_dicom(sources: list, context: LoadContext, strict: bool) -> StoredVolume:
    """Reads one stack out of DICOM files.

    Args:
        sources (`list` of `Entry` or pydicom datasets): in any order.
        context (`LoadContext`): limits and findings.
        strict (`bool`): whether each source was named by the caller, so that none may be anything but an image.
    """
    frames, others = [], 0
    for source in sources:
        found = read_header(source, context)
        others += not found
        if strict and not found:
            raise context.error(f"{source_name(source)} holds no image", "Pass image files only")
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
    stack = _choose(_stacks(placed, context), context)
    volume = _assemble(stack, context)
    volume.facts["left_out"] = {what: count for what, count in left_out.items() if count}
    return volume


def _stacks(frames: list[Frame], context: LoadContext) -> list[Stack]:
    """Sorts frames into stacks, in a fixed order."""
    series: dict[tuple, list[Stack]] = {}
    for frame in frames:
        alike = series.setdefault((frame.series, frame.pixels.rows, frame.pixels.columns), [])
        stack = next((stack for stack in reversed(alike) if _same_plane(stack.frames[0], frame)), None)
        if stack is None:
            alike.append(stack := Stack())
        stack.frames.append(frame)
    split = [part for alike in series.values() for stack in alike for part in _split_times(stack, context)]
    for stack in split:
        stack.sort()

    def order(stack: Stack):
        first = stack.frames[0]
        times = [_natural(time) for time in first.times]
        return _natural(first.series_number), first.series, -len(stack.frames), times

    return sorted(split, key=order)


def _natural(text: str) -> tuple[float, str]:
    """Sorts numbers as numbers, before other texts."""
    try:
        return float(text), ""
    except ValueError:
        return math.inf, text


def _same_plane(first: Frame, second: Frame) -> bool:
    """Whether direction and pixel size agree, but for the last decimals they were written with."""
    same_axes = first.orientation is second.orientation or np.abs(first.orientation - second.orientation).max() < 1e-3
    return same_axes and all(
        math.isclose(one, two, rel_tol=1e-3) for one, two in zip(first.pixel_spacing, second.pixel_spacing)
    )


def _split_times(stack: Stack, context: LoadContext) -> list[Stack]:
    """Takes copies out, and a stack with several slices at a place apart by what tells these slices apart."""
    # The position belongs to the key: careless anonymisation gives every slice the same instance UID.
    unique = list({(frame.instance or id(frame), *frame.position): frame for frame in stack.frames}.values())
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


def _choose(stacks: list[Stack], context: LoadContext) -> Stack:
    series = context.series
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


def _assemble(stack: Stack, context: LoadContext) -> StoredVolume:
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

    voxels, padded = read_frames([frame.pixels for frame in frames], context)
    origin = positions[0]
    rows_mm, columns_mm = first.pixel_spacing
    row, column = first.orientation
    if tilt > SHEAR_TOLERANCE_DEG:
        context.warn(f"gantry tilt of {tilt:.1f} degrees: slices were shifted in their plane to stand on each other")
    if tilt > SHEAR_TOLERANCE_DEG or uneven:
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
        if frame.pixels.syntax not in KNOWN_SYNTAXES:
            name = re.sub(r"[^0-9.]", "?", frame.pixels.syntax)[:64]
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
