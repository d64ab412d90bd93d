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
    # How many there are must not depend on who fits beside whom, so it is settled before anything is drawn again.
    counts = {name: int(rng.choice([1, 1, 2, 3, 3])) for name in ("nodule", "liver lesion")}
    for _ in range(5000):
        lesions = {name: _lesions(rng, name, counts.get(name, 1)) for name in names}
        others = lesions
        if combination:
            name, attribute, value, _ = combination
            alone = lesions[name][int(rng.integers(len(lesions[name])))]  # any, not the largest
            if alone.place.startswith("both"):
                continue  # longer than an aneurysm of one part
            lesions[name] = [_with_attribute(name, alone, attribute, value)]
            others = {other: lesions[other] for other in names if other != name}
        met = any(is_held_out(name, lesion, phase) for name in others for lesion in others[name])
        if _have_room(lesions) and not (met and (combination or split != "test")):
            return {"phase": phase, "acquisition": acquisition, "lesions": lesions}
    raise RuntimeError(f"no plan for {names} in the {phase} phase")  # the tests try all findings together


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


def _have_room(lesions: dict[str, list[Lesion]]) -> bool:
    """Whether every lesion can be seen beside the others.

    Nodules lie in slices of their own: upper lobes have room for two, and so have lower lobes and the middle one; the
    left lobe of the liver is small. A nodule inside of a consolidation, and either below an effusion that fills the
    lower lobe, would be hidden.
    """
    livers = [lesion.side for lesion in lesions.get("liver lesion", ())]
    if len(livers) > 2 and livers.count("left") > 1:
        return False
    nodules = [lesion.place for lesion in lesions.get("nodule", ())]
    upper = sum("upper" in place for place in nodules)
    if upper > 2 or len(nodules) - upper > 2 or nodules.count("right middle lobe") > 1:
        return False
    consolidated = [lesion.place for lesion in lesions.get("consolidation", ())]
    if set(nodules) & set(consolidated):
        return False
    soaked = {
        f"{side} lower lobe"
        for lesion in lesions.get("effusion", ())
        for side in ("left", "right")
        if lesion.amount != "small" and lesion.side in (side, "both")
    }
    return not soaked & {*nodules, *consolidated}


def _lesions(rng: np.random.Generator, name: str, count: int) -> list[Lesion]:
    """Attributes of the lesions of one finding, as they are to be drawn; so many nodules or liver lesions."""

    def side():
        return str(rng.choice(["left", "right"]))

    if name == "nodule":
        places = [str(rng.choice(LOBES)) for _ in range(count)]
        # The same sizes whatever their number: else the size of one would tell how many there are.
        sizes = sorted((rng.integers(5, 12) * 2 for _ in range(count)), reverse=True)
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
        place = "both parts of the aorta"
        if rng.random() >= 0.25:
            place = str(rng.choice(["thoracic aorta", "abdominal aorta"]))
        return [
            Lesion(
                place=place,
                size_mm=float(rng.integers(23, 36) * 2),
                extent_mm=float(rng.uniform(*((120, 200) if place.startswith("both") else (30, 140)))),
                growth=str(rng.choice(GROWTHS)),
            )
        ]
    if name == "liver lesion":
        sizes = sorted((rng.integers(8, 14) * 2 for _ in range(count)), reverse=True)
        sides = [side() for _ in sizes]
        return [
            Lesion(side=which, place=f"{which} lobe of the liver", size_mm=float(size), hu=-float(rng.uniform(60, 90)))
            for which, size in zip(sides, sizes)
        ]
    if name == "renal stone":
        sides = ["left", "right"] if rng.random() < 0.25 else [side()]
        rng.shuffle(sides)
        sizes = sorted((float(rng.integers(8, 17)) for _ in sides), reverse=True)
        return [
            Lesion(side=which, place=f"{which} kidney", size_mm=size, hu=float(rng.uniform(700, 1400)))
            for which, size in zip(sides, sizes)
        ]
    if name == "ascites":
        amount = str(rng.choice(["small", "moderate", "large"]))
        return [Lesion(place="peritoneum", amount=amount, hu=float(rng.uniform(2, 18)))]
    places = ["thoracic spine", "lumbar spine"]
    rng.shuffle(places)
    places = places[: 2 if rng.random() < 0.25 else 1]
    losses = sorted((int(rng.choice([30, 40, 50, 60])) for _ in places), reverse=True)
    return [Lesion(place=place, height_loss=loss, hu=430.0) for place, loss in zip(places, losses)]
