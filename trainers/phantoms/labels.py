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
"""What is known of a phantom: `Phantom`, its `Finding`s and their `Lesion`s, and the words that they are told in.

Coordinates are LPS in mm: x to the patient's left, y to the back, z to the head, z = 0 where the diaphragms are.
"""

from dataclasses import asdict, dataclass, field

import numpy as np


FINDINGS = (
    "nodule",
    "effusion",
    "consolidation",
    "emphysema",
    "cardiomegaly",
    "aneurysm",
    "liver lesion",
    "renal stone",
    "ascites",
    "fracture",
)
SPLITS = ("train", "validation", "test")
PHASES = ("non-contrast", "arterial", "portal venous", "delayed")
LOBES = ("right upper lobe", "right middle lobe", "right lower lobe", "left upper lobe", "left lower lobe")
GROWTHS = ("head", "feet", "middle", "constant")  # where a lesion is widest along z; the last: as wide everywhere


@dataclass
class Lesion:
    """One lesion; what does not apply is `None`.

    Attributes:
        side: "left", "right" or "both", the patient's.
        place: lobe, organ or part of it.
        size_mm: largest diameter across the body axis, of a consolidation before the chest wall cuts it (cardiomegaly:
            width of the heart).
        extent_mm: length along the body axis, number of slices x their thickness.
        num_slices: slices that hold a voxel of it.
        hu: of what was painted, before noise (consolidation: between its bronchi).
        growth: one of `GROWTHS`.
        amount: "small", "moderate" or "large".
        height_loss: of a vertebra, in per cent.
        centre: (z, y, x) in mm, where it was drawn; the patient lies up to 12 mm beside the middle of the scan.
        slice_areas: mm2 of it in every slice of the scan, from the feet.
    """

    side: str | None = None
    place: str | None = None
    size_mm: float | None = None
    extent_mm: float = 0.0
    num_slices: int = 0
    hu: float = 0.0
    growth: str | None = None
    amount: str | None = None
    height_loss: int | None = None
    centre: tuple[float, float, float] = (0.0, 0.0, 0.0)
    slice_areas: list[float] = field(default_factory=list, repr=False)


@dataclass
class Finding:
    """All lesions of one kind, the largest first."""

    name: str
    lesions: list[Lesion]


@dataclass
class Phantom:
    """One scan.

    Attributes:
        hu: `int16` array (z, y, x) in LPS, z from the feet.
        spacing: mm, (z, y, x).
        phase: one of `PHASES`.
        findings: in the order of `FINDINGS`; empty for a normal scan.
        acquisition: thickness, field of view, matrix, noise, whether it is one that only the test split has.
        heart_ratio: width of the heart / inner width of the chest.
        held_out: whether the scan holds one of the `HELD_OUT` combinations.
        organ_areas: mm2 of each organ in every slice, as it was painted: others may cover some of it. Of the aorta,
            the descending part.
    """

    hu: np.ndarray
    spacing: tuple[float, float, float]
    phase: str
    findings: list[Finding]
    acquisition: dict
    heart_ratio: float
    held_out: bool
    organ_areas: dict[str, list[float]]

    def labels(self) -> dict:
        """Everything but the voxels, for JSON."""
        labels = asdict(self)
        del labels["hu"]
        return {**labels, "shape": list(self.hu.shape), "extent_mm": self.hu.shape[0] * self.spacing[0]}
