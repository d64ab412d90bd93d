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
"""Percentile bootstrap intervals (Efron and Tibshirani 1993, chapter 13) that keep the values of a scan together.

Questions about one scan are not independent, so that intervals over questions alone come out too narrow. Here whole
groups are drawn with replacement, each with all its values (the cluster bootstrap: Davison and Hinkley 1997, 3.8).
"""

from collections.abc import Callable, Hashable, Iterator, Sequence

import numpy as np

from ct_moe import DataError


_DRAWS_AT_ONCE = 2**22  # group indices held in memory: 32 MB


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    groups: Sequence[Hashable] | None = None,
    *,
    statistic: Callable[[np.ndarray], float] = np.mean,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Interval of a statistic of `values`, the same for the same arguments.

    Below some ten groups it is too narrow. Means over values differ from means over groups where groups differ in
    size: a resample's mean weighs every value alike.

    Args:
        values: `(N,)` one number for each row, a score for example.
        groups: `(N,)` what each row belongs to: its scan or, better, its patient. None: every row on its own.
        statistic: of the values of a resample. The mean is computed for all resamples at once, others one by one.
        confidence: share of the bootstrap distribution inside the interval.
        resamples: how often groups are drawn.
        seed: of the draws.

    Returns:
        The lower and upper end.
    """
    values, members = _grouped(values, groups)
    if not 0 < confidence < 1:
        raise DataError("confidence", f"is {confidence}", "Use a number between 0 and 1, such as 0.95")
    if resamples < 1:
        raise DataError("resamples", f"is {resamples}", "Use 1000 or more")
    draws = _draws(len(members), resamples, seed)
    if statistic is np.mean:
        sums = np.array([values[rows].sum() for rows in members])
        sizes = np.array([len(rows) for rows in members])
        statistics = [sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1) for drawn in draws]
    else:
        statistics = [
            [statistic(values[np.concatenate([members[group] for group in resample])]) for resample in drawn]
            for drawn in draws
        ]
    low, high = np.quantile(np.concatenate(statistics), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def paired_bootstrap_interval(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    groups: Sequence[Hashable] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Interval of `mean(a) - mean(b)` for two models on the same rows, both resampled together.

    What makes a scan hard for both models cancels, which two separate intervals cannot show. Arguments as in
    `bootstrap_interval`; `a` and `b` hold the same rows in the same order.
    """
    a, b = _numbers(a, "a"), _numbers(b, "b")
    if len(a) != len(b):
        raise DataError("a and b", f"have {len(a)} and {len(b)} values", "Pass the same rows in the same order")
    return bootstrap_interval(a - b, groups, confidence=confidence, resamples=resamples, seed=seed)


def mean_of_strata_interval(
    values: Sequence[float] | np.ndarray,
    strata: Sequence[Hashable],
    groups: Sequence[Hashable] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Interval of the mean over strata of the means in each: types of questions that count alike, however many rows.

    Groups are drawn whole, with all their strata. A resample without any row of a stratum leaves that one out.
    Arguments as in `bootstrap_interval`; `strata` `(N,)` is what each row belongs to.
    """
    values, members = _grouped(values, groups)
    if len(strata) != len(values):
        raise DataError("strata", f"{len(strata)} for {len(values)} values", "Pass one for each value")
    number = np.unique(np.asarray(strata).astype(str), return_inverse=True)[1]
    width = number.max() + 1
    sums = np.stack([np.bincount(number[rows], values[rows], width) for rows in members])
    sizes = np.stack([np.bincount(number[rows], minlength=width) for rows in members])
    found = []
    for drawn in _draws(len(members), resamples, seed):
        times = np.stack([np.bincount(resample, minlength=len(members)) for resample in drawn]).astype(np.float64)
        total, size = times @ sums, times @ sizes
        found.append(np.nanmean(np.divide(total, size, out=np.full_like(total, np.nan), where=size > 0), axis=1))
    low, high = np.quantile(np.concatenate(found), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _numbers(values: Sequence[float] | np.ndarray, name: str) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1:
        raise DataError(name, f"has the shape {values.shape}", "Pass one number for each row")
    if not np.isfinite(values).all():
        number = int(np.flatnonzero(~np.isfinite(values))[0]) + 1
        raise DataError(name, f"number {number} is {values[number - 1]}", "Leave out rows without a score")
    return values


def _grouped(
    values: Sequence[float] | np.ndarray, groups: Sequence[Hashable] | None
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The values, and the indices of each group's values; groups in the order in which they first appear."""
    values = _numbers(values, "values")
    if groups is None:
        groups = range(len(values))
    if len(groups) != len(values):
        raise DataError("groups", f"{len(groups)} for {len(values)} values", "Pass one group for each value")
    members: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        if group is None or group != group:  # missing values, as None or NaN
            raise DataError("groups", f"number {row + 1} is missing", "Name the scan or the patient of every row")
        members.setdefault(group, []).append(row)
    if len(members) < 2:
        raise DataError("groups", f"{len(members)} in all", "An interval needs two groups or more: add scans")
    return values, [np.array(rows) for rows in members.values()]


def _draws(num_groups: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks `(resamples, num_groups)` of group indices. They do not depend on how large the blocks are."""
    generator = np.random.default_rng(seed)
    block = max(1, _DRAWS_AT_ONCE // num_groups)
    for start in range(0, resamples, block):
        yield generator.integers(num_groups, size=(min(block, resamples - start), num_groups))
