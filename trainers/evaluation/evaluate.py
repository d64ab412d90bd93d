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
"""A model, or predictions made elsewhere, on a data set: `evaluate` writes answers, scores and a picture.

```
OUT.json                   scores, intervals, counts, baselines, and the model-index of a model card
OUT.predictions.jsonl      what was said to every row
OUT.blind.jsonl            the same of the model that was shown air, for that baseline
OUT.png                    accuracy by type of question, where matplotlib is installed
```

The same arguments give the same OUT.json, however often the run was killed and however many processes shared it.
"""

import csv
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ct_moe import DataError

from ..data_sets.catalogue import DATA_SETS, find_data_set, read_items
from ..data_sets.ct_rate import read_labels
from ..data_sets.item import BadRow, Item
from ..phantoms.controls import blind
from ..volume_cache import VolumeCache
from .abnormality_labels import classifier_labels, rule_labels
from .baselines import labels_to_template, majority, nearest_reports
from .model_scorers import find_scorer
from .plots import plot_kinds
from .predictions import predict
from .results import model_index, score_predictions


BASELINES = ("majority", "blind", "nearest", "labels")


def evaluate(
    out: str | Path,
    *,
    model: str | None = None,
    data: str | None = None,
    root: str | Path | None = None,
    split: str | None = None,
    predictions: str | Path | None = None,
    baselines: Sequence[str] = ("majority",),
    rows: int | None = None,
    labeller: str | None = None,
    scorers: Sequence[str] = (),
    meteor: bool | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    batch_size: int = 8,
    volume_cache: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Answer a split and score the answers, or score answers that are there.

    Args:
        out: results file, .json. Answers lie beside it; an unfinished run goes on with them.
        model: folder or Hub id of a CT-MoE model.
        data, root, split: as in `read_items`; by default the test split, else the validation split.
        predictions: answers of any system instead of a model: JSONL or CSV with `id` and `prediction`. Without `data`
            each line also has `reference`, and `choices`, `answer`, `task`, `kind`, `patient` where they are wanted.
        baselines: names from `BASELINES`. "majority" and "nearest" read the training split too; "blind" asks the model
            again; "labels" needs a data set with labels.
        rows: so many rows of the split, chosen by their ids, the same every time.
        labeller: folder or Hub id of a report classifier for the 18 labels of CT-RATE, by default built-in rules.
        scorers: further metrics, as `find_scorer` takes them: `bertscore=FOLDER`, `module:function` and others.
        meteor: as in `text_scores`.
        revision, dtype: of the model.
        batch_size: rows that go through the model together. It is part of what a run is: another one starts anew.
        volume_cache: folder for processed scans.
        progress: whether to show bars.

    Returns:
        What OUT.json holds. With several processes every one of them returns it; the first one writes.

    Raises:
        DataError: as in `read_items` and `predict`, or answers are missing.
        ModelError: the model cannot be loaded.
    """
    out = Path(out)
    if (model is None) == (predictions is None):
        raise DataError("model", "is missing" if model is None else "comes with predictions", "Give one of the two")
    if out.suffix != ".json" or not out.parent.is_dir():
        raise DataError(str(out), "is no .json file in a folder that exists", "Name one, such as results.json")
    if unknown := [name for name in baselines if name not in BASELINES]:
        raise DataError("baselines", f"{unknown[0]!r} is unknown", f"Use {', '.join(BASELINES)}")
    if data is None and (model is not None or baselines):
        raise DataError("data", "is missing", f"Name one of {', '.join(DATA_SETS)} and its folder")
    state = PartialState(cpu=not torch.cuda.is_available())
    extra = dict(find_scorer(name) for name in scorers)

    about: dict[str, Any] = {}
    bad: list[BadRow] = []
    texts: list[str | None]
    if data is not None:
        known = find_data_set(data)
        split = split or ("test" if "test" in known.splits else "validation")
        items, bad = _read(data, root, split, rows)
        about = {"data": data, "title": known.title, "licence": known.licence, "split": split, "rows": rows}
    if predictions is not None:
        said = _read_predictions(Path(predictions))
        if data is None:
            items = [_own_item(Path(predictions), line, row) for line, row in said]
            texts = [row["prediction"] for _, row in said]
        else:
            by_id = {str(row.get("id")): row["prediction"] for _, row in said}
            if missing := [item.id for item in items if item.id not in by_id]:
                finding = f"{len(missing)} of {len(items)} rows have no prediction, the first is {missing[0]}"
                raise DataError(str(predictions), finding, "Predict them; an empty text counts as wrong")
            texts = [by_id[item.id] for item in items]
        system: dict[str, Any] = {"predictions": Path(predictions).name}
        network = processor = cache = None
    else:
        from ct_moe.hub.folder import load_folder

        network, processor, commit = load_folder(model, revision=revision, dtype=dtype)
        network.to(state.device)
        if data is not None and processor.image_processor.intensity != known.intensity:
            finding = f"its scans are {known.intensity!r}, the model's image processor takes {_intensity(processor)!r}"
            raise DataError(data, finding, "Train a model with that intensity, or choose other data")
        cache = None if volume_cache is None else VolumeCache(volume_cache, processor.image_processor)
        name = Path(model).name if Path(model).is_dir() else model
        system = {"model": name, "revision": commit, "weights": _weights(model), "dtype": dtype}
        system["scope"] = network.config.intended_scope
        settings = {"batch_size": batch_size, "volume_cache": cache, "progress": progress}
        asked = {**about, **system}
        answers = predict(network, processor, items, out.with_suffix(".predictions.jsonl"), about=asked, **settings)
        texts = [answer.text for answer in answers]
        if "blind" in baselines:
            shown = blind(processor.image_processor)
            blind_texts = predict(
                network,
                processor,
                items,
                out.with_suffix(".blind.jsonl"),
                about={**asked, "control": "blind"},
                change=lambda scan: shown(scan, {}),
                **settings,
            )

    labels = _labels(data, root, split)
    find_labels = rule_labels if labeller is None else classifier_labels(labeller)
    scoring = {"labels": labels, "labeller": find_labels, "scorers": extra, "meteor": meteor}
    result = {"about": about, "system": system, **score_predictions(items, texts, **scoring)}
    result["counts"]["bad_rows"] = len(bad)
    result["bad_rows"] = [f"{Path(row.file).name}, line {row.line}: {row.finding}" for row in bad]
    if predictions is None:
        result["unanswered"] = [answer.id for answer in answers if answer.text is None]
    found: dict[str, list[str | None]] = {}
    if {"majority", "nearest"} & set(baselines):
        train, _ = _read(data, root, known.splits[0], None)
        if "majority" in baselines:
            found["majority"] = list(majority(train, items))
    if "blind" in baselines:
        if network is None:
            raise DataError("baseline blind", "needs the model", "Leave it out with predictions")
        found["blind"] = [answer.text for answer in blind_texts]
    if "nearest" in baselines:
        found["nearest"] = nearest_reports(train, items, _reader(processor, cache, known.intensity), progress)
    if "labels" in baselines:
        if not labels:
            raise DataError("baseline labels", f"{data} has no labels in {root}", "Leave it out, or download them")
        found["labels"] = labels_to_template(items, labels)
    result["baselines"] = {}
    for name, said in found.items():
        # A baseline is scored on the rows that it answers: nearest and labels on reports alone.
        kept = [row for row, text in enumerate(said) if text is not None]
        if kept:
            scores = score_predictions([items[row] for row in kept], [said[row] for row in kept], **scoring)
            result["baselines"][name] = scores
    if data is not None:
        shown = {"name": system.get("model", "predictions"), "data": known.title, "data_id": known.url or data}
        result["model_index"] = model_index(result, split=split, **shown)
    if state.is_main_process:
        part = out.with_name(f"{out.name}.part")
        part.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(part, out)
        plot_kinds(result, out.with_suffix(".png"))
    state.wait_for_everyone()
    return result


def _read(data: str, root, split: str, rows: int | None) -> tuple[list[Item], list[BadRow]]:
    if root is None:
        raise DataError("root", "is missing", f"Name the folder of {data}")
    items: list[Item] = []
    bad: list[BadRow] = []
    for item in read_items(data, root, split):
        (items if isinstance(item, Item) else bad).append(item)
    if rows is not None:
        chosen = sorted(items, key=lambda item: hashlib.sha256(item.id.encode()).digest())[:rows]
        kept = {item.id for item in chosen}
        items = [item for item in items if item.id in kept]
    if not items:
        raise DataError(str(root), f"{data} has no row that can be used in {split}", "Run: ct-moe check")
    return items, bad


def _read_predictions(file: Path) -> list[tuple[int, dict[str, Any]]]:
    """Lines with `prediction`; those of `predict` call it `text`."""
    found: list[tuple[int, dict[str, Any]]] = []
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            if file.suffix.lower() == ".csv":
                read = [(number, dict(row)) for number, row in enumerate(csv.DictReader(lines), 2)]
            else:
                read = [(number, json.loads(line)) for number, line in enumerate(lines, 1) if line.strip()]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise DataError(str(file), f"cannot be read ({type(error).__name__})", "Write JSONL or CSV") from error
    for line, row in read:
        if not isinstance(row, dict):
            raise DataError(str(file), f"line {line} is no JSON object", "Write one object per line")
        if "about" in row and "asked" in row:  # the first line of what `predict` writes
            continue
        text = row.get("prediction", row.get("text"))
        if text is not None and not isinstance(text, str):
            raise DataError(str(file), f"line {line} has a prediction that is no text", "Write texts")
        if "prediction" not in row and "text" not in row:
            raise DataError(str(file), f"line {line} has no prediction", "Name the column prediction")
        found.append((line, {**row, "prediction": text}))
    ids = [str(row["id"]) for _, row in found if row.get("id") is not None]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise DataError(str(file), f"has two predictions for {twice}", "Keep one of them")
    if not found:
        raise DataError(str(file), "holds no predictions", "Write one per line")
    return found


def _own_item(file: Path, line: int, row: dict[str, Any]) -> Item:
    choices, answer, reference = row.get("choices"), row.get("answer"), row.get("reference")
    if isinstance(choices, str):
        choices = [part.strip() for part in choices.split("|")] if choices else None
    if choices is not None and (not isinstance(choices, list) or answer not in choices):
        raise DataError(str(file), f"line {line}: the answer is none of the choices", "Repair the line")
    reference = reference or answer
    if not isinstance(reference, str) or not reference.strip():
        raise DataError(str(file), f"line {line} has no reference", "Write one, or name the data set")
    task = str(row.get("task") or ("vqa_closed" if choices else "vqa_open"))
    return Item(
        id=str(row.get("id") or line),
        images=[],
        prompt="",
        completion=reference,
        task=task,
        kind=str(row.get("kind") or task),
        patient=str(row.get("patient") or row.get("id") or line),
        where=(str(file), line),
        answer=answer if choices else None,
        choices=choices,
    )


def _labels(data: str | None, root, split: str | None) -> dict[str, list[int]] | None:
    """True abnormalities by item id, where the data set has them and they were downloaded."""
    if data != "ct-rate":
        return None
    try:
        labels = read_labels(Path(root), split)
    except DataError as error:
        if "no such file" in error.finding:
            return None
        raise
    return {f"ct-rate-{name.removesuffix('.nii.gz')}": values for name, values in labels.items()}


def _reader(processor, cache, intensity: str) -> Callable[[str], dict]:
    """Processed scans for the baseline that compares them, with or without a model."""
    if cache is not None:
        return cache.read
    if processor is not None:
        return processor.image_processor.process_volume
    from ct_moe import CTMoEImageProcessor

    return CTMoEImageProcessor(size={"height": 32, "width": 32}, patch_size=16, intensity=intensity).process_volume


def _intensity(processor) -> str:
    return processor.image_processor.intensity


def _weights(model: str) -> str | None:
    """Hash of a folder's weights: answers of a model that was trained on are another model's."""
    if not Path(model).is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(Path(model).glob("*.safetensors")):
        with file.open("rb") as content:
            while chunk := content.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()
