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
"""Files of a data set row by row, each with its place: `read_csv`, `read_table`, `read_json_list`.

A file that cannot be read further raises `DataError`, which names the line; a single row that cannot be used comes as
a text that says why. Neither quotes a cell: that may tell who the patient is.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ct_moe import DataError


_CHUNK = 1 << 20  # characters of JSON that are read at a time
_LONGEST = 1 << 26  # of one member of a list: what is longer is damaged
_AGAIN = "Download it again"


def read_csv(
    path: Path, columns: Sequence[str], dialect: type = csv.excel, *, remedy: str = _AGAIN
) -> Iterator[tuple[int, dict[str, str] | str]]:
    """Rows of a CSV file as text, with the lines where they start; cells such as "NA" stay what they are.

    A row with more cells than the header comes as what is wrong with it. A quote that is not closed would swallow the
    rows behind it, so that nothing behind it is read.

    Raises:
        DataError: the file is missing, is no UTF-8, has a broken quote or a cell without end, or lacks a column.
    """
    line = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, dialect, strict=True)
            header = next(rows, [])
            missing = [column for column in columns if column not in header]
            if missing:
                found = ", ".join(name[:40] for name in header[:20])
                if len(missing) == len(columns):  # without a header these are somebody's texts
                    found = "no known name; is the header missing?"
                raise DataError(str(path), f"no column {', '.join(missing)}; found: {found}", remedy)
            line = rows.line_num + 1
            for cells in rows:
                if any(cells[len(header) :]):
                    yield line, f"{len(cells)} cells for {len(header)} columns"
                elif cells:
                    yield line, dict(zip_longest(header, cells[: len(header)], fillvalue=""))
                line = rows.line_num + 1  # of a cell with line breaks the line where its row starts
    except csv.Error as error:
        raise DataError(str(path), f"line {line}: {error}", f"Is a quote there not closed? {remedy}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error, remedy) from error


def read_table(path: Path, columns: Sequence[str] = ()) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Rows of a .csv or .tsv file, of any other one JSON object per line, with their lines.

    Raises:
        DataError: as in `read_csv`; columns are looked for in .csv and .tsv alone.
    """
    remedy = "Repair the file"
    if path.suffix.lower() in (".csv", ".tsv"):
        dialect = csv.excel if path.suffix.lower() == ".csv" else csv.excel_tab
        yield from read_csv(path, columns, dialect, remedy=remedy)
        return
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        row = json.loads(line)
                    except (json.JSONDecodeError, RecursionError):
                        row = None
                    yield number, row if isinstance(row, dict) else "is no JSON object"
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error, remedy) from error


def read_json_list(path: Path) -> Iterator[tuple[int, Any]]:
    """Members of a JSON list with their numbers from 1, without holding the file in memory: CT-RATE's has 1.2 GB.

    Raises:
        DataError: the file is missing or holds no JSON list.
    """
    decoder, number = json.JSONDecoder(), 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            text, position, is_end = "", 0, False

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
                raise DataError(str(path), "holds no JSON list", _AGAIN)
            position += 1
            while (character := skip(" \t\r\n,")) != "]":
                if not character:
                    raise DataError(str(path), "ends in the middle of its list", _AGAIN)
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
    except json.JSONDecodeError as error:
        raise DataError(str(path), f"number {number + 1} of its list is no JSON", _AGAIN) from error
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error, _AGAIN) from error


def _unreadable(path: Path, error: Exception, remedy: str) -> DataError:
    if isinstance(error, FileNotFoundError):
        where = "Check the folder; it must be laid out as it is published" if remedy == _AGAIN else "Check the path"
        return DataError(str(path), "there is no such file", where)
    return DataError(str(path), f"cannot be read ({type(error).__name__})", remedy)
