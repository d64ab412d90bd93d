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
"""A 2D base whose language model can read what its tower sees: where most arms of the ablations start.

    python examples/phantom/teach_base.py --data phantoms --out taught-base

Embeddings and slice layers are the demo model's. The layers that conversion turns into volume layers are not: drawn
anew, they learn from single slices to say what the demo model's tower, which sees all of them together, says about
each. So no weight of theirs has seen two slices together, or an expert.

Projector and language model are the demo model's at first, and then learn to read what this tower, as it is, says of
all slices on average. There the arms of the ablations start.

The layers are kept in LAYERS, 2 MB, the reader in READER, 4 MB, and both are taken from there where they exist: the
base is then the same, byte by byte, on every machine.
"""

import argparse
import hashlib
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from evaluate import leave_out_experts
from pretrain_base import SLICES, TEXT, VISION
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm
from train_demo import SETTINGS, make_model, read_recipe
from transformers import LlavaForConditionalGeneration

from ct_moe import CTMoEError, CTMoEForConditionalGeneration, CTMoEProcessor, DataError
from ct_moe.hub.folder import load_folder, new_folder
from ct_moe.hub.tiny_base import build_tiny_base
from ct_moe.hub.whole_file import whole_file
from ct_moe.trainers.evaluation.cut_numbers import cut_percent
from ct_moe.trainers.native_bfloat16 import has_native_bfloat16
from ct_moe.trainers.phantoms.benchmark import read_split
from ct_moe.trainers.rows import load_rows
from ct_moe.trainers.two_stage import train_stage
from ct_moe.trainers.volume_cache import VolumeCache


DEMO_MODEL = Path(__file__).parents[1] / "demo_model"
LAYERS = Path(__file__).with_name("single_slice_layers.safetensors")
READER = Path(__file__).with_name("average_reader.safetensors")
READER_PARTS = ("model.language_model.", "lm_head.", "model.multi_modal_projector.")
RECIPE = Path(__file__).with_name("recipe.yaml")
AVERAGE = {"volume_layers": [], "moe_layers": [], "pool": [SLICES["max_slices"], 2, 2]}  # of the slices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("phantoms"), help="folder written by ct-moe phantom")
    parser.add_argument("--model", type=Path, default=DEMO_MODEL, help="written by train_demo.py")
    parser.add_argument("--layers", type=Path, default=LAYERS, help="taken from here, or trained and kept here")
    parser.add_argument("--out", required=True, type=Path, help="new folder for the base")
    parser.add_argument("--scans", type=int, default=1200, help="training scans whose slices are learned from")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64, help="slices in each of them")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--reader", type=Path, default=READER, help="taken from here, or trained and kept here")
    parser.add_argument("--reader-steps", type=int, default=600)
    parser.add_argument("--reader-batch", type=int, default=8, help="scans in each of them")
    args = parser.parse_args()
    try:
        make_base(args)
    except CTMoEError as error:
        sys.exit(f"teach_base: error: {error}")


def make_base(args: argparse.Namespace) -> None:
    """Write the base, after training its upper layers and its reader where their files are not there."""
    demo = CTMoEForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).eval()
    processor = CTMoEProcessor.from_pretrained(args.model)
    with new_folder(args.out) as folder:
        base = empty_base(processor.tokenizer, folder / "base")
        take_demo(base, demo)
        layers, above = base.model.vision_tower.encoder.layers, min(demo.config.vision_config.volume_layers)
        upper = layers[above : demo.config.vision_config.num_read_layers]
        if not args.layers.is_file():
            states, targets = what_the_demo_says(demo, processor, SliceLayers(base, above), args.data, args.scans)
            teach(upper, states, targets, args)
            with whole_file(args.layers) as part:
                save_file({name: tensor.bfloat16() for name, tensor in upper.state_dict().items()}, part)
        take_file(upper, args.layers, upper.state_dict().keys(), "--layers")
        base.save_pretrained(folder / "base")
        with (folder / "base" / "model.safetensors").open("rb") as file:
            unread = hashlib.file_digest(file, "sha256").hexdigest()  # what the reader learns to read, and no other
        named = [name for name, _ in base.named_parameters() if name.startswith(READER_PARTS)]
        parts = [name for name in named if "embed_tokens" not in name]  # which no stage trains
        if not args.reader.is_file():
            work = args.out.with_name(f"{args.out.name}-reader")
            read = teach_reader(folder / "base", work / unread[:16], args)
            with whole_file(args.reader) as part:
                save_file({name: read[name].bfloat16() for name in parts}, part, {"base": unread})
            shutil.rmtree(work)
        take_file(base, args.reader, parts, "--reader", unread)
        base.save_pretrained(folder / "base")
        for file in (folder / "base").iterdir():
            file.rename(folder / file.name)
        (folder / "base").rmdir()


def take_file(module: nn.Module, file: Path, names: Iterable[str], option: str, base: str | None = None) -> None:
    """Load the tensors of these names, all that the file has; `base` is that of which its metadata must tell."""
    try:
        tensors = load_file(file)
        with safe_open(file, framework="pt") as opened:
            known = opened.metadata() or {}
        if tensors.keys() != set(names) or known.get("base") != base:
            raise KeyError("tensors or base")
        module.load_state_dict(tensors, strict=False)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        finding = f"is not of this base ({type(error).__name__})"
        raise DataError(str(file), finding, f"Remove it, or name another: {option}") from error


def teach_reader(base: Path, work: Path, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """The weights of a model whose reader has learned as in the first stage of the recipe; its tower is as it was.

    Cut off, the same command goes on in the folder `work` where it was.
    """
    work.mkdir(parents=True, exist_ok=True)
    model = work / "converted"
    if not model.exists():
        make_model(base, model, **{**SETTINGS, **AVERAGE})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {
        "model": str(model),
        "train_data": str(args.data / "train.jsonl"),
        "output_dir": str(work),
        "volume_cache": str(args.data / "slices"),
        "use_cpu": device == "cpu",
        "bf16": has_native_bfloat16(device),
        "per_device_train_batch_size": args.reader_batch,
        "stage1.max_steps": args.reader_steps,
    }
    tower = ("slice_layers", "volume_layers", "ffns", "shared_group")
    settings |= {f"stage1.train_{part}": "frozen" for part in tower}
    recipe = read_recipe(RECIPE, settings)
    trained = train_stage(recipe.model, recipe.stage1, load_rows(recipe.train_data), work / "read")
    return load_folder(str(trained), dtype="float32")[0].state_dict()


def empty_base(tokenizer, folder: Path) -> LlavaForConditionalGeneration:
    """A base of the size of `pretrain_base.py`, with the library's random weights and the demo model's tokens."""
    # Another seed than that of pretrain_base.py: from those numbers the demo model came.
    build_tiny_base(folder, text_model="llama", vision=VISION, text=TEXT, tokenizer=tokenizer, seed=1)
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def take_demo(base: LlavaForConditionalGeneration, demo: CTMoEForConditionalGeneration) -> None:
    """All that the base shares with the demo model, but for the volume layers."""
    theirs = demo.state_dict()
    volume = tuple(f"model.vision_tower.layers.{i}." for i in demo.config.vision_config.volume_layers)
    for name, parameter in base.named_parameters():
        converted = name.replace("vision_tower.encoder.", "vision_tower.").replace("pre_layrnorm", "pre_layernorm")
        if converted in theirs and not converted.startswith(volume):
            parameter.copy_(theirs[converted])
        elif name.startswith(READER_PARTS):
            raise DataError(name, "is not in the demo model", "Use a model that train_demo.py wrote: --model")


class SliceLayers(nn.Module):
    """The tower of a base up to a layer: `(slices, 3, height, width)` to `(slices, patches + 1, width)`."""

    def __init__(self, base: LlavaForConditionalGeneration, num_layers: int):
        super().__init__()
        self.tower, self.num_layers = base.model.vision_tower, num_layers

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden_states = self.tower.pre_layrnorm(self.tower.embeddings(pixel_values))
        for layer in self.tower.encoder.layers[: self.num_layers]:
            hidden_states = layer(hidden_states, None)
        return hidden_states


@torch.inference_mode()
def what_the_demo_says(demo, processor, lower: nn.Module, data: Path, scans: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every slice what the slice layers make of it, and what the demo model's whole tower does.

    Both are `(slices, patches + 1, width)`. The former without the scan's scale, which no 2D base is told; the latter
    without experts, which the prompt would choose.
    """
    cache = VolumeCache(data / "slices", processor.image_processor)
    _, labels = read_split(data, "train", scans)
    leave_out_experts(demo)
    states, targets = [], []
    for images in tqdm(sorted(labels), desc="what the demo model says"):
        row = {name: torch.from_numpy(value)[None] for name, value in cache.read(str(data / images)).items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=has_native_bfloat16("cpu")):
            targets.append(demo.model.vision_tower(**row).last_hidden_state[0].bfloat16())
            states.append(lower(row["pixel_values"][0]).bfloat16())
    return torch.cat(states), torch.cat(targets)


def teach(upper: nn.ModuleList, states: torch.Tensor, targets: torch.Tensor, args: argparse.Namespace) -> None:
    """Bring what the layers make of `states` near to `targets`, patch by patch; every channel counts alike.

    A tenth of the slices is kept apart, and of these is printed how much of the variance is explained.
    """
    learned = len(states) * 9 // 10
    scale = targets[:, 1:].float().std((0, 1))
    optimizer = torch.optim.AdamW(upper.parameters(), lr=args.lr, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.1)

    def loss_of(chosen: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=has_native_bfloat16("cpu")):
            hidden_states = states[chosen].float()
            for layer in upper:
                hidden_states = layer(hidden_states, None)
        # The class token is not read by anything above.
        return ((hidden_states.float() - targets[chosen].float())[:, 1:] / scale).square().mean()

    torch.manual_seed(0)
    bar = tqdm(range(args.steps), desc="upper layers")
    for step in bar:
        loss = loss_of(torch.randint(learned, (args.batch,)))
        loss.backward()
        nn.utils.clip_grad_norm_(upper.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    with torch.inference_mode():
        left = [loss_of(chosen).item() for chosen in torch.arange(learned, len(states)).split(args.batch)]
    print(f"upper layers: {cut_percent(1 - sum(left) / len(left))} % of the variance explained in slices kept apart")


if __name__ == "__main__":
    main()
