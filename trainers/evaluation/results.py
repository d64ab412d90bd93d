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
"""Texts about a data set to scores: `score_predictions`, and the table and card entries that are made of them.

Scores are means over rows in percent (CIDEr from 0 to 10), with 95 % intervals by bootstrap over patients. Closed
questions come by the rule of M3D and strictly, over rows and as the mean of their types, since papers differ in which
they print.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ct_moe import CTMoEError, DataError

from ..data_sets.item import Item
from .abnormality_labels import label_scores
from .bootstrap import bootstrap_interval, mean_of_strata_interval
from .cider import cider_scores
from .closed_questions import score_closed
from .text_metrics import corpus_bleu, text_scores


def score_predictions(
    items: Sequence[Item],
    texts: Sequence[str | None],
    *,
    labels: dict[str, Sequence[int]] | None = None,
    labeller: Callable | None = None,
    scorers: dict[str, Callable[[list[str], list[str]], Sequence[float]]] | None = None,
    meteor: bool | None = None,
) -> dict[str, Any]:
    """Score one text per item.

    Args:
        items: what was asked.
        texts: what was said; `None` for an item that could not be answered, which is counted and not scored.
        labels: the true abnormalities by item id, for clinical scores of reports.
        labeller: finds them in generated reports: texts -> `(texts, labels)`. Needed with `labels`.
        scorers: further metrics of open questions and reports by name: (texts, references) -> one number each.
        meteor: as in `text_scores`.

    Returns:
        `counts` (`rows`, `scored`, `unanswered`) and, where there are such rows, `closed`, `open` and `report`, each
        with `metrics` by name (`mean`, `interval`, `mean_of_kinds`, `mean_of_kinds_interval`) and the same by type of
        question in `kinds`. Where types are "group, type", as in 3D-RAD, `groups` has the means over their types.
        Metrics of `closed` are `strict`, `m3d` and `letter`, and `by_letter` of its rows can be scored by the letter
        alone; `report` also has `labels`. A mean is `None` where a scorer gave no number for some row.
    """
    if len(items) != len(texts):
        raise DataError("predictions", f"{len(texts)} for {len(items)} rows", "Pass one for each row")
    scored = [(item, text) for item, text in zip(items, texts) if text is not None]
    result: dict[str, Any] = {
        "counts": {"rows": len(items), "scored": len(scored), "unanswered": len(items) - len(scored)}
    }
    by_task: dict[str, list[tuple[Item, str]]] = {}
    for item, text in scored:
        name = "closed" if item.choices is not None else "report" if item.task == "report" else "open"
        by_task.setdefault(name, []).append((item, text))
    if rows := by_task.get("closed"):
        asked = [{"choices": item.choices, "answer": item.answer, "letter": item.letter} for item, _ in rows]
        scores = score_closed(asked, [text for _, text in rows])
        values = {name: [100.0 * score[name] for score in scores] for name in ("strict", "m3d", "letter")}
        result["closed"] = _summaries([item for item, _ in rows], values)
        result["closed"]["by_letter"] = sum(row["letter"] is not None for row in asked)
    for name in ("open", "report"):
        if rows := by_task.get(name):
            asked, said = [item for item, _ in rows], [text for _, text in rows]
            wanted = [item.completion for item in asked]
            values = text_scores(said, wanted, meteor=meteor)
            values["cider"] = cider_scores(said, wanted)
            for metric, scorer in (scorers or {}).items():
                values[metric] = _numbers_of(metric, scorer, said, wanted)
            result[name] = _summaries(asked, values)
            result[name]["corpus"] = corpus_bleu(said, wanted)
            if "meteor" not in values:
                result[name]["meteor"] = "not computed: no WordNet, or left out"
            known = [row for row, item in enumerate(asked) if item.id in (labels or {})]
            if name == "report" and labeller is not None and known:
                by = getattr(labeller, "name", None) or getattr(labeller, "__name__", "a labeller")
                found = label_scores(
                    labeller([said[row] for row in known]),
                    np.array([labels[asked[row].id] for row in known]),
                    [asked[row].patient for row in known],
                )
                result[name]["labels"] = {
                    "by": by,
                    "reports": len(known),
                    **found,
                }
    return result


def format_results(result: dict[str, Any]) -> str:
    """A table for people, of the model and of every baseline beside it."""
    columns = {"model": result, **result.get("baselines", {})}
    lines = []
    for part, title in (("closed", "closed questions"), ("open", "open questions"), ("report", "reports")):
        found = {name: scores[part] for name, scores in columns.items() if part in scores}
        if not found:
            continue
        lines.append(title.ljust(34) + "".join(name.rjust(22) for name in found))
        lines.append("  rows".ljust(34) + "".join(str(scores["rows"]).rjust(22) for scores in found.values()))
        metrics = list(dict.fromkeys(m for scores in found.values() for m in scores["metrics"]))
        for metric in metrics:
            cells = [_cell(scores["metrics"].get(metric)) for scores in found.values()]
            lines.append(f"  {metric}".ljust(34) + "".join(cell.rjust(22) for cell in cells))
            several = any(len(scores["kinds"]) > 1 for scores in found.values())
            if several and metric in ("strict", "m3d", "bleu1", "rouge1"):
                cells = [_cell(scores["metrics"].get(metric), "mean_of_kinds") for scores in found.values()]
                lines.append(f"  {metric}, mean of types".ljust(34) + "".join(cell.rjust(22) for cell in cells))
        for group in sorted({group for scores in found.values() for group in scores["groups"]}):
            main = "strict" if part == "closed" else "bleu1"
            cells = [_cell(scores["groups"].get(group, {}).get(main)) for scores in found.values()]
            lines.append(f"  {main}, mean over {group}".ljust(34) + "".join(cell.rjust(22) for cell in cells))
        if part == "closed":
            for kind in sorted({kind for scores in found.values() for kind in scores["kinds"]}):
                cells = [_cell(scores["kinds"].get(kind, {}).get("strict")) for scores in found.values()]
                lines.append(f"  strict, {kind}".ljust(34) + "".join(cell.rjust(22) for cell in cells))
        for metric in ("macro_f1", "micro_f1", "crg"):
            values = [scores.get("labels", {}).get(metric) for scores in found.values()]
            if any(value is not None for value in values):
                cells = ["-" if value is None else f"{value:.3f}" for value in values]
                by = next(scores["labels"]["by"] for scores in found.values() if "labels" in scores)
                lines.append(f"  {metric} of labels ({by})".ljust(34) + "".join(cell.rjust(22) for cell in cells))
    counts = result["counts"]
    if counts["unanswered"]:
        lines.append(f"{counts['unanswered']} of {counts['rows']} rows could not be answered and are not scored")
    if by_letter := result.get("closed", {}).get("by_letter"):
        lines.append(f"{by_letter} closed questions are scored by the letter: their texts do not tell the choice")
    lines += result.get("notes", [])
    return "\n".join(lines)


def model_index(result: dict[str, Any], *, name: str, data: str, data_id: str, split: str) -> list[dict[str, Any]]:
    """The `model-index` of a model card, by huggingface_hub: one entry per metric, as the Hub shows them."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    tasks = {"closed": "visual-question-answering", "open": "visual-question-answering", "report": "image-to-text"}
    found = []
    for part, task in tasks.items():
        for metric, summary in result.get(part, {}).get("metrics", {}).items():
            if summary["mean"] is None:
                continue
            found.append(
                EvalResult(
                    task_type=task,
                    dataset_type=data_id,
                    dataset_name=data,
                    dataset_split=split,
                    metric_type=metric,
                    metric_name=f"{metric} ({part})",
                    metric_value=round(summary["mean"], 2),
                )
            )
    for metric in ("macro_f1", "micro_f1", "crg"):
        value = result.get("report", {}).get("labels", {}).get(metric)
        if value is not None:
            by = result["report"]["labels"]["by"]
            shared = {"task_type": "image-to-text", "dataset_type": data_id, "dataset_name": data}
            shared |= {"dataset_split": split, "metric_type": metric, "metric_value": round(value, 4)}
            found.append(EvalResult(**shared, metric_name=f"{metric} of labels ({by})"))
    return eval_results_to_model_index(name, found) if found else []


def _summaries(items: Sequence[Item], values: dict[str, list[float]]) -> dict[str, Any]:
    """Means of all rows and of every type of question."""
    kinds: dict[str, list[int]] = {}
    for row, item in enumerate(items):
        kinds.setdefault(item.kind, []).append(row)
    patients = [item.patient for item in items]
    by_kind: dict[str, dict[str, Any]] = {}
    for kind, rows in sorted(kinds.items()):
        own = [patients[row] for row in rows]
        by_kind[kind] = {name: _summary([found[row] for row in rows], own) for name, found in values.items()}
        by_kind[kind]["rows"] = len(rows)
    metrics = {}
    for name, found in values.items():
        metrics[name] = _summary(found, patients)
        mean = float(np.mean([_number(by_kind[kind][name]["mean"]) for kind in by_kind]))
        metrics[name]["mean_of_kinds"] = mean if np.isfinite(mean) else None
        metrics[name]["mean_of_kinds_interval"] = _interval_of_kinds(found, items)
    shared = {"rows": len(items), "patients": len(set(patients))}
    return {**shared, "metrics": metrics, "kinds": by_kind, "groups": _groups(items, values, by_kind)}


def _groups(items: Sequence[Item], values: dict[str, list[float]], by_kind: dict[str, Any]) -> dict[str, Any]:
    """Of types "group, type" the mean over the types of every group: 3D-RAD's score of a task."""
    groups: dict[str, dict[str, Any]] = {}
    for group in sorted({kind.partition(", ")[0] for kind in by_kind if ", " in kind}):
        kinds = [kind for kind in by_kind if kind.partition(", ")[0] == group]
        rows = [row for row, item in enumerate(items) if item.kind in kinds]
        groups[group] = {"kinds": len(kinds), "rows": len(rows)}
        for name, found in values.items():
            mean = float(np.mean([_number(by_kind[kind][name]["mean"]) for kind in kinds]))
            own = [found[row] for row in rows]
            interval = _interval_of_kinds(own, [items[row] for row in rows])
            groups[group][name] = {"mean": mean if np.isfinite(mean) else None, "interval": interval}
    return groups


def _summary(values: list[float], patients: list[str]) -> dict[str, Any]:
    if not np.isfinite(values).all():
        return {"mean": None, "interval": None}
    interval = bootstrap_interval(values, patients) if len(set(patients)) > 1 else None
    return {"mean": float(np.mean(values)), "interval": interval}


def _interval_of_kinds(values: list[float], items: Sequence[Item]) -> tuple[float, float] | None:
    patients = [item.patient for item in items]
    if len(set(patients)) < 2 or not np.isfinite(values).all():
        return None
    return mean_of_strata_interval(values, [item.kind for item in items], patients)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _numbers_of(metric: str, scorer: Callable, said: list[str], wanted: list[str]) -> list[float]:
    """What a scorer of anybody's gives. Of its error only the type is told: the message may hold a patient's text."""
    try:
        values = [float(value) for value in scorer(said, wanted)]
    except CTMoEError:
        raise
    except Exception as error:
        remedy = "Try it alone on two lists of texts; the answers are kept"
        raise DataError(f"scorer {metric}", f"raises {type(error).__name__}", remedy) from None
    if len(values) != len(said):
        finding = f"gives {len(values)} numbers for {len(said)} texts"
        raise DataError(f"scorer {metric}", finding, "Let it return one for each")
    return values


def _cell(summary: dict[str, Any] | None, name: str = "mean") -> str:
    if summary is None or summary[name] is None:
        return "-"
    low_high = summary["interval" if name == "mean" else f"{name}_interval"]
    return f"{summary[name]:.1f}" + (f" [{low_high[0]:.1f}, {low_high[1]:.1f}]" if low_high else "")
