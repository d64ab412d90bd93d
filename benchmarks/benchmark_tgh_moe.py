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
"""Seconds and memory of the vision encoder with text-guided experts in half of its layers, beside the dense one.

    python benchmarks/benchmark_tgh_moe.py --layers 4 --slices 4

Both have the same weights and the same volume layers. Every volume has a guide and a task, so the shared group and a
task group both work: 4 experts each, one per token, of a quarter of the width. At most 1.2 times the dense encoder's
time is wanted. All of them run in turn, round by round, so that a busy minute of the machine falls on all; a ratio is
the median over the rounds of the ratios within a round. Where other work fills the cores, experts suffer most: they
are many small products whose threads wait for each other. Then set OMP_NUM_THREADS=1.

Memory is predicted from the config and measured in bytes that torch allocates above parameters, gradients and inputs
(on a CPU without the scratch space of its matrix library). Parameters must come out exactly, or the script fails.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from ct_moe.configuration_ct_moe import CTMoEVisionConfig
from ct_moe.modeling_ct_moe import CTMoEExperts, CTMoEVisionModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="of 24, at least 3; every layer costs the same")
    parser.add_argument("--slices", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--air", type=float, default=0.0, help="share of patches that are not routed; 0 costs most")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    dense, moe = (model.to(args.device, dtype) for model in _models(args.layers))
    config = moe.config

    grid = config.grid_size
    patch_mask = torch.rand(1, args.slices, grid, grid, device=args.device) >= args.air
    volume = {
        "pixel_values": torch.randn(1, args.slices, 3, config.image_size, config.image_size, dtype=dtype),
        "slice_positions": 5000 * torch.arange(args.slices, dtype=torch.int32).unsqueeze(0),
        "guide": torch.randn(1, config.guide_size),
        "task_index": torch.zeros(1, dtype=torch.long),
    }
    volume = {name: value.to(args.device) for name, value in volume.items()} | {"patch_mask": patch_mask}
    tokens = args.slices * config.num_slice_tokens
    routed = int(patch_mask.sum()) + args.slices * int(config.class_token)

    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"ViT-L/14-336, {args.layers} layers, {len(config.moe_layers)} of them with experts, {args.slices} slices,")
    print(f"{routed} of {tokens} tokens routed, {args.dtype}, {where}, {args.rounds} rounds\n")

    runs = {"dense": (dense, "eager"), "MoE, grouped_mm": (moe, "grouped_mm"), "MoE, eager": (moe, "eager")}
    flops = _flops(config, tokens, routed) / _flops(dense.config, tokens, routed)
    print(f"{'':36}{'median s':>10}{'fastest s':>11}{'ratio':>8}{'fastest':>9}{'FLOPs':>8}")
    for what, work in (("forward", _forward), ("forward + backward", _step)):
        calls = {name: partial(work, model, experts, volume) for name, (model, experts) in runs.items()}
        seconds = _measure(calls, args.rounds, args.device)
        base = seconds["dense"]
        for name, times in seconds.items():
            ratio = statistics.median(time / base_time for time, base_time in zip(times, base))
            print(
                f"{what + ', ' + name:36}{statistics.median(times):10.3f}{min(times):11.3f}{ratio:8.3f}"
                f"{min(times) / min(base):9.3f}{1 if name == 'dense' else flops:8.3f}"
            )

    for model in (dense, moe):
        model.zero_grad()
    print(f"\n{'':40}{'predicted':>14}{'measured':>14}{'ratio':>8}")
    _print_parameters(dense, moe)
    models = (dense, moe)
    peaks = [_memory(partial(_forward, model, "grouped_mm", volume), args.device)[0] for model in models]
    predicted = [_peak_bytes(model.config, tokens, routed, dtype) for model in models]
    _print_row("forward, peak of dense, bytes", predicted[0], peaks[0])
    _print_row("forward, peak of MoE, bytes", predicted[1], peaks[1])
    _print_row("forward, peak, MoE - dense, bytes", predicted[1] - predicted[0], peaks[1] - peaks[0])
    kept = [_memory(partial(_forward, model, "grouped_mm", volume, True), args.device)[1] for model in models]
    predicted = len(config.moe_layers) * _saved_bytes(config, tokens, routed, dtype)
    _print_row("kept for backward, MoE - dense, bytes", predicted, kept[1] - kept[0])
    print(f"kept for backward, MoE / dense: {kept[1] / kept[0]:.3f}")


def _models(layers: int) -> tuple[CTMoEVisionModel, CTMoEVisionModel]:
    """The dense encoder and the same one with experts, which a trained model would not have at zero."""
    half = list(range(layers // 2, layers))
    fields = {"num_hidden_layers": layers, "feature_layer": -1, "volume_layers": half, "num_tasks": 3}
    dense = CTMoEVisionModel(CTMoEVisionConfig(**fields, moe_layers=[]))
    moe = CTMoEVisionModel(CTMoEVisionConfig(**fields, moe_layers=half))
    loaded = moe.load_state_dict(dense.state_dict(), strict=False)
    if loaded.unexpected_keys or any(".moe." not in key for key in loaded.missing_keys):
        raise SystemExit(f"not the same model: {loaded}")
    for module in moe.modules():
        if isinstance(module, CTMoEExperts):
            torch.nn.init.normal_(module.down_proj, std=moe.config.initializer_range)
    return dense, moe


def _forward(model: CTMoEVisionModel, experts: str, volume: dict[str, torch.Tensor], training: bool = False):
    model.train(training).set_experts_implementation(experts)
    with torch.inference_mode(not training):
        return model(**volume)


def _step(model: CTMoEVisionModel, experts: str, volume: dict[str, torch.Tensor]) -> None:
    model.zero_grad()
    _forward(model, experts, volume, training=True).last_hidden_state.float().square().mean().backward()


def _measure(work: dict[str, Callable], rounds: int, device: str) -> dict[str, list[float]]:
    seconds = {name: [] for name in work}
    for number in range(rounds + 1):  # the first round warms up
        order = list(work) if number % 2 else list(reversed(work))
        for name in order:
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            work[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _memory(call: Callable, device: str) -> tuple[int, int]:
    """Bytes allocated by a call at its peak, and at its end while its result is held."""
    call()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = held = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak, held


def _flops(config: CTMoEVisionConfig, tokens: int, routed: int) -> int:
    """Multiplications and additions of the matrix products of one volume's forward. A backward has twice as many."""
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    slices = tokens // config.num_slice_tokens
    flops = 2 * slices * config.grid_size**2 * config.num_channels * config.patch_size**2 * width
    for layer in range(layers):
        keys = tokens if layer in config.volume_layers else config.num_slice_tokens
        flops += 2 * tokens * (4 * width**2 + 2 * width * inner) + 2 * tokens * keys * 2 * width
    pairs = _pairs(config, routed)
    flops += len(config.moe_layers) * 2 * pairs * 2 * width * config.moe_intermediate_size
    return flops + len(config.moe_layers) * 2 * tokens * width * (config.num_experts + config.num_task_experts)


def _pairs(config: CTMoEVisionConfig, routed: int) -> int:
    """Of a token and an expert: the shared group's experts and those of the volume's task."""
    return 2 * config.num_experts_per_tok * routed


def _parameters(config: CTMoEVisionConfig) -> dict[str, int]:
    """What the experts of one layer add."""
    width, inner, guide = config.hidden_size, config.moe_intermediate_size, config.guide_size
    experts = config.num_experts + config.num_task_experts * config.num_tasks
    groups = 1 + config.num_tasks
    return {
        "expert matrices": experts * 2 * width * inner,
        "expert biases": experts * (width + inner),
        "routers": experts * width + groups * width * guide + experts * guide,  # W, A, U
    }


def _peak_bytes(config: CTMoEVisionConfig, tokens: int, routed: int, dtype: torch.dtype) -> int:
    """Live at once in the last layer of an inference forward, in the FFN or in the experts, whichever has more.

    Below either: the layer's input, residual and normed input. Counted: tensors as wide as a token.
    """
    width = config.hidden_size
    ffn = tokens * 3 * config.intermediate_size * dtype.itemsize  # quick_gelu: its input, a factor, their product
    experts = 0
    if config.moe_layers:
        # Beside the FFN's output: the routed tokens; per pair, of the library's grouped_mm, the token, the bias of
        # the down projection, its output, that times its weight, and that in the tokens' order.
        rows = tokens + routed + 5 * _pairs(config, routed)
        experts = rows * width * dtype.itemsize
        if dtype != torch.float32:
            experts += tokens * width * torch.float32.itemsize  # the routers' input
    return tokens * 3 * width * dtype.itemsize + max(ffn, experts)


def _saved_bytes(config: CTMoEVisionConfig, tokens: int, routed: int, dtype: torch.dtype) -> int:
    """What autograd keeps per MoE layer. Counted: tensors as wide as a token or as an expert."""
    width, inner, pairs = config.hidden_size, config.moe_intermediate_size, _pairs(config, routed)
    routers = 2 * tokens * width * torch.float32.itemsize  # their input and its jitter
    # Per pair the token and the output before its weight; of quick_gelu its input, a factor and their product.
    experts = pairs * (2 * width + 3 * inner) * dtype.itemsize
    return routers + experts + routed * width * dtype.itemsize  # and the sum that is added to the FFN's output


def _print_parameters(dense: CTMoEVisionModel, moe: CTMoEVisionModel) -> None:
    config, layer = moe.config, moe.layers[-1].moe
    experts = dict(layer.experts.named_parameters())
    measured = {
        "expert matrices": sum(p.numel() for name, p in experts.items() if not name.endswith("_bias")),
        "expert biases": sum(p.numel() for name, p in experts.items() if name.endswith("_bias")),
        "routers": sum(p.numel() for name, p in layer.named_parameters() if not name.startswith("experts.")),
    }
    predicted = _parameters(config)
    for name, count in predicted.items():
        _print_row(f"{name} of a layer, parameters", count, measured[name])
    total = len(config.moe_layers) * sum(predicted.values())
    added = sum(p.numel() for p in moe.parameters()) - sum(p.numel() for p in dense.parameters())
    _print_row("all layers, parameters", total, added)
    _print_row("all layers, bytes", total * moe.dtype.itemsize, added * moe.dtype.itemsize)
    if measured != predicted or added != total:
        raise SystemExit("the parameters are not those that the config predicts")


def _print_row(name: str, predicted: int, measured: int) -> None:
    ratio = f"{measured / predicted:8.3f}" if predicted else ""
    print(f"{name:40}{predicted:14,}{measured:14,}{ratio}")


if __name__ == "__main__":
    main()
