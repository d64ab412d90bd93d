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
"""The trainer's loss against one written out, and what it logs, refuses and stops at."""

import math
from copy import deepcopy

import pytest
import torch
from datasets import Dataset
from toy_rows import ANSWERS, PROMPTS, records, row

from ct_moe import TrainingError
from ct_moe.trainers import CTMoEDataCollator, CTMoESFTTrainer, Stage1Config, Stage2Config, prepare_stage


def make_trainer(model, processor, rows, stage, **kwargs) -> CTMoESFTTrainer:
    return CTMoESFTTrainer(model=model, args=stage, train_dataset=rows, processing_class=processor, **kwargs)


def inputs_of(batch: dict) -> dict:
    extra = ("row_names", "row_tasks", "num_volumes", "failed_rows", "labels")
    return {name: value for name, value in batch.items() if name not in extra}


def plain_losses(model, batch: dict) -> dict[str, torch.Tensor]:
    """Every loss of design section 2.3 in loops over rows, tokens, layers and volumes; means where it says so."""
    outputs = model(**inputs_of(batch), output_router_logits=True)
    nll, tokens = 0.0, 0
    for logits, labels in zip(outputs.logits, batch["labels"]):
        for position in range(1, len(labels)):
            if labels[position] != -100:
                nll = nll - logits[position - 1].float().log_softmax(dim=-1)[labels[position]]
                tokens += 1
    routing = outputs.routing
    volumes = len(batch["task_ids"])
    balance = z = 0.0
    shared = 4
    for layer in routing.router_logits:
        for volume in range(volumes):
            where = [index for index, routed in enumerate(routing.token_mask[volume]) if routed]
            for group in (slice(0, shared), slice(shared, None)):
                logits = layer[volume][where][:, group]
                if not logits.shape[1]:
                    continue
                load = torch.zeros(logits.shape[1])
                for token in logits:
                    load[token.argmax()] += 1 / len(where)
                balance = balance + logits.shape[1] * (load * logits.softmax(dim=-1).mean(dim=0)).sum()
                z = z + sum(token.exp().sum().log() ** 2 for token in logits) / len(where)
    # One MoE layer, so the sum over layers is their mean.
    task = sum(-routing.task_logits[v].log_softmax(dim=-1)[batch["task_ids"][v]] for v in range(volumes))
    return {
        "language": nll / tokens,
        "balance": balance / volumes,
        "z": z / volumes,
        "task": task / volumes,
    }


@pytest.fixture
def exact(trained_model, settings):
    """Model and processor without anything random in training."""
    model, processor = trained_model
    model.config.vision_config.router_jitter = 0.0
    return model, processor


@pytest.mark.parametrize("config", [Stage1Config, Stage2Config])
def test_the_loss_is_that_of_a_plain_loop(exact, rows, settings, config):
    model, processor = exact
    stage = config(**settings, train_language_model="full")
    trainer = make_trainer(prepare_stage(model, stage), processor, rows, stage)
    batch = CTMoEDataCollator(processor)([rows[0], rows[3], rows[4]])
    model.train()
    parts = plain_losses(model, batch)
    wanted = parts["language"] + 0.01 * parts["balance"] + 0.001 * parts["z"] + 0.1 * parts["task"]
    trainer._num_volumes = batch["num_volumes"]
    found = trainer.compute_loss(model, dict(batch), num_items_in_batch=batch["labels"][:, 1:].ne(-100).sum())
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)

    found.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    wanted = plain_losses(model, batch)
    (wanted["language"] + 0.01 * wanted["balance"] + 0.001 * wanted["z"] + 0.1 * wanted["task"]).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = parameter.grad.abs().max().item() + 1e-12
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize(
    ("coefficient", "parameter"),
    [
        ("router_balance_coef", "model.vision_tower.layers.2.moe.shared_router.weight"),
        ("router_z_coef", "model.vision_tower.layers.2.moe.shared_router.weight"),
        ("task_coef", "model.task_router.weight"),
    ],
)
@pytest.mark.parametrize("language_model", ["full", "lora"])
def test_every_routing_loss_changes_a_gradient(exact, rows, settings, coefficient, parameter, language_model):
    model, processor = exact
    gradients = []
    for value in (0.0, 1.0):
        copy = deepcopy(model)
        copy.config.router_balance_coef = copy.config.router_z_coef = copy.config.task_coef = 0.0
        setattr(copy.config, coefficient, value)
        stage = Stage1Config(**settings, train_language_model=language_model, lora_dropout=0.0)
        trainer = make_trainer(prepare_stage(copy, stage), processor, rows, stage)
        batch = CTMoEDataCollator(processor)([rows[0], rows[3]])
        trainer._num_volumes = batch["num_volumes"]
        trainer.model.train()
        trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(10)).backward()
        found = {n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad and "original" not in n}
        name = next(
            n for n in found if n.replace("base_model.model.", "").replace(".modules_to_save.default", "") == parameter
        )
        gradients.append(found[name])
    without, with_loss = gradients
    change = with_loss if without is None else with_loss - without
    assert change.abs().max() > 1e-4


def mixed_rows(scans) -> Dataset:
    """Rows of no, one and two volumes, of other lengths, one without a task."""
    return Dataset.from_list(
        [
            row(1, "report", ANSWERS["report"][0], scans[:1]),
            row(2, "vqa_closed", "A. Yes", scans[1:3], prompt="Which of the two has a nodule?"),
            row(3, "vqa_open", "nowhere", [], prompt="What is a nodule?"),
            row(4, None, "right upper lobe", scans[3:], prompt="Where?"),
        ]
    )


def update(model, processor, rows, settings, batch_size: int, accumulation: int) -> dict[str, torch.Tensor]:
    model = deepcopy(model)
    settings = settings | {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    stage = Stage2Config(
        **settings | {"max_steps": 2, "learning_rate": 0.05},
        train_language_model="full",
        train_shared_group="full",
        optim="sgd",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
    )
    make_trainer(prepare_stage(model, stage), processor, rows, stage).train()
    return dict(model.named_parameters())


@pytest.mark.parametrize(("batch_size", "accumulation"), [(2, 2), (1, 4), (3, 2)])
def test_updates_do_not_depend_on_how_a_batch_is_split(exact, scans, settings, batch_size, accumulation):
    model, processor = exact
    rows = mixed_rows(scans)
    whole = update(model, processor, rows, settings, 4, 1)
    split = update(model, processor, rows, settings, batch_size, accumulation)
    before = dict(model.named_parameters())
    moved = 0
    for name, parameter in whole.items():
        torch.testing.assert_close(split[name], parameter, rtol=0, atol=1e-5, msg=name)
        moved += not torch.equal(parameter, before[name])
    assert moved > 20


def test_logs_hold_the_routing_losses_and_what_each_task_and_expert_did(trained_model, rows, settings):
    model, processor = trained_model
    stage = Stage2Config(**settings | {"max_steps": 1, "per_device_train_batch_size": 6, "learning_rate": 0.0})
    model.config.vision_config.router_jitter = 0.0
    trainer = make_trainer(prepare_stage(model, stage), processor, rows, stage)
    trainer.train()
    log = trainer.state.log_history[0]
    batch = CTMoEDataCollator(processor)([rows[number] for number in range(6)])
    trainer.model.train()
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    network = trainer.model.get_base_model()
    with torch.no_grad():
        parts = plain_losses(network, batch)
        routing = network(**inputs_of(batch), output_router_logits=True).routing
    assert log["balance_loss"] == pytest.approx(parts["balance"].item(), rel=1e-4)
    assert log["z_loss"] == pytest.approx(parts["z"].item(), rel=1e-4)
    assert log["task_loss"] == pytest.approx(parts["task"].item(), rel=1e-4)
    aux = 0.01 * parts["balance"] + 0.001 * parts["z"] + 0.1 * parts["task"]
    assert log["aux_loss"] == pytest.approx(aux.item(), rel=1e-4)
    right = (routing.task_logits.argmax(dim=-1) == batch["task_ids"]).float().mean()
    assert log["task_router_accuracy"] == pytest.approx(right.item())
    # Loss per task: with LoRA dropout the language loss of a step differs, so these only have to be there and sane.
    for task in model.config.tasks:
        assert log[f"loss_{task}"] == pytest.approx(math.log(1024), rel=0.2)
    assert {"mean_token_accuracy", "entropy", "num_tokens"} <= log.keys()  # TRL's own
    shared = routing.router_logits[0][..., :4]
    load = torch.zeros(4)
    for volume in range(6):
        where = routing.token_mask[volume].bool()
        load += torch.bincount(shared[volume][where].argmax(dim=-1), minlength=4) / where.sum() / 6
    assert log["shared_load_max"] == pytest.approx(4 * load.max().item(), rel=1e-4)
    assert log["shared_load_min"] == pytest.approx(4 * load.min().item(), rel=1e-4, abs=1e-6)
    assert 0 < log["task_entropy"] <= 1


def test_loss_per_task_is_the_mean_over_its_tokens(exact, rows, settings):
    model, processor = exact
    stage = Stage2Config(**settings | {"max_steps": 1, "per_device_train_batch_size": 6}, train_language_model="full")
    batch = CTMoEDataCollator(processor)([rows[number] for number in range(6)])
    model.train()
    with torch.no_grad():
        logits = model(**inputs_of(batch)).logits
    trainer = make_trainer(prepare_stage(model, stage), processor, rows, stage)
    trainer.train()
    for index, task in enumerate(model.config.tasks):
        nll, tokens = 0.0, 0
        for number in range(6):
            if batch["row_tasks"][number] == index:
                where = batch["labels"][number, 1:] != -100
                scores = logits[number, :-1][where].log_softmax(dim=-1)
                nll -= scores.gather(1, batch["labels"][number, 1:][where][:, None]).sum().item()
                tokens += int(where.sum())
        assert trainer.state.log_history[0][f"loss_{task}"] == pytest.approx(nll / tokens, rel=1e-4)


def test_evaluation_generates_and_compares(trained_model, rows, settings, tmp_path):
    model, processor = trained_model
    settings = settings | {"generate_samples": 5, "generate_max_new_tokens": 4, "per_device_eval_batch_size": 2}
    stage = Stage2Config(**settings, train_language_model="frozen", eval_strategy="steps", eval_steps=3)
    trainer = make_trainer(prepare_stage(model, stage), processor, rows, stage, eval_dataset=rows)
    trainer.train()
    logged = [log for log in trainer.state.log_history if "eval_generation_exact_match" in log]
    assert len(logged) == 1
    file = tmp_path / "training" / "generations" / "eval-step-000003.jsonl"
    answers = records(file)
    assert [record["row"] for record in answers] == [f"row {number}" for number in range(1, 6)]
    # As the model answers alone, asked in the library's way.
    model.eval()
    for record, example in zip(answers, rows):
        prompt = [
            {
                "role": "user",
                "content": [
                    {"type": "image", "path": example["images"][0]},
                    {"type": "text", "text": PROMPTS[example["task"]]},
                ],
            }
        ]
        inputs = processor.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        text = processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert record["generated"] == text
    # A training set is not copied into the logs.
    assert not any(answer in file.read_text() for texts in ANSWERS.values() for answer in texts)


def test_learning_rates_are_per_part(exact, rows, settings):
    model, processor = exact
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    rates = {"projector": 0.0, "language_model": 1e-4, "volume_layers": 1e-5}
    settings = settings | {"learning_rate": 1e-3, "learning_rates": rates, "max_steps": 1}
    stage = Stage1Config(**settings, train_language_model="full", weight_decay=0.0, max_grad_norm=0.0)
    trainer = make_trainer(prepare_stage(model, stage), processor, rows, stage)
    trainer.train()

    def step(name):  # the first step of Adam moves every entry by the learning rate
        return (model.get_parameter(name) - before[name]).abs().max().item()

    assert step("model.multi_modal_projector.linear_1.weight") == 0
    assert step("lm_head.weight") == pytest.approx(1e-4, rel=0.02)
    assert step("model.vision_tower.layers.1.self_attn.v_proj.weight") == pytest.approx(1e-5, rel=0.02)
    assert step("model.vision_tower.layers.2.moe.experts.down_proj") == pytest.approx(1e-3, rel=0.02)
    assert step("model.task_router.weight") == pytest.approx(1e-3, rel=0.02)


class Poisoned(CTMoEDataCollator):
    """Makes the scan of one row a number that no network survives."""

    def torch_call(self, examples):
        batch = super().torch_call(examples)
        for number, name in enumerate(batch["row_names"]):
            if name == "row 4":
                batch["pixel_values"][number] = float("nan")
        return batch


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_row(exact, rows, settings):
    model, processor = exact
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = settings | {"per_device_train_batch_size": 3, "max_steps": 10}
    stage = Stage1Config(**settings, train_language_model="full", train_sampling_strategy="sequential")
    trainer = make_trainer(prepare_stage(model, stage), processor, rows, stage, data_collator=Poisoned(processor))
    with pytest.raises(TrainingError, match=r"not a finite number in step 2, in a batch with row 4\. "):
        trainer.train()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert any(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_gradient_that_is_no_number_stops_the_run(exact, rows, settings):
    model, processor = exact
    stage = Stage1Config(**settings, train_language_model="full")
    trainer = make_trainer(prepare_stage(model, stage), processor, rows, stage)
    model.lm_head.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingError, match="gradient: not a finite number in step 1"):
        trainer.train()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("before", [True, False])
def test_training_leaves_out_attention_of_cudnn(exact, rows, settings, before):
    model, processor = exact
    stage = Stage1Config(**settings | {"max_steps": 2}, train_language_model="full")
    trainer = make_trainer(prepare_stage(model, stage), processor, rows, stage)
    seen = []
    model.model.vision_tower.register_forward_hook(lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    default = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(before)
    try:
        trainer.train()
        assert torch.backends.cuda.cudnn_sdp_enabled() == before
    finally:
        torch.backends.cuda.enable_cudnn_sdp(default)
    assert seen
    assert not any(seen)


def failing_rows(rows: Dataset, bad: list[int], tmp_path) -> Dataset:
    """Rows whose scans are missing, damaged or no CT."""
    damaged = tmp_path / "damaged.nii.gz"
    damaged.write_bytes(b"not a scan")
    rows = rows.to_list()
    for number in bad:
        rows[number]["images"] = [str(damaged) if number % 2 else str(tmp_path / "missing.nii.gz")]
    return Dataset.from_list(rows)


def test_scans_that_cannot_be_read_are_skipped_counted_and_listed(exact, rows, settings, tmp_path):
    model, processor = exact
    good = rows.select([0, 1, 3, 5])
    mixed = failing_rows(rows, [2, 4], tmp_path)
    settings = settings | {"per_device_train_batch_size": 6, "max_steps": 2, "max_failed_share": 0.5}
    losses = []
    for data in (mixed, good):
        copy = deepcopy(model)
        stage = Stage2Config(**settings, train_language_model="full", train_sampling_strategy="sequential")
        trainer = make_trainer(prepare_stage(copy, stage), processor, data, stage, eval_dataset=mixed)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        if data is mixed:
            assert (trainer.rows_seen, trainer.rows_failed) == (12, 4)
            listed = records(tmp_path / "training" / "skipped_rows.jsonl")
            assert [(entry["step"], entry["row"]) for entry in listed] == [
                (1, "row 3"),
                (1, "row 5"),
                (2, "row 3"),
                (2, "row 5"),
            ]
            assert "missing.nii.gz" in listed[0]["error"]
            trainer.evaluate()
            listed = records(tmp_path / "training" / "skipped_rows.jsonl")
            assert [(entry["row"], entry["evaluation"]) for entry in listed[4:]] == [("row 3", True), ("row 5", True)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_batch_without_a_readable_scan_changes_nothing(exact, rows, settings, tmp_path):
    # It must still go through every layer: other processes wait there.
    model, processor = exact
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = settings | {"max_steps": 1, "max_failed_share": 1.0}
    stage = Stage2Config(**settings, train_language_model="full", train_shared_group="full", optim="sgd")
    data = failing_rows(rows, list(range(6)), tmp_path)
    trainer = make_trainer(prepare_stage(model, stage), processor, data, stage)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == 0
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_too_many_unreadable_scans_stop_the_run(exact, rows, settings, tmp_path):
    model, processor = exact
    data = failing_rows(rows, [1, 2], tmp_path)
    stage = Stage2Config(**settings | {"max_steps": 20, "max_failed_share": 0.3}, train_language_model="frozen")
    trainer = make_trainer(prepare_stage(model, stage), processor, data, stage)
    with pytest.raises(TrainingError, match=r"2 of 6 rows could not be read, more than max_failed_share = 0\.3"):
        trainer.train()
    assert trainer.state.global_step == 2  # the third batch is the last of the first six rows


def test_on_error_raise_ends_at_the_first_bad_scan(exact, rows, settings, tmp_path):
    from ct_moe import VolumeError

    model, processor = exact
    stage = Stage2Config(**settings, on_error="raise", train_language_model="frozen")
    trainer = make_trainer(prepare_stage(model, stage), processor, failing_rows(rows, [0, 2, 4], tmp_path), stage)
    with pytest.raises(VolumeError, match=r"missing\.nii\.gz"):
        trainer.train()


def test_an_adapter_that_would_swallow_the_task_labels_is_refused(exact, rows, settings):
    from peft import LoraConfig, get_peft_model

    model, processor = exact
    wrapped = get_peft_model(model, LoraConfig(target_modules=["qkv_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(TrainingError, match="takes task_ids for itself"):
        make_trainer(wrapped, processor, rows, Stage2Config(**settings))


def test_processes_that_are_not_connected_are_refused(exact, rows, settings, monkeypatch):
    # Each would train on all rows, and overwrite what the other wrote.
    model, processor = exact
    stage = Stage2Config(**settings, train_language_model="frozen")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match="2 were launched but each trains on its own"):
        make_trainer(prepare_stage(model, stage), processor, rows, stage)


def test_another_loss_function_is_refused(exact, rows, settings):
    # TRL would run a second forward pass, and the routing losses of the first would be lost.
    model, processor = exact
    stage = Stage2Config(**settings, train_language_model="frozen")
    with pytest.raises(TrainingError, match="compute_loss_func: bypasses the routing losses"):
        make_trainer(prepare_stage(model, stage), processor, rows, stage, compute_loss_func=lambda *args: None)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_evaluation_loss_is_the_mean_over_all_answer_tokens(exact, rows, settings, tmp_path, batch_size):
    model, processor = exact
    data = failing_rows(rows, [1, 2], tmp_path)
    settings = settings | {"per_device_eval_batch_size": batch_size}
    stage = Stage2Config(**settings, train_language_model="frozen")
    trainer = make_trainer(prepare_stage(model, stage), processor, rows, stage, eval_dataset=data)
    nll, tokens = 0.0, 0
    for number in (0, 3, 4, 5):
        batch = CTMoEDataCollator(processor)([rows[number]])
        count = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            nll += model.eval()(**inputs_of(batch), labels=batch["labels"]).loss.item() * count
        tokens += count
    assert trainer.evaluate()["eval_loss"] == pytest.approx(nll / tokens, rel=1e-4)


def test_what_is_called_outside_training_is_not_kept(exact, rows, settings):
    model, processor = exact
    stage = Stage2Config(**settings, train_language_model="frozen")
    trainer = make_trainer(prepare_stage(model, stage), processor, rows, stage)
    trainer.train()
    model(**inputs_of(CTMoEDataCollator(processor)([rows[0]])))
    assert trainer._routing is None
    assert trainer._fused_outputs is None


def test_plain_settings_of_trl_are_refused(exact, rows, tmp_path):
    from trl import SFTConfig

    model, processor = exact
    with pytest.raises(TrainingError, match="Pass a CTMoESFTConfig"):
        make_trainer(model, processor, rows, SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False))


def test_checkpointing_cache_and_workers_change_no_loss(exact, rows, settings, tmp_path):
    model, processor = exact
    losses = {}
    for name, extra in {
        "plain": {},
        "checkpointing": {"activation_checkpointing": True},
        "reentrant": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        "selective": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"selective": True}},
        "cache": {"volume_cache": str(tmp_path / "cache")},
        "workers": {"dataloader_num_workers": 2},
    }.items():
        copy = deepcopy(model)
        stage = Stage2Config(**settings | extra, train_language_model="full", train_shared_group="full")
        trainer = make_trainer(prepare_stage(copy, stage), processor, rows, stage)
        trainer.train()
        losses[name] = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    for name, found in losses.items():
        assert found == pytest.approx(losses["plain"], rel=1e-5), name
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2


@pytest.mark.parametrize("language_model", ["full", "lora"])
def test_checkpointing_sends_no_gradient_through_a_frozen_encoder(exact, rows, settings, language_model):
    model, processor = exact
    choices = dict.fromkeys(["train_task_groups", "train_task_router"], "frozen")
    choices |= {"train_language_model": language_model}
    stage = Stage2Config(**settings | {"activation_checkpointing": True}, **choices)
    trainer = make_trainer(prepare_stage(model, stage), processor, rows, stage)
    trainer.train()
    trainer.model.train()
    features = []
    model.model.vision_tower.register_forward_hook(lambda module, args, output: features.append(output[0]))
    batch = CTMoEDataCollator(processor)([rows[0]])
    trainer.model(**inputs_of(batch))
    assert model.model.vision_tower.is_activation_checkpointing
    assert not features[0].requires_grad


def test_bfloat16_autocast_trains_near_float32(exact, rows, settings):
    model, processor = exact
    losses = []
    for bf16 in (False, True):
        copy = deepcopy(model)
        stage = Stage2Config(**settings | {"bf16": bf16, "learning_rate": 1e-3}, train_language_model="full")
        trainer = make_trainer(prepare_stage(copy, stage), processor, rows, stage)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
