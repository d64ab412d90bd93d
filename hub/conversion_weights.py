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
"""The weights of a conversion, from the base's files to new ones with one tensor in memory at a time.

- `lazy_weights`: every tensor of the converted model, read, turned and cast when its turn comes.
- `write_shards`: them in safetensors files of at most 5 GB; those that an interrupted run finished are kept.
- `conversion_folder`: where that happens, so that a killed run goes on.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ct_moe import CTMoEConfig, CTMoEForConditionalGeneration, ModelError

from .base_model import FileTensor
from .folder import make_parents, publish_folder, remove_folder
from .tensor_files import LazyTensor, file_hash, write_tensors
from .tensor_mapping import TensorPlan, change, changed_shape


SHARD_BYTES = 5_000_000_000
_JOURNAL = "converting.json"
_SEED = 0  # of the added parameters: converting twice gives identical files


def lazy_weights(
    plan: TensorPlan,
    tensors: dict[str, FileTensor],
    config: CTMoEConfig,
    dtype: torch.dtype,
    filled: dict[str, torch.Tensor],
) -> dict[str, LazyTensor]:
    """By name in CT-MoE, in the order of the base's files; then those `filled` otherwise, and the added ones."""
    weights = {}
    for key in sorted(plan.reused, key=lambda key: (tensors[key].file, tensors[key].place)):
        tensor, how = tensors[key], plan.changes.get(key, "")
        shape = changed_shape(tensor.shape, how)
        weights[plan.reused[key]] = LazyTensor(shape, dtype, partial(_read, tensor, how, dtype))
    added = added_parameters(config, {name for names in plan.added.values() for name in names})
    for name, value in [*filled.items(), *added.items()]:
        weights[name] = LazyTensor(tuple(value.shape), dtype, partial(value.to, dtype))
    return weights


@torch.no_grad()
def added_parameters(config: CTMoEConfig, names: set[str]) -> dict[str, torch.Tensor]:
    """What a base does not have, as the model initialises it. The rest of the model takes no memory."""
    with torch.device("meta"):
        model = CTMoEForConditionalGeneration(config)
    owners = [(name, module) for name, module in model.named_modules() if isinstance(module, PreTrainedModel)]
    added = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        for prefix, module in model.named_modules():
            own = {name: f"{prefix}.{name}".removeprefix(".") for name in module._parameters}
            wanted = {name: full for name, full in own.items() if full in names}
            if not wanted:
                continue
            module.to_empty(device="cpu", recurse=False)
            # By the model it is part of, whose config has the scale.
            *_, owner = [part for name, part in owners if not name or f"{prefix}.".startswith(f"{name}.")]
            owner._init_weights(module)
            added |= {full: getattr(module, name).detach() for name, full in wanted.items()}
    return added


def write_shards(
    folder: Path, weights: dict[str, LazyTensor], key: dict[str, Any], say: Callable[[str], None]
) -> dict[str, str]:
    """Write the weights as the library shards them; returns the SHA-256 of every file.

    Args:
        folder: of `conversion_folder`.
        weights: as `lazy_weights` makes them.
        key: all that they depend on. Files of an earlier run with another key are written anew.
        say: is told which file is being written.
    """
    journal = folder / _JOURNAL
    done = _finished(journal, key)
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in weights.items():
        if size and size + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    files = {}
    for number, names in enumerate(shards, 1):
        many = len(shards) > 1
        file = folder / (f"model-{number:05}-of-{len(shards):05}.safetensors" if many else "model.safetensors")
        files |= dict.fromkeys(names, file.name)
        if file.name in done and file.is_file() and file_hash(file) == done[file.name]:
            continue
        say(f"writing {file.name}" + (f" of {len(shards)}" if many else ""))
        done[file.name] = write_tensors(file, {name: weights[name] for name in names})
        part = journal.with_suffix(".part")
        part.write_text(json.dumps({"key": key, "files": done}), encoding="utf-8")
        os.replace(part, journal)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in weights.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    journal.unlink()
    return done


@contextmanager
def conversion_folder(out: str | Path) -> Iterator[Path]:
    """Yield a folder beside `out` that becomes `out` at the end; an error removes it, a killed run leaves it.

    Raises:
        ModelError: `out` is a file or a folder that holds something, before anything is written.
    """
    out = Path(out).absolute()
    folder = out.with_name(f".{out.name}-converting")
    parents = make_parents(out)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ModelError(out, f"cannot be created: {error.strerror}", "Name a folder you may write to") from error
    try:
        yield folder
        publish_folder(folder, out)
    except Exception:
        remove_folder(folder, parents)
        raise


def _finished(journal: Path, key: dict[str, Any]) -> dict[str, str]:
    """The files of an interrupted run that is this one; of another run nothing stays."""
    if journal.is_file():
        content = json.loads(journal.read_text(encoding="utf-8"))
        if content["key"] == json.loads(json.dumps(key)):
            return content["files"]
    for path in journal.parent.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return {}


def _read(tensor: FileTensor, how: str, dtype: torch.dtype) -> torch.Tensor:
    return change(tensor.read().to(dtype), how)
