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

Embeddings, slice layers, projector and language model are the demo model's. The layers that conversion turns into
volume layers are not: drawn anew, they learn from single slices to say what the demo model's tower, which sees all of
them together, says about each. So no weight of theirs has seen two slices together, or an expert.

The layers are kept in LAYERS, a file of 2 MB, and taken from there where it exists: the base is then the same, byte by
byte, on every machine.
"""

import argparse
import sys
from pathlib import Path

import torch
from evaluate import leave_out_experts
from pretrain_base import TEXT, VISION
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import LlavaForConditionalGeneration

from ct_moe import CTMoEError, CTMoEForConditionalGeneration, CTMoEProcessor, DataError
from ct_moe.hub.folder import new_folder
from ct_moe.hub.tiny_base import build_tiny_base
from ct_moe.hub.whole_file import whole_file
from ct_moe.trainers.evaluation.cut_numbers import cut_percent
from ct_moe.trainers.phantoms.benchmark import read_split
from ct_moe.trainers.volume_cache import VolumeCache


DEMO_MODEL = Path(__file__).parents[1] / "demo_model"
LAYERS = Path(__file__).with_name("single_slice_layers.safetensors")
READER = ("model.language_model.", "lm_head.", "model.multi_modal_projector.")


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
    args = parser.parse_args()
    try:
        make_base(args)
    except CTMoEError as error:
        sys.exit(f"teach_base: error: {error}")


def make_base(args: argparse.Namespace) -> None:
    """Write the base, after training its upper layers where LAYERS does not have them."""
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
        try:
            upper.load_state_dict(load_file(args.layers))
        except (OSError, SafetensorError, RuntimeError) as error:
            finding = f"holds no layers of this base ({type(error).__name__})"
            raise DataError(str(args.layers), finding, "Remove it, or name another: --layers") from error
        base.save_pretrained(folder / "base")
        for file in (folder / "base").iterdir():
            file.rename(folder / file.name)
        (folder / "base").rmdir()


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
        elif name.startswith(READER):
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
        with torch.autocast("cpu", torch.bfloat16):
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
        with torch.autocast("cpu", torch.bfloat16):
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
