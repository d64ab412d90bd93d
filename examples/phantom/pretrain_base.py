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
"""Pretrain a small 2D base on single slices of phantoms with captions and questions: what CT-MoE then converts.

    ct-moe phantom phantoms --n 4000
    python examples/phantom/pretrain_base.py --data phantoms --out phantom-base

The base is a LLaVA (CLIP tower, MLP projector, Llama) in the library's own format, made as real ones are: the tower
learns to tell what the caption of a slice names, findings with their width, organs and phase, and which patches show
a small lesion; then all of it learns to caption and to answer from slices. It never sees two slices of one scan
together. Cut off, the same command goes on with the tower it has.

The language models that people convert know the words of their field before they see a volume, and so does this one:
beside every slice it reads a training row without its scan.
"""

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from torch.utils.data import Dataset, WeightedRandomSampler
from tqdm.auto import tqdm
from transformers import AutoProcessor, LlavaForConditionalGeneration, Trainer, TrainingArguments

from ct_moe import CTMoEError, CTMoEImageProcessor, DataError
from ct_moe.hub.folder import new_folder
from ct_moe.hub.tiny_base import build_tiny_base
from ct_moe.image_processing_ct_moe import REFERENCE_FIELD_MM
from ct_moe.trainers.native_bfloat16 import has_native_bfloat16
from ct_moe.trainers.phantoms.labels import FINDINGS, PHASES
from ct_moe.trainers.phantoms.texts import (
    GROWING,
    SIDED,
    slice_findings,
    slice_organs,
    slice_texts,
    slice_widths,
)
from ct_moe.trainers.volume_cache import VolumeCache


# Of the base and of every model that is made from it.
VISION = {
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 5,  # four are read
    "num_attention_heads": 6,
    "image_size": 128,
    "patch_size": 16,
}
TEXT = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
}
SMALL = ("nodule", "liver lesion", "renal stone")  # the tower also tells which patches show one
SHIFT = 16  # pixels at most, of a slice that the tower sees, up, down and sideways
WIDTHS = (20, 30, 40, 50, 60)  # mm of a finding that may widen: the tower tells which of them it reaches in a slice
SLICES = {"slab_mm": 18.0, "max_slices": 24, "slab_reduction": ("mean", "mean", "max"), "crop_body": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder written by ct-moe phantom")
    parser.add_argument("--out", required=True, type=Path, help="new folder for the base")
    parser.add_argument("--scans", type=int, default=None, help="use the slices of so many training scans")
    parser.add_argument("--tower-steps", type=int, default=8000, help="of the tower alone")
    parser.add_argument("--tower-batch", type=int, default=256, help="slices in each of them")
    parser.add_argument("--steps", type=int, default=1400, help="of the whole base")
    parser.add_argument("--batch", type=int, default=64, help="slices in each of them")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        pretrain(args)
    except CTMoEError as error:
        sys.exit(f"pretrain_base: error: {error}")


def pretrain(args: argparse.Namespace) -> None:
    """Build the base and train its parts; every finished part is kept in OUT-training until all are done."""
    work = args.out.with_name(f"{args.out.name}-training")
    dataset = SliceTexts(args.data, args.scans, args.seed)
    if not (work / "base").exists():
        build_tiny_base(
            work / "base", text_model="llama", vision=VISION, text=TEXT, seed=args.seed, sentences=dataset.sentences()
        )
    dataset.processor = AutoProcessor.from_pretrained(work / "base")
    model = LlavaForConditionalGeneration.from_pretrained(work / "base", dtype=torch.float32)
    torch.manual_seed(args.seed)
    if args.tower_steps:
        # Named after all that it depends on: another run's tower is not taken for this one's.
        settings = (args.tower_steps, args.tower_batch, args.lr, args.seed, args.scans)
        tower = f"tower-{'-'.join(map(str, settings))}.safetensors"
        with kept(model.model.vision_tower, work / tower) as missing:
            if missing:
                pretrain_tower(model.model.vision_tower, dataset, args.tower_steps, args.tower_batch, args.lr)
    if args.steps:
        train(model, dataset, work, args)
    with new_folder(args.out) as folder:
        shutil.copytree(work / "base", folder, dirs_exist_ok=True)
        model.save_pretrained(folder)
    shutil.rmtree(work)


@contextmanager
def kept(module: torch.nn.Module, file: Path) -> Iterator[bool]:
    """Load a trained part, or yield True for it to be trained and then keep it."""
    if file.is_file():
        load_model(module, file)
        yield False
        return
    yield True
    save_model(module, file.with_suffix(".part"))
    file.with_suffix(".part").replace(file)


def train(model: LlavaForConditionalGeneration, dataset: "SliceTexts", work: Path, args: argparse.Namespace) -> None:
    """The whole base with the library's Trainer, its tower at a fifth of the learning rate."""
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        max_grad_norm=1.0,
        bf16=has_native_bfloat16("cuda" if torch.cuda.is_available() else "cpu"),
        use_cpu=not torch.cuda.is_available(),
        logging_steps=25,
        save_strategy="no",
        report_to="none",
        dataloader_num_workers=min(8, os.cpu_count() // 2),
        remove_unused_columns=False,
        seed=args.seed,
    )
    tower = list(model.model.vision_tower.parameters())
    rest = [parameter for name, parameter in model.named_parameters() if "vision_tower" not in name]
    optimizer = torch.optim.AdamW([{"params": rest}, {"params": tower, "lr": args.lr / 5}], args.lr, weight_decay=0.05)
    BalancedTrainer(
        model, arguments, train_dataset=dataset, data_collator=dataset.collate, optimizers=(optimizer, None)
    ).train()


def pretrain_tower(tower: torch.nn.Module, dataset: "SliceTexts", steps: int, batch_size: int, lr: float) -> None:
    """Teach the vision tower what a slice shows: findings (by side), organs, phase, and small lesions by patch.

    Slices are shifted at random, so that it learns what lesions look like and not which slices have some. The head is
    thrown away. On a GPU all slices are there at once, 2.4 GB for 1000 scans.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tower.to(device)
    images, targets, lesions = (part.to(device) for part in (dataset.pixel_values, dataset.targets, dataset.lesions))
    head = torch.nn.Linear(VISION["hidden_size"], targets.shape[1] + len(SMALL), device=device)
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    order = torch.tensor(list(dataset.sampler(batch_size * steps)), device=device).split(batch_size)
    for batch in tqdm(order, desc="vision tower"):
        offsets = torch.randint(-SHIFT, SHIFT + 1, (len(batch), 2), device=device)
        pixel_values = shifted(images[batch], offsets)
        loss = sum(tower_losses(tower, head, pixel_values, targets[batch], shown(lesions[batch], offsets)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    tower.to("cpu")
    print(f"vision tower: loss {loss.item():.4f} in the last step")


def tower_losses(tower, head, pixel_values, targets, patches) -> tuple[torch.Tensor, torch.Tensor]:
    """Of what slices show, `targets` of `(batch, targets)`, and of small lesions, `patches` as `shown` gives them.

    A linear head scores every patch, and a sharp log-mean-exp over patches scores the slice.
    """
    device = pixel_values.device
    with torch.autocast(device.type, torch.bfloat16, enabled=has_native_bfloat16(device)):
        outputs = tower(pixel_values.float(), output_hidden_states=True)
        scores = head(outputs.hidden_states[-2][:, 1:]).float()  # what a LLaVA reads, without the class token
    scores, small = scores.split([targets.shape[1], len(SMALL)], dim=2)
    scores = ((4 * scores).logsumexp(1) - math.log(scores.shape[1])) / 4
    score = torch.nn.functional.binary_cross_entropy_with_logits
    rare = scores.new_tensor(8.0)  # one or two patches of 64 show a lesion
    return score(scores, targets), score(small, patches, pos_weight=rare)


def shifted(images: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """`(batch, 3, height, width)`, moved up and left by `(batch, 2)` pixels; what comes in repeats the edge."""
    size = images.shape[-1]
    rows, columns = ((torch.arange(size, device=images.device) + by[:, None]).clamp(0, size - 1) for by in offsets.T)
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    return images[batch, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def shown(lesions: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Which patches show a small lesion, `(batch, patches, SMALL)`: those within 0.4 radii of its middle.

    Args:
        lesions: `(batch, lesions, 4)`: index in `SMALL` or -1 for none, y, x and radius in pixels before the shift.
        offsets: `(batch, 2)`, by which it was `shifted`.
    """
    patch = VISION["patch_size"]
    edges = torch.arange(0, VISION["image_size"], patch, device=lesions.device)
    middles = lesions[..., 1:3] - offsets[:, None]
    gaps = torch.maximum(edges - middles[..., None], middles[..., None] - edges - patch).clamp(min=0)
    away = gaps[..., 0, :, None].hypot(gaps[..., 1, None, :]).flatten(2)  # (batch, lesions, patches)
    inside = away < 0.4 * lesions[..., 3:]
    kinds = torch.arange(len(SMALL), device=lesions.device)
    return (inside[..., None] & (lesions[..., :1, None] == kinds)).any(1).float()


class BalancedTrainer(Trainer):
    """Draws slices so that rare findings are as frequent as common ones."""

    def _get_train_sampler(self, *args, **kwargs):
        return self.train_dataset.sampler(len(self.train_dataset))


class SliceTexts(Dataset):
    """Slabs of training scans, each with a conversation about it, and a training row whose scan is not shown."""

    def __init__(self, data: Path, scans: int | None, seed: int):
        labels = data / "train_labels.jsonl"
        if not labels.is_file():
            raise DataError(str(labels), "is not there", "Write phantoms first: ct-moe phantom OUT --n 4000")
        with labels.open(encoding="utf-8") as file:
            self.labels = [json.loads(line) for line, _ in zip(file, range(scans or 10**9))]
        self.seed, self.processor = seed, None
        self.cache = VolumeCache(data / "slices", image_processor())
        paths = [data / labels["images"] for labels in self.labels]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            read = list(tqdm(threads.map(self._read, paths), total=len(paths), desc="slices"))
        self.fields = [field for _, field in read]
        slabs = [pixel_values for pixel_values, _ in read]
        del read
        self.places = [(scan, slab, len(rows)) for scan, rows in enumerate(slabs) for slab in range(len(rows))]
        self.pixel_values = slabs[0].new_empty((len(self.places), *slabs[0].shape[1:]))
        first = 0
        while slabs:  # not torch.cat: several GB would be in memory twice
            rows = slabs.pop(0)
            self.pixel_values[first : first + len(rows)] = rows
            first += len(rows)
        self.targets, self.num_findings = self._targets()
        self.lesions = self._small_lesions()
        self.rows = self._train_rows()

    def _read(self, path: Path) -> tuple[torch.Tensor, float]:
        """Slabs of a scan, and how many mm they are wide."""
        row = self.cache.read(str(path))
        field_mm = REFERENCE_FIELD_MM * math.exp(row["volume_scale"][0])
        return torch.from_numpy(row["pixel_values"]).bfloat16(), field_mm

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict:
        return {
            "pixel_values": self.pixel_values[index],
            "conversation": self.conversation(index),
            "row": self.rows[torch.randint(len(self.rows), ()).item()],
        }

    def slab(self, index: int) -> tuple[dict, float, float]:
        """Labels of its scan, and its ends."""
        scan, slab, count = self.places[index]
        return self.labels[scan], slab / count, (slab + 1) / count

    def conversation(self, index: int, salt: int | None = None) -> list[tuple[str, str]]:
        # Other wordings every time: torch seeds every worker and epoch anew.
        rng = np.random.default_rng(torch.randint(2**31, ()).item() if salt is None else [salt, index])
        pairs = slice_texts(*self.slab(index), rng)
        rng.shuffle(pairs)
        return pairs

    def _targets(self) -> tuple[torch.Tensor, int]:
        """What the caption of every slab names, `(slabs, targets)` of 0 and 1, and how many of these are findings."""
        findings = [(name, side) for name in FINDINGS for side in (("left", "right") if name in SIDED else (None,))]
        rows = []
        for index in range(len(self)):
            labels, *ends = self.slab(index)
            seen = slice_findings(labels, *ends)
            row = [
                any(name == other and (side is None or lesion["side"] in (side, "both")) for other, lesion in seen)
                for name, side in findings
            ]
            widths, organs = slice_widths(seen, *ends), slice_organs(labels, *ends)
            row += [widths.get(name, 0) >= least for name in GROWING for least in WIDTHS]
            row += [organ in organs for organ in labels["organ_areas"]]
            rows.append(row + [labels["phase"] == phase for phase in PHASES])
        return torch.tensor(rows, dtype=torch.float32), len(findings)

    def _small_lesions(self) -> torch.Tensor:
        """Of every slab, as `shown` takes them: slices are cropped around the body, whose middle is at 0 mm."""
        size = VISION["image_size"]
        rows = []
        for index, (scan, *_) in enumerate(self.places):
            pixels = size / self.fields[scan]  # in one mm
            rows.append(
                [
                    (
                        SMALL.index(name),
                        *(size / 2 + pixels * mm for mm in lesion["centre"][1:]),
                        pixels * lesion["size_mm"] / 2,
                    )
                    for name, lesion in slice_findings(*self.slab(index))
                    if name in SMALL
                ]
            )
        most = max(1, *map(len, rows))
        return torch.tensor([row + [(-1, 0, 0, 0)] * (most - len(row)) for row in rows], dtype=torch.float32)

    def sampler(self, num_samples: int) -> WeightedRandomSampler:
        """Half of the draws by finding, each finding and side as often as any other, half from all slabs."""
        shown = self.targets[:, : self.num_findings]
        share = shown / shown.sum(0).clamp(min=1)
        weights = share.sum(1) / self.num_findings + 1 / len(self)
        return WeightedRandomSampler(weights.double(), num_samples)

    def sentences(self) -> list[str]:
        """The text that the tokenizer learns from: of these slabs and of the rows about whole scans."""
        texts = [text for i in range(0, len(self), 3) for pair in self.conversation(i, self.seed) for text in pair]
        return texts + [text for row in self.rows for text in row]

    def _train_rows(self) -> list[tuple[str, str]]:
        """(prompt, completion) of all rows about these scans."""
        scans = {labels["images"] for labels in self.labels}
        with (self.cache.folder.parent / "train.jsonl").open(encoding="utf-8") as file:
            return [(row["prompt"], row["completion"]) for row in map(json.loads, file) if row["images"] in scans]

    def collate(self, items: list[dict]) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        image = "<image>" * (VISION["image_size"] // VISION["patch_size"]) ** 2 + "\n"
        conversations = [(image, item["conversation"]) for item in items]
        conversations += [("", [item["row"]]) for item in items]
        encoded = []
        for image, conversation in conversations:
            ids, labels = [], []
            for prompt, answer in conversation:
                asked = tokenizer(f"<|user|>\n{image}{prompt}<|end|>\n<|assistant|>\n")["input_ids"]
                said = tokenizer(f"{answer}<|end|>")["input_ids"]
                gap = tokenizer("\n")["input_ids"]
                ids += asked + said + gap
                labels += [-100] * len(asked) + said + [-100] * len(gap)
                image = ""
            encoded.append((ids, labels))
        length = max(len(ids) for ids, _ in encoded)
        pad = tokenizer.pad_token_id
        return {
            "pixel_values": torch.stack([item["pixel_values"] for item in items]).float(),
            "input_ids": torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in encoded]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in encoded]),
            "labels": torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in encoded]),
        }


def image_processor() -> CTMoEImageProcessor:
    """The image processor that models made from this base have."""
    size = VISION["image_size"]
    return CTMoEImageProcessor(size={"height": size, "width": size}, patch_size=VISION["patch_size"], **SLICES)


if __name__ == "__main__":
    main()
