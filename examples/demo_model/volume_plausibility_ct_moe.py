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
"""Are these Hounsfield units? Padding to air, and the signs of a scan that is not CT or was rescaled wrongly."""

import numpy as np

from .volume_ct_moe import AIR_HU, LoadContext, StoredVolume


# Air is -1000 HU; its noise and the ringing of sharp kernels stay above this, and scanners fill what lies outside the
# field of view with -1500, -2000, -2048, -3024 or -32768.
PADDING_BELOW_HU = -1400

# Larger values are damage, and overflow in what is computed from them.
MAX_VALUE = 1e12

# Enough voxels for percentiles, few enough to cost some milliseconds.
SAMPLE_VOXELS = 500_000


def clean_values(stored: StoredVolume, context: LoadContext) -> float:
    """Makes every voxel a finite number and, with `intensity="hu"` and `padding="air"`, padding air.

    The array is changed in place if it belongs to the load and copied first if it is the caller's.

    Returns:
        The smallest value.
    """
    low, high = float(stored.voxels.min()), 0.0
    if stored.voxels.dtype == np.float32:
        high = float(stored.voxels.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        # Slice by slice, here and below: no mask of the whole volume.
        smallest = min(np.min(part, where=np.isfinite(part), initial=np.inf) for part in stored.voxels)
        if not np.isfinite(smallest):
            raise context.error("no voxel is a finite number", "Export the scan again")
        fill = AIR_HU if context.intensity == "hu" else smallest
        _own(stored, context)
        count = sum(_replace_not_finite(part, fill) for part in stored.voxels)
        context.warn(f"{count} voxels were not finite numbers and were set to {fill:g}")
        low, high = float(stored.voxels.min()), float(stored.voxels.max())
    if max(abs(low), abs(high)) > MAX_VALUE:
        raise context.error(f"values from {low:g} to {high:g} are no intensities", "Export the scan again")
    if context.pads and low < PADDING_BELOW_HU:
        _own(stored, context)
        count = sum(map(padding_to_air, stored.voxels))
        stored.facts["padding_voxels"] = stored.facts.get("padding_voxels", 0) + count
        low = float(stored.voxels.min())
    return low


def padding_to_air(hu: np.ndarray) -> int:
    """Sets what cannot have been measured to air, in place, and returns how many values that were."""
    if hu.min() >= PADDING_BELOW_HU:
        return 0
    mask = hu < PADDING_BELOW_HU
    np.copyto(hu, AIR_HU, where=mask)
    return int(np.count_nonzero(mask))


def check_hounsfield(voxels: np.ndarray, least: float, context: LoadContext) -> None:
    """Refuses (or warns about, as `context.check` says) values that cannot be HU, and warns about odd ones.

    The body holds fat (-100), water (0) and, around and inside it, air (-1000). Values without anything near -100 or
    below are no scan of a body: a picture, a mask, an MR or PET scan, or a CT whose rescale was forgotten. Values of a
    crop can be odd without being wrong.

    Args:
        voxels (`np.ndarray`): the volume.
        least (`float`): its smallest value.
        context (`LoadContext`): for the finding.
    """
    if context.check == "off" or context.intensity != "hu":
        return
    most = float(voxels.max())
    every = max(1, round((voxels.size / SAMPLE_VOXELS) ** (1 / 3)))
    low, median, high = np.percentile(voxels[::every, ::every, ::every], [0.5, 50, 99.5]).tolist()
    seen = f"values from {least:g} to {most:g}"
    display = 'for grey values pass intensity="display"'
    if least == most:
        context.doubt(f"every voxel is {least:g}", "Export the scan again")
    elif least >= 0 and most <= 1:
        context.doubt(f"{seen} are a scaled image or a mask, not HU", f"Load the CT itself; {display}")
    elif least >= 0 and most <= 255:
        context.doubt(f"{seen} are grey levels or labels, not HU", f"Load the CT itself; {display}")
    elif least >= 0 and most > 1000 and low < 200:
        context.doubt(
            f"{seen}, none below zero: the rescale was forgotten, or this is not CT",
            "Export it with its rescale slope and intercept (most often 1 and -1024)",
        )
    elif low > -50:
        context.doubt(f"{seen}, neither air nor fat: this is not CT (MR or PET?)", f"Load the CT itself; {display}")
    elif high < -500 and low < -1500:
        context.doubt(f"{seen}, nothing as dense as water: the rescale was applied twice", "Export it with HU values")
    elif high < -200:
        context.warn(f"{seen}: nothing as dense as tissue")
    elif low > -200:
        context.warn(f"{seen}: no air in or around the body")
    elif median > 1500 or high > 10000:
        context.warn(f"{seen}: denser than any tissue")


def _replace_not_finite(values: np.ndarray, fill: float) -> int:
    mask = ~np.isfinite(values)
    np.copyto(values, fill, where=mask)
    return int(np.count_nonzero(mask))


def _own(stored: StoredVolume, context: LoadContext) -> None:
    if not stored.owned:
        context.claim(stored.voxels.nbytes, "a copy of the volume")
        stored.voxels = stored.voxels.copy()
        stored.owned = True
