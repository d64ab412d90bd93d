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
"""Both stages one after the other: they learn the toy set by heart, and leave folders that everything loads."""

import json
from copy import deepcopy

import pytest
import torch
from datasets import DatasetDict
from safetensors.torch import load_file
from toy_rows import ANSWERS, PROMPTS, TASKS
from transformers import AutoModel, AutoProcessor, pipeline

import ct_moe
from ct_moe import DataError, ModelError, TrainingError
from ct_moe.hub.folder import load_folder
from ct_moe.trainers import Stage1Config, Stage2Config, TwoStageRecipe, load_rows, train_two_stage
from ct_moe.trainers.native_bfloat16 import has_native_bfloat16
from ct_moe.trainers.stages import plain_name
from ct_moe.trainers.two_stage import train_stage


def recipe(tmp_path, settings, stage1: dict | None = None, stage2: dict | None = None, **kwargs) -> TwoStageRecipe:
    out = tmp_path / "run"
    return TwoStageRecipe(
        output_dir=str(out),
        stage1=Stage1Config(**settings | {"output_dir": str(out / "stage1-training")} | (stage1 or {})),
        stage2=Stage2Config(**settings | {"output_dir": str(out / "stage2-training")} | (stage2 or {})),
        **kwargs,
    )


def quiet(text: str) -> None:
    pass


def test_bfloat16_that_a_cpu_does_not_have_is_told(model_folder, rows, settings, tmp_path, monkeypatch):
    def say(text: str) -> None:
        said.append(text)
        if "volume layers" in text:
            raise KeyboardInterrupt  # before the first step, which would take long on such a CPU

    for capability in ("AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        said = []
        with pytest.raises(KeyboardInterrupt):
            train_two_stage(
                str(model_folder), None, rows, recipe(tmp_path, settings | {"bf16": True}), stages=(1,), say=say
            )
        assert any("bf16=False" in text for text in said) == (capability == "AVX2")
    assert has_native_bfloat16("cuda:0")


def test_both_stages_learn_a_toy_set_by_heart(model_folder, scans, rows, settings, tmp_path):
    settings = settings | {"per_device_train_batch_size": 6, "learning_rate": 3e-3, "logging_steps": 10}
    settings |= {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 10}
    stage1 = {"max_steps": 80, "train_language_model": "full"}
    stage2 = {"max_steps": 60, "generate_samples": 6, "eval_strategy": "steps", "eval_steps": 60}
    said = []
    last = train_two_stage(
        str(model_folder),
        None,
        rows,
        recipe(tmp_path, settings, stage1, stage2, intended_scope="phantoms"),
        eval_dataset=rows,
        say=said.append,
    )
    assert last == tmp_path / "run" / "stage2"
    for number in (1, 2):
        report = json.loads((tmp_path / "run" / f"stage{number}" / "training_report.json").read_text())
        final = [log for log in report["log"] if "loss" in log][-1]
        assert all(final[f"loss_{task}"] < 0.01 for task in TASKS), final
        assert final["task_router_accuracy"] == 1
        assert str(tmp_path) not in json.dumps(report["settings"])
    evaluated = next(log for log in report["log"] if "eval_generation_exact_match" in log)
    assert evaluated["eval_generation_exact_match"] == 1
    assert "volume layers" in said[0]

    reporter = pipeline("ct-report", model=str(last), trust_remote_code=True)
    assert reporter.model.config.intended_scope == "phantoms"
    for scan in range(2):
        report = reporter(scans[3 * scan], max_new_tokens=30)
        assert report["text"] == ANSWERS["report"][scan]
        assert report["impression"] == ["follow up.", "normal."][scan]
        for task in ("vqa_closed", "vqa_open"):
            answer = reporter(scans[3 * scan], question=PROMPTS[task], max_new_tokens=30)
            assert answer["answer"] == ANSWERS[task][scan]
            assert answer["task"] == task


@pytest.mark.parametrize("language_model", ["lora", "full"])
def test_a_stage_folder_is_the_trained_model(model_folder, rows, settings, tmp_path, language_model):
    """Bit for bit what the trainer held, LoRA merged, for every kind of trained parameter."""
    held = {}

    from transformers import TrainerCallback

    class Keep(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            network = deepcopy(model)
            if hasattr(network, "merge_and_unload"):
                network = network.merge_and_unload(safe_merge=True)
            held.update({plain_name(name): p.detach().clone() for name, p in network.named_parameters()})

    stages = {"train_language_model": language_model, "train_slice_layers": "full"}
    train_two_stage(
        str(model_folder), None, rows, recipe(tmp_path, settings, stages), stages=(1,), callbacks=[Keep()], say=quiet
    )
    model = AutoModel.from_pretrained(tmp_path / "run" / "stage1", trust_remote_code=True)
    loaded = dict(model.named_parameters())
    assert loaded.keys() == held.keys()
    for name, parameter in loaded.items():
        assert torch.equal(parameter, held[name]), name
    assert model.config.vision_config.use_task_groups is False
    # Nothing else of the config has changed.
    before = load_folder(str(model_folder))[0].config.to_dict()
    before["vision_config"]["use_task_groups"] = False
    before["_name_or_path"] = model.config._name_or_path
    before["intended_scope"] = "not stated by those who trained it"
    assert model.config.to_dict() == before
    assert AutoProcessor.from_pretrained(tmp_path / "run" / "stage1", trust_remote_code=True).tasks == TASKS
    assert (tmp_path / "run" / "stage1" / "adapter" / "adapter_model.safetensors").is_file() == (
        language_model == "lora"
    )


def test_an_adapter_can_stay_separate(model_folder, rows, settings, tmp_path):
    """`AutoModel` loads the adapter's folder onto its model, and merging it gives the whole one."""
    outs = []
    for merge in (True, False):
        recipe_ = recipe(tmp_path / str(merge), settings, None, {"merge_adapter": merge, "train_slice_layers": "lora"})
        train_two_stage(str(model_folder), None, rows, recipe_, say=quiet)
        outs.append(tmp_path / str(merge) / "run" / "stage2")
    whole, adapter = outs
    assert not (adapter / "model.safetensors").exists()
    # The same adapter either way.
    first = load_file(whole / "adapter" / "adapter_model.safetensors")
    second = load_file(adapter / "adapter_model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    ct_moe.CTMoEConfig  # noqa: B018 (registers the classes: an adapter's folder names none)
    onto = AutoModel.from_pretrained(adapter)
    merged, processor, _ = load_folder(str(whole))
    inputs = processor(images=[rows[0]["images"]], text=["<image>\nWhere?"], guide=["Where?"], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(onto.eval()(**inputs).logits, merged(**inputs).logits, rtol=0, atol=1e-5)


def test_no_folder_of_this_machine_is_in_what_a_stage_leaves(model_folder, rows, settings, tmp_path):
    train_two_stage(str(model_folder), None, rows, recipe(tmp_path, settings), stages=(1,), say=quiet)
    for file in (tmp_path / "run" / "stage1").rglob("*.*"):
        if file.suffix in (".json", ".md", ".jinja"):
            text = file.read_text()
            assert str(tmp_path) not in text, file
            assert str(model_folder) not in text, file
            assert ANSWERS["report"][0] not in text, file


def test_what_would_end_a_run_late_ends_it_early(model_folder, rows, settings, tmp_path):
    (tmp_path / "run" / "stage1").mkdir(parents=True)
    (tmp_path / "run" / "stage1" / "notes.txt").touch()
    with pytest.raises(TrainingError, match="holds something that is no finished stage"):
        train_two_stage(str(model_folder), None, rows, recipe(tmp_path, settings), say=quiet)
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="cannot be written to"):
        train_two_stage(str(model_folder), None, rows, recipe(tmp_path / "file", settings), say=quiet)
    streamed = load_rows(rows, streaming=True)
    with pytest.raises(TrainingError, match="max_steps: missing for streamed rows"):
        train_two_stage(str(model_folder), None, streamed, recipe(tmp_path / "a", settings | {"max_steps": -1}))
    with pytest.raises(TrainingError, match="without eval_data"):
        train_two_stage(str(model_folder), None, rows, recipe(tmp_path / "b", settings | {"eval_strategy": "epoch"}))
    with pytest.raises(TrainingError, match="stages"):
        train_two_stage(str(model_folder), None, rows, recipe(tmp_path / "c", settings), stages=())


def test_a_stage_loads_the_experts_as_it_is_told(model_folder, rows, settings, tmp_path):
    train_stage(str(model_folder), Stage1Config(**settings, experts_implementation="eager"), rows, tmp_path / "eager")
    stage = Stage1Config(**settings, experts_implementation="none such")
    with pytest.raises(ModelError, match="none such"):
        train_stage(str(model_folder), stage, rows, tmp_path / "unknown")


def test_a_model_in_memory_is_saved_first(trained_model, rows, settings, tmp_path):
    model, processor = trained_model
    last = train_two_stage(model, processor, rows, recipe(tmp_path, settings), stages=(1,), say=quiet)
    start = load_file(tmp_path / "run" / "start" / "model.safetensors")
    after = load_file(last / "model.safetensors")
    assert torch.equal(
        start["model.vision_tower.layers.0.mlp.fc1.weight"], after["model.vision_tower.layers.0.mlp.fc1.weight"]
    )
    assert start["model.vision_tower.layers.2.moe.experts.down_proj"].abs().max() > 0
    with pytest.raises(TrainingError, match="processor: missing beside a model in memory"):
        train_two_stage(model, None, rows, recipe(tmp_path / "other", settings))


def test_stage_2_draws_the_tasks_evenly(model_folder, rows, settings, tmp_path):
    # Of four rows three are reports: in stage 2 every task comes as often.
    data = rows.select([0, 1, 2, 4])
    from transformers import TrainerCallback

    class Count(TrainerCallback):
        def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
            self.tasks = [task for batch in train_dataloader for task in batch["row_tasks"].tolist()]

    count = Count()
    for even, wanted in ((True, [2, 2, 2]), (False, [2, 1, 1])):
        recipe_ = recipe(tmp_path / str(even), settings, None, {"even_tasks": even})
        train_two_stage(
            str(model_folder),
            None,
            data,
            recipe_,
            stages=(1,),
            say=quiet,
        )
        train_two_stage(str(model_folder), None, data, recipe_, stages=(2,), callbacks=[count], say=quiet)
        assert [count.tasks.count(task) for task in range(3)] == wanted


def test_streamed_rows_train(model_folder, rows, settings, tmp_path):
    file = tmp_path / "rows.jsonl"
    rows.remove_columns("row").to_json(file)
    recipe_ = recipe(tmp_path, settings, train_data=str(file), streaming=True, model=str(model_folder))
    last = train_two_stage(recipe=recipe_, say=quiet)
    report = json.loads((last / "training_report.json").read_text())
    assert report["rows"] is None
    assert report["steps"] == 3


def test_a_split_is_a_data_set(model_folder, rows, settings, tmp_path):
    DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "data")
    recipe_ = recipe(tmp_path, settings, train_data=str(tmp_path / "data"), model=str(model_folder))
    assert train_two_stage(recipe=recipe_, stages=(1,), say=quiet).is_dir()


def test_what_is_missing_is_named(model_folder, rows, settings, tmp_path):
    with pytest.raises(TrainingError, match="train_data: missing"):
        train_two_stage(str(model_folder), recipe=recipe(tmp_path, settings))
    with pytest.raises(TrainingError, match="model: missing"):
        train_two_stage(None, None, rows, recipe(tmp_path, settings))
    with pytest.raises(ModelError, match="no such folder"):
        train_two_stage(str(tmp_path / "none"), None, rows, recipe(tmp_path, settings))
    with pytest.raises(TrainingError, match="is no finished stage 1"):
        train_two_stage(str(model_folder), None, rows, recipe(tmp_path, settings), stages=(2,))
    odd = rows.map(lambda row: {"task": "segmentation"}, load_from_cache_file=False)
    with pytest.raises(DataError, match="segmentation"):
        train_two_stage(str(model_folder), None, load_rows(odd), recipe(tmp_path, settings))
    assert not (tmp_path / "run" / "stage1").exists()


def test_the_language_model_can_be_quantized(model_folder, rows, settings, tmp_path):
    from transformers import TrainerCallback

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            kinds = {name: type(module).__name__ for name, module in model.named_modules()}
            self.quantized = {name for name, kind in kinds.items() if kind in ("Linear4bit", "Linear8bitLt")}
            self.trained = {p.dtype for p in model.parameters() if p.requires_grad}

    look = Look()
    for quantization in ("4bit", "8bit"):
        recipe_ = recipe(tmp_path / quantization, settings, {"quantization": quantization})
        train_two_stage(str(model_folder), None, rows, recipe_, stages=(1,), callbacks=[look], say=quiet)
        # Four linear layers of both layers of the language model, and nothing else.
        assert len({name for name in look.quantized if name.endswith(".base_layer")}) == 8
        assert all(".language_model.layers." in name for name in look.quantized)
        assert look.trained == {torch.float32}
        # What is left is whole again: the untouched weights with the adapter merged.
        start = load_file(model_folder / "model.safetensors")
        after = load_file(tmp_path / quantization / "run" / "stage1" / "model.safetensors")
        name = "model.language_model.layers.0.self_attn.qkv_proj.weight"
        assert 0 < (after[name] - start[name]).abs().max() < 0.1
        assert torch.equal(after["lm_head.weight"], start["lm_head.weight"])
        report = json.loads((tmp_path / quantization / "run" / "stage1" / "training_report.json").read_text())
        part = next(part for part in report["parts"] if part["name"] == "language_model")
        assert part["total"] == sum(
            tensor.numel()
            for name, tensor in start.items()
            if ("language_model" in name and "embed_tokens" not in name) or name == "lm_head.weight"
        )
