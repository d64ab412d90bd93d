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
"""A file is there whole or as it was, whoever else writes it."""

import threading

import pytest

from ct_moe.hub.whole_file import whole_file


def test_a_block_that_fails_leaves_the_file_as_it_was(tmp_path):
    file = tmp_path / "scores.json"
    file.write_text("old")

    def fail() -> None:
        with whole_file(file) as part:
            assert part.suffix == ".json"  # by which libraries choose a format
            part.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_the_file_is_unseen_until_the_block_ends(tmp_path):
    file = tmp_path / "scores.json"
    with whole_file(file) as part:
        part.write_text("whole")
        assert not file.exists()
    assert file.read_text() == "whole"


def test_writers_at_the_same_time_do_not_mix(tmp_path):
    file, texts = tmp_path / "run.json", [str(number) * 200_000 for number in range(8)]

    def write(text: str) -> None:
        with whole_file(file) as part:
            part.write_text(text)

    writers = [threading.Thread(target=write, args=(text,)) for text in texts]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert file.read_text() in texts
    assert list(tmp_path.iterdir()) == [file]
