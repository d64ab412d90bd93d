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
"""Large bases: shard by shard, killed and resumed, planned without a tensor, and back again."""

import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_endpoint import HubEndpoint
from safetensors.torch import load_file, save_file
from tiny_families import build_family

from ct_moe import ConversionError, ModelError
from ct_moe.hub import conversion_weights
from ct_moe.hub.conversion import convert_base, plan_conversion
from ct_moe.hub.tensor_files import LazyTensor, file_hash, read_header, read_tensor, write_tensors
from ct_moe.hub.tiny_base import build_tiny_base
from ct_moe.hub.unconversion import unconvert


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A base and its conversion: not to be changed."""
    folder = tmp_path_factory.mktemp("large")
    base = build_tiny_base(folder / "base")
    convert_base(base, folder / "converted", parity=False, progress=False)
    return base, folder / "converted"


def test_a_file_is_what_the_library_would_write(tmp_path):
    tensors = {
        "b.x": torch.randn(3, 5),
        "a": torch.randn(7).bfloat16(),
        "c": torch.arange(4),
        "d": torch.randn(2, 2).half(),
        "e": torch.zeros(0, 3),
        "s": torch.tensor(2.0),
    }
    save_file(tensors, tmp_path / "library", metadata={"format": "pt"})
    lazy = {name: LazyTensor(tuple(value.shape), value.dtype, lambda v=value: v) for name, value in tensors.items()}
    digest = write_tensors(tmp_path / "own", lazy)
    assert (tmp_path / "own").read_bytes() == (tmp_path / "library").read_bytes()
    assert digest == file_hash(tmp_path / "library")
    places, metadata = read_header(tmp_path / "library")
    assert metadata == {"format": "pt"}
    for name, value in tensors.items():
        read = read_tensor(tmp_path / "library", places[name], tuple(value.shape), value.dtype)
        assert torch.equal(read, value)


def test_shards_hold_what_one_file_holds(converted, tmp_path, monkeypatch):
    base, one = converted
    monkeypatch.setattr(conversion_weights, "SHARD_BYTES", 500_000)
    convert_base(base, tmp_path / "out", progress=False)  # parity: the library reads them
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("out/*.safetensors"))
    assert len(files) > 3
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected = load_file(one / "model.safetensors")
    assert tensors.keys() == expected.keys() == index["weight_map"].keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    unconvert(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


_KILLED = """
import os, signal, sys
from ct_moe.hub import conversion_weights
from ct_moe.hub.conversion import convert_base
conversion_weights.SHARD_BYTES = 500_000
write, written = conversion_weights.write_tensors, []
def killed(path, tensors):
    if len(written) == 2:
        path.write_bytes(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(path.name)
    return write(path, tensors)
conversion_weights.write_tensors = killed
convert_base(sys.argv[1], sys.argv[2], parity=False, progress=False)
"""


def test_a_killed_conversion_goes_on_and_ends_the_same(converted, tmp_path, monkeypatch):
    base, _ = converted
    out = tmp_path / "out"
    run = subprocess.run([sys.executable, "-c", _KILLED, base, out], capture_output=True, check=False)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert not out.exists()
    left = tmp_path / ".out-converting"
    finished = {path.name: path.stat().st_mtime_ns for path in left.glob("*.safetensors")}
    assert len(finished) == 3  # two whole ones and half a file
    monkeypatch.setattr(conversion_weights, "SHARD_BYTES", 500_000)
    convert_base(base, out, parity=False, progress=False)
    kept = [name for name, when in finished.items() if (out / name).stat().st_mtime_ns == when]
    assert len(kept) == 2
    convert_base(base, tmp_path / "straight", parity=False, progress=False)
    for path in (tmp_path / "straight").iterdir():
        if path.is_file():
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    assert not left.exists()


def test_files_of_another_run_are_not_taken(converted, tmp_path, monkeypatch):
    base, _ = converted
    out = tmp_path / "out"
    subprocess.run([sys.executable, "-c", _KILLED, base, out], capture_output=True, check=False)
    monkeypatch.setattr(conversion_weights, "SHARD_BYTES", 500_000)
    convert_base(base, out, parity=False, progress=False, dtype="bfloat16")
    convert_base(base, tmp_path / "straight", parity=False, progress=False, dtype="bfloat16")
    for path in (tmp_path / "straight").glob("*.safetensors"):
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_the_plan_is_that_of_the_conversion_and_writes_nothing(converted, tmp_path):
    base, folder = converted
    before = sorted(tmp_path.rglob("*"))
    plan = plan_conversion(base, progress=False)
    done = json.loads((folder / "conversion_report.json").read_text())
    planned = json.loads(plan.to_json())
    for name in done:
        if name not in ("files", "parity"):
            assert planned[name] == done[name], name
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(ConversionError, match="no_such"):
        plan_conversion(base, progress=False, no_such=1)


def test_unconverting_what_was_cast_says_so(converted, tmp_path):
    base, _ = converted
    report = convert_base(base, tmp_path / "half", parity=False, progress=False, dtype="bfloat16")
    assert unconvert(tmp_path / "half", tmp_path / "back").recast
    theirs, back = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "back"))
    for name, tensor in theirs.items():
        kept = tensor if name in report.unread_names else tensor.bfloat16().to(tensor.dtype)
        assert torch.equal(back[name], kept), name


def test_a_folder_without_the_base_s_files_needs_one_that_has_them(converted, tmp_path):
    _, folder = converted
    bare = shutil.copytree(folder, tmp_path / "bare")
    shutil.rmtree(bare / "base")
    with pytest.raises(ConversionError, match="--base CONVERTED"):
        unconvert(bare, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    unconvert(bare, tmp_path / "out", base=folder)
    with pytest.raises(ModelError, match="not an empty folder"):
        unconvert(folder, tmp_path / "out")


def test_a_model_of_another_base_is_refused(converted, tmp_path):
    _, folder = converted
    other = build_tiny_base(tmp_path / "base", text={"hidden_size": 64, "intermediate_size": 128})
    convert_base(other, tmp_path / "other", parity=False, progress=False)
    with pytest.raises(ConversionError, match="not that of the base"):
        unconvert(tmp_path / "other", tmp_path / "out", base=folder)
    internvl = build_family("internvl", tmp_path / "internvl")
    convert_base(internvl, tmp_path / "third", parity=False, progress=False)
    with pytest.raises(ConversionError, match="in none of the files"):
        unconvert(tmp_path / "third", tmp_path / "out", base=folder)
    assert not (tmp_path / "out").exists()


# Not ru_maxrss: a process starts with that of the one which made it.
_MEASURED = """
import sys
from pathlib import Path
from ct_moe.hub.conversion import convert_base
convert_base(sys.argv[1], sys.argv[2], parity=False, progress=False)
print(*(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""


@pytest.mark.slow
def test_eight_gigabytes_convert_within_three(tmp_path):
    """Four files of 2 GB; what the imports take counts as well."""
    base = tmp_path / "base"
    _write_large_base(base)
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    assert size > 8e9
    run = subprocess.run(
        [sys.executable, "-c", _MEASURED, base, tmp_path / "out"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    peak = int(run.stdout.split()[-2]) * 1024
    print(f"{size / 1e9:.2f} GB with a peak of {peak / 1e9:.2f} GB")
    assert peak < 3e9
    assert sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) > 8e9


def _write_large_base(folder: Path) -> None:
    """A LLaVA with a language model of 4 billion parameters in bfloat16, all 0: files of holes take no disk."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    small = build_tiny_base(folder.with_name("small"), text_model="llama", dtype=torch.bfloat16)
    config = LlavaConfig.from_pretrained(small)
    wide = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 20}
    config.text_config.update({**wide, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128})
    shutil.copytree(small, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {
            name: tuple(value.shape) for name, value in LlavaForConditionalGeneration(config).state_dict().items()
        }
    names = {name: _file_name(name) for name in shapes}
    order = sorted(shapes)
    parts = [order[start::4] for start in range(4)]
    index = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05}-of-00004.safetensors"
        header, size = {"__metadata__": {"format": "pt"}}, 0
        for name in part:
            stop = size + 2 * math.prod(shapes[name])
            header[names[name]] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [size, stop]}
            index[names[name]], size = file, stop
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        with (folder / file).open("wb") as written:
            written.write(struct.pack("<Q", len(encoded)) + encoded)
            written.truncate(8 + len(encoded) + size)
    content = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def _file_name(name: str) -> str:
    """As the library writes it."""
    if name.startswith("model.language_model."):
        return "language_model.model." + name.removeprefix("model.language_model.")
    return {"lm_head.weight": "language_model.lm_head.weight"}.get(name, name.removeprefix("model."))


@pytest.mark.slow
def test_a_base_of_the_hub_is_planned_without_its_weights_and_a_damaged_download_is_found(converted, tmp_path):
    base, folder = converted
    with HubEndpoint() as hub:
        environment = {**os.environ, **hub.environment(tmp_path)}
        command = [Path(sys.executable).with_name("ct-moe"), "convert", "lab/base", tmp_path / "out"]

        def run(*options):
            return subprocess.run([*command, *options], env=environment, capture_output=True, text=True, check=False)

        upload = "import sys; from huggingface_hub import HfApi; api = HfApi(); api.create_repo('lab/base')\n"
        upload += "api.upload_folder(repo_id='lab/base', folder_path=sys.argv[1])"
        subprocess.run([sys.executable, "-c", upload, base], env=environment, check=True, capture_output=True)

        planned = run("--dry-run")
        assert planned.returncode == 0, planned.stderr
        assert "Nothing was written" in planned.stdout
        expected = str(plan_conversion(base, progress=False)).splitlines()[1:]
        assert expected == planned.stdout.splitlines()[1 : len(expected) + 1]
        assert not list(tmp_path.rglob("model.safetensors"))
        assert not (tmp_path / "out").exists()

        done = run("--no-parity")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "out/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
        report = json.loads((tmp_path / "out/conversion_report.json").read_text())
        assert report["revision"] == hub.repositories["lab/base"].branches["main"]

        shutil.rmtree(tmp_path / "out")
        weights = next(path for path in tmp_path.rglob("model.safetensors") if "snapshots" in path.parts)
        with weights.resolve().open("r+b") as file:
            file.seek(-3, os.SEEK_END)
            file.write(b"\0\1\2")
        damaged = run("--no-parity")
        assert damaged.returncode == 1
        assert "is not the file that the Hub has" in damaged.stderr
        assert not (tmp_path / "out").exists()
