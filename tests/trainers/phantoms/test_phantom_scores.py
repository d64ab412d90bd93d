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
"""Scores of what a model says about phantoms: every number here was worked out by hand."""

import numpy as np
import pytest

from ct_moe.trainers.evaluation.closed_questions import score_closed
from ct_moe.trainers.phantoms.anatomy import draw_phantom
from ct_moe.trainers.phantoms.labels import FINDINGS, LOBES, Lesion
from ct_moe.trainers.phantoms.scores import (
    TOLERANCE_MM,
    ParsedFinding,
    parse_report,
    score_open,
    score_reports,
)
from ct_moe.trainers.phantoms.texts import questions, report_text, scan_rows


def open_row(template: str, answer: str) -> dict:
    return {"template": f"open {template}", "answer": answer}


def labels_of(**lesions: list[dict]) -> dict:
    """Labels of a scan with these findings; underscores stand for spaces."""
    found = {name.replace("_", " "): drawn for name, drawn in lesions.items()}
    nothing = {"side": None, "place": None, "size_mm": None, "extent_mm": None}
    return {
        "findings": [
            {"name": name, "lesions": [nothing | lesion for lesion in found[name]]}
            for name in FINDINGS
            if name in found
        ]
    }


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_right_answers_of_a_phantom_score_full_marks(split):
    labels = draw_phantom(7, split, findings=("nodule", "effusion", "aneurysm", "liver lesion")).labels()
    rng = np.random.default_rng(0)
    rows = scan_rows("scan", labels, questions(labels, rng, split), rng, split)
    closed = [row for row in rows if row["task"] == "vqa_closed"]
    opened = [row for row in rows if row["task"] == "vqa_open"]
    assert len(closed) > 5
    assert len(opened) > 10
    for score in score_closed(closed, [row["completion"] for row in closed]):
        assert score == {"strict": True, "letter": True, "m3d": True}
    for row, right in zip(opened, score_open(opened, [row["completion"] for row in opened])):
        assert right, row
    for row in closed:
        wrong = [choice for choice in row["choices"] if choice != row["answer"]]
        assert not any(score["strict"] for score in score_closed([row] * 3, wrong))


@pytest.mark.parametrize(
    ("template", "answer", "text", "right"),
    [
        ("presence ascites", "yes", "Yes, ascites.", True),
        ("presence ascites", "yes", " yes", True),
        ("presence ascites", "yes", "No, there is no ascites.", False),
        ("presence ascites", "no", "No, there is no ascites.", True),
        ("presence ascites", "no", "There is no ascites.", False),
        ("presence ascites", "no", "not seen", False),
        ("presence ascites", "no", "Nodule: no.", False),
        ("presence ascites", "no", "", False),
        ("where nodule", "right upper lobe", "In the right upper lobe.", True),
        ("where nodule", "right upper lobe", "RIGHT UPPER LOBE", True),
        ("where nodule", "right upper lobe", "In the left upper lobe.", False),
        ("where nodule", "right upper lobe", "In the right lower lobe.", False),
        ("where nodule", "right upper lobe", "In the right lung.", False),
        ("where effusion", "right pleura", "left lung", False),
        ("where effusion", "pleura of both sides", "In pleura of both sides.", True),
        ("where emphysema", "upper lobes", "In the upper lobes.", True),
        ("where emphysema", "upper lobes", "In the left upper lobe.", False),
        ("where ascites", "neither", "The scan shows neither.", True),
        ("where ascites", "neither", "The scan shows nothing.", False),
        ("phase", "portal venous", "It is the portal venous phase.", True),
        ("phase", "portal venous", "It is the venous phase.", False),
        ("count nodule", "two", "There are two.", True),
        ("count nodule", "one", "There is none.", False),
        ("count nodule", "one", "", False),
    ],
)
def test_open_answers(template, answer, text, right):
    assert score_open([open_row(template, answer)], [text]) == [right]


@pytest.mark.parametrize("template", ["size aneurysm", "extent aneurysm", "width aneurysm lower"])
def test_numbers_count_within_a_tolerance(template):
    tolerance = TOLERANCE_MM[template.split()[0]]
    row = open_row(template, "60")
    said = [60, 60 - tolerance, 60 + tolerance, 60 - tolerance - 1, 60 + tolerance + 1]
    texts = [f"It measures {number} mm." for number in said]
    assert score_open([row] * 5, texts) == [True, True, True, False, False]
    assert score_open([row] * 4, [f"{60 + tolerance}.0", f"{60 + tolerance}.5 mm", "sixty", ""]) == [
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("template", "answer", "text"),
    [
        ("where nodule", "right upper lobe", "In the right upper lobe or the left upper lobe."),
        ("where effusion", "left pleura", "left pleura, right pleura"),
        ("phase", "arterial", "arterial, portal venous or delayed"),
        ("count nodule", "two", "One, two, three or four."),
    ],
)
def test_a_list_of_all_answers_is_not_an_answer(template, answer, text):
    assert score_open([open_row(template, answer)], [text]) == [False]


@pytest.mark.parametrize("score", [score_closed, score_open])
def test_as_many_texts_as_rows(score):
    row = {"answer": "lung", "choices": ["lung", "liver"], "template": "open phase"}
    with pytest.raises(ValueError):
        score([row, row], ["B"])
    with pytest.raises(ValueError):
        score([row], ["B", "B"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", set()),
        ("Normal scan.", set()),
        ("Impression: Ascites.", {"ascites"}),
        ("IMPRESSION: CARDIOMEGALY AND ASCITES.", {"cardiomegaly", "ascites"}),
        ("There is no evidence of pleural effusion.", set()),
        ("Lungs free of nodules, consolidation or emphysema.", set()),
        ("Neither nodule nor effusion.", set()),
        ("Without ascites", set()),
        ("No nodule; effusion on the left.", {"effusion"}),
        ("No nodule or fracture, but ascites and emphysema.", {"ascites", "emphysema"}),
        ("Ascites without effusion.", {"ascites"}),
        # A negation ends with its sentence and its line.
        ("No aneurysm. Emphysema.", {"emphysema"}),
        ("No aneurysm\nEmphysema", {"emphysema"}),
        ("Findings: no ascites\nImpression: vertebral fractures", {"fracture"}),
        ("Several pulmonary nodules and kidney stones.", {"nodule", "renal stone"}),
        ("Renal calculi; hepatic lesions.", {"renal stone", "liver lesion"}),
        ("The heart is enlarged.", {"cardiomegaly"}),
        ("An enlarged heart.", {"cardiomegaly"}),
        ("The heart is not enlarged.", set()),
        ("Pleural fluid on the right.", {"effusion"}),
        ("Compression fracture of L1.", {"fracture"}),
        # "non-contrast" and "nodule" begin like a negation.
        ("Non-contrast scan with a nodule.", {"nodule"}),
        # Denied in one place, present in the other: it is said to be present.
        ("Findings: No nodule.\nImpression: Nodule.", {"nodule"}),
        ("An unrelated word, renal cyst and liver steatosis.", set()),
    ],
)
def test_findings_of_reports_in_free_wordings(text, said):
    assert set(parse_report(text)) == said


def test_findings_come_in_their_usual_order():
    assert list(parse_report("Fracture, ascites, nodule and effusion.")) == [
        "nodule",
        "effusion",
        "ascites",
        "fracture",
    ]


@pytest.mark.parametrize(
    ("text", "name", "finding"),
    [
        (
            "A pulmonary nodule of 12.5 mm lies in the left lower lobe.",
            "nodule",
            ParsedFinding(side="left", place="left lower lobe", size_mm=12.5),
        ),
        (
            "Right upper lobe: nodule measuring 8 mm",
            "nodule",
            ParsedFinding(side="right", place="right upper lobe", size_mm=8.0),
        ),
        (
            "RIGHT LOWER LOBE CONSOLIDATION, EXTENT 75.5 MM.",
            "consolidation",
            ParsedFinding(side="right", place="right lower lobe", extent_mm=75.5),
        ),
        (
            "Small left-sided pleural effusion with an extent of 40 mm",
            "effusion",
            ParsedFinding(side="left", extent_mm=40.0),
        ),
        ("Pleural effusions on both sides.", "effusion", ParsedFinding(side="both")),
        (
            "The abdominal aorta shows an aneurysm, extent 80 mm, diameter 55 mm.",
            "aneurysm",
            ParsedFinding(place="abdominal aorta", size_mm=55.0, extent_mm=80.0),
        ),
        ("Emphysema of both lungs.", "emphysema", ParsedFinding(place="both lungs")),
        (
            "Hepatic lesion (22 mm) in the right lobe of the liver.",
            "liver lesion",
            ParsedFinding(side="right", place="right lobe of the liver", size_mm=22.0),
        ),
        (
            "Calculi? A renal calculus of 9 mm, left kidney.",
            "renal stone",
            ParsedFinding(side="left", place="left kidney", size_mm=9.0),
        ),
        ("Enlarged heart, 160 mm wide.", "cardiomegaly", ParsedFinding(size_mm=160.0)),
        ("Fracture in the lumbar spine.", "fracture", ParsedFinding(place="lumbar spine")),
        ("Fractures in both parts of the spine.", "fracture", ParsedFinding(place="both parts of the spine")),
        (
            "An aneurysm of 60 mm in both parts of the aorta.",
            "aneurysm",
            ParsedFinding(place="both parts of the aorta", size_mm=60.0),
        ),
        (
            "Both kidneys hold renal stones, the largest of 9 mm.",
            "renal stone",
            ParsedFinding(side="both", place="both kidneys", size_mm=9.0),
        ),
        # What findings leave open the impression may tell; what they tell stays.
        (
            "Findings: Nodule of 10 mm.\nImpression: Nodule of 20 mm in the left upper lobe.",
            "nodule",
            ParsedFinding(side="left", place="left upper lobe", size_mm=10.0),
        ),
    ],
)
def test_attributes_of_reports_in_free_wordings(text, name, finding):
    assert parse_report(text) == {name: finding}


def test_two_findings_of_a_sentence_keep_their_own_attributes():
    text = "Nodule of 14 mm in the right middle lobe, kidney stone of 9 mm in the left kidney and ascites."
    assert parse_report(text) == {
        "nodule": ParsedFinding(side="right", place="right middle lobe", size_mm=14.0),
        "renal stone": ParsedFinding(side="left", place="left kidney", size_mm=9.0),
        "ascites": ParsedFinding(),
    }


@pytest.mark.parametrize("split", ["train", "test"])
def test_reports_of_all_findings_are_read_back(split):
    """Every finding alone and all of them together, in enough wordings to meet each sentence."""
    rng = np.random.default_rng(0)
    places = {
        "nodule": LOBES,
        "consolidation": LOBES,
        "effusion": ("pleura",),
        "emphysema": ("upper lobes", "lower lobes", "both lungs"),
        "cardiomegaly": ("heart",),
        "aneurysm": ("thoracic aorta", "abdominal aorta", "both parts of the aorta"),
        "liver lesion": ("left lobe of the liver", "right lobe of the liver"),
        "renal stone": ("left kidney", "right kidney"),
        "ascites": ("peritoneum",),
        "fracture": ("thoracic spine", "lumbar spine"),
    }

    def finding(name: str) -> dict:
        lesions = []
        for size in sorted(rng.integers(8, 60, rng.integers(1, 4)), reverse=True):
            place = str(rng.choice(places[name]))
            side = place.split()[0] if place.split()[0] in ("left", "right") else None
            if name == "effusion":
                side = str(rng.choice(["left", "right", "both"]))
            lesion = Lesion(
                side=side, place=place, size_mm=float(size), extent_mm=80.0, amount="small", height_loss=40
            )
            # Widening or not, at some level: what a report then says of it must not confuse the parser.
            lesion.growth = str(rng.choice(["head", "feet", "constant"]))
            areas = {"head": range(10, 60, 6), "feet": range(60, 10, -6), "constant": [30] * 9}[lesion.growth]
            lesion.slice_areas = [0.0] * int(rng.integers(20)) + [float(area) for area in areas] + [0.0] * 15
            lesions.append(vars(lesion))
        if name in ("renal stone", "fracture") and len(lesions) > 1 and lesions[0]["place"] != lesions[1]["place"]:
            return {"name": name, "lesions": lesions[:2]}
        return {"name": name, "lesions": lesions if name in ("nodule", "liver lesion") else lesions[:1]}

    for chosen in [()] + [(name,) for name in FINDINGS] * 6 + [FINDINGS] * 12:
        labels = {"phase": "non-contrast", "findings": [finding(name) for name in chosen]}
        text = report_text(labels, rng, split)
        said = parse_report(text)
        assert tuple(said) == chosen, text
        scores = score_reports([labels], [text])
        # Named by one place only if all lesions share it: what differs between lesions is not scored.
        for error in ("side_errors", "place_errors", "size_error_mm", "extent_error_mm"):
            assert not scores[error], (error, text)
        for other in labels["findings"]:
            if other["name"] in ("effusion", "consolidation", "aneurysm"):
                assert said[other["name"]].extent_mm == 80, text


@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_of_a_drawn_phantom_score_full_marks(split):
    labels = draw_phantom(5, split, findings=("nodule", "effusion", "aneurysm")).labels()
    rng = np.random.default_rng(0)
    (row,) = scan_rows("scan", labels, [], rng, split)
    scores = score_reports([labels], [row["completion"]])
    assert scores["micro_f1"] == 1
    assert scores["side_errors"] in (0, None)
    assert scores["place_errors"] == 0
    # Sizes are written in whole millimetres.
    assert scores["size_error_mm"] <= 0.5
    assert scores["sizes"] == 2


def test_scores_of_reports_by_hand():
    nodule = {"side": "left", "place": "left upper lobe", "size_mm": 20.0}
    labels = [
        labels_of(nodule=[nodule], ascites=[{}]),
        labels_of(nodule=[nodule | {"side": "right", "place": "right middle lobe", "size_mm": 10.0}]),
        labels_of(effusion=[{"side": "both"}], cardiomegaly=[{"size_mm": 150.0}]),
        labels_of(),
    ]
    texts = [
        "Nodule of 17 mm in the left upper lobe. No ascites.",  # nodule hit, ascites missed
        "Nodule of 12.5 mm in the left upper lobe.",  # hit, other side and place
        "Effusion on the right. Cardiomegaly. Nodule.",  # effusion hit with a wrong side; nodule false
        "Ascites.",  # false
    ]
    scores = score_reports(labels, texts)
    expected = {
        # hits, said, support
        "nodule": (2, 3, 2),
        "effusion": (1, 1, 1),
        "cardiomegaly": (1, 1, 1),
        "ascites": (0, 1, 1),
    }
    assert list(scores["per_finding"]) == list(FINDINGS)
    for name, found in scores["per_finding"].items():
        hits, said, support = expected.get(name, (0, 0, 0))
        assert found == {
            "precision": pytest.approx(hits / said if said else 0),
            "recall": pytest.approx(hits / support if support else 0),
            "f1": pytest.approx(2 * hits / (said + support) if said + support else 0),
            "support": support,
        }
    assert scores["per_finding"]["nodule"]["f1"] == pytest.approx(0.8)
    # 4 hits of 6 said and 5 present.
    assert scores["micro_f1"] == pytest.approx(8 / 11)
    # Findings that no scan and no report has count with 0.
    assert scores["macro_f1"] == pytest.approx((0.8 + 1 + 1 + 0) / 10)
    # The side of nodule, nodule, effusion; the place of both nodules; sizes 17 for 20 and 12.5 for 10.
    assert (scores["side_errors"], scores["sides"]) == (pytest.approx(2 / 3), 3)
    assert (scores["place_errors"], scores["places"]) == (0.5, 2)
    assert (scores["size_error_mm"], scores["sizes"]) == (pytest.approx(2.75), 2)


def test_a_missing_side_or_place_is_an_error_and_a_missing_size_is_none():
    labels = [labels_of(renal_stone=[{"side": "left", "place": "left kidney", "size_mm": 9.0}])]
    scores = score_reports(labels, ["Renal stone."])
    assert (scores["side_errors"], scores["place_errors"]) == (1, 1)
    assert (scores["size_error_mm"], scores["sizes"]) == (None, 0)


def test_lesions_in_several_places_have_no_one_place():
    lesions = [
        {"side": "left", "place": "left upper lobe", "size_mm": 20.0},
        {"side": "left", "place": "left lower lobe", "size_mm": 12.0},
    ]
    scores = score_reports([labels_of(nodule=lesions)], ["Two nodules in the left lung, the largest of 19 mm."])
    assert (scores["side_errors"], scores["sides"]) == (0, 1)
    assert (scores["place_errors"], scores["places"]) == (None, 0)
    assert scores["size_error_mm"] == 1  # of the largest


def test_pairs_of_stones_and_fractures_lie_in_both_places():
    stones = [
        {"side": "left", "place": "left kidney", "size_mm": 12.0},
        {"side": "right", "place": "right kidney", "size_mm": 9.0},
    ]
    fractures = [{"place": "thoracic spine"}, {"place": "lumbar spine"}]
    labels = [labels_of(renal_stone=stones, fracture=fractures)] * 2
    texts = [
        "Renal stones in both kidneys, the largest of 11 mm. Vertebral fractures in both parts of the spine.",
        "A renal stone of 12 mm in the left kidney. Fractures in the lumbar spine.",
    ]
    scores = score_reports(labels, texts)
    assert (scores["side_errors"], scores["sides"]) == (0.5, 2)
    assert (scores["place_errors"], scores["places"]) == (0.5, 4)
    assert (scores["size_error_mm"], scores["sizes"]) == (0.5, 2)  # 11 for 12, 12 for 12


def test_extents_by_hand():
    labels = [
        labels_of(effusion=[{"side": "left", "extent_mm": 50.0}], consolidation=[{"extent_mm": 72.0}]),
        labels_of(aneurysm=[{"place": "both parts of the aorta", "extent_mm": 150.0}], nodule=[{"extent_mm": 12.0}]),
        labels_of(effusion=[{"side": "left"}]),
    ]
    texts = [
        "Effusion on the left, extent 60 mm. Consolidation with an extent of 70 mm.",  # off by 10 and 2
        "Aneurysm in both parts of the aorta, extent 120 mm. Nodule, extent 90 mm. Effusion, extent 9 mm.",  # by 30
        "Effusion on the left, extent 60 mm.",  # unknown
    ]
    scores = score_reports(labels, texts)
    assert (scores["extent_error_mm"], scores["extents"]) == (pytest.approx(14), 3)
    scores = score_reports(labels[:1], ["Effusion on the left and consolidation."])
    assert (scores["extent_error_mm"], scores["extents"]) == (None, 0)


def test_reports_that_name_nothing_score_zero():
    scores = score_reports([labels_of(ascites=[{}]), labels_of()], ["", "No ascites."])
    assert (scores["macro_f1"], scores["micro_f1"]) == (0, 0)
    assert scores["side_errors"] is scores["place_errors"] is scores["size_error_mm"] is None


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_as_many_reports_as_scans(texts):
    with pytest.raises(ValueError):
        score_reports([labels_of()], texts)
