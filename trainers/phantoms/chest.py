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
"""Synthetic chest scans: no patient, known content. For demos and tests, not for training a model on medicine."""

from pathlib import Path

import nibabel as nib
import numpy as np


def write_phantom(path: str | Path, *, seed: int = 0, shape: tuple[int, int, int] = (60, 192, 192)) -> Path:
    """Write a chest phantom as NIfTI (int16 HU, RAS on disk, 5 mm slices).

    A body with two lungs, a heart, an aorta, a spine, ribs and a table, and one solid nodule of 12 mm in the
    patient's right lung (HU after the usual CT values: air -1000, lung -850, fat -90, muscle 50, blood 45, bone 700).

    Args:
        path: file to write, .nii or .nii.gz.
        seed: of the noise and of the nodule's position.
        shape: slices, rows, columns.

    Returns:
        `path`.
    """
    rng = np.random.default_rng(seed)
    spacing = np.array([300 / shape[0], 384 / shape[1], 384 / shape[2]])  # mm, (z, y, x)
    # Millimetres from the centre of the body: z to the head, y to the back, x to the patient's left.
    z, y, x = (
        ((np.arange(length) - (length - 1) / 2) * step).reshape([-1 if axis == i else 1 for i in range(3)])
        for axis, (length, step) in enumerate(zip(shape, spacing))
    )

    def ellipsoid(centre, radii):
        return sum(((axis - c) / r) ** 2 for axis, c, r in zip((z, y, x), centre, radii)) <= 1

    hu = np.full(shape, -1000.0)
    endless = 1e6  # radius along z of what runs through the whole scan
    hu[ellipsoid((0, 0, 0), (endless, 115, 170))] = -90
    hu[ellipsoid((0, 0, 0), (endless, 100, 152))] = 50
    ribs = ellipsoid((0, 0, 0), (endless, 96, 144)) & ~ellipsoid((0, 0, 0), (endless, 88, 134))
    hu[ribs & (np.mod(z + 0.3 * y, 25) < 9)] = 500
    for side in (-1, 1):
        hu[ellipsoid((10, 0, side * 75), (135, 78, 52))] = -850
    hu[ellipsoid((-30, -25, 20), (60, 45, 55))] = 45
    hu[ellipsoid((0, 45, 25), (endless, 14, 14)) & (z < 100)] = 45
    hu[ellipsoid((0, 75, 0), (endless, 20, 22))] = 300
    hu[ellipsoid((0, 75, 0), (endless, 8, 8))] = 30  # spinal canal
    nodule = (rng.uniform(-40, 60), rng.uniform(-30, 30), -rng.uniform(60, 90))
    hu[ellipsoid(nodule, (6, 6, 6))] = 60
    hu[np.broadcast_to((y > 125) & (y < 131) & (abs(x) < 180), shape)] = -200  # table
    hu += rng.normal(0, 12, shape)

    volume = np.clip(np.rint(hu), -1024, 3071).astype(np.int16)
    volume = volume[:, ::-1, ::-1].transpose(2, 1, 0)  # to RAS, as most converters write it
    affine = np.diag([*spacing[::-1], 1.0])
    affine[:3, 3] = [-(n - 1) / 2 * s for n, s in zip(volume.shape, spacing[::-1])]
    image = nib.Nifti1Image(volume, affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    return Path(path)
