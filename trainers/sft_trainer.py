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
"""`CTMoESFTTrainer`: TRL's SFTTrainer, whose loss holds the routing losses.

TRL scores the hidden states of `model.model` against the head and so never sees the losses that the model's own
forward adds. Here they are taken where they arise and added to TRL's loss, per volume of the global batch.
"""

import inspect
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints
from trl import SFTTrainer

from ct_moe import TrainingError
from ct_moe.hub.whole_file import whole_file

from .checkpoints import SaveOnSignal, last_checkpoint, mark_complete
from .collator import CTMoEDataCollator
from .generation import generate_and_compare
from .routing_metrics import batch_sums, expert_metrics, language_sums, sums_to_metrics
from .sft_config import CTMoESFTConfig
from .stages import hold_frozen_experts, part_of_parameters
from .volume_cache import VolumeCache


_ROWS_TO_JUDGE = 100  # seen before a share of failures means something
_SKIPPED = "skipped_rows.jsonl"
_COUNTS = "row_counts.json"


class CTMoESFTTrainer(SFTTrainer):
    r"""Trains a CT-MoE model on rows of `images`, `prompt`, `completion` and `task`.

    The loss is the mean over the answer tokens of the global batch, plus the routing losses with the coefficients of
    the model's config as means over the volumes of the global batch, so that it does not depend on how the batch is
    split over processes and accumulation steps. Logged beside TRL's metrics: every routing loss, the loss per task,
    the task router's accuracy, load and entropy of the experts (means over the steps since the last log).

    Args:
        model ([`CTMoEForConditionalGeneration`] or a `PeftModel` around it):
            As `prepare_stage` makes it, or with any other choice of trained parameters.
        args ([`CTMoESFTConfig`]):
            Settings.
        processing_class ([`CTMoEProcessor`]):
            The model's.
        train_dataset, eval_dataset, callbacks and the rest:
            As in [`~trl.SFTTrainer`].
    """

    def __init__(
        self,
        model: nn.Module,
        args: CTMoESFTConfig,
        train_dataset: Dataset | IterableDataset,
        processing_class: Any,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs,
    ):
        if not isinstance(args, CTMoESFTConfig):
            raise TrainingError("args", f"a {type(args).__name__}", "Pass a CTMoESFTConfig or a stage of a recipe")
        _check_model(model, args)
        if kwargs.get("compute_loss_func") is not None:
            raise TrainingError("compute_loss_func", "bypasses the routing losses", "Override compute_loss instead")
        cache = None
        if args.volume_cache is not None:
            cache = VolumeCache(args.volume_cache, processing_class.image_processor, args.volume_cache_gb)
        collator = CTMoEDataCollator(
            processing_class,
            volume_cache=cache,
            on_error=args.on_error,
            # DeepSpeed reduces gradients as they come, and so wants the same ones in every process.
            always_volumes=args.shards_parameters or args.deepspeed_plugin is not None,
        )
        if not (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            # For checkpointing the library makes every embedding's output ask for a gradient, which only the reentrant
            # form needs: it would send the backward pass through all of a frozen vision encoder.
            network = model.get_base_model() if is_peft_model(model) else model
            network.enable_input_require_grads = lambda: None
        # Beside quantised weights TRL casts what is trained to bfloat16, in which small updates are lost.
        exact = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
        super().__init__(
            model=model,
            args=args,
            data_collator=kwargs.pop("data_collator", collator),
            train_dataset=train_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            **kwargs,
        )
        for parameter, data in exact:
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)
        launched = int(os.environ.get("WORLD_SIZE", 1))
        if launched != self.accelerator.num_processes:
            raise TrainingError(
                "processes",
                f"{launched} were launched but each trains on its own",
                "On CPU: accelerate launch --multi_gpu, and use_cpu: true in the recipe, not in accelerate's config",
            )
        self.signals = SaveOnSignal(self.accelerator)
        self.add_callback(self.signals)
        self._held = _HoldFrozenExperts()
        self.add_callback(self._held)
        self._model_config = self._network().config
        self._routing = self._fused_outputs = None  # of the forward pass in compute_loss
        self._in_loss = False
        self._num_volumes = None  # of the global batch
        self._eval_sums = None
        self.rows_seen = self.rows_failed = 0
        self._record_routing()

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs) -> Any:
        """As in the library; True takes the last whole checkpoint. What was skipped up to there is not forgotten."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise TrainingError(self.args.output_dir, "holds no whole checkpoint", "Start without resuming")
        checkpoint = str(resume_from_checkpoint) if resume_from_checkpoint else None
        counts = {"step": 0, "rows_seen": 0, "rows_failed": 0}
        if checkpoint is not None:
            counts = json.loads((Path(checkpoint) / _COUNTS).read_text(encoding="utf-8"))
        self.rows_seen, self.rows_failed = counts["rows_seen"], counts["rows_failed"]
        if self.is_world_process_zero():
            _cut_lines(Path(self.args.output_dir) / _SKIPPED, counts["step"])
        self.data_collator.workers_ignore_sigterm = True
        try:
            with _without_cudnn_attention():
                return super().train(checkpoint, **kwargs)
        finally:
            self.data_collator.workers_ignore_sigterm = False
            self.signals.restore()
            self._held.release()
            for loader in self.accelerator._dataloaders:
                # They ignore SIGTERM: left to the end of the process, persistent ones would be waited for.
                iterator = getattr(getattr(loader, "base_dataloader", loader), "_iterator", None)
                if iterator is not None:
                    iterator._shutdown_workers()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        rows = {name: inputs.pop(name) for name in ("row_names", "row_tasks", "num_volumes", "failed_rows")}
        training = self.model.training
        self._routing = self._fused_outputs = None
        self._in_loss = True
        try:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self._in_loss = False
        loss, *outputs = loss if return_outputs else (loss,)
        routing, fused = self._routing, self._fused_outputs
        self._routing = self._fused_outputs = None
        if training and routing is not None:
            loss = loss + self._routing_weight(rows["num_volumes"], num_items_in_batch) * routing.aux_loss
        self._log_batch(loss.detach(), routing, fused, rows, inputs.get("task_ids"))
        return (loss, *outputs) if return_outputs else loss

    def _get_dataloader(self, *args, **kwargs):
        """With a generator of its own for the seeds of its workers.

        Drawn from the global one, as an iterator over new workers does and one over persistent workers does not, they
        would shift all that is random in a resumed run.
        """
        loader = super()._get_dataloader(*args, **kwargs)
        getattr(loader, "base_dataloader", loader).generator = torch.Generator()
        return loader

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        failed = [failure for batch in batches for failure in batch["failed_rows"]]
        counts = torch.tensor(
            [
                sum(batch["num_volumes"] for batch in batches),
                sum(len(batch["row_names"]) + len(batch["failed_rows"]) for batch in batches),
                len(failed),
            ],
            device=device,
        )
        own_volumes = counts[0].item()
        self._num_volumes, seen, any_failed = self.accelerator.reduce(counts, "sum").tolist()
        if not self.args.average_tokens_across_devices:
            self._num_volumes = own_volumes
        self.rows_seen += seen
        if any_failed:
            self.rows_failed += any_failed
            self._list_failures(failed, step=self.state.global_step + 1)
        self._judge_failures()
        return batches, num_items

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """With a learning rate per part, and no weight decay for tensors that hold frozen experts."""
        if self.optimizer is not None:
            return self.optimizer
        network = self.model if model is None else model
        rates = self.args.learning_rates or {}
        held = {
            id(parameter)
            for module in network.modules()
            if getattr(module, "held_rows", None) is not None
            for parameter in module.parameters()
        }
        decayed = set(self.get_decay_parameter_names(network))
        parts = part_of_parameters(network)
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                rate = _rate(parts[name], rates, self.args.learning_rate)
                decay = self.args.weight_decay if name in decayed and id(parameter) not in held else 0.0
                groups.setdefault((rate, decay), []).append(parameter)
        optimizer_class, settings = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
            self.args, network
        )
        self.optimizer = optimizer_class(
            [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()],
            **settings,
        )
        return self.optimizer

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """With the loss as a mean over all answer tokens: a mean over batches would count those without as 0."""
        self._eval_sums = None
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._eval_sums is not None:
            nll, tokens = language_sums(self._eval_sums, len(self._model_config.tasks))
            output.metrics[f"{metric_key_prefix}_loss"] = nll / tokens if tokens else float("nan")
        return output

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if isinstance(dataset, dict) or not self.args.generate_samples:
            return metrics  # of a `dict` the library has called this for every member
        scores, records = generate_and_compare(self, dataset)
        scores = {f"{metric_key_prefix}_generation_{name}": value for name, value in scores.items()}
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir) / "generations"
            folder.mkdir(parents=True, exist_ok=True)
            _write_lines(folder / f"{metric_key_prefix}-step-{self.state.global_step:06}.jsonl", records)
        self.log(scores)
        return metrics | scores

    def create_model_card(self, *args, **kwargs) -> None:
        """Nothing: TRL's card names folders of this machine; the card of a model is made of its finished folder."""

    def _send_telemetry(self) -> None:
        """Nothing: a training run on patients' scans calls no one."""

    def _network(self) -> nn.Module:
        """The CT-MoE model itself, inside whatever wraps it."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if is_peft_model(model) else model

    def _record_routing(self) -> None:
        """Keep the routing of the last forward pass, which TRL's fused output leaves out."""
        network = self._network()

        def ask(module, args, kwargs):
            return args, {**kwargs, "output_router_logits": True}

        def keep(module, args, output):
            if self._in_loss:  # of other calls nothing is kept: it would hold their graphs in memory
                self._routing = output.routing

        network.model.register_forward_pre_hook(ask, with_kwargs=True)
        network.model.register_forward_hook(keep)
        fused_forward = network.forward

        @wraps(type(network).forward)
        def forward(self_, *args, fused_lm_head=False, **kwargs):
            if not fused_lm_head:
                return fused_forward(*args, **kwargs)
            outputs = fused_forward(*args, fused_lm_head=True, **kwargs)
            if self._routing is not None and self._routing.aux_loss is not None:
                # DDP looks for unused parameters from the outputs on: in stage 1 only this reaches the task router.
                outputs["aux_loss"] = self._routing.aux_loss
            self._fused_outputs = outputs
            return outputs

        network.forward = MethodType(forward, network)

    def _routing_weight(self, num_volumes: int, num_items_in_batch: torch.Tensor | None) -> float:
        """Turns a mean over a batch's volumes into its share of the mean over those of the global batch."""
        if num_items_in_batch is None:
            return float(num_volumes > 0)  # the trainer divides by the accumulation steps
        share = num_volumes / max(self._num_volumes, 1)
        # As TRL does with the language loss: DDP averages gradients over processes.
        return share * (self.accelerator.num_processes if self.args.average_tokens_across_devices else 1)

    def _log_batch(self, loss, routing, fused, rows, task_ids) -> None:
        tasks = self._model_config.tasks
        nll = -fused.log_probs.detach().float().sum(dim=-1)
        sums = batch_sums(
            routing,
            nll,
            fused.label_mask.sum(dim=-1),
            rows["row_tasks"].to(nll.device),
            task_ids,
            rows["num_volumes"],
            len(tasks),
        )
        counts = sums.new_tensor([not torch.isfinite(loss), len(rows["failed_rows"])])
        sums = self.accelerator.reduce(torch.cat([counts, sums.nan_to_num()]), "sum")
        not_finite, failed = sums[:2].tolist()
        if self.model.training and not_finite:
            self._refuse_loss(loss, nll, rows["row_names"])
        if not self.model.training:
            self._eval_sums = sums[2:] if self._eval_sums is None else self._eval_sums + sums[2:]
            if failed:  # in training they were listed when the batch was drawn
                self._list_failures(rows["failed_rows"], step=self.state.global_step, evaluation=True)
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in sums_to_metrics(sums[2:], tasks, self.model.training).items():
            metrics[name].append(value)
        # Of this process's share of the batch, and only where it will be logged.
        if self.model.training and (self.state.global_step + 1) % max(1, int(self.state.logging_steps)) == 0:
            for name, value in expert_metrics(routing, self._model_config.vision_config).items():
                metrics[name].append(value.item())

    def _refuse_loss(self, loss: torch.Tensor, nll: torch.Tensor, names: list[str]) -> None:
        """Ends the run in every process, with the rows to blame: those without a number, else all of the batch."""
        mine = []
        if not torch.isfinite(loss):
            mine = [name for name, finite in zip(names, nll.isfinite().tolist()) if not finite] or names
        blamed = gather_object(mine)
        raise TrainingError(
            "loss",
            f"not a finite number in step {self.state.global_step + 1}, in a batch with {'; '.join(blamed)}",
            "Look at these rows and their scans; else lower the learning rate, or train in float32. "
            "The last checkpoint is from before",
        )

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        value = norm.item() if isinstance(norm, torch.Tensor) else norm
        scaler = getattr(self.accelerator, "scaler", None)  # of float16: it skips such a step
        if value is not None and scaler is None and not torch.isfinite(torch.tensor(value)):
            raise TrainingError(
                "gradient",
                f"not a finite number in step {self.state.global_step + 1}",
                "Lower the learning rate, or train in float32. The last checkpoint is from before",
            )
        return norm

    def _judge_failures(self) -> None:
        rows = len(self.train_dataset) if isinstance(self.train_dataset, Dataset) else _ROWS_TO_JUDGE
        judged = self.rows_seen >= min(rows, _ROWS_TO_JUDGE)
        if judged and self.rows_failed > self.args.max_failed_share * self.rows_seen:
            raise TrainingError(
                "train_dataset",
                f"{self.rows_failed} of {self.rows_seen} rows could not be read, more than max_failed_share = "
                f"{self.args.max_failed_share}",
                f"See {Path(self.args.output_dir) / _SKIPPED} and mend the data",
            )

    def _list_failures(self, failed: list[dict[str, str]], **facts) -> None:
        """Adds those of all processes to the list on disk."""
        failed = gather_object(failed)
        if self.is_world_process_zero():
            path = Path(self.args.output_dir) / _SKIPPED
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_lines(path, [{**facts, **failure} for failure in failed], mode="a")

    def _save_checkpoint(self, model, trial) -> None:
        # Older ones go when the new one is whole in every process, and not before.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            mark_complete(checkpoint, False)  # of the same step, written once more
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            counts = {"step": self.state.global_step, "rows_seen": self.rows_seen, "rows_failed": self.rows_failed}
            (checkpoint / _COUNTS).write_text(json.dumps(counts), encoding="utf-8")
            mark_complete(checkpoint)
            rotate_checkpoints(
                output_dir=self.args.output_dir,
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        # A pickle, which nothing here reads, with paths of this machine.
        Path(output_dir or self.args.output_dir, "training_args.bin").unlink(missing_ok=True)


class _HoldFrozenExperts(TrainerCallback):
    """When training begins the parameters are final: FSDP2 has made its own by then."""

    def __init__(self):
        self._hooks = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._hooks = hold_frozen_experts(model)

    def release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


@contextmanager
def _without_cudnn_attention() -> Iterator[None]:
    """Other backends of `scaled_dot_product_attention` alone.

    cuDNN's, the default on Hopper since torch 2.11, gives gradients that are no numbers where a mask is given, the
    length is 64 above a multiple of 128 and a query sees nothing, such as one of padding (pytorch/pytorch#196678).
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def _check_model(model: nn.Module, args: CTMoESFTConfig) -> None:
    if not is_peft_model(model):
        return
    if "task_ids" in inspect.signature(type(model).forward).parameters:
        raise TrainingError(
            "task_type",
            f"{type(model).__name__} takes task_ids for itself: the model would never see the labels of the tasks",
            "Leave task_type out of the LoraConfig",
        )
    plugin = args.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3 and args.gradient_checkpointing:
        raise TrainingError(
            "gradient_checkpointing",
            "with LoRA and ZeRO-3 TRL takes the reentrant form, in which the routing losses have no gradient",
            "Turn it off, train the language model in full, or use ZeRO-2 or FSDP2",
        )


def _rate(part: str, rates: dict[str, float], default: float) -> float:
    if part == "experts":
        return rates.get("shared_group", rates.get("task_groups", default))
    return rates.get(part, default)


def _cut_lines(path: Path, step: int) -> None:
    """Takes out of a list what a run did after a step that it will do again; a line torn by a kill goes as well."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= step > 0:
                kept.append(json.loads(line))
    with whole_file(path) as part:
        _write_lines(part, kept)


def _write_lines(path: Path, records: list[dict[str, Any]], mode: str = "w") -> None:
    with path.open(mode, encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


__all__ = ["CTMoESFTTrainer"]
