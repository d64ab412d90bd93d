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
"""Synthetic CT scans of known content: anatomy and findings drawn in HU, with the exact attributes of every lesion.

`draw_phantom` makes one scan from a seed and the part of the data it belongs to (train, validation, test).

Coordinates are LPS in mm: x to the patient's left, y to the back, z to the head, z = 0 where the diaphragms are. No
patient, and no model of disease: shapes and densities are those of textbooks, simplified until each attribute is known
exactly. Good for testing what a network can learn, not for teaching it medicine.
"""

import numpy as np

from .labels import FINDINGS, SPLITS, Finding, Lesion, Phantom
from .plan import is_held_out, plan_phantom


# HU of (blood in the aorta, in the heart, liver, spleen, kidney, renal pelvis) in each phase.
_PHASE_HU = {
    "non-contrast": (42, 42, 58, 50, 33, 8),
    "arterial": (310, 230, 72, 125, 150, 8),
    "portal venous": (150, 140, 112, 120, 185, 10),
    "delayed": (92, 88, 84, 82, 125, 420),
}
_AIR, _LUNG, _FAT, _MUSCLE, _BONE = -1000.0, -830.0, -100.0, 52.0, 240.0

# What is large comes first: what is small then looks for a place that is left, and nothing covers it.
_ORDER = (
    "aneurysm",
    "cardiomegaly",
    "fracture",
    "effusion",
    "consolidation",
    "emphysema",
    "nodule",
    "ascites",
    "liver lesion",
    "renal stone",
)
_GAP = 12.0  # mm along the body axis between lesions of one kind: no slice shows two of them


def draw_phantom(seed: int, split: str = "train", findings: tuple[str, ...] | None = None) -> Phantom:
    """Draw one scan of chest and upper abdomen.

    Args:
        seed: the same seed and split give the same voxels on every machine with the same NumPy.
        split: "train", "validation" or "test". They never share a random stream; "test" also draws from acquisitions
            and `HELD_OUT` combinations that the others never see.
        findings: names from `FINDINGS` instead of a random choice; `()` for a normal scan.

    Returns:
        [`Phantom`].
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: use one of {', '.join(SPLITS)}")
    if unknown := set(findings or ()) - set(FINDINGS):
        raise ValueError(f"findings={sorted(unknown)}: use names of {', '.join(FINDINGS)}")
    rng = np.random.default_rng([SPLITS.index(split), seed])
    plan = plan_phantom(rng, split, findings)
    scene = _Scene(rng, plan)
    scene.draw_anatomy()
    for name in _ORDER:
        if name in plan["lesions"]:
            getattr(scene, f"draw_{name.replace(' ', '_')}")(plan["lesions"][name])
    return scene.finish()


class _Scene:
    """The voxel grid, and a method for everything that can be drawn on it."""

    def __init__(self, rng: np.random.Generator, plan: dict):
        self.rng, self.plan = rng, plan
        acquisition = plan["acquisition"]
        low, high = rng.uniform(-260, -175), rng.uniform(205, 300)  # coverage: cuts through abdomen and neck
        thickness, matrix = acquisition["thickness"], acquisition["matrix"]
        depth = round((high - low) / thickness)
        pixel = acquisition["field_of_view"] / matrix
        self.spacing = (thickness, pixel, pixel)
        self.axes = [low + thickness * (np.arange(depth, dtype=np.float32) + 0.5)]
        shift = rng.uniform(-12, 12, 2)  # of the table and the patient on it
        self.axes += [pixel * (np.arange(matrix, dtype=np.float32) - (matrix - 1) / 2) + s for s in shift]
        self.hu = np.full((depth, matrix, matrix), _AIR, dtype=np.float32)
        self.owner = np.zeros(self.hu.shape, dtype=np.uint8)  # number of the lesion that a voxel shows; 0: none
        self.claims: list[tuple[Lesion, list]] = []  # and the boxes of that lesion
        self.half_width, self.half_depth = rng.uniform(148, 172), rng.uniform(100, 116)
        self.fat = rng.uniform(8, 22)
        self.aorta_radius = rng.uniform(11, 14)
        self.body_height = rng.uniform(21, 25)  # of a vertebral body; the disc comes on top
        self.spine_offset = rng.uniform(0, 26)
        self.blood, self.chamber, self.liver, self.spleen, self.kidney, self.pelvis = (
            value + rng.uniform(-6, 6) for value in _PHASE_HU[plan["phase"]]
        )
        self.organ_areas: dict[str, list[float]] = {}

    # Geometry ---------------------------------------------------------------------------------------------------

    def box(self, *ranges: tuple[float, float]) -> tuple[slice, ...]:
        """The part of the grid between these (low, high) in z, y, x."""
        found = []
        for axis, (low, high) in zip(self.axes, ranges):
            start, stop = np.searchsorted(axis, [low, high])
            found.append(slice(int(start), int(stop)))
        return tuple(found)

    def grid(self, box: tuple[slice, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        z, y, x = (axis[part] for axis, part in zip(self.axes, box))
        return z[:, None, None], y[None, :, None], x[None, None, :]

    def ellipsoid(self, centre, radii, power: float = 2.0) -> tuple[tuple[slice, ...], np.ndarray]:
        """Box and mask; infinite radii run through the whole scan."""
        box = self.box(*((c - r, c + r) for c, r in zip(centre, radii)))
        terms = [np.abs((axis - c) / r) ** power for axis, c, r in zip(self.grid(box), centre, radii)]
        return box, (terms[0] + terms[1] + terms[2]) <= 1

    def paint(self, shape: tuple[tuple[slice, ...], np.ndarray], hu: float) -> None:
        box, mask = shape
        self.hu[box][mask] = hu

    def areas(self, box: tuple[slice, ...], mask: np.ndarray) -> np.ndarray:
        """mm2 in every slice of the scan."""
        areas = np.zeros(len(self.axes[0]))
        areas[box[0]] = mask.sum((1, 2)) * self.spacing[1] * self.spacing[2]
        return areas

    def claim(self, lesion: Lesion, *shapes: tuple[tuple[slice, ...], np.ndarray]) -> None:
        """These voxels show this lesion, unless a later one covers them."""
        self.claims.append((lesion, [box for box, _ in shapes]))
        for box, mask in shapes:
            self.owner[box][mask] = len(self.claims)

    def measure(self) -> None:
        """Extents and areas of all lesions, from the voxels that show them in the end."""
        for number, (lesion, boxes) in enumerate(self.claims, 1):
            areas = sum(self.areas(box, self.owner[box] == number) for box in boxes)
            lesion.num_slices = int(np.count_nonzero(areas))
            lesion.extent_mm = round(lesion.num_slices * self.spacing[0], 1)
            lesion.slice_areas = [round(float(area), 1) for area in areas]

    def at(self, points: np.ndarray, box: tuple[slice, ...], values: np.ndarray) -> np.ndarray:
        """The values, of a box, at points (..., 3)."""
        index = []
        for axis, part, step, length, place in zip(
            self.axes, box, self.spacing, values.shape, np.moveaxis(points, -1, 0)
        ):
            index.append(np.clip(np.rint((place - axis[part.start]) / step).astype(int), 0, length - 1))
        return values[tuple(index)]

    def spread(self, lesions: list[Lesion], choices: list[np.ndarray]) -> None:
        """Give every lesion one of its centres, each in slices of its own; with little room, as far apart as it goes.

        All are drawn again together until they fit: were one left out, a large lesion would tell that it is alone.
        """
        picks = np.stack([rows[self.rng.integers(len(rows), size=400)] for rows in choices], axis=1)
        radii = np.array([lesion.size_mm / 2 for lesion in lesions])
        along, across = np.full(len(picks), np.inf), np.full(len(picks), np.inf)
        for i in range(len(lesions)):
            for j in range(i):
                away = picks[:, i] - picks[:, j]
                along = np.minimum(along, np.abs(away[:, 0]) - radii[i] - radii[j])
                across = np.minimum(across, np.linalg.norm(away, axis=1) - radii[i] - radii[j])
        fits = along > _GAP
        best = fits.argmax() if fits.any() else np.where(across > 3, along, across - 1000).argmax()
        for lesion, centre in zip(lesions, picks[best]):
            lesion.centre = tuple(round(float(c), 1) for c in centre)

    # Anatomy ----------------------------------------------------------------------------------------------------

    def draw_anatomy(self) -> None:
        inf = np.inf
        width, depth = self.half_width, self.half_depth
        box, skin = self.ellipsoid((0, 0, 0), (inf, depth, width))
        z, y, x = self.grid(box)
        neck = np.interp(z, [212, 262], [1.0, 0.5])  # above the lungs the shoulders fall away
        radius = np.sqrt((y / depth) ** 2 + (x / width) ** 2)
        self.paint((box, skin & (radius <= neck)), _FAT)
        radius = np.sqrt((y / (depth - self.fat)) ** 2 + (x / (width - self.fat)) ** 2)
        self.paint((box, skin & (radius <= neck)), _MUSCLE)
        self.inner = (depth - self.fat - 16, width - self.fat - 16)  # half axes of the inside of chest and abdomen
        self.draw_abdomen()
        self.draw_lungs()
        self.draw_mediastinum()
        self.draw_bones()
        box = self.box((-inf, inf), (depth + 6, depth + 14), (-190, 190))
        self.hu[box] = -250  # table

    def draw_abdomen(self) -> None:
        rng, (depth, width) = self.rng, self.inner
        box, inside = self.ellipsoid((-10, 0, 0), (np.inf, depth, width))
        z = self.grid(box)[0]
        self.cavity = box, inside & (z < 5)
        self.paint(self.cavity, _FAT)
        for _ in range(14):  # bowel
            centre = (rng.uniform(-250, -95), rng.uniform(-0.7, 0.1) * depth, rng.uniform(-0.7, 0.7) * width)
            radii = rng.uniform(12, 26, 3)
            self.paint(self.ellipsoid(centre, radii), rng.uniform(15, 45))
            if rng.random() < 0.5:
                self.paint(self.ellipsoid((centre[0], centre[1] - 4, centre[2]), radii * 0.55), -900)
        self.paint(self.ellipsoid((-55, -0.35 * depth, 0.5 * width), (42, 34, 38)), 25)  # stomach
        self.paint(self.ellipsoid((-50, -0.55 * depth, 0.5 * width), (24, 14, 24)), -900)
        self.liver_lobes = {
            "right": ((-52, 0.02 * depth, -0.52 * width), (78, 0.85 * depth, 0.45 * width)),
            "left": ((-38, -0.42 * depth, 0.02 * width), (42, 0.42 * depth, 0.42 * width)),
        }
        masks = [self.ellipsoid(*lobe) for lobe in self.liver_lobes.values()]
        for box, mask in masks:
            mask &= self._inside_cavity(box)
            self.paint((box, mask), self.liver)
        self.liver_mask = self._organ("liver", masks)
        self.spleen_place = (-38, 0.3 * depth, 0.72 * width), (46, 30, 0.2 * width)
        self._organ("spleen", [self.ellipsoid(*self.spleen_place)], self.spleen)
        self.kidneys = {side: (-112.0 + rng.uniform(-8, 8), 0.52 * depth, s * 62) for side, s in _SIGNS.items()}
        self._organ("kidneys", [self.ellipsoid(c, (54, 27, 27)) for c in self.kidneys.values()], self.kidney)
        for z, y, x in self.kidneys.values():
            self.paint(self.ellipsoid((z, y, x), (26, 10, 11)), -40)
            self.paint(self.ellipsoid((z, y, x), (18, 6, 7)), self.pelvis)

    def draw_lungs(self) -> None:
        depth, width = self.inner
        self.lungs = {}
        for side, sign in _SIGNS.items():
            x0 = sign * 0.52 * width
            box = self.box((-70, 215), (-depth, depth), (x0 - 0.46 * width, x0 + 0.46 * width))
            z, y, x = self.grid(box)
            # Wide at the base, narrow at the apex; the floor is a dome.
            narrowing = np.sqrt(np.clip(1 - (np.clip(z, 0, None) / 212) ** 2.4, 0, 1))
            outline = ((x - x0) / (0.46 * width)) ** 2 + ((y - 4) / (0.93 * depth)) ** 2 <= narrowing**2
            dome = 14 - 34 * ((x - x0) / (0.4 * width)) ** 2 - 42 * (y / depth) ** 2
            dome = dome - 26 * np.clip(y / depth, 0, 1)  # deeper at the back
            mask = outline & (z > dome) & (narrowing > 0)
            mask &= z > -60
            self.lungs[side] = box, mask
            self.paint((box, mask), _LUNG + self.rng.uniform(-20, 20))
        self._organ("lungs", list(self.lungs.values()))
        for side, sign in _SIGNS.items():
            self._draw_vessels(side, sign)

    def _draw_vessels(self, side: str, sign: int) -> None:
        rng, (depth, width) = self.rng, self.inner
        hilum = np.array([75, 5, sign * 0.18 * width])
        for _ in range(22):
            target = np.array(
                [rng.uniform(-20, 190), rng.uniform(-0.75, 0.8) * depth, sign * rng.uniform(0.35, 0.9) * width]
            )
            start, radius = hilum, rng.uniform(1.3, 2.8)
            bend = hilum + (target - hilum) * rng.uniform(0.35, 0.6) + rng.uniform(-12, 12, 3)
            for end in (bend, target):
                self._tube(start, end, radius, self.chamber - 10, within=self.lungs[side])
                start, radius = end, radius * 0.55

    def _tube(self, start, end, radius: float, hu: float, within=None) -> None:
        low, high = np.minimum(start, end) - radius, np.maximum(start, end) + radius
        box = self.box(*zip(low, high))
        if any(part.start >= part.stop for part in box):
            return
        z, y, x = self.grid(box)
        direction = np.asarray(end) - start
        t = ((z - start[0]) * direction[0] + (y - start[1]) * direction[1] + (x - start[2]) * direction[2]) / (
            direction @ direction
        )
        t = np.clip(t, 0, 1)
        squared = sum((axis - s - t * d) ** 2 for axis, s, d in zip((z, y, x), start, direction))
        mask = squared <= max(radius, self.spacing[1] * 0.6) ** 2
        if within is not None:
            mask &= self._crop(within, box)
        self.paint((box, mask), hu)

    def draw_mediastinum(self) -> None:
        rng, (depth, width) = self.rng, self.inner
        cardiomegaly = self.plan["lesions"].get("cardiomegaly")
        self.heart_ratio = cardiomegaly[0].size_mm if cardiomegaly else rng.uniform(0.38, 0.47)
        radius = self.heart_ratio * width
        scale = radius / (0.45 * width)
        box, mask = self.ellipsoid((38, -0.35 * depth, 0.16 * width), (46 * scale, 0.45 * depth * scale**0.5, radius))
        mask &= self._inside_cavity(box)
        self.heart = box, mask
        self._organ("heart", [self.heart], self.chamber)
        ventricle = (38, -0.4 * depth, 0.3 * width), (30 * scale, 20 * scale, 26 * scale)
        self.paint(self.ellipsoid(*ventricle), self.chamber + 12)
        arch = 120 + rng.uniform(-6, 6)
        self.aorta = descending = depth - 46, 18.0
        r = self.aorta_radius
        self.paint(self.ellipsoid((arch - 45, -0.1 * depth, 0), (70, 26, 30)), _MUSCLE)  # vessels and fat around it
        self._tube(np.array([45, -14, -8]), np.array([arch, -16, -12]), r + 2, self.blood)
        self._tube(np.array([arch, -16, -12]), np.array([arch + 8, 8, 6]), r, self.blood)
        self._tube(np.array([arch + 8, 8, 6]), np.array([arch - 8, *descending]), r, self.blood)
        self._draw_aorta(np.full_like(self.axes[0], r), top=arch)
        self.aorta_top = arch
        self._tube(np.array([95, 6, 0]), np.array([320, 2, 0]), 9, _AIR)  # trachea
        for sign in _SIGNS.values():
            self._tube(np.array([95, 6, 0]), np.array([68, 10, sign * 34]), 6, _AIR)

    def _draw_aorta(self, radii: np.ndarray, top: float) -> tuple[tuple[slice, ...], np.ndarray]:
        """Descending aorta of this radius in every slice; returns its box and mask."""
        y0, x0 = self.aorta
        reach = float(radii.max())
        box = self.box((-np.inf, top), (y0 - reach, y0 + reach), (x0 - reach, x0 + reach))
        _, y, x = self.grid(box)
        mask = (y - y0) ** 2 + (x - x0) ** 2 <= radii[box[0]][:, None, None] ** 2
        self.paint((box, mask), self.blood)
        self.organ_areas["aorta"] = [round(float(area), 1) for area in self.areas(box, mask)]
        return box, mask

    def draw_bones(self) -> None:
        depth, width = self.inner
        self.spine_y = depth - 6
        period = self.body_height + 5
        z = self.axes[0]
        phase = np.mod(z + self.spine_offset, period)
        body = phase < self.body_height
        box = self.box((-np.inf, np.inf), (self.spine_y - 20, self.spine_y + 20), (-23, 23))
        _, y, x = self.grid(box)
        outline = ((y - self.spine_y) / 19) ** 2 + (x / 22) ** 2
        disc = np.broadcast_to(outline <= 1, (len(z), *outline.shape[1:]))
        self.paint((box, disc), 85)
        self.paint((box, disc & body[:, None, None]), 480)
        core = (outline <= 0.72) & (phase > 2)[:, None, None] & (phase < self.body_height - 2)[:, None, None]
        self.paint((box, core), _BONE)
        self.paint(self.ellipsoid((0, self.spine_y + 30, 0), (np.inf, 12, 24)), 380)
        self.paint(self.ellipsoid((0, self.spine_y + 27, 0), (np.inf, 8, 9)), 30)  # canal
        box, outer = self.ellipsoid((0, 0, 0), (np.inf, depth + 10, width + 10))
        z, y, x = self.grid(box)
        shell = outer & ((y / (depth + 2)) ** 2 + (x / (width + 2)) ** 2 > 1) & (z > -70) & (z < 205)
        self.paint((box, shell & (np.mod(z + 0.35 * y + 200, 26) < 9)), 430)
        self.paint(self.ellipsoid((100, -depth - 6, 0), (80, 5, 16)), 300)  # sternum

    def _organ(self, name: str, shapes, hu: float | None = None) -> np.ndarray:
        drawn = np.zeros(self.hu.shape, dtype=bool)  # lobes of the liver overlap
        for box, mask in shapes:
            if hu is not None:
                self.paint((box, mask), hu)
            drawn[box] |= mask
        areas = self.areas((slice(None),) * 3, drawn)
        self.organ_areas[name] = [round(float(area), 1) for area in areas]
        return drawn

    def _inside_cavity(self, box) -> np.ndarray:
        depth, width = self.inner
        _, y, x = self.grid(box)
        return (y / depth) ** 2 + (x / width) ** 2 <= 1

    def _crop(self, shape, box) -> np.ndarray:
        """The part of a shape's mask that lies in another box."""
        own, mask = shape
        result = np.zeros([part.stop - part.start for part in box], dtype=bool)
        common = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(own, box)]
        if all(part.start < part.stop for part in common):
            inner = tuple(slice(c.start - b.start, c.stop - b.start) for c, b in zip(common, box))
            result[inner] = mask[tuple(slice(c.start - o.start, c.stop - o.start) for c, o in zip(common, own))]
        return result

    # Findings ---------------------------------------------------------------------------------------------------

    def _lobe_point(self, place: str, margin: float, height: float) -> tuple[float, float, float]:
        """A point inside a lobe, `margin` mm from its neighbours and the chest wall as far as it goes."""
        side, name = place.split()[0], place.split()[1]
        depth, width = self.inner
        sign = _SIGNS[side]
        low, high = {
            "upper": (112, 175),
            "middle": (40, 80),
            "lower": (5, 78),
        }[name]
        half = min(height / 2, (high - low) / 2 - 1)
        z = self.rng.uniform(low + min(half, 30), high - min(half, 30))
        x = sign * self.rng.uniform(*((0.62, 0.78) if name == "middle" else (0.40, 0.68))) * width
        reach = max(0.6 * depth - margin, 4)
        y = {
            "upper": self.rng.uniform(-0.6, 0.6) * reach,
            "middle": -self.rng.uniform(0.25, 0.55) * depth,
            "lower": self.rng.uniform(0.25, 0.62) * depth if margin < 20 else 0.4 * depth,
        }[name]
        return float(z), float(y), float(x)

    def draw_nodule(self, lesions: list[Lesion]) -> None:
        choices = []
        for lesion in lesions:
            radius = lesion.size_mm / 2
            box, lung = self.lungs[lesion.side]
            air = lung & (self.hu[box] < -600)
            centres = np.array([self._lobe_point(lesion.place, radius, lesion.size_mm) for _ in range(120)])
            within = self.at(centres[:, None] + radius * _SPHERE, box, lung).all(1)
            shown = within * self.at(centres[:, None] + (radius + 4) * _BALL, box, air).mean(1)
            # Air around it, but for vessels; with none such, the place where it is seen best.
            choices.append(centres[shown >= min(0.88, shown.max())])
        self.spread(lesions, choices)
        for lesion in lesions:
            shape = self.ellipsoid(lesion.centre, (lesion.size_mm / 2,) * 3)
            self.paint(shape, lesion.hu)
            self.claim(lesion, shape)

    def draw_effusion(self, lesions: list[Lesion]) -> None:
        lesion = lesions[0]
        depth, _ = self.inner
        shapes = []
        for side in ("left", "right") if lesion.side == "both" else (lesion.side,):
            box, lung = self.lungs[side]
            z, y, _ = self.grid(box)
            floor = float(z[lung.any((1, 2))].min())
            height = (z - floor) / lesion.extent_mm
            # Level and tilt are any: else the level in one slice would tell how far the fluid reaches.
            level = self.rng.uniform(-0.25, 0.3)
            tilt = self.rng.uniform(0.15, min(0.7, 0.75 - level))
            mask = lung & (height <= 1) & (y > (level + tilt * height) * depth)
            mask &= self.hu[box] < -300  # never over the heart
            self.paint((box, mask), lesion.hu)
            shapes.append((box, mask))
        lesion.centre = (round(floor + lesion.extent_mm / 2, 1), round(0.6 * depth, 1), 0.0)
        self.claim(lesion, *shapes)

    def draw_consolidation(self, lesions: list[Lesion]) -> None:
        lesion = lesions[0]
        z0, y0, x0 = self._lobe_point(lesion.place, 25, min(lesion.extent_mm, 60))
        box, lung = self.lungs[lesion.side]
        z, y, x = self.grid(box)
        position = (z - z0) / lesion.extent_mm + 0.5  # 0 at the feet end, 1 at the head end
        radius = lesion.size_mm / 2 * _widening(position, lesion.growth)
        mask = lung & (position >= 0) & (position <= 1) & ((y - y0) ** 2 + (x - x0) ** 2 <= radius**2)
        mask &= self.hu[box] < -300
        self.paint((box, mask), lesion.hu)
        bronchi = mask & (np.mod(y + 0.4 * x, 17) < 2.5) & (np.mod(x, 13) < 3.5)
        self.paint((box, bronchi), -700)
        lesion.centre = (round(z0, 1), round(y0, 1), round(x0, 1))
        self.claim(lesion, (box, mask))

    def draw_emphysema(self, lesions: list[Lesion]) -> None:
        lesion = lesions[0]
        rng, (depth, width) = self.rng, self.inner
        low, high = {"upper lobes": (105, 200), "lower lobes": (-30, 85), "both lungs": (-30, 200)}[lesion.place]
        shapes = []
        for side, sign in _SIGNS.items():
            box, lung = self.lungs[side]
            drawn = np.zeros_like(lung)
            region = lung & (self.grid(box)[0] > low) & (self.grid(box)[0] < high) & (self.hu[box] < -700)
            self.paint((box, region), -950)
            for _ in range(int(0.55 * (high - low))):
                centre = (
                    rng.uniform(low, high),
                    rng.uniform(-0.85, 0.85) * depth,
                    sign * rng.uniform(0.1, 0.95) * width,
                )
                bubble, mask = self.ellipsoid(centre, (rng.uniform(9, 20), *rng.uniform(5, 11, 2)))
                mask &= self._crop((box, region), bubble)
                self.paint((bubble, mask), lesion.hu)
                drawn |= self._crop((bubble, mask), box)  # bubbles overlap
            shapes.append((box, drawn))
        lesion.centre = ((low + high) / 2, 0.0, 0.0)
        self.claim(lesion, *shapes)

    def draw_cardiomegaly(self, lesions: list[Lesion]) -> None:
        box, mask = self.heart
        lesions[0].size_mm = round(2 * self.heart_ratio * self.inner[1], 1)
        lesions[0].hu = round(self.chamber, 1)
        lesions[0].centre = (38.0, 0.0, 0.0)
        ventricle = np.abs(self.hu[box] - self.chamber - 12) < 0.01
        self.claim(lesions[0], (box, mask & (ventricle | (np.abs(self.hu[box] - self.chamber) < 0.01))))

    def draw_aneurysm(self, lesions: list[Lesion]) -> None:
        lesion = lesions[0]
        low, high = self.axes[0][0] + 8, self.aorta_top - 12
        if lesion.place == "thoracic aorta":
            low = 5
        if lesion.place == "abdominal aorta":
            high = -15
        length = lesion.extent_mm = min(lesion.extent_mm, high - low)
        first, last = low, high - length
        if lesion.place.startswith("both"):  # plainly in each part
            first, last = max(low, 5 + 35 - length), min(-15 - 35, high - length)
        start = self.rng.uniform(first, last)
        # Where it is hardly wider than the aorta beside it there is no aneurysm: that part of its shape is cut off.
        shape = np.linspace(0, 1, 201)
        shown = shape[lesion.size_mm / 2 * _widening(shape, lesion.growth) > 1.1 * self.aorta_radius]
        position = (self.axes[0] - start) / length
        inside = (position >= 0) & (position <= 1)
        widened = lesion.size_mm / 2 * _widening(shown[0] + position * (shown[-1] - shown[0]), lesion.growth)
        radii = np.where(inside, widened, self.aorta_radius).astype(np.float32)
        box, mask = self._draw_aorta(radii, self.aorta_top)
        lesion.hu = round(self.blood, 1)
        lesion.centre = (round(start + length / 2, 1), self.aorta[0], self.aorta[1])
        self.claim(lesion, (box, mask & inside[box[0]][:, None, None]))

    def draw_liver_lesion(self, lesions: list[Lesion]) -> None:
        choices = []
        box = self.box((-130, 30), *((-reach, reach) for reach in self.inner))
        free = self.liver_mask[box] & (np.abs(self.hu[box] - self.liver) < 1)  # not under kidney, lung, heart or fluid
        for lesion in lesions:
            middle, radii = (np.array(values) for values in self.liver_lobes[lesion.side])
            centres = middle + self.rng.uniform(-0.9, 0.9, (600, 3)) * (radii - lesion.size_mm / 2)
            # On its own side of both, the middle of the body and the border of the lobes.
            centres = centres[_SIGNS[lesion.side] * centres[:, 2] > 0.5 * lesion.size_mm * (lesion.side == "right")]
            radius = lesion.size_mm / 2
            within = self.at(centres[:, None] + radius * _BALL, box, free).mean(1)
            within += self.at(centres[:, None] + (radius + 2) * _SPHERE, box, free).mean(1)
            choices.append(centres[within >= within.max()])
        self.spread(lesions, choices)
        for lesion in lesions:
            shape = self.ellipsoid(lesion.centre, (lesion.size_mm / 2,) * 3)
            lesion.hu = round(self.liver + lesion.hu, 1)
            self.paint(shape, lesion.hu)
            self.claim(lesion, shape)

    def draw_renal_stone(self, lesions: list[Lesion]) -> None:
        for lesion in lesions:
            z, y, x = self.kidneys[lesion.side]
            radius = lesion.size_mm / 2
            for _ in range(50):
                centre = (z + self.rng.uniform(-22, 22), y + self.rng.uniform(-6, 6), x + self.rng.uniform(-7, 7))
                box, mask = self.ellipsoid(centre, (max(radius, self.spacing[0] * 0.6), radius, radius))
                below = self.hu[box][mask]
                # Cortex, fat or pelvis of the kidney, not a wide aorta beside it.
                if np.any([np.abs(below - hu) < 0.01 for hu in (self.kidney, -40, self.pelvis)], axis=0).all():
                    break
            self.paint((box, mask), lesion.hu)
            lesion.centre = tuple(round(float(c), 1) for c in centre)
            self.claim(lesion, (box, mask))

    def draw_ascites(self, lesions: list[Lesion]) -> None:
        lesion = lesions[0]
        box, cavity = self.cavity
        depth, width = self.inner
        z, y, x = self.grid(box)
        thickness = {"small": 9, "moderate": 18, "large": 32}[lesion.amount]
        core = (y / (depth - thickness)) ** 2 + (x / (width - thickness)) ** 2 > 1
        top = {"small": -60, "moderate": -25, "large": -5}[lesion.amount]
        mask = cavity & core & (z < top) & (y < 0.75 * depth)
        fat = (self.hu[box] > -140) & (self.hu[box] < -60)
        organ = np.abs(self.hu[box] - self.liver) < 1
        mask &= fat | organ  # around bowel, spleen and kidneys; the liver draws back
        self.paint((box, mask), lesion.hu)
        lesion.centre = (-120.0, 0.0, 0.0)
        self.claim(lesion, (box, mask))

    def draw_fracture(self, lesions: list[Lesion]) -> None:
        for lesion in lesions:
            self._draw_fractured_vertebra(lesion)

    def _draw_fractured_vertebra(self, lesion: Lesion) -> None:
        period = self.body_height + 5
        low, high = (8, 190) if lesion.place == "thoracic spine" else (self.axes[0][0] + period, -18)
        bottoms = np.arange(-20, 20) * period - self.spine_offset
        bottoms = bottoms[(bottoms > low) & (bottoms + self.body_height < high)]
        bottom = float(self.rng.choice(bottoms))
        height = self.body_height * (1 - lesion.height_loss / 100)
        box = self.box((bottom, bottom + self.body_height), (self.spine_y - 36, self.spine_y + 20), (-36, 36))
        z, y, x = self.grid(box)
        outline = ((y - self.spine_y) / 19) ** 2 + (x / 22) ** 2
        haematoma = (y - self.spine_y) ** 2 + x**2 <= 36**2  # beside the vertebra, in fat and lung
        self.paint((box, haematoma & (self.hu[box] < 0)), 65)
        self.paint((box, np.broadcast_to(outline <= 1, self.hu[box].shape)), 85)
        self.owner[box][np.broadcast_to(outline <= 1, self.hu[box].shape)] = 0  # of a wide aorta
        bulge = ((y - self.spine_y + 2) / 22) ** 2 + (x / 26) ** 2 <= 1
        mask = bulge & (z >= bottom) & (z < bottom + height) & (y < self.spine_y + 19)
        if not mask.any():  # thinner than a slice
            mask = bulge & (np.abs(z - bottom - height / 2) <= self.spacing[0])
        self.paint((box, mask), lesion.hu)
        lesion.centre = (round(bottom + height / 2, 1), self.spine_y, 0.0)
        self.claim(lesion, (box, mask))

    def finish(self) -> Phantom:
        noise = self.rng.standard_normal(self.hu.shape, dtype=np.float32)
        self.hu += self.plan["acquisition"]["noise"] * noise
        phase = self.plan["phase"]
        self.measure()
        lesions = self.plan["lesions"]
        findings = [Finding(name, lesions[name]) for name in FINDINGS if name in lesions]
        return Phantom(
            hu=np.clip(np.rint(self.hu), -1024, 3071).astype(np.int16),
            spacing=tuple(round(step, 6) for step in self.spacing),
            phase=phase,
            findings=findings,
            acquisition=self.plan["acquisition"],
            heart_ratio=round(float(self.heart_ratio), 3),
            held_out=any(is_held_out(f.name, lesion, phase) for f in findings for lesion in f.lesions),
            organ_areas=self.organ_areas,
        )


_SIGNS = {"left": 1, "right": -1}


def _on_sphere(number: int) -> np.ndarray:
    """Points spread evenly over the unit sphere, along a golden spiral."""
    z = 1 - (2 * np.arange(number) + 1) / number
    angle = np.pi * (3 - 5**0.5) * np.arange(number)
    return np.stack([z, *(np.sqrt(1 - z**2) * turn(angle) for turn in (np.cos, np.sin))], axis=1)


_SPHERE = _on_sphere(48)
_BALL = _on_sphere(80) * np.mod(np.arange(80) * 0.618, 1)[:, None] ** (1 / 3)


def _widening(position: np.ndarray, growth: str) -> np.ndarray:
    """Share of the largest radius at 0 (feet end) to 1 (head end) of a lesion."""
    position = np.clip(position, 0, 1)
    if growth == "head":
        return 0.35 + 0.65 * position
    if growth == "feet":
        return 1.0 - 0.65 * position
    if growth == "middle":
        return 0.35 + 0.65 * np.sqrt(np.clip(1 - (2 * position - 1) ** 2, 0, 1))
    return np.ones_like(position)
