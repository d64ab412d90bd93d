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
"""What a scan is, before a model sees it: geometry, densities and everything odd about it."""

from typing import Any

import numpy as np

from ct_moe.errors_ct_moe import VolumeError
from ct_moe.volume_io_ct_moe import load_volume


PERCENTILES = (0.5, 5, 50, 95, 99.5)


def inspect_scan(scan: Any, **options) -> dict[str, Any]:
    """Describe a scan, one that `load_volume` refuses by its values included.

    Args:
        scan: anything `load_volume` takes.
        **options: of `load_volume`, but for `check`.

    Returns:
        JSON-ready `dict`: `shape` and `spacing_mm` (z, y, x) after turning to LPS, `extent_mm`, `affine` (index
        (x, y, z) to LPS mm), `hu` (minimum, maximum, mean, percentiles), `refused` (why, or None), `warnings`, and
        what the reader found (`stored_orientation`, `stored_dtype`, `rescale`, ...).

    Raises:
        VolumeError: the scan cannot be loaded at all.
    """
    refused = None
    try:
        volume = load_volume(scan, check="refuse", **options)
    except VolumeError as error:
        volume = load_volume(scan, check="warn", **options)
        refused = error.finding
    found = dict(volume.meta)
    return {
        "shape": list(volume.hu.shape),
        "dtype": str(volume.hu.dtype),
        "spacing_mm": [round(step, 4) for step in volume.spacing],
        "extent_mm": [round(length * step, 1) for length, step in zip(volume.hu.shape, volume.spacing)],
        "affine": volume.affine.round(4).tolist(),
        "hu": {
            "minimum": float(volume.hu.min()),
            "maximum": float(volume.hu.max()),
            "mean": round(float(volume.hu.mean(dtype=np.float64)), 2),
            "percentiles": dict(zip(map(str, PERCENTILES), np.percentile(volume.hu, PERCENTILES).round(1).tolist())),
        },
        "refused": refused,
        "warnings": found.pop("warnings", []),
        **found,
    }


def inspection_text(description: dict[str, Any]) -> str:
    """The description as lines for people."""
    z, y, x = description["shape"]
    sz, sy, sx = description["spacing_mm"]
    ez, ey, ex = description["extent_mm"]
    hu = description["hu"]
    percentiles = ", ".join(f"{value:g}" for value in hu["percentiles"].values())
    shown = {"shape", "dtype", "spacing_mm", "extent_mm", "affine", "hu", "refused", "warnings"}
    lines = [
        f"{z} slices of {y} x {x} pixels, {description['dtype']}",
        f"spacing      {sz:g} mm between slices, {sy:g} x {sx:g} mm in plane (rows, columns)",
        f"covers       {ez:g} mm feet to head, {ey:g} mm front to back, {ex:g} mm right to left",
        f"HU           {hu['minimum']:g} to {hu['maximum']:g}, mean {hu['mean']:g}; "
        f"percentiles {', '.join(hu['percentiles'])}: {percentiles}",
        *(f"{name:<12} {_plain(value)}" for name, value in description.items() if name not in shown),
        *(f"warning      {warning}" for warning in description["warnings"]),
    ]
    if description["refused"] is not None:
        lines.append(f"REFUSED      {description['refused']}")
    return "\n".join(lines)


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return (
            " x ".join(map(str, value)) if all(isinstance(item, int) for item in value) else ", ".join(map(str, value))
        )
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items()) or "none"
    return str(value)
