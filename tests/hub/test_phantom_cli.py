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
"""`ct-moe phantom`: what it writes and prints, and how it ends when it cannot."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from command_line import fail, invoke

from ct_moe import load_volume


FEW = ["--n", "1", "--validation", "0", "--test", "1", "--workers", "1"]


def test_a_set_is_written_and_its_use_is_told(tmp_path):
    out = tmp_path / "set"
    result = invoke("phantom", str(out), *FEW, "--seed", "2", "--format", "both")
    assert result.exit_code == 0, result.output
    rows = {name: len((out / f"{name}.jsonl").read_text().splitlines()) for name in ("train", "test")}
    wrote, use = result.stdout.splitlines()
    assert wrote == f"Wrote {out}: {rows['train']} train rows, {rows['test']} test rows"
    assert use.startswith("No patient is in it.")
    assert use.endswith(f"ct-moe train --config RECIPE --set train_data={out}/train.jsonl")
    assert "1/1" in result.stderr  # progress
    (labels,) = map(json.loads, (out / "train_labels.jsonl").read_text().splitlines())
    assert list(load_volume(out / "train" / "scans" / "00000").hu.shape) == labels["shape"]


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['ct-moe', 'phantom', '--help']\n"
        "from ct_moe.hub.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: print(stop.code, sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--validation" in result.stdout
    assert result.stdout.splitlines()[-1] == "0 []"


@pytest.mark.parametrize("arguments", [["--n", "0"], ["--seed", "-1"], ["--workers", "0"], ["--format", "nrrd"]])
def test_wrong_usage_ends_with_2(tmp_path, arguments):
    assert invoke("phantom", str(tmp_path / "set"), *arguments).exit_code == 2
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_left_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine").write_text("mine")
    line = fail(monkeypatch, capsys, "phantom", str(tmp_path), *FEW)
    assert line.startswith(f"ct-moe: error: {tmp_path}: exists and is not an empty folder")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_dicom_without_pydicom_says_what_to_install(tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "pydicom"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    line = fail(monkeypatch, capsys, "phantom", str(tmp_path / "set"), *FEW, "--format", "dicom")
    assert 'Run: pip install "ct-moe[dicom]"' in line
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("command", [["-m", "ct_moe.hub.cli"], ["ct-moe"]])
def test_several_workers_start_from_both_entry_points(tmp_path, command):
    command = (
        [sys.executable, *command] if command[0] == "-m" else [os.path.join(os.path.dirname(sys.executable), "ct-moe")]
    )
    arguments = ["phantom", str(tmp_path / "set"), "--n", "5", "--validation", "0", "--test", "0", "--workers", "2"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "5/5" in done.stderr
    assert len(list((tmp_path / "set" / "train" / "scans").iterdir())) == 5


@pytest.mark.slow
@pytest.mark.parametrize("early", [True, False])
def test_ctrl_c_leaves_nothing_and_no_traceback(tmp_path, early):
    """Early: while the workers still import what they need."""
    command = [
        sys.executable,
        "-m",
        "ct_moe.hub.cli",
        "phantom",
        str(tmp_path / "set"),
        "--n",
        "2000",
        "--workers",
        "2",
    ]
    # A job in the background of a shell ignores Ctrl-C, and so would its children.
    script = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if list(tmp_path.glob(".set-*/train/scans" if early else ".set-*/train/scans/*.nii.gz")):
            break
        time.sleep(0.1)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process
    try:
        _, error = process.communicate(timeout=120)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # or it would go on to fill the disk
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())
