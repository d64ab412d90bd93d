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
"""What a user gets: a saved folder without this package, and this package without its training extras."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import use_auto_classes
from clean_environment import clean_environment
from safetensors.torch import load_file
from tiny_families import FAMILIES, build_dinov2, build_family

from ct_moe.hub.conversion import convert_base


pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tests" / "use_auto_classes.py"


@pytest.fixture(scope="module")
def python_for_inference(tmp_path_factory) -> Path:
    """The interpreter of a new virtual environment with this package from its wheel."""
    return clean_environment(tmp_path_factory.mktemp("inference"), str(ROOT))


def run(command: list, folder: Path, **variables) -> subprocess.CompletedProcess:
    """Offline, with empty caches, outside the checkout."""
    caches = {"HF_HOME": str(folder / "hf"), "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**environment, **caches, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_folder_loads_without_the_package_and_gives_the_same_bits(
    python_without_package, model_folder, test_data, tmp_path
):
    scan = test_data / "totalseg" / "example_ct_sm.nii.gz"
    printed, tensors = {}, {}
    for mode, python in (("remote", python_without_package), ("library", sys.executable)):
        out = tmp_path / f"{mode}.safetensors"
        result = run([python, SCRIPT, mode, model_folder, scan, out], tmp_path)
        assert result.returncode == 0, result.stderr
        printed[mode] = json.loads(result.stdout.splitlines()[-1])
        tensors[mode] = load_file(out)
    assert tensors["remote"].keys() == tensors["library"].keys()
    for name, tensor in tensors["library"].items():
        assert torch.equal(tensor, tensors["remote"][name]), name
    assert torch.equal(tensors["remote"]["AutoModel"], tensors["remote"]["AutoModelForImageTextToText"])
    assert printed["remote"] == printed["library"]
    assert printed["remote"]["model_type"] == "ct_moe"
    assert printed["remote"]["report"]["task"] == "report"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_without_the_package(python_without_package, family, test_data, tmp_path):
    scan = test_data / "totalseg" / "example_ct_sm.nii.gz"
    if family == "dinov2":
        base, tower = build_dinov2(tmp_path / "base")
        convert_base(base, tmp_path / "model", vision_tower=tower, progress=False)
    else:
        size = {"qwen2_5_vl": {"image_size": 112}, "qwen3_vl": {"image_size": 64}}.get(family, {})
        convert_base(build_family(family, tmp_path / "base"), tmp_path / "model", progress=False, **size)
    python, out = python_without_package, tmp_path / "remote.safetensors"
    result = run([python, SCRIPT, "remote", tmp_path / "model", scan, out], tmp_path)
    assert result.returncode == 0, result.stderr
    use_auto_classes.main("library", str(tmp_path / "model"), str(scan), str(tmp_path / "library.safetensors"))
    remote, library = load_file(out), load_file(tmp_path / "library.safetensors")
    assert remote.keys() == library.keys()
    for name, tensor in library.items():
        torch.testing.assert_close(tensor, remote[name], atol=1e-6, rtol=1e-5)


def test_a_folder_saved_by_its_own_code_is_whole(python_without_package, model_folder, tmp_path):
    code = (
        "import sys; from transformers import AutoModel, AutoProcessor, pipeline\n"
        "for name in ('model', 'processor'):\n"
        "    auto = AutoModel if name == 'model' else AutoProcessor\n"
        "    auto.from_pretrained(sys.argv[1], trust_remote_code=True).save_pretrained('again')\n"
        "print(type(pipeline('ct-report', model='again', trust_remote_code=True)).__name__)\n"
    )
    result = run([python_without_package, "-c", code, model_folder], tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "CTReportPipeline"


def test_inference_needs_no_training_packages(python_for_inference, model_folder, test_data, tmp_path):
    python = python_for_inference
    packages = json.loads(run([python, "-m", "pip", "list", "--format", "json"], tmp_path).stdout)
    installed = {package["name"].lower() for package in packages}
    assert not installed & {"trl", "peft", "datasets", "accelerate", "pytest", "torchvision"}
    scan = test_data / "totalseg" / "example_ct.nii.gz"
    report = run([python.parent / "ct-moe", "report", scan, "-m", model_folder, "--max-new-tokens", 5], tmp_path)
    assert report.returncode == 0, report.stderr
    assert "task report" in report.stdout


def test_demo_runs_on_a_real_scan_and_on_its_own(python_for_inference, test_data, tmp_path):
    python, demo = python_for_inference, ROOT / "examples" / "demo.py"
    for scan in (["--scan", test_data / "totalseg" / "aorta_ct_cropped.nii.gz"], []):
        out = tmp_path / f"out{len(scan)}"
        result = run([python, demo, *scan, "--out", out], tmp_path)
        assert result.returncode == 0, result.stderr
        record = json.loads((out / "report.json").read_text())
        assert 0 < record["num_slices"] <= 24
        assert len(record["answers"]) == 3
        # What a model of phantoms says about a real scan comes with a warning, about a phantom with the truth.
        assert ("mean nothing" in result.stdout.replace(record["scope"], "")) == bool(scan)
        assert (record["truth"] is None) == bool(scan)
        assert result.stdout.count("\n  truth ") == (0 if scan else 4)
        for picture in ("slices.png", "routing.png"):
            assert (out / picture).stat().st_size > 10_000


def test_demo_names_a_scan_that_is_missing(python_for_inference, tmp_path):
    result = run([python_for_inference, ROOT / "examples" / "demo.py", "--scan", "no.nii"], tmp_path)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("demo: error: no.nii: no such file")
