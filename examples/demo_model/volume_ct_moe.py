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
"""What loading a scan gives (`Volume`), and what every reader of a scan shares.

- `Volume`: one CT series, oriented and in millimetres.
- `VolumeWarning`: a scan that was loaded although something about it is odd.
- `StoredVolume`: what a reader hands on, voxels and geometry as they are in the file.
- `LoadContext`: what is asked of one load, and the odd things found on the way.
"""

from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np

from .errors_ct_moe import VolumeError


# Most memory one scan may take, in bytes: a whole body at 512 x 512 x 2000 in int16 is 1 GiB.
MAX_VOLUME_BYTES = 4 * 1024**3

# 12-bit scanners end here, so this is what "nothing was measured" becomes.
AIR_HU = -1024


class VolumeWarning(UserWarning):
    """A scan was loaded, but something about it is odd. The same text is in `Volume.meta["warnings"]`."""


@dataclass(frozen=True, eq=False)
class Volume:
    """One CT series.

    Args:
        hu (`np.ndarray` of shape `(z, y, x)`, int16 or float32):
            Hounsfield units (with `intensity="display"`: grey values that never were HU). The x index grows to the
            patient's left, y to the back, z to the head (LPS). It may be a view with negative strides of the array
            as it was stored, which `torch.from_numpy` does not take: copy the part you need first.
        spacing (`tuple[float, float, float]`):
            Millimetres between voxel centres, in array order (z, y, x).
        affine (`np.ndarray` of shape `(4, 4)`, *optional*):
            Maps the array index (x, y, z), in that order, to LPS millimetres. Oblique scans keep their true
            rotation here. Without it the first voxel is the origin and the axes are the patient's.
        meta (`dict`, *optional*):
            Small facts about the source, JSON-serialisable, without patient data: `format`, `intensity`,
            `stored_shape` and `stored_orientation` (of the file's index axes, first the fastest), `stored_dtype`,
            `rescale`, `oblique_deg`, `warnings` and what the format adds.
    """

    hu: np.ndarray = field(repr=False)  # thousands of voxels belong in no log
    spacing: tuple[float, float, float]
    affine: np.ndarray | None = None
    meta: dict = field(default_factory=dict)

    def __post_init__(self):
        if not isinstance(self.hu, np.ndarray) or self.hu.ndim != 3 or 0 in self.hu.shape:
            found = f"shape {self.hu.shape}" if isinstance(self.hu, np.ndarray) else type(self.hu).__name__
            raise VolumeError("Volume.hu", f"{found} is no volume", "Pass a numpy array of shape (z, y, x)")
        if self.hu.dtype not in (np.int16, np.float32):
            raise VolumeError("Volume.hu", f"dtype {self.hu.dtype}", "Pass int16 or float32")
        spacing = tuple(float(step) for step in self.spacing)
        if len(spacing) != 3 or not all(np.isfinite(step) and step > 0 for step in spacing):
            raise VolumeError("Volume.spacing", f"{spacing}", "Pass three positive numbers, mm in the order z, y, x")
        affine = np.diag([*spacing[::-1], 1.0]) if self.affine is None else np.asarray(self.affine, np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise VolumeError("Volume.affine", f"shape {affine.shape}", "Pass a finite 4 x 4 matrix")
        object.__setattr__(self, "spacing", spacing)
        object.__setattr__(self, "affine", affine)


@dataclass
class StoredVolume:
    """A scan as its file holds it, before orientation.

    Args:
        voxels (`np.ndarray` of shape `(k, j, i)`, int16 or float32): rescaled values, slowest file axis first.
        affine (`np.ndarray` of shape `(4, 4)`, *optional*): maps the index (i, j, k) to LPS mm. `None`: unknown.
        facts (`dict`): what goes into `Volume.meta`.
        owned (`bool`): whether `voxels` belongs to this load, so that it may be changed in place.
    """

    voxels: np.ndarray
    affine: np.ndarray | None
    facts: dict
    owned: bool = True


@dataclass
class LoadContext:
    """What is asked of one load, and the odd things found on the way.

    Args:
        subject (`str`): how errors name the source.
        series, spacing, intensity, check, padding, max_bytes: as in `load_volume`.
        warnings (`list[str]`): what was odd.
        files (`ExitStack`): what is open until the voxels are read.
        held_bytes (`int`): memory that the load has taken beside the voxels.
    """

    subject: str
    series: int | str | None = None
    spacing: tuple[float, float, float] | None = None
    intensity: str = "hu"
    check: str = "refuse"
    padding: str = "air"
    max_bytes: int = MAX_VOLUME_BYTES
    warnings: list[str] = field(default_factory=list)
    files: ExitStack = field(default_factory=ExitStack)
    held_bytes: int = 0

    @property
    def pads(self) -> bool:
        """Whether padding becomes air."""
        return self.padding == "air" and self.intensity == "hu"

    def error(self, finding: str, remedy: str) -> VolumeError:
        return VolumeError(self.subject, finding, remedy)

    def warn(self, finding: str) -> None:
        """Notes something odd that does not stop the load."""
        if finding not in self.warnings:
            self.warnings.append(finding)

    def doubt(self, finding: str, remedy: str) -> None:
        """Notes something that `check` decides about: refused, warned about or passed over."""
        if self.check == "refuse":
            raise self.error(finding, f'{remedy}. To load it all the same, pass check="warn"')
        if self.check == "warn":
            self.warn(finding)

    def claim(self, num_bytes: int, what: str) -> None:
        """Refuses, before anything is allocated, what would go over the limit together with what is held."""
        if num_bytes + self.held_bytes > self.max_bytes:
            raise self.error(
                f"{what} would take {num_bytes / 1e6:.0f} MB, over the limit of {self.max_bytes / 1e6:.0f} MB",
                "Pass a larger max_bytes if the scan really is that large",
            )

    def hold(self, num_bytes: int, what: str) -> None:
        """Claims memory that stays taken until the volume is loaded."""
        self.claim(num_bytes, what)
        self.held_bytes += num_bytes
