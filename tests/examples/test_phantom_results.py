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
"""The table and plots of the ablations, from hand-made runs whose answers are known."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ct_moe import CTMoEError, DataError


FOLDER = Path(__file__).parents[2] / "examples" / "phantom"
SCANS = 20
# Per scan: template, kind.
ASKED = [("count nodule", "between_slices"), ("where nodule", "place")]
BOTH = ("c", "both levels")
TWO, ONE = ("d", "two stages, rows of one task"), ("d", "one stage")
FREE = ("f", "label-free routing")
HASHES = {"base": "0a", "train": "0b", "test": "0c", "recipe": "0d"}
QUESTIONS = "".join(
    json.dumps({"images": f"scan{scan:02}.nii.gz", "kind": kind, "template": template}) + "\n"
    for scan in range(SCANS)
    for template, kind in ASKED
)
TOLD = hashlib.sha256(QUESTIONS.encode()).hexdigest()[:16]


@pytest.fixture(scope="module")
def results(load_script):
    return load_script("results")


def scores(right, group=lambda scan, template: "-") -> dict:
    """`right` and `group` of (scan's number, template)."""
    asked = [(scan, template) for scan in range(SCANS) for template, _ in ASKED]
    told = [bool(right(*question)) for question in asked]
    return {
        "accuracy": sum(told) / len(told),
        "right": "".join(str(int(is_right)) for is_right in told),
        "groups": "".join(str(group(*question)) for question in asked),
    }


def others(report: int | str = 0, opened: int | str = 2) -> dict[str, str]:
    """Groups of reports and open questions, one a scan."""
    return {"report": SCANS * str(report), "vqa_open": SCANS * str(opened)}


def write(out: Path, arm: tuple[str, str], seed: int, right, **more) -> Path:
    record = {
        "arm": {"question": arm[0], "name": arm[1]},
        "seed": seed,
        "steps": [2, 1],
        "batch": 4,
        "rates": 0.5,
        "train_scans": 900,
        "all_train_scans": 900,
        "hashes": {**HASHES, "questions": TOLD},
        "parameters": 1_234_567,
        "device": "CPU",
        "threads": 2,
        "bfloat16": True,
        "seconds": 3600.0,
        "seconds_training": 1800.0,
        "closed": right if isinstance(right, dict) else scores(right),
        **({"other_groups": others()} if arm in (BOTH, FREE) else {}),
        **more,
    }
    folder = out / "test" / ("untrained" if record["steps"] == [0, 0] else "")
    file = folder / f"{arm[0]}_{''.join(c if c.isalnum() else '-' for c in arm[1])}_{seed}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record), encoding="utf-8")
    (out / "test" / "questions.jsonl").write_text(QUESTIONS, encoding="utf-8")
    return file


def share(numerator: int, denominator: int):
    """Right for so many scans of each `denominator`, every question alike."""
    return lambda scan, template: scan % denominator < numerator


def row_of(text: str, letter: str, name: str) -> list[str]:
    section = text.split(f"## ({letter})")[1].split("\n## ")[0]
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0].strip("*") == name:
            return cells
    raise AssertionError(f"{name} is not in {section}")


def sentence_of(text: str, letter: str) -> str:
    section = text.split(f"## ({letter})")[1]
    return next(line for line in section.splitlines() if line.startswith("What the numbers say"))


@pytest.fixture
def two_seeds(tmp_path) -> Path:
    """Two stages are right in 3 of 4 scans with seed 0, 4 of 4 with seed 1; one stage in 1 of 4 and 2 of 4."""
    for seed, right in enumerate((share(3, 4), share(4, 4))):
        write(tmp_path, BOTH, seed, right, wrong_group=scores(share(1, 4)))
        write(tmp_path, TWO, seed, right)
    write(tmp_path, ONE, 0, share(1, 4))
    write(tmp_path, ONE, 1, share(2, 4))
    return tmp_path


def test_means_are_over_seeds(results, two_seeds):
    text = results.table(results.read_runs(two_seeds), two_seeds)
    name, seeds, parameters, closed, by_seed, between, *_ = row_of(text, *TWO)
    assert (name, seeds, parameters) == (TWO[1], "2 of 5", "1,234,567")
    assert closed.startswith("87.5 [")
    assert by_seed == "75.0 to 100.0"
    assert between == "87.5"


def test_a_record_that_is_being_written_is_not_read(results, two_seeds):
    records = results.read_runs(two_seeds).records
    (two_seeds / "test" / ".part-0-c_both-levels_2.json").write_text("{")
    assert results.read_runs(two_seeds).records == records


def test_the_interval_is_that_of_scans(results, two_seeds):
    read = results.read_runs(two_seeds)
    mean, interval, per_seed = results.accuracy(read, BOTH, [0, 1])
    per_scan = [1.0 if scan % 4 < 3 else 0.5 for scan in range(SCANS)]
    assert mean == pytest.approx(0.875)
    assert per_seed == pytest.approx([0.75, 1.0])
    assert interval == pytest.approx(results.bootstrap_interval(per_scan))


def test_questions_between_slices_are_apart(results, tmp_path):
    write(tmp_path, BOTH, 0, lambda scan, template: template[0] == "c" or scan % 2)
    cells = row_of(results.table(results.read_runs(tmp_path), tmp_path), "f", "both levels")
    assert cells[3].startswith("75.0 [")
    assert cells[5] == "100.0"


def test_differences_are_paired_by_seed_and_question(results, two_seeds):
    write(two_seeds, BOTH, 2, share(0, 4))  # without a partner: left out
    read = results.read_runs(two_seeds)
    comparison = results.Comparison(BOTH, ONE, ONE, "")
    found = results.difference(read, comparison)
    assert found.mean == pytest.approx(0.5)
    assert found.per_seed == pytest.approx([0.5, 0.5])
    # Of four scans: right with seeds 0 and 1 in (2, 2, 2, 1) of the reference, in (2, 1, 0, 0) of the other.
    gain = [[0.0, 0.5, 1.0, 0.5][scan % 4] for scan in range(SCANS)]
    assert found.interval == pytest.approx(results.bootstrap_interval(gain))
    assert found.verdict == "holds"
    text = results.table(read, two_seeds)
    assert row_of(text, "d", "one stage")[6].startswith("+50.0 [")
    assert row_of(text, "d", "one stage")[7] == "+50.0 to +50.0"
    assert ": **holds**, so far (2 of 5 seeds)." in sentence_of(text, "d")


def test_a_constant_gain_has_no_width(results, tmp_path):
    """One of two questions gained in every scan: that scans differ in how hard they are cancels."""
    write(tmp_path, BOTH, 0, lambda scan, template: template[0] == "c" or scan % 2)
    write(tmp_path, ONE, 0, lambda scan, template: template[0] != "c" and scan % 2)
    found = results.difference(results.read_runs(tmp_path), results.Comparison(BOTH, ONE, ONE, ""))
    assert found.interval == pytest.approx((0.5, 0.5))


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((0.001, 0.2), "holds"),
        ((-0.2, -0.001), "does not hold"),
        ((-0.1, 0.1), "cannot be told (interval covers 0)"),
        ((0.0, 0.1), "cannot be told (interval covers 0)"),
        ((-0.1, 0.0), "cannot be told (interval covers 0)"),
    ],
)
def test_the_verdict_follows_the_interval(results, interval, verdict):
    assert results.verdict(interval) == verdict


def test_the_sign_speaks_for_the_claim(results, tmp_path):
    """TG-IS is claimed to be the better one, and is worse here; reuse and labels are better."""
    write(tmp_path, BOTH, 0, share(3, 4))
    write(tmp_path, ("e", "mean pooling"), 0, share(3, 4))
    write(tmp_path, ("e", "TG-IS, published"), 0, share(1, 4))
    write(tmp_path, ("f", "label-free routing"), 0, share(1, 4))
    write(tmp_path, ("a", "reused, 15 scans"), 0, share(3, 4))
    write(tmp_path, ("a", "from scratch, 15 scans"), 0, share(1, 4))
    write(tmp_path, ("a", "vision from scratch, 15 scans"), 0, share(4, 4))
    text = results.table(results.read_runs(tmp_path), tmp_path)
    assert "TG-IS, published, minus mean pooling: difference -50.0 [" in sentence_of(text, "e")
    assert "does not hold in 1, not run yet in 1 of 2" in sentence_of(text, "e")
    assert "**holds**" in sentence_of(text, "f")
    assert "minus from scratch, 15 scans: difference +50.0 [" in sentence_of(text, "a")
    assert "minus vision from scratch, 15 scans: difference -25.0 [" in sentence_of(text, "a")
    assert "holds in 1, does not hold in 1, not run yet in 4 of 6" in sentence_of(text, "a")


def test_seeds_that_disagree_are_told(results, tmp_path):
    for seed, (better, worse) in enumerate([(4, 0), (1, 2)]):
        write(tmp_path, TWO, seed, share(better, 4))
        write(tmp_path, ONE, seed, share(worse, 4))
    text = results.table(results.read_runs(tmp_path), tmp_path)
    assert "**holds**, though not with every seed, so far (2 of 5 seeds)" in sentence_of(text, "d")
    assert row_of(text, "d", "one stage")[7] == "-25.0 to +100.0"


def test_volume_layers_are_compared_at_the_same_pz(results):
    found = next(claim for claim in results.claims() if claim.letter == "b").comparisons
    assert len(found) == 8
    assert sum(comparison.judged for comparison in found) == 6
    for comparison in found:
        assert comparison.better[1].rpartition(", pz ")[2] == comparison.worse[1].rpartition(", pz ")[2]
        assert comparison.better[1].startswith("volume layers: upper half, pz")


def test_no_arm_is_left_out(results, two_seeds):
    text = results.table(results.read_runs(two_seeds), two_seeds)
    for arm in results.arms():
        cells = row_of(text, arm.question, arm.name)
        if (arm.question, arm.name) in (BOTH, TWO, ONE):
            assert cells[1] == "2 of 5"
        else:
            assert cells[1] == f"0 of {arm.seeds}"
            assert cells[4 if arm.question == "c" else 3] == "not run yet"
    assert row_of(text, "c", "both levels, wrong group forced")[1] == "2 of 5"
    assert row_of(text, "c", "both levels, wrong group forced")[6] == "25.0"
    assert row_of(text, "c", "both levels, wrong group forced")[7].startswith("+62.5 [")
    assert row_of(text, "f", "both levels")[1] == "2 of 3"  # seeds 0 to 2
    assert "15 scans: not run yet" in sentence_of(text, "a")


def test_every_scan_count_is_compared_with_both_kinds_of_scratch(results):
    found = next(claim for claim in results.claims() if claim.letter == "a").comparisons
    pairs = [(comparison.better[1], comparison.worse[1]) for comparison in found]
    counts = ("15 scans", "60 scans", "480 scans")
    names = ("vision from scratch", "from scratch")
    assert pairs == [(f"reused, {count}", f"{name}, {count}") for count in counts for name in names]
    assert all(comparison.judged for comparison in found)


def test_slice_scores_are_compared_with_their_mean(results):
    claim = next(claim for claim in results.claims() if claim.letter == "e")
    assert [name for _, name in claim.rows] == ["mean pooling", "TG-IS, published", "TG-IS, normalised"]
    assert [(comparison.better, comparison.worse) for comparison in claim.comparisons] == [
        (row, ("e", "mean pooling")) for row in claim.rows[1:]
    ]


def test_active_expert_parameters_are_told(results, two_seeds):
    text = results.table(results.read_runs(two_seeds), two_seeds)
    # One MoE layer of width 192; experts of width 48 with biases, two per token.
    both = 2 * (2 * 192 * 48 + 48 + 192)
    for name in ("both levels", "token level", "both levels, wrong group forced"):
        assert row_of(text, "c", name)[3] == f"{both:,}"
    wide = 2 * (2 * 192 * 192 + 192 + 192)
    assert row_of(text, "c", "task level")[3] == f"{wide:,}"
    assert f"{int(10 * wide / both) / 10} times the expert parameters" in text
    assert row_of(text, "c", "dense, equal active")[3] == f"{2 * 192 * 96 + 96 + 192:,}"
    assert row_of(text, "c", "dense with a task embedding")[3] == f"{2 * 192 * 96 + 96 + 192:,}"
    assert "Expert parameters" not in text.split("## (d)")[1]


def test_arms_without_a_seed_in_common(results, two_seeds):
    write(two_seeds, ("f", "label-free routing"), 2, share(1, 4))
    text = results.table(results.read_runs(two_seeds), two_seeds)
    assert sentence_of(text, "f").endswith("no seed of both yet.")


def test_time_by_device(results, two_seeds):
    write(two_seeds, FREE, 0, share(1, 4), device="NVIDIA X", threads=8, seconds=1000.0, seconds_training=700.0)
    text = results.table(results.read_runs(two_seeds), two_seeds)
    assert "7 runs (7 of 2 + 1 steps, with 4 rows in each) took 6.0 h of machine time, 3.0 h of it for trai" in text
    assert "(6 runs on CPU, 2 threads, in bfloat16)" in text
    # 0.277 and 0.194 h.
    assert "; 0.2 h of machine time, 0.1 h of it for training (1 run on NVIDIA X, 8 threads, in bfloat16)." in text


def test_the_commands_are_whole(results, two_seeds):
    text = results.table(results.read_runs(two_seeds), two_seeds)
    commands = text.split("```bash\n")[1].split("\n```")[0].replace("\\\n", " ")
    base, taught, ablations, starts, tables = [" ".join(line.split()) for line in commands.splitlines()]
    assert base == "python examples/phantom/pretrain_base.py --data phantoms --out phantom-base"
    assert taught == "python examples/phantom/teach_base.py --data phantoms --out taught-base"
    assert ablations == (
        "python examples/phantom/ablations.py --data phantoms --base phantom-base --taught taught-base "
        f"--out {two_seeds.name}"
    )
    assert starts == f"{ablations} --seeds 1 --steps 0 0"
    assert tables == f"python examples/phantom/results.py --out {two_seeds.name} --write examples/phantom"
    assert str(two_seeds) not in text


def test_mutual_information(results):
    assert results.mutual_information([0, 0, 1, 1], ["x", "x", "y", "y"]) == pytest.approx(1)
    assert results.mutual_information([0, 1, 0, 1], ["x", "x", "y", "y"]) == pytest.approx(0, abs=1e-12)
    assert results.mutual_information([1, 1, 1, 1], ["x", "x", "y", "y"]) == 0
    assert results.mutual_information([None] * 4, ["x", "x", "y", "y"]) == 0
    # H = log 2 of one, log 4 of the other, and all that the first knows is shared.
    assert results.mutual_information([0, 0, 1, 1], [0, 1, 2, 3]) == pytest.approx(2 / 3)
    # A weight of two is a row twice.
    assert results.mutual_information([0, 1, 1], ["x", "y", "x"], [2, 2, 1]) == pytest.approx(
        results.mutual_information([0, 0, 1, 1, 1], ["x", "x", "y", "y", "x"])
    )


def test_groups_of_the_prompt(results, tmp_path):
    right = share(3, 4)
    write(tmp_path, BOTH, 0, scores(right, lambda scan, template: 1))
    half = "01" * (SCANS // 2)
    free = scores(right, lambda scan, template: scan % 2)
    write(tmp_path, FREE, 0, free, other_groups={"report": half, "vqa_open": half})
    text = results.table(results.read_runs(tmp_path), tmp_path)
    assert row_of(text, "f", "both levels")[-2] == "100.0 (100.0 to 100.0)"
    assert row_of(text, "f", "label-free routing")[-2:] == ["0.0 (0.0 to 0.0)"] * 2


def test_every_task_counts_alike(results, tmp_path):
    """Closed and open questions share a group, reports have their own: what that tells of three equal tasks."""
    scored = scores(share(3, 4), lambda scan, template: 1)
    write(tmp_path, BOTH, 0, scored, other_groups={"report": "0", "vqa_open": SCANS * "1"})
    text = results.table(results.read_runs(tmp_path), tmp_path)
    shared = -(1 / 3) * np.log(1 / 3) - (2 / 3) * np.log(2 / 3)  # the groups' entropy, all of it told by the task
    percent = int(1000 * 2 * shared / (shared + np.log(3))) / 10
    assert row_of(text, "f", "both levels")[-2:] == [f"{percent} ({percent} to {percent})", "0.0 (0.0 to 0.0)"]


def test_numbers_of_the_table_are_cut_not_rounded(results, tmp_path):
    write(tmp_path, BOTH, 0, share(2, 3))  # 14 of 20 scans: 0, 1, 3, 4 ... 18, 19
    write(tmp_path, BOTH, 1, share(2, 3))
    write(tmp_path, BOTH, 2, share(1, 3))  # 7 of 20
    cells = row_of(results.table(results.read_runs(tmp_path), tmp_path), "f", "both levels")
    assert cells[3].startswith("58.3 [")  # 58.33
    write(tmp_path, BOTH, 2, share(3, 3))
    write(tmp_path, BOTH, 1, share(1, 3))
    write(tmp_path, BOTH, 0, share(4, 5))  # 16, 7 and 20 of 20: 71.66
    cells = row_of(results.table(results.read_runs(tmp_path), tmp_path), "f", "both levels")
    assert cells[3].startswith("71.6 [")


def test_everything_is_written(results, two_seeds, tmp_path):
    for scans in (15, 60):
        for seed in range(2):
            for name in ("reused", "vision from scratch"):
                write(two_seeds, ("a", f"{name}, {scans} scans"), seed, share(3, 4), train_scans=scans)
    results.write_results(two_seeds, tmp_path / "written")
    assert sorted(file.name for file in (tmp_path / "written").iterdir()) == [
        "ABLATIONS.md",
        "arms.png",
        "scarcity.png",
    ]
    assert "[scarcity.png](scarcity.png)" in (tmp_path / "written" / "ABLATIONS.md").read_text(encoding="utf-8")
    for name in ("arms.png", "scarcity.png"):
        data = (tmp_path / "written" / name).read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert 800 <= int.from_bytes(data[16:20]) <= 1000  # width


def test_three_curves_over_the_number_of_scans(results, two_seeds, tmp_path):
    for name in ("reused", "vision from scratch", "from scratch"):
        for scans in (15, 60, 480):
            write(two_seeds, ("a", f"{name}, {scans} scans"), 0, share(3, 4))
    pyplot, drawn = results.load_pyplot(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "_save", lambda figure, file, pyplot: drawn.append(figure))
        results.plot_scarcity(results.read_runs(two_seeds), tmp_path / "scarcity.png", pyplot)
    (axes,) = drawn[0].axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["2D weights reused", "vision from scratch", "from scratch"]
    assert [list(line.get_xdata()) for line in axes.lines] == [[15, 60, 480]] * 3
    assert len({line.get_color() for line in axes.lines}) == 3
    pyplot.close(drawn[0])


def test_no_plot_without_its_runs(results, two_seeds, tmp_path):
    results.write_results(two_seeds, tmp_path / "written")
    assert sorted(file.name for file in (tmp_path / "written").iterdir()) == ["ABLATIONS.md", "arms.png"]
    assert "scarcity.png" not in (tmp_path / "written" / "ABLATIONS.md").read_text(encoding="utf-8")


def test_no_run(results, tmp_path):
    with pytest.raises(DataError, match="no run is there"):
        results.write_results(tmp_path, tmp_path / "written")
    assert not (tmp_path / "written").exists()


def test_missing_matplotlib(results, two_seeds, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(CTMoEError, match=r"matplotlib: is not installed\. Run: pip install \"ct-moe\[plots\]\""):
        results.write_results(two_seeds, tmp_path / "written")
    assert not (tmp_path / "written").exists()


def change(record: dict, **more) -> dict:
    return {**record, **more}


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda record: "{", "is no record of a run"),
        (lambda record: json.dumps({"arm": 1}), "is no record of a run"),
        (lambda record: json.dumps(change(record, arm={"question": "c", "name": "gone"})), "plans"),
        (lambda record: json.dumps(change(record, seed=5)), "plans"),
        (lambda record: json.dumps(change(record, seed=0)), "is there twice"),
        (lambda record: json.dumps(change(record, steps=[3])), "is no record of a run"),
        (
            lambda record: json.dumps(change(record, steps=[1, 2])),
            r"steps of stage 1 in \(d\): 1, but 2 in d_one-stage_0\.json",
        ),
        (lambda record: json.dumps(change(record, steps=[2, 9])), r"steps of stage 2 in \(d\): 9, but 1 in"),
        (lambda record: json.dumps(change(record, batch=16)), "rows per step: 16, but 4 in"),
        (
            lambda record: json.dumps(change(record, rates=1.0)),
            r"share of the learning rates in \(d\): 1.0, but 0.5 in",
        ),
        *(
            (
                lambda record, name=name: json.dumps(change(record, hashes={**record["hashes"], name: "ff"})),
                f"hash of {'taught ' * (name == 'base')}{name}: ff, but {HASHES[name]} in",
            )
            for name in HASHES
        ),
        (
            lambda record: json.dumps(change(record, hashes={**record["hashes"], "questions": "ff"})),
            "answers other questions",
        ),
        (lambda record: json.dumps({key: value for key, value in record.items() if key != "hashes"}), "KeyError"),
        (
            lambda record: json.dumps(change(record, closed=change(record["closed"], right="101"))),
            "has 3 answers and 40 groups for 40 questions",
        ),
        (
            lambda record: json.dumps(change(record, closed=change(record["closed"], accuracy=0.1))),
            "it says 0.1000",
        ),
    ],
)
def test_runs_that_cannot_be_compared(results, two_seeds, broken, words):
    file = two_seeds / "test" / "d_one-stage_1.json"
    file.write_text(broken(json.loads(file.read_text())))
    with pytest.raises(DataError, match=words) as error:
        results.read_runs(two_seeds)
    assert error.value.subject == file.name


def test_arms_of_reuse_have_a_base_of_their_own(results, two_seeds):
    for name, base in (("reused", "1a"), ("from scratch", "2a")):
        write(
            two_seeds, ("a", f"{name}, 15 scans"), 0, share(1, 4), hashes={**HASHES, "questions": TOLD, "base": base}
        )
        if base == "1a":
            assert len(results.read_runs(two_seeds).records) == 7
    with pytest.raises(DataError, match="hash of pretrained base: 1a, but 2a in"):
        results.read_runs(two_seeds)


def test_claims_have_steps_of_their_own(results, two_seeds):
    write(two_seeds, ("a", "reused, 15 scans"), 0, share(1, 4), steps=[5, 2])
    text = results.table(results.read_runs(two_seeds), two_seeds)
    assert "7 runs (6 of 2 + 1 steps, 1 of 5 + 2 steps, with 4 rows in each) took" in text
    write(two_seeds, ("a", "reused, 60 scans"), 0, share(1, 4), steps=[5, 3])
    with pytest.raises(DataError, match=r"steps of stage 2 in \(a\): 3, but 2 in"):
        results.read_runs(two_seeds)


def test_the_start_is_shown_beside_what_training_made_of_it(results, two_seeds):
    write(two_seeds, ONE, 0, share(3, 4), steps=[0, 0], rates=1.0)
    write(two_seeds, FREE, 0, share(1, 4), steps=[0, 0])
    read = results.read_runs(two_seeds)
    assert len(read.records) == 6  # it is no training
    assert read.runs.keys().isdisjoint({FREE})
    text = results.table(read, two_seeds)
    assert row_of(text, *ONE)[3].startswith("37.5 [")
    assert row_of(text, *ONE)[8] == "75.0"
    assert row_of(text, *TWO)[8] == "-"
    assert row_of(text, *FREE)[3:] == ["not run yet", "-", "-", "-", "-", "25.0", "-", "-"]


def test_a_start_has_the_same_base_and_no_steps(results, two_seeds):
    file = write(two_seeds, ONE, 0, share(3, 4), steps=[0, 0])
    trained = two_seeds / "test" / "d_one-stage_2.json"
    trained.write_text(json.dumps({**json.loads(file.read_text()), "seed": 2}))
    with pytest.raises(DataError, match=r"seed 2, has \[0, 0\] steps of both stages. Move it to untrained/"):
        results.read_runs(two_seeds)
    trained.unlink()
    file.write_text(json.dumps({**json.loads(file.read_text()), "steps": [2, 1]}))
    with pytest.raises(DataError, match=r"seed 0, has \[2, 1\] steps of both stages"):
        results.read_runs(two_seeds)
    write(two_seeds, ONE, 0, share(3, 4), steps=[0, 0], hashes={**HASHES, "questions": TOLD, "base": "2a"})
    with pytest.raises(DataError, match="hash of taught base: 2a, but 0a in"):
        results.read_runs(two_seeds)


def test_records_without_their_questions(results, two_seeds):
    (two_seeds / "test" / "questions.jsonl").unlink()
    with pytest.raises(DataError, match="It lies beside the records"):
        results.read_runs(two_seeds)


@pytest.mark.slow
def test_the_command_ends_with_one_line(tmp_path):
    command = [sys.executable, str(FOLDER / "results.py"), "--out", "nothing", "--write", "written"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("results: error: nothing/test: no run is there. Run: ")
    assert "Traceback" not in done.stderr
