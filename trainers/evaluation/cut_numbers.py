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
"""Numbers for print, cut after a decimal: rounding up would claim more than was measured."""

import math


def cut(number: float, decimals: int = 1, sign: bool = False) -> str:
    """A number without the decimals beyond the first so many; `sign` writes that of positive numbers too."""
    # `round` only undoes what binary fractions do to 0.29.
    value = math.trunc(round(number * 10**decimals, 6)) / 10**decimals + 0.0  # no -0.0
    return f"{value:+.{decimals}f}" if sign else f"{value:.{decimals}f}"


def cut_percent(share: float, sign: bool = False) -> str:
    """A share as percent, with one decimal."""
    return cut(100 * share, 1, sign)
