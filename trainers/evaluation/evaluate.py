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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ct_moe import DataError

from ..data_sets.catalogue import DATA_SETS, find_data_set, read_items
from ..data_sets.ct_rate import labels_file, read_labels
from ..data_sets.item import BadRow, Item
from ..data_sets.own import are_choices
from ..phantoms.controls import blind
from ..volume_cache import VolumeCache
from .abnormality_labels import classifier_labels, rule_labels
from .baselines import labels_to_template, majority, nearest_reports
from .model_scorers import find_scorer
from .plots import plot_kinds
from .predictions import MAX_NEW_TOKENS, predict
from .results import model_index, score_predictions
from .text_metrics import text_scores


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
    max_new_tokens: int | None = None,
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
        batch_size: rows that go through the model together. Part of what a run is: one with another is not gone on.
        max_new_tokens: longest answer; by default `MAX_NEW_TOKENS` by task.
        volume_cache: folder for processed scans.
        progress: whether to show bars.

    Returns:
        What OUT.json holds. With several processes the first one scores and writes; the others return nothing.

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
    if "blind" in baselines and model is None:
        raise DataError("baseline blind", "needs the model", "Leave it out with predictions")
    state = PartialState(cpu=not torch.cuda.is_available())

    # What could fail later fails now, before hours of answering.
    about: dict[str, Any] = {}
    bad: list[BadRow] = []
    labels = None
    if data is not None:
        known = find_data_set(data)
        split = split or ("test" if "test" in known.splits else "validation")
        items, bad = _read(data, root, split, rows)
        about = {"data": data, "title": known.title, "licence": known.licence, "split": split, "rows": rows}
        labels = _labels(data, root, split)
        _check_baselines(baselines, items, labels, data, root)
    scoring: dict[str, Any] = {"meteor": meteor}
    if state.is_main_process:
        text_scores(["-"], ["-"], meteor=meteor)  # are its libraries there?
        scoring |= {"labels": labels, "scorers": dict(find_scorer(name) for name in scorers)}
        scoring["labeller"] = rule_labels if labeller is None else classifier_labels(labeller)

    texts: list[str | None]
    said: dict[str, list[str | None]] = {}
    read = None
    if predictions is not None:
        system: dict[str, Any] = {"predictions": Path(predictions).name}
        found = _read_predictions(Path(predictions))
        if data is None:
            items = [_own_item(Path(predictions), line, row) for line, row in found]
            texts = [row["prediction"] for _, row in found]
        else:
            texts = _of_items(items, found, Path(predictions))
    else:
        from ct_moe.hub.folder import load_folder

        network, processor, commit = load_folder(model, revision=revision, dtype=dtype)
        network.to(state.device)
        images = processor.image_processor
        if known.intensity not in (None, images.intensity):
            finding = f"its scans are {known.intensity!r}, the model's image processor takes {images.intensity!r}"
            raise DataError(data, finding, "Train a model with that intensity, or choose other data")
        cache = None if volume_cache is None else VolumeCache(volume_cache, images)
        read = images.process_volume if cache is None else cache.read
        system = {"model": Path(model).name if Path(model).is_dir() else model, "revision": commit}
        system |= {"files": _hash(model), "dtype": dtype, "scope": network.config.intended_scope}
        settings = {"batch_size": batch_size, "volume_cache": cache, "progress": progress}
        if max_new_tokens is not None:
            settings["max_new_tokens"] = dict.fromkeys(MAX_NEW_TOKENS, max_new_tokens)
        answering = {**about, **system}
        answers = predict(
            network, processor, items, out.with_suffix(".predictions.jsonl"), about=answering, **settings
        )
        texts = [answer.text for answer in answers]
        if "blind" in baselines:
            air, file = blind(images), out.with_suffix(".blind.jsonl")
            shown = {"about": {**answering, "control": "blind"}, "change": lambda scan: air(scan, {})}
            said["blind"] = [answer.text for answer in predict(network, processor, items, file, **shown, **settings)]
    if not state.is_main_process:
        return {}

    if "majority" in baselines:
        said["majority"] = list(majority(_train(data, root, items), items))
    if "nearest" in baselines:
        reports = (item for item in _train(data, root, items) if item.task == "report")
        said["nearest"] = nearest_reports(reports, items, read or _reader(known.intensity), progress)
    if "labels" in baselines:
        said["labels"] = labels_to_template(items, labels)
    result = {"about": about, "system": system, **score_predictions(items, texts, **scoring)}
    left_out = [row for row in bad if row.is_left_out]
    bad = [row for row in bad if not row.is_left_out]
    result["counts"] |= {"bad_rows": len(bad), "left_out": len(left_out)}
    result["bad_rows"] = [f"{Path(row.file).name}, line {row.line}: {row.finding}" for row in bad]
    result["unanswered"] = [item.id for item, text in zip(items, texts) if text is None]
    result["baselines"] = {}
    for name in [name for name in BASELINES if name in said]:
        # On the rows that both answer: nearest and labels write reports alone.
        kept = [row for row, text in enumerate(said[name]) if text is not None and texts[row] is not None]
        if kept:
            rows_of = [items[row] for row in kept], [said[name][row] for row in kept]
            result["baselines"][name] = score_predictions(*rows_of, **scoring)
    if data is not None:
        named = {"name": system.get("model", "predictions"), "data": known.title}
        named["data_id"] = known.url.removeprefix("https://huggingface.co/datasets/") or data
        result["model_index"] = model_index(result, split=split, **named)
    part = out.with_name(f"{out.name}.part")
    part.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(part, out)
    plot_kinds(result, out.with_suffix(".png"))
    return result


def _check_baselines(baselines: Sequence[str], items: list[Item], labels, data: str, root) -> None:
    if {"nearest", "labels"} & set(baselines) and not any(item.task == "report" for item in items):
        name = "nearest" if "nearest" in baselines else "labels"
        raise DataError(f"baseline {name}", f"{data} has no reports", "Leave it out")
    if "labels" in baselines and not labels:
        raise DataError("baseline labels", f"{data} has no labels in {root}", "Leave it out, or download them")
    if {"majority", "nearest"} & set(baselines):
        next(_train(data, root, items), None)  # is it there, and is it another one?


def _train(data: str, root, items: Sequence[Item]) -> Iterator[Item]:
    """Items of the training split, which must not be those that are scored."""
    split = find_data_set(data).splits[0]
    scored = {item.id for item in items}
    for item in read_items(data, root, split):
        if isinstance(item, Item):
            if item.id in scored:
                finding = "its training rows are those that are scored"
                raise DataError(data, finding, "Leave out majority and nearest, or name a folder with a training file")
            yield item


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
    if choices is not None and (not are_choices(choices) or answer not in choices):
        raise DataError(str(file), f"line {line}: no two to four choices with the answer", "Repair it")
    reference = reference or answer
    if not isinstance(reference, str) or not reference.strip():
        raise DataError(str(file), f"line {line} has no reference", "Write one, or name the data set")
    task = str(row.get("task") or ("vqa_closed" if choices else "vqa_open"))
    return Item(
        id=str(line if row.get("id") is None else row["id"]),
        images=[],
        prompt="",
        completion=reference,
        task=task,
        kind=str(row.get("kind") or task),
        patient=str(next((row[key] for key in ("patient", "id") if row.get(key) is not None), line)),
        where=(str(file), line),
        answer=answer if choices else None,
        choices=choices,
    )


def _labels(data: str | None, root, split: str | None) -> dict[str, list[int]] | None:
    """True abnormalities by item id, where the data set has them and they were downloaded."""
    if data != "ct-rate" or not labels_file(Path(root), split).is_file():
        return None
    labels = read_labels(Path(root), split)
    return {f"ct-rate-{name.removesuffix('.nii.gz')}": values for name, values in labels.items()}


def _reader(intensity: str | None) -> Callable[[str], dict]:
    """Processed scans for the baseline that compares them, without a model."""
    from ct_moe import CTMoEImageProcessor

    images = CTMoEImageProcessor(size={"height": 32, "width": 32}, patch_size=16, intensity=intensity or "hu")
    return images.process_volume


def _of_items(items: Sequence[Item], found: list[tuple[int, dict]], file: Path) -> list[str | None]:
    by_id = {str(row.get("id")): row["prediction"] for _, row in found}
    if missing := [item.id for item in items if item.id not in by_id]:
        finding = f"{len(missing)} of {len(items)} rows have no prediction, the first is {missing[0]}"
        raise DataError(str(file), finding, "Predict them: ct-moe check --items lists all; an empty text is wrong")
    return [by_id[item.id] for item in items]


def _hash(model: str) -> str | None:
    """Of all files of a folder that an answer depends on: weights, settings, tokenizer and template."""
    if not Path(model).is_dir():
        return None
    digest = hashlib.sha256()
    names = (".safetensors", ".json", ".jinja", ".model", ".txt")
    for file in sorted(path for path in Path(model).iterdir() if path.suffix in names):
        digest.update(file.name.encode())
        with file.open("rb") as content:
            while chunk := content.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()
