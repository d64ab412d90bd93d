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
"""Model cards, generated from what lies in a model folder: nothing in them is a number that was not measured.

- `model_card`: a folder -> its card.
- `write_card`: the same into README.md, after putting reports and results of other places into the folder.
- `draw_card_picture`: where a phantom goes inside the model, as `routing.png`.

Read are `config.json`, `processor_config.json`, the weights' headers, `conversion_report.json`, the
`training_report*.json` of both stages, `results*.json`, and `card.yaml` with what only a person knows (`CardFacts`).
"""

import json
import math
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from ct_moe.errors_ct_moe import PublishError

from .card_metadata import check_metadata
from .measurements import Results, Row, parse_results, read_results


REPO_ID, REVISION = "ORG/NAME", "REVISION"  # in a card that is not published yet; `ct-moe push` fills them in
PICTURE = "routing.png"
_UNKNOWN = "Not stated."
# Of a stage's settings those that say what was learned; the rest is in its training report.
_RECIPE = """
    learning_rate learning_rates per_device_train_batch_size gradient_accumulation_steps max_steps num_train_epochs
    warmup_steps weight_decay lr_scheduler_type optim max_grad_norm bf16 fp16 quantization questions_per_scan seed
    """.split()
_CITATIONS = """
```bibtex
@misc{arxiv260410233,
  title = {Adapting 2D Multi-Modal Large Language Model for 3D CT Image Analysis},
  eprint = {2604.10233}, archivePrefix = {arXiv}, url = {https://arxiv.org/abs/2604.10233}
}
@misc{arxiv241112783,
  title = {Med-2E3}, eprint = {2411.12783}, archivePrefix = {arXiv}, url = {https://arxiv.org/abs/2411.12783}
}
```
CT-MoE follows the first paper, whose code is unreleased, and takes slice scores (TG-IS) from the second."""


@dataclass
class CardFacts:
    """What no file of a run says: `card.yaml` in the model folder. All of it may be left out, except for publishing
    the licence.

    Attributes:
        title: of the card.
        license: the Hub's id; with `other` also `license_name` and `license_link`.
        language: codes of the languages that were trained.
        base_model: Hub id of the base, if it is not in the conversion report; `base` says the same in words.
        datasets: one mapping each with `name`, `license` and, if it is on the Hub, `id`.
        intended_use, population, scanners: a sentence each.
        limits: sentences.
        commands: that make such a model anew.
        hardware: what it was trained on, where the reports only say "cpu".
        energy_kwh: as it was measured, with `energy_source`, which says how.
        tags: besides those that every card has.
    """

    title: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: list[str] = field(default_factory=lambda: ["en"])
    base_model: str | None = None
    base: str | None = None
    datasets: list[dict[str, str]] = field(default_factory=list)
    intended_use: str | None = None
    population: str | None = None
    scanners: str | None = None
    limits: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    hardware: str | None = None
    energy_kwh: float | None = None
    energy_source: str | None = None
    tags: list[str] = field(default_factory=list)


def model_card(folder: str | Path, *, repo_id: str = REPO_ID, revision: str = REVISION) -> ModelCard:
    """The card of a model folder, or of a folder that holds an adapter only.

    Args:
        folder: as `ct-moe convert` or `ct-moe train` leaves it.
        repo_id, revision: what the snippet loads.

    Raises:
        PublishError: the folder holds neither a model nor an adapter, or a file in it cannot be used.
    """
    try:
        return _model_card(Path(folder), repo_id, revision)
    except (KeyError, TypeError, AttributeError, IndexError) as error:  # of JSON that is another program's
        finding = f"a config, report or results file in it lacks what a card shows ({type(error).__name__}: {error})"
        raise PublishError(folder, finding, "Write it again with this version") from error


def _model_card(folder: Path, repo_id: str, revision: str) -> ModelCard:
    facts, results = read_facts(folder), read_results(folder)
    config, adapter = _read_json(folder / "config.json"), _read_json(folder / "adapter_config.json")
    if config is None and adapter is None:
        raise PublishError(folder, "holds no config.json and no adapter_config.json", "Name a model folder")
    conversion, stages = _read_json(folder / "conversion_report.json"), _training_reports(folder)
    base_model = facts.base_model or _base_of(conversion) or (adapter or {}).get("base_model_name_or_path")
    title = facts.title or (repo_id.rpartition("/")[2] if repo_id != REPO_ID else "A CT-MoE model")
    scope = (config or {}).get("intended_scope")
    parts = [
        f"# {title}",
        _notice(scope, stages),
        _introduction(folder, config, adapter),
        "## Use\n\n" + (_use(repo_id, revision) if config else _use_adapter(adapter, repo_id, revision)),
        "## Intended use and limits\n\n" + _limits(facts, scope, _read_json(folder / "processor_config.json")),
        *(["## Model\n\n" + _architecture(config, conversion)] if config else []),
        "## Training data\n\n" + _data(facts, stages),
        "## Training\n\n" + _recipes(facts, stages),
        "## Results\n\n" + _results(results),
        *(["## Routing\n\n" + _routing()] if (folder / PICTURE).is_file() else []),
        "## Environmental cost\n\n" + _cost(facts, stages),
        "## Base model and licence\n\n" + _licence(facts, base_model, conversion),
        f"## Citation\n{_CITATIONS}",
    ]
    data = {
        "license": facts.license,
        "license_name": facts.license_name,
        "license_link": facts.license_link,
        "language": facts.language,
        "library_name": "transformers" if config else "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": list(dict.fromkeys(["ct-report", "ct", "mixture-of-experts", "medical", *facts.tags])),
        "base_model": base_model,
        "base_model_relation": None if base_model is None else "finetune" if config else "adapter",
        "datasets": [data["id"] for data in facts.datasets if "id" in data] or None,
        "model-index": [entry for result in results for entry in result.model_index(title)] or None,
    }
    data = {name: value for name, value in data.items() if value is not None}
    index = data.pop("model-index", None)
    if index is not None:  # one model, several results files
        data["model-index"] = [{"name": title, "results": [result for entry in index for result in entry["results"]]}]
    header = ModelCardData(**data).to_yaml()
    return ModelCard(f"---\n{header}\n---\n\n" + "\n\n".join(parts) + "\n")


def write_card(folder: str | Path, files: Iterable[str | Path] = ()) -> Path:
    """Write README.md into a model folder, in place of one that is there.

    Args:
        folder: the model.
        files: results, training or conversion reports that lie elsewhere. They are put into the folder first, without
            the ids of rows that could not be used or answered.

    Returns:
        The card.

    Raises:
        PublishError: as `model_card`, or a file is none of these.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PublishError(folder, "no such folder", "Name a model folder")
    gathered = dict(_gathered(Path(file)) for file in files)
    for name, content in gathered.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    card = folder / "README.md"
    card.write_text(str(model_card(folder)), encoding="utf-8")
    return card


def draw_card_picture(folder: str | Path) -> Path:
    """Run the model on a phantom that is drawn here, so no patient is in it, and write `routing.png`."""
    from ct_moe.trainers.phantoms.chest import write_phantom

    from .reporting import open_reporter
    from .routing_picture import draw_routing

    reporter = open_reporter(str(folder))
    with tempfile.TemporaryDirectory() as temporary:
        [scan] = reporter.processor.image_processor.fetch_images([str(write_phantom(Path(temporary) / "phantom.nii"))])
    routing = reporter(scan, return_routing="maps", max_new_tokens=1)["routing"]
    out = Path(folder) / PICTURE
    draw_routing(scan, reporter.processor.image_processor, routing, out, title="A synthetic chest phantom")
    return out


def read_facts(folder: str | Path) -> CardFacts:
    """`card.yaml` of a folder; without one, nothing is known.

    Raises:
        PublishError: it cannot be read, or has an entry that no card shows.
    """
    file = Path(folder) / "card.yaml"
    if not file.is_file():
        return CardFacts()
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PublishError(file.name, f"cannot be read ({type(error).__name__})", "Write YAML") from error
    known = [entry.name for entry in fields(CardFacts)]
    if not isinstance(content, dict) or (unknown := sorted(set(content) - set(known))):
        finding = f"has the entry {unknown[0]!r}" if isinstance(content, dict) else "is no mapping"
        raise PublishError(file.name, finding, f"Use {', '.join(known)}")
    facts = CardFacts(**content)
    if (facts.energy_kwh is None) != (facts.energy_source is None):
        raise PublishError(file.name, "energy_kwh and energy_source belong together", "Say how it was measured")
    if not all(isinstance(data, dict) and {"name", "license"} <= data.keys() for data in facts.datasets):
        raise PublishError(file.name, "a data set has no name or no license", "Give both; id is its Hub id")
    return facts


def _gathered(file: Path) -> tuple[str, dict[str, Any]]:
    """Under which name a file belongs into the folder, and what of it."""
    content = _read_json(file)
    if not isinstance(content, dict):
        raise PublishError(file, "is missing or no JSON object", "Name results or a report")
    if "stage" in content and "settings" in content:
        return f"training_report_{content['stage']}.json", content
    if "reused" in content and "added" in content:
        return "conversion_report.json", content
    found = parse_results(file)
    content = {name: value for name, value in content.items() if name not in ("unanswered", "bad_rows")}
    data = "phantoms" if found.is_phantoms else found.content["about"].get("data", "predictions")
    return f"results_{data}_{found.split}.json", content


def _read_json(file: Path) -> Any:
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PublishError(file.name, f"is no JSON ({type(error).__name__})", "Write it again") from error


def _training_reports(folder: Path) -> list[dict[str, Any]]:
    """Of both stages, in order."""
    found = {}
    for file in sorted(folder.glob("training_report*.json")):
        report = _read_json(file)
        found[report["stage"]] = report
    return [found[stage] for stage in sorted(found)]


def _base_of(conversion: dict[str, Any] | None) -> str | None:
    """A base that was a folder is named in the text only: its name would be taken for a Hub id."""
    return None if conversion is None or conversion["revision"] is None else conversion["base"]


def _notice(scope: str | None, stages: list[dict]) -> str:
    lines = [
        "> **Not a medical device.** Its text can be wrong or leave things out; a radiologist must read the scan."
    ]
    if scope == "untrained" or (scope is None and not stages):
        lines.append("> It was never trained on CT: its reports mean nothing.")
    elif scope is not None:
        lines.append(f"> It was trained for: {scope}. Every output says so.")
    return "\n".join(lines)


def _introduction(folder: Path, config: dict | None, adapter: dict | None) -> str:
    count, size, dtypes = _weights(folder)
    what = (
        "A 2D multimodal language model that reads whole CT volumes: its vision encoder attends across slices, with "
        "positions in millimetres, and a text-guided hierarchical mixture of experts (TGH-MoE) lets the prompt choose "
        "visual features. Made with CT-MoE."
        if config
        else f"An adapter ({adapter.get('peft_type', 'PEFT')}, rank {adapter.get('r', 'unknown')}) for the CT-MoE "
        f"model `{adapter.get('base_model_name_or_path')}`."
    )
    return f"{what} {count:,} parameters, {size / 1e6:,.0f} MB, stored in {' and '.join(dtypes)}."


def _weights(folder: Path) -> tuple[int, int, list[str]]:
    """Parameters, bytes and dtypes, by the headers of the files."""
    count, size, dtypes = 0, 0, {}
    for file in sorted(folder.glob("*.safetensors")):
        header = read_header(file)
        header.pop("__metadata__", None)
        for tensor in header.values():
            count += math.prod(tensor["shape"])
            dtypes[tensor["dtype"]] = None
        size += file.stat().st_size
    return count, size, sorted(dtypes)


def read_header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file: tensors by name, and `__metadata__`.

    Raises:
        PublishError: it is no such file.
    """
    try:
        with file.open("rb") as content:
            length = int.from_bytes(content.read(8), "little")
            if not 0 < length <= min(100_000_000, file.stat().st_size - 8):
                raise ValueError(length)
            header = json.loads(content.read(length))
        if not isinstance(header, dict):
            raise ValueError(type(header))
    except (OSError, ValueError) as error:
        raise PublishError(file.name, "is no safetensors file", "Save the model again") from error
    return header


def _use(repo_id: str, revision: str) -> str:
    return f"""\
```python
from transformers import pipeline

reporter = pipeline("ct-report", model="{repo_id}", revision="{revision}", trust_remote_code=True)
report = reporter("scan.nii.gz")  # or a folder or zip with a DICOM series
print(report["findings"], report["impression"], report["scope"], report["notice"])
print(reporter("scan.nii.gz", question="Is there a pleural effusion?")["answer"])
```

It needs `torch`, `transformers>=5.23,<5.24`, `nibabel` and `pillow`; DICOM also `pydicom`. `trust_remote_code` runs
the code of this repository: the revision pins what you have read."""


def _use_adapter(adapter: dict, repo_id: str, revision: str) -> str:
    base, at = adapter.get("base_model_name_or_path"), adapter.get("revision")
    return f"""\
```python
from peft import PeftModel
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{base}", revision="{at}", trust_remote_code=True)
model = PeftModel.from_pretrained(model, "{repo_id}", revision="{revision}")
processor = AutoProcessor.from_pretrained("{base}", revision="{at}", trust_remote_code=True)
```"""


def _limits(facts: CardFacts, scope: str | None, processor: dict | None) -> str:
    images = (processor or {}).get("image_processor", {})
    lines = [
        f"**Intended use**: {facts.intended_use or 'research on CT reports and questions about CT scans.'}",
        f"**Scope of training**: {scope or _UNKNOWN}",
        "**Not for**: diagnosis, triage, or any other decision about a patient.",
        "**Errors**: it can invent findings, leave findings out, and contradict itself; fluent text is no sign that "
        "it is right. Prompts can steer what it says.",
        f"**Population**: {facts.population or _UNKNOWN} **Scanners, contrast, protocols**: "
        f"{facts.scanners or _UNKNOWN} Expect worse outside of them.",
    ]
    if images.get("intensity") == "hu" and images.get("slab_mm") is not None:
        lines.append(
            f"**Resolution**: slices are averaged to slabs of {images['slab_mm']:g} mm or more (at most "
            f"{images.get('max_slices')} of them) and {images['size']['height']} x {images['size']['width']} pixels: "
            "smaller findings can vanish. Every output names the slab that was used."
        )
    lines += ["**Routing and slice scores** are no evidence for what the text says.", *facts.limits]
    return _list(lines)


def _architecture(config: dict, conversion: dict | None) -> str:
    vision, text = config["vision_config"], config["text_config"]
    volume_layers, moe_layers = vision.get("volume_layers") or [], vision.get("moe_layers") or []
    lines = [
        f"Vision encoder: {vision['num_hidden_layers']} layers of width {vision['hidden_size']}, "
        f"{vision['image_size']} pixels in patches of {vision['patch_size']}; attention across slices in the layers "
        f"{_words(volume_layers)}; experts in the layers {_words(moe_layers)}.",
        f"Experts: {vision['num_experts']} per group, {vision['num_experts_per_tok']} per token, width "
        f"{vision['moe_intermediate_size']}; shared group: {'yes' if vision['shared_group'] else 'no'}; tasks: "
        f"{_words(config['tasks'])}.",
        f"Pooling (z, y, x): {_words(config['pool'])}; slice scoring: {config['slice_scoring']}. Language model: "
        f"{text['model_type']}, {text['num_hidden_layers']} layers of width {text['hidden_size']}.",
    ]
    if conversion is not None:
        parity = conversion["parity"]
        measured = (
            "not measured"
            if isinstance(parity, str)
            else f"{parity['max_abs_difference']:.2g} in float32 over {parity['num_logits']:,} logits"
        )
        lines.append(f"Conversion: largest difference to the base's own logits, before training: {measured}.")
    return _list(lines)


def _data(facts: CardFacts, stages: list[dict]) -> str:
    lines = [
        f"**{data['name']}**" + (f" (`{data['id']}`)" if "id" in data else "") + f": {data['license']}"
        for data in facts.datasets
    ] or [_UNKNOWN]
    for report in stages:
        if report.get("rows"):
            rows = ", ".join(f"{count:,} {task}" for task, count in report["rows"].items())
            skipped = f"; {report['rows_skipped']:,} could not be read" if report.get("rows_skipped") else ""
            lines.append(f"Rows of {report['stage']}: {rows}{skipped}")
    return _list(lines)


def _recipes(facts: CardFacts, stages: list[dict]) -> str:
    commands = "\n\n```bash\n" + "\n".join(facts.commands) + "\n```" if facts.commands else ""
    if not stages:
        return "No training report is in this folder: nothing is known about it." + commands
    names = list(dict.fromkeys(part["name"] for report in stages for part in report["parts"]))
    rows = [["steps", *(f"{report['steps']:,}" for report in stages)]]
    rows.append(["processes", *(f"{report['processes']} x {report['device']}" for report in stages)])
    settings = list(dict.fromkeys(name for report in stages for name in report["settings"]))
    for name in settings:
        if name in _RECIPE or name.startswith(("lora_", "train_")):
            rows.append([name, *(_setting(report["settings"].get(name)) for report in stages)])
    for name in names:
        rows.append([f"trained: {name}", *(_part(report, name) for report in stages)])
    libraries = stages[-1]["versions"]
    used = {name: dict.fromkeys(report["versions"].get(name, "unknown") for report in stages) for name in libraries}
    versions = ", ".join(f"{name} {', then '.join(numbers)}" for name, numbers in used.items())
    return (
        "First what all tasks share, then what is special to each; settings not listed have their defaults.\n\n"
        + _table(["", *(report["stage"] for report in stages)], rows)
        + f"\n\nVersions: {versions}.{commands}"
    )


def _part(report: dict, name: str) -> str:
    for part in report["parts"]:
        if part["name"] == name:
            trained = part["lora"] or part["trained"]
            return f"{part['mode']}, {trained:,} of {part['total']:,}" if trained else part["mode"]
    return "-"


def _setting(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_setting(inner)}" for name, inner in value.items())
    return "default" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _results(results: list[Results]) -> str:
    if not results:
        return "Nothing was measured."
    blocks = []
    for result in results:
        rows, findings = result.rows(), result.findings()
        blocks.append(f"### {result.data}, {result.split}\n\n{result.protocol}\n\n{_results_table(rows)}")
        if findings:
            cells = [
                [name, *(f"{scores[key]:.2f}" for key in ("precision", "recall", "f1")), str(scores["support"])]
                for name, scores in findings.items()
            ]
            blocks.append(_table(["finding in reports", "precision", "recall", "F1", "with it"], cells))
        blocks.append(f"All numbers: [{result.file}]({result.file}).")
    return "\n\n".join(blocks)


def _results_table(rows: list[Row]) -> str:
    compared = list(dict.fromkeys(name for row in rows for name in row.baselines))
    cells = []
    for row in rows:
        digits = 3 if abs(row.value) <= 1 and not row.metric.startswith("%") else 1
        low_high = "" if row.interval is None else f" [{row.interval[0]:.{digits}f}, {row.interval[1]:.{digits}f}]"
        beside = (f"{row.baselines[name]:.{digits}f}" if name in row.baselines else "" for name in compared)
        cells.append([row.part, row.metric, f"{row.value:.{digits}f}{low_high}", *beside])
    return _table(["part (rows)", "metric", "model [95 % interval]", *compared], cells)


def _routing() -> str:
    return (
        f"![Which experts a phantom's slices went to]({PICTURE})\n\n"
        "A synthetic phantom inside this model. It shows which parts of the network processed which parts of the "
        "scan; it does not show why the text says what it says."
    )


def _cost(facts: CardFacts, stages: list[dict]) -> str:
    lines = []
    for report in stages:
        hours = report["seconds_since_start_or_resume"] / 3600
        lines.append(
            f"{report['stage']}: {hours:.2f} hours on {report['processes']} x {report['device']}, since the start or "
            "the last time it was resumed"
        )
    if facts.hardware:
        lines.append(f"Hardware: {facts.hardware}")
    lines.append(
        "Energy and emissions: not measured."
        if facts.energy_kwh is None
        else f"Energy: {facts.energy_kwh:g} kWh ({facts.energy_source}). Emissions: not measured."
    )
    if not stages:
        lines.insert(0, "Time: unknown, no training report is in this folder")
    return _list(lines)


def _licence(facts: CardFacts, base_model: str | None, conversion: dict | None) -> str:
    base = facts.base or (f"[{base_model}](https://huggingface.co/{base_model})" if base_model else None)
    if base is None and conversion is not None:
        base = f"{conversion['base']} ({conversion['kind']['model']})"
    revision = f" at revision `{conversion['revision']}`" if conversion and conversion["revision"] else ""
    licence = facts.license_name or facts.license
    linked = f"[{licence}]({facts.license_link})" if facts.license_link else licence
    named = _UNKNOWN if licence is None else f"{linked}."
    return (
        f"Base: {base or _UNKNOWN}{revision}\n\nLicence of these weights: {named} Weights keep the licence "
        "of their base, and data sets bring their own; the code is Apache-2.0."
    )


def _list(lines: list[str]) -> str:
    return "\n".join(f"- {' '.join(str(line).split())}" for line in lines)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(" ".join(c.replace("|", "\\|").split()) for c in line) + " |" for line in lines)


def _words(values: list) -> str:
    return ", ".join(map(str, values)) or "none"


__all__ = ["CardFacts", "check_metadata", "draw_card_picture", "model_card", "read_facts", "write_card"]
