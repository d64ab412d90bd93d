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
"""Reports and questions say what the labels say; the test split says it in other sentences of the same words."""

import re
from collections import Counter

import numpy as np
import pytest
from drawn_phantom import coarse
from hypothesis import given
from hypothesis import strategies as st

from ct_moe.pipeline_ct_moe import REPORT_PROMPT
from ct_moe.pipeline_ct_moe import split_report as sections
from ct_moe.trainers.phantoms import texts, wordings
from ct_moe.trainers.phantoms.anatomy import draw_phantom
from ct_moe.trainers.phantoms.labels import FINDINGS, PHASES, Lesion
from ct_moe.trainers.phantoms.plan import plan_phantom
from ct_moe.trainers.phantoms.texts import (
    BOTH,
    EXTENTS,
    GROWTH_TEXTS,
    KINDS,
    LEVELS,
    ORGANS,
    PLACES,
    PLANES,
    balanced,
    plane_row,
    questions,
    report_text,
    scan_level,
    scan_rows,
    slice_findings,
    slice_texts,
)


NOUNS = {
    "nodule": "lung nodule",
    "effusion": "pleural effusion",
    "aneurysm": "aortic aneurysm",
    "fracture": "vertebral fracture",
}
NUMBERS = ("no", "one", "two", "three")
MEASURED = {"nodule", "consolidation", "aneurysm", "liver lesion", "renal stone"}


@pytest.fixture(scope="module")
def scans() -> dict[str, list[dict]]:
    """Labels of scans of every split."""
    with pytest.MonkeyPatch.context() as patch:
        coarse(patch)
        return {
            split: [draw_phantom(seed, split).labels() for seed in range(number)]
            for split, number in (("train", 150), ("validation", 10), ("test", 90))
        }


@pytest.fixture(scope="module")
def asked(scans) -> dict[str, list[list]]:
    """Every question about each of them."""
    return {
        split: [questions(labels, np.random.default_rng([7, number]), split) for number, labels in enumerate(found)]
        for split, found in scans.items()
    }


def split_report(text: str) -> tuple[str, str]:
    found = sections(text)
    return found["findings"], found["impression"]


def choice_of(completion: str) -> tuple[str, str]:
    """The choice and its letter."""
    return re.fullmatch(r"(.+), ([A-D])\.", completion).groups()


def lesions_of(labels: dict) -> dict[str, list[dict]]:
    return {finding["name"]: finding["lesions"] for finding in labels["findings"]}


def pairs(scans, asked, split):
    return zip(scans[split], asked[split], strict=True)


def slabs(scans, split):
    """Some slabs of every scan: (labels, low, high, texts)."""
    for number, labels in enumerate(scans[split]):
        rng = np.random.default_rng([11, number])
        for low in rng.uniform(0, 0.95, 4):
            yield labels, low, low + 0.05, slice_texts(labels, low, low + 0.05, rng, split)


def masked(text: str) -> str:
    """A sentence without what differs between scans: numbers, choices."""
    return re.sub(r"\d+", "#", text.split(" Choices: ")[0])


def words(text: str) -> set[str]:
    """Words, as they are written, and digits one by one."""
    return set(re.findall(r"[A-Za-z-]+|\d|[^\w\s]", text))


def all_texts(scans, asked, split) -> list[str]:
    found = []
    for number, (labels, pool) in enumerate(pairs(scans, asked, split)):
        for attempt in range(2):
            found.append(report_text(labels, np.random.default_rng([number, attempt]), split))
        found += [text for question in pool for text in (question.prompt, question.completion)]
        for plane in PLANES:
            row = plane_row("a", {**labels, "plane": plane}, np.random.default_rng(number), split)
            found += [row["prompt"], row["completion"]]
    for *_, slab in slabs(scans, split):
        found += [text for pair in slab for text in pair]
    return found


def test_no_word_of_the_test_split_is_new(scans, asked):
    trained = set().union(*map(words, all_texts(scans, asked, "train")))
    tested = set().union(*map(words, all_texts(scans, asked, "test")))
    assert {word.lower() for word in tested} <= {word.lower() for word in trained}
    # Written otherwise than in training: to a tokenizer another word, so let there be no more of them.
    assert tested - trained <= {"On", "Scan", "what"}


def test_no_sentence_of_the_test_split_was_trained(scans, asked):
    prompts = {
        split: {masked(question.prompt) for pool in asked[split] for question in pool} for split in ("train", "test")
    }
    assert not prompts["train"] & prompts["test"]
    sentences = {"train": set(), "test": set()}
    for split, found in sentences.items():
        for number, labels in enumerate(scans[split]):
            findings, _ = split_report(report_text(labels, np.random.default_rng(number), split))
            found |= {masked(sentence) for sentence in re.findall(r"[^.]+\.", findings)}
    assert not sentences["train"] & sentences["test"]
    for train, test in wordings.QUESTIONS.values():
        assert not set(train) & set(test)


def test_validation_is_worded_as_training(scans, asked):
    prompts = {
        split: {masked(question.prompt) for pool in asked[split] for question in pool}
        for split in ("train", "validation")
    }
    for number, labels in enumerate(scans["train"] * 3):  # again: some questions few scans can answer
        prompts["train"] |= {masked(question.prompt) for question in questions(labels, np.random.default_rng(number))}
    assert len(prompts["validation"]) > 50
    assert prompts["validation"] <= prompts["train"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_reports_mention_every_finding_once_and_deny_those_that_are_absent(scans, split):
    for number, labels in enumerate(scans[split]):
        findings, impression = split_report(report_text(labels, np.random.default_rng(number), split))
        assert findings
        assert impression
        present = lesions_of(labels)
        sentences = re.findall(r"[^.]+\.", findings.lower())
        assert labels["phase"] in sentences[0]
        for name in FINDINGS:
            noun = NOUNS.get(name, name)
            (sentence,) = [sentence for sentence in sentences if noun in sentence]
            assert sentence.count(noun) == 1
            denied = re.search(r"\bno\b", sentence) is not None
            assert denied != (name in present), (name, sentence)
            assert (noun in impression.lower()) == (name in present)
        if not present:
            assert "no abnormality" in impression.lower()


@pytest.mark.parametrize("split", ["train", "test"])
def test_reports_give_the_numbers_and_places_of_the_labels(scans, split):
    for number, labels in enumerate(scans[split]):
        findings, _ = split_report(report_text(labels, np.random.default_rng(number), split))
        sentences = re.findall(r"[^.]+\.", findings)
        for name, lesions in lesions_of(labels).items():
            (sentence,) = [each for each in sentences if NOUNS.get(name, name) in each.lower()]
            largest = lesions[0]
            if name in ("nodule", "cardiomegaly", "aneurysm", "liver lesion", "renal stone"):
                assert f"{round(largest['size_mm'])} mm" in sentence
            if name in ("effusion", "consolidation", "aneurysm"):
                stated = int(re.search(r"extent (?:of )?(\d+) mm", sentence)[1])
                assert abs(stated - largest["num_slices"] * labels["spacing"][0]) <= 5
            if name == "fracture":
                assert f"{largest['height_loss']} %" in sentence
            if name == "effusion":
                assert (
                    f"on {'both sides' if largest['side'] == 'both' else 'the ' + largest['side']}"
                    in sentence.replace("On", "on")
                )
            elif name not in ("cardiomegaly", "ascites"):
                # Nodules by the place of the largest; of what may be in two places both are told.
                places = {lesion["place"] for lesion in lesions}
                assert (BOTH[name] if name in BOTH and len(places) == 2 else largest["place"]) in sentence
            if name in ("consolidation", "aneurysm"):
                areas = np.trim_zeros(largest["slice_areas"])
                following = sentences[sentences.index(sentence) + 1 :][:1]
                assert (len(areas) >= 5) == bool(following and re.search(r"lower.*upper", following[0]))
                if len(areas) >= 5:
                    told = list(map(int, re.findall(r"\d+", following[0])))
                    widths = [2 * (third.mean() / np.pi) ** 0.5 for third in np.array_split(areas, 3)]
                    assert np.abs(np.subtract(told, widths)).max() <= 2.5  # from the feet up, as the words are
            if len(lesions) > 1:
                assert re.search(r"the largest (?:of|measures|with)|of the largest", sentence)


def test_closed_questions_have_four_choices_and_the_right_letter(scans, asked):
    letters = Counter()
    for split in asked:
        for _, pool in pairs(scans, asked, split):
            assert len({question.template for question in pool}) > 10
            for question in pool:
                assert question.kind in KINDS
                if question.choices is None:
                    assert question.template.startswith("open ")
                    assert " Choices: " not in question.prompt
                    continue
                assert len(question.choices) == len(set(question.choices)) == 4
                listed = re.fullmatch(r"A\. (.+) B\. (.+) C\. (.+) D\. (.+)", question.prompt.split(" Choices: ")[1])
                assert list(listed.groups()) == question.choices
                right, letter = choice_of(question.completion)
                assert question.choices["ABCD".index(letter)] == right == question.answer
                letters[letter] += 1
    assert min(letters.values()) / max(letters.values()) > 0.85


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_about_the_whole_scan_are_right_and_no_other_choice_is(scans, asked, split):
    for labels, pool in pairs(scans, asked, split):
        present = lesions_of(labels)
        organs = {ORGANS[name] for name in present}
        for question in pool:
            answer, template = question.answer, question.template.removeprefix("open ")
            what, _, name = template.partition(" ")
            wrong = set(question.choices or ()) - {answer}
            if what == "phase":
                assert answer == labels["phase"]
                assert question.choices is None or set(question.choices) == set(PHASES)
            elif what == "organ":
                assert answer in organs
                assert not wrong & organs
            elif what == "abnormality":
                assert answer in present or (answer == "no abnormality" and not present)
                assert not wrong & set(present)
                assert "no abnormality" not in wrong or present
            elif what == "presence":
                assert answer == ("yes" if name in present else "no")
                assert question.completion.startswith("Yes, " if name in present else "No, ")
            elif what == "where" and answer == "neither":
                assert name not in present
            elif what == "where":
                places, sides = ({lesion[part] for lesion in present[name]} for part in ("place", "side"))
                if name == "effusion":
                    assert answer == ("pleura of both sides" if sides == {"both"} else f"{sides.pop()} pleura")
                elif name in BOTH and answer == BOTH[name]:
                    assert len(places) == 2
                    assert name == "fracture" or sides == {"left", "right"}
                else:
                    assert {answer} == places
            elif what == "size":
                assert int(answer) == max(round(lesion["size_mm"]) for lesion in present[name])
                assert question.completion == f"It measures {answer} mm."


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_between_slices_follow_from_the_areas_in_every_slice(scans, asked, split):
    templates = Counter()
    for labels, pool in pairs(scans, asked, split):
        present = lesions_of(labels)
        thickness = labels["spacing"][0]
        for question in pool:
            if question.kind != "between_slices":
                continue
            what, _, name = question.template.removeprefix("open ").partition(" ")
            templates[question.template] += 1
            if what == "count":
                assert question.answer == NUMBERS[len(present.get(name, ()))]
                continue
            name = name.removesuffix(" lower").removesuffix(" upper")
            inside = np.flatnonzero(present[name][0]["slice_areas"])
            areas = np.array(present[name][0]["slice_areas"])[inside]
            extent = len(inside) * thickness
            if what == "extent" and question.choices is None:
                assert abs(int(question.answer) - extent) <= 5
            elif what == "extent":
                assert question.answer == f"{min(EXTENTS, key=lambda choice: abs(choice - extent))} mm"
                # No other choice is nearly as near.
                assert sorted(abs(choice - extent) for choice in EXTENTS)[1] > 24
            elif what == "level":
                assert len(present[name]) == 1
                middle = (inside.min() + inside.max() + 1) / 2 / len(present[name][0]["slice_areas"])
                assert question.answer == LEVELS[int(4 * middle)]
            elif what == "width":
                end = question.template.split()[-1]
                third = np.array_split(areas, 3)[{"lower": 0, "upper": 2}[end]]  # slices go from the feet up
                assert question.choices is None
                assert f"{end} end" in question.prompt
                assert abs(int(question.answer) - 2 * (third.mean() / np.pi) ** 0.5) <= 2.5
            else:
                assert what == "growth"
                third = len(areas) // 3
                ends, middle = (areas[:third].mean(), areas[-third:].mean()), areas[third:-third].mean()
                label = {text: growth for growth, text in GROWTH_TEXTS.items()}[question.answer]
                assert label == present[name][0]["growth"]
                assert {
                    "head": ends[1] > middle > ends[0],
                    "feet": ends[0] > middle > ends[1],
                    "middle": middle > max(ends),
                    "constant": areas.std() < 0.15 * areas.mean(),
                }[label]
    wanted = {f"growth {name}" for name in ("consolidation", "aneurysm")}
    wanted |= {f"extent {name}" for name in ("effusion", "consolidation", "aneurysm")}
    wanted |= {f"count {name}" for name in ("nodule", "liver lesion")}
    wanted |= {"level fracture", "open width consolidation lower", "open width aneurysm upper"}
    assert wanted <= set(templates)
    assert "level nodule" not in templates  # the lowest quarter would never be right


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 40))
def test_levels_are_quarters_of_the_scanned_range(below, inside, above):
    level = scan_level([0.0] * below + [5.0] * inside + [0.0] * above)
    middle = (below + inside / 2) / (below + inside + above)
    if level is None:
        assert min(abs(middle - border) for border in (0.25, 0.5, 0.75)) <= 0.0301
    else:
        assert level == LEVELS[min(int(4 * middle), 3)]


@given(st.sampled_from(sorted(GROWTH_TEXTS)), st.integers(9, 40), st.integers(0, 20), st.floats(100, 3000))
def test_growth_is_read_from_areas(growth, slices, below, largest):
    position = np.arange(slices) / (slices - 1)
    width = {
        "head": 0.35 + 0.65 * position,
        "feet": 1 - 0.65 * position,
        "middle": 0.35 + 0.65 * np.sqrt(1 - (2 * position - 1) ** 2),
        "constant": np.ones(slices),
    }[growth]
    assert texts._measured_growth([0.0] * below + list(largest * width**2) + [0.0]) == growth


def test_no_answer_is_the_usual_one(scans, asked):
    chosen = balanced(asked["train"], closed=8, opened=8, rng=np.random.default_rng(0))
    counts: dict[str, Counter] = {}
    possible: dict[str, set] = {}
    for pool, taken in zip(asked["train"], chosen, strict=True):
        for question in pool:
            possible.setdefault(question.template, set()).add(question.answer)
        assert sum(question.choices is not None for question in taken) <= 8
        assert sum(question.choices is None for question in taken) <= 8
        assert len({question.template for question in taken}) == len(taken)  # nothing is asked twice
        assert all(any(question is other for other in pool) for question in taken)
        for question in taken:
            counts.setdefault(question.template, Counter())[question.answer] += 1
    total, between = 0, 0
    for template, seen in counts.items():
        total += sum(seen.values())
        between += sum(seen.values()) * template.removeprefix("open ").startswith(
            ("count", "extent", "level", "growth", "width")
        )
        if not template.startswith(("open size", "open extent", "open width")):
            numbers = [seen[answer] for answer in possible[template]]
            assert max(numbers) - min(numbers) <= 3, (template, seen)
    assert total > 10 * len(chosen)
    assert between / total > 0.15
    closed = {template for template in counts if not template.startswith("open ")}
    assert {kind for pool in chosen for question in pool for kind in [question.kind]} == set(KINDS)
    assert len(closed) > 15


def test_rows_hold_the_report_and_what_was_chosen(scans, asked):
    labels, pool = scans["test"][0], asked["test"][0]
    rows = scan_rows("scans/0.nii.gz", labels, pool, np.random.default_rng(0), "test")
    assert len(rows) == 1 + len(pool)
    assert {row["images"] for row in rows} == {"scans/0.nii.gz"}
    assert {row["split"] for row in rows} == {"test"}
    assert rows[0]["prompt"] == REPORT_PROMPT
    assert rows[0]["task"] == "report"
    for row, question in zip(rows[1:], pool, strict=True):
        assert row["task"] == ("vqa_open" if question.choices is None else "vqa_closed")
        assert (row["prompt"], row["completion"]) == (question.prompt, question.completion)
        assert (row["held_out"], row["unseen"]) == (labels["held_out"], labels["acquisition"]["unseen"])


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("plane", PLANES[:3])
def test_plane_questions_have_the_right_letter(plane, split):
    row = plane_row("a", {"plane": plane}, np.random.default_rng(0), split)
    assert sorted(row["choices"]) == sorted(PLANES)
    right, letter = choice_of(row["completion"])
    assert row["choices"]["ABCD".index(letter)] == right == row["answer"] == plane
    assert f"{letter}. {plane}" in row["prompt"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_slice_texts_say_what_lies_in_the_slab(scans, split):
    said_something = 0
    for labels, low, high, slab in slabs(scans, split):
        depth = labels["shape"][0]
        cut = slice(int(np.floor(low * depth)), int(np.ceil(high * depth)))

        def area(areas, cut=cut):
            return np.mean(areas[cut])

        caption, phase, *_ = (completion for _, completion in slab)
        shown = caption.split("; ")[2]
        organs = caption.split("; it shows ")[1].split(";")[0]
        seen = {name for name, _ in slice_findings(labels, low, high)}
        for name, areas in labels["organ_areas"].items():
            assert (name in organs.split(", ")) == (area(areas) > 100)
        present = lesions_of(labels)
        for name in FINDINGS:
            named = NOUNS.get(name, name) in shown
            assert named == (name in seen)
            areas = [area(lesion["slice_areas"]) for lesion in present.get(name, ())]
            if named:
                assert max(areas) > 5
                said_something += 1
                told = re.search(rf"{NOUNS.get(name, name)} of (\d+) mm", shown)
                assert (told is not None) == (name in MEASURED)
                if told:  # the diameter of a disc, not the size of the whole lesion
                    assert abs(int(told[1]) - 2 * (max(areas) / np.pi) ** 0.5) <= 1
            elif areas:
                assert max(areas) < 100
        assert ("no abnormality" in shown) == (not seen)
        assert choice_of(phase)[0] == labels["phase"]
        for prompt, completion in slab[1:]:
            if " Choices: " in prompt:
                right, letter = choice_of(completion)
                assert f"{letter}. {right}" in prompt
                choices = re.fullmatch(r"A\. (.+) B\. (.+) C\. (.+) D\. (.+)", prompt.split(" Choices: ")[1]).groups()
                assert len(set(choices)) == 4
                wrong = set(choices) - {right}
                if right in FINDINGS or wrong & set(FINDINGS):
                    assert right in seen or (right == "no abnormality" and not seen)
                    assert not wrong & seen
                elif "side" in right:
                    asked = next(name for name in FINDINGS if NOUNS.get(name, name) in prompt)
                    sides = {lesion["side"] for name, lesion in slice_findings(labels, low, high) if name == asked}
                    if sides >= {"left", "right"} or "both" in sides:
                        assert right == "both sides"
                    else:
                        assert right == f"{(sides or {'neither'}).pop()} side"
            else:
                asked = next(name for name in FINDINGS if NOUNS.get(name, name) in prompt)
                assert completion.startswith("Yes, " if asked in seen else "No, ")
    assert said_something > 50


def test_numbers_of_nodules_are_asked_for_as_often_as_scans_allow(scans, asked):
    chosen = balanced(asked["train"], closed=8, opened=8, rng=np.random.default_rng(0))
    counts = Counter(question.answer for pool in chosen for question in pool if question.template == "count nodule")
    with_nodules = sum("nodule" in lesions_of(labels) for labels in scans["train"])
    assert set(counts) == set(NUMBERS)
    assert sum(counts.values()) > with_nodules / 3


def planned_labels(seed: int) -> dict:
    """Labels of a scan as it was planned, with areas that none of its lesions have."""
    plan = plan_phantom(np.random.default_rng([0, seed]), "train", None)
    found = []
    for name in FINDINGS:
        for lesion in plan["lesions"].get(name, ()):
            lesion.slice_areas, lesion.extent_mm = [0.0] * 9 + [50.0] * 9, 80.0
        if name in plan["lesions"]:
            found.append({"name": name, "lesions": [vars(lesion) for lesion in plan["lesions"][name]]})
    return {"phase": plan["phase"], "findings": found}


@pytest.fixture(scope="module")
def planned() -> list[dict]:
    return [planned_labels(seed) for seed in range(900)]


def test_every_organ_is_right_about_as_often_when_it_is_listed(planned):
    rng = np.random.default_rng(0)
    chosen = balanced([questions(labels, rng) for labels in planned], closed=8, opened=8, rng=rng)
    listed, right = Counter(), Counter()
    for question in (question for taken in chosen for question in taken if question.template == "organ"):
        listed.update(question.choices)
        right[question.answer] += 1
    assert set(listed) == set(ORGANS.values())
    for organ, times in listed.items():
        assert 0.17 < right[organ] / times < 0.33, (organ, right[organ] / times)


def test_every_place_is_right_for_some_scan(planned):
    rng = np.random.default_rng(0)
    answers: dict[str, set] = {}
    for labels in planned:
        for question in questions(labels, rng):
            if question.template.startswith("where"):
                answers.setdefault(question.template.removeprefix("where "), set()).add(question.answer)
    assert answers == {name: set(places) for name, places in PLACES.items()}


@pytest.mark.parametrize("split", ["train", "test"])
def test_reports_of_pairs_tell_both_places(split):
    areas = [0.0] * 5 + [60.0] * 9
    lesions = {
        "renal stone": [("left", "left kidney", 12.0, None), ("right", "right kidney", 9.0, None)],
        "fracture": [(None, "lumbar spine", None, 50), (None, "thoracic spine", None, 30)],
    }
    labels = {
        "phase": "delayed",
        "findings": [
            {
                "name": name,
                "lesions": [
                    vars(Lesion(side, place, size, height_loss=loss, slice_areas=areas))
                    for side, place, size, loss in each
                ],
            }
            for name, each in lesions.items()
        ],
    }
    for seed in range(20):
        findings, impression = split_report(report_text(labels, np.random.default_rng(seed), split))
        (stones,) = [sentence for sentence in re.findall(r"[^.]+\.", findings) if "renal" in sentence.lower()]
        (fractures,) = [sentence for sentence in re.findall(r"[^.]+\.", findings) if "vertebral" in sentence.lower()]
        assert "both kidneys" in stones
        assert "12 mm" in stones
        assert "both parts of the spine" in fractures
        assert "50 %" in fractures
        assert "renal stones in both kidneys and vertebral fractures in both parts of the spine" in impression.lower()


def test_impressions_have_several_wordings(scans):
    labels = next(labels for labels in scans["train"] if lesions_of(labels))
    said = {
        split: {split_report(report_text(labels, np.random.default_rng(seed), split))[1] for seed in range(30)}
        for split in ("train", "test")
    }
    assert len(said["train"]) == 3
    assert len(said["test"]) == 2
    assert not said["train"] & said["test"]
