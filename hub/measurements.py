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
"""What was measured about a model, read from the results files in its folder: the only source of numbers of a card.

- `read_results`: `results*.json` of a folder, as `ct-moe evaluate` or `examples/phantom/evaluate.py` wrote them.
- `Results.rows`, `Results.findings`: the tables of a card.
- `Results.model_index`: the same for the Hub's metadata.
- `numbers`: all that was measured, to look a number up.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from ct_moe.errors_ct_moe import PublishError


PHANTOMS = "CT-MoE phantoms"
_PARTS = {"closed": "closed questions", "open": "open questions", "report": "reports"}
_TASKS = {"closed": "visual-question-answering", "open": "visual-question-answering", "report": "image-to-text"}
# Metric -> its name, and what turns the stored number into the one that is shown (shares become percent).
_PHANTOM_METRICS = {
    "closed": {"accuracy": ("% right", 100)},
    "open": {"accuracy": ("% right", 100), "bleu1": ("BLEU-1", 1), "rougeL": ("ROUGE-L", 1)},
    "report": {
        "macro_f1": ("macro F1 of findings", 1),
        "micro_f1": ("micro F1 of findings", 1),
        "side_errors": ("% of sides wrong", 100),
        "place_errors": ("% of places wrong", 100),
        "size_error_mm": ("size off by, mm", 1),
        "bleu1": ("BLEU-1", 1),
        "bleu4": ("BLEU-4", 1),
        "rouge1": ("ROUGE-1", 1),
        "rougeL": ("ROUGE-L", 1),
    },
}
_LABEL_METRICS = ("macro_f1", "micro_f1", "crg")  # of `ct-moe evaluate`, 0 to 1


class Row(NamedTuple):
    """One measured number: `part` of the test (with its number of rows), `metric`, `value` and its 95 % interval.

    `baselines` holds the same number by the name of what it is compared with.
    """

    part: str
    metric: str
    value: float
    interval: tuple[float, float] | None
    baselines: dict[str, float]


@dataclass(frozen=True)
class Results:
    """A results file.

    Attributes:
        file: its name.
        content: what it holds.
        is_phantoms: whether the phantom benchmark wrote it.
    """

    file: str
    content: dict[str, Any]
    is_phantoms: bool

    @property
    def data(self) -> str:
        """Name of the data set."""
        return PHANTOMS if self.is_phantoms else self.content["about"].get("title", "predictions without a data set")

    @property
    def split(self) -> str:
        return self.content["split"] if self.is_phantoms else self.content["about"].get("split", "unnamed")

    @property
    def protocol(self) -> str:
        """What was asked, in a sentence or two."""
        if self.is_phantoms:
            return (
                f"{self.content['scans']} synthetic scans of the {self.split} split, whose wordings, acquisitions and "
                "combinations of attributes training never saw. Intervals are 95 % bootstrap intervals over scans."
            )
        counts, about = self.content["counts"], self.content["about"]
        chosen = "" if about.get("rows") is None else " (chosen by the hash of their ids)"
        dtype = self.content["system"].get("dtype")
        return (
            f"{counts['rows']} rows of the {self.split} split{chosen}, {counts['unanswered']} of them not answered "
            f"and not scored{'' if dtype is None else f'; {dtype}'}. Means over rows, with 95 % bootstrap intervals "
            "over patients."
        )

    def rows(self) -> list[Row]:
        """What the card's table shows."""
        return list(self._phantom_rows() if self.is_phantoms else self._rows())

    def findings(self) -> dict[str, dict[str, float]]:
        """Precision, recall, F1 and support of every finding in reports; empty where they were not measured."""
        report = self.content.get("report", {})
        found = report.get("per_finding") if self.is_phantoms else report.get("labels", {}).get("per_label")
        return {name: scores for name, scores in (found or {}).items() if scores["support"]}

    def model_index(self, name: str) -> list[dict[str, Any]]:
        """The Hub's `model-index` of a model called `name`."""
        entries = []
        if self.is_phantoms:
            for part, metrics in _PHANTOM_METRICS.items():
                for metric, (words, factor) in metrics.items():
                    if (value := self.content.get(part, {}).get(metric)) is not None:
                        entries.append(
                            EvalResult(
                                task_type=_TASKS[part],
                                dataset_type="ct-moe-phantoms",
                                dataset_name=PHANTOMS,
                                dataset_split=self.split,
                                metric_type=metric,
                                metric_name=f"{_PARTS[part]}, {words}",
                                metric_value=round(factor * value, 4),
                            )
                        )
            return eval_results_to_model_index(name, entries) if entries else []
        return [{**entry, "name": name} for entry in self.content.get("model_index") or []]

    def _phantom_rows(self) -> Iterator[Row]:
        content = self.content
        others = {"usual answer": content.get("majority", {}), **content.get("controls", {})}
        others = {name.replace("_", " "): scores for name, scores in others.items() if "accuracy" in scores}
        for part, metrics in _PHANTOM_METRICS.items():
            scores = content.get(part, {})
            size = f" ({scores['n']})" if "n" in scores else ""
            for metric, (words, factor) in metrics.items():
                if scores.get(metric) is None:
                    continue
                is_compared = (part, metric) == ("closed", "accuracy")
                beside = {name: factor * other[metric] for name, other in others.items()} if is_compared else {}
                interval = scores.get("interval") if metric == "accuracy" else scores.get(f"{metric}_interval")
                interval = interval and tuple(factor * bound for bound in interval)
                yield Row(f"{_PARTS[part]}{size}", words, factor * scores[metric], interval, beside)
                if metric != "accuracy":
                    continue
                if (
                    is_compared
                    and (flipped := content.get("controls", {}).get("flipped", {})).get("follows") is not None
                ):
                    words_of = f"sides of right answers ({flipped['n']})"
                    yield Row(words_of, "% that follow a mirrored scan", 100 * flipped["follows"], None, {})
                for kind, value in scores["kinds"].items():
                    beside = {name: factor * o["kinds"][kind] for name, o in others.items()} if is_compared else {}
                    yield Row(f"{_PARTS[part]}: {kind.replace('_', ' ')}", words, factor * value, None, beside)

    def _rows(self) -> Iterator[Row]:
        baselines = self.content.get("baselines", {})
        for part, words in _PARTS.items():
            scores = self.content.get(part)
            if scores is None:
                continue
            for metric, summary in scores["metrics"].items():
                beside = {
                    name: other[part]["metrics"][metric]["mean"]
                    for name, other in baselines.items()
                    if other.get(part, {}).get("metrics", {}).get(metric, {}).get("mean") is not None
                }
                if summary["mean"] is None:  # a scorer of the user's that gave no number
                    continue
                yield Row(f"{words} ({scores['rows']})", metric, summary["mean"], summary["interval"], beside)
            labels = scores.get("labels", {})
            for metric in _LABEL_METRICS:
                if labels.get(metric) is not None:
                    beside = {
                        name: other[part]["labels"][metric]
                        for name, other in baselines.items()
                        if other.get(part, {}).get("labels", {}).get(metric) is not None
                    }
                    interval = labels.get(f"{metric}_interval")
                    part_words = f"{words} ({labels['reports']})"
                    yield Row(part_words, f"{metric} of labels, by {labels['by']}", labels[metric], interval, beside)


def read_results(folder: str | Path) -> list[Results]:
    """The results files of a folder, by name.

    Raises:
        PublishError: a file of that name holds something else.
    """
    return [parse_results(file) for file in sorted(Path(folder).glob("results*.json"))]


def parse_results(file: Path) -> Results:
    """One results file.

    Raises:
        PublishError: it holds no results.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PublishError(file.name, f"cannot be read ({type(error).__name__})", "Measure again") from error
    if isinstance(content, dict) and any(part in content for part in _PARTS):
        if "about" in content and "counts" in content:
            return Results(file.name, content, is_phantoms=False)
        if "scans" in content and "split" in content:
            return Results(file.name, content, is_phantoms=True)
    remedy = "Use what `ct-moe evaluate` or examples/phantom/evaluate.py wrote"
    raise PublishError(file.name, "holds no results of an evaluation", remedy)


def numbers(results: list[Results]) -> list[float]:
    """All numbers of results files; shares also in percent."""
    found: list[float] = []

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            for inner in value.values():
                collect(inner)
        elif isinstance(value, list):
            for inner in value:
                collect(inner)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append(float(value))
            if isinstance(value, float) and abs(value) <= 1:
                found.append(100.0 * value)

    for result in results:
        collect(result.content)
    return found
