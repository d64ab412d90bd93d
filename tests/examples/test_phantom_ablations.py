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
"""The arms of the ablations: what each trains, with which learning rates, and on what records agree."""

import argparse
import hashlib
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ct_moe import CTMoEForConditionalGeneration, CTMoEProcessor, DataError, TrainingError
from ct_moe.hub.tiny_base import build_tiny_base
from ct_moe.trainers.evaluation.answering import Answer
from ct_moe.trainers.native_bfloat16 import has_native_bfloat16
from ct_moe.trainers.phantoms.data_set import write_phantoms
from ct_moe.trainers.rows import load_rows
from ct_moe.trainers.sft_trainer import _rate
from ct_moe.trainers.stages import part_of_parameters


SCANS = (15, 60, 480)
WITHOUT_GROUPS = (
    "dense, equal total",
    "dense, equal active",
    "dense with a task embedding",
    "token level",
)


@pytest.fixture(scope="module")
def ablations(load_script):
    return load_script("ablations")


@pytest.fixture(scope="module")
def base(ablations, tmp_path_factory) -> Path:
    """Of the size and layers that the arms are made for, but with few words."""
    pretrain_base = sys.modules["pretrain_base"]
    folder = tmp_path_factory.mktemp("ablations") / "base"
    return build_tiny_base(folder, text_model="llama", vision=pretrain_base.VISION, text=pretrain_base.TEXT)


@pytest.fixture(scope="module")
def arms(ablations) -> dict:
    return {(arm.question, arm.name): arm for arm in ablations.arms()}


@pytest.fixture(scope="module")
def build(ablations, base, tmp_path_factory):
    """The model of an arm, made once for all arms of the same settings."""
    made = {}

    def build(arm):
        key = json.dumps(arm.convert, sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("arm") / "model"
            ablations.make_model(base, made[key], **ablations.settings_of(arm))
        model = CTMoEForConditionalGeneration.from_pretrained(made[key], dtype=torch.float32)
        if arm.task_embedding:
            ablations.add_task_embedding(model)
        return model

    return build


@pytest.fixture(scope="module")
def stages(ablations, build, tmp_path_factory):
    """Per stage of an arm: its settings, and of every trained parameter the learning rate."""
    args = argparse.Namespace(data=Path("phantoms"), steps=(2, 1), batch=4, rates=0.5)

    def stages(arm) -> list[tuple]:
        model, found = build(arm), []
        for stage in ablations.stage_configs(model, arm, 0, args, tmp_path_factory.mktemp("run")):
            ablations.prepare(model, arm, stage)
            parts = part_of_parameters(model)
            rates = {
                name: _rate(parts[name], stage.learning_rates, stage.learning_rate)
                for name, parameter in model.named_parameters()
                if parameter.requires_grad
            }
            found.append((model, stage, rates))
        return found

    return stages


def names(model) -> set[str]:
    return {name for name, _ in model.named_parameters()}


# Arms ---------------------------------------------------------------------------------------------------------------


def test_runs(ablations, arms):
    assert len(arms) == len(ablations.arms())
    assert sum(arm.seeds for arm in arms.values()) == 120
    for scans in SCANS:
        for name, forgotten in (
            ("reused", "nothing"),
            ("vision from scratch", "vision"),
            ("from scratch", "everything"),
        ):
            arm = arms["a", f"{name}, {scans} scans"]
            assert (arm.scans, arm.forgotten, arm.seeds) == (scans, forgotten, 3)
            assert sum(arm.steps) * ablations.BATCH <= SCANS[-1]  # there, every row has a scan of its own
    budgets = {
        letter: {(arm.steps, arm.rates) for (own, _), arm in arms.items() if own == letter} for letter in "abcdef"
    }
    assert budgets["a"] == {(ablations.FROM_2D, 1.0)}  # what is random needs the rates of the recipe
    assert budgets["b"] == {(ablations.FEWER, ablations.RATES)}
    assert all(budgets[letter] == {(ablations.STEPS, ablations.RATES)} for letter in "cdef")
    assert ablations.arms()[0].name == "both levels"


@pytest.mark.parametrize("name", ["reused", "vision from scratch", "from scratch"])
def test_arms_of_reuse_train_everything(arms, stages, name):
    """Parameter by parameter: frozen random weights would be no training from scratch."""
    (model, first, rates), (_, second, later) = stages(arms["a", f"{name}, 15 scans"])
    frozen = names(model) - set(rates)
    # In stage 1 the task groups are off, as in every arm; their experts are rows of tensors that are trained.
    assert {frozen_name for frozen_name in frozen if ".group_router." not in frozen_name} == set()
    assert first.train_task_groups == "off"
    assert set(later) == names(model)
    assert "model.language_model.embed_tokens.weight" in later
    assert second.train_task_groups == "full"


def test_arms_of_reuse_have_the_same_learning_rates(arms, stages):
    found = [
        [rates for _, _, rates in stages(arms["a", f"{name}, {scans}"])]
        for name in ("reused", "vision from scratch", "from scratch")
        for scans in ("15 scans", "480 scans")
    ]
    assert all(rates == found[0] for rates in found)


def test_arms_of_attention_train_the_same(arms, stages):
    found = [stages(arm) for (letter, _), arm in arms.items() if letter == "b"]
    assert len(found) == 10
    for number in (0, 1):
        model, _, rates = found[0][number]
        assert all(stage[number][2] == rates for stage in found)
        tower = {name for name in names(model) if name.startswith("model.vision_tower.")}
        assert {name for name in tower - set(rates) if "post_layernorm" not in name} == set()


@pytest.mark.parametrize("name", WITHOUT_GROUPS)
def test_arms_without_task_groups_train_their_experts_in_both_stages(arms, stages, name):
    for model, stage, rates in stages(arms["c", name]):
        experts = {parameter for parameter in names(model) if ".moe.experts." in parameter}
        assert experts
        assert experts <= set(rates)
        assert (stage.train_shared_group, stage.train_task_groups) == ("full", "off")


def test_arms_of_experts_train_what_they_share_with_the_same_rates(arms, stages):
    reference = stages(arms["c", "both levels"])
    for (letter, name), arm in arms.items():
        if letter in "cf":
            for (_, _, rates), (_, _, others) in zip(stages(arm), reference):
                shared = rates.keys() & others.keys()
                assert len(shared) > 40
                assert {parameter: rates[parameter] for parameter in shared} == {
                    parameter: others[parameter] for parameter in shared
                }, name


@pytest.mark.parametrize("name", ["both levels", "task level", "both levels, groups by scan"])
def test_arms_with_task_groups_train_them_in_stage_2(arms, stages, name):
    _, (_, stage, _) = stages(arms["c", name])
    assert (stage.train_shared_group, stage.train_task_groups) == ("frozen", "full")


def test_one_stage_trains_what_two_stages_train_with_the_same_rates(arms, stages):
    (_, one, first), (_, two, second) = stages(arms["d", "two stages, rows of one task"])
    ((_, whole, rates),) = stages(arms["d", "one stage"])
    assert rates == first | second
    assert whole.max_steps == one.max_steps + two.max_steps
    assert whole.train_task_groups == whole.train_shared_group == "full"


def test_every_arm_has_the_budget_that_it_is_given(arms, stages):
    for arm in arms.values():
        found = [stage for _, stage, _ in stages(arm)]
        assert sum(stage.max_steps for stage in found) == 3
        assert {stage.per_device_train_batch_size for stage in found} == {4}


def test_rates_of_what_is_pretrained_are_lowered_and_of_no_new_part(ablations, arms, build, tmp_path):
    arm = arms["c", "both levels"]
    found = []
    for rates in (1.0, 0.5):
        args = argparse.Namespace(data=Path("phantoms"), steps=(2, 1), batch=4, rates=rates)
        found.append(ablations.stage_configs(build(arm), arm, 0, args, tmp_path))
    for whole, half in zip(*found):
        assert whole.learning_rate == half.learning_rate == 1e-3
        assert whole.learning_rates["language_model"] == 5e-4
        pretrained = {"slice_layers", "volume_layers", "ffns", "projector", "language_model"}
        assert set(whole.learning_rates) == pretrained
        assert half.learning_rates == {part: rate / 2 for part, rate in whole.learning_rates.items()}


def test_all_arms_pool_over_all_slices_but_those_that_compare_it(ablations, arms, build):
    """Else the language model could join the slices itself, and nothing before it had to."""
    for (_, name), arm in arms.items():
        pool = [1, 2, 2] if name.endswith("pz 1") else [24, 2, 2]
        assert ablations.settings_of(arm)["pool"] == pool, name
    assert build(arms["c", "both levels"]).config.pool == [24, 2, 2]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("train") / "data"
    write_phantoms(folder, n=2, validation=0, test=0, workers=1)
    return folder


def test_a_row_of_stage_1_holds_the_texts_of_all_tasks_but_where_stages_are_compared(ablations, arms, stages, data):
    rows = load_rows(data / "train.jsonl")
    texts = Counter(images[0] for images in rows["images"])
    args = argparse.Namespace(steps=(2, 1), batch=4)

    def seen(letter: str, name: str) -> list[list[dict]]:
        arm = arms[letter, name]
        return [ablations.stage_rows(rows, arm, stage, args).to_list() for _, stage, _ in stages(arm)]

    whole, second = seen("c", "both levels")
    assert [1 + len(row["packed"]) for row in whole] == [min(17, texts[row["images"][0]]) for row in whole]
    first, *others = seen("d", "two stages, rows of one task")
    assert len(first) == len(whole)
    assert max(1 + len(row["packed"]) for row in first) < min(texts.values()) - 1
    assert others == [second]
    assert seen("d", "one stage") == [first + second]


@pytest.fixture(scope="module")
def train(ablations, arms, build, data):
    """Train the reference on two scans, with a hook on the first layer of its vision tower."""

    def train(steps: tuple[int, int], hook) -> None:
        arm = arms["c", "both levels"]
        model = build(arm)
        model.model.vision_tower.layers[0].mlp.register_forward_hook(hook)
        processor = CTMoEProcessor.from_pretrained(model.name_or_path)
        args = argparse.Namespace(data=data, steps=steps, batch=2, rates=1.0)
        ablations.train(model, processor, arm, 0, args, data / "run")

    return train


def test_a_task_embedding_is_trained_when_task_groups_are(stages, arms):
    (_, _, first), (_, stage, second) = stages(arms["c", "dense with a task embedding"])
    name = "model.task_router.task_embedding.weight"
    assert name not in first
    assert second[name] == stage.learning_rate


def test_both_stages_compute_in_bfloat16(train):
    """The second trainer of a model too: accelerate takes a model that it has prepared for ready."""
    seen = []
    train((1, 1), lambda module, args, output: seen.append(output.dtype))
    assert seen == 2 * [torch.bfloat16 if has_native_bfloat16("cpu") else torch.float32]


def test_a_run_that_is_told_to_stop_is_no_run(train):
    """The trainer itself ends in good order, with weights that nobody is to score."""
    with pytest.raises(TrainingError, match="was stopped by SIGTERM"):
        train((2, 1), lambda *called: os.kill(os.getpid(), signal.SIGTERM))


# Slice scores -------------------------------------------------------------------------------------------------------


def test_mean_pooling_is_tgis_with_equal_scores(ablations, arms, build, stages):
    """Through training too: the scores are not trained, all else that TG-IS trains is."""
    mean, published, normalised = (
        arms["e", name] for name in ("mean pooling", "TG-IS, published", "TG-IS, normalised")
    )
    assert mean.convert == normalised.convert
    assert published.convert == normalised.convert | {"tgis_variant": "paper"}
    for (_, _, rates), (_, _, others) in zip(stages(mean), stages(normalised)):
        assert set(others) - set(rates) == {
            "model.slice_scoring.text_weight",
            "model.slice_scoring.log_temperature",
        }
        assert rates.items() <= others.items()
    for (_, _, rates), (_, _, others) in zip(stages(published), stages(normalised)):
        assert rates.items() <= others.items()
        assert set(others) - set(rates) == {"model.slice_scoring.log_temperature"}
    model = build(mean).eval()
    ablations.redraw_added(model, 0)
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    guide = torch.randn(2, model.config.vision_config.guide_size)
    states = torch.randn(2, 4, model.config.text_config.hidden_size)
    scoring = model.model.slice_scoring
    assert scoring(states, states, guide, mask)[0, :3].std() > 0
    torch.nn.init.zeros_(scoring.text_weight)
    equal = torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0], [1 / 2, 1 / 2, 0, 0]])
    torch.testing.assert_close(scoring(states, states, guide, mask), equal)


# Experts ------------------------------------------------------------------------------------------------------------


def test_active_expert_parameters_are_those_of_the_models(ablations, arms, stages):
    reference = ablations.active_expert_parameters(ablations.vision_config(arms["c", "both levels"]))
    for (letter, name), arm in arms.items():
        if letter in "cb":
            model = stages(arm)[-1][0]
            planned = ablations.active_expert_parameters(ablations.vision_config(arm))
            assert planned == ablations.active_expert_parameters(model.config.vision_config), name
    level = ablations.active_expert_parameters(ablations.vision_config(arms["c", "task level"]))
    assert 3.9 < level / reference < 4
    assert ablations.active_expert_parameters(ablations.vision_config(arms["c", "token level"])) == reference
    assert ablations.active_expert_parameters(ablations.vision_config(arms["b", "volume layers: none, pz 1"])) == 0


def test_arms_of_equal_totals(arms, build):
    """What differs are routers and biases."""
    sizes = {
        name: sum(parameter.numel() for parameter in build(arms["c", name]).parameters())
        for name in ("both levels", "dense, equal total", "token level", "task level")
    }
    assert all(size == pytest.approx(sizes["both levels"], rel=0.05) for size in sizes.values())


# From scratch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_language", [True, False])
def test_what_is_forgotten(ablations, base, tmp_path, keep_language):
    torch.manual_seed(3)
    before = load_file(base / "model.safetensors")
    after = load_file(
        ablations.forget(base, tmp_path / "forgotten", keep_language=keep_language) / "model.safetensors"
    )
    assert before.keys() == after.keys()
    language = {name for name in before if "language_model" in name or "lm_head" in name}
    assert len(language) > 10
    for name, weight in before.items():
        if weight.std() > 0:  # biases and norms start alike
            assert torch.equal(weight, after[name]) == (keep_language and name in language), name


def test_arms_start_with_their_base(ablations, arms, base, data, tmp_path):
    """Of two, one of which is none."""
    assert {arm.question for arm in arms.values() if not arm.taught} == {"a"}
    assert {arm.question for arm in arms.values() if arm.taught} == set("bcdef")
    for letter, name in (("c", "both levels"), ("a", "reused, 15 scans")):
        folders = {"taught": base, "base": base} | {"taught" if letter == "c" else "base": tmp_path}
        args = argparse.Namespace(**folders, data=data, split="train", steps=None, rates=None)
        with pytest.raises(DataError, match=r"model\.safetensors: cannot be read"):
            ablations.run(arms[letter, name], 0, args)


# Records ------------------------------------------------------------------------------------------------------------


def inputs(folder: Path) -> argparse.Namespace:
    for name in (
        "base/model.safetensors",
        "data/train.jsonl",
        "data/test.jsonl",
        "data/validation.jsonl",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    return argparse.Namespace(data=folder / "data", split="test")


def test_hashes_are_of_what_was_read(ablations, tmp_path):
    args = inputs(tmp_path)
    before = ablations.hashes(tmp_path / "base", args)
    assert set(before) == {"base", "train", "test", "recipe"}
    assert all(len(value) == 16 and int(value, 16) >= 0 for value in before.values())
    (tmp_path / "data" / "test.jsonl").write_text("other")
    after = ablations.hashes(tmp_path / "base", args)
    assert {name for name in before if before[name] != after[name]} == {"test"}
    args.split = "validation"
    assert set(ablations.hashes(tmp_path / "base", args)) == {"base", "train", "validation", "recipe"}


def test_a_missing_base_is_named(ablations, tmp_path):
    args = inputs(tmp_path)
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"model\.safetensors: cannot be read"):
        ablations.hashes(tmp_path / "base", args)


def test_a_digit_for_every_answer(ablations):
    asked = [{"choices": ["left", "right"], "answer": "left"}] * 3
    answers = [Answer("A. left", 2), Answer("B. right", None), Answer("left", 0)]
    assert ablations.scored(asked, answers) == {"accuracy": 2 / 3, "right": "101", "groups": "2-0"}


def test_questions_are_kept_once_and_never_changed(ablations, tmp_path):
    asked = [{"images": "a.nii.gz", "kind": "organ", "template": "where", "prompt": "Where?", "answer": "left"}]
    told = ablations.keep_questions(asked, tmp_path / "test")
    file = tmp_path / "test" / "questions.jsonl"
    content = file.read_bytes()
    assert json.loads(content) == {"images": "a.nii.gz", "kind": "organ", "template": "where"}
    assert hashlib.sha256(content).hexdigest().startswith(told)
    assert ablations.keep_questions(asked, tmp_path / "test") == told
    with pytest.raises(DataError, match="has other questions"):
        ablations.keep_questions(asked * 2, tmp_path / "test")
    assert file.read_bytes() == content


def test_half_a_training_is_refused(ablations, monkeypatch, tmp_path):
    for steps in (("0", "2"), ("2", "0"), ("-1", "2")):
        monkeypatch.setattr(sys, "argv", ["ablations.py", "--list", "--out", str(tmp_path), "--steps", *steps])
        with pytest.raises(SystemExit, match="trains half a model"):
            ablations.main()


def test_parts_share_no_run_and_leave_none_out(ablations):
    runs = list(range(10))
    parts = [ablations.part_of(runs, f"{number}/3") for number in (1, 2, 3)]
    assert sorted(run for part in parts for run in part) == runs
    for part in ("0/3", "4/3", "3", "a/b", "1/0", "-1/3"):
        with pytest.raises(DataError, match="--part"):
            ablations.part_of(runs, part)
