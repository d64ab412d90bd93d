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
"""The table and the plots of the runs that ablations.py wrote.

    pip install "ct-moe[plots]"
    python examples/phantom/results.py --out phantom-ablations --write examples/phantom

Reads OUT/test and writes ABLATIONS.md, arms.png and, with the first run of (a), scarcity.png. What was not run is
listed as such.

The rule for what the numbers say was set before the first run: a difference between two arms is taken over the same
questions and the same seeds, in the direction that speaks for the claim, and its 95 % interval is a bootstrap over
scans. Above 0 the claim holds, below 0 it does not hold, and if the interval covers 0 it cannot be told.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from ablations import (
    EXPERTS,
    LARGE_EXPERTS,
    NO_EXPERTS,
    REUSE,
    SCARCITY,
    active_expert_parameters,
    arms,
    vision_config,
)
from records import REFERENCE, WRONG_GROUP, Results, read_runs

from ct_moe import CTMoEError
from ct_moe.trainers.evaluation.bootstrap import bootstrap_interval, paired_bootstrap_interval
from ct_moe.trainers.evaluation.cut_numbers import cut, cut_percent


TWO_STAGES, ONE_STAGE = ("d", "two stages, rows of one task"), ("d", "one stage")
MEAN_POOLING = ("e", "mean pooling")
RULE = """\
Accuracy in percent on closed questions about synthetic scans (phantoms) that no training saw, unless a column says
otherwise. Phantoms tell how the parts of this model compare, not how it reads patients. Numbers are cut after the
first decimal, not rounded. `[low, high]` is a 95 % interval by bootstrap over scans: every scan that is drawn brings
all its questions, each with its mean over seeds. It does not hold the chance of training again, which the spread over
seeds (lowest to highest) shows. A difference is taken over the same questions and over the seeds that both arms have,
in the direction that speaks for the claim.

In (a) all arms start with the 2D base, in all other claims with the taught base: its slice layers are the demo
model's, the layers above have learned from single slices to say what the demo model says of them, and projector and
language model to read what this tower says of all slices on average. All arms pool over all slices in that way (pz
all) but those of (b) with pz 1. `Untrained` is what an arm answers rightly as it is converted, before any training
(first seed). Arms that stay below what `none, pz all` of (b) has untrained tell how fast they recover what conversion
took, and not how far they get.

The rule, set before the first run, on numbers before they are cut: a claim **holds** where the interval of the
difference is above 0, it **does not hold** where it is below 0, and it **cannot be told** where the interval covers
0. Intervals are not widened for the number of comparisons: of twenty between equal arms, about one leaves out 0 by
chance. A verdict "so far" is about the seeds that are there, and no more."""


@dataclass
class Comparison:
    """Two arms, (letter, name) each, of which the claim says that `better` is the better one.

    Attributes:
        row: the one of the two in whose row of the table the difference is shown.
        label: in the sentence.
        judged: whether the claim stands or falls with it.
    """

    better: tuple[str, str]
    worse: tuple[str, str]
    row: tuple[str, str]
    label: str
    judged: bool = True


@dataclass
class Claim:
    """A claim of the paper, with the rows of its table in order."""

    letter: str
    text: str
    difference: str  # heading of the column
    rows: list[tuple[str, str]]
    comparisons: list[Comparison]
    note: str = ""


@dataclass
class Difference:
    """`mean` of better minus worse, its interval, and per seed; `planned` seeds of both."""

    mean: float
    interval: tuple[float, float]
    per_seed: list[float]
    planned: int

    @property
    def verdict(self) -> str:
        return verdict(self.interval)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("phantom-ablations"), help="--out of ablations.py")
    parser.add_argument("--write", type=Path, default=Path(__file__).parent, help="folder for the table and plots")
    args = parser.parse_args()
    try:
        write_results(args.out, args.write)
    except CTMoEError as error:
        sys.exit(f"results: error: {error}")


def write_results(out: Path, folder: Path) -> None:
    """Read OUT/test and write ABLATIONS.md and the plots into `folder`."""
    results = read_runs(out)
    pyplot = load_pyplot()  # before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ABLATIONS.md").write_text(table(results, out), encoding="utf-8")
    if has_scarcity(results):
        plot_scarcity(results, folder / "scarcity.png", pyplot)
    plot_arms(results, folder / "arms.png", pyplot)


def has_scarcity(results: Results) -> bool:
    return any(letter == "a" for letter, _ in results.runs)


def claims() -> list[Claim]:
    """What is compared with what; every arm of ablations.py is in one of the tables."""
    own = {letter: [(arm.question, arm.name) for arm in arms() if arm.question == letter] for letter in "abcdef"}
    found = []

    reuse = []
    for scans in (f"{number} scans" for number in SCARCITY):
        reused, *others = (("a", f"{name}, {scans}") for name in REUSE)
        reuse += [Comparison(reused, other, row=other, label=f"minus {other[1]}") for other in others]
    found.append(
        Claim(
            "a",
            "Pretrained 2D weights help, at every number of training scans",
            "Reused minus this, same scans",
            own["a"],
            reuse,
            "`vision from scratch`: vision tower and projector are drawn anew, "
            "the language model is kept; `from scratch`: all is drawn anew. All of these start from the 2D base "
            "alone, and everything is trained in both stages, input embeddings too. A guess among the four choices is "
            "right in 25 %; an arm that stays below it often names none of them.",
        )
    )
    volume = []
    for pz in ("1", "all"):
        upper = ("b", f"volume layers: upper half, pz {pz}")
        for name in ("none", "upper half, no rotary", "all", "all, no rotary"):
            other = ("b", f"volume layers: {name}, pz {pz}")
            label = f"upper half minus {name}, pz {pz}"
            volume.append(Comparison(upper, other, row=other, label=label, judged=name != "all, no rotary"))
    found.append(
        Claim(
            "b",
            "Attention across slices helps: in the upper half of the layers, with rotary embedding of the depth",
            "Upper half minus this, same pz",
            own["b"],
            volume,
            "Without experts; the whole vision tower is trained in both stages. The language model that all start "
            "from has learned last to read a tower without volume layers at pz all, which may speak for `none`; long "
            "before, it had learned beside volume layers in the upper half, with rotary. `all, no rotary` differs "
            "from `upper half` in two ways and counts for no verdict.",
        )
    )
    found.append(
        Claim(
            "c",
            "Experts at both levels help, more than as many parameters spent otherwise; groups learn their own task",
            "Both levels minus this",
            [REFERENCE, WRONG_GROUP, *own["c"][1:]],
            [
                Comparison(REFERENCE, row, row, row[1], judged=row[1] not in (NO_EXPERTS, LARGE_EXPERTS))
                for row in [WRONG_GROUP, *own["c"][1:]]
            ],
            "`wrong group forced` is the same models, scored with the next task's group. `dense with a task "
            "embedding` is told the true task, at test too; its parameters include task groups that take no part. "
            f"`task level` has one expert per group, {EXPERTS} times as wide: a token goes through "
            f"{expert_ratio('task level')} times the expert parameters that it goes through in `both levels`, and in "
            f"`dense, equal total` through {expert_ratio('dense, equal total')} times. Arms without task groups train "
            "their experts, and what else is new in the tower, in both stages. `both levels, groups by scan` "
            "is told the group, at test too. The last two arms were added when the first two seeds of the others were "
            "there and alike, to find out why, and count for no verdict.",
        )
    )
    found.append(
        Claim(
            "d",
            "Two stages are better than one of the same length",
            "Two stages minus this",
            own["d"],
            [Comparison(TWO_STAGES, ONE_STAGE, ONE_STAGE, "two stages minus one stage")],
            "One stage routes by task from the first step on, so that its rows hold the texts of one task. So do "
            "those of the two stages here; in all other arms a row of stage 1 holds the texts of all tasks.",
        )
    )
    found.append(
        Claim(
            "e",
            "Slice scores by the prompt (TG-IS) are better than mean pooling",
            "This minus mean pooling",
            own["e"],
            [
                Comparison(row, MEAN_POOLING, row, f"{row[1]}, minus mean pooling")
                for row in own["e"]
                if row != MEAN_POOLING
            ],
            "All arms pool the 3D features over all slices and append 2D features, weighted by slice: by the scores, "
            "or equally in `mean pooling`. The projector has the rate of what is new, as the scores do. A training "
            "row holds several texts, of which the first scores the slices for all; in the test split every question "
            "does it for itself.",
        )
    )
    found.append(
        Claim(
            "f",
            "Naming the tasks in training helps",
            "Both levels minus this",
            [REFERENCE, *own["f"]],
            [Comparison(REFERENCE, row, row, f"both levels minus {row[1]}") for row in own["f"]],
            "The last columns show what the group that the prompt chose has in common with the task (report, closed "
            "or open question; each counts alike) and, for closed questions, with what is asked (first word of the "
            "template): normalised mutual information, 2 I / (H + H), in percent, mean over seeds and lowest to "
            "highest. 0: independent; 100: one tells the other.",
        )
    )
    return found


def expert_ratio(name: str) -> str:
    """Active expert parameters per token of an arm of (c), over those of the reference."""
    active = {arm.name: active_expert_parameters(vision_config(arm)) for arm in arms() if arm.question == "c"}
    return cut(active[name] / active[REFERENCE[1]])


# Numbers -----------------------------------------------------------------------------------------------------------


def verdict(interval: tuple[float, float]) -> str:
    """What an interval of a difference in the claim's direction says."""
    low, high = interval
    if low > 0:
        return "holds"
    return "does not hold" if high < 0 else "cannot be told (interval covers 0)"


def difference(results: Results, comparison: Comparison) -> Difference | None:
    """Over the seeds that both arms have; `None` where they share no seed."""
    better, worse = (results.runs.get(arm, {}) for arm in (comparison.better, comparison.worse))
    seeds = sorted(better.keys() & worse.keys())
    if not seeds:
        return None
    a, b = (results.right(arm, seeds) for arm in (comparison.better, comparison.worse))
    interval = paired_bootstrap_interval(a.mean(0), b.mean(0), results.scans)
    planned = min(results.planned[arm] for arm in (comparison.better, comparison.worse))
    return Difference(float((a - b).mean()), interval, (a - b).mean(1).tolist(), planned)


def accuracy(results: Results, arm: tuple[str, str], seeds: Sequence[int]) -> tuple:
    """Mean, its interval over scans, and the mean per seed."""
    right = results.right(arm, seeds)
    return float(right.mean()), bootstrap_interval(right.mean(0), results.scans), right.mean(1).tolist()


def mutual_information(a: Sequence, b: Sequence, weights: Sequence[float] | None = None) -> float:
    """Normalised by the mean of both entropies: 0 to 1, and 0 where one of the two never changes."""
    rows, columns = (np.unique([str(value) for value in values], return_inverse=True)[1] for values in (a, b))
    joint = np.zeros((rows.max() + 1, columns.max() + 1))
    weights = np.ones(len(rows)) if weights is None else np.asarray(weights)
    np.add.at(joint, (rows, columns), weights / weights.sum())

    def entropy(shares: np.ndarray) -> float:
        shares = shares[shares > 0]
        return float(-(shares * np.log(shares)).sum())

    of_rows, of_columns = entropy(joint.sum(1)), entropy(joint.sum(0))
    if min(of_rows, of_columns) < 1e-12:
        return 0.0
    return max(0.0, 2 * (of_rows + of_columns - entropy(joint.ravel())) / (of_rows + of_columns))


def interval_text(interval: tuple[float, float]) -> str:
    return f"[{cut_percent(interval[0])}, {cut_percent(interval[1])}]"


def spread(values: Sequence[float], sign: bool = False) -> str:
    return f"{cut_percent(min(values), sign)} to {cut_percent(max(values), sign)}"


# Text --------------------------------------------------------------------------------------------------------------


def table(results: Results, out: Path) -> str:
    """ABLATIONS.md."""
    lines = ["# Ablations on phantoms", "", RULE, ""]
    lines += [
        f"Test split: {len(set(results.scans))} scans, {len(results.scans)} closed questions.",
        f"{time_spent(results.records)} All arms: [arms.png](arms.png).",
    ]
    for claim in claims():
        lines += ["", f"## ({claim.letter}) {claim.text}", "", sentence(results, claim), ""]
        if claim.note:
            lines += [claim.note, ""]
        if claim.letter == "a" and has_scarcity(results):
            lines += ["Plot: [scarcity.png](scarcity.png).", ""]
        lines += claim_table(results, claim)
    lines += ["", "## The commands", "", "```bash", *commands(results, out), "```"]
    return "\n".join(lines) + "\n"


def commands(results: Results, out: Path) -> list[str]:
    """How to get these runs again; folders are named, not where they lie on this machine."""
    run = "python examples/phantom/ablations.py --data phantoms --base phantom-base --taught taught-base \\\n"
    run += f"    --out {out.name}"
    return [
        "python examples/phantom/pretrain_base.py --data phantoms --out phantom-base",
        "python examples/phantom/teach_base.py --data phantoms --out taught-base",
        run,
        f"{run} --seeds 1 --steps 0 0",
        f"python examples/phantom/results.py --out {out.name} --write examples/phantom",
    ]


def time_spent(records: list[dict[str, Any]]) -> str:
    numbers = Counter(tuple(record["steps"]) for record in records)
    told = ", ".join(f"{number} of {a} + {b} steps" for (a, b), number in sorted(numbers.items()))
    text = f"{counted(len(records), 'run')} ({told}, with {records[0]['batch']} rows in each) took"
    devices: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for record in records:
        trained_in = "bfloat16" if record["bfloat16"] else "float32"
        devices.setdefault((record["device"], record["threads"], trained_in), []).append(record)
    parts = []
    for (device, threads, trained_in), own in sorted(devices.items()):
        hours, training = (cut(sum(record[key] for record in own) / 3600) for key in ("seconds", "seconds_training"))
        parts.append(
            f"{hours} h of machine time, {training} h of it for training "
            f"({counted(len(own), 'run')} on {device}, {counted(threads, 'thread')}, in {trained_in})"
        )
    return f"{text} {'; '.join(parts)}."


def counted(number: int, name: str) -> str:
    return f"{number} {name}{'s'[: number != 1]}"


def sentence(results: Results, claim: Claim) -> str:
    """What the numbers say, by the rule at the top of this file."""
    parts, verdicts = [], []
    judged = [comparison for comparison in claim.comparisons if comparison.judged]
    for comparison in judged:
        found = difference(results, comparison)
        if found is None:
            parts.append(f"{comparison.label}: {not_comparable(results, comparison)}")
            verdicts.append("not run yet")
            continue
        text = f"difference {cut_percent(found.mean, True)} {interval_text(found.interval)}: **{found.verdict}**"
        if not found.verdict.startswith("cannot") and min(found.per_seed) * max(found.per_seed) <= 0:
            text += ", though not with every seed"
        if len(found.per_seed) < found.planned:
            text += f", so far ({len(found.per_seed)} of {found.planned} seeds)"
        parts.append(f"{comparison.label}: {text}")
        verdicts.append(found.verdict.split(" (")[0])
    if len(judged) == 1:
        return f"What the numbers say: {parts[0]}."
    order = ("holds", "does not hold", "cannot be told", "not run yet")
    total = ", ".join(f"{name} in {verdicts.count(name)}" for name in order if name in verdicts)
    return f"What the numbers say ({total} of {len(judged)} comparisons): {'; '.join(parts)}."


def not_comparable(results: Results, comparison: Comparison) -> str:
    done = all(results.runs.get(arm) for arm in (comparison.better, comparison.worse))
    return "no seed of both yet" if done else "not run yet"


def claim_table(results: Results, claim: Claim) -> list[str]:
    heads = ["Arm", "Seeds", "Parameters", "Closed", "Closed by seed", "Between slices"]
    heads += [claim.difference, "Difference by seed", "Untrained"]
    groups, experts = claim.letter == "f", claim.letter == "c"
    if experts:
        heads.insert(3, "Expert parameters per token")
    heads += ["Group and task", "Group and what is asked"] if groups else []
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    between = np.array([question["kind"] == "between_slices" for question in results.questions])
    shown = {comparison.row: comparison for comparison in claim.comparisons}
    plan = {(arm.question, arm.name): arm for arm in arms()}
    plan[WRONG_GROUP] = plan[REFERENCE]
    for arm in claim.rows:
        planned, seeds = seeds_in(results, claim, arm)
        cells = [arm[1] if arm != REFERENCE else f"**{arm[1]}**", f"{len(seeds)} of {planned}"]
        active = [f"{active_expert_parameters(vision_config(plan[arm])):,}"] if experts else []
        if not seeds:
            cells += ["-", *active, "not run yet", *["-"] * 4, untrained(results, arm), *["-", "-"][: 2 * groups]]
            lines.append(f"| {' | '.join(cells)} |")
            continue
        mean, interval, per_seed = accuracy(results, arm, seeds)
        cells += [
            " / ".join(f"{count:,}" for count in sorted({results.runs[arm][seed].parameters for seed in seeds})),
            *active,
            f"{cut_percent(mean)} {interval_text(interval)}",
            spread(per_seed),
            cut_percent(float(results.right(arm, seeds)[:, between].mean())) if between.any() else "-",
        ]
        found = difference(results, shown[arm]) if arm in shown else None
        if found is None:
            cells += [not_comparable(results, shown[arm]) if arm in shown else "-", "-"]
        else:
            cells += [f"{cut_percent(found.mean, True)} {interval_text(found.interval)}", spread(found.per_seed, True)]
        cells.append(untrained(results, arm))
        if groups:
            cells += group_cells(results, arm, seeds)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def untrained(results: Results, arm: tuple[str, str]) -> str:
    """What it has before training, with its first seed."""
    runs = results.untrained.get(arm)
    return cut_percent(float(runs[min(runs)].right.mean())) if runs else "-"


def seeds_in(results: Results, claim: Claim, arm: tuple[str, str]) -> tuple[int, list[int]]:
    """How many seeds of an arm a table is about, and those done: of the reference no more than the others have."""
    planned = results.planned[arm]
    if arm == REFERENCE:
        planned = max(results.planned[row] for row in claim.rows if row != REFERENCE)
    return planned, sorted(seed for seed in results.runs.get(arm, {}) if seed < planned)


def group_cells(results: Results, arm: tuple[str, str], seeds: Sequence[int]) -> list[str]:
    topics = [question["template"].split(" ")[0] for question in results.questions]
    by_task, by_topic = [], []
    for run in (results.runs[arm][seed] for seed in seeds):
        groups = {"vqa_closed": run.groups, **run.other_groups}
        tasks = [task for task, own in groups.items() for _ in own]
        # Every task counts alike: there are far more questions than reports.
        weights = [1 / len(own) for own in groups.values() for _ in own]
        by_task.append(mutual_information("".join(groups.values()), tasks, weights))
        by_topic.append(mutual_information(run.groups, topics))
    return [f"{cut_percent(float(np.mean(found)))} ({spread(found)})" for found in (by_task, by_topic)]


# Plots -------------------------------------------------------------------------------------------------------------


COLOURS = {
    "reused": "#0b6e99",
    "vision from scratch": "#d9a441",
    "from scratch": "#c8553d",
    "other": "#4a4a4a",
    "missing": "#9a9a9a",
}


def load_pyplot():
    try:
        matplotlib = import_module("matplotlib")
    except ModuleNotFoundError as error:
        raise CTMoEError(error.name, "is not installed", 'Run: pip install "ct-moe[plots]"') from error
    matplotlib.use("Agg")
    return import_module("matplotlib.pyplot")


def plot_scarcity(results: Results, file: Path, pyplot) -> None:
    """Accuracy by the number of training scans."""
    figure, axes = pyplot.subplots(figsize=(8.4, 4.8), layout="constrained")
    for name in REUSE:
        points = []
        for scans in SCARCITY:
            arm = ("a", f"{name}, {scans} scans")
            points.append([scans, *[np.nan] * 3])  # a gap where nothing was run
            if seeds := sorted(results.runs.get(arm, {})):
                mean, interval, _ = accuracy(results, arm, seeds)
                points[-1][1:] = 100 * mean, 100 * interval[0], 100 * interval[1]
        x, y, low, high = np.array(points).T
        if np.isfinite(y).any():
            label = "2D weights reused" if name == "reused" else name
            axes.fill_between(x, low, high, color=COLOURS[name], alpha=0.18, linewidth=0)
            # The band is seen between neighbours only; a point without neighbours needs a line.
            axes.vlines(x, low, high, color=COLOURS[name], alpha=0.5, linewidth=1.2)
            axes.plot(x, y, marker="o", color=COLOURS[name], label=label)
    axes.set_xscale("log")
    axes.set_xticks(SCARCITY, [str(scans) for scans in SCARCITY])
    axes.set_xticks([], minor=True)
    axes.set_xlim(SCARCITY[0] / 1.25, SCARCITY[-1] * 1.25)
    axes.set_xlabel("training scans (log scale)")
    axes.set_ylabel("accuracy on closed questions, %")
    axes.set_title("Phantoms: reused 2D weights by number of training scans", loc="left", fontsize=12)
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    title = "mean over seeds,\n95 % interval over scans"
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), alignment="left", title=title)
    _save(figure, file, pyplot)


def plot_arms(results: Results, file: Path, pyplot) -> None:
    """Every arm: a dot and its interval, by claim."""
    rows: list[tuple[Claim, tuple[str, str] | None]] = []
    for claim in claims():
        rows += [(claim, None), *((claim, arm) for arm in claim.rows)]
    figure, axes = pyplot.subplots(figsize=(9.6, 0.25 * len(rows) + 1), layout="constrained")
    colours, missing = [], []
    for height, (claim, arm) in enumerate(rows):
        if arm is None:
            colours.append("black")
            continue
        _, seeds = seeds_in(results, claim, arm)
        if not seeds:
            colours.append(COLOURS["missing"])
            missing.append(height)
            continue
        claimed = any(arm == comparison.better for comparison in claim.comparisons)
        colours.append(COLOURS["reused" if claimed else "other"])
        mean, (low, high), _ = accuracy(results, arm, seeds)
        axes.hlines(height, 100 * low, 100 * high, color=colours[-1], linewidth=1.6)
        axes.plot(100 * mean, height, "o", color=colours[-1], markersize=5.5)
    axes.set_ylim(len(rows) - 0.4, -0.8)
    axes.set_yticks(range(len(rows)), ["" if arm is None else arm[1] for _, arm in rows])
    for label, colour in zip(axes.get_yticklabels(), colours):
        label.set_color(colour)
    axes.tick_params(axis="y", length=0)
    inside = axes.get_yaxis_transform()  # x from 0 to 1, y in rows
    for height in missing:
        axes.text(0.008, height, "not run yet", va="center", fontsize=9, color=COLOURS["missing"], transform=inside)
    for height, (claim, arm) in enumerate(rows):
        if arm is None:
            # Over the whole width, names included.
            band = axes.axhspan(height - 0.45, height + 0.45, -2, 1, color="#eeeeee", linewidth=0, clip_on=False)
            text = axes.annotate(
                f"({claim.letter}) {claim.text}", (0.008, height), xycoords=("figure fraction", "data"), va="center"
            )
            band.set_in_layout(False)
            text.set_in_layout(False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("accuracy on closed questions, %: mean over seeds, 95 % interval over scans")
    axes.set_title("Phantoms: all arms; blue: the better ones if the claim holds", loc="left", fontsize=12)
    _save(figure, file, pyplot)


def _save(figure, file: Path, pyplot) -> None:
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    # No date or version in the file: the same runs give the same bytes.
    figure.savefig(file, dpi=100, facecolor="white", metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
