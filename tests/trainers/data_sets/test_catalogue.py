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
"""Published data sets are read as they are published, line by line, and what is wrong with a download is named."""

import csv
import json
import shutil
import warnings

import pytest
from published import (
    WRITERS,
    write_3d_rad,
    write_csv,
    write_ct_rate,
    write_json,
    write_m3d,
    write_own,
    write_radgenome,
)

from ct_moe import DataError
from ct_moe.hub.cli import _quiet_libraries
from ct_moe.pipeline_ct_moe import split_report
from ct_moe.trainers import load_rows
from ct_moe.trainers.data_sets import files as files_module
from ct_moe.trainers.data_sets.catalogue import DATA_SETS, data_set_rows, read_items
from ct_moe.trainers.data_sets.check import check_data_set, check_text
from ct_moe.trainers.data_sets.ct_rate import ABNORMALITIES, read_labels
from ct_moe.trainers.data_sets.files import read_json_list
from ct_moe.trainers.data_sets.item import BadRow


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    """Every data set's folder by name; to be read only."""
    written = {}
    for write in dict.fromkeys(WRITERS.values()):
        written[write] = write(tmp_path_factory.mktemp(write.__name__))
    return {name: written[write] for name, write in WRITERS.items()}


def items(downloads, name, split="train"):
    found = list(read_items(name, downloads[name], split))
    assert not [bad for bad in found if isinstance(bad, BadRow) and not bad.is_left_out]
    return [item for item in found if not isinstance(item, BadRow)]


@pytest.mark.parametrize("name", DATA_SETS)
def test_every_data_set_gives_training_rows_whose_scans_load(name, downloads):
    found = items(downloads, name)
    assert len({item.id for item in found}) == len(found) > 1
    rows = data_set_rows(name, downloads[name], "train")
    assert rows["images"] == [item.images for item in found]
    by_name = load_rows(f"{name}:{downloads[name]}")
    assert by_name["completion"] == rows["completion"]
    assert by_name["task"] == [item.task for item in found]
    streamed = list(data_set_rows(name, downloads[name], "train", streaming=True))
    assert streamed == list(rows)
    assert list(load_rows(f"{name}:{downloads[name]}", streaming=True)) == list(by_name)
    report = check_data_set(name, downloads[name], "train", scans="load", workers=1, progress=False)
    assert report.is_whole, report
    assert report.items.total() == len(found)
    text = check_text(report, DATA_SETS[name], "train")
    assert DATA_SETS[name].licence in text
    assert ("not for commercial use" in text) == (name != "own")


def test_several_data_sets_follow_each_other(downloads):
    names = ["m3d-cap", "m3d-vqa", "own"]
    sources = ", ".join(f"{name}:{downloads[name]}" for name in names)
    wanted = [row for name in names for row in load_rows(f"{name}:{downloads[name]}")["completion"]]
    assert load_rows(sources)["completion"] == wanted
    assert [row["completion"] for row in load_rows(sources, streaming=True)] == wanted


def test_m3d_captions_are_the_cases_text(downloads):
    train = items(downloads, "m3d-cap")
    assert [item.completion for item in train] == ["The liver is normal in case 000012."] * 2
    assert {item.patient for item in train} == {"ct_case/000012"}
    assert items(downloads, "m3d-cap", "validation")[0].patient == "ct_quizze/005461"
    with pytest.raises(DataError, match=r"no split test500\. Use one of train"):
        items(downloads, "m3d-cap", "test500")


def test_m3d_questions_are_asked_closed_and_open(downloads):
    found = items(downloads, "m3d-vqa", "validation")
    assert [item.task for item in found] == ["vqa_closed", "vqa_open"] * 3
    closed, opened = found[:2]
    # "NA" is no choice, but "none" is one; a question may hold commas, quotes and a line break.
    assert closed.prompt == "In which plane is it? Choices: A. axial B. sagittal C. coronal"
    assert (closed.completion, closed.answer, closed.kind) == ("A. axial", "axial", "plane")
    assert (opened.prompt, opened.completion) == ("In which plane is it?", "axial")
    assert found[2].completion == "C. none"
    assert found[4].prompt == 'Which "mass", where\nis it? Choices: A. a B. b C. c D. d'
    assert [item.where[1] for item in found] == [2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize(
    ("cells", "letter", "prompt"),
    [
        ({"Answer": "coronal"}, "A", "A. axial B. sagittal C. coronal"),
        ({"Choice B": "axial"}, "A", "A. axial B. axial C. coronal"),
        ({"Choice C": "sagittal"}, None, "A. axial B. sagittal C. sagittal"),  # the right one is told by its text
        ({"Choice B": "NA"}, None, "A. axial C. coronal"),
    ],
)
def test_m3d_questions_that_only_their_letter_answers_stay(cells, letter, prompt, tmp_path):
    file = write_m3d(tmp_path) / "M3D-VQA" / "M3D_VQA_test.csv"
    with file.open(encoding="utf-8", newline="") as lines:
        columns, first, *rest = csv.reader(lines)
    for column, value in cells.items():
        first[columns.index(column)] = value
    write_csv(file, columns, first, *rest)
    found = list(read_items("m3d-vqa", tmp_path, "test"))
    assert [item.task for item in found] == ["vqa_closed", "vqa_open"] * 3
    assert (found[0].completion, found[0].letter) == ("A. axial", letter)
    assert found[0].prompt.endswith(f"Choices: {prompt}")
    report = check_data_set("m3d-vqa", tmp_path, "test", progress=False)
    assert (report.is_whole, report.by_letter) == (True, int(letter is not None))
    assert ("scored by the letter" in check_text(report, DATA_SETS["m3d-vqa"], "test")) == (letter is not None)


def test_m3d_captions_without_a_list_are_refused(tmp_path):
    write_json(tmp_path / "M3D_Cap.json", {"train": None, "test": [{"image": "a\0.npy", "text": "b\0.txt"}]})
    with pytest.raises(DataError, match="holds no list of train"):
        list(read_items("m3d-cap", tmp_path, "train"))
    (bad,) = read_items("m3d-cap", tmp_path, "test")
    assert bad.finding == "its text cannot be read (ValueError)"


def test_streamed_rows_warn_at_once_of_lines_that_are_left_out(tmp_path):
    file = write_own(tmp_path)
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(["{broken\n", *lines, "{broken\n"]), encoding="utf-8")
    with warnings.catch_warnings(record=True) as seen, _quiet_libraries():  # what the command line lets through
        rows = iter(load_rows(f"own:{file}", streaming=True))
        next(rows)
        assert [str(warning.message).partition(",")[0] for warning in seen] == ["own: lines cannot be used"]
        assert len(list(rows)) == 1
    assert str(seen[-1].message).startswith("own: 2 lines cannot be used, the first is")


def test_ct_rate_reports_have_findings_and_impression(downloads):
    found = items(downloads, "ct-rate")
    assert len(found) == 3  # not the head
    assert check_data_set("ct-rate", downloads["ct-rate"], "train", progress=False).left_out == 1
    sections = [split_report(item.completion) for item in found]
    assert sections == [
        {"findings": "There is a nodule of 5 mm.", "impression": "Nodule."},
        {"findings": "There is a nodule of 5 mm.", "impression": None},
        {"findings": None, "impression": "Emphysema, pleural effusion."},
    ]
    assert [item.patient for item in found] == ["train_1", "train_1", "train_2"]
    assert found[0].images[0].endswith("dataset/train_fixed/train_1/train_1_a/train_1_a_1.nii.gz")
    labels = read_labels(downloads["ct-rate"], "train")
    assert [sum(values) for values in labels.values()] == [1, 1, 1]
    assert labels["train_1_a_2.nii.gz"].index(1) == ABNORMALITIES.index("Arterial wall calcification")


def test_ct_rate_conversations_keep_what_was_said_before(downloads):
    report, *turns = items(downloads, "ct-rate-vqa")
    assert (report.task, report.prompt) == ("report", "Write a report.")
    assert [turn.task for turn in turns] == ["report", "vqa_closed", "vqa_open"]
    assert turns[1].choices == ["Lung", "Liver", "Heart", "Spleen"]
    assert (turns[1].answer, turns[1].completion) == ("Lung", "A. Lung")
    said = [message["content"] for message in turns[2].prompt]
    assert said[1:] == [
        "Findings: A nodule. Impression: Nodule.",
        "Which organ? Choices: A. Lung B. Liver C. Heart D. Spleen",
        "A. Lung",
        "How large is it?",
    ]
    assert [message["role"] for message in turns[2].prompt] == ["user", "assistant"] * 2 + ["user"]


def test_radgenome_questions_are_the_published_wordings(downloads):
    found = {item.kind: item for item in items(downloads, "radgenome")}
    assert found["presence"].prompt == "Is there a mass in the right lung upper lobe?"
    assert found["presence"].completion == "Yes."
    assert found["location"].prompt in ("Where is the mass?", "In which region is the mass?")
    assert found["location"].completion == "Lung/lung/right lung/right lung upper lobe."
    assert (found["size"].completion, found["disorders"].completion) == ("6x4 mm.", "Cancer, emphysema.")
    assert "train_10017a" in found["size"].images[0]


def test_radgenome_is_evaluated_as_by_its_publishers(downloads, tmp_path):
    path = "lung/lung/right lung/right lung upper lobe"
    asked = {item.kind: (item.prompt, item.completion) for item in items(downloads, "radgenome", "validation")}
    assert asked == {
        "abnormality": ("What are the abnormalities in the right lung upper lobe?", "mass"),
        "location": ("Where is the mass located in the image?", f"{path.capitalize()}."),
        "presence": ("Is there any sign of mass in the right lung upper lobe?", "Yes."),
        "size": (f"What is the approximate size of the mass in the {path}?", "6x4 mm."),
        "disorders": ("What are the abnormalities in the scan?", "Cancer, emphysema"),
    }
    shutil.copytree(downloads["radgenome"] / "dataset", tmp_path / "dataset")
    shutil.rmtree(tmp_path / "dataset" / "qa_templates")  # the wordings of training alone
    file = tmp_path / "dataset" / "radgenome_files" / "validation_vqa_abnormality.csv"
    name = "valid_10017_a_1.nii.gz"
    write_csv(file, ["Volumename", "Anatomy", "Abnormality"], [name, "heart", ""], [name, "", "mass"])
    nothing, bad, *_ = read_items("radgenome", tmp_path, "validation")
    assert (nothing.prompt, nothing.completion) == ("What are the abnormalities in the heart?", "No Findings")
    assert (bad.line, bad.finding) == (3, "an empty text")


def test_radgenome_takes_the_scans_of_ct_rate_where_it_has_none(downloads, tmp_path):
    write_ct_rate(tmp_path)
    shutil.copytree(downloads["radgenome"] / "dataset", tmp_path / "dataset", dirs_exist_ok=True)
    for file in (tmp_path / "dataset" / "radgenome_files").glob("train_*.csv"):
        text = file.read_text(encoding="utf-8").replace("train_10017_a_1", "train_1_a_1")
        file.write_text(text, encoding="utf-8")
    found = list(read_items("radgenome", tmp_path, "train"))
    assert all("train_fixed/train_1/train_1_a/" in item.images[0] for item in found)


def test_3d_rad_names_its_kinds_and_finds_test_scans(downloads):
    size, opened, closed = items(downloads, "3d-rad", "test")
    assert (size.kind, size.task, size.prompt) == ("medical computation, Size", "vqa_open", "What is its size?")
    assert (closed.kind, closed.completion) == ("existence detection, Lung nodule", "A. Yes")
    assert closed.choices == ["Yes", "No"]
    # Existence is asked without choices too, as the paper does.
    assert (opened.kind, opened.task, opened.completion) == (closed.kind, "vqa_open", "Yes")
    assert "valid_fixed/valid_1/" in closed.images[0]
    hub = downloads["3d-rad"] / "3DRAD"
    assert len(list(read_items("3d-rad", hub, "test"))) == 3


def test_scans_of_no_chest_are_left_out_everywhere(downloads, tmp_path):
    write_3d_rad(tmp_path)
    for split in ("train", "valid"):
        (tmp_path / "dataset" / "metadata" / f"no_chest_{split}.txt").write_text(f"x/{split}_1_a_1.nii.gz\n")
    for name, split in (("ct-rate", "train"), ("ct-rate-vqa", "validation"), ("3d-rad", "test")):
        found = list(read_items(name, tmp_path, split))
        assert any(isinstance(row, BadRow) and row.is_left_out for row in found)
        assert not [item for item in found if not isinstance(item, BadRow) and "_1_a_1" in item.images[0]]


def test_m3d_takes_nifti_files_where_only_they_are_there(tmp_path):
    write_m3d(tmp_path)
    for array in (tmp_path / "M3D_Cap_npy").rglob("*.npy"):
        array.rename(array.with_suffix(".nii.gz"))
    assert all(item.images[0].endswith(".nii.gz") for item in read_items("m3d-vqa", tmp_path, "test"))


def test_own_data_may_be_a_file_a_folder_of_files_or_scans_with_reports(downloads, tmp_path):
    opened, closed = items(downloads, "own")
    assert (opened.id, opened.patient, opened.task) == ("a", "p1", "vqa_open")
    assert (closed.task, closed.answer, closed.kind) == ("vqa_closed", "right", "side")
    assert [item.id for item in read_items("own", downloads["own"].parent, "train")] == [opened.id, closed.id]
    rows = [["a.nii;b.nii", "Q?", "x", "x|y", "x"], ["a.nii", "Q?", "Long.", "", ""]]
    write_csv(tmp_path / "rows.csv", ["images", "prompt", "completion", "choices", "answer"], *rows)
    first, second = read_items("own", tmp_path / "rows.csv", "train")
    assert first.images == [str(tmp_path / name) for name in ("a.nii", "b.nii")]
    assert (first.choices, second.choices, second.task) == (["x", "y"], None, "vqa_open")
    (tmp_path / "scans" / "series").mkdir(parents=True)
    for name, text in (("one.nii.gz", None), ("one.txt", "Normal."), ("series.txt", "A mass."), ("two.nii", None)):
        (tmp_path / "scans" / name).write_text(text or "x", encoding="utf-8")
    found = list(read_items("own", tmp_path / "scans", "train"))
    assert [(item.id, item.completion) for item in found[:2]] == [("one", "Normal."), ("series", "A mass.")]
    assert isinstance(found[2], BadRow)


@pytest.mark.parametrize(
    ("write", "name", "file", "cells", "finding"),
    [
        (write_m3d, "m3d-vqa", "M3D-VQA/M3D_VQA_train.csv", {"Answer Choice": "E"}, "an answer letter that no choice"),
        (write_m3d, "m3d-vqa", "M3D-VQA/M3D_VQA_train.csv", {"Answer Choice": "D"}, "an answer letter that no choice"),
        (write_m3d, "m3d-vqa", "M3D-VQA/M3D_VQA_train.csv", {"Question": " "}, "no text"),
        (write_m3d, "m3d-vqa", "M3D-VQA/M3D_VQA_train.csv", {"Question Type": "9"}, "no question type"),
        (write_radgenome, "radgenome", "dataset/radgenome_files/train_vqa_size.csv", {"Size": ""}, "an empty text"),
        (
            write_3d_rad,
            "3d-rad",
            "3DRAD/train/Task4_Existence_Detection/Lung nodule.csv",
            {"AnswerChoice": "-"},
            "an answer",
        ),
        (write_3d_rad, "3d-rad", "3DRAD/train/Task3_Medical_Computation/Size.csv", {"VolumeName": "x"}, "VolumeName"),
        (
            write_ct_rate,
            "ct-rate",
            "dataset/radiology_text_reports/train_reports.csv",
            {"Findings_EN": "Not given.", "Impressions_EN": ""},
            "neither findings nor impression",
        ),
    ],
)
def test_bad_lines_are_named_by_file_and_line_and_the_others_are_kept(write, name, file, cells, finding, tmp_path):
    write(tmp_path)
    with (tmp_path / file).open(encoding="utf-8", newline="") as lines:
        columns, first, *rest = csv.reader(lines)
    for column, value in cells.items():
        first[columns.index(column)] = value
    write_csv(tmp_path / file, columns, first, *rest)
    report = check_data_set(name, tmp_path, "train", progress=False)
    (bad,) = report.bad_rows[:1]
    assert (bad.file, bad.line) == (str(tmp_path / file), 2)
    assert finding in bad.finding
    assert report.items
    assert not report.is_whole
    with pytest.warns(UserWarning, match="cannot be used, the first is"):
        assert len(data_set_rows(name, tmp_path, "train")) == report.items.total()


def test_ids_and_json_lines_of_ones_own_are_checked(tmp_path):
    file = write_own(tmp_path)
    with file.open("a", encoding="utf-8") as lines:
        for row in (
            {"id": "a", "images": "scan.nii.gz", "prompt": "Q?", "completion": "Doe"},
            {"images": "scan.nii.gz", "prompt": "Q?", "completion": " "},
            {"images": "scan.nii.gz", "prompt": "Q?", "completion": "x", "choices": ["a", "b"], "answer": "c"},
            {"images": 5, "prompt": "Q?", "completion": "x"},
            {"images": "scan.nii.gz", "prompt": "Q?", "completion": "x", "choices": [[1], [2]], "answer": [1]},
        ):
            lines.write(json.dumps(row) + "\n")
        lines.write("{broken\n")
    report = check_data_set("own", file, "train", progress=False)
    assert [(bad.line, bad.finding.split()[0]) for bad in report.bad_rows] == [
        (3, "its"),
        (4, "completion"),
        (5, "the"),
        (6, "images"),
        (7, "choices"),
        (8, "is"),
    ]
    assert "Doe" not in check_text(report, DATA_SETS["own"], "train")


def test_missing_and_broken_scans_are_found_before_training(tmp_path):
    write_ct_rate(tmp_path)
    scans = sorted((tmp_path / "dataset" / "train_fixed").rglob("*.nii.gz"))
    scans[0].unlink()
    scans[1].write_bytes(scans[1].read_bytes()[:2000])
    there = check_data_set("ct-rate", tmp_path, "train", progress=False)
    assert (there.missing, there.broken) == ([str(scans[0])], [])
    loaded = check_data_set("ct-rate", tmp_path, "train", scans="load", progress=False)
    assert loaded.missing == [str(scans[0])]
    assert [scan for scan, _ in loaded.broken] == [str(scans[1])]
    assert loaded.lost == 2
    assert json.loads(json.dumps(loaded.as_dict()))["broken"][0]["scan"] == str(scans[1])
    scans[2].write_bytes(b"")
    assert check_data_set("ct-rate", tmp_path, "train", progress=False).broken == [(str(scans[2]), "is empty")]


@pytest.mark.parametrize(
    ("name", "split", "finding"),
    [
        ("ct-rate", "test", "has no split test"),
        ("ct-rate", "train", "there is no such file"),
        ("m3d-cap", "train", "has no M3D_Cap/M3D_Cap.json"),
        ("3d-rad", "train", "holds no Task folders"),
        ("radgenome", "train", "cannot be read"),
        ("own", "train", "no scan with a report"),
        ("ctrate", "train", "is no known data set"),
    ],
)
def test_what_is_not_there_is_named(name, split, finding, tmp_path):
    with pytest.raises(DataError, match=finding):
        list(read_items(name, tmp_path, split))


def test_a_missing_column_is_named(tmp_path):
    write_csv(tmp_path / "M3D-VQA" / "M3D_VQA_test.csv", ["Image Path", "Question"], ["a", "b"])
    with pytest.raises(DataError, match=r"no column Question Type, Choice A.*found: Image Path, Question"):
        list(read_items("m3d-vqa", tmp_path, "test"))


def test_a_file_without_header_is_not_quoted(tmp_path):
    (tmp_path / "rows.csv").write_text("Jane Doe born 1950,Large tumour\nJohn Doe,None\n", encoding="utf-8")
    with pytest.raises(DataError, match="is the header missing") as raised:
        list(read_items("own", tmp_path / "rows.csv", "train"))
    assert "Doe" not in str(raised.value)


def test_numbers_are_good_ids_and_patients(tmp_path):
    lines = [{"id": 0, "patient": 0, "prompt": "Q?", "completion": "x", "images": f"{i}.nii"} for i in range(2)]
    lines[1]["id"] = 1
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    found = list(read_items("own", tmp_path / "a.jsonl", "train"))
    assert [(item.id, item.patient) for item in found] == [("0", "0"), ("1", "0")]


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_json_lists_are_read_in_pieces(chunk, monkeypatch, tmp_path):
    monkeypatch.setattr(files_module, "_CHUNK", chunk)
    members = [{"a": "x, ] [ é"}, [], "text", {"b": [1, {"c": None}]}]
    write_json(tmp_path / "a.json", members)
    assert list(read_json_list(tmp_path / "a.json")) == list(enumerate(members, 1))
    (tmp_path / "b.json").write_text(json.dumps(members, indent=3)[:-4], encoding="utf-8")
    with pytest.raises(DataError, match=r"in the middle|number 4 of its list is no JSON"):
        list(read_json_list(tmp_path / "b.json"))
    write_json(tmp_path / "c.json", {"a": 1})
    with pytest.raises(DataError, match="no JSON list"):
        list(read_json_list(tmp_path / "c.json"))
