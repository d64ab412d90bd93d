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
"""What a phantom is to hold, before anything is drawn: `plan_phantom`.

Every attribute is drawn alone, but for `HELD_OUT`: combinations that only the test split has.
"""

import numpy as np

from .labels import FINDINGS, GROWTHS, LOBES, PHASES, Lesion


# (finding, attribute, value, phase) that never meet in train and validation: half of the test scans hold one of them.
HELD_OUT = (
    ("nodule", "place", "left upper lobe", "arterial"),
    ("consolidation", "place", "right lower lobe", "non-contrast"),
    ("effusion", "side", "left", "delayed"),
    ("liver lesion", "side", "left", "portal venous"),
    ("renal stone", "side", "right", "arterial"),
    ("aneurysm", "place", "abdominal aorta", "non-contrast"),
)


def plan_phantom(rng: np.random.Generator, split: str, wanted: tuple[str, ...] | None) -> dict:
    """What is drawn, before anything is: phase, acquisition, and side, place and size of every lesion."""
    names = wanted
    combination = None
    if wanted is None:
        chosen = rng.random(len(FINDINGS)) < 0.28
        names = () if rng.random() < 0.08 else tuple(np.array(FINDINGS)[chosen])
        if split == "test" and rng.random() < 0.5:
            combination = HELD_OUT[rng.integers(len(HELD_OUT))]
            names = tuple(name for name in FINDINGS if name in (*names, combination[0]))
    phase = combination[3] if combination else str(rng.choice(PHASES))
    if phase == "delayed":
        # Excreted contrast hides stones, in life as well.
        names = tuple(name for name in names if name != "renal stone" or wanted is not None)
    new = split == "test" and rng.random() < 0.5
    acquisition = {
        "thickness": float(rng.choice([2.0, 4.0] if new else [3.0, 5.0])),
        "field_of_view": float(rng.uniform(430, 460) if new else rng.uniform(370, 430)),
        "matrix": int(rng.choice([176, 240] if new else [160, 192, 208])),
        "noise": float(rng.uniform(22, 28) if new else rng.uniform(8, 20)),
        "unseen": bool(new),
    }
    lesions = {}
    for name in names:
        for _ in range(100):
            drawn = _lesions(rng, name)
            if combination and name == combination[0]:
                drawn = drawn[:1]
                drawn[0] = _with_attribute(name, drawn[0], combination[1], combination[2])
            met = any(is_held_out(name, lesion, phase) for lesion in drawn)
            if met == bool(combination and name == combination[0]):
                break
            if split == "test" and not combination and met:
                break
        lesions[name] = drawn
    return {"phase": phase, "acquisition": acquisition, "lesions": lesions}


def is_held_out(name: str, lesion: Lesion, phase: str) -> bool:
    """Whether a lesion of this finding in this phase is one of `HELD_OUT`."""
    return any(name == n and phase == p and getattr(lesion, a) == v for n, a, v, p in HELD_OUT)


def _with_attribute(name: str, lesion: Lesion, attribute: str, value: str) -> Lesion:
    """The lesion with one attribute of a held-out combination, and with what goes with it."""
    setattr(lesion, attribute, value)
    if attribute == "place" and name in ("nodule", "consolidation"):
        lesion.side = value.split()[0]
    if name == "liver lesion":
        lesion.place = f"{value} lobe of the liver"
        lesion.size_mm = min(lesion.size_mm, 26)
    if name == "renal stone":
        lesion.place = f"{value} kidney"
    return lesion


def _lesions(rng: np.random.Generator, name: str) -> list[Lesion]:
    """Attributes of the lesions of one finding, as they are to be drawn."""

    def side():
        return str(rng.choice(["left", "right"]))

    if name == "nodule":
        count = int(rng.choice([1, 1, 2, 3, 3]))
        places = [str(rng.choice(LOBES)) for _ in range(count)]
        largest = 32 if count < 3 else 20  # three must have room, one above the other
        sizes = sorted((rng.integers(5, largest // 2 + 1) * 2 for _ in range(count)), reverse=True)
        return [
            Lesion(side=place.split()[0], place=place, size_mm=float(size), hu=float(rng.uniform(20, 90)))
            for place, size in zip(places, sizes)
        ]
    if name == "effusion":
        amounts = {"small": (40, 60), "moderate": (75, 115), "large": (120, 175)}
        which = str(rng.choice(["left", "right", "both"]))
        amount = str(rng.choice(list(amounts)))
        extent = float(rng.uniform(*amounts[amount]))
        return [Lesion(side=which, place="pleura", extent_mm=extent, amount=amount, hu=float(rng.uniform(2, 18)))]
    if name == "consolidation":
        place = str(rng.choice(LOBES))
        limit = 60 if "middle" in place else 130
        return [
            Lesion(
                side=place.split()[0],
                place=place,
                size_mm=float(rng.integers(20, 36) * 2),
                extent_mm=float(rng.uniform(30, limit)),
                growth=str(rng.choice(GROWTHS)),
                hu=float(rng.uniform(10, 50)),
            )
        ]
    if name == "emphysema":
        return [Lesion(side="both", place=str(rng.choice(["upper lobes", "lower lobes", "both lungs"])), hu=-995.0)]
    if name == "cardiomegaly":
        return [Lesion(place="heart", size_mm=float(rng.uniform(0.56, 0.66)))]  # a ratio, until the chest is known
    if name == "aneurysm":
        return [
            Lesion(
                place=str(rng.choice(["thoracic aorta", "abdominal aorta"])),
                size_mm=float(rng.integers(23, 36) * 2),
                extent_mm=float(rng.uniform(50, 140)),
                growth=str(rng.choice(GROWTHS)),
            )
        ]
    if name == "liver lesion":
        count = int(rng.choice([1, 1, 2, 3, 3]))
        largest = (46, 24, 16)[count - 1]
        lesions = []
        for _ in range(count):
            which = side()
            size = min(float(rng.integers(8, largest // 2 + 1) * 2), 26 if which == "left" else 60)
            place = f"{which} lobe of the liver"
            lesions.append(Lesion(side=which, place=place, size_mm=size, hu=-float(rng.uniform(60, 90))))
        return sorted(lesions, key=lambda lesion: -lesion.size_mm)
    if name == "renal stone":
        which = side()
        size = float(rng.integers(8, 17))
        return [Lesion(side=which, place=f"{which} kidney", size_mm=size, hu=float(rng.uniform(700, 1400)))]
    if name == "ascites":
        amount = str(rng.choice(["small", "moderate", "large"]))
        return [Lesion(place="peritoneum", amount=amount, hu=float(rng.uniform(2, 18)))]
    loss = int(rng.choice([30, 40, 50, 60]))
    return [Lesion(place=str(rng.choice(["thoracic spine", "lumbar spine"])), height_loss=loss, hu=430.0)]
