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
"""Runs that are cut off: killed and resumed equals uninterrupted, loss for loss and weight for weight."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_rows import records, write_rows

from ct_moe import TrainingError
from ct_moe.trainers import Stage1Config, Stage2Config, train_stage
from ct_moe.trainers.checkpoints import last_checkpoint, remove_incomplete


WORKER = Path(__file__).with_name("run_stage.py")


@pytest.fixture
def run(model_folder, rows, settings, tmp_path):
    """A function that runs a stage in a process of its own and gives its exit code and output."""
    rows_file = tmp_path / "rows.jsonl"
    write_rows(rows_file, rows)

    def run(out: str, stage: int = 2, die: dict | None = None, **extra):
        # Everything random is on, and an epoch is three steps: a run crosses two of its borders.
        task = {
            "model": str(model_folder),
            "rows": str(rows_file),
            "out": str(tmp_path / out),
            "stage": stage,
            "die": die,
            "settings": {
                **settings,
                "output_dir": str(tmp_path / f"{out}-training"),
                "max_steps": 7,
                "save_strategy": "steps",
                "save_steps": 2,
                "save_total_limit": 1,
                "lr_scheduler_type": "linear",
                "learning_rate": 1e-3,
                **extra,
            },
        }
        command = [sys.executable, str(WORKER), json.dumps(task)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout + done.stderr

    return run


def losses(folder: Path) -> dict[int, float]:
    report = json.loads((folder / "training_report.json").read_text())
    return {log["step"]: log["loss"] for log in report["log"] if "loss" in log}


def same_weights(first: Path, second: Path) -> None:
    first, second = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "language_model"), [(1, "lora"), (2, "lora"), (2, "full")])
def test_killed_and_resumed_equals_uninterrupted(run, tmp_path, stage, language_model):
    extra = {"train_language_model": language_model, "dataloader_num_workers": 1}
    assert run("whole", stage, **extra)[0] == 0
    code, _ = run("killed", stage, die={"at": "step", "step": 5}, **extra)
    assert code == -9
    assert last_checkpoint(tmp_path / "killed-training").name == "checkpoint-4"
    assert not (tmp_path / "killed").exists()
    # Again, while it writes the next checkpoint: what is there in part must not be used.
    code, _ = run("killed", stage, die={"at": "save", "step": 6}, **extra)
    assert code == -9
    assert (tmp_path / "killed-training" / "checkpoint-6").is_dir()
    assert last_checkpoint(tmp_path / "killed-training").name == "checkpoint-4"
    code, output = run("killed", stage, **extra)
    assert code == 0, output
    assert "going on from" in output
    whole, resumed = losses(tmp_path / "whole"), losses(tmp_path / "killed")
    assert sorted(whole) == list(range(1, 8))
    assert resumed == whole
    same_weights(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_sigterm_saves_the_step_and_ends(run, tmp_path):
    assert run("whole")[0] == 0
    code, output = run("ended", die={"at": "signal", "step": 3}, save_steps=100)
    assert code == 1
    assert "error: ended: ended by SIGTERM after step 3. Run the same again to go on." in output
    assert last_checkpoint(tmp_path / "ended-training").name == "checkpoint-3"
    code, output = run("ended", save_steps=100)
    assert code == 0, output
    assert losses(tmp_path / "ended") == losses(tmp_path / "whole")
    same_weights(tmp_path / "whole", tmp_path / "ended")
    # A finished stage is not done again.
    code, output = run("ended", save_steps=100)
    assert code == 0
    assert "is finished: nothing to do" in output


@pytest.fixture
def stage_run(model_folder, rows, settings, tmp_path):
    """As `run`, in this process, with another way to die: an exception in a callback."""
    from transformers import TrainerCallback

    class Interrupted(Exception):
        pass

    class Interrupt(TrainerCallback):
        def __init__(self, step):
            self.step = step

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == self.step:
                raise Interrupted

    def run(out: str, config=Stage2Config, step: int | None = None, data=None, **extra) -> Path:
        stage = config(
            **{
                **settings,
                "output_dir": str(tmp_path / f"{out}-training"),
                "max_steps": 4,
                "save_strategy": "steps",
                "save_steps": 1,
                **extra,
            }
        )
        callbacks = [] if step is None else [Interrupt(step)]
        try:
            train_stage(
                str(model_folder), stage, data or rows, tmp_path / out, callbacks=callbacks, say=lambda text: None
            )
        except Interrupted:
            assert step is not None
        return tmp_path / out

    return run


@pytest.mark.parametrize("config", [Stage1Config, Stage2Config])
@pytest.mark.parametrize("language_model", ["lora", "full"])
def test_every_kind_of_parameter_survives_a_resume(stage_run, config, language_model):
    extra = {
        "train_language_model": language_model,
        "train_slice_layers": "lora" if language_model == "lora" else "full",
    }
    whole = stage_run("whole", config, **extra)
    stage_run("cut", config, step=2, **extra)
    cut = stage_run("cut", config, **extra)
    assert losses(cut) == losses(whole)
    same_weights(cut, whole)


def test_a_resumed_adapter_trains_no_more_than_before(stage_run, model_folder):
    # The adapter holds the embeddings whole; W_s inside them belongs to a part that this stage leaves frozen.
    stage_run("cut", step=2, train_slice_layers="full", weight_decay=0.1)
    after = load_file(stage_run("cut", train_slice_layers="full", weight_decay=0.1) / "model.safetensors")
    start = load_file(model_folder / "model.safetensors")
    frozen = "model.vision_tower.embeddings.scale_embedding.weight"
    trained = "model.vision_tower.embeddings.position_embedding.weight"
    assert torch.equal(after[frozen], start[frozen])
    assert not torch.equal(after[trained], start[trained])


def test_an_unfinished_checkpoint_is_never_used(stage_run, tmp_path):
    stage_run("cut", step=3)
    folder = tmp_path / "cut-training"
    assert last_checkpoint(folder).name == "checkpoint-2"  # that of step 3 comes after the callback that died
    (folder / "checkpoint-7").mkdir()
    (folder / "checkpoint-7" / "model.safetensors").write_bytes(b"half")
    assert last_checkpoint(folder).name == "checkpoint-2"
    remove_incomplete(folder)
    assert not (folder / "checkpoint-7").exists()
    assert losses(stage_run("cut")).keys() == {1, 2, 3, 4}


def test_a_checkpoint_holds_no_pickle_of_settings_and_no_paths_in_its_card(stage_run, tmp_path):
    stage_run("run")
    folder = tmp_path / "run-training" / "checkpoint-4"
    assert (folder / "optimizer.pt").is_file()
    assert not (folder / "training_args.bin").exists()
    for readme in (tmp_path / "run-training").rglob("README.md"):
        assert str(tmp_path) not in readme.read_text(), readme


def test_skipped_rows_are_remembered_over_a_resume(stage_run, rows, tmp_path):
    data = rows.to_list()
    data[2]["images"] = [str(tmp_path / "missing.nii.gz")]
    data = type(rows).from_list(data)
    extra = {"max_failed_share": 1.0, "even_tasks": False, "max_steps": 6, "dataloader_num_workers": 0}
    whole = stage_run("whole", data=data, **extra)
    stage_run("cut", data=data, step=5, **extra)
    cut = stage_run("cut", data=data, **extra)
    for name in ("whole", "cut"):
        entries = records(tmp_path / f"{name}-training" / "skipped_rows.jsonl")
        assert [entry["row"] for entry in entries] == ["row 3", "row 3"]
    assert records(tmp_path / "whole-training" / "skipped_rows.jsonl") == records(
        tmp_path / "cut-training" / "skipped_rows.jsonl"
    )
    for folder in (whole, cut):
        assert json.loads((folder / "training_report.json").read_text())["rows_skipped"] == 2


@pytest.mark.parametrize("step", [None, 3])
def test_other_settings_for_a_run_that_was_begun_are_refused(stage_run, rows, step):
    stage_run("run", step=step)
    with pytest.raises(TrainingError, match="was made with other values of learning_rate, train_language_model"):
        stage_run("run", learning_rate=1e-5, train_language_model="full")
    with pytest.raises(TrainingError, match="was made with other values of rows"):
        stage_run("run", data=rows.select(range(5)))
    stage_run("run", logging_steps=2, dataloader_num_workers=1)  # these do not matter


def test_a_torn_list_of_skipped_rows_does_not_stop_a_resume(stage_run, tmp_path):
    stage_run("run", step=3)
    (tmp_path / "run-training" / "skipped_rows.jsonl").write_text('{"step": 1, "row": "row 1", "error": "x"}\n{"st')
    stage_run("run")
    assert records(tmp_path / "run-training" / "skipped_rows.jsonl") == [{"step": 1, "row": "row 1", "error": "x"}]


@pytest.mark.slow
def test_sigterm_to_the_whole_group_while_scans_are_read_saves_the_step(run, tmp_path):
    """As a scheduler sends it: to the workers as well."""
    code, output = run("ended", die={"at": "group", "step": 3}, dataloader_num_workers=2, save_steps=100)
    assert code == 1
    assert "ended by SIGTERM after step" in output
    assert last_checkpoint(tmp_path / "ended-training") is not None


@pytest.mark.slow
def test_sigterm_after_the_last_step_loses_nothing(run, tmp_path):
    code, output = run("ended", die={"at": "signal", "step": 7}, save_strategy="no")
    assert code == 0, output
    assert (tmp_path / "ended" / "model.safetensors").is_file()


def test_save_total_limit_keeps_the_newest_whole_checkpoint(stage_run, tmp_path):
    stage_run("run", save_total_limit=1)
    assert [path.name for path in (tmp_path / "run-training").glob("checkpoint-*")] == ["checkpoint-4"]
