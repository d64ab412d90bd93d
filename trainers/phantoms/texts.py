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
"""Reports, questions and answers about a phantom, from its labels alone.

- `report_text`, `questions`, `balanced`, `scan_rows`: about a whole scan.
- `slice_texts`: about one slab, for the 2D base.

Every sentence and question has wordings for train and validation and others, of the same words, for the test split.
Kinds of questions are those of M3D-VQA (plane, phase, organ, abnormality, location) and `between_slices`: extent along
the body axis, number of lesions, level in the scanned range, direction of growth, none of which a single slice
answers, and, open only, the width at an end: of the lower or upper third of a lesion, in the mean.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ct_moe.pipeline_ct_moe import REPORT_PROMPT

from .labels import FINDINGS, LOBES, PHASES
from .wordings import ABSENT, GROWTH, IMPRESSION, LEVEL, NORMAL, PHASE_SENTENCE, PRESENT, QUESTIONS, SEVERAL, WIDTHS


KINDS = ("phase", "organ", "abnormality", "location", "between_slices")  # counted in totals; "plane" never is
ORGANS = {
    "nodule": "lung",
    "effusion": "pleura",
    "consolidation": "lung",
    "emphysema": "lung",
    "cardiomegaly": "heart",
    "aneurysm": "aorta",
    "liver lesion": "liver",
    "renal stone": "kidney",
    "ascites": "peritoneum",
    "fracture": "spine",
}
SIDED = ("nodule", "effusion", "consolidation", "liver lesion", "renal stone")  # with a left and a right
NUMBERS = ("no", "one", "two", "three")
EXTENTS = (40, 80, 120, 160)  # mm, the choices
LEVELS = ("lowest quarter", "second lowest quarter", "second highest quarter", "highest quarter")
GROWTH_TEXTS = {
    "head": "towards the head",
    "feet": "towards the feet",
    "middle": "towards the middle",
    "constant": "nowhere",
}
GROWING = ("consolidation", "aneurysm")  # may widen in one direction
LEVELLED = ("fracture",)  # of which a single one is asked for by its level: no nodule lies in the lowest quarter
PLANES = ("axial", "sagittal", "coronal", "oblique")


def report_text(labels: dict, rng: np.random.Generator, split: str = "train") -> str:
    """Findings and impression; every one of `FINDINGS` is mentioned, present or absent.

    Args:
        labels: `Phantom.labels()`.
        rng: chooses the wording.
        split: which wordings; see the module.

    Returns:
        Text with the headings that `split_report` reads.
    """

    def say(wordings: tuple[tuple[str, ...], tuple[str, ...]], **values) -> str:
        text = str(rng.choice(wordings[split == "test"])).format(**values).replace(" ,", ",")
        return text[0].upper() + text[1:]

    found = {finding["name"]: finding["lesions"] for finding in labels["findings"]}
    sentences = [say(PHASE_SENTENCE, phase=labels["phase"])]
    absent: list[str] = []
    for name in FINDINGS:
        if name in found:
            wordings = SEVERAL if name in SEVERAL and len(found[name]) > 1 else PRESENT
            sentences.append(say(wordings[name], **_values(name, found[name])))
            lesion = found[name][0]
            if name in GROWING and (widths := third_widths(lesion["slice_areas"])):
                sentences.append(say(WIDTHS, **widths))
            if name in GROWING and lesion["growth"] == _measured_growth(lesion["slice_areas"]):
                sentences.append(say(GROWTH, direction=GROWTH_TEXTS[lesion["growth"]]))
            levelled = name in ("nodule", *LEVELLED) and len(found[name]) == 1
            if levelled and (level := scan_level(lesion["slice_areas"])):
                sentences.append(say(LEVEL, level=level))
        else:
            absent.append(name)
    for organs in (("nodule", "consolidation", "emphysema", "effusion"), ("cardiomegaly", "aneurysm"), FINDINGS[6:]):
        missing = [name for name in organs if name in absent]
        if missing:
            sentences.append(say(ABSENT, finding=_listed([_NOUNS[name] for name in missing], "or")))
    if found:
        listed = _listed([_with_place(name, found[name]) for name in FINDINGS if name in found], "and")
        impression = say(IMPRESSION, listed=listed)
    else:
        impression = say(NORMAL)
    return f"Findings: {' '.join(sentences)}\nImpression: {impression}"


@dataclass
class Question:
    """One question about one scan.

    Attributes:
        kind: one of `KINDS`.
        template: what is asked, whatever the wording, such as "count nodule": answers are balanced in each.
        answer: what is right, as in `choices`.
        choices: four answers, or `None` for an open question.
        completion: the whole answer.
        prompt: the wording.
    """

    kind: str
    template: str
    answer: str
    choices: list[str] | None
    completion: str
    prompt: str


def questions(labels: dict, rng: np.random.Generator, split: str = "train") -> list[Question]:
    """Every question that the scan can answer, closed and open, before answers are balanced."""
    found = {finding["name"]: finding["lesions"] for finding in labels["findings"]}
    asked: list[Question] = []

    def ask(kind, template, answer, choices, **values):
        asked.append(Question(kind, template, answer, list(choices), "", _ask(template, rng, split, **values)))

    def ask_open(kind, template, answer, completion, **values):
        prompt = _ask(template, rng, split, **values)
        asked.append(Question(kind, f"open {template}", answer, None, completion, prompt))

    ask("phase", "phase", labels["phase"], PHASES)
    ask_open("phase", "phase", labels["phase"], f"It is the {labels['phase']} phase.")

    abnormal = sorted({ORGANS[name] for name in found})
    normal = sorted(set(ORGANS.values()) - set(abnormal))
    if abnormal and len(normal) >= 3:
        # One with several findings is seldom normal: chosen evenly, it would mostly be right where it is listed.
        weights = np.array([0.62 ** -list(ORGANS.values()).count(organ) for organ in normal])
        for organ in abnormal:
            wrong = rng.choice(normal, 3, replace=False, p=weights / weights.sum())
            ask("organ", "organ", organ, [organ, *wrong])
    absent = [name for name in FINDINGS if name not in found]
    if len(absent) >= 3:
        for name in found or ("no abnormality",):
            wrong = [str(other) for other in rng.choice(absent, 3, replace=False)]
            if name != "no abnormality" and rng.random() < 0.3:
                wrong[0] = "no abnormality"
            ask("abnormality", "abnormality", name, [name, *wrong])
    for name in FINDINGS:
        noun = _NOUNS[name]
        answer = "yes" if name in found else "no"
        completion = f"Yes, {_with_place(name, found[name])}." if name in found else f"No, there is no {noun}."
        ask_open("abnormality", f"presence {name}", answer, completion, finding=_ARTICLES.get(name, "") + noun)

    for name, choices in PLACES.items():
        place = _place(name, found.get(name))
        if place is None:
            continue
        others = [choice for choice in choices if choice != place]
        ask("location", f"where {name}", place, [place, *rng.choice(others, 3, replace=False)], finding=_NOUNS[name])
        if name in found:
            ask_open("location", f"where {name}", place, f"In {_the(place)}.", finding=_NOUNS[name])
    for name in ("nodule", "aneurysm", "liver lesion", "renal stone"):
        if name in found:
            size = round(found[name][0]["size_mm"])
            ask_open("location", f"size {name}", str(size), f"It measures {size} mm.", finding=_NOUNS[name])
    _ask_between_slices(labels, found, ask, ask_open)
    for question in asked:
        if question.choices is not None:
            question.prompt, question.completion = _closed(question.prompt, question.answer, question.choices, rng)
    return asked


def _ask(template: str, rng: np.random.Generator, split: str, **values) -> str:
    """One wording of the question; the first word of a template says which question it is."""
    return str(rng.choice(QUESTIONS[template.split(" ")[0]][split == "test"])).format(**values)


def _closed(prompt: str, answer: str, choices: list[str], rng: np.random.Generator) -> tuple[str, str]:
    """Question and answer with the choices, which are shuffled in place.

    The answer tells the choice and then its letter: a small model has to know it before it can look for its letter.
    """
    rng.shuffle(choices)
    return with_choices(prompt, answer, choices)


def with_choices(prompt: str, answer: str, choices: list[str]) -> tuple[str, str]:
    """Prompt and completion of a closed question whose choices are in this order."""
    listed = " ".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", choices))
    return f"{prompt} Choices: {listed}", f"{answer}, {'ABCD'[choices.index(answer)]}."


def _ask_between_slices(labels: dict, found: dict, ask, ask_open) -> None:
    kind = "between_slices"
    for name in ("effusion", "consolidation", "aneurysm"):
        if name not in found:
            continue
        lesion = found[name][0]
        nearest = min(EXTENTS, key=lambda extent: abs(extent - lesion["extent_mm"]))
        if abs(nearest - lesion["extent_mm"]) <= 14:
            ask(kind, f"extent {name}", f"{nearest} mm", [f"{e} mm" for e in EXTENTS], finding=_NOUNS[name])
        rounded = round(lesion["extent_mm"] / 10) * 10
        ask_open(kind, f"extent {name}", str(rounded), f"About {rounded} mm.", finding=_NOUNS[name])
        if name in GROWING and (widths := third_widths(lesion["slice_areas"])):
            for end in ("lower", "upper"):
                values = {"finding": _NOUNS[name], "end": f"{end} end"}
                ask_open(kind, f"width {name} {end}", str(widths[end]), f"About {widths[end]} mm.", **values)
        growth = lesion["growth"]
        if growth is not None and growth == _measured_growth(lesion["slice_areas"]):
            text = GROWTH_TEXTS[growth]
            ask(kind, f"growth {name}", text, list(GROWTH_TEXTS.values()), finding=_NOUNS[name])
    for name in ("nodule", "liver lesion"):
        if name in found:
            number = NUMBERS[len(found[name])]
            ask(kind, f"count {name}", number, NUMBERS, finding=_PLURALS[name])
            verb = "is" if number == "one" else "are"
            ask_open(kind, f"count {name}", number, f"There {verb} {number}.", finding=_PLURALS[name])
        else:
            ask(kind, f"count {name}", "no", NUMBERS, finding=_PLURALS[name])
    for name in LEVELLED:
        if name in found and len(found[name]) == 1:
            level = scan_level(found[name][0]["slice_areas"])
            if level is not None:
                ask(kind, f"level {name}", level, LEVELS, finding=_NOUNS[name])


def scan_level(slice_areas: list[float]) -> str | None:
    """Quarter of the scanned range that holds the middle of a lesion; `None` within 3 % of a border."""
    inside = np.flatnonzero(slice_areas)
    position = 4 * ((inside[0] + inside[-1] + 1) / 2) / len(slice_areas)
    quarter = min(int(position), 3)
    border = min(abs(position - edge) for edge in (1, 2, 3))
    return LEVELS[quarter] if border > 0.12 else None


def third_widths(slice_areas: list[float]) -> dict[str, int] | None:
    """Of the lower third of a lesion, the middle one and the upper one, to 5 mm: diameter of a disc of its mean area.

    They are what a growth is read from. `None` if there are too few slices.
    """
    thirds = _thirds(slice_areas)
    if thirds is None:
        return None
    return {end: 5 * round(_disc_diameter(area) / 5) for end, area in zip(("lower", "middle", "upper"), thirds)}


def _thirds(slice_areas: list[float]) -> list[float] | None:
    """Mean areas of the thirds of a lesion, from the feet up; `None` of less than five slices."""
    inside = np.flatnonzero(slice_areas)
    areas = slice_areas[inside[0] : inside[-1] + 1]
    return [float(part.mean()) for part in np.array_split(areas, 3)] if len(areas) >= 5 else None


def _measured_growth(slice_areas: list[float]) -> str | None:
    """Where a lesion is widest, from its areas; `None` if that is not plain."""
    thirds = _thirds(slice_areas)
    if thirds is None:
        return None
    low, mid, high = thirds
    if high > 1.3 * mid and mid > 1.3 * low:
        return "head"
    if low > 1.3 * mid and mid > 1.3 * high:
        return "feet"
    if mid > 1.25 * max(low, high):
        return "middle"
    return "constant" if max(low, mid, high) < 1.15 * min(low, mid, high) else None


def balanced(
    pools: Iterable[list[Question]], closed: int, opened: int, rng: np.random.Generator
) -> list[list[Question]]:
    """Choose per scan up to so many closed and open questions, so that in each template no answer is the usual one.

    A question is taken if its answer is not ahead of the rarest answer of its template by more than two: rare answers
    decide how often a template is asked. Between slices comes first.
    """
    pools = list(pools)
    counts: dict[str, Counter] = {}
    for pool in pools:
        for question in pool:
            counts.setdefault(question.template, Counter())[question.answer] += 0
    chosen = []
    for pool in pools:
        taken: list[Question] = []
        order = rng.permutation(len(pool))
        left = {True: closed, False: opened}
        templates: set[str] = set()
        # Fewest answers so far first, so that no template starves; what few scans can answer, between slices, before.
        for index in sorted(
            order, key=lambda i: (pool[i].kind != "between_slices", counts[pool[i].template][pool[i].answer])
        ):
            question = pool[index]
            seen = counts[question.template]
            is_closed = question.choices is not None
            if not left[is_closed] or question.template in templates:
                continue
            # Numbers of open questions are too many to be balanced.
            free = question.template.startswith(("open size", "open extent", "open width"))
            if free or seen[question.answer] <= min(seen.values()) + 2:
                seen[question.answer] += 1
                left[is_closed] -= 1
                templates.add(question.template)
                taken.append(question)
        chosen.append(taken)
    return chosen


def scan_rows(path: str, labels: dict, chosen: list[Question], rng: np.random.Generator, split: str) -> list[dict]:
    """Rows of the data schema (images, prompt, completion, task) with what scoring needs beside them."""
    common = {
        "images": path,
        "split": split,
        "unseen": labels["acquisition"]["unseen"],
        "held_out": labels["held_out"],
    }
    rows = [
        {
            **common,
            "prompt": REPORT_PROMPT,
            "completion": report_text(labels, rng, split),
            "task": "report",
            "kind": "report",
            "template": "report",
            "answer": None,
            "choices": None,
        }
    ]
    for question in chosen:
        rows.append(
            {
                **common,
                "prompt": question.prompt,
                "completion": question.completion,
                "task": "vqa_open" if question.choices is None else "vqa_closed",
                "kind": question.kind,
                "template": question.template,
                "answer": question.answer,
                "choices": question.choices,
            }
        )
    return rows


def plane_row(path: str, labels: dict, rng: np.random.Generator, split: str) -> dict:
    """The question for the plane in which a scan is stored: closed, about slices as they lie in the file."""
    choices = list(PLANES)
    prompt, completion = _closed(_ask("plane", rng, split), labels["plane"], choices, rng)
    return {
        "images": path,
        "split": split,
        "prompt": prompt,
        "completion": completion,
        "task": "vqa_closed",
        "kind": "plane",
        "template": "plane",
        "answer": labels["plane"],
        "choices": choices,
    }


# Single slices, for the 2D base ------------------------------------------------------------------------------------


def slice_texts(labels: dict, low: float, high: float, rng: np.random.Generator, split: str = "train") -> list[tuple]:
    """(prompt, completion) pairs about one slab alone: a caption, closed and open questions.

    Args:
        labels: `Phantom.labels()`.
        low, high: ends of the slab, as shares of the scanned range from the feet.
        rng, split: as in `report_text`.
    """
    seen = slice_findings(labels, low, high)
    sides: dict[str, set] = {}
    for name, lesion in seen:
        sides.setdefault(name, set()).add(lesion["side"])
    organs = slice_organs(labels, low, high)
    widths = slice_widths(seen, low, high)
    named = {name: _with_own_side(name, sides[name], widths[name]) for name in FINDINGS if name in sides}
    parts = [f"The slice is in the {labels['phase']} phase", f"it shows {', '.join(organs) or 'no organ'}"]
    caption = "; ".join([*parts, ", ".join(named.values()) or "no abnormality"]) + "."
    pairs = [("Describe the slice.", caption)]

    def closed(prompt: str, answer: str, wrong: list[str]) -> None:
        pairs.append(_closed(prompt, answer, [answer, *wrong[:3]], rng))

    def word(template: str, **values) -> str:
        return _ask(template, rng, split, **values)

    closed(word("phase"), labels["phase"], [phase for phase in PHASES if phase != labels["phase"]])
    absent = [name for name in FINDINGS if name not in sides]
    wrong = [str(name) for name in rng.choice(absent, 3, replace=False)] if len(absent) >= 3 else None
    if wrong:
        if sides and rng.random() < 0.3:
            wrong[0] = "no abnormality"
        closed(word("abnormality"), str(rng.choice(list(sides) or ["no abnormality"])), wrong)
    name = str(rng.choice(list(sides))) if sides and rng.random() < 0.5 else str(rng.choice(FINDINGS))
    text = f"Yes, {named[name]}." if name in named else f"No, there is no {_NOUNS[name]}."
    pairs.append((word("presence", finding=_ARTICLES.get(name, "") + _NOUNS[name]), text))
    asked = [name for name in SIDED if name in sides] or [str(rng.choice(SIDED))]
    name = str(rng.choice(asked))
    answer = "neither side"
    if name in sides:
        answer = "both sides" if len(sides[name]) > 1 or "both" in sides[name] else f"{next(iter(sides[name]))} side"
    options = ["left side", "right side", "both sides", "neither side"]
    closed(word("where", finding=_NOUNS[name]), answer, [option for option in options if option != answer])
    return pairs


def slice_findings(labels: dict, low: float, high: float) -> list[tuple[str, dict]]:
    """(name, lesion) of what covers enough of a slab, on average over its slices, to be seen."""
    return [
        (finding["name"], lesion)
        for finding in labels["findings"]
        for lesion in finding["lesions"]
        if _mean_area(lesion["slice_areas"], low, high) >= _VISIBLE_MM2.get(finding["name"], 60)
    ]


def slice_widths(seen: list[tuple[str, dict]], low: float, high: float) -> dict[str, int]:
    """Of the widest lesion of each finding of `slice_findings`, in even mm: the diameter of a disc of its mean area.

    Not that of the whole lesion, which one slab does not show: where a lesion widens is read from slabs that differ.
    """
    widths: dict[str, int] = {}
    for name, lesion in seen:
        width = 2 * round(_disc_diameter(_mean_area(lesion["slice_areas"], low, high)) / 2)
        widths[name] = max(2, width, widths.get(name, 0))
    return widths


def slice_organs(labels: dict, low: float, high: float) -> list[str]:
    """Organs that cover more than 100 mm2 of a slab."""
    return [name for name, areas in labels["organ_areas"].items() if _mean_area(areas, low, high) > 100]


def _disc_diameter(area: float) -> float:
    return 2 * (area / np.pi) ** 0.5


def _mean_area(areas: list[float], low: float, high: float) -> float:
    start = int(np.floor(low * len(areas)))
    part = areas[start : max(start + 1, int(np.ceil(high * len(areas))))]
    return sum(part) / len(part)


def _with_own_side(name: str, sides: set, width: int) -> str:
    text = _NOUNS[name] + (f" of {width} mm" if name in _MEASURED else "")
    sides = sides - {None}
    if not sides or name == "emphysema":
        return text
    return f"{text} on " + ("both sides" if len(sides) > 1 or "both" in sides else f"the {next(iter(sides))} side")


def _values(name: str, lesions: list[dict]) -> dict:
    largest = lesions[0]
    return {
        "number": NUMBERS[len(lesions)],
        "size": round(largest["size_mm"] or 0),
        "extent": round(largest["extent_mm"] / 10) * 10,
        "place": _the(_place(name, lesions) if name in BOTH else largest["place"]),
        "side": {"both": "both sides"}.get(largest["side"], f"the {largest['side']} side"),
        "amount": largest["amount"],
        "loss": largest["height_loss"],
        "noun": _NOUNS[name] if len(lesions) == 1 else _PLURALS[name],
        "of": "of" if len(lesions) == 1 else ", the largest of",
        "some": f"is {_ARTICLES.get(name, '')}{_NOUNS[name]}" if len(lesions) == 1 else f"are {_PLURALS.get(name)}",
    }


def _with_place(name: str, lesions: list[dict]) -> str:
    noun = _NOUNS[name] if len(lesions) == 1 else _PLURALS[name]
    place = _place(name, lesions) if name in PLACES else None
    return f"{noun} in {_the(place)}" if place else noun


def _listed(words: list[str], last: str) -> str:
    return f"{', '.join(words[:-1])} {last} {words[-1]}" if len(words) > 1 else words[0]


def _the(place: str) -> str:
    return place if place.startswith(("both", "pleura of both")) else f"the {place}"


def _place(name: str, lesions: list[dict] | None) -> str | None:
    """The answer to where a finding is; `None` where the question makes no sense or has several answers."""
    if name in ("nodule", "consolidation"):
        places = {lesion["place"] for lesion in lesions or ()}
        return places.pop() if len(places) == 1 else None
    if lesions is None:
        return "neither"
    if name == "effusion":
        return {"both": "pleura of both sides"}.get(lesions[0]["side"], f"{lesions[0]['side']} pleura")
    places = {lesion["place"] for lesion in lesions}
    return BOTH[name] if len(places) == 2 else places.pop()


_VISIBLE_MM2 = {"nodule": 20, "liver lesion": 40, "renal stone": 8}
_MEASURED = ("nodule", "consolidation", "aneurysm", "liver lesion", "renal stone")  # told with their width in a slab
_NOUNS = {
    "nodule": "lung nodule",
    "effusion": "pleural effusion",
    "consolidation": "consolidation",
    "emphysema": "emphysema",
    "cardiomegaly": "cardiomegaly",
    "aneurysm": "aortic aneurysm",
    "liver lesion": "liver lesion",
    "renal stone": "renal stone",
    "ascites": "ascites",
    "fracture": "vertebral fracture",
}
_ARTICLES = {
    "nodule": "a ",
    "effusion": "a ",
    "aneurysm": "an ",
    "liver lesion": "a ",
    "renal stone": "a ",
    "fracture": "a ",
}
_PLURALS = {
    "nodule": "lung nodules",
    "liver lesion": "liver lesions",
    "renal stone": "renal stones",
    "fracture": "vertebral fractures",
}
# Where lesions of one kind lie that are in two places.
BOTH = {
    "liver lesion": "both lobes of the liver",
    "renal stone": "both kidneys",
    "fracture": "both parts of the spine",
}
PLACES = {
    "nodule": LOBES,
    "consolidation": LOBES,
    "effusion": ("left pleura", "right pleura", "pleura of both sides", "neither"),
    "emphysema": ("upper lobes", "lower lobes", "both lungs", "neither"),
    "aneurysm": ("thoracic aorta", "abdominal aorta", "both parts of the aorta", "neither"),
    "liver lesion": (
        "left lobe of the liver",
        "right lobe of the liver",
        BOTH["liver lesion"],
        "neither",
    ),
    "renal stone": ("left kidney", "right kidney", BOTH["renal stone"], "neither"),
    "fracture": ("thoracic spine", "lumbar spine", BOTH["fracture"], "neither"),
}
