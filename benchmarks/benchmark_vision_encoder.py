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
"""Seconds of the vision encoder beside transformers' CLIPVisionModel, on the same slices with the same weights.

    python benchmarks/benchmark_vision_encoder.py --layers 4 --slices 4

"slice layers only" does the same arithmetic as CLIP, so its ratio is the overhead here: at most 1 is wanted.
Volume layers and experts do more, and their FLOPs stand beside their seconds. All of them run in turn, round by round,
so that a busy minute of the machine falls on all; a ratio is the median over the rounds of the ratios within a round.
"""

import argparse
import statistics
import time

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from ct_moe.configuration_ct_moe import CTMoEVisionConfig
from ct_moe.modeling_ct_moe import CTMoEVisionModel


# CLIP ViT-L/14-336
WIDTHS = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="of 24; every layer costs the same")
    parser.add_argument("--slices", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    half = list(range(args.layers // 2, args.layers))
    ours = {
        "slice layers only": {"volume_layers": [], "moe_layers": []},
        "+ volume layers": {"volume_layers": half, "moe_layers": []},
        "+ experts": {"volume_layers": half, "moe_layers": half[1::2] or half[:1]},
    }
    torch.manual_seed(0)
    clip = CLIPVisionModel(CLIPVisionConfig(**WIDTHS, num_hidden_layers=args.layers)).to(args.device, dtype).eval()
    models = {name: _like(clip, fields).to(args.device, dtype).eval() for name, fields in ours.items()}

    pixel_values = torch.randn(args.slices, 3, 336, 336, device=args.device, dtype=dtype)
    volume = {
        "pixel_values": pixel_values.unsqueeze(0),
        "slice_positions": 5000 * torch.arange(args.slices, dtype=torch.int32, device=args.device).unsqueeze(0),
    }
    routed = {
        "guide": torch.randn(1, 256, device=args.device),
        "task_index": torch.zeros(1, dtype=torch.long, device=args.device),
    }
    work = {"CLIPVisionModel": lambda: clip(pixel_values=pixel_values)}
    work |= {name: lambda model=model: model(**volume, **routed) for name, model in models.items()}
    with torch.inference_mode():
        difference = work["CLIPVisionModel"]().last_hidden_state - work["slice layers only"]().last_hidden_state[0]
        seconds = _measure(work, args.rounds, args.device)

    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"ViT-L/14-336, {args.layers} layers, {args.slices} slices, {args.dtype}, {where}, {args.rounds} rounds")
    print(f"largest difference of slice layers only to CLIP: {difference.abs().max().item():.1e}\n")
    print(f"{'':20}{'median s':>10}{'fastest s':>11}{'ratio':>8}{'fastest':>9}{'TFLOP':>8}{'ratio':>8}")
    base, base_flops = seconds["CLIPVisionModel"], _flops(args.slices, args.layers, [], [])
    for name, times in seconds.items():
        flops = base_flops
        if name in ours:
            flops = _flops(args.slices, args.layers, ours[name]["volume_layers"], ours[name]["moe_layers"])
        ratio = statistics.median(time / base_time for time, base_time in zip(times, base))
        print(
            f"{name:20}{statistics.median(times):10.3f}{min(times):11.3f}{ratio:8.3f}{min(times) / min(base):9.3f}"
            f"{flops / 1e12:8.3f}{flops / base_flops:8.3f}"
        )


def _like(clip: CLIPVisionModel, fields: dict[str, list[int]]) -> CTMoEVisionModel:
    config = CTMoEVisionConfig(
        **WIDTHS, num_hidden_layers=clip.config.num_hidden_layers, feature_layer=-1, num_tasks=3, **fields
    )
    model = CTMoEVisionModel(config)
    names = {"encoder.layers": "layers", "pre_layrnorm": "pre_layernorm"}
    state = {}
    for key, value in clip.state_dict().items():
        for old, new in names.items():
            key = key.replace(old, new)
        if not key.startswith("post_layernorm"):
            state[key] = value
    missing = model.load_state_dict(state, strict=False).missing_keys
    if any(".moe." not in key and "scale_embedding" not in key for key in missing):
        raise SystemExit(f"not the same model: {missing}")
    return model


def _measure(work: dict, rounds: int, device: str) -> dict[str, list[float]]:
    seconds = {name: [] for name in work}
    for number in range(rounds + 1):  # the first round warms up
        order = list(work) if number % 2 else list(reversed(work))
        for name in order:
            start = time.perf_counter()
            work[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _flops(slices: int, layers: int, volume_layers: list[int], moe_layers: list[int]) -> int:
    """Multiplications and additions of the matrix products, for one volume with a task and no air."""
    width, inner = WIDTHS["hidden_size"], WIDTHS["intermediate_size"]
    grid = WIDTHS["image_size"] // WIDTHS["patch_size"]
    tokens_per_slice = grid**2 + 1
    tokens = slices * tokens_per_slice
    config = CTMoEVisionConfig(num_tasks=3)
    flops = 2 * slices * grid**2 * 3 * WIDTHS["patch_size"] ** 2 * width
    for layer in range(layers):
        keys = tokens if layer in volume_layers else tokens_per_slice
        flops += 2 * tokens * (4 * width**2 + 2 * width * inner) + 2 * tokens * keys * 2 * width
        if layer in moe_layers:  # one expert of the shared group and one of the task's; the routers of both
            experts = 2 * config.num_experts_per_tok
            flops += 2 * tokens * experts * 2 * width * config.moe_intermediate_size
            flops += 2 * tokens * 2 * config.num_experts * width
    return flops


if __name__ == "__main__":
    main()
