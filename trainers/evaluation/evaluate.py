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

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ct_moe import DataError
from ct_moe.hub.whole_file import whole_file

from ..data_sets.catalogue import DATA_SETS, find_data_set, read_items
from ..data_sets.ct_rate import labels_file, read_labels
from ..data_sets.item import BadRow, Item
from ..phantoms.controls import blind
from ..volume_cache import VolumeCache
from .abnormality_labels import classifier_labels, rule_labels
from .baselines import labels_to_template, majority, nearest_reports
from .libraries import library
from .model_scorers import find_scorer
from .plots import plot_kinds
from .prediction_files import own_items, read_predictions, texts_of
from .processes import processes
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
        max_new_tokens: longest answer; by default by task, as in `predict`.
        volume_cache: folder for processed scans.
        progress: whether to show bars.

    Returns:
        What OUT.json holds. With several processes the first one scores and writes; the others return nothing.

    Raises:
        DataError: as in `read_items` and `predict`, or answers are missing.
        ModelError: the model cannot be loaded.
    """
    out = Path(out)
    _check_arguments(out, model, data, predictions, baselines)
    state = processes()

    # What could fail later fails now, before hours of answering.
    asked = _Asked() if data is None else _read(data, root, split, rows)
    if data is not None:
        _check_baselines(baselines, asked, data, root)
    scoring: dict[str, Any] = {"meteor": meteor}
    if state.is_main_process:
        text_scores(["-"], ["-"], meteor=meteor)  # are its libraries there?
        scoring |= {"labels": asked.labels, "scorers": dict(find_scorer(name) for name in scorers)}
        scoring["labeller"] = rule_labels if labeller is None else classifier_labels(labeller)

    if predictions is not None:
        said = _read_answers(Path(predictions), asked)
    else:
        settings = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "progress": progress}
        loading = {"revision": revision, "dtype": dtype, "volume_cache": volume_cache}
        said = _answer(model, out, asked, "blind" in baselines, loading, settings)
    if not state.is_main_process:
        return {}

    others = {} if said.blind is None else {"blind": said.blind}
    if "majority" in baselines:
        others["majority"] = list(majority(_train(data, root, asked.items), asked.items))
    if "nearest" in baselines:
        train = _train(data, root, asked.items)
        others["nearest"] = nearest_reports(train, asked.items, said.read or _reader(asked.intensity), progress)
    if "labels" in baselines:
        others["labels"] = labels_to_template(asked.items, asked.labels)
    result = _result(asked, said, others, scoring)
    with whole_file(out) as part:
        part.write_text(json.dumps(result, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    plot_kinds(result, out.with_suffix(".png"))
    return result


@dataclass
class _Asked:
    """What is asked: rows of a data set, or what a file of answers brings.

    Attributes:
        items, bad: rows that can be scored, and lines that cannot be used.
        known: ids of the whole split, of which `items` may be a part.
        about: for the results. Answers do not depend on `protocol` and `url`.
        intensity: of the scans, as `DataSet` has it.
        labels: true abnormalities by item id, where the data set has them and they were downloaded.
        notes: what is missing without being an error.
    """

    items: list[Item] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    known: set[str] = field(default_factory=set)
    about: dict[str, Any] = field(default_factory=dict)
    protocol: str = ""
    url: str = ""
    intensity: str | None = None
    labels: dict[str, list[int]] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class _Said:
    """What was said: a text for every item or `None`, why there is none by id, and by whom.

    `blind` is what the model said to air, `read` makes a path a processed scan, `unknown` are lines of a file of
    answers whose ids nobody asked for.
    """

    texts: list[str | None]
    system: dict[str, Any]
    errors: dict[str, str] = field(default_factory=dict)
    blind: list[str | None] | None = None
    read: Callable[[str], dict] | None = None
    unknown: list[int] | None = None


def _check_arguments(out: Path, model, data, predictions, baselines: Sequence[str]) -> None:
    if (model is None) == (predictions is None):
        raise DataError("model", "is missing" if model is None else "comes with predictions", "Give one of the two")
    if out.suffix != ".json" or not out.parent.is_dir() or out.is_dir():
        raise DataError(str(out), "is no .json file in a folder that exists", "Name one, such as results.json")
    if unknown := [name for name in baselines if name not in BASELINES]:
        raise DataError("baselines", f"{unknown[0]!r} is unknown", f"Use {', '.join(BASELINES)}")
    if data is None and (model is not None or baselines):
        raise DataError("data", "is missing", f"Name one of {', '.join(DATA_SETS)} and its folder")
    if "blind" in baselines and model is None:
        raise DataError("baseline blind", "needs the model", "Leave it out with predictions")


def _read_answers(file: Path, asked: _Asked) -> _Said:
    """Of any system; without a data set they bring what was asked."""
    found, bad = read_predictions(file)
    said = _Said([], {"predictions": file.name})
    if asked.about:
        said.texts, said.unknown = texts_of(asked.items, asked.known, found, bad, file)
    else:
        asked.items, said.texts = own_items(found, bad, file)
    asked.bad += bad
    return said


def _answer(model: str, out: Path, asked: _Asked, with_blind: bool, loading: dict, settings: dict) -> _Said:
    from ct_moe.hub.folder import load_folder

    library("trl", package="ct-moe[train,eval]")  # what answers a model: scores alone do not need it
    from .predictions import predict

    volume_cache = loading.pop("volume_cache")
    network, processor, commit = load_folder(model, **loading)
    network.to(processes().device)
    images = processor.image_processor
    if asked.intensity not in (None, images.intensity):
        finding = f"its scans are {asked.intensity!r}, the model's image processor takes {images.intensity!r}"
        raise DataError(asked.about["data"], finding, "Train a model with that intensity, or choose other data")
    cache = None if volume_cache is None else VolumeCache(volume_cache, images)
    system = {"model": Path(model).name if Path(model).is_dir() else model, "revision": commit}
    system |= {"files": _hash(model), "dtype": loading["dtype"], "scope": network.config.intended_scope}
    settings |= {"about": {**asked.about, **system}, "volume_cache": cache}
    answers = predict(network, processor, asked.items, out.with_suffix(".predictions.jsonl"), **settings)
    said = _Said([answer.text for answer in answers], system)
    said.errors = {answer.id: answer.error for answer in answers if answer.error is not None}
    said.read = images.process_volume if cache is None else cache.read
    if with_blind:
        air = blind(images)
        settings["about"] = {**settings["about"], "control": "blind"}
        shown = {**settings, "change": lambda scan: air(scan, {})}
        answers = predict(network, processor, asked.items, out.with_suffix(".blind.jsonl"), **shown)
        said.blind = [answer.text for answer in answers]
    return said


def _result(asked: _Asked, said: _Said, others: dict[str, list], scoring: dict[str, Any]) -> dict[str, Any]:
    """What OUT.json holds; `others` are the texts of the baselines."""
    items, texts = asked.items, said.texts
    about = {**asked.about, "protocol": asked.protocol} if asked.about else {}
    result = {"about": about, "system": said.system, **score_predictions(items, texts, **scoring)}
    bad = [row for row in asked.bad if not row.is_left_out]
    result["counts"] |= {"bad_rows": len(bad), "left_out": len(asked.bad) - len(bad)}
    result["bad_rows"] = [f"{Path(row.file).name}, line {row.line}: {row.finding}" for row in bad]
    result["unanswered"] = {
        item.id: f"{Path(item.where[0]).name}, line {item.where[1]}: {said.errors.get(item.id, 'no prediction')}"
        for item, text in zip(items, texts)
        if text is None
    }
    result["baselines"] = {}
    for name in [name for name in BASELINES if name in others]:
        # On the rows that both answer: nearest and labels write reports alone.
        kept = [row for row, text in enumerate(others[name]) if text is not None and texts[row] is not None]
        if kept:
            rows_of = [items[row] for row in kept], [others[name][row] for row in kept]
            result["baselines"][name] = score_predictions(*rows_of, **scoring)
    if asked.about:
        named = {"name": said.system.get("model", "predictions"), "data": asked.about["title"]}
        named["data_id"] = asked.url.removeprefix("https://huggingface.co/datasets/") or asked.about["data"]
        result["model_index"] = model_index(result, split=asked.about["split"], **named)
    result["notes"] = [*asked.notes, *_notes(result)]
    if said.unknown is not None:
        result["counts"]["unknown_ids"] = len(said.unknown)
        if said.unknown:
            note = f"{len(said.unknown)} predictions have an id that is none of the split's, the first is line "
            result["notes"].append(f"{note}{said.unknown[0]}")
    return result


def _notes(result: dict[str, Any]) -> list[str]:
    """What a reader may miss in the results."""
    notes = []
    written = [result[part] for part in ("open", "report") if part in result]
    if any("meteor" not in part["metrics"] for part in written):
        notes.append("METEOR was not computed: nltk finds no WordNet and punkt_tab, or it was left out")
    for part in written:
        for name, summary in part["metrics"].items():
            if summary["mean"] is None:
                notes.append(f"{name} has no mean: its scorer gave no number for some rows")
    if find_spec("matplotlib") is None:
        notes.append('no picture was drawn: matplotlib is not installed (pip install "ct-moe[plots]")')
    return notes


def _check_baselines(baselines: Sequence[str], asked: _Asked, data: str, root) -> None:
    if {"nearest", "labels"} & set(baselines) and not any(item.task == "report" for item in asked.items):
        name = "nearest" if "nearest" in baselines else "labels"
        raise DataError(f"baseline {name}", f"{data} has no reports", "Leave it out")
    if "labels" in baselines and not asked.labels:
        raise DataError("baseline labels", f"{data} has no labels in {root}", "Leave it out, or download them")
    if {"majority", "nearest"} & set(baselines):
        next(_train(data, root, asked.items), None)  # is it there, and is it another one?


def _train(data: str, root, items: Sequence[Item]) -> Iterator[Item]:
    """Items of the training split, which must not be those that are scored."""
    split = find_data_set(data).splits[0]
    scored = {item.id: item.row() for item in items}
    for item in read_items(data, root, split):
        if isinstance(item, Item):
            if scored.get(item.id) == item.row():  # files may count their rows alike
                finding = "its training rows are those that are scored"
                raise DataError(data, finding, "Leave out majority and nearest, or name a folder with a training file")
            yield item


def _read(data: str, root, split: str | None, rows: int | None) -> _Asked:
    known = find_data_set(data)
    split = split or ("test" if "test" in known.splits else "validation")
    if root is None:
        raise DataError("root", "is missing", f"Name the folder of {data}")
    asked = _Asked(protocol=known.protocol, url=known.url, intensity=known.intensity)
    for item in read_items(data, root, split):
        (asked.items if isinstance(item, Item) else asked.bad).append(item)
    asked.known = {item.id for item in asked.items}
    if rows is not None:
        chosen = sorted(asked.items, key=lambda item: hashlib.sha256(item.id.encode()).digest())[:rows]
        kept = {item.id for item in chosen}
        asked.items = [item for item in asked.items if item.id in kept]
    if not asked.items:
        raise DataError(str(root), f"{data} has no row that can be used in {split}", "Run: ct-moe check")
    asked.about = {"data": data, "title": known.title, "licence": known.licence, "split": split, "rows": rows}
    if data == "ct-rate":
        file = labels_file(Path(root), split)
        if file.is_file():
            labels = read_labels(Path(root), split)
            asked.labels = {f"ct-rate-{name.removesuffix('.nii.gz')}": values for name, values in labels.items()}
        else:
            asked.notes.append(f"clinical scores were not computed: there is no {file.relative_to(root)}")
    return asked


def _reader(intensity: str | None) -> Callable[[str], dict]:
    """Processed scans for the baseline that compares them, without a model."""
    from ct_moe import CTMoEImageProcessor

    images = CTMoEImageProcessor(size={"height": 32, "width": 32}, patch_size=16, intensity=intensity or "hu")
    return images.process_volume


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
