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
"""Numbers for print are cut, not rounded."""

import pytest

from ct_moe.trainers.evaluation.cut_numbers import cut, cut_percent


@pytest.mark.parametrize(
    ("number", "text"), [(0.29, "29.0"), (0.8199, "81.9"), (0.99999, "99.9"), (-0.0004, "0.0"), (-0.0128, "-1.2")]
)
def test_shares_are_cut_not_rounded(number, text):
    assert cut_percent(number) == text


@pytest.mark.parametrize("thousandths", range(0, 1001, 7))
def test_what_has_few_decimals_stays(thousandths):
    assert cut_percent(thousandths / 1000) == f"{thousandths // 10}.{thousandths % 10}"
    assert cut(thousandths / 1000, 3) == f"{thousandths / 1000:.3f}"


def test_decimals_and_sign():
    assert cut(1.999, 2) == "1.99"
    assert cut(7.96) == "7.9"
    assert cut(-7.96) == "-7.9"
    assert cut(0.05, sign=True) == "+0.0"
    assert cut_percent(0.1239, sign=True) == "+12.3"
