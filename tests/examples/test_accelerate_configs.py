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
"""The files in examples/accelerate, through accelerate's own code as far as it goes without a GPU.

Run here: accelerate reads the file, `accelerate launch` checks it together with the documented command line and makes
the environment of its processes, and the plugin of FSDP or DeepSpeed is made from that environment. Slow: each file
trains both stages in two processes on the CPU, with its bfloat16, is cut off and goes on; of accelerate's sharding the
weights are compared. accelerate selects no FSDP on a CPU, so there it is told that processes over gloo are GPUs.

Not run: NCCL, bfloat16 on a GPU, several machines. DeepSpeed is no requirement of this package: without it only the
settings that accelerate hands to it are compared, and the tests that train with it are skipped with that reason.
"""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file
from torch.distributed.fsdp import OffloadPolicy

from ct_moe.hub.folder import load_folder
from ct_moe.pipeline_ct_moe import REPORT_PROMPT
from ct_moe.trainers.phantoms.chest import write_phantom


FOLDER = Path(__file__).parents[2] / "examples" / "accelerate"
TYPES = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
}
COMMAND = ["-m", "ct_moe.hub.cli", "train", "--config", "recipe.yaml", "--stage", "1"]
MACHINES = "--num_machines 2 --num_processes 16 --machine_rank 1 --main_process_ip 10.0.0.1 --main_process_port 29501"


def launch(name: str, *options: str):
    """What `accelerate launch` makes of a file and the command line, up to the start of the processes."""
    args = launch_command_parser().parse_args(["--config_file", str(FOLDER / f"{name}.yaml"), *options, *COMMAND])
    args, defaults, from_file = _validate_launch_command(args)
    assert from_file  # mixed precision
    if not args.use_deepspeed:
        return args, prepare_multi_gpu_env(args)
    args.deepspeed_fields_from_accelerate_config = ",".join([*defaults.deepspeed_config, "mixed_precision"])
    command, env = prepare_deepspeed_cmd_env(args)
    assert command is None  # torchrun's, not the `deepspeed` program
    return args, env


@pytest.fixture
def plugin_env(monkeypatch):
    def set_env(env: dict[str, str]) -> None:
        for name, value in env.items():
            if name.startswith(("ACCELERATE_", "FSDP_")):
                monkeypatch.setenv(name, value)

    return set_env


def test_every_file_is_tested():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_accelerate_reads_the_file(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type == TYPES[name]
    assert config.mixed_precision == "bf16"
    assert (config.num_machines, config.num_processes, config.machine_rank) == (1, 8, 0)
    assert config.use_cpu is False


@pytest.mark.parametrize("name", TYPES)
def test_launch_on_one_machine(name):
    args, env = launch(name, "--main_process_port", "0")
    assert (args.use_deepspeed, args.use_fsdp, args.multi_gpu) == (
        name.startswith("zero"),
        name == "fsdp2",
        name == "ddp",
    )
    assert (args.nproc_per_node, args.training_script) == ("8", "ct_moe.hub.cli")
    assert args.training_script_args == COMMAND[2:]
    assert args.module
    assert env["ACCELERATE_MIXED_PRECISION"] == "bf16"


@pytest.mark.parametrize("name", TYPES)
def test_launch_on_two_machines(name):
    args, _ = launch(name, *MACHINES.split())
    assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("2", "8", 1)
    assert (args.rdzv_backend, args.rdzv_endpoint) == ("static", "10.0.0.1:29501")


def test_fsdp2_wraps_the_layers_of_the_model(model_folder, plugin_env):
    plugin_env(launch("fsdp2", "--main_process_port", "0")[1])
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.cpu_ram_efficient_loading is True
    assert plugin.activation_checkpointing is False
    assert type(plugin.cpu_offload) is OffloadPolicy  # none
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.param_dtype == torch.bfloat16

    model, _, _ = load_folder(str(model_folder))
    named = plugin.transformer_cls_names_to_wrap
    plugin.set_auto_wrap_policy(model)  # refuses a class that the model lacks
    policy = fsdp2_prepare_auto_wrap_policy(plugin, model)
    wrapped = [type(module).__name__ for module in model.modules() if policy(module)]
    vision, text = model.config.vision_config, model.config.text_config
    assert sorted(wrapped) == sorted(
        ["CTMoEVisionEmbeddings"]
        + ["CTMoEVisionLayer"] * len(model.model.vision_tower.layers)
        + ["Phi3DecoderLayer"] * text.num_hidden_layers
    )
    assert vision.volume_layers  # so that a layer with experts is among them
    # All that the model wants in one piece, and only that; the class of a 3D encoder, which this model has not, is not
    # named, since accelerate would refuse the model.
    assert set(named) == set(model._no_split_modules) - {"CTMoEVolumeEncoderLayer"}


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_zero_settings(name, plugin_env):
    plugin_env(launch(name, "--main_process_port", "0")[1])
    plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == int(name[-1])
    assert plugin.zero3_init_flag is (name == "zero3")
    assert plugin.zero3_save_16bit_model is (name == "zero3")
    assert (plugin.offload_optimizer_device, plugin.offload_param_device) == ("none", "none")
    # The recipe's: the library fills them in.
    for setting in ("gradient_accumulation_steps", "gradient_clipping", "train_micro_batch_size_per_gpu"):
        assert plugin.deepspeed_config[setting] == "auto"
    plugin.set_mixed_precision("bf16")
    assert plugin.deepspeed_config["bf16"]["enabled"] is True
    assert plugin.deepspeed_config["fp16"]["enabled"] is False


def test_no_unknown_settings():
    """accelerate takes any name below `fsdp_config` and `deepspeed_config`: a misspelled one would say nothing."""
    known = vars(launch_command_parser().parse_args(["script.py"]))
    for name in TYPES:
        settings = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
        for group in ("fsdp_config", "deepspeed_config"):
            assert set(settings.get(group, {})) <= set(known), name


# accelerate's own sharding of a model as `prepare_stage` makes it, with the plugin of the environment.
SHARD = """
import json, os, sys
from types import SimpleNamespace
import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from ct_moe.hub.folder import load_folder
from ct_moe.trainers.recipe import Stage1Config
from ct_moe.trainers.stages import prepare_stage, trained_parts

folder, language_model, out = sys.argv[1:]
dist.init_process_group("gloo")
rank = dist.get_rank()
stage = Stage1Config(output_dir=out, use_cpu=True, report_to="none", train_language_model=language_model)
assert stage.shards_parameters
torch.manual_seed(rank)  # what is new in an adapter has to come from process 0
model, processor, _ = load_folder(folder, dtype="float32")
reference, _, _ = load_folder(folder, dtype="float32") if rank == 0 else (None, None, None)
model = prepare_stage(model, stage)
counts = [(part.name, part.trained, part.lora, part.total) for part in trained_parts(model, stage)]
weights = {name: tensor.clone() for name, tensor in model.state_dict().items()} if rank == 0 else {}
plugin = FullyShardedDataParallelPlugin()
accelerator = SimpleNamespace(
    state=SimpleNamespace(fsdp_plugin=plugin), torch_device_mesh=None, parallelism_config=None, mixed_precision="no",
    device=torch.device("cpu"), is_main_process=rank == 0, num_processes=2, process_index=rank,
)
model = fsdp2_prepare_model(accelerator, model)
assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
wrapped = sorted({type(module).__name__ for module in model.modules() if isinstance(module, FSDPModule)})
for name, tensor in model.state_dict().items():
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    if rank == 0:
        assert torch.equal(whole, weights[name]), name
assert all(buffer.device.type == "cpu" for buffer in model.buffers())
inputs = processor.tokenizer("Is there a nodule?", return_tensors="pt")
logits = model(**inputs).logits
buffers = [buffer.double().sum().item() for buffer in model.buffers()]
facts = [None, None]
dist.all_gather_object(facts, [counts, buffers, logits.double().sum().item()])
if rank == 0:
    with torch.no_grad():
        expected = reference(**inputs).logits
    torch.testing.assert_close(logits, expected)
    print(json.dumps({"wrapped": wrapped, "same": facts[0] == facts[1], "facts": facts}))
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("language_model", ["lora", "full"])
def test_accelerate_shards_the_model_over_two_processes(language_model, model_folder, tmp_path):
    """One process reads the weights, both get their shards of them; nothing is left on the meta device."""
    _, env = launch("fsdp2", "--main_process_port", "0")
    script = tmp_path / "shard.py"
    script.write_text(SHARD)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    command += [str(script), str(model_folder), language_model, str(tmp_path / "out")]
    env |= {"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["same"], facts
    for name in ("CTMoEVisionEmbeddings", "CTMoEVisionLayer", "Phi3DecoderLayer"):
        assert any(wrapped.endswith(name) for wrapped in facts["wrapped"]), facts["wrapped"]


# `ct-moe`, for which processes over gloo are GPUs: accelerate would select no FSDP else.
FSDP_ON_CPU = """
import accelerate.state
from accelerate.utils import DistributedType

prepare = accelerate.state.PartialState.__init__

def pretend(self, *args, **kwargs):
    prepare(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

accelerate.state.PartialState.__init__ = pretend
from ct_moe.hub.cli import main

main()
"""


@pytest.fixture
def train(model_folder, tmp_path):
    """The documented command on the CPU, with a recipe in `tmp_path`; gives the command and its environment."""
    rows = []
    for seed in range(2):
        scan = str(write_phantom(tmp_path / f"{seed}.nii.gz", seed=seed, shape=(4, 24, 24)))
        rows.append({"images": [scan], "prompt": REPORT_PROMPT, "completion": "Findings: none.", "task": "report"})
        rows.append({"images": [scan], "prompt": "A nodule?", "completion": "Yes.", "task": "vqa_closed"})
        rows.append({"images": [], "prompt": "What is a nodule?", "completion": "Small.", "task": "vqa_open"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "fsdp_on_cpu.py").write_text(FSDP_ON_CPU)
    settings = yaml.safe_load((FOLDER.parent / "recipe.yaml").read_text(encoding="utf-8"))
    settings |= {"model": str(model_folder), "train_data": "rows.jsonl", "output_dir": "run", "use_cpu": True}
    settings |= {"bf16": True, "per_device_train_batch_size": 1, "logging_steps": 1, "disable_tqdm": True}

    def train(name: str, **changes) -> tuple[list[str], dict[str, str]]:
        recipe = {**settings, **changes}
        for stage in ("stage1", "stage2"):
            recipe[stage] = {key: value for key, value in settings[stage].items() if key not in changes}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        program = ["fsdp_on_cpu.py"] if name == "fsdp2" else ["-m", "ct_moe.hub.cli"]
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / f"{name}.yaml")]
        command += ["--num_processes", "2", "--main_process_port", "0", *program, "train", "--config", "recipe.yaml"]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf"), "DS_ACCELERATOR": "cpu"}
        return command, env

    return train


NO_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install deepspeed"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "language_model", "checkpointing"),
    [
        ("ddp", "lora", True),
        ("fsdp2", "lora", True),
        ("fsdp2", "full", True),
        pytest.param("zero2", "lora", True, marks=NO_DEEPSPEED),
        pytest.param("zero3", "lora", False, marks=NO_DEEPSPEED),
        pytest.param("zero3", "full", True, marks=NO_DEEPSPEED),
    ],
)
def test_both_stages_train_and_go_on_in_two_processes(
    name, language_model, checkpointing, train, model_folder, tmp_path
):
    changes = {"train_language_model": language_model, "activation_checkpointing": checkpointing}
    command, env = train(name, max_steps=4, save_steps=2, **changes)

    def run(stage: int) -> str:
        options = {"capture_output": True, "text": True, "timeout": 300, "cwd": tmp_path, "env": env}
        done = subprocess.run([*command, "--stage", str(stage)], **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(1)
    stage1 = tmp_path / "run" / "stage1"
    before = load_file(stage1 / "model.safetensors")
    # As if it had been killed after the first checkpoint.
    shutil.rmtree(stage1)
    shutil.rmtree(tmp_path / "run" / "stage1-training" / "checkpoint-4")
    assert "going on from run/stage1-training/checkpoint-2" in run(1)
    after = load_file(stage1 / "model.safetensors")
    assert all(torch.equal(before[key], tensor) for key, tensor in after.items())

    run(2)
    start = load_file(model_folder / "model.safetensors")
    end = load_file(tmp_path / "run" / "stage2" / "model.safetensors")
    for number in (1, 2):
        report = json.loads((tmp_path / "run" / f"stage{number}" / "training_report.json").read_text())
        assert report["processes"] == 2
        assert all(part["total"] for part in report["parts"])
        assert sum(part["lora"] for part in report["parts"]) == (53_248 if language_model == "lora" else 0)
    # Each stage trains its experts and leaves the others: but for DeepSpeed, which holds all weights in bfloat16.
    experts = "model.vision_tower.layers.2.moe.experts.down_proj"
    shared = load_folder(str(model_folder))[0].config.vision_config.num_shared_experts
    for old, new, held, trained in (
        (start, after, slice(shared, None), slice(0, shared)),
        (after, end, slice(0, shared), slice(shared, None)),
    ):
        old, new = old[experts], new[experts]
        assert not torch.equal(new[trained], old[trained])
        if name.startswith("zero"):
            old, new = old.bfloat16(), new.bfloat16()
        assert torch.equal(new[held], old[held])


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_the_step(train, tmp_path):
    command, env = train("ddp", max_steps=60, dataloader_num_workers=1)
    command += ["--stage", "1"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": tmp_path, "env": env}
    with subprocess.Popen(command, **options) as launcher:
        lines = []
        for line in launcher.stdout:
            lines.append(line)
            if "'loss'" in line:
                break
        launcher.send_signal(signal.SIGTERM)
        output = "".join([*lines, *launcher.stdout])
    assert launcher.returncode != 0
    assert "ended by SIGTERM" in output, output
    assert list((tmp_path / "run" / "stage1-training").glob("checkpoint-*"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on from" in done.stdout
