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
"""Evaluation of a whole split: the same results however it came about, and numbers that the parts give alone."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from filelock import FileLock
from published import WRITERS, write_csv, write_ct_rate, write_m3d, write_own

from ct_moe import CTMoEForConditionalGeneration, CTMoEProcessor, DataError
from ct_moe.trainers.data_sets.catalogue import DATA_SETS, read_items
from ct_moe.trainers.data_sets.ct_rate import read_labels
from ct_moe.trainers.data_sets.item import BadRow, Item
from ct_moe.trainers.evaluation import evaluate as evaluate_module
from ct_moe.trainers.evaluation import predictions as predictions_module
from ct_moe.trainers.evaluation.abnormality_labels import label_scores, rule_labels
from ct_moe.trainers.evaluation.answering import answer_rows
from ct_moe.trainers.evaluation.baselines import majority, nearest_reports
from ct_moe.trainers.evaluation.evaluate import evaluate
from ct_moe.trainers.evaluation.predictions import predict
from ct_moe.trainers.evaluation.results import format_results
from ct_moe.trainers.evaluation.text_metrics import text_metrics


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr(predictions_module, "MAX_NEW_TOKENS", {"report": 6, "vqa_closed": 4, "vqa_open": 4})


@pytest.fixture(scope="session")
def display_folder(model_folder, tmp_path_factory):
    """The tiny model for arrays that never were HU."""
    folder = tmp_path_factory.mktemp("display") / "model"
    shutil.copytree(model_folder, folder)
    processor = CTMoEProcessor.from_pretrained(folder)
    processor.image_processor.intensity = "display"
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", DATA_SETS)
def test_every_data_set_is_answered_and_scored(name, model_folder, display_folder, tmp_path):
    root = WRITERS[name](tmp_path)
    model = display_folder if DATA_SETS[name].intensity == "display" else model_folder
    split = "train" if name == "own" else None
    names = (
        ["blind"]
        + ["majority"] * (name != "own")
        + ["nearest"] * (name in ("ct-rate", "m3d-cap"))
        + ["labels"] * (name == "ct-rate")
    )
    out = tmp_path / "results.json"
    result = evaluate(out, model=str(model), data=name, root=root, split=split, baselines=names, progress=False)
    assert json.loads(out.read_text(encoding="utf-8")) == json.loads(json.dumps(result))
    assert set(result["baselines"]) == set(names)
    items = list(read_items(name, root, result["about"]["split"]))
    lines = (tmp_path / "results.predictions.jsonl").read_text(encoding="utf-8").splitlines()
    left_out = int(name == "ct-rate")
    items = [item for item in items if not isinstance(item, BadRow)]
    counts = {"rows": len(items), "scored": len(items), "unanswered": 0, "bad_rows": 0, "left_out": left_out}
    assert result["counts"] == counts
    assert [json.loads(line)["id"] for line in lines[1:]] == [item.id for item in items]
    assert (tmp_path / "results.png").stat().st_size > 5000
    assert str(tmp_path) not in out.read_text(encoding="utf-8")
    (index,) = result["model_index"]
    assert index["results"][0]["dataset"]["name"] == DATA_SETS[name].title
    assert "blind" in format_results(result)
    assert not list(tmp_path.glob("*.lock")) + list(tmp_path.glob("*.part*"))


def test_answers_are_those_of_the_model_alone(model_folder, tmp_path):
    root = write_ct_rate(tmp_path)
    items = [item for item in read_items("ct-rate", root, "validation") if not isinstance(item, BadRow)]
    model = CTMoEForConditionalGeneration.from_pretrained(model_folder)
    processor = CTMoEProcessor.from_pretrained(model_folder)
    said = predict(model, processor, items, tmp_path / "a.jsonl", about={}, batch_size=2, progress=False)
    rows = [{"images": item.images[0], "prompt": item.prompt, "task": item.task} for item in items]
    alone = answer_rows(
        model,
        processor,
        rows,
        batch_size=1,
        max_new_tokens=predictions_module.MAX_NEW_TOKENS,
        bf16=False,
        progress=False,
    )
    assert [a.text for a in said] == [a.text.strip() for a in alone]
    assert [a.group for a in said] == [model.config.tasks[a.task] for a in alone]


def test_results_are_those_of_the_metrics(model_folder, tmp_path):
    root = write_ct_rate(tmp_path)
    items = [item for item in read_items("ct-rate", root, "validation") if not isinstance(item, BadRow)]
    texts = ["A nodule is seen.", "No nodule. Emphysema.", "Emphysema, pleural effusion."]
    file = tmp_path / "said.jsonl"
    file.write_text(
        "".join(json.dumps({"id": i.id, "prediction": t}) + "\n" for i, t in zip(items, texts)), encoding="utf-8"
    )
    result = evaluate(
        tmp_path / "r.json", data="ct-rate", root=root, predictions=file, baselines=["labels"], progress=False
    )
    metrics = result["report"]["metrics"]
    wanted = text_metrics(texts, [item.completion for item in items])
    for name in ("bleu1", "bleu4", "rouge2", "rougeL"):
        assert metrics[name]["mean"] == pytest.approx(wanted[name])
    assert result["report"]["corpus"]["corpus_bleu4"] == pytest.approx(wanted["corpus_bleu4"])
    assert result["report"]["patients"] == 2
    truth = np.array(list(read_labels(root, "validation").values()))
    scores = label_scores(rule_labels(texts), truth)
    assert result["report"]["labels"]["micro_f1"] == pytest.approx(scores["micro_f1"])
    assert result["report"]["labels"]["by"] == "built-in rules"
    # A report made of the labels has them all.
    assert result["baselines"]["labels"]["report"]["labels"]["macro_f1"] == 1


def test_majority_is_the_usual_answer_of_a_type_in_training(tmp_path):
    root = write_m3d(tmp_path)
    result = evaluate(
        tmp_path / "r.json",
        data="m3d-vqa",
        root=root,
        predictions=_perfect(root, "m3d-vqa", "test", tmp_path),
        baselines=["majority"],
        progress=False,
    )
    assert result["closed"]["metrics"]["strict"]["mean"] == 100
    # The questions of the test file are those of the training file.
    assert result["baselines"]["majority"]["closed"]["metrics"]["strict"]["mean"] == 100
    assert set(result["closed"]["kinds"]) == {"plane", "phase", "abnormality"}
    # M3D's rule and the strict one part where a text names every letter.
    file = tmp_path / "letters.csv"
    items = list(read_items("m3d-vqa", root, "test"))
    write_csv(file, ["id", "prediction"], *[[item.id, "A. B. C. D."] for item in items])
    closed = evaluate(tmp_path / "s.json", data="m3d-vqa", root=root, predictions=file, baselines=[])["closed"]
    assert (closed["metrics"]["m3d"]["mean"], closed["metrics"]["strict"]["mean"]) == (100, 0)


def test_the_nearest_scan_lends_its_report():
    rng = np.random.default_rng(0)
    scans = {name: rng.random((9, 3, 32, 32), dtype=np.float32) for name in "abc"}
    scans["like b"] = 2 * scans["b"] + 1 + 0.1 * rng.random((9, 3, 32, 32), dtype=np.float32)  # brighter, with noise

    def item(name, task="report"):
        return Item(name, [name], "", f"report of {name}", task, "", name, ("", 0))

    train = [item(name) for name in "abc"]
    asked = [item("like b"), item("like b", "vqa_open"), item("c")]

    def read(path):
        return {"pixel_values": scans[path]}

    assert nearest_reports(train, asked, read, progress=False) == ["report of b", None, "report of c"]


def test_usual_answers_by_hand():
    def item(kind, answer, choices=None):
        return Item("", [], "", answer, "vqa_closed" if choices else "vqa_open", kind, "", ("", 0), answer, choices)

    sides = ["left", "right"]
    train = [item("side", "right", sides), item("side", "right", sides), item("side", "left", sides)]
    train += [item("size", "5 mm"), item("size", "4 mm")]
    asked = [
        item("side", "left", sides),
        item("side", "left", ["both", "left"]),
        item("size", "9 mm"),
        item("new", "x"),
    ]
    assert majority(iter(train), asked) == ["B. right", "B. left", "4 mm", ""]


def test_the_mean_of_types_weighs_every_type_alike_and_has_its_interval(tmp_path):
    file = tmp_path / "mine.jsonl"
    rows = [("a", i < 9, i) for i in range(12)] + [("b", i < 1, 20 + i) for i in range(4)]
    with file.open("w", encoding="utf-8") as out:
        for kind, right, patient in rows:
            row = {"prediction": "x" if right else "y", "choices": ["x", "y"], "answer": "x", "kind": kind}
            out.write(json.dumps({**row, "patient": patient}) + "\n")
    summary = evaluate(tmp_path / "r.json", predictions=file, baselines=[])["closed"]["metrics"]["strict"]
    assert summary["mean"] == pytest.approx(100 * 10 / 16)
    assert summary["mean_of_kinds"] == pytest.approx((75 + 25) / 2)
    low, high = summary["mean_of_kinds_interval"]
    assert low < 50 < high
    assert high - low > summary["interval"][1] - summary["interval"][0]  # four rows of b count as much as twelve of a


def test_training_rows_are_not_scored_against_themselves(tmp_path):
    file = write_own(tmp_path)
    said = _perfect(file, "own", "test", tmp_path)
    with pytest.raises(DataError, match="its training rows are those that are scored"):
        evaluate(tmp_path / "r.json", data="own", root=file, predictions=said, baselines=["majority"])


def _perfect(root, name, split, folder):
    file = folder / "perfect.jsonl"
    items = [item for item in read_items(name, root, split) if not isinstance(item, BadRow)]
    lines = [{"id": item.id, "prediction": item.completion} for item in items]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def test_predictions_may_bring_their_own_references(tmp_path):
    file = tmp_path / "mine.csv"
    with file.open("w", encoding="utf-8", newline="") as out:
        rows = csv.writer(out)
        rows.writerow(["id", "prediction", "reference", "choices", "answer", "kind", "patient"])
        rows.writerow(["1", "B. liver", "", "lung|liver", "liver", "organ", "p"])
        rows.writerow(["2", "lung", "", "lung|liver", "liver", "organ", "q"])
        rows.writerow(["3", "no mass", "no mass", "", "", "mass", "q"])
    result = evaluate(tmp_path / "r.json", predictions=file, baselines=[])
    assert result["closed"]["kinds"]["organ"]["strict"]["mean"] == 50
    assert result["open"]["metrics"]["bleu1"]["mean"] == pytest.approx(100)


def test_a_run_that_was_interrupted_goes_on_with_the_same_batches(model_folder, monkeypatch, tmp_path):
    root = write_ct_rate(tmp_path)
    settings = {"model": str(model_folder), "data": "ct-rate-vqa", "root": root, "batch_size": 1, "progress": False}
    settings["baselines"] = []
    whole = tmp_path / "whole.json"
    evaluate(whole, **settings)
    generate, calls = predictions_module.generate_answers, []

    def dies(model, collator, rows, *args, **kwargs):
        calls.append([row["id"] for row in rows])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(model, collator, rows, *args, **kwargs)

    monkeypatch.setattr(predictions_module, "generate_answers", dies)
    out = tmp_path / "out[1].json"  # a name that a pattern would misread
    with pytest.raises(KeyboardInterrupt):
        evaluate(out, **settings)
    part = tmp_path / "out[1].predictions.jsonl.part1"
    kept = part.read_text(encoding="utf-8")
    part.write_text(kept + kept.splitlines()[-1][:20], encoding="utf-8")  # cut off in the middle of a line
    assert not out.exists()
    evaluate(out, **settings)
    assert sum(map(len, calls)) == len({i for call in calls for i in call}) + 1  # only the one that failed came again
    assert out.read_bytes() == whole.read_bytes()
    answers = [file.with_suffix(".predictions.jsonl").read_bytes() for file in (out, whole)]
    assert answers[0] == answers[1]
    assert not part.exists()
    calls.clear()
    evaluate(out, **settings)
    assert not calls


def test_two_runs_do_not_write_to_one_file(model_folder, tmp_path):
    root = write_ct_rate(tmp_path)
    settings = {"model": str(model_folder), "data": "ct-rate", "root": root, "progress": False, "baselines": []}
    with FileLock(tmp_path / "r.predictions.jsonl.lock"), pytest.raises(DataError, match="another run is writing"):
        evaluate(tmp_path / "r.json", **settings)
    evaluate(tmp_path / "r.json", **settings)


def test_a_scan_that_could_not_be_read_is_tried_again(model_folder, tmp_path):
    root = write_ct_rate(tmp_path)
    settings = {"model": str(model_folder), "data": "ct-rate", "root": root, "progress": False, "baselines": []}
    evaluate(tmp_path / "whole.json", **settings)
    (root / "dataset" / "valid_fixed").rename(root / "away")
    assert evaluate(tmp_path / "r.json", **settings)["counts"]["unanswered"] == 3
    (root / "away").rename(root / "dataset" / "valid_fixed")
    assert evaluate(tmp_path / "r.json", **settings)["counts"]["unanswered"] == 0
    assert (tmp_path / "r.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_a_task_of_ones_own_is_answered(model_folder, tmp_path):
    write_own(tmp_path)
    row = {"images": "scan.nii.gz", "prompt": "Urgent?", "completion": "No.", "task": "triage"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    result = evaluate(
        tmp_path / "r.json", model=str(model_folder), data="own", root=tmp_path, baselines=[], progress=False
    )
    assert result["open"]["rows"] == 1
    assert result["open"]["metrics"]["bleu1"]["interval"] is None


def test_answers_of_another_run_are_not_taken(model_folder, tmp_path):
    root = write_ct_rate(tmp_path)
    settings = {"model": str(model_folder), "data": "ct-rate", "root": root, "progress": False}
    evaluate(tmp_path / "r.json", **settings)
    with pytest.raises(DataError, match="answers of another run"):
        evaluate(tmp_path / "r.json", **settings, batch_size=3)
    other = tmp_path / "model"
    shutil.copytree(model_folder, other)
    model = CTMoEForConditionalGeneration.from_pretrained(other)
    model.lm_head.weight.data[0] += 1
    model.save_pretrained(other)
    with pytest.raises(DataError, match="other about"):
        evaluate(tmp_path / "r.json", **{**settings, "model": str(other)})


def test_rows_that_cannot_be_answered_are_counted(model_folder, tmp_path):
    root = write_ct_rate(tmp_path)
    scans = sorted((root / "dataset" / "valid_fixed").rglob("*.nii.gz"))
    scans[0].unlink()
    reports = root / "dataset" / "radiology_text_reports" / "validation_reports.csv"
    with reports.open("a", encoding="utf-8") as file:
        file.write("Doe.nii.gz,,,Text,Text\n")
    result = evaluate(tmp_path / "r.json", model=str(model_folder), data="ct-rate", root=root, progress=False)
    assert result["counts"] == {"rows": 3, "scored": 2, "unanswered": 1, "bad_rows": 1, "left_out": 1}
    assert set(result["unanswered"]) == {"ct-rate-valid_1_a_1"}
    assert result["unanswered"]["ct-rate-valid_1_a_1"].startswith(
        "validation_reports.csv, line 2: valid_1_a_1.nii.gz: "
    )
    assert str(tmp_path) not in (tmp_path / "r.json").read_text() + (tmp_path / "r.predictions.jsonl").read_text()
    assert result["bad_rows"][0].startswith("validation_reports.csv, line 7: VolumeName")
    assert "1 of 3 rows could not be answered" in format_results(result)


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({"model": None}, "is missing"),
        ({"predictions": "x.jsonl"}, "comes with predictions"),
        ({"data": None}, "data: is missing"),
        ({"data": "m3d-vqa"}, "its scans are 'display'"),
        ({"data": "m3d-vqa", "baselines": ["nearest"]}, "has no reports"),
        ({"data": "m3d-cap", "baselines": ["labels"]}, "has no labels"),
        ({"baselines": ["best"]}, "'best' is unknown"),
        ({"scorers": ["nowhere:f"]}, "cannot be loaded"),
        ({"labeller": "/nowhere"}, "no classifier"),
        (
            {"baselines": ["nearest"], "data": "ct-rate-vqa", "split": "validation", "root": "broken"},
            "there is no such",
        ),
        ({"root": None}, "Name the folder"),
        ({"split": "dev"}, "has no split dev"),
    ],
)
def test_what_cannot_be_done_is_said_before_the_work(changes, finding, model_folder, tmp_path):
    root = write_m3d(write_ct_rate(tmp_path))
    settings = {"model": str(model_folder), "data": "ct-rate", "root": root, "progress": False, "baselines": []}
    with pytest.raises(DataError, match=finding):
        evaluate(tmp_path / "r.json", **{**settings, **changes})
    assert not list(tmp_path.glob("r.*"))


def test_scores_alone_need_nothing_that_answers(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prediction": "x", "reference": "x"}\n', encoding="utf-8")
    code = (
        "import sys\n"
        "sys.modules['trl'] = None\n"  # as if it were not installed
        "from ct_moe.trainers.evaluation.evaluate import evaluate\n"
        "evaluate(sys.argv[2], predictions=sys.argv[1], baselines=[])\n"
        "assert not {'ct_moe.trainers.collator', 'bitsandbytes', 'peft'} & set(sys.modules)\n"
    )
    arguments = [sys.executable, "-c", code, str(file), str(tmp_path / "r.json")]
    run = subprocess.run(arguments, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


def test_what_was_not_computed_is_said(tmp_path, monkeypatch):
    root = write_ct_rate(tmp_path)
    shutil.rmtree(root / "dataset" / "multi_abnormality_labels")
    said = _perfect(root, "ct-rate", "validation", tmp_path)
    monkeypatch.setattr(evaluate_module, "find_spec", lambda name: None)  # no matplotlib
    result = evaluate(tmp_path / "r.json", data="ct-rate", root=root, predictions=said, baselines=[])
    printed = format_results(result)
    assert "clinical scores were not computed: there is no dataset/multi_abnormality_labels/valid" in printed
    assert ("METEOR was not computed" in printed) == ("meteor" not in result["report"]["metrics"])
    assert "no picture was drawn" in printed
    printed = format_results(evaluate(tmp_path / "r.json", predictions=_own(tmp_path), meteor=False, baselines=[]))
    assert "METEOR was not computed" in printed


def _own(folder):
    file = folder / "own.jsonl"
    file.write_text('{"prediction": "x", "reference": "x"}\n', encoding="utf-8")
    return file


def test_results_say_how_a_question_was_asked(tmp_path):
    root = write_ct_rate(tmp_path)
    said = _perfect(root, "ct-rate-vqa", "validation", tmp_path)
    result = evaluate(tmp_path / "r.json", data="ct-rate-vqa", root=root, predictions=said, baselines=[])
    assert "earlier ones of its conversation, with their true answers" in result["about"]["protocol"]


def test_reports_without_a_scan_have_no_nearest_one(tmp_path):
    prompt = "Write a radiology report of this CT scan with findings and impression."
    write_own(tmp_path)
    rows = [
        {"id": "seen", "images": "scan.nii.gz", "prompt": prompt, "completion": "A mass."},
        {"id": "not", "images": [], "prompt": prompt, "completion": "None."},
    ]
    for split in ("train", "test"):
        lines = [json.dumps({**row, "id": f"{split}-{row['id']}"}) + "\n" for row in rows]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    said = _perfect(tmp_path, "own", "test", tmp_path)
    result = evaluate(
        tmp_path / "r.json", data="own", root=tmp_path, predictions=said, baselines=["nearest"], progress=False
    )
    assert result["baselines"]["nearest"]["counts"]["rows"] == 1


def test_training_rows_of_equal_ids_are_other_rows(tmp_path):
    for split, answer in (("train", "left"), ("test", "right")):
        row = {"id": "1", "images": f"{split}.nii", "prompt": "Which side?", "completion": answer}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row), encoding="utf-8")
    said = _perfect(tmp_path, "own", "test", tmp_path)
    settings = {"data": "own", "root": tmp_path, "predictions": said, "baselines": ["majority"]}
    result = evaluate(tmp_path / "r.json", **settings)
    assert result["baselines"]["majority"]["open"]["metrics"]["rouge1"]["mean"] == 0
    shutil.copy(tmp_path / "test.jsonl", tmp_path / "train.jsonl")
    with pytest.raises(DataError, match="its training rows are those that are scored"):
        evaluate(tmp_path / "r.json", **settings)


def test_parts_are_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 9, 2):
        (tmp_path / f"a.jsonl.part{number}").touch()
    parts = predictions_module._parts(tmp_path / "a.jsonl")
    assert [part.suffix for part in parts] == [".part2", ".part9", ".part10"]


def test_a_folder_is_no_results_file(tmp_path):
    (tmp_path / "r.json").mkdir()
    with pytest.raises(DataError, match=r"is no \.json file"):
        evaluate(tmp_path / "r.json", predictions=_own(tmp_path), baselines=[])


def command(folder, root, out, *launch) -> list[str]:
    paths = ["--model", str(folder), "--root", str(root), "--out", str(out)]
    launch = [*launch, "-m", "ct_moe.hub.cli", "evaluate"]
    return [sys.executable, *launch, "--data", "ct-rate-vqa", "--batch-size", "1", *paths]


@pytest.mark.slow
def test_killed_and_restarted_and_in_two_processes_the_results_are_the_same(model_folder, tmp_path, unused_tcp_port):
    root = write_ct_rate(tmp_path)
    whole = tmp_path / "whole.json"
    subprocess.run(command(model_folder, root, whole), check=True, capture_output=True)

    killed = tmp_path / "killed.json"
    process = subprocess.Popen(command(model_folder, root, killed), stderr=subprocess.DEVNULL)
    part = tmp_path / "killed.predictions.jsonl.part1"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (part.exists() and part.read_bytes().count(b"\n") >= 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert part.exists()
    assert not killed.exists()
    subprocess.run(command(model_folder, root, killed), check=True, capture_output=True)
    assert killed.read_bytes() == whole.read_bytes()

    two = tmp_path / "two.json"
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(unused_tcp_port)]
    run = subprocess.run(command(model_folder, root, two, *launch), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("Wrote") == 1
    assert two.read_bytes() == whole.read_bytes()
    answers = [file.with_suffix(".predictions.jsonl").read_bytes() for file in (whole, killed, two)]
    assert answers[0] == answers[1] == answers[2]
