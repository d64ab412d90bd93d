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
"""The command line in tests: as typer's runner sees it, and as a shell does."""

import sys

import pytest
from typer.testing import CliRunner

from ct_moe.hub.cli import app, main


def invoke(*arguments, **kwargs):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **kwargs)


def fail(monkeypatch, capsys, *arguments) -> str:
    """Run the entry point on arguments that must fail: the one line it leaves on stderr."""
    monkeypatch.setattr(sys, "argv", ["ct-moe", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]
