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
"""What a model says about phantoms, against the truth: `score_open`, `parse_report`, `score_reports`.

Reports are parsed back into labels by rules that know the nouns of the findings, negation and the words for places and
sizes, not the sentences of `texts`: other wordings of the same content are read as well.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .labels import FINDINGS, PHASES
from .texts import BOTH, NUMBERS, PLACES, SIDED


# A number is right within this many mm. Extents cannot be told more finely than the slabs (18 mm in the demo model);
# widths are told in steps of 5, of which one beside the right one counts.
TOLERANCE_MM = {"size": 4, "width": 7, "extent": 20}


def score_open(rows: Sequence[dict], texts: Sequence[str]) -> list[bool]:
    """Whether each text holds the answer of an open question; numbers count within `TOLERANCE_MM`.

    "yes" and "no" are the first word; every other answer must be in the text, and no rival answer to the question.
    """
    scores = []
    for row, text in zip(rows, texts, strict=True):
        words, answer = text.lower(), row["answer"].lower()
        measure = row["template"].split(" ")[1]
        if measure in TOLERANCE_MM:
            numbers = re.findall(r"\d+(?:\.\d+)?", words)
            scores.append(len(numbers) == 1 and abs(float(numbers[0]) - float(answer)) <= TOLERANCE_MM[measure])
        elif answer in ("yes", "no"):
            first = re.match(r"\W*(\w+)", words)
            scores.append(first is not None and first[1] == answer)
        else:
            told = {
                other for other in _answers(row["template"], answer) if re.search(rf"\b{re.escape(other)}\b", words)
            }
            scores.append(told == {answer})
    return scores


def _answers(template: str, answer: str) -> set[str]:
    """All answers to an open question, in lower case."""
    _, measure, name = (*template.split(" ", 2), "")[:3]
    answers = {"phase": PHASES, "count": NUMBERS, "where": PLACES.get(name, ())}[measure]
    return {*answers, answer}


@dataclass
class ParsedFinding:
    """What a report says of one finding; `None` where it says nothing.

    Attributes:
        side: "left", "right" or "both".
        place: lobe or organ.
        size_mm, extent_mm: numbers before "mm".
    """

    side: str | None = None
    place: str | None = None
    size_mm: float | None = None
    extent_mm: float | None = None


def parse_report(text: str) -> dict[str, ParsedFinding]:
    """Findings that a report says are present.

    A finding in the impression alone counts as well. A sentence with a word of negation ("no", "without", "not",
    "absent", "free of") before the finding denies it; "but" and ";" end the reach of a negation. Not understood, since
    no phantom's report says so: negation behind the finding ("... is absent"), a finding told after a denied one with
    "and", "bilateral", centimetres.
    """
    found: dict[str, ParsedFinding] = {}
    body = re.sub(r"\b(findings|impression)\s*:", ". ", text, flags=re.IGNORECASE)
    for clause in re.split(r"(?<!\d)\.|\.(?!\d)|;|\bbut\b|\n", body.lower()):
        mentions = [
            (match.start(), match.end(), name) for name, noun in _NOUNS.items() for match in noun.finditer(clause)
        ]
        mentions.sort()
        for position, (start, stop, name) in enumerate(mentions):
            if _NEGATION.search(clause[:start]):
                continue
            # Attributes are those nearest: up to the neighbouring findings of the same clause.
            left = mentions[position - 1][1] if position else 0
            right = mentions[position + 1][0] if position + 1 < len(mentions) else len(clause)
            after, around = clause[stop:right], clause[left:right]
            _fill(found.setdefault(name, ParsedFinding()), name, around if len(mentions) == 1 else after)
    return {name: found[name] for name in FINDINGS if name in found}


def score_reports(labels: Sequence[dict], texts: Sequence[str]) -> dict:
    """Findings in reports against the labels of the scans.

    Args:
        labels: `Phantom.labels()` per scan.
        texts: reports.

    Returns:
        `macro_f1` over `FINDINGS`; `micro_f1`; per finding `precision`, `recall`, `f1`, `support`; `side_errors` and
        `place_errors` (share of the findings rightly named whose side or place is wrong or missing), `size_error_mm`
        (mean absolute error where a size is told) and `extent_error_mm` likewise, with the numbers they are shares and
        means of: `sides`, `places`, `sizes`, `extents`. Nodules in several lobes have no one place.
    """
    truths = [{finding["name"]: finding["lesions"] for finding in scan["findings"]} for scan in labels]
    parsed = [parse_report(text) for text in texts]
    per_finding = {}
    totals = np.zeros(3)
    for name in FINDINGS:
        hits = sum(name in truth and name in said for truth, said in zip(truths, parsed, strict=True))
        said_count = sum(name in said for said in parsed)
        support = sum(name in truth for truth in truths)
        totals += hits, said_count, support
        per_finding[name] = {
            "precision": hits / said_count if said_count else 0.0,
            "recall": hits / support if support else 0.0,
            "f1": f1_score(hits, said_count, support),
            "support": support,
        }
    sides, places, sizes, extents = [], [], [], []
    for truth, said in zip(truths, parsed):
        for name in (name for name in FINDINGS if name in truth and name in said):
            lesion = truth[name][0]
            side, place = _where(name, truth[name])
            if side is not None and name in SIDED:
                sides.append(said[name].side != side)
            if place is not None and name in _PLACED:
                places.append(said[name].place != place)
            if name in _SIZED and said[name].size_mm is not None:
                sizes.append(abs(said[name].size_mm - lesion["size_mm"]))
            if name in _EXTENDED and said[name].extent_mm is not None and lesion["extent_mm"] is not None:
                extents.append(abs(said[name].extent_mm - lesion["extent_mm"]))
    return {
        "macro_f1": float(np.mean([scores["f1"] for scores in per_finding.values()])),
        "micro_f1": f1_score(*totals),
        "per_finding": per_finding,
        "side_errors": float(np.mean(sides)) if sides else None,
        "sides": len(sides),
        "place_errors": float(np.mean(places)) if places else None,
        "places": len(places),
        "size_error_mm": float(np.mean(sizes)) if sizes else None,
        "sizes": len(sizes),
        "extent_error_mm": float(np.mean(extents)) if extents else None,
        "extents": len(extents),
    }


def _where(name: str, lesions: list[dict]) -> tuple[str | None, str | None]:
    """Side and place that a report has to give; `None` where lesions differ and it has no one word for them."""
    sides, places = ({lesion[part] for lesion in lesions} for part in ("side", "place"))
    if name in BOTH and len(places) == 2:
        return "both", BOTH[name]
    return (sides.pop() if len(sides) == 1 else None), (places.pop() if len(places) == 1 else None)


def f1_score(hits: float, said: float, support: float) -> float:
    """From numbers: rightly said, said, and true; 0 where there is nothing to say and nothing said."""
    return 2 * float(hits) / float(said + support) if said + support else 0.0


_NOUNS = {
    "nodule": re.compile(r"\b(?:lung |pulmonary )?nodules?\b"),
    "effusion": re.compile(r"\b(?:pleural )?effusions?\b|\bpleural fluid\b"),
    "consolidation": re.compile(r"\bconsolidations?\b"),
    "emphysema": re.compile(r"\bemphysema\b"),
    "cardiomegaly": re.compile(r"\bcardiomegaly\b|\bheart is enlarged\b|\benlarged heart\b"),
    "aneurysm": re.compile(r"\b(?:aortic )?aneurysms?\b"),
    "liver lesion": re.compile(r"\b(?:liver|hepatic) lesions?\b"),
    "renal stone": re.compile(r"\b(?:renal|kidney) (?:stones?|calcul(?:us|i))\b"),
    "ascites": re.compile(r"\bascites\b"),
    "fracture": re.compile(r"\b(?:vertebral )?fractures?\b"),
}
_NEGATION = re.compile(r"\b(?:no|not|without|absent|free of|neither)\b")

_PLACED = ("nodule", "consolidation", "emphysema", "aneurysm", "liver lesion", "renal stone", "fracture")
_EXTENDED = ("effusion", "consolidation", "aneurysm")
_SIZED = ("nodule", "aneurysm", "liver lesion", "renal stone", "cardiomegaly")
_PLACE = re.compile(
    r"\b(?:(?:left|right) (?:upper|middle|lower) lobe|(?:left|right) lobe of the liver|(?:upper|lower) lobes"
    r"|both lungs|(?:thoracic|abdominal) aorta|(?:left|right) kidney|(?:thoracic|lumbar) spine"
    r"|both kidneys|both lobes of the liver|both parts of the (?:aorta|spine))\b"
)
_EXTENT = re.compile(r"\bextent (?:of )?(\d+(?:\.\d+)?) mm")
_SIZE = re.compile(r"(\d+(?:\.\d+)?) mm")


def _fill(finding: ParsedFinding, name: str, text: str) -> None:
    """Read attributes from the words around a mention; what an earlier mention gave stays."""
    extent = _EXTENT.search(text)
    size = _SIZE.search(_EXTENT.sub("", text))
    place = _PLACE.search(text)
    side = re.search(r"\b(left|right|both)\b", text)
    if finding.extent_mm is None and extent:
        finding.extent_mm = float(extent[1])
    if finding.size_mm is None and size and name in _SIZED:
        finding.size_mm = float(size[1])
    if finding.place is None and place and name in _PLACED:
        finding.place = place[0]
    if finding.side is None and side and name in SIDED:
        finding.side = side[1]
