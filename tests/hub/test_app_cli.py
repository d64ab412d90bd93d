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
import sys

from command_line import fail, invoke


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ct_moe.hub.app.interface", None)
    assert 'pip install "ct-moe[app]"' in fail(monkeypatch, capsys, "app", "--model", "anything")


def test_a_missing_model_is_named(monkeypatch, capsys, tmp_path):
    assert "no such folder" in fail(monkeypatch, capsys, "app", "--model", tmp_path / "none")


def test_the_page_is_for_this_machine_unless_asked_otherwise_and_cannot_be_shared_through_a_relay():
    shown = invoke("app", "--help").stdout
    assert "127.0.0.1" in shown
    assert "--share" not in shown
