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
"""Intervals are those of all possible resamples, of theory, or worked out by hand."""

import itertools
import random
import statistics

import numpy as np
import pytest

from ct_moe import DataError
from ct_moe.trainers.evaluation import bootstrap
from ct_moe.trainers.evaluation.bootstrap import (
    bootstrap_interval,
    mean_of_strata_interval,
    paired_bootstrap_interval,
)


# Four scans with 1 to 4 questions, their rows mixed.
SCANS = ["b", "a", "c", "d", "c", "b", "d", "d", "c", "d"]
SCORES = [0.0, 9.0, 1.0, 4.0, 2.5, 1.5, 5.0, 7.5, 3.0, 8.0]


def all_resamples(statistic) -> np.ndarray:
    """The statistic of each of the 4^4 equally likely resamples of scans."""
    of_scan = {scan: [score for name, score in zip(SCANS, SCORES) if name == scan] for scan in "abcd"}
    resamples = itertools.product(of_scan.values(), repeat=4)
    return np.array([statistic(list(itertools.chain(*resample))) for resample in resamples])


def test_two_values_worked_out_by_hand():
    # The mean of a resample of 0 and 1 is 0, 0.5, 0.5 or 1.
    assert bootstrap_interval([0, 1]) == (0, 1)
    assert bootstrap_interval([0, 1], confidence=0.4) == (0.5, 0.5)
    # With 3 zeros in one scan and a single 1 in another: 0, 0.25, 0.25 or 1.
    assert bootstrap_interval([0, 0, 0, 1], ["a", "a", "a", "b"], confidence=0.4) == (0.25, 0.25)


@pytest.mark.parametrize(("ours", "theirs"), [(np.mean, statistics.fmean), (np.median, statistics.median)])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95])
def test_ends_are_quantiles_of_all_possible_resamples(ours, theirs, confidence):
    wanted = all_resamples(theirs)
    low, high = bootstrap_interval(SCORES, SCANS, statistic=ours, confidence=confidence, resamples=20_000)
    for end, share in ((low, (1 - confidence) / 2), (high, (1 + confidence) / 2)):
        assert (wanted < end - 1e-9).mean() <= share + 0.01
        assert (wanted <= end + 1e-9).mean() >= share - 0.01


def test_interval_of_a_mean_is_that_of_a_loop_and_of_theory():
    values = np.random.default_rng(1).normal(50, 10, size=400)
    low, high = bootstrap_interval(values, resamples=10_000)
    generator = random.Random(2)
    means = sorted(statistics.fmean(generator.choices(values.tolist(), k=400)) for _ in range(4_000))
    error = values.std() / 20
    assert [low, high] == pytest.approx([means[100], means[3900]], abs=0.12 * error)
    assert [low, high] == pytest.approx([values.mean() - 1.96 * error, values.mean() + 1.96 * error], abs=0.12 * error)


def test_the_vectorised_mean_is_the_mean_of_each_resample():
    one_by_one = bootstrap_interval(SCORES, SCANS, statistic=lambda values: values.mean(), seed=3)
    assert bootstrap_interval(SCORES, SCANS, seed=3) == pytest.approx(one_by_one)


def test_repeated_values_of_a_scan_add_no_certainty():
    values = np.arange(8.0)
    repeated, scans = np.repeat(values, 10), np.repeat(np.arange(8), 10)
    low, high = bootstrap_interval(values)
    assert bootstrap_interval(repeated, scans) == pytest.approx((low, high))
    narrow_low, narrow_high = bootstrap_interval(repeated)
    assert narrow_high - narrow_low < 0.5 * (high - low)


def test_same_arguments_same_interval_whatever_is_held_in_memory(monkeypatch):
    wanted = bootstrap_interval(SCORES, SCANS)
    assert bootstrap_interval(SCORES, SCANS) == wanted
    monkeypatch.setattr(bootstrap, "_DRAWS_AT_ONCE", 13)
    assert bootstrap_interval(SCORES, SCANS) == wanted
    values = np.random.default_rng(0).normal(size=30)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values)


def test_paired_interval_sees_a_small_difference_in_hard_and_easy_scans():
    rng = np.random.default_rng(0)
    b = rng.normal(50, 30, size=60)
    a = b + 1 + rng.normal(0, 0.5, size=60)
    low, high = paired_bootstrap_interval(a, b, np.arange(60) // 3)
    assert 0.5 < low < (a - b).mean() < high < 1.5
    assert bootstrap_interval(a)[0] < bootstrap_interval(b)[1]  # two intervals overlap
    assert paired_bootstrap_interval(b, a, np.arange(60) // 3)[1] < 0
    assert paired_bootstrap_interval(b + 2, b) == pytest.approx((2, 2))


@pytest.mark.parametrize(
    ("arguments", "options", "finding"),
    [
        (([],), {}, "groups: 0 in all"),
        (([1.0],), {}, "groups: 1 in all"),
        (([1.0, 2.0], ["a", "a"]), {}, "groups: 1 in all"),
        (([1.0, 2.0], ["a"]), {}, "groups: 1 for 2 values"),
        (([1.0, 2.0], ["a", None]), {}, "number 2 is missing"),
        (([1.0, 2.0], ["a", float("nan")]), {}, "number 2 is missing"),
        (([1.0, float("nan")],), {}, "values: number 2 is nan"),
        (([[1.0], [2.0]],), {}, "values: has the shape"),
        (([1.0, 2.0],), {"confidence": 95}, "confidence: is 95"),
        (([1.0, 2.0],), {"resamples": 0}, "resamples: is 0"),
    ],
)
def test_what_has_no_interval_is_refused(arguments, options, finding):
    with pytest.raises(DataError, match=finding):
        bootstrap_interval(*arguments, **options)


def test_pairs_of_unequal_length_are_refused():
    with pytest.raises(DataError, match="have 2 and 3 values"):
        paired_bootstrap_interval([1, 2], [1, 2, 3])


def test_strata_count_alike_and_agree_with_a_loop():
    rng = np.random.default_rng(1)
    strata = rng.choice(["a", "b", "c"], 200, p=[0.7, 0.2, 0.1])
    groups = rng.integers(0, 40, 200)
    values = rng.random(200) + (strata == "c")

    def mean(rows):
        rows = rows.astype(int)
        return np.mean([values[rows][strata[rows] == name].mean() for name in set(strata[rows])])

    wanted = bootstrap_interval(np.arange(200), groups, statistic=mean, resamples=300)
    found = mean_of_strata_interval(values, strata, groups, resamples=300)
    assert found == pytest.approx(wanted)
    assert mean_of_strata_interval(values, ["one"] * 200, groups) == pytest.approx(bootstrap_interval(values, groups))
    with pytest.raises(DataError, match="199 for 200 values"):
        mean_of_strata_interval(values, strata[1:], groups)
