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
"""The folder or Hub repository of a base: is it one that can be converted, and which tensors are in its files.

- `open_base`: a folder or Hub id -> `Base`, refused by name if it is of an unsupported kind.
- `open_source`: the same for whatever a config reader accepts.
- `read_index`: every tensor of its safetensors files, none of them read.
- `read_image_settings`, `read_chat_template`: what its processor would add to its tokenizer.
"""

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import torch
from huggingface_hub.errors import (
    HFValidationError,
    NotASafetensorsRepoError,
    SafetensorsParsingError,
    StrictDataclassError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.activations import ACT2FN

from ct_moe import ConversionError

from .families import FAMILIES, TOWERS, Family
from .families.dinov2 import DINOV2, combine, place_image_token
from .tensor_files import DTYPES, read_header, read_tensor


class Base(NamedTuple):
    """A base of a supported kind. `commit` is None for a folder."""

    name: str
    commit: str | None
    folder: Path
    config: PreTrainedConfig
    tower_folder: Path | None = None  # of a vision tower with files of its own

    @property
    def family(self) -> Family:
        return FAMILIES[self.config.model_type]


@dataclass(frozen=True)
class TensorCount:
    """How many tensors, how many numbers in them, how many bytes on disk."""

    tensors: int = 0
    parameters: int = 0
    bytes: int = 0

    def __add__(self, other: "TensorCount") -> "TensorCount":
        return TensorCount(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __str__(self) -> str:
        return f"{self.tensors:>5} tensors  {self.parameters:>14,} parameters  {_size(self.bytes):>9}"


class FileTensor(NamedTuple):
    """A tensor of the base's files, not read yet, its name and its first and last byte there."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    count: TensorCount
    place: tuple[int, int]

    def read(self) -> torch.Tensor:
        return read_tensor(self.file, self.place, self.shape, self.dtype)


def open_base(
    base: str | Path,
    revision: str | None,
    vision_tower: str | Path | None = None,
    vision_tower_revision: str | None = None,
    weights: bool = True,
) -> Base:
    """Find a base, or download it: the tokenizer as well. With a vision tower, `base` is a causal language model.

    Without `weights` those of a Hub repository stay there.
    """
    patterns = ["*.json", "*.jinja", "tokenizer.model"]
    if vision_tower is None:
        return Base(*open_source(base, revision, _read_config, patterns, weights))
    text_config, tower_config = (partial(_read_part, kinds) for kinds in (DINOV2.text_types, DINOV2.towers))
    name, commit, folder, text = open_source(base, revision, text_config, patterns, weights)
    tower_name, _, tower_folder, tower = open_source(
        vision_tower, vision_tower_revision, tower_config, ["*.json"], weights
    )
    image_token_id = place_image_token(load_tokenizer(name, folder), text.vocab_size, name)
    config = combine(tower, text, image_token_id)
    _check_tower(tower_name, config)
    return Base(f"{name} with {tower_name}", commit, folder, config, tower_folder)


def load_tokenizer(name: str, folder: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # bare ones from the tokenizers package, KeyErrors from the library
        raise ConversionError(
            name, f"no tokenizer that loads: {one_line(error)}", "Add the base's tokenizer.json"
        ) from error


def read_tensors(source: Base) -> dict[str, FileTensor]:
    """Those of the base by name; of a vision tower with files of its own with `vision_tower.` before theirs."""
    tensors = _read_tensors(source.folder)
    if source.tower_folder is not None:
        tensors |= {f"vision_tower.{name}": tensor for name, tensor in _read_tensors(source.tower_folder).items()}
    return tensors


def _read_tensors(folder: Path) -> dict[str, FileTensor]:
    """Of a snapshot without weights, from the headers of the files on the Hub."""
    snapshot = folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--")
    if not snapshot or any(folder.glob("*.safetensors")):
        return read_index(folder)
    repo_id = folder.parents[1].name.removeprefix("models--").replace("--", "/")
    try:
        metadata = huggingface_hub.get_safetensors_metadata(repo_id, revision=folder.name)
    except (OSError, ValueError, SafetensorsParsingError, NotASafetensorsRepoError) as error:
        raise ConversionError(repo_id, one_line(error), "Check the network, or download the weights first") from error
    tensors = {}
    for file, content in metadata.files_metadata.items():
        for name, info in content.tensors.items():
            dtype = DTYPES.get(info.dtype)
            if dtype is None:
                raise ConversionError(name, f"{info.dtype} numbers in {file}", "Name an unquantised model")
            count = TensorCount(1, info.parameter_count, info.data_offsets[1] - info.data_offsets[0])
            shape = tuple(info.shape)
            tensors[name] = FileTensor(folder / file, name, shape, dtype, count, tuple(info.data_offsets))
    return tensors


def open_source(
    source: str | Path,
    revision: str | None,
    read_config: Callable[[str | Path, Path], Any],
    patterns: list[str],
    weights: bool = True,
) -> tuple[str, str | None, Path, Any]:
    """Find a folder, or download a Hub repository: its weights last, once its config is known to be supported.

    Args:
        source: folder or Hub id.
        revision: branch, tag or commit of a Hub repository.
        read_config: gives the config of `source` in a folder, or raises.
        patterns: what to download beside the weights.
        weights: whether to download these.

    Returns:
        Name, commit (None for a folder), folder and config.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise ConversionError(source, f"a folder has no revision {revision!r}", "Leave out the revision")
        folder = Path(source)
        return folder.resolve().name, None, folder, read_config(source, folder)

    try:
        validate_repo_id(str(source))
    except HFValidationError as error:
        raise ConversionError(source, "no such folder, and not a Hub id either", "Check the path") from error
    folder = _download(source, revision, patterns)
    config = read_config(source, folder)
    commit = folder.name  # a snapshot's folder is named by its commit
    if weights:
        folder = _download(source, commit, [*patterns, "model*.safetensors"])
    return str(source), commit, folder, config


def read_index(folder: Path, name: str = "model.safetensors") -> dict[str, FileTensor]:
    """Every tensor of a folder's safetensors files by its name, without reading one."""
    index = folder / f"{name}.index.json"
    if (folder / name).is_file():
        files, listed = [folder / name], None
    elif index.is_file():
        listed = _part(index, read_json(index), "weight_map")
        files = [folder / name for name in sorted(set(map(str, listed.values())))]
    else:
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        raise ConversionError(
            folder,
            f"no model.safetensors and no model.safetensors.index.json{', but ' * bool(pickled)}{', '.join(pickled)}",
            "Only safetensors are read: save other weights again if you trust them, with transformers or with "
            'safetensors.torch.save_file(torch.load("FILE.bin", weights_only=True), "model.safetensors")',
        )

    tensors = {}
    for file in files:
        if not file.is_file():
            raise ConversionError(file, f"listed in {index.name} and missing", "Download the weights again")
        try:
            with safe_open(file, "pt") as weights:
                places, _ = read_header(file)
                for key in weights.keys():
                    part = weights.get_slice(key)
                    shape, dtype = tuple(part.get_shape()), DTYPES.get(part.get_dtype())
                    if dtype is None:
                        raise ConversionError(
                            key, f"{part.get_dtype()} numbers in {file.name}", "Name an unquantised model"
                        )
                    count = TensorCount(1, torch.Size(shape).numel(), places[key][1] - places[key][0])
                    tensors[key] = FileTensor(file, key, shape, dtype, count, places[key])
        except SafetensorError as error:
            raise ConversionError(
                file, f"not a safetensors file: {one_line(error)}", "Download the weights again"
            ) from error
    for key in [] if listed is None else sorted(listed.keys() ^ tensors.keys()):
        where = index.name if key in listed else "the files"
        raise ConversionError(key, f"named only in {where} of {folder.name}", "Download the weights again")
    return tensors


def read_image_settings(source: Base) -> dict[str, Any]:
    """The base's image processor config, from whichever of its two places it has."""
    folder = source.tower_folder or source.folder
    for path in (folder / "preprocessor_config.json", folder / "processor_config.json"):
        settings = read_json(path) if path.is_file() else {}
        settings = _part(path, settings, "image_processor") or settings
        if "image_mean" in settings and "image_std" in settings:
            return settings
    raise ConversionError(
        source.name,
        "neither preprocessor_config.json nor processor_config.json gives image_mean and image_std",
        "Add the base's preprocessor_config.json: pixel values would have the wrong scale without it",
    )


def read_chat_template(source: Base) -> str | None:
    """The chat template of an older processor, which the tokenizer does not load; newer ones write a .jinja file."""
    path = source.folder / "chat_template.json"
    if path.is_file() and not (source.folder / "chat_template.jinja").is_file():
        return read_json(path).get("chat_template")
    return None


def read_config_json(source: str | Path, folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        found = "adapter weights only" if (folder / "adapter_config.json").is_file() else "no config.json"
        raise ConversionError(source, f"has {found}", "Name the folder of a whole model in the library's format")
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(path, f"not JSON: {error}", "Download it again") from error
    if not isinstance(content, dict):
        raise ConversionError(path, "not a JSON object", "Download it again")
    return content


def one_line(error: Exception) -> str:
    """What another package says, as the finding of an error of this one."""
    return " ".join(str(error).split())[:300].rstrip(".")


def _download(repo_id: str | Path, revision: str | None, patterns: list[str]) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(str(repo_id), revision=revision, allow_patterns=patterns))
    except OSError as error:  # no network, no such repository or revision, no access: all of them, in this library
        raise ConversionError(
            repo_id,
            f"no folder of that name, and the Hub did not give it: {one_line(error)}",
            "Check the name, the revision and your access, or download it first and name the folder",
        ) from error


def _read_config(base: str | Path, folder: Path) -> PreTrainedConfig:
    path, raw = folder / "config.json", read_config_json(base, folder)
    # Looked up before the library reads them: it knows no more than the name of a model type it does not have.
    kind = raw.get("model_type")
    family = FAMILIES.get(kind)
    if family is None:
        near = [FAMILIES[name].name for name in difflib.get_close_matches(str(kind), FAMILIES, 1, 0.4)]
        raise ConversionError(
            base,
            f"model_type {kind!r} is not supported",
            "".join(f"The nearest that is: {name}. " for name in near)
            + f"Supported: {'; '.join(family.name for family in FAMILIES.values())}",
        )
    supported = f"Supported of {family.name}: {' or '.join(family.towers)} with {' or '.join(family.text_types)}"
    parts = {
        "vision tower": ("vision_config", family.towers),
        "language model": ("text_config", family.text_types),
    }
    found = {name: _part(path, raw, part).get("model_type") for name, (part, _) in parts.items()}
    refused = [(name, found[name]) for name, (_, known) in parts.items() if found[name] not in (None, *known)]
    for name, value in [*refused, *family.refuse(raw)]:
        shown = repr(value) if isinstance(value, str) else value
        raise ConversionError(base, f"{name} {shown} is not supported", supported)
    if "quantization_config" in raw:
        raise ConversionError(base, "quantised weights are not supported", "Name the unquantised model")
    try:
        config = family.read_config(folder, raw)
    except ConversionError:
        raise
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise ConversionError(path, f"not a {kind} config: {one_line(error)}", "Download the base again") from error
    _check_tower(base, config)
    texts = config.text_config
    acts = [getattr(part, "hidden_act", None) for part in (config.vision_config, texts)]
    for act in [getattr(config, "projector_hidden_act", None), *acts]:
        if act is not None and act not in ACT2FN:
            raise ConversionError(path, f"unknown activation {act!r}", "Download the base again")
    if not 0 <= config.image_token_id < texts.vocab_size:
        raise ConversionError(
            path,
            f"image_token_index {config.image_token_id} is outside of the vocabulary of {texts.vocab_size}",
            "Name a base whose embeddings include its image token",
        )
    return config


def _read_part(kinds: tuple[str, ...], source: str | Path, folder: Path) -> PreTrainedConfig:
    """The config of a language model or of a vision tower alone."""
    raw = read_config_json(source, folder)
    if raw.get("model_type") not in kinds:
        raise ConversionError(
            source, f"model_type {raw.get('model_type')!r} is not supported here", f"Supported: {', '.join(kinds)}"
        )
    try:
        return AutoConfig.from_pretrained(folder)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise ConversionError(folder / "config.json", one_line(error), "Download it again") from error


def _check_tower(name: str | Path, config: PreTrainedConfig) -> None:
    kind = config.vision_config.model_type
    finding = TOWERS[kind].refuse(config.vision_config)
    if finding is not None:
        raise ConversionError(name, f"a vision tower with {finding} is not supported", f"Name another {kind}")


def _part(path: Path, content: dict[str, Any], name: str) -> dict[str, Any]:
    """A section of a JSON file, empty if it is not there."""
    section = content.get(name, {})
    if not isinstance(section, dict):
        raise ConversionError(path, f"{name} is not a JSON object", "Download the base again")
    return section


def _size(number: float) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"
