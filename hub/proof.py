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
"""Proof that a folder works for those who have only the folder: `prove_folder`."""

import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx
from safetensors.torch import load_file

from ct_moe import CTReportPipeline
from ct_moe.errors_ct_moe import CTMoEError, PublishError
from ct_moe.trainers.phantoms.chest import write_phantom

from . import clean_process
from .folder import load_folder


LIMIT = 1e-5  # largest difference of two logits: the same code on the same machine should give the same bits
_SCAN_SHAPE = (24, 64, 64)  # slices, rows, columns of the phantom that is run


@dataclass(frozen=True)
class Proof:
    """What was run and how it agreed.

    Attributes:
        max_abs_difference: of the logits of the folder's own code, in a process without this package, and of this
            package's code.
        num_logits: so many were compared.
        dtype: that the model ran in.
    """

    max_abs_difference: float
    num_logits: int
    dtype: str

    def __str__(self) -> str:
        return (
            "loaded offline in a process without this package by AutoModelForImageTextToText, AutoProcessor and "
            f"pipeline; one phantom; largest difference of {self.num_logits:,} logits to this package's own: "
            f"{self.max_abs_difference:.2g} ({self.dtype}, limit {LIMIT:g})"
        )


def prove_folder(
    folder: str | Path, *, base: str | None = None, base_revision: str | None = None, name: str | Path | None = None
) -> Proof:
    """Run one phantom through a folder twice: with this package, and without it as the folder's users will.

    Args:
        folder: a model folder, or with `base` one of an adapter.
        base, base_revision: Hub id and commit of the model that an adapter belongs to; it must be in the cache or
            within reach.
        name: of the folder in errors.

    Raises:
        PublishError: the folder does not load on its own, or computes something else than it does here.
    """
    folder, name = Path(folder).absolute(), str(name or folder)
    base_folder = None if base is None else _base_folder(base, base_revision)
    with tempfile.TemporaryDirectory(prefix="ct-moe-proof-") as temporary:
        scan = str(write_phantom(Path(temporary) / "phantom.nii", shape=_SCAN_SHAPE))
        wanted, wanted_texts, dtype = _with_this_package(folder, name, scan, base_folder)
        found, texts = _without_this_package(folder, name, scan, Path(temporary), base_folder)
    if not torch.equal(wanted["input_ids"], found["input_ids"]):
        raise PublishError(name, "its own processor makes another prompt than this package's", _AGAIN)
    difference = float((wanted["logits"] - found["logits"]).abs().max())
    if not difference <= LIMIT:  # also where it is no number
        finding = f"its own code gives other logits than this package's: by {difference:.2g}, over {LIMIT:g}"
        raise PublishError(name, finding, _AGAIN)
    if texts != wanted_texts:
        raise PublishError(name, "its own pipeline writes another text than this package's", _AGAIN)
    return Proof(difference, wanted["logits"].numel(), dtype)


_AGAIN = "Save the folder again with this version: ct_moe.hub.folder.save_folder"


def _base_folder(base: str, revision: str | None) -> str:
    """All of the base, its code too, which this package would not need."""
    try:
        return snapshot_download(base, revision=revision)
    except (OSError, HfHubHTTPError, httpx.HTTPError) as error:
        finding = f"cannot be downloaded at {revision} ({type(error).__name__})"
        raise PublishError(base, finding, "Check --base and --base-revision, and the network") from error


def _with_this_package(folder: Path, name: str, scan: str, base_folder: str | None) -> tuple[dict, dict, str]:
    try:
        network, processor, _ = load_folder(base_folder or str(folder))
        if base_folder:
            network = _load_adapter(network, folder, name)
        tensors = clean_process.outputs(network.eval(), processor, scan)
        reporter = CTReportPipeline(model=network, processor=processor, task="ct-report", device=torch.device("cpu"))
        texts = clean_process.say(reporter, scan)
    except CTMoEError as error:
        subject = name if error.subject == str(folder) else error.subject
        raise PublishError(subject, error.finding, error.remedy) from error
    dtype = str(network.dtype).removeprefix("torch.")
    del network, reporter  # the other process needs the memory
    gc.collect()
    return tensors, texts, dtype


def _load_adapter(network, folder: Path, name: str):
    try:
        from peft import PeftModel
    except ModuleNotFoundError as error:
        raise PublishError("peft", "is not installed", 'Run: pip install "ct-moe[train]"') from error
    try:
        return PeftModel.from_pretrained(network, str(folder)).merge_and_unload()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        finding = f"does not fit its base ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        raise PublishError(name, finding, "Name the model that it was trained on as --base") from error


def _without_this_package(
    folder: Path, name: str, scan: str, temporary: Path, base_folder: str | None
) -> tuple[dict, dict]:
    out = temporary / "outputs.safetensors"
    # Nothing that happens to be cached here may help.
    caches = {"HF_HOME": str(temporary / "hf"), "HF_MODULES_CACHE": str(temporary / "modules")}
    offline = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = {variable: value for variable, value in os.environ.items() if variable != "HF_HUB_CACHE"}
    # -I: neither PYTHONPATH nor the working directory nor the user's own packages.
    command = [sys.executable, "-I", clean_process.__file__, str(folder), scan, str(out)]
    command += [base_folder] if base_folder else []
    environment |= {**caches, **offline}
    result = subprocess.run(command, cwd=temporary, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.strip()] or [f"exit code {result.returncode}"]
        finding = f"does not load and run on its own ({lines[-1][:300]})"
        raise PublishError(name, finding, _AGAIN)
    return load_file(out), json.loads(result.stdout.splitlines()[-1])
