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
"""The page in a real browser. Screenshots lie in the folder `screenshots` of pytest's temporary directory."""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pydicom
import pytest
from hostile import HOSTILE, script_in_the_name
from pypdf import PdfReader
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from ct_moe import load_volume


pytestmark = pytest.mark.slow

DEMO_MODEL = Path(__file__).parents[3] / "examples" / "demo_model"
SCOPE = json.loads((DEMO_MODEL / "config.json").read_text())["intended_scope"]


@dataclass
class Page:
    """The page as `ct-moe app` serves it."""

    address: str
    server: subprocess.Popen
    temporary: Path

    def files(self) -> list[Path]:
        """What is on the disk of uploads. Gradio leaves an empty file per upload until the server stops."""
        return [path for path in self.temporary.rglob("*") if path.is_file() and path.stat().st_size]


@contextmanager
def serving(folder: Path, *options: str):
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}
    environment.pop("GRADIO_TEMP_DIR", None)
    command = [sys.executable, "-m", "ct_moe.hub.cli", "app", "--model", str(DEMO_MODEL), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            line = server.stdout.readline()
            assert line.startswith("Open http://127.0.0.1:"), line
            yield Page(line.split()[1], server, folder)
        finally:
            server.terminate()
            server.wait(30)


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory):
    return tmp_path_factory.mktemp("screenshots")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server"), "--max-upload-mb", "8", "--max-new-tokens", "96") as page:
        yield page


class User:
    """One browser with the page open."""

    def __init__(self, browser: webdriver.Chrome, address: str):
        self.browser = browser
        browser.get(address)
        self.until(lambda: browser.find_elements(By.CSS_SELECTOR, "#upload input[type=file]"))

    def until(self, condition, seconds: float = 60):
        return WebDriverWait(self.browser, seconds, poll_frequency=0.05).until(lambda _: condition())

    def all(self, selector: str) -> list:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return self.browser.execute_script("return document.querySelector(arguments[0])?.innerText ?? ''", selector)

    def pixels(self, selector: str) -> list[int]:
        """Widths of the pictures that are really there."""
        script = "return [...document.querySelectorAll(arguments[0])].map((image) => image.naturalWidth)"
        return self.browser.execute_script(script, selector)

    def upload(self, path) -> str:
        """What the page says of the file."""
        old = "document.querySelectorAll('#status .status, #status .problem').forEach((box) => box.remove())"
        self.browser.execute_script(old)
        self.until(lambda: self.all("#upload input[type=file]"))
        self.all("#upload input[type=file]")[0].send_keys(str(path))
        self.until(lambda: self.all("#status .status, #status .problem"))
        return self.text("#status .status, #status .problem")

    def write_report(self) -> list[str]:
        """The texts that were on the page on the way to the whole report."""
        self.all("#write")[0].click()
        texts = []

        def done():
            texts.append(self.text("#report"))
            return self.all("#documents a")

        self.until(done)
        return [*texts, self.text("#report")]

    def ask(self, question: str) -> str:
        answered = self.text("#answers").count("not done again")
        box = self.all("#question textarea, #question input")[0]
        box.send_keys(question, Keys.ENTER)
        self.until(lambda: self.text("#answers").count("not done again") > answered)
        return self.text("#answers")

    def documents(self) -> dict[str, bytes]:
        links = [(a.get_attribute("download"), a.get_attribute("href")) for a in self.all("#documents a")]
        return {name.rsplit(".")[-1]: base64.b64decode(href.split(",", 1)[1]) for name, href in links}

    def screenshot(self, path) -> None:
        self.browser.execute_script("window.scrollTo(0, 0)")
        self.browser.save_screenshot(str(path))
        assert path.stat().st_size > 20_000


@contextmanager
def browsing(page):
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(programs):
        reason = "no chromium and chromedriver: apt install chromium chromium-driver"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1600,1150"):
        options.add_argument(f"--{argument}")
    browser = webdriver.Chrome(options=options, service=Service(programs[1]))
    try:
        yield User(browser, page.address)
    finally:
        browser.quit()


@pytest.fixture
def user(page):
    with browsing(page) as user:
        yield user


def test_a_real_scan_is_seen_reported_and_asked_about(page, user, test_data, screenshots):
    assert "not a medical device" in user.text(".notice")
    assert SCOPE in user.text(".notice")
    status = user.upload(test_data / "totalseg" / "example_ct.nii.gz")
    assert "Scan open: 112 slices" in status
    assert page.files() == []  # read, and gone

    user.until(lambda: user.pixels(".panes figure:not(.routing) img") == [384] * 3)
    assert [caption.text.split(" C ")[0] for caption in user.all(".panes figure:not(.routing) figcaption")] == [
        "lung",
        "soft tissue",
        "bone",
    ]
    viewer, place = user.all(".viewer")[0], user.text(".where")
    picture = user.all(".panes img")[0].get_attribute("src")
    viewer.send_keys(Keys.ARROW_UP)
    assert user.text(".where") != place
    assert user.all(".panes img")[0].get_attribute("src") != picture
    viewer.send_keys(Keys.ARROW_DOWN)
    assert user.text(".where") == place
    user.browser.execute_script(
        "document.querySelector('.panes img').dispatchEvent(new WheelEvent('wheel', {deltaY: 100, bubbles: true}))"
    )
    assert user.text(".where") != place

    texts = user.write_report()
    assert len(set(texts)) > 3  # word by word
    assert "FINDINGS" in texts[-1].upper()
    layers = [option.text for option in user.all(".routing option")]
    assert any("task report" in layer for layer in layers)
    user.until(lambda: user.pixels(".routing .screen img") == [384])

    answers = user.ask("Is there a pleural effusion?")
    assert "all before the experts" in answers
    files = user.documents()
    assert json.loads(files["json"])["scope"] == SCOPE
    assert json.loads(files["json"])["answers"][0]["question"] == "Is there a pleural effusion?"
    assert SCOPE in " ".join(PdfReader(io.BytesIO(files["pdf"])).pages[0].extract_text().split())
    assert pydicom.dcmread(io.BytesIO(files["dcm"])).VerificationFlag == "UNVERIFIED"
    assert "example_ct" not in user.browser.page_source
    user.screenshot(screenshots / "real_scan.png")
    user.all("button.label-wrap")[0].click()
    user.until(lambda: user.pixels("#routing img") and user.pixels("#routing img")[0] > 1000)
    user.browser.execute_script("document.querySelector('#routing').scrollIntoView()")
    time.sleep(0.5)
    user.browser.save_screenshot(str(screenshots / "routing_picture.png"))
    severe = [entry["message"] for entry in user.browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert severe == []


def test_a_zipped_dicom_series_is_seen(user, test_data, tmp_path):
    with zipfile.ZipFile(tmp_path / "series.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in (test_data / "totalseg" / "example_ct_dicom").iterdir():
            archive.write(file, file.name)
    assert "Scan open: 20 slices" in user.upload(tmp_path / "series.zip")
    user.until(lambda: user.pixels(".panes figure:not(.routing) img") == [512] * 3)


def test_bad_and_hostile_files_get_a_message_and_the_page_goes_on(
    page, user, phantom, test_data, tmp_path, screenshots
):
    assert "Scan open" in user.upload(phantom)
    said = user.upload(test_data / "totalseg" / "example_mr_sm.nii.gz")
    assert said.startswith("upload: ")
    user.until(lambda: user.text(".where") == "No scan is open.")  # and not the last one
    user.screenshot(screenshots / "bad_file.png")
    user.all("#write")[0].click()
    user.until(lambda: "scan: none is open" in user.text("#status"))
    for build in HOSTILE:
        folder = tmp_path / build.__name__
        folder.mkdir()
        said = user.upload(build(folder))
        assert said.startswith("upload: "), build.__name__
    assert user.browser.execute_script("return document.querySelectorAll('img[src=x]').length") == 0
    assert "onerror" not in user.text("body")
    assert page.files() == []
    assert "Scan open" in user.upload(phantom)
    assert "FINDINGS" in user.write_report()[-1].upper()


def test_a_file_over_the_limit_is_not_taken(page, user, phantom, tmp_path):
    (tmp_path / "large.nii").write_bytes(bytes(9_000_000))
    user.all("#upload input[type=file]")[0].send_keys(str(tmp_path / "large.nii"))
    user.until(lambda: "exceed" in user.text("body") or "over the limit" in user.text("body"))
    user.browser.refresh()
    user.until(lambda: user.all("#upload input[type=file]"))
    assert "Scan open" in user.upload(phantom)


def test_a_path_on_the_server_is_no_upload(page, phantom):
    calls = httpx.get(f"{page.address}config").json()["dependencies"]
    call = next(call["id"] for call in calls if any(target[1] == "upload" for target in call["targets"]))
    file = {"path": str(phantom), "meta": {"_type": "gradio.FileData"}}
    body = {"data": [file, ""], "fn_index": call, "session_hash": "stranger"}
    httpx.post(f"{page.address}gradio_api/queue/join", json=body).raise_for_status()
    with httpx.stream("GET", f"{page.address}gradio_api/queue/data?session_hash=stranger", timeout=60) as messages:
        done = next(line for line in messages.iter_lines() if "process_completed" in line)
    assert '"success":false' in done
    assert phantom.is_file()
    assert httpx.get(f"{page.address}gradio_api/file={phantom}").status_code == 403


def test_two_users_at_once_have_their_own_scan_and_leave_nothing_behind(page, user, phantom, test_data):
    with browsing(page) as other:
        assert f"Scan open: {len(load_volume(phantom).hu)} slices" in user.upload(phantom)
        assert "Scan open: 112 slices" in other.upload(test_data / "totalseg" / "example_ct.nii.gz")
        user.all("#write")[0].click()
        other.all("#write")[0].click()
        for each in (user, other):
            each.until(lambda each=each: each.all("#documents a"))
        mine, theirs = (json.loads(each.documents()["json"]) for each in (user, other))
        assert mine["scan"]["processing"]["source_shape"] != theirs["scan"]["processing"]["source_shape"]
        assert mine["id"] != theirs["id"]
    assert "all before the experts" in user.ask("Is there ascites?")


def test_a_server_that_is_stopped_leaves_no_file(tmp_path):
    with serving(tmp_path / "server") as page:
        folder = next(page.temporary.glob("ct-moe-app-*"))
        (folder / "upload").mkdir()
        (folder / "upload" / "scan.nii").touch()  # as if it came in at this moment
    assert page.server.returncode == 0
    assert [path for path in page.temporary.rglob("*") if path.is_file()] == []


def test_a_name_that_is_a_script_does_not_run(user, tmp_path):
    assert user.upload(script_in_the_name(tmp_path)).startswith("upload: neither NIfTI nor a zip")
    assert user.browser.execute_script("return document.querySelectorAll('img[src=x]').length") == 0
