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
import asyncio
from types import SimpleNamespace

import pytest

from ct_moe import load_volume
from ct_moe.hub.app.interface import build_app, launch_options
from ct_moe.hub.app.uploads import LIMITS, UploadLimits


def functions(app) -> dict:
    return {function.fn.__name__: function for function in app.fns.values() if function.fn is not None}


def request(session: str):
    return SimpleNamespace(session_hash=session)


@pytest.fixture
def app(reader):
    async def build():
        return build_app(reader)

    return asyncio.run(build())  # without a loop that runs, Gradio makes some and leaves them open


def test_a_scan_is_open_for_its_session_until_the_page_is_closed(app, reader, phantom, tmp_path):
    calls = functions(app)
    upload = tmp_path / "of this upload" / "scan.nii.gz"
    upload.parent.mkdir()
    upload.write_bytes(phantom.read_bytes())
    *_, shown = calls["open_scan"].fn(str(upload), "", request("a"))
    assert f"Scan open: {len(load_volume(phantom).hu)} slices" in shown[0]
    assert not upload.parent.exists()
    assert app.sessions.get("a") is not None
    *_, other = calls["write_report"].fn("", request("b"))
    assert "scan: none is open" in other[0]
    *_, text, mine = calls["write_report"].fn("", request("a"))
    assert f"Model trained for: {reader.scope}." in text[1]
    assert mine[2].count("download=") == 3
    assert [target[1] for target in calls["close"].targets] == ["unload"]
    calls["close"].fn(request("a"))
    assert len(app.sessions) == 0


def test_a_refused_scan_closes_the_one_before(app, phantom, tmp_path):
    opened = functions(app)["open_scan"].fn
    for name, content in (("a", phantom.read_bytes()), ("b", b"no scan")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "scan.nii.gz").write_bytes(content)
        *_, shown = opened(str(tmp_path / name / "scan.nii.gz"), "", request("a"))
    assert "upload: neither NIfTI nor a zip" in shown[0]
    assert "pass " not in shown[0]
    assert app.sessions.get("a") is None


def test_model_text_and_questions_are_text_on_the_page(app, phantom, tmp_path):
    calls = functions(app)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "scan.nii.gz").write_bytes(phantom.read_bytes())
    list(calls["open_scan"].fn(str(tmp_path / "a" / "scan.nii.gz"), "", request("a")))
    *_, shown = calls["answer"].fn("<script>alert(1)</script>?", "", request("a"))
    assert "&lt;script&gt;" in shown[2]
    assert "Model trained for: " in shown[2]
    assert "<script>" not in shown[2]
    *_, empty = calls["answer"].fn("  ", "", request("a"))
    assert "question: is empty" in empty[0]


def test_questions_wait_for_one_model_and_nothing_is_shared_or_fetched(app):
    calls = functions(app)
    assert {calls[name].concurrency_id for name in ("write_report", "answer")} == {"model"}
    assert calls["write_report"].concurrency_limit == 1
    options = launch_options(UploadLimits(upload_mb=7))
    assert options["share"] is False
    assert options["max_file_size"] == 7_000_000
    assert "google" not in str(options["theme"]._get_theme_css()).lower()
    assert options["theme"]._stylesheets == []
    assert app.analytics_enabled is False
    assert app.delete_cache is not None
    assert LIMITS.upload_mb == 512
