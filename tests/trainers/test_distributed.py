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
"""Two real processes: the same updates as one, nobody left waiting, parameters sharded or not.

Data parallel runs go through `accelerate launch`, whose processes on a CPU are MULTI_CPU over gloo. accelerate selects
no FSDP on a CPU, so FSDP2 is torch's own `fully_shard`, without the trainer.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_rows import ANSWERS, records, row

from ct_moe.trainers.checkpoints import last_checkpoint


pytestmark = pytest.mark.slow


def mixed_rows(scans, unlabelled: bool = True) -> list[dict]:
    """Of no, one and two volumes, perhaps one without a task: shares of the global batch that are not alike."""
    return [
        row(1, "report", ANSWERS["report"][0], scans[:1]),
        row(2, "vqa_closed", "A. Yes", scans[1:3], prompt="Which of the two has a nodule?"),
        row(3, "vqa_open", "nowhere", [], prompt="What is a nodule?"),
        row(4, None if unlabelled else "vqa_open", "right upper lobe", scans[3:], prompt="Where?"),
    ]


SGD = {
    "max_steps": 3,
    "learning_rate": 0.05,
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "train_sampling_strategy": "sequential",
    "even_tasks": False,
    "train_language_model": "full",
    "train_shared_group": "full",
}


@pytest.mark.parametrize("stage", [1, 2])  # in the first nothing but a routing loss reaches the task router
def test_two_processes_give_the_updates_and_the_log_of_one(run_stage, scans, tmp_path, stage):
    rows = mixed_rows(scans, unlabelled=stage == 2)
    weights, logs = {}, {}
    for out, processes, batch_size, accumulation in (("4x1", 1, 4, 1), ("2x2", 1, 2, 2), ("two", 2, 2, 1)):
        extra = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        code, output = run_stage(out, rows, processes, stage, **SGD, **extra)
        assert code == 0, output
        report = json.loads((tmp_path / out / "training_report.json").read_text())
        assert report["processes"] == processes
        if processes == 2:
            assert '{"processes": 2, "type": "DistributedType.MULTI_CPU"}' in output
        logs[out] = report["log"][:3]
        weights[out] = load_file(tmp_path / out / "model.safetensors")
    start = load_file(tmp_path / "model" / "model.safetensors")
    for out in ("2x2", "two"):
        for name, tensor in weights["4x1"].items():
            torch.testing.assert_close(weights[out][name], tensor, rtol=0, atol=1e-5, msg=f"{out}: {name}")
    # It did train, the task router (reached by a routing loss alone) and the experts of the shared group included.
    for name in ("model.task_router.weight", "model.vision_tower.layers.2.moe.shared_router.weight", "lm_head.weight"):
        assert (weights["two"][name] - start[name]).abs().max() > 1e-4
    for one, two in zip(logs["4x1"], logs["two"], strict=True):
        for name in ("loss", "aux_loss", "balance_loss", "z_loss", "task_loss", "task_router_accuracy", "loss_report"):
            assert two[name] == pytest.approx(one[name], rel=1e-4), name


def test_an_adapter_trains_in_two_processes_and_is_written_once(run_stage, scans, rows, tmp_path):
    code, output = run_stage("lora", rows.to_list(), 2, max_steps=2, activation_checkpointing=True)
    assert code == 0, output
    assert (tmp_path / "lora" / "adapter" / "adapter_model.safetensors").is_file()
    assert not list(tmp_path.glob(".lora-*"))


def test_a_process_without_a_readable_scan_keeps_nobody_waiting(run_stage, scans, rows, tmp_path):
    data = rows.to_list()
    for number in (2, 3):  # the whole first batch of the second process
        data[number]["images"] = [str(tmp_path / "missing.nii.gz")]
    extra = SGD | {"max_failed_share": 0.9, "max_steps": 4}
    code, output = run_stage("skips", data, 2, **extra)
    assert code == 0, output
    listed = records(tmp_path / "skips-training" / "skipped_rows.jsonl")
    assert sorted(entry["row"] for entry in listed if entry["step"] == 1) == ["row 3", "row 4"]
    code, output = run_stage("stops", data, 2, **extra | {"max_failed_share": 0.1})
    assert code != 0
    assert "rows could not be read, more than max_failed_share = 0.1" in output


def test_two_processes_killed_and_resumed_equal_uninterrupted(run_stage, rows, tmp_path):
    # An epoch is two steps: the cut is in the middle of the second.
    extra = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 1}
    extra |= {"even_tasks": False, "train_language_model": "full"}
    assert run_stage("whole", rows.to_list(), 2, **extra)[0] == 0
    code, _ = run_stage("cut", rows.to_list(), 2, die={"at": "step", "step": 5}, **extra)
    assert code != 0
    assert last_checkpoint(tmp_path / "cut-training").name == "checkpoint-4"
    code, output = run_stage("cut", rows.to_list(), 2, **extra)
    assert code == 0, output
    logs = [json.loads((tmp_path / out / "training_report.json").read_text())["log"] for out in ("whole", "cut")]
    whole, cut = [[log["loss"] for log in entries if "loss" in log] for entries in logs]
    assert cut == whole
    first, second = (load_file(tmp_path / out / "model.safetensors") for out in ("whole", "cut"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("stage", "language_model"), [(1, "full"), (2, "full"), (2, "lora")])
def test_fsdp2_gives_the_updates_of_one_process(exact_folder, scans, tmp_path, stage, language_model, unused_tcp_port):
    rows = [[row(1, "report", ANSWERS["report"][0], scans[:1])], [row(2, "vqa_open", "nowhere", scans[3:])]]
    weights = []
    for processes in (1, 2):
        task = {
            "model": str(exact_folder),
            "out": str(tmp_path / f"{processes}.safetensors"),
            "stage": stage,
            "language_model": language_model,
            "rows": rows,
        }
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        script = Path(__file__).with_name("run_fsdp2.py")
        command += ["--master_port", str(unused_tcp_port), str(script), json.dumps(task)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        facts = json.loads(done.stdout.splitlines()[-1])
        assert facts["world"] == processes
        assert facts["sharded"] == (facts["parameters"] if processes == 2 else 0)
        weights.append(load_file(tmp_path / f"{processes}.safetensors"))
    one, two = weights
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5, msg=name)
    # The experts of the group that a stage leaves are what they were, in every shard.
    start = load_file(exact_folder / "model.safetensors")["model.vision_tower.layers.2.moe.experts.down_proj"]
    name = next(name for name in two if name.endswith("moe.experts.down_proj") or name.endswith("default.down_proj"))
    held = slice(4, None) if stage == 1 else slice(0, 4)
    assert torch.equal(two[name][held], start[held])
    assert not torch.equal(two[name], start)
