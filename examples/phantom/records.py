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
"""What ablations.py wrote, read and checked: `read_runs`."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ablations import TASKS, arms

from ct_moe import DataError


REFERENCE = ("c", "both levels")
WRONG_GROUP = ("c", "both levels, wrong group forced")
KEPT = ("arm", "steps", "batch", "device", "threads", "bfloat16", "seconds", "seconds_training")


@dataclass
class Run:
    """One run: a value per question, in the order of `Results.questions`.

    Attributes:
        parameters: of the whole model.
        right: 1 or 0.
        groups: a digit per question, the index of the expert group; `-` without groups.
        other_groups: the same of reports and open questions, where they were noted.
    """

    parameters: int
    right: np.ndarray
    groups: str
    other_groups: dict[str, str]


@dataclass
class Results:
    """All runs, by arm and seed.

    Attributes:
        records: as read, once each, without the scores: what was trained on what, and for how long.
        questions: of each, `images`, `kind` and `template`.
        runs: by arm, a letter and a name, and seed.
        untrained: the same before any training, where that was scored.
        planned: seeds of each arm.
    """

    records: list[dict[str, Any]]
    questions: list[dict[str, str]]
    runs: dict[tuple[str, str], dict[int, Run]]
    untrained: dict[tuple[str, str], dict[int, Run]]
    planned: dict[tuple[str, str], int]

    @property
    def scans(self) -> list[str]:
        """Of each question."""
        return [question["images"] for question in self.questions]

    def right(self, arm: tuple[str, str], seeds: Sequence[int]) -> np.ndarray:
        """(seeds, questions)."""
        return np.stack([self.runs[arm][seed].right for seed in seeds])


def read_runs(out: Path) -> Results:
    """Raises `DataError` where there is no run, or runs that cannot be compared."""
    plan = {(arm.question, arm.name): arm for arm in arms()}
    planned = {name: arm.seeds for name, arm in plan.items()}
    planned[WRONG_GROUP] = plan[REFERENCE].seeds
    folder = out / "test"
    files = sorted(folder.glob("?_*.json"))
    if not files:
        raise DataError(str(folder), "no run is there", f"Run: python examples/phantom/ablations.py --out {out}")
    questions, told = read_questions(folder / "questions.jsonl")
    results = Results([], questions, {}, {}, planned)
    common: dict[str, tuple[Any, str]] = {}
    for file in files + sorted(folder.glob("untrained/?_*.json")):
        record, read = read_record(file, len(questions))
        arm, seed = (record["arm"]["question"], record["arm"]["name"]), record["seed"]
        run = f"({arm[0]}) {arm[1]}, seed {seed},"
        if arm not in plan or seed not in range(plan[arm].seeds):
            raise DataError(file.name, f"{run} is not among the runs that ablations.py plans", "Move it elsewhere")
        trained = file.parent == folder
        if trained != any(record["steps"]):
            remedy = "Move it to untrained/, or back: without training is what --steps 0 0 was"
            raise DataError(file.name, f"{run} has {record['steps']} steps of both stages", remedy)
        kept = results.runs if trained else results.untrained
        if seed in kept.get(arm, {}):
            raise DataError(file.name, f"{run} is there twice", "Keep one of the files")
        for name, value in _same_in_all(record).items():
            known, first = common.setdefault(name, (value, file.name))
            if value != known:
                remedy = "Arms are compared alike: run all with the same files and settings"
                raise DataError(file.name, f"{name}: {value}, but {known} in {first}", remedy)
        if record["hashes"]["questions"] != told:
            raise DataError(
                file.name, "answers other questions than questions.jsonl", "Score all runs on the same --data"
            )
        for name, own in read.items():
            kept.setdefault(name, {})[seed] = own
        if trained:
            results.records.append({name: record[name] for name in KEPT})
    return results


def read_record(file: Path, questions: int) -> tuple[dict[str, Any], dict[tuple[str, str], Run]]:
    """All that a file says, and what was scored in it, by arm."""
    remedy = "Remove it, and run ablations.py again"
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        arm = record["arm"]["question"], record["arm"]["name"]
        scored = {arm: record["closed"]}
        if "wrong_group" in record:
            scored[WRONG_GROUP] = record["wrong_group"]
        noted = any(arm == (other.question, other.name) and other.note_groups for other in arms())
        others = {task: record["other_groups"][task] for task in TASKS if task != "vqa_closed"} if noted else {}
        runs = {
            name: Run(record["parameters"], np.array([float(digit) for digit in own["right"]]), own["groups"], others)
            for name, own in scored.items()
        }
        accuracies = {name: float(own["accuracy"]) for name, own in scored.items()}
        _same_in_all(record), [record[name] for name in ("seed", *KEPT)]  # all there?
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(file.name, f"is no record of a run ({type(error).__name__}: {error})", remedy) from error
    for name, own in runs.items():
        if not len(own.right) == len(own.groups) == questions:
            finding = f"has {len(own.right)} answers and {len(own.groups)} groups for {questions} questions"
            raise DataError(file.name, finding, remedy)
        if not math.isclose(own.right.mean(), accuracies[name], abs_tol=1e-6):
            finding = f"its answers give the accuracy {own.right.mean():.4f}, it says {accuracies[name]:.4f}"
            raise DataError(file.name, finding, remedy)
    return record, runs


def read_questions(file: Path) -> tuple[list[dict[str, str]], str]:
    """The questions that the records' digits belong to, and the first digits of the file's SHA-256."""
    try:
        content = file.read_bytes()
        questions = [json.loads(line) for line in content.splitlines()]
        questions = [{name: row[name] for name in ("images", "kind", "template")} for row in questions]
    except (OSError, ValueError, KeyError, TypeError) as error:
        finding = f"cannot be read ({type(error).__name__})"
        raise DataError(str(file), finding, "It lies beside the records: copy it with them") from error
    return questions, hashlib.sha256(content).hexdigest()[:16]


def _same_in_all(record: dict[str, Any]) -> dict[str, Any]:
    """What runs must have in common, by its name in words; how they were trained, if they were."""
    first, second = record["steps"]
    letter = record["arm"]["question"]
    # `base` is what was forgotten where an arm starts from scratch.
    found = {f"hash of {'pretrained' if letter == 'a' else 'taught'} base": record["hashes"]["base"]}
    found |= {f"hash of {name}": record["hashes"][name] for name in ("train", "test", "recipe")}
    group = REFERENCE[0] if letter == "f" else letter  # (f) is compared with an arm of (c)
    trained = {f"steps of stage {number} in ({group})": steps for number, steps in ((1, first), (2, second))}
    trained |= {"rows per step": record["batch"], f"share of the learning rates in ({group})": record["rates"]}
    return found | trained if first or second else found
