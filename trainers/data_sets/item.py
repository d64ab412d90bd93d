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
"""One question or report of a published data set: `Item`, and `BadRow` for a line that cannot be used."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


LETTERS = "ABCD"


@dataclass
class Item:
    """A scan, what is asked of it and what is right.

    Attributes:
        id: unique in a split, the same every time.
        images: paths of its scans.
        prompt: the question, or messages of a conversation that ends with it.
        completion: the whole answer, as it is trained and scored.
        task: "report", "vqa_closed" or "vqa_open".
        kind: type of question, as the data set names it.
        patient: whose scan it is: intervals are clustered by it.
        where: file and line (of JSON: number in the list), for errors.
        answer: of a closed question the right choice.
        choices: of a closed question, in the order of their letters; "" for a letter without one.
        letter: the right one, of a question whose texts do not tell it: it is scored by the letter alone.
    """

    id: str
    images: list[str]
    prompt: str | list[dict[str, str]]
    completion: str
    task: str
    kind: str
    patient: str
    where: tuple[str, int]
    answer: str | None = None
    choices: list[str] | None = None
    letter: str | None = None

    def row(self) -> dict[str, Any]:
        """For training: the columns that `load_rows` takes."""
        return {name: getattr(self, name) for name in ("images", "prompt", "completion", "task")}


@dataclass
class BadRow:
    """A line that gives no item. It never quotes a text: that may tell who the patient is.

    Attributes:
        file, line: where it is.
        finding: why it gives none.
        is_left_out: the publishers leave it out as well: nothing is wrong with the download.
    """

    file: str
    line: int
    finding: str
    is_left_out: bool = False

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.finding}"


def closed_item(
    question: str, choices: Sequence[str | None], letter: str, answer: str | None, **rest: Any
) -> Item | str:
    """A closed question in the form of M3D: "... Choices: A. ... B. ..." with the answer "B. ...".

    M3D scores by the letter, whatever the texts say. Where the right choice is there twice, or `answer` is another
    text than its choice, no text is right, and `Item.letter` is set.

    Args:
        question: without choices.
        choices: up to four; what is `None` or blank is not shown.
        letter: of the right one.
        answer: its text if the data set repeats it.
        rest: fields of the [`Item`].

    Returns:
        The item, or what is wrong.
    """
    choices = [(choice or "").strip() for choice in choices]
    letter = letter.strip().rstrip(".").upper()
    if len(letter) != 1 or letter not in LETTERS[: len(choices)] or not choices[LETTERS.index(letter)]:
        return "an answer letter that no choice has"
    right = choices[LETTERS.index(letter)]
    plain = [choice.strip(" .").lower() for choice in choices]
    told = plain[LETTERS.index(letter)]
    is_told = plain.count(told) == 1 and (answer is None or answer.strip(" .").lower() == told)
    while not choices[-1]:
        choices.pop()
    listed = " ".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices) if choice)
    return Item(
        prompt=f"{question} Choices: {listed}",
        completion=f"{letter}. {right}",
        task="vqa_closed",
        answer=right,
        choices=choices,
        letter=None if is_told else letter,
        **rest,
    )


def pick(wordings: Sequence[str], key: str) -> str:
    """One of several wordings, the same for a key on every machine."""
    return wordings[int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % len(wordings)]
