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
"""The phantom is a plausible chest whose content is known."""

import numpy as np
import SimpleITK as sitk

from ct_moe import load_volume
from ct_moe.trainers.phantoms.chest import write_phantom


def test_phantom_is_a_chest_with_a_nodule_in_the_right_lung(tmp_path):
    volume = load_volume(write_phantom(tmp_path / "chest.nii.gz"))
    assert volume.hu.shape == (60, 192, 192)
    assert volume.spacing == (5.0, 2.0, 2.0)
    assert volume.meta["stored_orientation"] == "RAS"
    assert not volume.meta["warnings"]
    lungs = sitk.GetImageFromArray((volume.hu < -700).astype(np.uint8))
    parts = sitk.GetArrayFromImage(sitk.ConnectedComponent(lungs))
    # Patient right is at small x. The lungs are the two largest enclosed regions, air outside touches the corner.
    sizes = np.bincount(parts[(parts != parts[0, 0, 0]) & (parts > 0)])
    assert (sizes > 10_000).sum() == 2
    right, left = sorted(np.argsort(sizes)[-2:], key=lambda part: np.argwhere(parts == part)[:, 2].mean())
    holes = {
        part: sitk.GetArrayFromImage(sitk.BinaryFillhole(sitk.GetImageFromArray((parts == part).astype(np.uint8))))
        for part in (right, left)
    }
    nodule = (holes[right] == 1) & (parts != right)
    assert 0.5 < nodule.sum() * 5 * 2 * 2 / (4 / 3 * np.pi * 6**3) < 1.6  # 12 mm across, in coarse voxels
    assert abs(volume.hu[nodule].mean() - 60) < 10
    assert not ((holes[left] == 1) & (parts != left)).any()


def test_phantom_is_the_same_for_a_seed_and_has_the_shape_asked_for(tmp_path):
    first, again, other = (
        load_volume(write_phantom(tmp_path / f"{name}.nii", seed=seed, shape=(20, 48, 64)))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert np.array_equal(first.hu, again.hu)
    assert not np.array_equal(first.hu, other.hu)
    assert first.hu.shape == (20, 48, 64)
    assert first.spacing == (15.0, 8.0, 6.0)
