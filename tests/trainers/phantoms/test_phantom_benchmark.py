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
"""The phantom benchmark and how rows are answered: scores against the answers themselves, reckoned another way."""

import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import pipeline

from ct_moe import DataError
from ct_moe.trainers.evaluation import answering
from ct_moe.trainers.evaluation.answering import MAX_NEW_TOKENS, Answer, answer_rows
from ct_moe.trainers.phantoms import benchmark
from ct_moe.trainers.phantoms.benchmark import evaluate_phantoms, format_scores, majority_answers, read_split
from ct_moe.trainers.phantoms.controls import CONTROL_NAMES
from ct_moe.trainers.phantoms.data_set import write_phantoms
from ct_moe.trainers.phantoms.scores import score_reports
from ct_moe.trainers.phantoms.texts import KINDS
from ct_moe.trainers.volume_cache import VolumeCache


# Untrained, the model writes as long as it may.
SHORT = {"report": 6, "vqa_closed": 4, "vqa_open": 4}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms") / "data"
    write_phantoms(folder, n=2, validation=2, test=2, seed=7, workers=1, progress=False)
    return folder


@pytest.fixture(scope="module")
def tiny(model_folder):
    """A model that tells scans apart: random, but not the zeros of new experts."""
    from ct_moe.hub.folder import load_folder

    model, processor, _ = load_folder(str(model_folder), dtype="float32")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" not in name and "embed" not in name and parameter.ndim > 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    processor.image_processor.max_slices = 4
    return model.eval(), processor


@pytest.fixture(scope="module")
def cache(tiny, tmp_path_factory) -> VolumeCache:
    return VolumeCache(tmp_path_factory.mktemp("cache"), tiny[1].image_processor)


@pytest.fixture(scope="module")
def rows(data) -> list[dict]:
    """One report and a few questions about each of two scans, mixed."""
    kept = []
    for scan in (0, 1):
        about = [row for row in lines(data / "test.jsonl") if row["images"] == f"test/scans/{scan:05}.nii.gz"]
        for task, number in (("report", 1), ("vqa_closed", 3), ("vqa_open", 2)):
            kept += [row for row in about if row["task"] == task][:number]
    return [kept[index] for index in np.random.default_rng(0).permutation(len(kept))]


def answers_of(tiny, rows, data, cache, **settings) -> list:
    settings = {"max_new_tokens": SHORT, "bf16": False, "progress": False, "volume_cache": cache} | settings
    return answer_rows(*tiny, rows, folder=data, **settings)


# Answers of rows ----------------------------------------------------------------------------------------------------


def test_answers_come_in_the_order_of_the_rows_whatever_the_batch(tiny, rows, data, cache):
    alone = answers_of(tiny, rows, data, cache, batch_size=1)
    assert len(alone) == len(rows)
    assert len({answer.text for answer in alone}) > len(rows) // 2  # else any order would do
    for batch_size in (4, 64):
        assert answers_of(tiny, rows, data, cache, batch_size=batch_size) == alone
    backwards = answers_of(tiny, rows[::-1], data, cache, batch_size=4)
    assert backwards[::-1] == alone


def test_a_scan_that_several_rows_ask_about_is_encoded_once(tiny, rows, data, cache):
    """Up to what the prompt steers: each row has its own experts, and the answer that it would have alone."""
    embeddings, volumes = tiny[0].model.vision_tower.embeddings, []
    hook = embeddings.register_forward_hook(lambda module, args, output: volumes.append(len(args[0])))
    together = answers_of(tiny, rows, data, cache, batch_size=64)
    hook.remove()
    assert volumes == 3 * [2]  # three tasks, of two scans each
    assert together == answers_of(tiny, rows, data, cache, batch_size=1)


def test_no_rows_no_answers(tiny, data, cache):
    assert answers_of(tiny, [], data, cache) == []


def test_each_task_has_its_own_limit(tiny, rows, data, cache, monkeypatch):
    model, _ = tiny
    generate, asked = model.generate, []

    def record(**inputs):
        asked.append((len(inputs["input_ids"]), inputs["max_new_tokens"]))
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", record)
    answers_of(tiny, rows, data, cache, max_new_tokens={"report": 3, "vqa_open": 2})
    # A batch holds rows of one task; what is not named keeps the usual limit.
    assert sorted(asked) == [(2, 3), (4, 2), (6, MAX_NEW_TOKENS["vqa_closed"])]


def test_a_forced_task_reaches_the_model(tiny, rows, data, cache):
    names = tiny[0].config.tasks
    free = answers_of(tiny, rows, data, cache)
    assert all(answer.task in range(len(names)) for answer in free)
    # None leaves a row to its prompt, beside rows that are forced.
    forced = {id(row): None if index == 0 else names[index % len(names)] for index, row in enumerate(rows)}
    answers = answers_of(tiny, rows, data, cache, task=lambda row: forced[id(row)])
    assert answers[0] == free[0]
    for row, answer in zip(rows[1:], answers[1:]):
        assert names[answer.task] == forced[id(row)]
    assert [answer.text for answer in answers] != [answer.text for answer in free]


def test_a_change_is_made_before_the_model_sees_a_scan(tiny, rows, data, cache):
    first, second = sorted({row["images"] for row in rows})
    own = answers_of(tiny, rows, data, cache)
    seen = []

    def exchange(scan: dict, row: dict) -> dict:
        seen.append(row)
        np.testing.assert_array_equal(scan["pixel_values"], cache.read(str(data / row["images"]))["pixel_values"])
        return cache.read(str(data / (second if row["images"] == first else first)))

    changed = answers_of(tiny, rows, data, cache, change=exchange)
    assert sorted(map(str, seen)) == sorted(map(str, rows))
    moved = [row | {"images": second if row["images"] == first else first} for row in rows]
    assert changed == answers_of(tiny, moved, data, cache)
    assert changed != own


@pytest.mark.parametrize("training", [True, False])
def test_a_model_stays_in_the_mode_in_which_it_came(tiny, rows, data, cache, training):
    model, _ = tiny
    model.train(training)
    try:
        answers_of(tiny, rows[:1], data, cache)
        assert model.training is training
    finally:
        model.eval()


def test_a_model_is_set_back_after_an_error_too(tiny, rows, data, cache):
    model, _ = tiny
    model.train()
    try:
        with pytest.raises(ZeroDivisionError):
            answers_of(tiny, rows[:1], data, cache, change=lambda scan, row: 1 / 0)
        assert model.training
    finally:
        model.eval()


def test_answers_are_those_of_the_pipeline(tiny, rows, data, cache):
    """No shared code: the pipeline reads the file and builds its prompt itself."""
    model, processor = tiny
    reporter = pipeline("ct-report", model=model, processor=processor)
    for task in ("vqa_closed", "vqa_open", "report"):
        row = next(row for row in rows if row["task"] == task)
        (answer,) = answers_of(tiny, [row], data, cache)
        said = reporter(str(data / row["images"]), question=row["prompt"], max_new_tokens=SHORT[task], do_sample=False)
        assert answer.text.strip() == said["text"]
        assert model.config.tasks[answer.task] == said["task"]


def test_scans_without_a_cache_are_read_alike(tiny, rows, data, cache):
    assert answers_of(tiny, rows[:2], data, None) == answers_of(tiny, rows[:2], data, cache)


# The benchmark ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def limits():
    """Short answers in the whole benchmark, which has no setting for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answering, "MAX_NEW_TOKENS", {"report": 12, "vqa_closed": 6, "vqa_open": 4})
        yield


@pytest.fixture(scope="module")
def result(tiny, data, cache, limits) -> dict:
    return evaluate_phantoms(
        *tiny, data, controls=(*CONTROL_NAMES, "flipped"), volume_cache=cache, batch_size=16, progress=False
    )


@pytest.fixture(scope="module")
def mixed(tiny, data) -> dict:
    """The result of a model that gives the right answer to two rows of three, and else that of another row."""

    def tell(model, processor, rows, **settings):
        texts = [row["completion"] for row in rows]
        return [Answer(texts[index - 1] if index % 3 == 2 else text, 0) for index, text in enumerate(texts)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "answer_rows", tell)
        found = evaluate_phantoms(*tiny, data, progress=False)
    right = [record["right"] for record in found["answers"] if record["right"] is not None]
    assert 0.5 < np.mean(right) < 0.9
    return found


@pytest.fixture(params=["result", "mixed"])
def scored(request) -> dict:
    return request.getfixturevalue(request.param)


def means(records: list[dict], values: list[float], name: str) -> dict[str, float]:
    groups = defaultdict(list)
    for record, value in zip(records, values):
        groups[str(record[name])].append(value)
    return {key: pytest.approx(sum(group) / len(group)) for key, group in groups.items()}


def split_answers(result: dict, data: Path) -> dict[str, list[dict]]:
    """What was said beside the rows of the file, by task."""
    by_task = defaultdict(list)
    for task in ("vqa_closed", "vqa_open", "report"):
        by_task[task] = [row for row in lines(data / f"{result['split']}.jsonl") if row["task"] == task]
    said = iter(result["answers"])
    for rows in by_task.values():
        for index, row in enumerate(rows):
            record = next(said)
            for name in ("images", "kind", "template", "prompt", "completion", "answer"):
                assert record[name] == row[name]
            rows[index] = row | {name: record[name] for name in ("text", "group", "right")}
    assert next(said, None) is None
    return by_task


def test_closed_scores_are_those_of_the_answers(scored, data):
    said = split_answers(scored, data)["vqa_closed"]
    right = []
    for row in said:
        # The only texts of these two models that name a choice.
        letter, text = "ABCD"[row["choices"].index(row["answer"])], row["text"].strip()
        wanted = (row["answer"], f"{row['answer']}, {letter}.", f"{letter}. {row['answer']}", letter, f"{letter}.")
        assert row["right"] is (text in wanted), row
        right.append(float(row["right"]))
    closed = scored["closed"]
    kinds = means(said, right, "kind")
    assert closed["n"] == len(said)
    assert closed["accuracy"] == pytest.approx(np.mean(right))
    assert closed["kinds"] == kinds
    assert closed["mean_of_kinds"] == pytest.approx(np.mean([value.expected for value in kinds.values()]))
    assert closed["templates"] == means(said, right, "template")
    assert closed["unseen_acquisition"] == means(said, right, "unseen")
    assert closed["held_out"] == means(said, right, "held_out")
    letters = ["ABCD"[row["choices"].index(row["answer"])] for row in said]
    assert closed["m3d"] == pytest.approx(np.mean([f"{letter}." in row["text"] for letter, row in zip(letters, said)]))
    low, high = closed["interval"]
    assert low <= closed["accuracy"] <= high


def test_open_scores_are_those_of_the_answers(scored, data):
    said = split_answers(scored, data)["vqa_open"]
    right = [float(row["right"]) for row in said]
    assert scored["open"]["n"] == len(said)
    assert scored["open"]["accuracy"] == pytest.approx(np.mean(right))
    assert scored["open"]["kinds"] == means(said, right, "kind")
    assert {"bleu1", "bleu4", "rouge1", "rougeL"} <= set(scored["open"])


def test_report_scores_are_those_of_the_answers(scored, data):
    said = split_answers(scored, data)["report"]
    labels = {record["images"]: record for record in lines(data / "test_labels.jsonl")}
    expected = score_reports([labels[row["images"]] for row in said], [row["text"] for row in said])
    assert {name: scored["report"][name] for name in expected} == expected
    assert all(row["right"] is None for row in said)
    support = Counter(finding["name"] for record in labels.values() for finding in record["findings"])
    for name, scores in scored["report"]["per_finding"].items():
        assert scores["support"] == support[name]


def test_every_answer_tells_the_group_that_gave_it(result, tiny):
    assert {record["group"] for record in result["answers"]} <= set(range(len(tiny[0].config.tasks)))


def test_scores_count_right_answers(tiny, data, limits, monkeypatch):
    """With answers put in its mouth a model has every score that follows from them."""
    from ct_moe.trainers.phantoms.controls import flipped, flipped_answer

    def tell(model, processor, rows, *, change=None, **settings):
        said = []
        for index, row in enumerate(rows):
            text = row["completion"]
            if change is flipped and index % 2 == 0:
                text = flipped_answer(row["answer"])
            elif change is not None and change is not flipped:
                text = "no choice"
            said.append(Answer(text, 0))
        return said

    monkeypatch.setattr(benchmark, "answer_rows", tell)
    told = evaluate_phantoms(*tiny, data, controls=("blind", "flipped"), progress=False)
    closed = [row for row in lines(data / "test.jsonl") if row["task"] == "vqa_closed"]
    for name in ("accuracy", "m3d", "mean_of_kinds"):
        assert told["closed"][name] == 1
    assert told["open"]["accuracy"] == told["report"]["micro_f1"] == 1
    for name in ("bleu1", "rougeL"):
        assert told["report"][name] == pytest.approx(100)
    blind = told["controls"]["blind"]
    assert (blind["accuracy"], blind["interval"]) == (0, (0, 0))
    assert blind["minus_majority"] == pytest.approx(-told["majority"]["accuracy"])
    sided = [row for row in closed if flipped_answer(row["answer"]) in row["choices"]]
    flip = told["controls"]["flipped"]
    assert flip["n"] == len(sided) > 0
    assert flip["follows"] == pytest.approx(-(-len(sided) // 2) / len(sided))


def test_controls_have_scores_of_their_own(result):
    assert list(result["controls"]) == [*CONTROL_NAMES, "flipped"]
    for name in CONTROL_NAMES:
        control = result["controls"][name]
        assert set(control) == {"accuracy", "interval", "minus_majority", "minus_majority_interval", "kinds"}
        assert control["minus_majority"] == pytest.approx(control["accuracy"] - result["majority"]["accuracy"])
        low, high = control["minus_majority_interval"]
        assert low - 1e-9 <= control["minus_majority"] <= high + 1e-9
        assert set(control["kinds"]) == set(result["closed"]["kinds"])
    assert set(result["controls"]["flipped"]) == {"follows", "n"}


def test_the_majority_is_that_of_train(result, data):
    closed = [row for row in lines(data / "test.jsonl") if row["task"] == "vqa_closed"]
    counts = Counter((row["template"], row["answer"]) for row in lines(data / "train.jsonl"))
    right = []
    for row in closed:
        numbers = [counts[row["template"], choice] for choice in row["choices"]]
        right.append(float(row["choices"][numbers.index(max(numbers))] == row["answer"]))
    assert result["majority"]["accuracy"] == pytest.approx(np.mean(right))
    assert result["majority"]["kinds"] == means(closed, right, "kind")


def test_majority_answers_by_hand():
    train = [
        {"template": "phase", "answer": answer} for answer in ("delayed", "delayed", "delayed", "arterial", "arterial")
    ] + [{"template": "count nodule", "answer": "arterial"}] * 3
    choices = ["arterial", "delayed", "portal venous", "non-contrast"]
    rows = [
        {"template": "phase", "choices": choices, "answer": "delayed"},
        {"template": "phase", "choices": choices, "answer": "arterial"},
        # The usual answer is not to be had: the next.
        {"template": "phase", "choices": ["portal venous", "arterial"], "answer": "arterial"},
        # Never seen: the first choice.
        {"template": "organ", "choices": ["liver", "lung"], "answer": "liver"},
        {"template": "organ", "choices": ["lung", "liver"], "answer": "liver"},
    ]
    assert majority_answers(iter(train), rows).tolist() == [1, 0, 1, 1, 0]


def test_first_scans_only(data):
    rows, labels = read_split(data, "test", 1)
    assert set(labels) == {row["images"] for row in rows} == {"test/scans/00000.nii.gz"}
    everything, all_labels = read_split(data, "test")
    assert rows == [row for row in everything if row["images"] in labels]
    assert everything == lines(data / "test.jsonl")
    assert len(all_labels) == 2


def test_the_plane_is_told_from_slices_as_they_are_stored_and_is_in_no_total(tiny, data, limits, monkeypatch):
    seen = []

    def tell(model, processor, rows, **settings):
        seen.append((processor.image_processor.reorient, settings["volume_cache"], [row["kind"] for row in rows]))
        return [Answer(row["completion"] if index else "", 0) for index, row in enumerate(rows)]

    monkeypatch.setattr(benchmark, "answer_rows", tell)
    found = evaluate_phantoms(*tiny, data, tasks=["vqa_closed", "plane"], controls=(), progress=False)
    assert seen[1] == (False, None, ["plane"] * 2)
    assert seen[0][0]
    assert tiny[1].image_processor.reorient
    assert (found["plane"]["accuracy"], found["plane"]["n"]) == (0.5, 2)
    assert "plane" not in found["closed"]["kinds"]
    assert found["closed"]["n"] == len([a for a in found["answers"] if a["kind"] != "plane"])
    assert "stored plane" in format_scores(found)


def test_one_scan_is_enough_for_reports(tiny, data, cache, limits):
    found = evaluate_phantoms(
        *tiny, data, split="validation", scans=1, tasks=("report",), volume_cache=cache, progress=False
    )
    assert (found["scans"], found["split"]) == (1, "validation")
    assert [record["kind"] for record in found["answers"]] == ["report"]
    assert not {"closed", "open", "controls", "majority"} & set(found)


def test_a_task_can_be_forced_throughout(tiny, data, cache, limits):
    name = tiny[0].config.tasks[1]
    settings = {"tasks": ("vqa_open",), "volume_cache": cache, "progress": False}
    found = evaluate_phantoms(*tiny, data, task=lambda row: name, **settings)
    assert {record["group"] for record in found["answers"]} == {1}


@pytest.mark.parametrize("missing", ["test_labels.jsonl", "test.jsonl", "train.jsonl"])
def test_a_missing_file_is_named_before_anything_is_answered(tiny, data, missing, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "answer_rows", lambda *args, **settings: pytest.fail("answered"))
    for name in {"test_labels.jsonl", "test.jsonl", "train.jsonl"} - {missing}:
        (tmp_path / name).write_bytes((data / name).read_bytes())
    with pytest.raises(DataError, match=re.escape(missing)):
        evaluate_phantoms(*tiny, tmp_path, progress=False)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.*test_labels\.jsonl"):
        read_split(tmp_path / "nowhere", "test")


def test_the_table_shows_every_kind_and_control(result):
    table = format_scores(result)
    assert "2 scans of the test split" in table
    head = next(line for line in table.splitlines() if line.startswith("closed questions"))
    kinds = [kind for kind in KINDS if kind in result["closed"]["kinds"]]
    assert set(kinds) == set(result["closed"]["kinds"])
    # Long names are cut.
    assert head.split()[3:] == [kind[:13] for kind in kinds]
    for name in ("model", "majority answer", *CONTROL_NAMES):
        (line,) = [line for line in table.splitlines() if re.match(rf"{name}\s+\d", line)]
        scores = {"model": result["closed"], "majority answer": result["majority"], **result["controls"]}[name]
        cells = line.removeprefix(name).split()
        expected = [scores["accuracy"], *(scores["kinds"][kind] for kind in kinds)]
        assert cells == [f"{int(1000 * value + 1e-6) / 10:.1f}" for value in expected]  # cut, not rounded
    assert "left and right exchanged" in table
    for name in result["report"]["per_finding"]:
        assert name in table


def test_numbers_of_the_table_are_cut(result):
    """No score becomes a better one in print."""
    report = {**result["report"], "macro_f1": 0.99999, "micro_f1": 0.0019, "bleu1": 99.99, "meteor": 45.19}
    report["per_finding"] = {"nodule": {"precision": 0.999, "recall": 0.005, "f1": 0.29, "support": 3}}
    report |= {"side_errors": 0.9999, "place_errors": None, "size_error_mm": 3.09, "extent_error_mm": None}
    opened = {**result["open"], "accuracy": 0.99999, "n": 7, "meteor": 12.39}
    table = format_scores({"split": "test", "scans": 2, "open": opened, "report": report})
    assert re.search(r"open questions +99\.9   of 7, METEOR 12\.3$", table, re.MULTILINE)
    assert "macro F1 0.999, micro F1 0.001" in table
    assert "precision 0.99  recall 0.00  f1 0.29  of 3" in table
    assert re.search(r"bleu1 99\.9, .*, METEOR 45\.1; side wrong in 99\.9 %, place in -; size off by 3\.0 mm", table)


def test_meteor_is_left_out_where_there_is_none(result):
    report = {name: value for name, value in result["report"].items() if name != "meteor"}
    assert "METEOR" not in format_scores({"split": "test", "scans": 2, "report": report})


def test_the_table_of_reports_alone(result):
    table = format_scores({name: result[name] for name in ("split", "scans", "report")})
    assert "macro F1" in table
    assert "questions" not in table


def test_results_are_json(result):
    assert json.loads(json.dumps(result, allow_nan=False))["scans"] == 2
