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
"""A phantom together with what no user sees: its voxels before noise, and before and after every finding was drawn.

The difference is what was drawn, wherever the labels say it is.
"""

from dataclasses import dataclass, field

import numpy as np
import pytest

from ct_moe.trainers.phantoms import anatomy
from ct_moe.trainers.phantoms.anatomy import draw_phantom
from ct_moe.trainers.phantoms.labels import FINDINGS, Phantom


@dataclass
class Drawn:
    """One phantom and how it came to be; `x` grows to the patient's left, `y` to the back, `z` to the head."""

    phantom: Phantom
    scene: anatomy._Scene
    clean: np.ndarray
    steps: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def changed(self, name: str) -> np.ndarray:
        before, after = self.steps[name]
        return before != after

    def lesion(self, name: str, hu: float) -> np.ndarray:
        """Voxels that became one lesion of several, which differ in HU."""
        return self.changed(name) & np.isclose(self.steps[name][1], hu, atol=0.06)

    def areas(self, mask: np.ndarray) -> np.ndarray:
        return mask.sum((1, 2)) * self.phantom.spacing[1] * self.phantom.spacing[2]

    def places(self, mask: np.ndarray) -> np.ndarray:
        """(z, y, x) in mm of the voxels of a mask."""
        return np.stack([axis[i] for axis, i in zip(self.scene.axes, np.nonzero(mask))], axis=1)

    def width(self, mask: np.ndarray) -> float:
        x = self.places(mask)[:, 2]
        return float(np.ptp(x)) + self.phantom.spacing[2]

    def extent(self, mask: np.ndarray) -> float:
        return int(mask.any((1, 2)).sum()) * self.phantom.spacing[0]


def drawn_phantom(seed: int, findings: tuple[str, ...] | None = None, split: str = "train") -> Drawn:
    steps, kept = {}, {}
    scene_class = anatomy._Scene
    finish = scene_class.finish

    def watch(name, draw):
        def watched(scene, lesions):
            before = scene.hu.copy()
            draw(scene, lesions)
            steps[name] = before, scene.hu.copy()

        return watched

    def keep(scene):
        kept.update(scene=scene, clean=scene.hu.copy())
        return finish(scene)

    with pytest.MonkeyPatch.context() as patch:
        for name in FINDINGS:
            method = f"draw_{name.replace(' ', '_')}"
            patch.setattr(scene_class, method, watch(name, getattr(scene_class, method)))
        patch.setattr(scene_class, "finish", keep)
        phantom = draw_phantom(seed, split, findings)
    return Drawn(phantom, steps=steps, **kept)


def coarse(patch: pytest.MonkeyPatch) -> None:
    """Let phantoms have a quarter of their voxels: for tests of what does not depend on them."""
    plan = anatomy.plan_phantom

    def coarse_plan(*arguments):
        planned = plan(*arguments)
        planned["acquisition"]["matrix"] = 96
        return planned

    patch.setattr(anatomy, "plan_phantom", coarse_plan)
