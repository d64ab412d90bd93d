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
"""A picture of scores by type of question: `plot_kinds`."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ct_moe.hub.whole_file import whole_file


METRICS = {"closed": "strict", "open": "bleu1", "report": "bleu1"}
TITLES = {"closed": "closed questions, % right", "open": "open questions, BLEU-1", "report": "reports, BLEU-1"}


def plot_kinds(result: dict[str, Any], file: Path) -> bool:
    """Draw the model and its baselines by type of question, with intervals; False where there is no matplotlib."""
    parts = [part for part in METRICS if part in result]
    if not parts or find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    systems = {"model": result, **result.get("baselines", {})}
    heights = [len(result[part]["kinds"]) + 1 for part in parts]
    figure = Figure(figsize=(8, 0.9 + 0.45 * sum(heights) + 0.7 * len(parts)), layout="constrained")
    axes = figure.subplots(len(parts), 1, squeeze=False, height_ratios=heights)[:, 0]
    markers = "oDs^v"
    for axis, part in zip(axes, parts):
        metric, kinds = METRICS[part], sorted(result[part]["kinds"])
        names = ["all", *kinds]
        for number, (system, scores) in enumerate(systems.items()):
            if part not in scores:
                continue
            for row, name in enumerate(names):
                of_kind = scores[part]["metrics"] if name == "all" else scores[part]["kinds"].get(name)
                if of_kind is None:
                    continue
                mean, interval = of_kind[metric]["mean"], of_kind[metric]["interval"]
                y = row + 0.12 * (number - (len(systems) - 1) / 2)
                if interval:
                    axis.plot(interval, [y, y], color=f"C{number}", linewidth=1.5)
                label = {"label": system} if row == 0 else {}
                axis.plot(mean, y, markers[number % len(markers)], color=f"C{number}", markersize=5, **label)
        rows = [result[part]["rows"], *(result[part]["kinds"][kind]["rows"] for kind in kinds)]
        axis.set_yticks(range(len(names)), [f"{name} ({count})" for name, count in zip(names, rows)])
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_xlim(-2, 102)
        axis.set_title(TITLES[part], loc="left", fontsize=10)
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    legend: dict[str, object] = {}
    for axis in axes:
        legend |= dict(zip(*axis.get_legend_handles_labels()[::-1]))
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=len(legend), frameon=False)
    with whole_file(file) as part:
        figure.savefig(part, dpi=120)
    return True
