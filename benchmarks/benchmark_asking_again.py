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
"""What a second question about the same scan costs, beside the first, and whether its answer stays the same.

    python benchmarks/benchmark_asking_again.py --scan scan.nii.gz [--model examples/demo_model]

Visual work is counted in floating-point operations of vision encoder, guide and projector (with eager attention and
experts, whose products are all counted), and timed as it is used; both leave out reading and processing the scan,
which are done once. "features" is the largest difference of the visual tokens to those without the cache. "whole,
other words" is what this package does not do: the features of an earlier question of the same task, used again for
other words; the last line says how many of the answers that would change.
"""

import argparse
import statistics
import time
from copy import copy
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from ct_moe import load_volume
from ct_moe.configuration_ct_moe import CTMoEVisionConfig
from ct_moe.hub.app.answers import Reader
from ct_moe.hub.reusable_states import reusable_states


QUESTIONS = {
    "vqa_open": (
        "Is there a pleural effusion?",
        "Where is the lung nodule?",
        "Is there a liver lesion?",
        "How many liver lesions are there?",
        "Is there ascites?",
    ),
    "report": (None,),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scan", required=True)
    parser.add_argument("--model", default=str(Path(__file__).parents[1] / "examples" / "demo_model"))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    reader = Reader(args.model, dtype=args.dtype, max_new_tokens=48)
    volume = load_volume(args.scan)
    scan = reader.open(volume)
    tasks = [task for task in QUESTIONS if task in reader.reporter.model.config.tasks]
    questions = [(task, question) for task in tasks for question in QUESTIONS[task]]
    inputs = {question: visual_inputs(reader, scan, question, task) for task, question in questions}
    (first_task, first), *others = questions

    vision = reader.reporter.model.config.vision_config
    shape = tuple(inputs[first]["pixel_values"].shape[1:3])
    print(
        f"{Path(args.model).name}: {vision.num_read_layers} layers read, experts in {vision.moe_layers}, "
        f"{shape[0]} slices of {vision.grid_size**2} patches, {args.dtype}, {torch.get_num_threads()} threads"
    )
    kept = keep(reader, inputs[first])
    whole_flops, whole_seconds = flops(reader, inputs[first]), seconds(reader, inputs[first], args.rounds)
    print(f"\n{'':44}{'GFLOP':>9}{'ratio':>8}{'s':>9}{'ratio':>8}{'features':>10}{'answer':>9}")
    print(f"{'first question, ' + first_task:44}{whole_flops / 1e9:9.3f}{1:8.3f}{whole_seconds:9.4f}{1:8.3f}")
    for task, question in others:
        again = {**inputs[question], "pixel_values": None, **kept}
        count, duration = flops(reader, again), seconds(reader, again, args.rounds)
        difference = distance(encode(reader, again), encode(reader, inputs[question]))
        list(reader.ask(scan, question=first))
        *_, answer = reader.ask(scan, question=question)
        alone = reader.reporter(volume, question=question, max_new_tokens=48)
        name = f"{'same' if task == first_task else 'other'} task: {question or 'the report'}"
        print(
            f"{name[:43]:44}{count / 1e9:9.3f}{count / whole_flops:8.3f}{duration:9.4f}{duration / whole_seconds:8.3f}"
            f"{difference:10.1e}{'same' if answer['text'] == alone['text'] else 'DIFFERS':>9}"
        )
    print(f"{'a question that was asked before':44}{0:9.3f}{0:8.3f}")

    same_task = [question for task, question in others if task == first_task]
    changed = [question for question in same_task if approximate(reader, scan, first, question)]
    differences = [distance(encode(reader, inputs[first]), encode(reader, inputs[question])) for question in same_task]
    print(
        f"\nwhole, other words: visual tokens differ by up to {max(differences):.1e}, "
        f"{len(changed)} of {len(same_task)} answers change"
    )
    default_sizes()


def default_sizes() -> None:
    """The default settings on CLIP ViT-L/14-336, whose experts begin in the middle: by formula, without air."""
    config = CTMoEVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_attention_heads=16, image_size=336, patch_size=14,
        num_hidden_layers=24, feature_layer=-2, num_tasks=3,
    )  # fmt: skip
    width, first = config.hidden_size, min(config.moe_layers)
    print(f"\nViT-L/14-336, {config.num_read_layers} layers read, experts in {config.moe_layers}; a further question:")
    for slices in (16, 32, 64):
        tokens = slices * config.num_slice_tokens
        experts = 2 * tokens * 2 * (2 * width * config.moe_intermediate_size + config.num_experts * width)
        costs = []
        for layer in range(config.num_read_layers):
            keys = tokens if layer in config.volume_layers else config.num_slice_tokens
            dense = 2 * tokens * (4 * width**2 + 2 * width * config.intermediate_size + 2 * keys * width)
            costs.append(dense + experts * (layer in config.moe_layers))
        again, once = experts + sum(costs[first + 1 :]), sum(costs)
        last = experts / (once - experts * (len(config.moe_layers) - 1))
        print(f"{slices:>4} slices  {again / once:.3f} of the first, {last:.4f} with experts in the last layer alone")


def visual_inputs(reader: Reader, scan, question: str | None, task: str) -> dict:
    """What `get_image_features` is given for one question."""
    inputs = reader.reporter.preprocess([scan], question=question, task=task)["inputs"]
    return {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}


@torch.no_grad()
def encode(reader: Reader, inputs: dict):
    return reader.reporter.model.get_image_features(**inputs)


def keep(reader: Reader, inputs: dict) -> dict:
    return reusable_states(encode(reader, {**inputs, "output_prefix_hidden_states": True}))


def flops(reader: Reader, inputs: dict) -> int:
    tower = reader.reporter.model.model.vision_tower
    attention, experts = tower.config._attn_implementation, tower.config._experts_implementation
    tower.set_attn_implementation("eager")
    tower.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        encode(reader, inputs)
    tower.set_attn_implementation(attention)
    tower.set_experts_implementation(experts)
    return counter.get_total_flops()


def seconds(reader: Reader, inputs: dict, rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):  # the first one warms up
        start = time.perf_counter()
        encode(reader, inputs)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def distance(one, other) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one.pooler_output, other.pooler_output))


def approximate(reader: Reader, scan, first: str | None, question: str | None) -> bool:
    """Whether the answer changes when the features of `first` serve `question`."""
    model, answers = reader.reporter.model, []
    features = encode(reader, visual_inputs(reader, scan, first, None))
    inputs = reader.reporter.preprocess([scan], question=question)["inputs"]
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    own = encode(reader, {name: value for name, value in inputs.items() if name not in text})
    for each in (features, own):
        answers.append(model.generate(**text, mm_encoder_outputs={"image": copy(each)}, max_new_tokens=48).tolist())
    return answers[0] != answers[1]


if __name__ == "__main__":
    main()
