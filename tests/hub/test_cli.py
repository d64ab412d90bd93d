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
"""Command line: what it prints, writes and returns, and how it fails."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import fail, invoke
from PIL import Image

from ct_moe import CTMoEError, ModelError
from ct_moe.hub.cli import printable


@pytest.fixture
def scan(test_data):
    return str(test_data / "totalseg" / "example_ct_sm.nii.gz")


def test_help_imports_neither_torch_nor_transformers():
    code = (
        "import sys; sys.argv = ['ct-moe', '--help']\n"
        "from ct_moe.hub.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: print(stop.code, sorted({'torch', 'transformers', 'nibabel'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "report" in result.stdout
    assert result.stdout.splitlines()[-1] == "0 []"


def test_tiny_base_is_built_and_converted(tmp_path):
    assert invoke("tiny-base", tmp_path / "base").exit_code == 0
    settings = ["--set", "num_experts=2", "--set", 'tasks=["report"]', "--set", "guide_interaction=bias"]
    result = invoke("convert", tmp_path / "base", tmp_path / "model", *settings)
    assert result.exit_code == 0
    assert "parity with the base: largest logit difference" in result.stdout
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["tasks"] == ["report"]
    assert config["vision_config"]["num_experts"] == 2
    assert config["vision_config"]["guide_interaction"] == "bias"


def test_report_goes_on_after_a_bad_scan_and_records_it(model_folder, scan, test_data, tmp_path):
    out = tmp_path / "reports.jsonl"
    bad = test_data / "totalseg" / "example_mr_sm.nii.gz"
    arguments = ["report", bad, scan, "gone.nii", "-m", model_folder, "--max-new-tokens", 4]
    result = invoke(*arguments, "--batch-size", 2, "--out", out)
    assert result.exit_code == 1
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["scan"] for record in records] == [str(bad), scan, "gone.nii"]
    assert "this is not CT" in records[0]["error"]
    assert records[1]["task"] == "report"
    assert records[2].keys() == {"scan", "error"}
    assert records[2]["error"].startswith("gone.nii: no such file")
    assert "2 of 3 scans failed" in result.stderr
    assert f"{scan}: 18 slices, 5 mm slabs, task report" in result.stdout
    assert invoke(*arguments, "--allow-failures").exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["reports.jsonl"]


def test_batches_and_single_scans_give_the_same_records(model_folder, test_data, tmp_path):
    scans = [test_data / "totalseg" / name for name in ("example_ct_sm.nii.gz", "aorta_ct_cropped.nii.gz")]
    for size in (1, 2):
        arguments = [
            "-m",
            model_folder,
            "--max-new-tokens",
            4,
            "--batch-size",
            size,
            "--routing",
            tmp_path / f"{size}",
        ]
        assert invoke("report", *scans, *arguments, "--out", tmp_path / f"{size}.jsonl").exit_code == 0
    first, second = (
        [json.loads(line) for line in (tmp_path / f"{size}.jsonl").read_text().splitlines()] for size in (1, 2)
    )
    for number, (one, two) in enumerate(zip(first, second, strict=True), start=1):
        assert one.pop("routing").keys() == two.pop("routing").keys()  # floats differ in the last bits
        for size, record in ((1, one), (2, two)):
            picture = tmp_path / f"{size}" / f"scan-{number:04}.png"
            assert record.pop("routing_picture") == str(picture)
            with Image.open(picture) as opened:
                assert opened.format == "PNG"
        assert one == two


def test_routing_pictures_skip_a_scan_that_fails_and_keep_to_a_new_folder(
    model_folder, scan, tmp_path, monkeypatch, capsys
):
    arguments = ["report", tmp_path / "none.nii.gz", scan, "-m", model_folder, "--max-new-tokens", 2]
    result = invoke(*arguments, "--routing", tmp_path / "routing")
    assert result.exit_code == 1
    assert [path.name for path in (tmp_path / "routing").iterdir()] == ["scan-0002.png"]
    for folder in (tmp_path / "routing", tmp_path / "no" / "such"):
        error = fail(monkeypatch, capsys, *arguments, "--routing", folder)
        assert "Name a new one in a folder that exists" in error


def test_tasks_are_listed_renamed_removed_and_added(model_folder, scan, tmp_path, monkeypatch, capsys):
    assert invoke("tasks", model_folder).stdout == "0 report\n1 vqa_closed\n2 vqa_open\n"
    changes = ["--add", "vqa_location=questions", "--add", "new", "--remove", "vqa_open"]
    result = invoke("tasks", model_folder, *changes, "--rename", "vqa_closed=questions", "--out", tmp_path / "out")
    assert result.stdout == f"0 report\n1 questions\n2 vqa_location\n3 new\nWrote {tmp_path / 'out'}\n"
    for task, name in (("vqa_location", "vqa_location"), ("3", "new")):
        arguments = ["-m", tmp_path / "out", "--question", "Where?", "--task", task, "--max-new-tokens", 2]
        assert f"task {name}" in invoke("report", scan, *arguments).stdout
    error = fail(monkeypatch, capsys, "report", scan, "-m", tmp_path / "out", "--task", "vqa_open")
    assert "'vqa_open' is unknown. Choose one of report (0), questions (1), vqa_location (2), new (3)" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--add", "new"], "--out: missing"),
        (["--out", "somewhere"], "--out: nothing to write"),
        (["--rename", "report", "--out", "somewhere"], "Write OLD=NEW"),
        (["--remove", "none", "--out", "somewhere"], "'none' is unknown. Choose one of report"),
        (["--add", "report", "--out", "somewhere"], "repeats a name"),
    ],
)
def test_tasks_that_cannot_be_leave_nothing_behind(model_folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in fail(monkeypatch, capsys, "tasks", model_folder, *arguments)
    assert not list(tmp_path.iterdir())


def test_questions_are_answered_and_streamed(model_folder, scan):
    arguments = ["report", scan, "-m", model_folder, "--question", "Is there a stone?", "--max-new-tokens", 6]
    told, streamed = invoke(*arguments), invoke(*arguments, "--stream")
    assert told.exit_code == streamed.exit_code == 0
    answer = told.stdout.partition("Answer: ")[2].partition("\n")[0]
    assert answer
    assert answer in printable(streamed.stdout)
    assert "Answer:" not in streamed.stdout


def test_values_that_are_not_ct_can_be_let_through(model_folder, test_data):
    bad = test_data / "totalseg" / "example_mr_sm.nii.gz"
    result = invoke("report", bad, "-m", model_folder, "--max-new-tokens", 2, "--check", "warn")
    assert result.exit_code == 0
    assert "not CT" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--question", "  "], "question: holds only spaces"),
        (["--task", "surgery"], "task: 'surgery' is unknown"),
        (["--stream", "--batch-size", "2"], "--stream: cannot follow several texts"),
        (["--device", "tpu:9"], "device: 'tpu:9' cannot be used here"),
        (["--dtype", "float33"], "dtype: 'float33' cannot be used"),
    ],
)
def test_bad_requests_end_in_one_line(monkeypatch, capsys, model_folder, scan, arguments, message, tmp_path):
    out = tmp_path / "out.jsonl"
    line = fail(monkeypatch, capsys, "report", scan, "-m", model_folder, "--out", out, *arguments)
    assert line.startswith(f"ct-moe: error: {message}")
    assert list(tmp_path.iterdir()) == []


def test_models_that_are_no_ct_moe_are_named(monkeypatch, capsys, model_folder, scan, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    assert "no such folder" in fail(monkeypatch, capsys, "report", scan, "-m", tmp_path / "gone")
    assert "config.json" in fail(monkeypatch, capsys, "report", scan, "-m", other)
    (other / "config.json").write_text('{"model_type": "bert"}')
    line = fail(monkeypatch, capsys, "report", scan, "-m", other)
    assert line == (
        f"ct-moe: error: {other}: a model of type 'bert', not 'ct_moe'. Convert a base first: ct-moe convert BASE OUT."
    )


def test_a_damaged_model_is_named(monkeypatch, capsys, model_folder, scan, tmp_path):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in model_folder.iterdir():
        if path.name != "model.safetensors":
            (damaged / path.name).symlink_to(path)
    assert "model.safetensors" in fail(monkeypatch, capsys, "report", scan, "-m", damaged)
    (damaged / "model.safetensors").write_bytes((model_folder / "model.safetensors").read_bytes()[:5000])
    assert fail(monkeypatch, capsys, "report", scan, "-m", damaged).startswith(f"ct-moe: error: {damaged}: ")


def test_existing_output_is_not_overwritten(monkeypatch, capsys, model_folder, scan, tmp_path):
    out = tmp_path / "reports.jsonl"
    out.write_text("mine\n")
    assert "exists" in fail(monkeypatch, capsys, "report", scan, "-m", model_folder, "--out", out)
    assert out.read_text() == "mine\n"


def test_unsupported_bases_are_refused_by_name(monkeypatch, capsys, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "llava_next"}')
    line = fail(monkeypatch, capsys, "convert", base, tmp_path / "out")
    assert "llava_next" in line
    assert "Supported: LLaVA" in line
    assert not (tmp_path / "out").exists()


def test_interrupted_jobs_keep_whole_records(tmp_path):
    from ct_moe.hub.reporting import write_jsonl

    def records():
        yield {"scan": "a"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(write_jsonl(records(), tmp_path / "out.jsonl"))
    assert (tmp_path / "out.jsonl").read_text() == '{"scan": "a"}\n'
    with pytest.raises(ModelError, match="cannot be written"):
        list(write_jsonl([{}], tmp_path / "no" / "out.jsonl"))


def test_errors_survive_pickling_and_say_all_three_parts():
    import pickle

    error = pickle.loads(pickle.dumps(ModelError("scan.nii", "is empty", "Export it again")))
    assert isinstance(error, CTMoEError)
    assert isinstance(error, ValueError)
    assert str(error) == "scan.nii: is empty. Export it again."
    assert (error.subject, error.finding, error.remedy) == ("scan.nii", "is empty", "Export it again")


def test_version_is_the_packages(capsys):
    from importlib.metadata import version

    assert invoke("--version").stdout == f"ct-moe {version('ct-moe')}\n"
    assert Path(sys.executable).parent.joinpath("ct-moe").exists()


def test_inspect_tells_geometry_and_densities(scan):
    description = json.loads(invoke("inspect", scan, "--json").stdout)
    assert description["shape"] == [30, 101, 122]
    assert description["spacing_mm"] == [3.0, 3.0, 3.0]
    assert description["stored_orientation"] == "RAS"
    assert (description["hu"]["minimum"], description["hu"]["maximum"]) == (-1100, 1207)
    assert description["refused"] is None
    text = invoke("inspect", scan)
    assert text.exit_code == 0
    assert "30 slices of 101 x 122 pixels" in text.stdout


def test_inspect_shows_a_refused_scan_and_says_why(test_data):
    result = invoke("inspect", test_data / "niivue" / "CT_pitch.nii.gz")
    assert result.exit_code == 1
    assert "REFUSED      values from 0 to 255 are grey levels" in result.stdout
    assert "16.5 degrees" in result.stdout


def test_view_draws_what_the_model_sees(scan, model_folder, tmp_path):
    from PIL import Image

    result = invoke("view", scan, "--out", tmp_path / "ours.png", "--windows", "abdomen", "--columns", 3)
    assert result.exit_code == 0
    assert invoke("view", scan, "--out", tmp_path / "models.png", "-m", model_folder, "--columns", 3).exit_code == 0
    widths = []
    for name in ("ours.png", "models.png"):
        with Image.open(tmp_path / name) as picture:
            widths.append(picture.width)
    assert widths[0] > widths[1]  # 336 pixels a slice, and 4 x 56


def test_view_of_an_unknown_preset_leaves_nothing(monkeypatch, capsys, scan, tmp_path):
    line = fail(monkeypatch, capsys, "view", scan, "--out", tmp_path / "a.png", "--windows", "liver")
    assert "chest" in line
    assert list(tmp_path.iterdir()) == []


def test_one_series_of_several_can_be_chosen(monkeypatch, capsys, model_folder, test_data, tmp_path):
    folder = test_data / "panimg" / "dicom_4d"
    assert "19 series or points in time" in fail(monkeypatch, capsys, "inspect", folder)
    description = json.loads(invoke("inspect", folder, "--series", 3, "--json").stdout)
    assert description["shape"] == [4, 2, 3]
    arguments = ["-m", model_folder, "--max-new-tokens", 2, "--series", 3, "--check", "off"]
    assert invoke("report", folder, *arguments).exit_code == 0
    assert "series" in fail(monkeypatch, capsys, "view", folder, "--out", tmp_path / "a.png", "--series", 99)


def test_a_model_with_a_tensor_missing_is_refused(monkeypatch, capsys, model_folder, scan, tmp_path):
    from safetensors.torch import load_file, save_file

    for path in model_folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    tensors = load_file(model_folder / "model.safetensors")
    lost = "model.multi_modal_projector.linear_1.bias"
    del tensors[lost]
    (tmp_path / "model.safetensors").unlink()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert f"1 tensors are missing, the first is {lost}" in fail(monkeypatch, capsys, "report", scan, "-m", tmp_path)


def test_a_scan_that_fails_in_a_batch_does_not_fail_the_others(model_folder, scan, tmp_path):
    import numpy as np

    folder = tmp_path / "display"
    folder.mkdir()
    for path in model_folder.iterdir():
        if path.name != "processor_config.json":
            (folder / path.name).symlink_to(path)
    config = json.loads((model_folder / "processor_config.json").read_text())
    config["image_processor"]["intensity"] = "display"
    (folder / "processor_config.json").write_text(json.dumps(config))
    for name, scale in (("good", 1), ("bad", 50)):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(0).random((6, 20, 20), dtype=np.float32) * scale)
    out = tmp_path / "out.jsonl"
    scans = [tmp_path / f"{name}.npy" for name in ("good", "bad", "good")]
    arguments = ["-m", folder, "--batch-size", 3, "--max-new-tokens", 2, "--out", out]
    assert invoke("report", *scans, *arguments).exit_code == 1
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert ["error" in record for record in records] == [False, True, False]
    assert records[1]["error"].startswith(str(scans[1]))
    assert records[0] == records[2]


@pytest.mark.parametrize(
    ("field", "value"), [("guide_size", 0), ("moe_intermediate_size", 0), ("task_coef", -1.0), ("qk_norm", "true")]
)
def test_settings_out_of_range_are_refused_when_set(monkeypatch, capsys, tmp_path, field, value):
    assert invoke("tiny-base", tmp_path / "base").exit_code == 0
    line = fail(monkeypatch, capsys, "convert", tmp_path / "base", tmp_path / "out", "--set", f"{field}={value}")
    assert field in line
    assert "unexpected" not in line
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_view_with_a_folder_of_another_model_names_it(monkeypatch, capsys, scan, tmp_path):
    assert invoke("tiny-base", tmp_path / "base").exit_code == 0
    line = fail(monkeypatch, capsys, "view", scan, "--out", tmp_path / "a.png", "-m", tmp_path / "base")
    assert line.startswith(f"ct-moe: error: {tmp_path / 'base'}: a model of type 'llava'")


def test_control_characters_do_not_reach_the_terminal():
    assert printable("liver \x1b[31mnormal\x07\nspleen é") == "liver \ufffd[31mnormal\ufffd\nspleen é"


@pytest.fixture
def recipe(model_folder, tmp_path):
    from ct_moe.trainers.phantoms.chest import write_phantom

    write_phantom(tmp_path / "scan.nii.gz", shape=(3, 16, 16))
    (tmp_path / "rows.csv").write_text(
        "images,prompt,completion,task\n"
        "scan.nii.gz,Where is it?,on the left,vqa_open\n"
        'scan.nii.gz,"Is it large? A. Yes B. No",A. Yes,vqa_closed\n'
    )
    text = f"""
model: {model_folder}
train_data: {tmp_path}/rows.csv
output_dir: {tmp_path}/run
use_cpu: true
max_steps: 2
dataloader_num_workers: 0
activation_checkpointing: false
save_strategy: "no"
"""
    (tmp_path / "recipe.yaml").write_text(text)
    return tmp_path / "recipe.yaml"


def test_train_runs_both_stages_and_says_what_it_trains(recipe, tmp_path):
    command = [sys.executable, "-m", "ct_moe.hub.cli", "train", "--config", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for stage in ("stage1", "stage2"):
        assert f"{stage}: wrote {tmp_path}/run/{stage}" in done.stdout
        assert (tmp_path / "run" / stage / "model.safetensors").is_file()
    assert "volume layers     full" in done.stdout
    assert "2/2" in done.stderr  # progress
    assert "Traceback" not in done.stderr
    # The same again finds everything done; the trained folder answers.
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    assert done.stdout.count("is finished: nothing to do") == 2
    answer = invoke(
        "report", tmp_path / "scan.nii.gz", "-m", tmp_path / "run" / "stage2", "--question", "Where is it?"
    )
    assert answer.exit_code == 0, answer.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "learning_rate=fast"], "learning_rate: invalid float value: 'fast'"),
        (["--set", "rate=1"], "unknown settings rate"),
        (["--set", "model=/nowhere"], "/nowhere: no such folder"),
        (["--set", "train_data=none.csv"], "none.csv: there is no such file"),
        (["--stage", "2"], "is no finished stage 1. Train stage 1 first"),
        (["--set", "stage1.quantization=4bit", "--set", "train_language_model=full"], "on quantised weights"),
    ],
)
def test_training_that_cannot_start_ends_in_one_line(recipe, tmp_path, monkeypatch, capsys, arguments, message):
    assert message in fail(monkeypatch, capsys, "train", "--config", recipe, *arguments)
    assert not (tmp_path / "run" / "stage1").exists()
