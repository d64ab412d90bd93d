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
"""Which choice a text names: every case was decided by hand."""

import pytest

from ct_moe.trainers.evaluation.closed_questions import score_closed


CHOICES = ["lung", "liver", "heart", "spine"]


def closed_row(letter: str = "B") -> dict:
    return {"answer": CHOICES["ABCD".index(letter)], "choices": CHOICES, "completion": "not read"}


@pytest.mark.parametrize(
    ("text", "strict", "letter", "m3d"),
    [
        ("liver, B.", True, True, True),
        ("liver", True, False, False),
        ("Liver.", True, False, False),
        ("liver (B)", True, True, False),
        ("B. liver", True, True, True),
        ("  B. liver.\n", True, True, True),
        ("B. LIVER", True, True, True),
        ("B) liver", True, True, False),
        ("B: liver", True, True, False),
        ("B.", True, True, True),
        ("B", True, True, False),
        ("(B)", True, True, False),
        ("(b) Liver", True, True, False),  # as CT-RATE writes choices
        ("(b)", True, True, False),
        ("(a) liver (b) lung", False, False, False),
        # The choice decides, whatever letter goes with it.
        ("liver, C.", True, False, False),
        ("A. liver", True, False, False),
        ("heart, B.", False, True, True),
        ("B. heart", False, True, True),
        ("(B). heart", False, True, False),
        ("lung, A.", False, False, False),
        ("A.", False, False, False),
        # Several letters or choices are no answer, though M3D takes them.
        ("A. B.", False, False, True),
        ("A. B. C. D.", False, False, True),
        ("lung, liver, B.", False, True, True),
        # Nothing but the choice and its letter.
        ("The answer is liver, B.", False, True, True),
        ("B. the text of no choice", False, True, True),
        # Choices have capital letters, and a sentence may begin with any word.
        ("b", False, False, False),
        ("b. liver", False, False, False),
        ("Because", False, False, False),
        ("Both", False, False, False),
        ("", False, False, False),
        ("  \n", False, False, False),
    ],
)
def test_closed_answers(text, strict, letter, m3d):
    assert score_closed([closed_row("B")], [text]) == [{"strict": strict, "letter": letter, "m3d": m3d}]


def test_the_article_is_not_the_letter_a():
    (score,) = score_closed([closed_row("A")], ["A nodule is in the lung."])
    assert score == {"strict": False, "letter": False, "m3d": False}


def test_each_closed_row_has_its_own_letter():
    rows = [closed_row(letter) for letter in "ABCD"]
    scores = score_closed(rows, ["lung, A.", "A. lung", "C", "heart, D."])
    assert [score["strict"] for score in scores] == [True, False, True, False]
    assert [score["letter"] for score in scores] == [True, False, True, True]


@pytest.mark.parametrize(
    ("answer", "text", "strict", "letter"),
    [
        ("Stanford type A", "A. Stanford type A", True, True),
        ("Stanford type A", "Stanford type A", True, False),
        ("hepatitis B", "A. hepatitis B", True, True),
        ("hepatitis B", "hepatitis B, A.", True, True),
        ("hepatitis B", "B. hepatitis B", True, False),
        ("L4 (grade D)", "A. L4 (grade D).", True, True),
        ("A cyst", "A cyst", True, False),
        ("C-section scar", "C-section scar", True, False),
        ("A cyst", "a cyst", True, False),
        ("cyst", "A. A cyst", False, True),
    ],
)
def test_a_choice_may_hold_a_letter_itself(answer, text, strict, letter):
    (score,) = score_closed([{"answer": answer, "choices": [answer, "none", "other"]}], [text])
    assert (score["strict"], score["letter"]) == (strict, letter)
