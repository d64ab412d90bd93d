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
"""What the labels of a phantom say is what its voxels show."""

import itertools
import json

import numpy as np
import pytest
from drawn_phantom import coarse, drawn_phantom
from hypothesis import given, settings
from hypothesis import strategies as st

from ct_moe.trainers.phantoms import anatomy
from ct_moe.trainers.phantoms.anatomy import draw_phantom
from ct_moe.trainers.phantoms.labels import FINDINGS, LOBES, PHASES
from ct_moe.trainers.phantoms.plan import HELD_OUT, plan_phantom


SIGNS = {"left": 1, "right": -1}


def only(drawn):
    (finding,) = drawn.phantom.findings
    return finding.lesions


def test_a_seed_gives_one_phantom_and_splits_never_share_one():
    first, again = (draw_phantom(3, findings=("effusion",)) for _ in range(2))
    assert np.array_equal(first.hu, again.hu)
    assert first.labels() == again.labels()
    others = [draw_phantom(4, findings=("effusion",))]
    others += [draw_phantom(3, split, ("effusion",)) for split in ("validation", "test")]
    for other in others:
        assert first.hu.shape != other.hu.shape or (first.hu != other.hu).mean() > 0.9


def test_unknown_splits_and_findings_are_named():
    with pytest.raises(ValueError, match="split='dev': use one of train, validation, test"):
        draw_phantom(0, "dev")
    with pytest.raises(ValueError, match=r"findings=\['tumour'\]: use names of nodule"):
        draw_phantom(0, findings=("tumour", "nodule"))


def test_labels_are_json_without_voxels():
    phantom = draw_phantom(0, findings=("nodule", "ascites"))
    labels = json.loads(json.dumps(phantom.labels()))
    assert "hu" not in labels
    assert labels["shape"] == list(phantom.hu.shape)
    assert labels["extent_mm"] == pytest.approx(phantom.hu.shape[0] * phantom.spacing[0])
    assert labels["phase"] in PHASES
    assert [finding["name"] for finding in labels["findings"]] == ["nodule", "ascites"]
    for areas in labels["organ_areas"].values():
        assert len(areas) == phantom.hu.shape[0]


def test_a_normal_scan_has_no_finding_and_looks_like_a_body():
    phantom = draw_phantom(5, findings=())
    assert phantom.findings == []
    assert phantom.hu.dtype == np.int16
    assert phantom.hu.min() >= -1024
    assert 0.38 <= phantom.heart_ratio <= 0.47
    shares = [
        ((phantom.hu > low) & (phantom.hu < high)).mean() for low, high in ((-1024, -900), (-900, -760), (0, 90))
    ]
    assert min(shares) > 0.03  # air around, lung, soft tissue


@pytest.mark.parametrize("name", FINDINGS)
def test_each_finding_can_be_drawn_alone_and_its_areas_are_those_of_its_voxels(name):
    drawn = drawn_phantom(1, (name,), "test")
    (finding,) = drawn.phantom.findings
    assert finding.name == name
    for lesion in finding.lesions:
        areas = np.array(lesion.slice_areas)
        assert len(areas) == drawn.phantom.hu.shape[0]
        assert lesion.num_slices == np.count_nonzero(areas) > 0
        assert lesion.extent_mm == pytest.approx(lesion.num_slices * drawn.phantom.spacing[0])
        if name not in ("nodule", "liver lesion", "renal stone", "fracture"):
            assert len(finding.lesions) == 1
    if name in ("nodule", "liver lesion", "effusion", "consolidation", "renal stone", "ascites"):
        total = sum(np.array(lesion.slice_areas) for lesion in finding.lesions)
        assert np.allclose(drawn.areas(drawn.changed(name)), total, atol=0.3)  # rounded to 0.1 mm2 per lesion


@pytest.mark.parametrize("seed", range(5))
def test_nodules_are_spheres_in_their_lobe(seed):
    drawn = drawn_phantom(seed, ("nodule",))
    thickness, _, pixel = drawn.phantom.spacing
    lesions = only(drawn)
    assert [lesion.size_mm for lesion in lesions] == sorted((lesion.size_mm for lesion in lesions), reverse=True)
    for lesion in lesions:
        mask = drawn.lesion("nodule", lesion.hu)
        assert lesion.place in LOBES
        assert lesion.place.startswith(lesion.side)
        assert drawn.width(mask) == pytest.approx(lesion.size_mm, abs=1.3 * pixel)
        assert drawn.extent(mask) == pytest.approx(lesion.size_mm, abs=thickness)
        z, y, x = drawn.places(mask).mean(0)
        assert np.sign(x) == SIGNS[lesion.side]
        assert (z, y, x) == pytest.approx(lesion.centre, abs=thickness / 2 + 0.1)
        assert ("lower" in lesion.place) <= (z < 90)
        assert ("upper" in lesion.place) <= (z > 100)
        assert ("middle" in lesion.place) <= (y < 0)  # the middle lobe lies in front
        noise = drawn.phantom.acquisition["noise"]
        assert drawn.phantom.hu[mask].mean() == pytest.approx(lesion.hu, abs=1 + 4 * noise / np.sqrt(mask.sum()))
        before = drawn.steps["nodule"][0][mask]
        assert (before < -700).mean() > 0.5  # lung, but for its vessels


def test_stones_are_found_in_their_kidneys_by_their_density_alone():
    counts = set()
    for seed in range(8):
        phantom = draw_phantom(seed, findings=("renal stone",))
        ((*stones,),) = (finding.lesions for finding in phantom.findings)
        dense = phantom.hu > 620  # bone has at most 480, and the noise of training scans is below 20
        columns = (np.arange(phantom.hu.shape[2]) - (phantom.hu.shape[2] - 1) / 2) * phantom.spacing[2]
        assert len({stone.side for stone in stones}) == len(stones) <= 2
        assert {side for side, sign in SIGNS.items() if dense[..., sign * columns > 0].any()} == {
            stone.side for stone in stones
        }
        for stone in stones:
            mask = dense & (SIGNS[stone.side] * columns > 0)
            assert np.allclose(mask.sum((1, 2)) * phantom.spacing[1] * phantom.spacing[2], stone.slice_areas, atol=0.1)
            found = columns[np.nonzero(mask)[2]]
            assert abs(found.mean()) > 30
            assert stone.place == f"{stone.side} kidney"
            width = np.ptp(found) + phantom.spacing[2]
            assert width == pytest.approx(stone.size_mm, abs=1.3 * phantom.spacing[2])
            assert phantom.hu[mask].mean() == pytest.approx(stone.hu, abs=15)
        assert [stone.size_mm for stone in stones] == sorted((stone.size_mm for stone in stones), reverse=True)
        counts.add(len(stones))
    assert counts == {1, 2}


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_liver_lesions_are_darker_than_the_liver_and_on_their_side(seed):
    drawn = drawn_phantom(seed, ("liver lesion",))
    for lesion in only(drawn):
        mask = drawn.lesion("liver lesion", lesion.hu)
        assert np.allclose(drawn.steps["liver lesion"][0][mask], drawn.scene.liver)
        assert 60 <= drawn.scene.liver - lesion.hu <= 90.1
        assert drawn.width(mask) == pytest.approx(lesion.size_mm, abs=1.3 * drawn.phantom.spacing[2])
        assert (drawn.places(mask)[:, 2].mean() > 0) == (lesion.side == "left")
        assert lesion.place == f"{lesion.side} lobe of the liver"


def test_effusions_lie_at_the_back_of_their_side_and_their_amount_is_their_extent():
    limits = {"small": (40, 60), "moderate": (75, 115), "large": (120, 175)}
    seen = set()
    for seed in range(6):
        drawn = drawn_phantom(seed, ("effusion",))
        (lesion,) = only(drawn)
        mask = drawn.changed("effusion")
        places = drawn.places(mask)
        sides = {side for side, sign in SIGNS.items() if (sign * places[:, 2] > 0).mean() > 0.1}
        assert sides == ({"left", "right"} if lesion.side == "both" else {lesion.side})
        assert places[:, 1].mean() > 0
        low, high = limits[lesion.amount]
        thickness = drawn.phantom.spacing[0]
        assert low - thickness <= drawn.extent(mask) <= high + thickness
        assert drawn.clean[mask].mean() == pytest.approx(lesion.hu, abs=0.1)
        seen.add((lesion.side, lesion.amount))
    assert len(seen) > 3


@pytest.mark.parametrize("name", ["consolidation", "aneurysm"])
def test_lesions_widen_where_their_label_says(name):
    seen = set()
    for seed in range(8):
        drawn = drawn_phantom(seed, (name,))
        (lesion,) = only(drawn)
        areas = np.array(lesion.slice_areas)
        if name == "aneurysm":  # the vessel on both sides of it is no part of it
            blood = np.isclose(drawn.clean, drawn.scene.blood, atol=1e-3)
            # The ascending aorta is 45 mm away.
            y, x = (axis - centre for axis, centre in zip(drawn.scene.axes[1:], drawn.scene.aorta))
            around = y[:, None] ** 2 + x**2 < (lesion.size_mm / 2 + 3) ** 2
            measured = drawn.areas(blood & around)
            inside = areas > 0
            assert np.allclose(measured[inside], areas[inside], rtol=0.05, atol=30)
            widest = 2 * np.sqrt(areas.max() / np.pi)
            assert widest == pytest.approx(lesion.size_mm, rel=0.08)
            assert drawn.clean[blood].mean() == pytest.approx(lesion.hu, abs=0.1)
            heights = drawn.scene.axes[0][inside]
            if lesion.place == "both parts of the aorta":
                assert heights.min() < -15 - 30
                assert heights.max() > 5 + 30
            else:
                assert (heights.mean() > 0) == (lesion.place == "thoracic aorta")
        areas = areas[areas > 0]
        centre = (areas * np.arange(len(areas))).sum() / areas.sum() / (len(areas) - 1)  # 0: feet end, 1: head end
        # The wall of the chest cuts consolidations, so this is about the drawn shape of aneurysms first of all.
        if name == "aneurysm":
            expected = {"head": centre > 0.55, "feet": centre < 0.45}.get(lesion.growth, 0.42 < centre < 0.58)
            assert expected, (seed, lesion.growth, centre)
            assert (areas.min() / areas.max() > 0.9) == (lesion.growth == "constant")
        seen.add(lesion.growth)
    assert len(seen) > 2


@pytest.mark.parametrize("seed", range(3))
def test_consolidations_fill_lung_of_their_side(seed):
    drawn = drawn_phantom(seed, ("consolidation",))
    (lesion,) = only(drawn)
    mask = drawn.changed("consolidation")
    assert lesion.place.startswith(lesion.side)
    assert (SIGNS[lesion.side] * drawn.places(mask)[:, 2] > 0).all()
    assert (drawn.steps["consolidation"][0][mask] < -300).all()
    assert drawn.width(mask) <= lesion.size_mm + drawn.phantom.spacing[2]
    values, counts = np.unique(drawn.clean[mask], return_counts=True)
    assert values[counts.argmax()] == pytest.approx(lesion.hu, abs=0.1)
    assert set(np.round(values)) <= {round(lesion.hu), -700}  # and air in its bronchi


def test_the_heart_is_as_wide_as_its_ratio_says():
    for seed, findings in ((0, ("cardiomegaly",)), (1, ("cardiomegaly",)), (2, ())):
        drawn = drawn_phantom(seed, findings)
        scene = drawn.scene
        middle = int(np.abs(scene.axes[0] - 38).argmin())
        plane = drawn.clean[middle : middle + 1]
        heart = np.isclose(plane, scene.chamber, atol=1e-3) | np.isclose(plane, scene.chamber + 12, atol=1e-3)
        # Here the lungs reach 0.977 of the chest's half width on either side.
        chest = drawn.width((plane > -870) & (plane < -790)) / 0.977
        # The mediastinum may hide the right border of a heart of ordinary size.
        tolerance = 0.025 if findings else 0.08
        assert drawn.width(heart) / chest == pytest.approx(drawn.phantom.heart_ratio, abs=tolerance)
        if findings:
            (lesion,) = only(drawn)
            assert drawn.width(heart) == pytest.approx(lesion.size_mm, abs=2 * drawn.phantom.spacing[2])
            assert drawn.phantom.heart_ratio > 0.55


def test_emphysema_lies_in_the_lobes_of_its_label():
    for seed in range(4):
        drawn = drawn_phantom(seed, ("emphysema",))
        (lesion,) = only(drawn)
        low, high = {"upper lobes": (100, 215), "lower lobes": (-60, 90), "both lungs": (-60, 215)}[lesion.place]
        z = drawn.places(np.isclose(drawn.clean, lesion.hu))[:, 0]
        assert low < z.min() < z.max() < high


def test_more_ascites_is_more_fluid():
    volumes = {}
    for seed in range(7):
        drawn = drawn_phantom(seed, ("ascites",))
        (lesion,) = only(drawn)
        mask = drawn.changed("ascites")
        assert drawn.places(mask)[:, 0].max() < 0  # below the diaphragm
        assert drawn.clean[mask].mean() == pytest.approx(lesion.hu, abs=0.1)
        volumes.setdefault(lesion.amount, []).append(drawn.areas(mask).max())
    order = [volumes[amount] for amount in ("small", "moderate", "large") if amount in volumes]
    assert len(order) > 1
    for less, more in itertools.pairwise(order):
        assert max(less) < min(more)


def test_fractured_vertebrae_have_lost_their_height():
    counts = set()
    for seed in range(8):
        drawn = drawn_phantom(seed, ("fracture",))
        lesions = only(drawn)
        counts.add(len(lesions))
        assert len({lesion.place for lesion in lesions}) == len(lesions) <= 2
        assert [lesion.height_loss for lesion in lesions] == sorted((x.height_loss for x in lesions), reverse=True)
        for lesion in lesions:
            bone = np.isclose(drawn.clean, lesion.hu) & drawn.changed("fracture")
            bone &= (np.abs(drawn.scene.axes[2]) < 28)[None, None]
            bone &= ((drawn.scene.axes[0] > 0) == (lesion.place == "thoracic spine"))[:, None, None]
            lost = 100 * (1 - drawn.extent(bone) / drawn.scene.body_height)
            step = 100 * drawn.phantom.spacing[0] / drawn.scene.body_height
            assert lost == pytest.approx(lesion.height_loss, abs=step)
    assert counts == {1, 2}


def holds(lesions: dict, phase: str) -> bool:
    """Whether one of the held-out combinations is among the lesions per finding."""
    return any(
        phase == wanted_phase and getattr(lesion, attribute) == value
        for name, attribute, value, wanted_phase in HELD_OUT
        for lesion in lesions.get(name, ())
    )


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_combinations_are_held_out_and_acquisitions_too(split):
    # What is planned, since drawing takes longer by far; the next test draws.
    plans = [
        plan_phantom(np.random.default_rng([("train", "validation", "test").index(split), seed]), split, None)
        for seed in range(600)
    ]
    met = [holds(plan["lesions"], plan["phase"]) for plan in plans]
    unseen = [plan["acquisition"]["unseen"] for plan in plans]
    for plan in plans:
        acquisition = plan["acquisition"]
        assert (acquisition["thickness"] in (2, 4)) == acquisition["unseen"]
        assert (acquisition["matrix"] in (176, 240)) == acquisition["unseen"]
        assert (acquisition["noise"] > 20.5) == acquisition["unseen"]
        assert not (plan["phase"] == "delayed" and "renal stone" in plan["lesions"])
    if split == "test":
        assert 0.45 < np.mean(met) < 0.75
        assert 0.4 < np.mean(unseen) < 0.6
        for name, attribute, value, phase in HELD_OUT:  # each of them is measured
            hits = [
                any(getattr(lesion, attribute) == value for lesion in plan["lesions"].get(name, ()))
                for plan in plans
                if plan["phase"] == phase
            ]
            assert sum(hits) > 20
    else:
        assert not any(met)
        assert not any(unseen)


def test_attributes_of_held_out_combinations_are_seen_in_training_one_by_one():
    plans = [plan_phantom(np.random.default_rng([0, seed]), "train", None) for seed in range(400)]
    for name, attribute, value, phase in HELD_OUT:
        assert any(
            getattr(lesion, attribute) == value for plan in plans for lesion in plan["lesions"].get(name, ())
        ), name
        assert any(plan["phase"] == phase and name in plan["lesions"] for plan in plans), name


def test_drawn_scans_keep_what_was_planned():
    for split in ("train", "validation", "test"):
        for seed in range(3):
            phantom = draw_phantom(seed, split)
            assert phantom.held_out == holds({f.name: f.lesions for f in phantom.findings}, phantom.phase)
            names = [finding.name for finding in phantom.findings]
            assert names == [name for name in FINDINGS if name in names]
            assert ("cardiomegaly" in names) == (phantom.heart_ratio > 0.5)


def test_every_liver_lesion_shows():
    for seed in (32, 88, 55):
        drawn = drawn_phantom(seed, ("liver lesion",))
        for lesion in only(drawn):
            volume = sum(lesion.slice_areas) * drawn.phantom.spacing[0]
            assert volume > 0.5 * np.pi / 6 * lesion.size_mm**3


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    split=st.sampled_from(("train", "validation", "test")),
    names=st.sets(st.sampled_from(FINDINGS)),
)
def test_what_was_asked_for_is_drawn_and_nothing_else(seed, split, names):
    with pytest.MonkeyPatch.context() as patch:
        coarse(patch)
        phantom = draw_phantom(seed, split, tuple(sorted(names)))
    assert [finding.name for finding in phantom.findings] == [name for name in FINDINGS if name in names]
    depth = phantom.hu.shape[0]
    assert {len(areas) for areas in phantom.organ_areas.values()} == {depth}
    for finding in phantom.findings:
        for lesion in finding.lesions:
            inside = np.flatnonzero(lesion.slice_areas)
            assert len(lesion.slice_areas) == depth
            assert lesion.num_slices == len(inside) > 0
            assert lesion.extent_mm == pytest.approx(len(inside) * phantom.spacing[0])


@pytest.mark.slow
@pytest.mark.parametrize(("split", "low", "high"), [("train", 0, 0), ("validation", 0, 0), ("test", 0.4, 0.75)])
def test_labels_of_drawn_scans_hold_out_combinations(split, low, high, monkeypatch):
    coarse(monkeypatch)
    phantoms = [draw_phantom(seed, split) for seed in range(60)]
    met = [holds({f.name: f.lesions for f in phantom.findings}, phantom.phase) for phantom in phantoms]
    assert met == [phantom.held_out for phantom in phantoms]
    assert low <= np.mean(met) <= high


@pytest.mark.parametrize("organ", ["lungs", "kidneys", "liver"])
def test_areas_of_organs_are_those_of_their_voxels(organ):
    drawn = drawn_phantom(5, ())
    scene, painted = drawn.scene, np.zeros(drawn.clean.shape, dtype=bool)
    shapes = {
        "lungs": lambda: scene.lungs.values(),
        "kidneys": lambda: [scene.ellipsoid(centre, (54, 27, 27)) for centre in scene.kidneys.values()],
        "liver": lambda: [scene.ellipsoid(*lobe) for lobe in scene.liver_lobes.values()],
    }[organ]()
    for box, mask in shapes:
        painted[box] |= mask & scene._inside_cavity(box) if organ == "liver" else mask
    assert np.allclose(drawn.areas(painted), drawn.phantom.organ_areas[organ], atol=0.2)


def test_held_out_is_decided_by_what_was_drawn(monkeypatch):
    coarse(monkeypatch)
    phantom = draw_phantom(72, "test")  # its lesion of the left lobe of the liver found no room
    assert phantom.held_out == holds({f.name: f.lesions for f in phantom.findings}, phantom.phase)


def test_the_extent_of_an_aneurysm_shows(monkeypatch):
    coarse(monkeypatch)
    for seed in range(12):
        drawn = drawn_phantom(seed, ("aneurysm",))
        (lesion,) = only(drawn)
        wider = np.array(lesion.slice_areas) > 1.1 * np.pi * drawn.scene.aorta_radius**2
        shown = wider.sum() * drawn.phantom.spacing[0]
        assert shown == pytest.approx(lesion.extent_mm, abs=2 * drawn.phantom.spacing[0]), (seed, lesion.growth)


def test_the_size_of_a_lesion_does_not_tell_how_many_there_are():
    plans = [
        plan_phantom(np.random.default_rng([0, seed]), "train", ("nodule", "liver lesion")) for seed in range(2000)
    ]
    for name, sizes in (("nodule", range(10, 23, 2)), ("liver lesion", range(16, 27, 2))):
        seen = {1: [], 2: [], 3: []}
        for plan in plans:
            lesions = plan["lesions"][name]
            seen[len(lesions)] += [lesion.size_mm for lesion in lesions]
        counts = {number: len(found) / number for number, found in seen.items()}
        assert counts[1] / 2000 == pytest.approx(0.4, abs=0.04)
        assert counts[3] / 2000 == pytest.approx(0.4, abs=0.04)
        for found in seen.values():
            shares = [found.count(size) / len(found) for size in sizes]
            assert sum(shares) == pytest.approx(1)
            assert max(abs(share - 1 / len(sizes)) for share in shares) < 0.05
            assert np.mean(found) == pytest.approx(np.mean(sizes), abs=0.5)


def test_lung_lesions_are_planned_where_they_can_be_seen():
    names = ("nodule", "consolidation", "effusion")
    amounts = set()
    for seed in range(400):
        plan = plan_phantom(np.random.default_rng([0, seed]), "train", names)
        nodules, (consolidation,), (effusion,) = (plan["lesions"][name] for name in names)
        places = [lesion.place for lesion in nodules]
        assert consolidation.place not in places
        assert sum("upper" in place for place in places) <= 2
        assert places.count("right middle lobe") <= 1
        if effusion.amount != "small":
            for side in ("left", "right") if effusion.side == "both" else (effusion.side,):
                assert f"{side} lower lobe" not in (*places, consolidation.place)
        amounts.add((effusion.side, effusion.amount))
    assert len(amounts) == 9


def test_all_findings_together_have_a_plan_in_every_split():
    for split in ("train", "validation", "test"):
        for seed in range(60):
            plan = plan_phantom(np.random.default_rng(seed), split, FINDINGS)
            assert tuple(plan["lesions"]) == FINDINGS
            assert split == "test" or not holds(plan["lesions"], plan["phase"])


CROWDS = (
    ("nodule", "consolidation", "effusion"),
    ("nodule", "effusion", "aneurysm", "cardiomegaly", "liver lesion"),
    FINDINGS,
    ("liver lesion", "ascites", "cardiomegaly", "renal stone", "aneurysm", "nodule", "emphysema", "fracture"),
)


def crowded(number: int):
    """Drawn scans of many findings: (drawn, planned number of lesions of each)."""
    for seed in range(number):
        planned = {}
        with pytest.MonkeyPatch.context() as patch:
            coarse(patch)
            plan = anatomy.plan_phantom

            def keep(*arguments, plan=plan, planned=planned):
                made = plan(*arguments)
                planned.update({name: len(lesions) for name, lesions in made["lesions"].items()})
                return made

            patch.setattr(anatomy, "plan_phantom", keep)
            yield drawn_phantom(seed, CROWDS[seed % len(CROWDS)], ("train", "test")[seed // 4 % 2]), planned


def test_nothing_hides_a_lesion_and_all_that_were_planned_are_there():
    apart, pairs = 0, 0
    for drawn, planned in crowded(150):
        scene, clean = drawn.scene, drawn.clean
        assert {f.name: len(f.lesions) for f in drawn.phantom.findings} == planned
        for finding in drawn.phantom.findings:
            for lesion in finding.lesions:
                assert lesion.num_slices > 0
                if finding.name not in ("nodule", "liver lesion"):
                    continue
                radius = lesion.size_mm / 2
                away = np.sqrt(sum((axis - c) ** 2 for axis, c in zip(np.ix_(*scene.axes), lesion.centre)))
                inside = clean[away <= radius]
                assert np.allclose(inside, lesion.hu, atol=0.06)
                if finding.name == "nodule":
                    shell = clean[(away > radius) & (away <= radius + 4)]
                    assert inside.mean() - shell.mean() > 300, lesion
                    assert (shell < -600).mean() > 0.75, lesion
                else:
                    shell = clean[(away > radius) & (away <= radius + 2)]
                    assert shell.mean() - inside.mean() > 50, lesion
                    assert (np.abs(shell - inside.mean()) > 25).all(), lesion
            if finding.name in ("nodule", "liver lesion"):
                for one, other in itertools.combinations(finding.lesions, 2):
                    pairs += 1
                    apart += not np.any(np.array(one.slice_areas) * other.slice_areas)
    assert apart / pairs > 0.97  # no slice shows two; where there is little room one may


def test_areas_are_those_of_the_voxels_that_show_a_lesion_in_the_end():
    for drawn, _ in crowded(40):
        for finding in drawn.phantom.findings:
            if finding.name in ("aneurysm", "cardiomegaly", "fracture"):  # of the HU of what lies beside them
                continue
            # What the drawing of one finding changed, and no other has changed since.
            shown = drawn.changed(finding.name) & (drawn.steps[finding.name][1] == drawn.clean)
            if finding.name == "emphysema":
                shown = np.isclose(drawn.clean, finding.lesions[0].hu)
            told = sum(np.array(lesion.slice_areas) for lesion in finding.lesions)
            assert np.allclose(drawn.areas(shown), told, atol=0.3), finding.name


def test_stones_lie_in_their_kidney_beside_a_wide_aorta():
    kidneys = 0
    for drawn, _ in crowded(60):
        if "renal stone" not in drawn.steps:
            continue
        below = drawn.steps["renal stone"][0][drawn.changed("renal stone")]
        scene = drawn.scene
        assert np.any([np.isclose(below, hu) for hu in (scene.kidney, scene.pelvis, -40)], axis=0).all()
        kidneys += 1
    assert kidneys > 20


def test_one_slice_does_not_tell_the_extent_of_an_effusion():
    """The level at the base, from the lowest slices: fluid of every amount begins high and low."""
    levels = {"small": [], "moderate": [], "large": []}
    with pytest.MonkeyPatch.context() as patch:
        coarse(patch)
        for seed in range(90):
            drawn = drawn_phantom(seed, ("effusion",))
            (lesion,) = only(drawn)
            slices = np.flatnonzero(lesion.slice_areas)
            assert np.ptp(slices) + 1 == len(slices)  # fluid over the whole extent
            side = "left" if lesion.side == "both" else lesion.side
            box, _ = drawn.scene.lungs[side]
            # The front of the fluid 30 mm above its floor, as a share of the chest's depth.
            z = int(np.abs(drawn.scene.axes[0][box[0]] - drawn.scene.axes[0][slices[0]] - 30).argmin())
            front = drawn.changed("effusion")[box][z].any(1).argmax()
            levels[lesion.amount].append(drawn.scene.axes[1][box[1]][front] / drawn.scene.inner[0])
    quartiles = {amount: np.quantile(found, [0.25, 0.75]) for amount, found in levels.items()}
    for one, other in itertools.combinations(quartiles.values(), 2):
        assert min(one[1], other[1]) > max(one[0], other[0])


def test_pairs_are_one_of_each_kind():
    names = ("renal stone", "aneurysm", "fracture")
    plans = [plan_phantom(np.random.default_rng([0, seed]), "train", names) for seed in range(600)]
    pairs = {
        name: np.mean([len(plan["lesions"][name]) == 2 for plan in plans]) for name in ("renal stone", "fracture")
    }
    assert 0.12 < pairs["renal stone"] < 0.25  # never in the arterial phase, whose right stones are held out
    assert 0.2 < pairs["fracture"] < 0.3
    for plan in plans:
        stones, (aneurysm,), fractures = (plan["lesions"][name] for name in names)
        assert len({stone.side for stone in stones}) == len(stones)
        assert len({fracture.place for fracture in fractures}) == len(fractures)
        assert plan["phase"] != "arterial" or [stone.side for stone in stones] == ["left"]
        if aneurysm.place == "both parts of the aorta":
            assert 120 <= aneurysm.extent_mm <= 200
    both = [plan["lesions"]["aneurysm"][0].place == "both parts of the aorta" for plan in plans]
    assert 0.2 < np.mean(both) < 0.35
