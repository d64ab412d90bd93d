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
"""Recipes: one typed dataclass per stage, and a YAML file that holds both (design section 4).

    model: ./ct-llava
    train_data: rows.csv
    output_dir: runs/first
    per_device_train_batch_size: 4      # of both stages
    stage1: {num_train_epochs: 3}
    stage2: {num_train_epochs: 5, train_language_model: full, learning_rates: {language_model: 2.0e-5}}

- `Stage1Config`, `Stage2Config`: every setting of a stage, what it trains above all.
- `TwoStageRecipe`: model, data and both stages; `load_recipe` reads one from YAML with TRL's parser.
"""

import contextlib
import io
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser

from ct_moe import CTMoEError, TrainingError

from .sft_config import CTMoESFTConfig
from .stages import TRAINABLE_PARTS


@dataclass
class StageConfig(CTMoESFTConfig):
    r"""What both stages have in common. The `train_*` fields are the rows of the table in design section 4.

    Parameters:
        > Parameters that control what is trained

        train_slice_layers, train_volume_layers, train_ffns, train_language_model (`str`):
            `"frozen"`, `"lora"` or `"full"`: pretrained parts.
        train_shared_group, train_task_router, train_projector (`str`):
            `"frozen"` or `"full"`: what CT-MoE adds, and the projector.
        train_task_groups (`str`):
            `"off"` (they take no part, and the saved model says so), `"frozen"` or `"full"`.
        lora_r, lora_alpha, lora_dropout, use_rslora, use_dora:
            As in [`~peft.LoraConfig`].
        merge_adapter (`bool`, *optional*, defaults to `True`):
            Whether the stage leaves a whole model with the adapter merged, beside the adapter itself. `False`: the
            adapter alone, which `AutoModel` loads onto the model it was trained on. Not with task groups that are off.

        > Parameters that control the model and the data

        dtype (`str`, *optional*, defaults to `"float32"`):
            Of the weights in memory: `"float32"` (with `bf16=True` the arithmetic is bfloat16 all the same),
            `"bfloat16"`, or `"auto"` for that of the files.
        quantization (`str`, *optional*, defaults to `"none"`):
            `"4bit"` (NF4) or `"8bit"`: the language model's weights in memory, with `train_language_model="lora"`.
            Needs bitsandbytes.
        attn_implementation, experts_implementation (`str`, *optional*):
            As in `from_pretrained`.
        even_tasks (`bool`, *optional*):
            Whether every task is drawn equally often; smaller ones are repeated.
        questions_per_scan (`int`, *optional*, defaults to 1):
            Most rows of one task about the same scans that become one: they share one pass through the vision encoder,
            by far the larger part of a step, and are routed by the prompt of the first. Batches count such rows.
        pack_across_tasks (`bool`, *optional*):
            Whether rows of different tasks may become one: where task groups are off, the scan is seen alike for all.
            A pack counts for the task of its first row, in the router's loss and in the losses logged by task.
    """

    train_slice_layers: Literal["frozen", "lora", "full"] = "frozen"
    train_volume_layers: Literal["frozen", "lora", "full"] = "frozen"
    train_ffns: Literal["frozen", "lora", "full"] = "frozen"
    train_shared_group: Literal["frozen", "full"] = "frozen"
    train_task_router: Literal["frozen", "full"] = "full"
    train_task_groups: Literal["off", "frozen", "full"] = "off"
    train_projector: Literal["frozen", "full"] = "full"
    train_language_model: Literal["frozen", "lora", "full"] = "lora"
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    use_rslora: bool = False
    use_dora: bool = False
    merge_adapter: bool = True
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    quantization: Literal["none", "4bit", "8bit"] = "none"
    attn_implementation: str | None = None
    experts_implementation: str | None = None
    even_tasks: bool = False
    questions_per_scan: int = 1
    pack_across_tasks: bool = False

    def _unsupported(self):
        yield from super()._unsupported()
        if self.questions_per_scan < 1:
            yield "questions_per_scan", f"{self.questions_per_scan}", "Choose 1 or more"
        if self.pack_across_tasks and (self.train_task_groups != "off" or self.even_tasks):
            finding = "True, but a pack goes through the experts of one task"
            yield "pack_across_tasks", finding, "Use it where task groups are off and tasks are not drawn evenly"
        choices = {f"train_{name}": allowed for name, allowed in TRAINABLE_PARTS.items()}
        choices |= {"dtype": ("float32", "bfloat16", "auto"), "quantization": ("none", "4bit", "8bit")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                yield name, f"{getattr(self, name)!r} is unknown", f"Choose one of {', '.join(allowed)}"
        if self.lora_r < 1 or not 0 <= self.lora_dropout < 1:
            yield (
                "lora_r, lora_dropout",
                f"{self.lora_r} and {self.lora_dropout}",
                "Choose 1 or more, and below 1",
            )
        if not self.merge_adapter and self.train_task_groups == "off":
            yield "merge_adapter", "False, but an adapter cannot say that the task groups are off", "Leave it at True"
        if self.quantization != "none" and self.train_language_model == "full":
            yield "train_language_model", "full, on quantised weights", "Choose lora, or quantization: none"
        if self.quantization != "none" and self.shards_parameters:
            yield "quantization", f"{self.quantization} with sharded parameters", "Use DDP or ZeRO-2"


@dataclass
class Stage1Config(StageConfig):
    """The first stage learns task-shared features: volume attention, shared experts, projector."""

    train_volume_layers: Literal["frozen", "lora", "full"] = "full"
    train_shared_group: Literal["frozen", "full"] = "full"
    learning_rates: dict[str, float] | str | None = field(
        default_factory=lambda: {"volume_layers": 2e-5, "language_model": 5e-5}
    )


@dataclass
class Stage2Config(StageConfig):
    """The second stage learns task-specific features: the task groups, with the tasks drawn evenly."""

    train_task_groups: Literal["off", "frozen", "full"] = "full"
    even_tasks: bool = True
    num_train_epochs: float = 5.0
    learning_rates: dict[str, float] | str | None = field(default_factory=lambda: {"language_model": 5e-5})


@dataclass
class TwoStageRecipe:
    """A whole run. Every stage leaves the folder `stage1` or `stage2` in `output_dir`, and works in one beside it.

    Args:
        output_dir: folder of the run.
        stage1, stage2: settings; their own `output_dir` follows from that of the recipe.
        model: folder or Hub id of a converted or trained model.
        train_data: what `load_rows` takes.
        train_split: split of a data set that has several.
        eval_data: likewise, for evaluation; None for none.
        eval_split: likewise.
        streaming: whether rows are read as they are needed; the stages then need `max_steps`.
        model_revision: branch, tag or commit of a Hub repository.
        data_revision: likewise, of the data.
        intended_scope: what the trained model is for, in words: shown with every output.
    """

    output_dir: str
    stage1: Stage1Config
    stage2: Stage2Config
    model: str | None = None
    train_data: str | None = None
    train_split: str = "train"
    eval_data: str | None = None
    eval_split: str = "train"
    streaming: bool = False
    model_revision: str | None = None
    data_revision: str | None = None
    intended_scope: str = "not stated by those who trained it"

    def __post_init__(self):
        for field_ in fields(self):
            value, kind = getattr(self, field_.name), field_.type
            if isinstance(kind, type | UnionType) and not isinstance(value, kind):
                raise TrainingError(field_.name, f"is a {type(value).__name__}", f"Give {kind}")


_STAGES = {"stage1": Stage1Config, "stage2": Stage2Config}


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> TwoStageRecipe:
    """Read a recipe from YAML.

    Args:
        path: the file. Settings on top are of both stages unless `TwoStageRecipe` has them; those under `stage1` and
            `stage2` are of one.
        overrides: `NAME=VALUE` or `stage1.NAME=VALUE`, the value in YAML: they replace what the file says.

    Raises:
        TrainingError: the file cannot be read, or a setting is unknown or has a value that cannot be.
    """
    path = Path(path)
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        finding = " ".join(str(error).split())[:200]
        raise TrainingError(path, f"cannot be read as YAML ({finding})", "Name a recipe file") from error
    if not isinstance(settings, dict):
        raise TrainingError(path, "holds no settings", "Write NAME: VALUE lines, see examples/recipe.yaml")
    for override in overrides:
        _override(settings, override)
    stages = {name: settings.pop(name, None) for name in _STAGES}
    stages = {name: {} if stage is None else stage for name, stage in stages.items()}
    own = {name.name for name in fields(TwoStageRecipe)} - set(_STAGES)
    recipe = {name: settings.pop(name) for name in own & set(settings)}
    if not isinstance(recipe.get("output_dir"), str):
        raise TrainingError(path, "names no output_dir", "Add the line output_dir: FOLDER")
    for name, stage in stages.items():
        if not isinstance(stage, dict):
            raise TrainingError(path, f"{name} is no list of settings", "Write NAME: VALUE lines below it")
        if "output_dir" in stage:
            raise TrainingError(path, f"{name} names an output_dir", "It follows from that of the recipe")
        recipe[name] = _parse_stage(path, name, recipe["output_dir"], {**settings, **stage})
    return TwoStageRecipe(**recipe)


def _parse_stage(path: Path, name: str, output_dir: str, settings: dict[str, Any]) -> StageConfig:
    config = _STAGES[name]
    kinds = get_type_hints(config)  # not the types of its fields, which the parser strips of None when it reads them
    # YAML reads these words as False.
    words = {"train_task_groups": "off", "save_strategy": "no", "eval_strategy": "no", "logging_strategy": "no"}
    settings = {key: words.get(key, value) if value is False else value for key, value in settings.items()}
    for setting, value in settings.items():  # the parser checks only what is text
        if setting in kinds and not _fits(value, kinds[setting], setting in config._VALID_DICT_FIELDS):
            kind = "empty" if value is None else f"a {type(value).__name__}"
            raise TrainingError(path, f"{name}: {setting} is {kind} ({value})", "Give it a value of its kind")
    parser = TrlParser((config,))
    errors = io.StringIO()
    try:
        unknown = parser.set_defaults_with_config(**{**settings, "output_dir": str(training_folder(output_dir, name))})
        with contextlib.redirect_stderr(errors):
            (stage,) = parser.parse_args_into_dataclasses(args=[])
    except CTMoEError:
        raise
    except (ValueError, TypeError, AttributeError, ArithmeticError, ImportError) as error:
        finding = " ".join(str(error).split()).rstrip(".")
        raise TrainingError(path, f"{name}: {finding}", "Mend this setting") from error
    except SystemExit as error:  # argparse's way
        finding = re.sub(r"^argument --(\w+)[^:]*", r"\1", errors.getvalue().strip().rpartition("error: ")[2])
        raise TrainingError(path, f"{name}: {finding}", "Mend this setting") from error
    if unknown:
        names = ", ".join(word[2:] for word in unknown[::2])
        raise TrainingError(path, f"{name}: unknown settings {names}", "Look for a misspelling")
    return stage


def _fits(value: Any, kind: Any, may_be_dict: bool) -> bool:
    """Whether a value of YAML is of the kind of a field; text is left to the parser."""
    kinds = set(get_args(kind)) if get_origin(kind) in (UnionType, Union) else {kind}
    if value is None:
        return type(None) in kinds
    if isinstance(value, dict):
        return may_be_dict
    if isinstance(value, list):
        return any((get_origin(kind) or kind) is list for kind in kinds)
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, float):
        return math.isfinite(value) and (float in kinds or (int in kinds and value.is_integer()))
    return True


def training_folder(output_dir: str | Path, stage: str) -> Path:
    """Where a stage works: checkpoints, logs, skipped rows, generations."""
    return Path(output_dir) / f"{stage}-training"


def _override(settings: dict[str, Any], override: str) -> None:
    name, separator, value = override.partition("=")
    if not separator:
        raise TrainingError("--set", f"{override!r} has no =", "Write NAME=VALUE, or stage1.NAME=VALUE")
    target, _, leaf = name.strip().rpartition(".")
    if target:
        if target not in _STAGES:
            raise TrainingError("--set", f"{target!r} is no stage", f"Choose one of {', '.join(_STAGES)}")
        stage = settings.setdefault(target, {})
        settings[target] = settings = stage if isinstance(stage, dict) else {}
    try:
        settings[leaf] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise TrainingError("--set", f"{override!r} is no YAML", "Quote the value") from error


__all__ = ["Stage1Config", "Stage2Config", "StageConfig", "TwoStageRecipe", "load_recipe"]
