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
"""The phantom benchmark: `evaluate_phantoms` answers a split's rows, with controls, and scores them.

Intervals are 95 % bootstrap intervals over scans.
"""

import copy
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ct_moe import DataError

from ..evaluation.answering import Answer, answer_rows
from ..evaluation.bootstrap import bootstrap_interval, paired_bootstrap_interval
from ..evaluation.closed_questions import score_closed
from ..evaluation.cut_numbers import cut, cut_percent
from ..evaluation.text_metrics import text_metrics
from ..volume_cache import VolumeCache
from .controls import CONTROL_NAMES, blind, flipped, flipped_answer, other_scan, shuffled_slices, single_slice
from .scores import score_open, score_reports
from .texts import KINDS


def read_split(data: str | Path, split: str, scans: int | None = None) -> tuple[list[dict], dict[str, dict]]:
    """Rows of a split, and the labels of its scans by path; `scans` keeps the first so many.

    Raises:
        DataError: the folder has no such split.
    """
    data = Path(data)
    try:
        labels = {record["images"]: record for record in _lines(data / f"{split}_labels.jsonl")}
        rows = list(_lines(data / f"{split}.jsonl"))
    except FileNotFoundError as error:
        raise DataError(
            str(data), f"has no {Path(error.filename).name}", "Write phantoms first: ct-moe phantom"
        ) from None
    kept = set(sorted(labels)[:scans])
    return [row for row in rows if row["images"] in kept], {name: labels[name] for name in kept}


def evaluate_phantoms(
    model,
    processor,
    data: str | Path,
    *,
    split: str = "test",
    scans: int | None = None,
    controls: Iterable[str] = CONTROL_NAMES,
    tasks: Iterable[str] = ("vqa_closed", "vqa_open", "report"),
    task=None,
    volume_cache: VolumeCache | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> dict[str, Any]:
    """Answer the rows of a split and score them.

    Args:
        model, processor: of CT-MoE.
        data: folder written by `write_phantoms`.
        split: "validation" or "test".
        scans: first so many scans only.
        controls: names from `CONTROL_NAMES`, and "flipped"; they are run on closed questions.
        tasks: kinds of rows to answer; "plane" for the questions about the stored plane, which are answered with
            `reorient=False` and stay out of the totals.
        task: as in `answer_rows`.
        volume_cache, batch_size, progress: as in `answer_rows`.

    Returns:
        `closed` (`accuracy`, `interval`, `n`, `letter`, `m3d`, `mean_of_kinds`, `kinds`, `templates`,
        `unseen_acquisition`, `held_out`), `majority` (the usual answer of each template in train), `controls`, `open`,
        `report`, `plane` (`accuracy`, `interval`, `n`) and `answers` (per row; not for print).
    """
    controls, known = list(controls), (*CONTROL_NAMES, "flipped")
    if unknown := [name for name in controls if name not in known]:
        raise DataError("controls", f"{unknown[0]!r} is unknown", f"Use names of {', '.join(known)}")
    rows, labels = read_split(data, split, scans)
    if len(labels) < 2 and {"vqa_closed", "vqa_open"} & set(tasks):
        raise DataError("scans", "one scan has no interval", "Score two scans or more")
    closed = [row for row in rows if row["task"] == "vqa_closed"]
    settings = {
        "folder": data,
        "volume_cache": volume_cache,
        "batch_size": batch_size,
        "progress": progress,
        "task": task,
    }
    result: dict[str, Any] = {"split": split, "scans": len(labels), "answers": []}

    def answer(asked: Sequence[dict], **more) -> list[Answer]:
        return answer_rows(model, processor, asked, **{**settings, **more})

    def keep(asked: Sequence[dict], answers: Sequence[Answer], right: Iterable) -> None:
        for row, said, is_right in zip(asked, answers, right):
            names = ("images", "task", "kind", "template", "prompt", "completion", "answer", "choices")
            record = {name: row[name] for name in names}
            result["answers"].append({**record, "text": said.text, "group": said.task, "right": is_right})

    if "vqa_closed" in tasks:
        try:
            majority = majority_answers(_lines(Path(data) / "train.jsonl"), closed)
        except FileNotFoundError:
            raise DataError(str(data), "has no train.jsonl", "Copy it too: the usual answers come from it") from None
        answers = answer(closed)
        scores = score_closed(closed, [said.text for said in answers])
        right = np.array([float(score["strict"]) for score in scores])
        result["closed"] = _closed_scores(closed, scores, right)
        keep(closed, answers, right.astype(bool).tolist())
        scans_of = [row["images"] for row in closed]
        result["majority"] = {"accuracy": float(majority.mean()), "kinds": _by(closed, majority, "kind")}
        result["controls"] = {}
        read = volume_cache.read if volume_cache is not None else processor.image_processor.process_volume
        changes = {
            "blind": blind(processor.image_processor),
            "other_scan": other_scan(read, rows, Path(data), seed=0),
            "shuffled_slices": shuffled_slices,
            "single_slice": single_slice(labels),
        }
        for name in controls:
            if name == "flipped":
                result["controls"][name] = _flipped(closed, right, answer)
                continue
            texts = [said.text for said in answer(closed, change=changes[name])]
            control = np.array([float(score["strict"]) for score in score_closed(closed, texts)])
            result["controls"][name] = {
                "accuracy": float(control.mean()),
                "interval": bootstrap_interval(control, scans_of),
                "minus_majority": float((control - majority).mean()),
                "minus_majority_interval": paired_bootstrap_interval(control, majority, scans_of),
                "kinds": _by(closed, control, "kind"),
            }
    if "vqa_open" in tasks:
        asked = [row for row in rows if row["task"] == "vqa_open"]
        answers = answer(asked)
        right = np.array(score_open(asked, [said.text for said in answers]), dtype=float)
        result["open"] = {
            "accuracy": float(right.mean()),
            "interval": bootstrap_interval(right, [row["images"] for row in asked]),
            "n": len(asked),
            "kinds": _by(asked, right, "kind"),
            **_text_scores(asked, answers),
        }
        keep(asked, answers, right.astype(bool).tolist())
    if "report" in tasks:
        asked = [row for row in rows if row["task"] == "report"]
        answers = answer(asked)
        texts = [said.text for said in answers]
        result["report"] = score_reports([labels[row["images"]] for row in asked], texts) | _text_scores(
            asked, answers
        )
        keep(asked, answers, [None] * len(asked))
    if "plane" in tasks:
        asked = [row for row in _lines(Path(data) / f"{split}_plane.jsonl") if row["images"] in labels]
        as_stored = copy.deepcopy(processor)
        as_stored.image_processor.reorient = False
        answers = answer_rows(model, as_stored, asked, **{**settings, "volume_cache": None})
        scores = score_closed(asked, [said.text for said in answers])
        right = np.array([float(score["strict"]) for score in scores])
        interval = bootstrap_interval(right, [row["images"] for row in asked])
        result["plane"] = {"accuracy": float(right.mean()), "interval": interval, "n": len(asked)}
        keep(asked, answers, right.astype(bool).tolist())
    return result


def majority_answers(train: Iterable[dict], rows: Sequence[dict]) -> np.ndarray:
    """1 where the most usual answer of the template in train, among the row's choices, is right; else 0."""
    counts: dict[str, Counter] = {}
    for row in train:
        counts.setdefault(row["template"], Counter())[row["answer"]] += 1
    usual = [max(row["choices"], key=lambda choice: counts.get(row["template"], {}).get(choice, 0)) for row in rows]
    return np.array([float(choice == row["answer"]) for choice, row in zip(usual, rows)])


def format_scores(result: dict[str, Any]) -> str:
    """A table for print, its numbers cut after the decimals shown."""
    lines = [f"{result['scans']} scans of the {result['split']} split"]
    if "closed" in result:
        closed, kinds = result["closed"], [kind for kind in KINDS if kind in result["closed"]["kinds"]]
        lines += ["", f"{'closed questions':24}{'all':>8}" + "".join(f"{kind[:13]:>15}" for kind in kinds)]
        table = {"model": closed, "majority answer": result["majority"], **result["controls"]}
        for name, scores in table.items():
            if name != "flipped":
                cells = "".join(f"{cut_percent(scores['kinds'][kind]):>15}" for kind in kinds)
                lines.append(f"{name:24}{cut_percent(scores['accuracy']):>8}{cells}")
        low, high = closed["interval"]
        lines.append(f"model: {cut_percent(low)} to {cut_percent(high)}, {closed['n']} questions")
        if "flipped" in result["controls"]:
            flip = result["controls"]["flipped"]
            lines.append(f"left and right exchanged: the side follows in {_percent(flip['follows'])} of {flip['n']}")
    if "plane" in result:
        plane = result["plane"]
        lines.append(f"stored plane            {cut_percent(plane['accuracy']):>8}   of {plane['n']}, in no total")
    if "open" in result:
        opened = result["open"]
        meteor = f", METEOR {cut(opened['meteor'])}" if "meteor" in opened else ""
        lines.append(f"open questions          {cut_percent(opened['accuracy']):>8}   of {opened['n']}{meteor}")
    if "report" in result:
        report = result["report"]
        lines += ["", f"reports: macro F1 {cut(report['macro_f1'], 3)}, micro F1 {cut(report['micro_f1'], 3)}"]
        for name, scores in report["per_finding"].items():
            cells = "  ".join(f"{key} {cut(scores[key], 2)}" for key in ("precision", "recall", "f1"))
            lines.append(f"  {name:16}{cells}  of {scores['support']}")
        size, extent = (
            "-" if report[name] is None else f"{cut(report[name])} mm" for name in ("size_error_mm", "extent_error_mm")
        )
        # METEOR needs data of nltk that not everyone has.
        names = [name for name in ("bleu1", "bleu4", "rouge1", "rougeL", "meteor") if name in report]
        texts = ", ".join(f"{name.replace('meteor', 'METEOR')} {cut(report[name])}" for name in names)
        lines.append(
            f"  {texts}; side wrong in {_percent(report['side_errors'])}, place in "
            f"{_percent(report['place_errors'])}; size off by {size}, extent by {extent}"
        )
    return "\n".join(lines)


def _closed_scores(rows: Sequence[dict], scores: Sequence[dict], right: np.ndarray) -> dict[str, Any]:
    kinds = _by(rows, right, "kind")
    return {
        "accuracy": float(right.mean()),
        "interval": bootstrap_interval(right, [row["images"] for row in rows]),
        "n": len(rows),
        **{name: float(np.mean([score[name] for score in scores])) for name in ("letter", "m3d")},
        "mean_of_kinds": float(np.mean(list(kinds.values()))),
        "kinds": kinds,
        "templates": _by(rows, right, "template"),
        "unseen_acquisition": _by(rows, right, "unseen"),
        "held_out": _by(rows, right, "held_out"),
    }


def _flipped(rows: Sequence[dict], right: np.ndarray, answer) -> dict[str, Any]:
    """Of the sides told rightly, the share that changes with the scan."""
    sided = [
        (row, mirrored)
        for row, is_right in zip(rows, right)
        if is_right and (mirrored := flipped_answer(row["answer"])) in row["choices"]
    ]
    if not sided:
        return {"follows": None, "n": 0}
    texts = [said.text for said in answer([row for row, _ in sided], change=flipped)]
    follows = [score["strict"] for score in score_closed([{**row, "answer": m} for row, m in sided], texts)]
    return {"follows": float(np.mean(follows)), "n": len(sided)}


def _by(rows: Sequence[dict], values: np.ndarray, column: str) -> dict[str, float]:
    groups: dict[str, list[float]] = {}
    for row, value in zip(rows, values):
        groups.setdefault(str(row[column]), []).append(value)
    return {name: float(np.mean(group)) for name, group in sorted(groups.items())}


def _text_scores(rows: Sequence[dict], answers: Sequence[Answer]) -> dict[str, float]:
    return text_metrics([said.text for said in answers], [row["completion"] for row in rows])


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{cut_percent(share)} %"


def _lines(path: Path) -> Iterable[dict]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
