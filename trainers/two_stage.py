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
"""Training in two stages: `train_two_stage`, and `train_stage`, which it calls for each.

A stage that was cut off goes on from its last whole checkpoint; one that is finished is not done again. What a stage
leaves is a folder that appears when it is complete: the model as AutoModel loads it, the adapter (if there is one) in
`adapter`, and `training_report.json`, which says how it was made without naming files or folders.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from transformers import TrainerCallback, set_seed
from transformers.integrations import deepspeed

import ct_moe
from ct_moe import TrainingError
from ct_moe.hub.folder import load_folder, new_folder, save_folder, write_folder
from ct_moe.hub.unconversion import copy_kept

from .checkpoints import last_checkpoint, remove_incomplete
from .native_bfloat16 import has_native_bfloat16
from .packing import pack_rows
from .recipe import StageConfig, TwoStageRecipe
from .rows import check_tasks, count_tasks, interleave_tasks, load_rows
from .sft_trainer import CTMoESFTTrainer
from .stages import TrainedPart, format_parts, prepare_stage, trained_parts, use_task_groups


if TYPE_CHECKING:
    from ct_moe import CTMoEForConditionalGeneration, CTMoEProcessor

REPORT = "training_report.json"
_RUN = "run.json"  # beside the checkpoints: what the run is, so that no other goes on with it
_LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")
# Settings that may change between one part of a run and the next: they do not decide what is learned.
_FREE = set(
    """
    activation_checkpointing activation_offloading accelerator_config attn_implementation bf16 debug disable_tqdm
    dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor
    ddp_find_unused_parameters do_eval do_train eos_token eval_delay eval_on_start eval_steps eval_strategy
    eval_use_gather_object generate_max_new_tokens generate_samples gradient_checkpointing load_best_model_at_end
    log_level logging_first_step logging_steps logging_strategy max_failed_share metric_for_best_model
    per_device_eval_batch_size report_to save_steps save_strategy save_total_limit torch_compile use_cpu
    volume_cache_gb
    """.split()
)
# Settings that say nothing about the result, or name folders, hosts and keys.
_UNREPORTED = {"output_dir", "logging_dir", "volume_cache", "run_name", "hub_token", "push_to_hub_token", "deepspeed"}


def train_two_stage(
    model: "str | CTMoEForConditionalGeneration | None" = None,
    processor: "CTMoEProcessor | None" = None,
    dataset: Dataset | IterableDataset | str | None = None,
    recipe: TwoStageRecipe | None = None,
    *,
    eval_dataset: Dataset | IterableDataset | str | None = None,
    stages: tuple[int, ...] = (1, 2),
    say: Callable[[str], None] = print,
    callbacks: list[TrainerCallback] | None = None,
) -> Path:
    """Train a converted model: first what all tasks share, then what is special to each (arXiv 2604.10233).

    Args:
        model: folder or Hub id, by default the recipe's; or a model in memory, which is first saved as `start`.
        processor: of a model in memory.
        dataset: rows as `load_rows` makes them, or what it takes; by default the recipe's `train_data`.
        recipe: settings.
        eval_dataset: likewise, for evaluation.
        stages: which to train. Stage 2 starts from the folder of stage 1.
        say: gets what a user wants to read: the table of trained parts, where things are.
        callbacks: of the trainer, for both stages.

    Returns:
        The folder of the last stage.

    Raises:
        DataError: rows that cannot be used.
        ModelError: no such model.
        TrainingError: settings that cannot work, a loss that is no number, too many unreadable scans, or SIGTERM.
    """
    if recipe is None:
        raise TrainingError("recipe", "missing", "Pass a TwoStageRecipe, e.g. from load_recipe")
    out = Path(recipe.output_dir)
    train_rows = _rows(dataset, recipe.train_data, recipe.train_split, recipe)
    if train_rows is None:
        raise TrainingError("train_data", "missing", "Name a data set in the recipe, or pass one")
    eval_rows = _rows(eval_dataset, recipe.eval_data, recipe.eval_split, recipe)
    if not stages or not set(stages) <= {1, 2}:
        raise TrainingError("stages", f"{stages}", "Choose 1, 2 or both")
    start, revision = model or recipe.model, recipe.model_revision
    if 1 in stages:
        if start is None:
            raise TrainingError("model", "missing", "Name a model in the recipe, or pass one")
        if 2 in stages and not recipe.stage1.merge_adapter:
            raise TrainingError("merge_adapter", "False in stage 1, but stage 2 starts from a whole model", "Merge it")
        if not isinstance(start, str | Path):
            start = _save_start(start, processor, out / "start", recipe.stage1)
    for number in sorted(stages):
        if recipe.stage1.deepspeed_plugin is not None:
            AcceleratorState._reset_state()  # it takes the plugin of one stage only
        if number == 2:
            start, revision = out / "stage1", None
            if not (start / REPORT).is_file() or not (start / "config.json").is_file():
                raise TrainingError(start, "is no finished stage 1", "Train stage 1 first, with the same output_dir")
        train_stage(
            str(start),
            recipe.stage1 if number == 1 else recipe.stage2,
            train_rows,
            out / f"stage{number}",
            eval_dataset=eval_rows,
            revision=revision,
            intended_scope=recipe.intended_scope,
            say=say,
            callbacks=callbacks,
        )
    return out / f"stage{max(stages)}"


def train_stage(
    model: str,
    stage: StageConfig,
    dataset: Dataset | IterableDataset,
    out: str | Path,
    *,
    eval_dataset: Dataset | IterableDataset | None = None,
    revision: str | None = None,
    intended_scope: str | None = None,
    say: Callable[[str], None] = print,
    callbacks: list[TrainerCallback] | None = None,
) -> Path:
    """Train one stage, or go on with it, and write its folder.

    Args:
        model: folder or Hub id it starts from.
        stage: settings; `stage.output_dir` holds checkpoints and logs.
        dataset: rows.
        out: folder to create.
        eval_dataset: rows for evaluation.
        revision: branch, tag or commit of a Hub repository.
        intended_scope: stored in the model's config.
        say, callbacks: as in `train_two_stage`.

    Returns:
        `out`.

    Raises:
        As `train_two_stage`.
    """
    out, folder = Path(out), Path(stage.output_dir)
    finished = (out / REPORT).is_file()
    run = {
        "model": model,
        "revision": revision,
        "rows": len(dataset) if isinstance(dataset, Dataset) else None,
        "settings": {name: value for name, value in _reported_settings(stage).items() if name not in _FREE},
    }
    if finished or last_checkpoint(folder) is not None:
        _check_same_run(folder / _RUN, run)
    if finished:
        _say(stage, say, f"{out} is finished: nothing to do")
        return out
    _check_before(stage, out, dataset, eval_dataset)
    set_seed(stage.seed)
    network, processor, revision = load_folder(
        model,
        revision=revision,
        dtype=stage.dtype,
        quantization_config=_quantization(stage),
        attn_implementation=stage.attn_implementation,
        experts_implementation=stage.experts_implementation,
    )
    tasks = list(network.config.tasks)
    dataset = check_tasks(dataset, tasks)
    if isinstance(eval_dataset, dict):
        eval_dataset = {name: check_tasks(rows, tasks) for name, rows in eval_dataset.items()}
    elif eval_dataset is not None:
        eval_dataset = check_tasks(eval_dataset, tasks)
    counts = count_tasks(dataset) if isinstance(dataset, Dataset) else None
    dataset = pack_rows(dataset, stage.questions_per_scan, stage.seed, across_tasks=stage.pack_across_tasks)
    if stage.even_tasks:
        dataset = interleave_tasks(dataset, seed=stage.seed, tasks=tasks)
    network = prepare_stage(network, stage)
    parts = trained_parts(network, stage)
    if stage.bf16 and not has_native_bfloat16(stage.device):
        remedy = "bf16=False is many times as fast here"
        _say(stage, say, f"{out.name}: bf16=True, but this CPU multiplies no bfloat16 by itself: {remedy}")
    _say(stage, say, f"{out.name}: from {model}\n{format_parts(parts)}")

    trainer = CTMoESFTTrainer(
        model=network,
        args=stage,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        callbacks=callbacks,
    )
    checkpoint = last_checkpoint(folder)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        remove_incomplete(folder)
        for left in out.parent.glob(f".{out.name}-*"):  # of a run that was killed while it wrote the last of it
            shutil.rmtree(left)
        (folder / _RUN).write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    if checkpoint is not None:
        _say(stage, say, f"{out.name}: going on from {checkpoint}")
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if trainer.signals.ended_early:
        raise TrainingError(
            out.name, f"ended by SIGTERM after step {trainer.state.global_step}", "Run the same again to go on"
        )
    report = {
        "stage": out.name,
        "ct_moe": ct_moe.__version__,
        "versions": {name: version(name) for name in _LIBRARIES},
        "settings": _reported_settings(stage),
        "parts": [asdict(part) for part in parts],
        "tasks": tasks,
        "rows": counts,
        "rows_skipped": trainer.rows_failed,
        "steps": trainer.state.global_step,
        "processes": trainer.accelerator.num_processes,
        "device": _device_name(trainer.args.device),
        "seconds_since_start_or_resume": round(time.monotonic() - started, 1),
        "log": trainer.state.log_history,
    }
    _write_stage(trainer, model, revision, out, report, intended_scope)
    _say(stage, say, f"{out.name}: wrote {out}")
    return out


def _rows(dataset, source: str | None, split: str, recipe: TwoStageRecipe) -> Dataset | IterableDataset | None:
    source = source if dataset is None else dataset
    if source is None:
        return None
    if isinstance(source, dict):  # several data sets for evaluation
        return {name: _rows(rows, None, split, recipe) for name, rows in source.items()}
    return load_rows(source, split=split, streaming=recipe.streaming, revision=recipe.data_revision)


def _save_start(model, processor, folder: Path, stage: StageConfig) -> Path:
    """Stages start from folders, so that an adapter has something to be loaded onto."""
    if processor is None:
        raise TrainingError("processor", "missing beside a model in memory", "Pass the model's processor")
    if stage.should_save:
        if folder.is_dir():  # of an earlier run, perhaps with other weights
            shutil.rmtree(folder)
        save_folder(model, processor, folder)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return folder


def _quantization(stage: StageConfig):
    if stage.quantization == "none":
        return None
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise TrainingError("quantization", "bitsandbytes is not installed", 'Run: pip install "ct-moe[train,quant]"')
    return BitsAndBytesConfig(
        load_in_4bit=stage.quantization == "4bit",
        load_in_8bit=stage.quantization == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if stage.bf16 else torch.float32,
        # The language model only: what sees the scan is small, and trained.
        llm_int8_skip_modules=[r"model\.(?!language_model\.).*", "lm_head"],
    )


def _write_stage(
    trainer: CTMoESFTTrainer,
    start: str,
    revision: str | None,
    out: Path,
    report: dict[str, Any],
    intended_scope: str | None,
) -> None:
    """Write a stage's folder. All processes take part: parameters may be spread over them."""
    stage = trainer.args
    adapter = Path(stage.output_dir) / "adapter"
    has_adapter = is_peft_model(trainer.accelerator.unwrap_model(trainer.model))
    if has_adapter:
        trainer.save_model(str(adapter), _internal_call=True)
        trainer.accelerator.wait_for_everyone()
        state_dict = None
    else:
        state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        with new_folder(out) as folder:
            if has_adapter:
                _write_adapter(adapter, start, revision, stage, trainer, folder, intended_scope)
            else:
                network = trainer.accelerator.unwrap_model(trainer.model)
                _write_network(network, trainer, folder, intended_scope, state_dict)
            copy_kept(start, folder)
            (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    trainer.accelerator.wait_for_everyone()


def _write_adapter(
    adapter: Path,
    start: str,
    revision: str | None,
    stage: StageConfig,
    trainer: CTMoESFTTrainer,
    folder: Path,
    intended_scope: str | None,
) -> None:
    """The adapter, and the model it was trained on with it merged: read again, unquantised and in one piece."""
    from peft import PeftModel

    with _whole_weights():
        network, _, _ = load_folder(start, revision=revision, dtype=stage.dtype)
    use_task_groups(network, stage.train_task_groups != "off")
    peft_model = PeftModel.from_pretrained(network, str(adapter))
    target = folder / "adapter" if stage.merge_adapter else folder
    peft_model.save_pretrained(target)
    (target / "README.md").unlink(missing_ok=True)  # PEFT's card: a form to fill in
    if stage.merge_adapter and Path(start).exists():
        config = json.loads((target / "adapter_config.json").read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = None  # a folder of this machine
        (target / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if stage.merge_adapter:
        _write_network(peft_model.merge_and_unload(safe_merge=True), trainer, folder, intended_scope)
    else:
        trainer.processing_class.save_pretrained(folder)


@contextmanager
def _whole_weights() -> Iterator[None]:
    """Under ZeRO-3 `from_pretrained` spreads weights over all processes, but only this one is here."""
    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference


def _write_network(network, trainer, folder: Path, intended_scope: str | None, state_dict=None) -> None:
    if intended_scope is not None:
        network.config.intended_scope = intended_scope
    write_folder(network, trainer.processing_class, folder, state_dict=state_dict)


def _reported_settings(stage: StageConfig) -> dict[str, Any]:
    """Settings that differ from the defaults of the class, without what belongs to this machine."""
    values = stage.to_dict()
    settings = {}
    for field in fields(stage):
        # Not from an instance made of defaults: it would set up the processes of this run anew.
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.name in values and field.name not in _UNREPORTED and values[field.name] != default:
            settings[field.name] = values[field.name]
    return json.loads(json.dumps(settings))


def _check_before(stage: StageConfig, out: Path, dataset, eval_dataset) -> None:
    """What would end the run late is looked at before anything large is read."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise TrainingError(out, "holds something that is no finished stage", "Remove it, or name another output_dir")
    for folder in (Path(stage.output_dir), out.parent):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".writable").touch()
            (folder / ".writable").unlink(missing_ok=True)
        except OSError as error:
            raise TrainingError(
                folder, f"cannot be written to ({error.strerror})", "Name another output_dir"
            ) from error
    if isinstance(dataset, IterableDataset) and stage.max_steps <= 0:
        raise TrainingError("max_steps", "missing for streamed rows, which have no end that is known", "Set it")
    if stage.eval_strategy != "no" and eval_dataset is None:
        raise TrainingError("eval_strategy", f"{stage.eval_strategy} without eval_data", "Name data, or leave it out")


def _check_same_run(file: Path, run: dict[str, Any]) -> None:
    """Refuse to go on with a run that was another one."""
    if not file.is_file():
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    before, now = ({**record, **record["settings"]} for record in (before, run))
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    changed = [name for name in changed if name != "settings"]
    if changed:
        raise TrainingError(
            file.parent,
            f"was made with other values of {', '.join(changed)}",
            "Name another output_dir, or remove this folder and the stage",
        )


def _say(stage: StageConfig, say: Callable[[str], None], text: str) -> None:
    if stage.process_index == 0:
        say(text)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


__all__ = ["TrainedPart", "train_stage", "train_two_stage"]
