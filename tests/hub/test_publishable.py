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
"""What must not be published, in files as real programs write them, under their own and under harmless names."""

import getpass
import io
import json
import pickle
import shutil
import socket
import struct
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image, PngImagePlugin
from pydicom.dataset import FileMetaDataset

import ct_moe
from ct_moe import PublishError
from ct_moe.hub import publishable
from ct_moe.hub.card import write_card
from ct_moe.hub.publishable import check_contents, publishable_files


PHANTOM_SCORES = {
    "split": "test",
    "scans": 20,
    "closed": {"accuracy": 0.6044, "interval": [0.55, 0.66], "n": 40, "kinds": {"phase": 1.0}},
    "majority": {"accuracy": 0.25, "kinds": {"phase": 0.5}},
    "controls": {},
    "report": {
        "macro_f1": 0.7349,
        "per_finding": {"nodule": {"precision": 0.5, "recall": 0.25, "f1": 0.33, "support": 4}},
    },
}


@pytest.fixture
def folder(model_folder, tmp_path):
    """A model folder with a card and results."""
    out = tmp_path / "model"
    shutil.copytree(model_folder, out)
    (out / "card.yaml").write_text("license: apache-2.0\n")
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps(PHANTOM_SCORES))
    write_card(out, [scores])
    return out


def check(folder: Path, **kwargs) -> dict[str, Path]:
    files = publishable_files(folder)
    check_contents(folder, **kwargs)
    return files


def dicom() -> bytes:
    """A slice with a patient in it, as a scanner's software writes it."""
    dataset, file = pydicom.Dataset(), io.BytesIO()
    dataset.PatientName, dataset.SOPClassUID, dataset.SOPInstanceUID = "Doe^Jane", "1.2.840.10008.5.1.4.1.1.2", "1.2.3"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def torch_file() -> bytes:
    file = io.BytesIO()
    torch.save({"weight": torch.zeros(2)}, file)
    return file.getvalue()


def numpy_file() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros((2, 2, 2)))
    return file.getvalue()


def nifti() -> bytes:
    return nib.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.eye(4)).to_bytes()


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("scan.dcm", dicom())
    return file.getvalue()


def png_with_words() -> bytes:
    file, words = io.BytesIO(), PngImagePlugin.PngInfo()
    words.add_text("Comment", "Doe^Jane")
    Image.new("RGB", (2, 2)).save(file, "png", pnginfo=words)
    return file.getvalue()


def test_a_model_folder_may_be_published(folder):
    files = check(folder)
    assert {"config.json", "model.safetensors", "README.md", "modeling_ct_moe.py", "card.yaml"} <= files.keys()
    assert set(files) == {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_links_to_the_packages_code_and_inside_the_folder_are_resolved(folder):
    code = Path(ct_moe.__file__).parent.resolve() / "modeling_ct_moe.py"
    (folder / "modeling_ct_moe.py").unlink()
    (folder / "modeling_ct_moe.py").symlink_to(code)
    (folder / "NOTICE").symlink_to(folder / "card.yaml")
    files = check(folder)
    assert files["modeling_ct_moe.py"] == code
    assert files["NOTICE"] == (folder / "card.yaml").resolve()


@pytest.mark.parametrize(
    ("name", "content", "finding"),
    [
        ("slice.dcm", dicom, "a scan of a patient"),
        ("LICENSE", dicom, "a scan of a patient"),
        ("LICENSE", lambda: dicom()[132:], "a scan of a patient"),  # without its preamble
        ("scan.nii.gz", lambda: b"anything", "a scan of a patient"),
        ("NOTICE", nifti, "a scan of a patient"),
        ("scan.nrrd", lambda: b"NRRD0004\n", "a scan of a patient"),
        ("vocab.txt", lambda: b"NRRD0004\n", "a scan of a patient"),
        ("scan.mha", lambda: b"ObjectType = Image\n", "a scan of a patient"),
        ("volume.npy", numpy_file, "a scan of a patient"),
        ("merges.txt", numpy_file, "a scan of a patient"),
        ("pytorch_model.bin", torch_file, "pickled objects"),
        ("model.pt", torch_file, "pickled objects"),
        ("optimizer.ckpt", lambda: b"", "pickled objects"),
        ("tokenizer.model", lambda: pickle.dumps({"a": 1}), "pickled objects"),
        ("model-00002-of-00002.safetensors", torch_file, "an archive"),
        ("LICENSE.txt", zipped, "an archive"),
        ("model-00002-of-00002.safetensors", lambda: b"\x07" * 100, "no safetensors file"),
        ("routing.png", png_with_words, "no PNG without words"),
        ("notes.txt", lambda: b"", "no file of a model folder"),
        ("results.predictions.jsonl", lambda: b"{}", "no file of a model folder"),
        ("other_ct_moe.py", lambda: b"", "not the code of ct-moe"),
        ("modeling_ct_moe.py", lambda: b"import os", "not the code of ct-moe"),
        ("generation_config.json", lambda: b"{", "cannot be read"),
    ],
)
def test_files_that_may_hold_patients_or_code_are_refused(folder, name, content, finding):
    (folder / name).write_bytes(content())
    with pytest.raises(PublishError, match=finding) as raised:
        check(folder)
    assert raised.value.subject == name
    assert "Doe" not in str(raised.value)


HOME = str(Path.home())


@pytest.mark.parametrize(
    ("words", "finding"),
    [
        ("trained in /home/somebody/runs/7", "a path of this machine"),
        ("see file:///scratch/x", "a path of this machine"),
        (r"from C:\Users\somebody\scans", "a path of this machine"),
        (r"from \\server\share", "a path of this machine"),
        (f"in {HOME}/x", "this machine"),
        ("Patient Name: Doe, Jane", "patient data"),
        ("PatientID=123", "patient data"),
        ("(0010,0010) PN", "a DICOM tag"),
        ("MRN 0012345", "a medical record number"),
        ("born 12.03.1961", "a date of birth"),
        ("Accession number: A12", "an accession number"),
        ("a scan of Doe^Jane", "a name as DICOM"),
        ("series 1.2.840.113619.2.55.3.604688.12", "a DICOM identifier"),
        ("token hf_abcdefghijklmnopqrstuvwxyz0123456789", "an access token"),
    ],
)
@pytest.mark.parametrize("place", ["README.md", "config.json", "weights"])
def test_words_about_patients_and_this_machine_are_refused_and_never_repeated(folder, words, finding, place):
    if place == "weights":
        file = folder / "model-00002-of-00002.safetensors"
        header = json.dumps({"__metadata__": {"format": "pt", "note": words}}).encode()
        file.write_bytes(struct.pack("<Q", len(header)) + header)
    elif place == "config.json":
        file = folder / place
        config = json.loads(file.read_text())
        config["text_config"]["note"] = {"from": [words]}
        file.write_text(json.dumps(config))
    else:
        file = folder / place
        file.write_text(file.read_text() + f"\n{words}\n")
    with pytest.raises(PublishError, match=finding) as raised:
        check(folder)
    assert raised.value.subject == file.name
    assert words not in str(raised.value)


@pytest.mark.parametrize("own", [getpass, socket])
def test_the_names_of_user_and_host_are_refused_unless_the_repository_has_them(folder, monkeypatch, own):
    monkeypatch.setattr(own, "getuser" if own is getpass else "gethostname", lambda: "janedoe")
    (folder / "NOTICE").write_text("Models of janedoe/ct are by janedoer and jane-doe.\n")
    check(folder, repo_id="janedoe/ct")
    with pytest.raises(PublishError, match="names the user"):
        check(folder, repo_id="lab/ct")


def test_words_that_only_look_like_it_are_let_through(folder):
    words = (
        "See https://example.org/home/page, a/b/c, ratios 1/2 and version 1.2.3.4. PatientName is never read. "
        "Patients were born between 1930 and 2000. The layer is x^T. Use ct-moe push runs/stage2 lab/model."
    )
    (folder / "NOTICE").write_text(words)
    check(folder)


def test_links_out_of_the_folder_are_refused(folder, tmp_path):
    (tmp_path / "elsewhere.txt").write_text("secret")
    (tmp_path / "scans").mkdir()
    for name, target in (("NOTICE", tmp_path / "elsewhere.txt"), ("adapter", tmp_path / "scans")):
        (folder / name).symlink_to(target)
        with pytest.raises(PublishError, match="a link to something outside"):
            publishable_files(folder)
        (folder / name).unlink()


def test_code_of_another_repository_and_shards_over_5_gb_are_refused(folder, monkeypatch):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModel"] = "other/repository--modeling_ct_moe.CTMoEForConditionalGeneration"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PublishError, match="from another repository"):
        check(folder)
    monkeypatch.setattr(publishable, "MAX_BYTES", 1000)
    with pytest.raises(PublishError, match="over 5 GB"):
        check(folder)


def test_results_that_name_rows_are_refused(folder):
    (folder / "results.json").write_text(
        json.dumps({"about": {}, "system": {}, "counts": {}, "unanswered": ["patient-7"]})
    )
    with pytest.raises(PublishError, match="names rows of the data set") as raised:
        check(folder)
    assert "patient-7" not in str(raised.value)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("value: 60.44", "value: 81.06"),
        ("| 60.4 [", "| 81.1 ["),
        ("| 0.50 | 0.25 |", "| 0.91 | 0.25 |"),
        ("Made with CT-MoE.", "Made with CT-MoE. It is right in 93 % of cases."),
        ("Made with CT-MoE.", "Made with CT-MoE. Its accuracy is 0.93."),
    ],
)
def test_numbers_that_nobody_measured_are_refused(folder, old, new):
    check(folder)
    card = (folder / "README.md").read_text()
    assert old in card
    (folder / "README.md").write_text(card.replace(old, new, 1))
    with pytest.raises(PublishError, match="no results file has"):
        check(folder)
    (folder / "README.md").write_text(card)
    (folder / "results_phantoms_test.json").unlink()  # without it none of them is measured
    with pytest.raises(PublishError, match="no results file has"):
        check(folder)


def test_numbers_of_the_hubs_benchmarks_are_looked_up_too(folder):
    (folder / ".eval_results").mkdir()
    file = folder / ".eval_results" / "phantoms.yaml"
    entry = "- dataset: {id: ct-moe-phantoms, task_id: closed}\n  value: "
    file.write_text(f"{entry}60.44\n")
    check(folder)
    file.write_text(f"{entry}61.44\n")
    with pytest.raises(PublishError, match="no results file has"):
        check(folder)


def test_several_findings_are_counted(folder):
    (folder / "a.pkl").write_bytes(b"")
    (folder / "b.dcm").write_bytes(b"")
    with pytest.raises(PublishError, match=r"^a.pkl: .* \(1 more in b.dcm\)"):
        publishable_files(folder)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(PublishError, match="no such folder"):
        publishable_files(tmp_path / "none")
    with pytest.raises(PublishError, match="no model and no adapter"):
        publishable_files(tmp_path)
