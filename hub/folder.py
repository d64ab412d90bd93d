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
"""Model folders: all that AutoModel, AutoProcessor and the pipeline need, written whole or not at all.

- `check_model`: is there a CT-MoE model in a folder or Hub repository?
- `load_folder`: the model and its processor.
- `save_folder`: a model and its processor -> a complete folder.
- `write_folder`: the same into a folder that exists, for callers that add files of their own.
- `write_settings`: all of it but the weights.
- `new_folder`: a folder that appears under its name only when the block that fills it has succeeded.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils.hub import resolve_revision

import ct_moe
from ct_moe.configuration_ct_moe import AUTO_MAP
from ct_moe.errors_ct_moe import CTMoEError, ModelError
from ct_moe.pipeline_ct_moe import PIPELINES


if TYPE_CHECKING:
    from ct_moe import CTMoEConfig, CTMoEForConditionalGeneration, CTMoEProcessor


_IMAGE_PROCESSOR_AUTO_MAP = {"AutoImageProcessor": "image_processing_ct_moe.CTMoEImageProcessor"}
_PROCESSOR_AUTO_MAP = {"AutoProcessor": "processing_ct_moe.CTMoEProcessor"}


def check_model(model: str, revision: str | None = None) -> str | None:
    """Refuse what is no CT-MoE model, before anything large is read.

    Args:
        model: folder or Hub id.
        revision: branch, tag or commit of a Hub repository.

    Returns:
        The revision to load, resolved to a commit where the Hub or its cache can say it; None for a folder.

    Raises:
        ModelError: there is no such folder, or it holds another model or none.
    """
    # A missing path must not become a request to the Hub.
    if not os.path.isdir(model) and (
        model.count("/") != 1 or model.startswith((".", "/", "~")) or os.path.exists(model)
    ):
        raise ModelError(model, "no such folder", "Pass a folder made by `ct-moe convert`, or a Hub id owner/name")
    revision = None if os.path.isdir(model) else resolve_revision(model, revision)
    try:
        config, _ = PreTrainedConfig.get_config_dict(model, revision=revision)
    except (OSError, ValueError) as error:
        finding = " ".join(str(error).split())[:300].rstrip(".")
        raise ModelError(model, finding, "Check the folder or Hub id, and that all its files are complete") from error
    if config.get("model_type") != "ct_moe":
        found = f"a model of type {config['model_type']!r}" if "model_type" in config else "no config.json of a model"
        raise ModelError(model, f"{found}, not 'ct_moe'", "Convert a base first: ct-moe convert BASE OUT")
    return revision


def load_folder(
    model: str, *, revision: str | None = None, dtype: str = "auto", **kwargs
) -> "tuple[CTMoEForConditionalGeneration, CTMoEProcessor, str | None]":
    """Load a CT-MoE model in eval mode, its processor, and say which commit of a Hub repository they are.

    Args:
        model: folder or Hub id.
        revision: branch, tag or commit of a Hub repository.
        dtype: `"auto"` (the dtype on disk), `"float32"`, `"bfloat16"` or `"float16"`.
        **kwargs: of the library's `from_pretrained`, such as `quantization_config`.

    Raises:
        ModelError: there is no CT-MoE model, or it is incomplete or damaged.
    """
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ModelError("dtype", f"{dtype!r} cannot be used", "Use auto, float32, bfloat16 or float16")
    revision = check_model(model, revision)
    try:
        processor = ct_moe.CTMoEProcessor.from_pretrained(model, revision=revision)
        network, loading = ct_moe.CTMoEForConditionalGeneration.from_pretrained(
            model, revision=revision, dtype=dtype, output_loading_info=True, **kwargs
        )
    except CTMoEError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        finding = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise ModelError(model, finding, "Check the folder or Hub id, and that all its files are complete") from error
    if missing := sorted(loading["missing_keys"]):  # the library would fill them with random numbers
        finding = f"{len(missing)} tensors are missing, the first is {missing[0]}"
        raise ModelError(model, finding, "Copy or download the weights again")
    return network.eval(), processor, getattr(revision, "resolved", revision)


def save_folder(model: "CTMoEForConditionalGeneration", processor: "CTMoEProcessor", out: str | Path) -> Path:
    """Write a folder from which every Auto class and `pipeline("ct-report")` load without this package.

    Args:
        model: written in its own dtype, in safetensors shards of at most 5 GB.
        processor: written with its image processor, tokenizer and chat template.
        out: folder to create; it must not exist or be empty.

    Returns:
        `out`.

    Raises:
        ModelError: `out` holds something already, or model and processor name different tasks.
    """
    if processor.tasks != model.config.tasks:
        raise ModelError(
            "tasks",
            f"the processor names {processor.tasks}, the model {model.config.tasks}",
            "Set processor.tasks = model.config.tasks",
        )
    with new_folder(out) as folder:
        write_folder(model, processor, folder)
    return Path(out)


def write_folder(
    model: "CTMoEForConditionalGeneration", processor: "CTMoEProcessor", folder: Path, state_dict: dict | None = None
) -> None:
    """Write weights, configs, tokenizer, chat template and the code that runs them into the existing `folder`.

    `state_dict` holds the weights where those of `model` are spread over processes.
    """
    model.config.auto_map = dict(AUTO_MAP)  # one that was loaded from the Hub names its repository
    model.save_pretrained(folder, max_shard_size="5GB", state_dict=state_dict)
    _write_processor_and_code(processor, folder)


def write_settings(
    config: "CTMoEConfig",
    dtype: torch.dtype,
    generation_config: GenerationConfig,
    processor: "CTMoEProcessor",
    folder: Path,
) -> None:
    """Configs, tokenizer, chat template and code into the existing `folder`, for weights of `dtype` written otherwise.

    The same files as `write_folder` makes of a loaded model.
    """
    config.auto_map = dict(AUTO_MAP)
    config.custom_pipelines = deepcopy(PIPELINES)
    config.architectures = ["CTMoEForConditionalGeneration"]
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        if part is not None:
            part.dtype = dtype
    config.save_pretrained(folder)
    generation_config.save_pretrained(folder)
    _write_processor_and_code(processor, folder)


def _write_processor_and_code(processor: "CTMoEProcessor", folder: Path) -> None:
    processor.auto_map = dict(_PROCESSOR_AUTO_MAP)
    processor.image_processor.auto_map = dict(_IMAGE_PROCESSOR_AUTO_MAP)
    processor.save_pretrained(folder)
    # All of them, and not what the library would collect from imports: the pipeline is named by the config only.
    for source in sorted(Path(ct_moe.__file__).parent.glob("*_ct_moe.py")):
        shutil.copyfile(source, folder / source.name)
    for path in folder.iterdir():
        path.chmod(0o666 & ~_umask())  # safetensors writes for its owner only


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """Yield an empty sibling of `out`; rename it to `out` when the block succeeds, remove it when it fails.

    Raises:
        ModelError: `out` is a file or a folder that holds something, before anything is written.
    """
    out = Path(out).absolute()
    parents = make_parents(out)
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise ModelError(out, f"cannot be created: {error.strerror}", "Name a folder you may write to") from error
    try:
        yield folder
        publish_folder(folder, out)
    except BaseException:
        remove_folder(folder, parents)
        raise


def make_parents(out: Path) -> list[Path]:
    """Make the folders above `out`, and return those that were missing, deepest first.

    Raises:
        ModelError: `out` is a file or a folder that holds something, or cannot be created.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ModelError(out, "exists and is not an empty folder", "Name a new folder, or remove this one first")
    parents = [parent for parent in out.parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(out, f"cannot be created: {error.strerror}", "Name a folder you may write to") from error
    return parents


def publish_folder(folder: Path, out: Path) -> None:
    """Give a folder that is complete its name."""
    folder.chmod(0o777 & ~_umask())  # mkdtemp makes it readable by its owner only
    os.replace(folder, out)  # replaces an empty folder, and fails on one that was filled meanwhile


def remove_folder(folder: Path, parents: list[Path]) -> None:
    """Undo `make_parents` and what was written since."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # another process may have put something there
        for parent in parents:
            parent.rmdir()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
