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
"""The 18 abnormalities of CT-RATE in reports: found by rules or by a classifier, and scored: `label_scores`.

The published labels are those of a classifier (RadBERT) that reads reports. `rule_labels` is built in so that there
always is something: words and negations, no model, and never to be called by the classifier's name in a table.
"""

import re
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ct_moe import DataError

from ..data_sets.ct_rate import ABNORMALITIES
from .bootstrap import bootstrap_interval


def rule_labels(texts: Sequence[str]) -> np.ndarray:
    """`(texts, 18)` of 0 and 1: whether a sentence names an abnormality and does not deny it.

    Known limits: a finding that is only described ("nodule" of the thyroid, "an enlarged heart shadow on the old
    scan"), "resolved" findings, and lists whose second half is affirmed after a denied first half.
    """
    return np.array([[int(_is_named(pattern, text)) for pattern in _PATTERNS] for text in texts]).reshape(-1, 18)


rule_labels.name = "built-in rules"


def classifier_labels(model: str, *, batch_size: int = 16) -> Callable:
    """A labeller from a text classifier with 18 outputs: texts -> `(texts, 18)` of 0 and 1.

    Args:
        model: folder or Hub id of an `AutoModelForSequenceClassification` in safetensors whose labels are those of
            CT-RATE, in their order or by name. CT-RATE's own classifier is published as a pickled state dict, which
            is not loaded here: convert it once.
        batch_size: texts that go through it together.

    Raises:
        DataError: it cannot be loaded, or its labels are others.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        network = AutoModelForSequenceClassification.from_pretrained(model, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise DataError(model, "is no classifier that can be loaded", "Name a folder with safetensors") from error
    names = [network.config.id2label.get(i, "") for i in range(network.config.num_labels)]
    if len(names) != len(ABNORMALITIES):
        raise DataError(model, f"has {len(names)} labels", f"Use one with the {len(ABNORMALITIES)} of CT-RATE")
    by_name = {name.lower(): i for i, name in enumerate(names)}
    generic = all(re.fullmatch(r"LABEL_\d+", name) for name in names)
    if not generic and set(by_name) != {name.lower() for name in ABNORMALITIES}:
        raise DataError(model, "has other labels than CT-RATE", "Name them in its config, or LABEL_0 to LABEL_17")
    order = range(len(names)) if generic else [by_name[name.lower()] for name in ABNORMALITIES]
    network.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def label(texts: Sequence[str]) -> np.ndarray:
        found = []
        for start in range(0, len(texts), batch_size):
            inputs = tokenizer(
                list(texts[start : start + batch_size]),
                padding=True,
                truncation=True,
                max_length=min(tokenizer.model_max_length, 512),
                return_tensors="pt",
            ).to(network.device)
            with torch.inference_mode():
                found.append((network(**inputs).logits.sigmoid() >= 0.5)[:, list(order)].int().cpu().numpy())
        return np.concatenate(found) if found else np.zeros((0, len(ABNORMALITIES)), dtype=int)

    label.name = f"classifier {Path(model).name}"  # never a path of this machine
    return label


def label_scores(said: np.ndarray, truth: np.ndarray, groups: Sequence[Hashable] | None = None) -> dict[str, Any]:
    """Scores of labels in generated reports against the true ones.

    Args:
        said, truth: `(reports, labels)` of 0 and 1.
        groups: `(reports,)` the patient of each, for intervals.

    Returns:
        `macro_f1` (mean over labels that occur in the truth), `micro_f1`, `micro_precision`, `micro_recall`, each of
        the two F1 with its `_interval` where there are groups, `crg` (see `crg_score`) and `per_label`.
    """
    said, truth = np.asarray(said), np.asarray(truth)
    if said.shape != truth.shape or said.ndim != 2 or not len(said):
        raise DataError("labels", f"{said.shape} for {truth.shape}", "Pass as many predicted labels as true ones")
    hits, told, real = (said & truth).sum(0), said.sum(0), truth.sum(0)
    names = ABNORMALITIES if said.shape[1] == len(ABNORMALITIES) else range(said.shape[1])
    scores: dict[str, Any] = {
        "macro_f1": _macro(hits, told, real),
        "micro_f1": _f1(hits.sum(), told.sum(), real.sum()),
        "micro_precision": float(hits.sum() / told.sum()) if told.sum() else 0.0,
        "micro_recall": float(hits.sum() / real.sum()) if real.sum() else 0.0,
        "crg": crg_score(said, truth),
        "per_label": {
            str(name): {
                "precision": float(hits[i] / told[i]) if told[i] else 0.0,
                "recall": float(hits[i] / real[i]) if real[i] else 0.0,
                "f1": _f1(hits[i], told[i], real[i]),
                "support": int(real[i]),
            }
            for i, name in enumerate(names)
        },
    }
    if groups is not None and len(set(groups)) > 1:
        counts = np.stack([said & truth, said, truth])  # what F1 is made of, per report

        def of_rows(score: Callable) -> Callable[[np.ndarray], float]:
            return lambda rows: score(*counts[:, rows.astype(int)].sum(1))

        rows = np.arange(len(said))
        scores["macro_f1_interval"] = bootstrap_interval(rows, groups, statistic=of_rows(_macro))
        micro = of_rows(lambda *sums: _f1(*(part.sum() for part in sums)))
        scores["micro_f1_interval"] = bootstrap_interval(rows, groups, statistic=micro)
    return scores


def crg_score(said: np.ndarray, truth: np.ndarray) -> float | None:
    """CRG of arXiv 2505.17167: hits and misses weigh as much as the abnormality is rare, all labels together.

    1 for all right; 1/3 for nothing said; `None` where no label is true, so that nothing is rare.
    """
    said, truth = np.asarray(said), np.asarray(truth)
    hits, false, missed = (said & truth).sum(), (said & ~truth & 1).sum(), (~said & 1 & truth).sum()
    positives, cells = truth.sum(), truth.size
    if not positives:
        return None
    weight = (cells - positives) / (2 * positives)
    best = weight * positives
    score = weight * hits - weight * missed - false
    return float(best / (2 * best - score)) if 2 * best != score else 0.0


def _f1(hits, told, real) -> float:
    return float(2 * hits / (told + real)) if told + real else 0.0


def _macro(hits, told, real) -> float:
    found = [_f1(*counts) for counts in zip(hits, told, real) if counts[2]]
    return float(np.mean(found)) if found else 0.0


_WORDS = {
    "Medical material": r"medical material|catheters?|stents?|pacemakers?|prosthes[ie]s|tracheostomy|sutures?|"
    r"surgical clips?|port(?:-a-)?cath|drains?|endotracheal tube|nasogastric tube|implants?|metallic",
    "Arterial wall calcification": r"(?:aort\w*|arter\w+|vascular|atheromat\w+)[^.;]*?(?:calcifi\w+|plaques?)|"
    r"calcifi\w+[^.;]*?(?:aort\w*|arter\w+)|atheroscleros\w+",
    "Cardiomegaly": r"cardiomegaly|(?:heart|cardiac)[^.;]*?(?:enlarged|increased)|enlarged (?:heart|cardiac)",
    "Pericardial effusion": r"pericardial (?:effusion|fluid)",
    "Coronary artery wall calcification": r"coronary[^.;]*?(?:calcifi\w+|plaques?|atheros\w+)|"
    r"calcifi\w+[^.;]*?coronary",
    "Hiatal hernia": r"hiat(?:al|us) hernia",
    "Lymphadenopathy": r"lymphadenopath\w+|enlarged lymph nodes?|lymphadenomegaly|"
    r"(?:enlarged|pathological(?:ly)?)[^.;]*?lymph nodes?",
    "Emphysema": r"emphysem\w+",
    "Atelectasis": r"atelecta\w+",
    "Lung nodule": r"nodul\w+",
    "Lung opacity": r"opacit\w+|ground[- ]glass|infiltrat\w+|density increases?",
    "Pulmonary fibrotic sequela": r"fibro\w+|sequelae?",
    "Pleural effusion": r"pleural (?:effusions?|fluid)|effusions?(?= in (?:both|the) (?:hemithora\w+|pleural))",
    "Mosaic attenuation pattern": r"mosaic",
    "Peribronchial thickening": r"peribronchial\w*|bronchial wall thicken\w+",
    "Consolidation": r"consolidat\w+",
    "Bronchiectasis": r"bronchiecta\w+",
    "Interlobular septal thickening": r"interlobular septal?|septal thicken\w+|interlobular[^.;]*?thicken\w+",
}
_PATTERNS = [re.compile(rf"\b(?:{_WORDS[name]})", re.IGNORECASE) for name in ABNORMALITIES]
_ARTERIAL = _PATTERNS[ABNORMALITIES.index("Arterial wall calcification")]
_BEFORE = re.compile(r"\b(?:no|not|without|absent|absence of|negative for|free of|neither|nor)\b", re.IGNORECASE)
_BEHIND = re.compile(
    r"^[^.;,]*?\b(?:(?:is|are|was|were|has|have) (?:not|no)\b|not (?:detected|observed|seen)|(?:is|are) absent)",
    re.IGNORECASE,
)


def _is_named(pattern: re.Pattern, text: str) -> bool:
    for sentence in re.split(r"(?<!\d)\.|\.(?!\d)|[;\n]|\bbut\b|\bhowever\b", text):
        if pattern is _ARTERIAL:  # calcified coronary arteries have a label of their own
            sentence = ",".join(part for part in sentence.split(",") if not re.search(r"(?i)\bcoronar", part))
        for match in pattern.finditer(sentence):
            if not _BEFORE.search(sentence[: match.end()]) and not _BEHIND.search(sentence[match.end() :]):
                return True
    return False
