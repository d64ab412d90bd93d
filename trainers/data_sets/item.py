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

import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ct_moe import DataError


LETTERS = "ABCD"
_CHUNK = 1 << 20  # characters of JSON that are read at a time
_LONGEST = 1 << 26  # of one member of a list: what is longer is damaged


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
        answer: of a closed question the right choice.
        choices: of a closed question, in the order of their letters.
        patient: whose scan it is: intervals are clustered by it.
        where: file and line (of JSON: number in the list), for errors.
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

    Args:
        question: without choices.
        choices: two to four; what is `None` or blank at the end is left out.
        letter: of the right one.
        answer: its text if the data set repeats it; the two must agree.
        rest: fields of the [`Item`].

    Returns:
        The item, or what is wrong.
    """
    choices = [(choice or "").strip() for choice in choices]
    while choices and not choices[-1]:
        choices.pop()
    if len(choices) < 2 or not all(choices):
        return f"{len([choice for choice in choices if choice])} choices"
    if len(set(choices)) < len(choices):
        return "two choices are the same"
    letter = letter.strip().rstrip(".").upper()
    if len(letter) != 1 or letter not in LETTERS[: len(choices)]:
        return "an answer letter that no choice has"
    right = choices[LETTERS.index(letter)]
    if answer is not None and answer.strip(" .").lower() != right.strip(" .").lower():
        return "the answer is not the choice of its letter"
    listed = " ".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices))
    return Item(
        prompt=f"{question} Choices: {listed}",
        completion=f"{letter}. {right}",
        task="vqa_closed",
        answer=right,
        choices=choices,
        **rest,
    )


def pick(wordings: Sequence[str], key: str) -> str:
    """One of several wordings, the same for a key on every machine."""
    return wordings[int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % len(wordings)]


def read_csv(path: Path, columns: Sequence[str], dialect: type = csv.excel) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a CSV file as text, with their lines; cells such as "NA" stay what they are.

    Raises:
        DataError: the file is missing, is no UTF-8, or lacks one of the columns.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="", dialect=dialect)
            missing = [column for column in columns if column not in (reader.fieldnames or ())]
            if missing:
                found = ", ".join(str(name)[:40] for name in (reader.fieldnames or ())[:20])
                if len(missing) == len(columns):  # without a header these are somebody's texts
                    found = "no known name; is the header missing?"
                raise DataError(str(path), f"no column {', '.join(missing)}; found: {found}", "Download it again")
            line = reader.line_num + 1
            for row in reader:
                yield line, row  # of a cell with line breaks the line where the row starts
                line = reader.line_num + 1
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _unreadable(path, error) from error


def read_json_list(path: Path) -> Iterator[tuple[int, Any]]:
    """Members of a JSON list with their numbers from 1, without holding the file in memory: CT-RATE's has 1.2 GB.

    Raises:
        DataError: the file is missing or holds no JSON list.
    """
    decoder = json.JSONDecoder()
    try:
        with path.open(encoding="utf-8-sig") as file:
            text, position, number, is_end = "", 0, 0, False

            def more() -> None:
                nonlocal text, position, is_end
                chunk = file.read(_CHUNK)
                text, position, is_end = text[position:] + chunk, 0, not chunk

            def skip(characters: str) -> str:
                """The next character that is none of these; "" at the end."""
                nonlocal position
                while True:
                    while position < len(text) and text[position] in characters:
                        position += 1
                    if position < len(text) or is_end:
                        return text[position : position + 1]
                    more()

            if skip(" \t\r\n") != "[":
                raise DataError(str(path), "holds no JSON list", "Download it again")
            position += 1
            while (character := skip(" \t\r\n,")) != "]":
                if not character:
                    raise DataError(str(path), "ends in the middle of its list", "Download it again")
                while True:
                    try:
                        member, position = decoder.raw_decode(text, position)
                        break
                    except json.JSONDecodeError:
                        if is_end or len(text) - position > _LONGEST:
                            raise
                        more()
                number += 1
                yield number, member
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(
            str(path), "there is no such file", "Check the folder; it must be laid out as it is published"
        )
    return DataError(str(path), f"cannot be read ({type(error).__name__})", "Download it again")
