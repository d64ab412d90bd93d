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
"""Closed questions: which choice a text names, by the rule of M3D and strictly: `score_closed`."""

import re
from collections.abc import Sequence

from ..data_sets.item import LETTERS


def score_closed(rows: Sequence[dict], texts: Sequence[str]) -> list[dict[str, bool]]:
    """Whether each text names the right choice.

    Args:
        rows: with `choices` and `answer`, the right one; with `letter` where the texts do not tell the choice.
        texts: what the model wrote: "left kidney", "left kidney, B.", "B. left kidney", "(b) left kidney" or "B".

    Returns:
        Per row `strict`: the text names the right choice, whatever letter it adds, or gives its letter alone;
        `letter`: it tells the right letter and no other; and `m3d`: "<letter>." is somewhere in the text, the rule of
        the M3D benchmark (Bench/eval/eval_vqa.py), which counts "A. B." as right. A row with `letter` has no text
        that is right: there `strict` is `letter`.
    """
    scores = []
    for row, text in zip(rows, texts, strict=True):
        letter = row.get("letter") or LETTERS[row["choices"].index(row["answer"])]
        m3d = f"{letter}." in text
        text = re.sub(r"\(([a-d])\)", lambda match: f"{match[1].upper()}. ", text)  # as CT-RATE writes choices
        answer = _plain(row["answer"])
        # A choice may end in a letter itself ("hepatitis B"), so that less and less is taken off.
        behind = re.sub(r"^\s*\(?[A-D](?:[.):]+\s*|\s+(?![a-z])|\s*$)", "", text)
        before = re.sub(r"[\s,;:(]*\b[A-D]\b[.)\s]*$", "", behind)
        is_named = answer in (_plain(text), _plain(behind), _plain(before))
        # What is left beside the choice tells the letter.
        rest = re.sub(re.escape(answer), " ", text, flags=re.IGNORECASE) if is_named else text
        letters = set(re.findall(r"\b[A-D]\b(?! [a-z])|\b[A-D](?=[.):])", rest))  # not the article
        strict = is_named or (not _plain(before) and letters == {letter})
        strict = letters == {letter} if row.get("letter") else strict
        scores.append({"strict": strict, "letter": letters == {letter}, "m3d": m3d})
    return scores


def _plain(text: str) -> str:
    return text.strip(" .,\n").lower()
