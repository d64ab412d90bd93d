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
"""Model cards: what they say is in the folder, and they are Markdown and metadata that others can read."""

import json
import re
import shutil

import pytest
import yaml
from command_line import fail, invoke
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image
from safetensors import safe_open

from ct_moe import PublishError
from ct_moe.hub.card import model_card, write_card
from ct_moe.hub.card_metadata import check_metadata
from ct_moe.trainers.data_sets.item import Item
from ct_moe.trainers.evaluation.results import model_index, score_predictions


FACTS = {
    "title": "Lungs | and more",
    "license": "other",
    "license_name": "lab-licence",
    "license_link": "LICENSE",
    "base_model": "llava-hf/llava-1.5-7b-hf",
    "datasets": [{"id": "lab/scans", "name": "Scans of the lab", "license": "CC BY 4.0"}],
    "limits": ["Thin slices only."],
    "commands": ["ct-moe train --config recipe.yaml"],
}
STAGE = {
    "stage": "stage1",
    "settings": {"learning_rate": 0.001, "lora_r": 8, "dataloader_num_workers": 1},
    "versions": {"torch": "2.13.0"},
    "parts": [{"name": "projector", "mode": "full", "trained": 1234, "total": 5678, "lora": 0}],
    "rows": {"report": 1500},
    "rows_skipped": 2,
    "steps": 700,
    "processes": 2,
    "device": "NVIDIA H100",
    "seconds_since_start_or_resume": 5400.0,
    "log": [],
}


@pytest.fixture
def folder(model_folder, tmp_path):
    out = tmp_path / "model"
    shutil.copytree(model_folder, out)
    return out


@pytest.fixture
def results(tmp_path):
    """What `ct-moe evaluate` writes about four questions and four reports."""
    items, texts = [], []
    for number in range(4):
        shared = {"images": [], "patient": f"p{number}", "where": ("rows", number), "prompt": "?"}
        closed = {"task": "vqa_closed", "kind": "organ", "choices": ["liver", "lung"], "answer": "lung"}
        items.append(Item(id=f"q{number}", completion="B. lung", **closed, **shared))
        items.append(Item(id=f"r{number}", completion="No nodule is seen.", task="report", kind="report", **shared))
        texts += ["B. lung" if number else "A. liver", "No nodule is seen." if number else "A nodule."]
    scored = score_predictions(items, texts, meteor=False)
    about = {"data": "ct-rate", "title": "CT-RATE, reports", "licence": "-", "split": "validation", "rows": None}
    result = {"about": about, "system": {"dtype": "float32"}, **scored, "baselines": {"majority": scored}}
    result["model_index"] = model_index(result, name="m", data="CT-RATE", data_id="lab/ct-rate", split="validation")
    result |= {"unanswered": ["patient-7"], "bad_rows": ["rows.csv, line 3: no scan"]}
    file = tmp_path / "results.json"
    file.write_text(json.dumps(result))
    return file


def section(card: ModelCard, name: str) -> str:
    return re.split(r"\n## ", card.text.split(f"\n## {name}\n")[1])[0]


def test_an_untrained_model_has_a_card_that_claims_nothing(folder):
    card = model_card(folder)
    assert "never trained on CT: its reports mean nothing" in card.text
    assert "Nothing was measured." in section(card, "Results")
    assert "nothing is known about it" in section(card, "Training")
    assert "Energy and emissions: not measured." in section(card, "Environmental cost")
    assert "Not a medical device" in card.text
    assert "model-index" not in card.data.to_dict()
    with pytest.raises(PublishError, match="names no licence"):  # nobody said which
        check_metadata(card.data.to_dict())
    with safe_open(folder / "model.safetensors", "pt") as file:
        count = sum(file.get_tensor(name).numel() for name in file.keys())
    assert f"{count:,} parameters" in card.text


def test_all_that_is_in_the_folder_is_in_the_card(folder, results, tmp_path):
    (folder / "card.yaml").write_text(yaml.safe_dump(FACTS))
    (tmp_path / "one.json").write_text(json.dumps(STAGE))
    later = {"stage": "stage2", "steps": 300, "versions": {"torch": "2.14.0"}}
    (tmp_path / "two.json").write_text(json.dumps({**STAGE, **later}))
    Image.new("RGB", (4, 4)).save(folder / "routing.png")
    written = write_card(folder, [results, tmp_path / "one.json", tmp_path / "two.json"])
    card = ModelCard.load(written)
    data = card.data.to_dict()
    check_metadata(data)
    assert (data["license"], data["base_model"], data["datasets"]) == ("other", FACTS["base_model"], ["lab/scans"])
    assert "ct-report" in data["tags"]
    training = section(card, "Training")
    for words in ("| steps | 700 | 300 |", "full, 1,234 of 5,678", "| learning_rate | 0.001 |", "| lora_r | 8 |"):
        assert words in training
    assert "Versions: torch 2.13.0, then 2.14.0." in training
    assert "dataloader" not in training
    assert FACTS["commands"][0] in training
    assert "1,500 report; 2 could not be read" in section(card, "Training data")
    assert "stage2: 1.50 hours on 2 x NVIDIA H100" in section(card, "Environmental cost")
    assert "![" in section(card, "Routing")
    assert "2604.10233" in card.text
    assert "2411.12783" in card.text
    # Three of four are right; the results file is the source of every number, and comes without names of rows.
    measured = json.loads((folder / "results_ct-rate_validation.json").read_text())
    assert not {"unanswered", "bad_rows"} & measured.keys()
    low, high = measured["closed"]["metrics"]["strict"]["interval"]
    row = f"| closed questions (4) | strict | 75.0 [{low:.1f}, {high:.1f}] | 75.0 |"
    assert row in section(card, "Results")
    entries = {m["name"]: m["value"] for r in data["model-index"][0]["results"] for m in r["metrics"]}
    assert entries["strict (closed)"] == 75.0


def test_the_snippet_loads_what_it_is_told_to(folder):
    card = model_card(folder, repo_id="lab/model", revision="v1")
    assert 'model="lab/model", revision="v1", trust_remote_code=True' in section(card, "Use")
    [code] = [token for token in MarkdownIt().parse(section(card, "Use")) if token.type == "fence"]
    compile(code.content, "card", "exec")
    assert len(code.content.strip().splitlines()) <= 6


def test_the_card_is_markdown_whose_tables_are_whole(folder, results):
    (folder / "card.yaml").write_text(yaml.safe_dump({**FACTS, "limits": ["a | b"], "title": "x | y"}))
    (folder / "training_report.json").write_text(json.dumps({**STAGE, "device": "GPU | 80 GB"}))
    card = ModelCard.load(write_card(folder, [results]))
    tokens = MarkdownIt().enable("table").parse(card.text)
    rows, cells = [], None
    for token in tokens:
        if token.type == "tr_open":
            cells = 0
        elif token.type in ("td_open", "th_open"):
            cells += 1
        elif token.type == "tr_close":
            rows.append(cells)
        elif token.type == "inline" and token.level < 4:
            assert not token.content.startswith("|"), token.content  # a table that is none
    lines = [line for line in card.text.splitlines() if line.startswith("|") and not set(line) <= set("|- ")]
    assert len(rows) == len(lines) > 5
    assert [len(re.split(r"(?<!\\)\|", line)) - 2 for line in lines] == rows
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings[0] == "x | y"
    assert "Intended use and limits" in headings


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"license": None}, "no licence"),
        ({"license": "apache"}, "none of the Hub's"),
        ({"license": "other", "license_name": None}, "without a name"),
        ({"pipeline_tag": "ct-report"}, "pipeline_tag"),
        ({"library_name": None}, "library_name"),
        ({"tags": ["ct"]}, "no tag ct-report"),
        ({"tags": "ct-report, ct"}, "no list of words"),
        ({"datasets": ["my scans"]}, "no Hub id"),
        ({"base_model": ["a/b/c"]}, "no Hub id"),
        ({"language": "English"}, "ISO 639"),
        ({"metrics": [1]}, "no list of words"),
        ({"base_model_relation": "child"}, "base_model_relation"),
        ({"model-index": [{"name": "x"}]}, "model-index cannot be read"),
    ],
)
def test_metadata_that_the_hub_refuses_is_refused_here(folder, change, finding):
    data = {**model_card(folder).data.to_dict(), "license": "mit"}
    check_metadata(data)
    with pytest.raises(PublishError, match=finding):
        check_metadata({**data, **change})


@pytest.mark.parametrize(
    ("content", "finding"),
    [
        ("accuracy: 0.9", "has the entry 'accuracy'"),
        ("- a", "is no mapping"),
        ("{", "cannot be read"),
        ("energy_kwh: 3", "belong together"),
        ("datasets: [{name: x}]", "no license"),
    ],
)
def test_facts_that_no_card_shows_are_refused(folder, content, finding):
    (folder / "card.yaml").write_text(content)
    with pytest.raises(PublishError, match=finding):
        model_card(folder)


def test_what_is_no_report_is_not_put_into_the_folder(folder, tmp_path):
    before = sorted(folder.iterdir())
    for content in ("{", "[]", "{}", '{"closed": {}}'):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(PublishError):
            write_card(folder, [tmp_path / "x.json"])
    assert sorted(folder.iterdir()) == before


def test_the_command_prints_or_writes(folder, monkeypatch, capsys):
    printed = invoke("card", folder)
    assert printed.exit_code == 0
    assert printed.stdout == str(model_card(folder))
    assert not (folder / "README.md").exists()
    written = invoke("card", folder, "--write", "--picture")
    assert written.exit_code == 0
    assert "](routing.png)" in (folder / "README.md").read_text()
    with Image.open(folder / "routing.png") as picture:
        assert picture.width > 1000
        assert not picture.info
    assert "Add --write" in fail(monkeypatch, capsys, "card", folder, "--picture")
    assert "holds no config.json" in fail(monkeypatch, capsys, "card", folder.parent)
