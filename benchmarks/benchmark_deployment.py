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
"""What cheaper forms of a model cost in answers: one table of size, seconds and change.

    python benchmarks/benchmark_deployment.py --model examples/demo_model
    python benchmarks/benchmark_deployment.py --random 2048      # a language model of this width with random weights

Forms: float32 (to which the others are compared), bfloat16, the language model in 8 and 4 bits through bitsandbytes,
and bfloat16 with torch.compile. Every form reads the same phantoms. MB is all parameters and buffers; "report" the
seconds for a report of --tokens tokens, "encode" those for the scan alone, "first" those of the first report,
compilation included. "tokens" is the share of places in the float32 report at which the form would write the same next
token, given the same words before; "texts" the share of reports and answers that are the same to the letter.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from logging import ERROR, getLogger
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig
from transformers.utils import logging

from ct_moe import CTReportPipeline
from ct_moe.hub.conversion import convert_base
from ct_moe.hub.folder import load_folder
from ct_moe.hub.tiny_base import build_tiny_base
from ct_moe.trainers.phantoms.anatomy import draw_phantom
from ct_moe.volume_ct_moe import Volume


QUESTIONS = (None, "Is there a pleural effusion?", "Where is the lung nodule?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).parents[1] / "examples" / "demo_model"))
    parser.add_argument("--random", type=int, default=0, help="width of a random language model, in place of --model")
    parser.add_argument("--layers", type=int, default=8, help="of the random language model")
    parser.add_argument("--scans", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    logging.disable_progress_bar()
    getLogger("torch._dynamo").setLevel(ERROR)  # every graph break is a page
    warnings.simplefilter("ignore")
    volumes = [scan(seed) for seed in range(args.scans)]
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(Path(folder), args.random, args.layers) if args.random else args.model
        where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        print(
            f"{'random' if args.random else Path(model).name}, {where}, {args.scans} phantoms, {args.tokens} tokens\n"
        )
        print(f"{'':18}{'MB':>9}{'encode s':>10}{'report s':>10}{'first s':>9}{'tokens':>9}{'texts':>8}")
        reference = None
        for name, load in forms(model, args.device).items():
            try:
                reporter = load()
                row = measure(reporter, volumes, args, reference)
            except (ImportError, RuntimeError, NotImplementedError, ValueError) as error:
                print(f"{name:18}not run: {type(error).__name__}: {' '.join(str(error).split())[:90]}")
                continue
            reference = reference or row
            print(
                f"{name:18}{row['mb']:9.1f}{row['encode']:10.3f}{row['report']:10.3f}{row['first']:9.2f}"
                f"{row['tokens']:9.3f}{row['texts']:8.3f}"
            )


def forms(model: str, device: str) -> dict[str, Callable]:
    # The language model only: what sees the scan is small.
    skipped = [r"model\.(?!language_model\.).*", "lm_head"]
    eight = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    four = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=skipped,
    )
    open_ = partial(opened, model, device)
    return {
        "float32": partial(open_, "float32"),
        "bfloat16": partial(open_, "bfloat16"),
        "8 bit": partial(open_, "bfloat16", quantization_config=eight),
        "4 bit": partial(open_, "bfloat16", quantization_config=four),
        "bfloat16 compiled": partial(open_, "bfloat16", compiled=True),
    }


def opened(model: str, device: str, dtype: str, compiled: bool = False, **kwargs) -> CTReportPipeline:
    network, processor, _ = load_folder(model, dtype=dtype, device_map=device, **kwargs)
    if compiled:
        network.forward = torch.compile(network.forward, dynamic=True)
        network.model.vision_tower.forward = torch.compile(network.model.vision_tower.forward, dynamic=True)
    return CTReportPipeline(model=network, processor=processor, task="ct-report")


@torch.no_grad()
def measure(reporter: CTReportPipeline, volumes: list[Volume], args, reference: dict | None) -> dict:
    model, call = reporter.model, {"max_new_tokens": args.tokens}
    start = time.perf_counter()
    reporter(volumes[0], **call)
    first = time.perf_counter() - start
    texts, encode, report = [], [], []
    for volume in volumes:
        texts += [reporter(volume, question=question, **call)["text"] for question in QUESTIONS]
    exact = {"min_new_tokens": args.tokens, **call}
    for number in range(args.rounds):
        inputs = visual(reporter, volumes[number % len(volumes)])
        encode.append(seconds(lambda inputs=inputs: model.get_image_features(**inputs)))
        volume = volumes[number % len(volumes)]
        report.append(seconds(lambda volume=volume: reporter(volume, **exact)))
    bytes_ = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    row = {"mb": bytes_ / 1e6, "first": first, "all_texts": texts}
    row |= {"encode": statistics.median(encode), "report": statistics.median(report)}
    written = texts[:: len(QUESTIONS)] if reference is None else reference["all_texts"][:: len(QUESTIONS)]
    row["choices"] = [choices(reporter, volume, text) for volume, text in zip(volumes, written)]
    other = reference or row
    same = torch.cat([a == b for a, b in zip(row["choices"], other["choices"])])
    row["tokens"] = same.float().mean().item()
    row["texts"] = statistics.mean(a == b for a, b in zip(texts, other["all_texts"]))
    return row


def choices(reporter: CTReportPipeline, volume: Volume, text: str) -> torch.Tensor:
    """The next token that the model would write at every place of `text`."""
    inputs = reporter.preprocess([volume])["inputs"]
    words = reporter.processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], words], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs = {name: value.to(reporter.model.device) for name, value in inputs.items()}
    return reporter.model(**inputs).logits[0, -words.shape[1] - 1 :].argmax(dim=-1).cpu()


def visual(reporter: CTReportPipeline, volume: Volume) -> dict:
    inputs = reporter.preprocess([volume])["inputs"]
    device = reporter.model.device
    return {name: value.to(device) for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}


def seconds(work: Callable) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def scan(seed: int) -> Volume:
    phantom = draw_phantom(3_000_000 + seed, "test")
    return Volume(phantom.hu, phantom.spacing)


def random_model(folder: Path, width: int, layers: int) -> str:
    text = {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
    }
    base = build_tiny_base(folder / "base", text_model="llama", text=text)
    convert_base(base, folder / "model", parity=False, progress=False)
    return str(folder / "model")


if __name__ == "__main__":
    main()
