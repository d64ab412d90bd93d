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
"""Back again: a converted, trained or merged model becomes a base in its own format, so that nothing is locked in.

- `keep_base`: what a conversion keeps for that, in the folder `base`: the base's small files, and the tensors that its
  forward pass never reads.
- `unconvert`: a folder of CT-MoE -> the base's files, tensor by tensor.
"""

import json
import re
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ct_moe import ConversionError

from .base_model import Base, FileTensor, read_index, read_json
from .folder import new_folder
from .tensor_files import LazyTensor, read_header, write_tensors
from .tensor_mapping import TensorPlan, change_back


KEPT = "base"
# What a base needs beside its weights. Whatever else lies in its folder is not ours to keep, or to publish.
BASE_FILES = (
    r"(generation_|processor_|(video_)?preprocessor_)?config\.json|model\.safetensors\.index\.json"
    r"|chat_template\.(jinja|json)|tokenizer(_config)?\.json|tokenizer\.model|special_tokens_map\.json"
    r"|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
)
_TENSORS = "tensors.json"
_UNREAD = "unread.safetensors"
_EMBEDDINGS = "model.language_model.embed_tokens.weight"
_TOWER = "vision_tower"  # folder of a tower with files of its own


@dataclass(frozen=True)
class UnconversionReport:
    """What became of a converted folder.

    Attributes:
        tensors: of the base that were taken from it.
        unread: of the base that its forward pass never reads, as they were.
        left: parameters that only CT-MoE has: they stay behind.
        recast: whether numbers were cast, because the conversion changed their dtype.
    """

    tensors: int
    unread: int
    left: list[str]
    recast: bool

    def __str__(self) -> str:
        lines = [
            f"  {self.tensors} tensors as they are now, {self.unread} that the base never reads as they were",
            f"  {len(self.left)} parameters have no place in the base and stay behind: experts, routers and the like",
        ]
        if self.recast:
            lines.append("  cast back to the base's dtype: the conversion had changed it")
        return "\n".join(lines)


def keep_base(source: Base, tensors: dict[str, FileTensor], plan: TensorPlan, folder: Path) -> None:
    """Write `base` into the folder of a conversion."""
    kept = folder / KEPT
    files: dict[str, dict[str, dict[str, Any]]] = {}
    unread = {}
    for place, root in _roots(source).items():
        (kept / place).mkdir(parents=True, exist_ok=True)
        for path in sorted(root.iterdir()):
            if re.fullmatch(BASE_FILES, path.name) and path.is_file():
                shutil.copyfile(path, kept / place / path.name)
    for key, tensor in tensors.items():
        entry: dict[str, Any] = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        if key in plan.reused:
            entry |= {"target": plan.reused[key], "change": plan.changes.get(key, "")}
        elif plan.unread[key].startswith("tied"):
            entry |= {"target": _EMBEDDINGS, "change": ""}
        else:
            unread[key] = LazyTensor(tensor.shape, tensor.dtype, tensor.read)
            entry["kept"] = key
        files.setdefault(_place(source, tensor), {})[tensor.name] = entry
    if unread:
        write_tensors(kept / _UNREAD, unread)
    paths = {_place(source, tensor): tensor.file for tensor in tensors.values()}
    metadata = {name: read_header(path)[1] for name, path in paths.items()}
    content = {"base": source.name, "metadata": metadata, "files": files}
    (kept / _TENSORS).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def copy_kept(start: str | Path, folder: Path) -> None:
    """Hand `base` on from one folder to the next, such as from a stage of training to its result."""
    if (Path(start) / KEPT).is_dir():
        shutil.copytree(Path(start) / KEPT, folder / KEPT)


def unconvert(folder: str | Path, out: str | Path, base: str | Path | None = None) -> UnconversionReport:
    """Write the base's own files with the parameters of a CT-MoE model.

    Args:
        folder: a converted, trained or merged model.
        out: new folder.
        base: folder with a conversion of the same base, where `folder` does not hold its own `base`.

    Raises:
        ConversionError: `folder` does not come from a conversion that can be undone, or a tensor is missing or of
            another shape.
        ModelError: `out` holds something.
    """
    folder, kept = Path(folder), Path(base or folder) / KEPT
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ConversionError(folder, "holds an adapter only", "Merge it first: merge_adapter: true in the recipe")
    if not (kept / _TENSORS).is_file():
        raise ConversionError(
            folder,
            f"holds no {KEPT}/{_TENSORS}, which conversions keep since version 0.1",
            "Convert the base again and pass that folder as base: ct-moe unconvert DIR OUT --base CONVERTED",
        )
    now = read_index(folder)
    unread = read_index(kept, _UNREAD) if (kept / _UNREAD).is_file() else {}
    content = read_json(kept / _TENSORS)
    used, counts, recast = set(), {"target": 0, "kept": 0}, False
    with new_folder(out) as target:
        shutil.copytree(kept, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(_TENSORS, _UNREAD))
        for name, entries in content["files"].items():
            weights = {}
            for key, entry in entries.items():
                where = "target" if "target" in entry else "kept"
                found = (now if where == "target" else unread).get(entry[where])
                shape, dtype = tuple(entry["shape"]), getattr(torch, entry["dtype"])
                _check(entry[where], found, shape, entry.get("change", ""), folder)
                counts[where] += 1
                used.add(entry[where])
                recast |= found.dtype != dtype
                read = partial(_read_back, found, entry.get("change", ""), shape, dtype)
                weights[key] = LazyTensor(shape, dtype, read)
            write_tensors(target / name, weights, content["metadata"][name])
    return UnconversionReport(counts["target"], counts["kept"], sorted(set(now) - used), recast)


def _roots(source: Base) -> dict[str, Path]:
    if source.tower_folder is None:
        return {".": source.folder}
    return {"language_model": source.folder, _TOWER: source.tower_folder}


def _place(source: Base, tensor: FileTensor) -> str:
    """Name of its file, with the folder where there are several."""
    place = next(place for place, root in _roots(source).items() if tensor.file.parent == root)
    return f"{place}/{tensor.file.name}".removeprefix("./")


def _check(name: str, found: FileTensor | None, shape: tuple[int, ...], how: str, folder: Path) -> None:
    if found is None:
        raise ConversionError(name, f"is in none of the files of {folder.name}", "Name a whole model of this base")
    expected = torch.Size(shape).numel()
    if found.count.parameters != expected or (how == "transpose" and found.shape != shape[::-1]):
        raise ConversionError(
            name, f"has the shape {list(found.shape)}, not that of the base", "Name a model of this base"
        )


def _read_back(tensor: FileTensor, how: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return change_back(tensor.read(), how, shape).to(dtype)
