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
"""Scans, rows and settings that the training tests share."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from toy_rows import ANSWERS, TASKS, row, write_rows

from ct_moe.trainers.phantoms.chest import write_phantom


LAUNCH = [
    *(
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
]


@pytest.fixture(scope="session")
def scans(tmp_path_factory) -> list[str]:
    """Four phantoms, of 3 to 6 slices."""
    folder = tmp_path_factory.mktemp("scans")
    return [
        str(write_phantom(folder / f"scan{seed}.nii.gz", seed=seed, shape=(3 + seed, 24, 24))) for seed in range(4)
    ]


@pytest.fixture
def rows(scans) -> Dataset:
    """Six rows: every task about two scans, the shortest and the longest, with other answers for each."""
    return Dataset.from_list(
        [
            row(2 * number + scan + 1, task, ANSWERS[task][scan], [scans[3 * scan]])
            for number, task in enumerate(TASKS)
            for scan in range(2)
        ]
    )


@pytest.fixture
def settings(tmp_path) -> dict:
    """Settings of a run of a few steps on one core, the same every time."""
    return {
        "output_dir": str(tmp_path / "training"),
        "use_cpu": True,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "learning_rates": None,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "dataloader_num_workers": 0,
        "activation_checkpointing": False,
        "disable_tqdm": True,
        "generate_samples": 0,
    }


@pytest.fixture(autouse=True)
def _quiet_and_reproducible():
    """One thread (two on tiny matrices wait for each other), no warnings of the libraries about their own future."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        # TRL and PEFT still use the old name of activation checkpointing.
        warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing\\w*` is deprecated", FutureWarning)
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def trained_model(model_folder):
    """A converted tiny model whose experts are not zero, as after training, and its processor."""
    from ct_moe.hub.folder import load_folder

    model, processor, _ = load_folder(str(model_folder), dtype="float32")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".moe." in name or "guide_encoder" in name or "task_router" in name or "scale_embedding" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model, processor


@pytest.fixture
def exact_folder(trained_model, tmp_path) -> Path:
    """A model whose experts are not zero, without anything random in training."""
    from ct_moe.hub.folder import save_folder

    model, processor = trained_model
    model.config.vision_config.router_jitter = model.model.vision_tower.config.router_jitter = 0.0
    return save_folder(model, processor, tmp_path / "model")


@pytest.fixture
def run_stage(exact_folder, settings, tmp_path, unused_tcp_port):
    """Train that model with rows, in one process of its own or two; gives the exit status and what was printed."""
    # Compiled code that other processes left behind in the usual place has ended a process in malloc.
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled-code")}

    def run(out: str, rows: list[dict], processes: int, stage: int = 2, die: dict | None = None, **extra):
        rows_file = tmp_path / f"{out}.jsonl"
        write_rows(rows_file, rows)
        task = {
            "model": str(exact_folder),
            "rows": str(rows_file),
            "out": str(tmp_path / out),
            "stage": stage,
            "die": die,
            "settings": {**settings, "output_dir": str(tmp_path / f"{out}-training"), **extra},
        }
        launch = [*LAUNCH, "--main_process_port", str(unused_tcp_port)] if processes == 2 else [sys.executable]
        command = [*launch, str(Path(__file__).with_name("run_stage.py")), json.dumps(task)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.fixture
def unused_tcp_port() -> int:
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
