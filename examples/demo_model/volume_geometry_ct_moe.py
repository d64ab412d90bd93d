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
"""Orientation of a stored volume: which file axis is which patient axis, shear, slice spacing.

One rule for every format. The file's axes are permuted and flipped to the *nearest* patient axes (left, posterior,
superior); nothing is resampled for that, so an oblique scan keeps its voxels, its true rotation stays in the affine,
and its spacing is the length of the affine's columns. Only a shear (gantry tilt) and uneven slice steps are resampled,
because no rectangular grid describes them.
"""

from itertools import permutations

import numpy as np

from .volume_ct_moe import AIR_HU, LoadContext, StoredVolume


# An axis further than this from the patient's own is worth a warning: "axial" slices are then visibly oblique.
OBLIQUE_WARN_DEG = 15.0

# Header rounding stays far below this; a gantry tilt is some degrees.
SHEAR_TOLERANCE_DEG = 0.5

# Gantries tilt by 30 degrees at most; what leans further is a mistake.
MAX_TILT_DEG = 45.0

# mm; what is further away from a scanner's centre is not on it, and squares of it overflow.
MAX_COORDINATE = 1e7

# Nothing that is scanned has voxels outside this range, in mm.
SPACING_RANGE_MM = (0.01, 100.0)


def to_lps(stored: StoredVolume, context: LoadContext, reorient: bool) -> tuple[np.ndarray, np.ndarray]:
    """Turns a stored volume to LPS and returns `(voxels, affine)`, the voxels as a view where nothing was sheared.

    With `reorient=False` the stored axes are kept, and the affine is theirs.
    """
    check_affine(stored.affine, context)
    voxels, affine = remove_shear(stored.voxels, stored.affine, context)
    axes, flips, oblique_deg = nearest_axes(affine)
    stored.facts["stored_orientation"] = orientation_codes(affine)
    stored.facts["oblique_deg"] = round(oblique_deg, 2)
    if oblique_deg > OBLIQUE_WARN_DEG:
        context.warn(f"axes are {oblique_deg:.1f} degrees off the patient's: slices are oblique")
    if not reorient:
        return voxels, affine

    to_stored = np.zeros((4, 4))  # index in the new array -> index in the file
    to_stored[3, 3] = 1
    for new, (old, flip) in enumerate(zip(axes, flips)):
        to_stored[old, new] = -1 if flip else 1
        to_stored[old, 3] = voxels.shape[2 - old] - 1 if flip else 0
    voxels = voxels.transpose([2 - axes[2], 2 - axes[1], 2 - axes[0]])
    voxels = voxels[tuple(slice(None, None, -1 if flip else 1) for flip in reversed(flips))]
    return voxels, affine @ to_stored


def spacing_of(affine: np.ndarray) -> tuple[float, float, float]:
    """Voxel size in mm in array order (z, y, x)."""
    return tuple(float(step) for step in np.linalg.norm(affine[:3, :3], axis=0)[::-1])


def nearest_axes(affine: np.ndarray) -> tuple[tuple[int, ...], list[bool], float]:
    """The index axis nearest to each patient axis, whether it runs backwards, and the largest angle between the two.

    Of the six ways to pair the axes, the one with the largest sum of absolute cosines: unlike a greedy choice it does
    not depend on the order of the axes. Exact ties keep the file's order.
    """
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    scores = {axes: round(sum(abs(cosines[w, axes[w]]) for w in range(3)), 6) for axes in permutations(range(3))}
    axes = max(scores, key=scores.get)
    along = [cosines[w, axes[w]] for w in range(3)]
    oblique_deg = float(np.degrees(np.arccos(np.clip(np.abs(along), 0, 1))).max())
    return axes, [bool(cosine < 0) for cosine in along], oblique_deg


def orientation_codes(affine: np.ndarray) -> str:
    """Where each index axis runs to, fastest first: "LPS" is this package's own, "RAS" the most common in NIfTI."""
    axes, flips, _ = nearest_axes(affine)
    codes = [""] * 3
    for world, (axis, flip) in enumerate(zip(axes, flips)):
        codes[axis] = ("RAI" if flip else "LPS")[world]
    return "".join(codes)


def check_numbers(affine: np.ndarray, context: LoadContext) -> None:
    """Refuses an affine with numbers that no arithmetic should be done with."""
    if not (np.isfinite(affine).all() and np.abs(affine).max() < MAX_COORDINATE):
        raise context.error("the affine holds values that are no coordinates", "Repair the header's geometry")


def check_affine(affine: np.ndarray, context: LoadContext) -> None:
    """Refuses an affine that maps the volume to nothing."""
    check_numbers(affine, context)
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    if not (steps > 0).all():
        raise context.error(f"voxel size {_mm(steps)}", "Repair the header: every voxel size must be above zero")
    if abs(np.linalg.det(affine[:3, :3] / steps)) < 1e-3:
        raise context.error("two axes of the affine point the same way", "Repair the header's sform or qform")
    if steps.min() < SPACING_RANGE_MM[0] or steps.max() > SPACING_RANGE_MM[1]:
        context.doubt(f"voxel size {_mm(steps)} is no CT scan's", "Check the unit: millimetres are expected")


def remove_shear(voxels: np.ndarray, affine: np.ndarray, context: LoadContext) -> tuple[np.ndarray, np.ndarray]:
    """Moves sheared slices back over each other.

    With a tilted gantry the table moves the patient along z while the slices lean, so the step between two slices is
    not along their normal. Each slice is shifted in its plane by the in-plane part of its offset from the first slice,
    and the step that remains is the one along the normal. The plane grows by the largest shift, so that nothing is
    lost, and is filled with air.

    Args:
        voxels (`np.ndarray` of shape `(k, j, i)`): the stored slices.
        affine (`np.ndarray` of shape `(4, 4)`): of the index (i, j, k).
    """
    columns = affine[:3, :3]
    unit = columns / np.linalg.norm(columns, axis=0)
    off_square = {pair: _off_square_deg(unit, *pair) for pair in ((0, 1), (0, 2), (1, 2))}
    if max(off_square.values()) <= SHEAR_TOLERANCE_DEG:
        return voxels, affine
    # The slice axis is the one whose removal leaves a rectangular plane: the last, unless the file was permuted.
    for axis in (2, 1, 0):
        plane = tuple(a for a in range(3) if a != axis)
        if off_square[plane] <= SHEAR_TOLERANCE_DEG:
            break
    else:
        raise context.error("all three axes of the affine are sheared", "Resample the scan to a rectangular grid")

    normal = np.cross(unit[:, plane[0]], unit[:, plane[1]])
    normal /= np.linalg.norm(normal)
    step = float(normal @ columns[:, axis])
    tilt = float(np.degrees(np.arccos(min(1.0, abs(step) / np.linalg.norm(columns[:, axis])))))
    if tilt > MAX_TILT_DEG:
        raise context.error(f"slices are sheared by {tilt:.0f} degrees", "Check the geometry: no gantry tilts so far")
    slide = columns[:, axis] - step * normal  # mm in the plane from one slice to the next
    per_slice = [float(unit[:, a] @ slide) / np.linalg.norm(columns[:, a]) for a in plane]  # in pixels of the plane
    context.warn(f"gantry tilt of {tilt:.1f} degrees: slices were shifted in their plane to stand on each other")

    stack = np.moveaxis(voxels, 2 - axis, 0)  # (slice, slower plane axis, faster plane axis)
    straight, start = straighten(stack, np.outer(np.arange(len(stack)), per_slice[::-1]), context)
    affine = affine.copy()
    affine[:3, axis] = step * normal
    affine[:3, 3] += columns[:, plane[0]] * start[1] + columns[:, plane[1]] * start[0]
    return np.moveaxis(straight, 0, 2 - axis), affine


def straighten(stack: np.ndarray, offsets: np.ndarray, context: LoadContext) -> tuple[np.ndarray, np.ndarray]:
    """Shifts each slice in its plane, by linear interpolation, into a plane that holds all of them.

    Args:
        stack (`np.ndarray` of shape `(slices, rows, columns)`): the slices.
        offsets (`np.ndarray` of shape `(slices, 2)`): where each slice's first pixel lies, in rows and columns.

    Returns:
        The shifted stack, and the place of its first pixel in the same rows and columns.
    """
    start = np.floor(offsets.min(0) + 1e-6)
    size = tuple(int(length) for length in np.ceil(offsets.max(0) - 1e-6) + stack.shape[1:] - start)
    context.claim(len(stack) * size[0] * size[1] * stack.itemsize + stack.nbytes, "the volume without its gantry tilt")
    fill = AIR_HU if context.intensity == "hu" else stack.min()
    straight = np.empty((len(stack), *size), stack.dtype)
    for index, plane in enumerate(stack):
        straight[index] = _shifted(plane, offsets[index] - start, size, fill)
    return straight, start


def resample_slices(voxels: np.ndarray, positions: np.ndarray, step: float) -> np.ndarray:
    """Linear interpolation of unevenly spaced slices to even ones.

    Args:
        voxels (`np.ndarray` of shape `(k, j, i)`): the slices.
        positions (`np.ndarray` of shape `(k,)`): mm along the normal, growing.
        step (`float`): mm between the slices of the result, the first of which is the first of the input.
    """
    targets = np.arange(0, positions[-1] - positions[0] + 0.01 * step, step) + positions[0]
    after = np.clip(np.searchsorted(positions, targets), 1, len(positions) - 1)
    share = np.clip((targets - positions[after - 1]) / (positions[after] - positions[after - 1]), 0, 1)
    even = np.empty((len(targets), *voxels.shape[1:]), voxels.dtype)
    for index, (upper, weight) in enumerate(zip(after, share)):
        mixed = voxels[upper - 1] * np.float32(1 - weight) + voxels[upper] * np.float32(weight)
        even[index] = np.rint(mixed) if even.dtype == np.int16 else mixed
    return even


def _off_square_deg(unit: np.ndarray, first: int, second: int) -> float:
    return float(abs(90 - np.degrees(np.arccos(np.clip(unit[:, first] @ unit[:, second], -1, 1)))))


def _mm(steps) -> str:
    return " x ".join(f"{step:.4g}" for step in steps) + " mm"


def _shifted(plane: np.ndarray, shift: np.ndarray, size: tuple[int, int], fill: float) -> np.ndarray:
    """The plane at a fractional offset in a larger one: along each axis a weighted sum of two whole-pixel copies."""
    moved = plane.astype(np.float32)
    for axis in (0, 1):
        whole = int(np.floor(shift[axis] + 1e-6))
        weight = shift[axis] - whole if shift[axis] - whole > 1e-4 else 0.0
        shape = list(moved.shape)
        shape[axis] = size[axis]
        room = np.full(shape, fill, np.float32)
        for offset, share in ((whole, 1 - weight), (whole + 1, weight)):
            if share:
                target = [slice(None), slice(None)]
                target[axis] = slice(offset, offset + moved.shape[axis])
                room[tuple(target)] += share * (moved - fill)
        moved = room
    return np.rint(moved) if plane.dtype == np.int16 else moved
