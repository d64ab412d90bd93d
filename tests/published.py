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
"""Downloads of the published data sets, in the layouts and with the columns they are published with, a few rows each.

All texts are invented; the scans are phantoms and, where a test wants them, real ones.
"""

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np

from ct_moe.trainers.data_sets.ct_rate import ABNORMALITIES
from ct_moe.trainers.phantoms.chest import write_phantom


CLOSED = ["axial", "sagittal", "coronal", "NA"]
OPTIONS = ["Choice A", "Choice B", "Choice C", "Choice D"]


def write_csv(path: Path, columns: list[str], *rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def write_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_m3d(root: Path) -> Path:
    """M3D-Cap and M3D-VQA: two series of one case, one of another."""
    series = ["ct_case/000012/Axial_C__portal_venous_phase", "ct_case/000012/Coronal", "ct_quizze/005461/Axial"]
    rng = np.random.default_rng(0)
    for name in series:
        file = root / "M3D_Cap_npy" / f"{name}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, rng.random((1, 32, 256, 256), dtype=np.float32))
        (file.parent / "text.txt").write_text(f"The liver is normal in case {file.parent.name}.", encoding="utf-8")
    entries = [
        {"image": f"M3D_Cap_npy/{n}.npy", "text": f"M3D_Cap_npy/{n.rpartition('/')[0]}/text.txt"} for n in series
    ]
    write_json(
        root / "M3D_Cap" / "M3D_Cap.json", {"train": entries[:2], "validation": entries[2:], "test": entries[2:]}
    )
    columns = ["Image Path", "Text", "Question Type", "Question", *OPTIONS, "Answer", "Answer Choice"]
    rows = [
        [entries[0]["image"], "Normal.", 1, "In which plane is it?", *CLOSED, "axial", "A"],
        [entries[1]["image"], "Normal.", 2, "Which phase?", "arterial", "venous", "none", "delayed", "none", "C"],
        [entries[2]["image"], "Normal.", 4, 'Which "mass", where\nis it?', "a", "b", "c", "d", "d", "D"],
    ]
    for split in ("train", "val", "test"):
        write_csv(root / "M3D-VQA" / f"M3D_VQA_{split}.csv", columns, *rows)
    return root


def write_ct_rate(root: Path) -> Path:
    """CT-RATE in version 2, with its questions."""
    data = root / "dataset"
    for split, texts in (("train", "train"), ("valid", "validation")):
        names = [f"{split}_1_a_1.nii.gz", f"{split}_1_a_2.nii.gz", f"{split}_2_b_1.nii.gz"]
        for seed, name in enumerate(names):
            folder = data / f"{split}_fixed" / "_".join(name.split("_")[:2]) / name.rpartition("_")[0]
            folder.mkdir(parents=True, exist_ok=True)
            write_phantom(folder / name, seed=seed, shape=(12, 48, 48))
        columns = ["VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN"]
        reports = [
            [names[0], "Cough.", "CT.", "There is a nodule\nof 5 mm.", "Nodule."],
            [names[1], "", "Not given.", "There is a nodule of 5 mm.", "Not given."],
            [names[2], "", "", "", "Emphysema, pleural effusion."],
            [f"{split}_9_a_1.nii.gz", "", "", "Of a head.", "Normal."],
        ]
        write_csv(data / "radiology_text_reports" / f"{texts}_reports.csv", columns, *reports)
        labels = [[name, *[int(i == seed) for i in range(18)]] for seed, name in enumerate(names)]
        columns = ["VolumeName", *ABNORMALITIES]
        write_csv(data / "multi_abnormality_labels" / f"{split}_predicted_labels.csv", columns, *labels)
        columns = ["VolumeName", "XYSpacing", "RescaleIntercept", "RescaleSlope", "ZSpacing"]
        metadata = [[name, "[0.7, 0.7]", -1024, 1, 1.5] for name in names]
        write_csv(data / "metadata" / f"{texts}_metadata.csv", columns, *metadata)
        (data / "metadata" / f"no_chest_{split}.txt").write_text(f"{split}_9_a_1.nii.gz\n", encoding="utf-8")
        turns = [
            ("human", "<image>\nWrite a report.<report_generation>", "report_generation"),
            ("gpt", "Findings: A nodule. Impression: Nodule.", None),
            ("human", "Which organ? (a) Lung (b) Liver (c) Heart (d) Spleen<multiple_choice>", "multiple_choice"),
            ("gpt", "(a) Lung", None),
            ("human", "How large is it?<short_answer>", "free_response"),
            ("gpt", "5 mm.", None),
        ]
        talk = [{"from": who, "value": said, **({"type": kind} if kind else {})} for who, said, kind in turns]
        entries = [
            {"id": "0", "image": names[0], "conversations": talk[:2]},
            {"id": "1", "image": names[2], "conversations": talk},
            {"id": "2", "conversations": talk[:2]},
        ]
        write_json(data / "vqa" / f"{split}_vqa.json", entries)
    return root


def write_version_1(root: Path, name: str, hu: np.ndarray, spacing, intercept: float = -1024.0) -> Path:
    """`hu` (z, y, x) in LPS as version 1 stores it: the scanner's numbers, and a header that says nothing."""
    parts = name.removesuffix(".nii.gz").split("_")
    folder = root / "dataset" / "valid" / "_".join(parts[:2]) / "_".join(parts[:3])
    folder.mkdir(parents=True, exist_ok=True)
    raw = (hu.transpose(2, 1, 0).astype(np.float64) - intercept).astype(np.float32)
    nib.save(nib.Nifti1Image(raw, np.eye(4)), folder / name)
    z, y, x = spacing
    columns = ["VolumeName", "RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing"]
    row = [name, 1, intercept, f"[{x}, {y}]", z]
    write_csv(root / "dataset" / "metadata" / "validation_metadata.csv", columns, row)
    return folder / name


def write_radgenome(root: Path) -> Path:
    """RadGenome-ChestCT with scans of its own preprocessing."""
    files, templates = root / "dataset" / "radgenome_files", root / "dataset" / "qa_templates"
    for split, texts in (("train", "train"), ("valid", "validation")):
        name = f"{split}_10017_a_1.nii.gz"
        folder = root / "dataset" / f"{split}_preprocessed" / f"{split}_10017" / f"{split}_10017a"
        folder.mkdir(parents=True)
        write_phantom(folder / name, shape=(12, 48, 48))
        lobe = "lung/lung/right lung/right lung upper lobe"
        write_csv(
            files / f"{texts}_vqa_abnormality.csv", ["Volumename", "Anatomy", "Abnormality"], [name, lobe, "mass"]
        )
        write_csv(files / f"{texts}_vqa_location.csv", ["Volumename", "Anatomy", "Abnormality"], [name, lobe, "mass"])
        columns = ["Volumename", "Anatomy", "Finding", "Presence"]
        write_csv(files / f"{texts}_vqa_presence.csv", columns, [name, lobe, "mass", "Yes."])
        columns = ["Volumename", "Anatomy", "Abnormality", "Size"]
        write_csv(files / f"{texts}_vqa_size.csv", columns, [name, lobe, "mass", "6x4 mm"])
        write_csv(files / f"{texts}_case_disorders.csv", ["Volumename", "Disorders"], [name, "cancer, emphysema"])
    wordings = {
        "abnormality": ["What is seen in the {region}?"],
        "location": ["Where is the {abnormality}?", "In which region is the {abnormality}?"],
        "presence": ["Is there a {abnormality} in the {region}?"],
        "size": ["How large is the {abnormality} in the {region}?"],
        "disorders": ["Which disorders does the patient have?"],
    }
    for part, texts in wordings.items():
        write_json(templates / f"{part}_template.json", {part: texts})
    return root


def write_3d_rad(root: Path) -> Path:
    """3D-RAD; its scans are those of `write_ct_rate`."""
    columns = ["Task", "Subtask", "VolumeName", "Question", "Answer", "QuestionType", "AnswerChoice", *OPTIONS]
    none = ["-"] * 4
    for split, name in (("train", "train_1_a_1.nii.gz"), ("test", "test_1_a_1.nii.gz")):
        folder = root / "3DRAD" / split
        size = ["Medical Computation", "Size", name, "What is its size?", "Less than 5 mm.", "Open", "-", *none]
        write_csv(folder / "Task3_Medical_Computation" / "Size.csv", columns, size)
        nodule = [
            "Existence Detection",
            "Lung nodule",
            name,
            "Is there one?",
            "Yes",
            "Close",
            "A",
            "Yes",
            "No",
            "-",
            "-",
        ]
        write_csv(folder / "Task4_Existence_Detection" / "Lung nodule.csv", columns, nodule)
    return write_ct_rate(root)


def write_own(root: Path) -> Path:
    """A JSONL file for training, and one for testing beside it."""
    root.mkdir(parents=True, exist_ok=True)
    write_phantom(root / "scan.nii.gz", shape=(12, 48, 48))
    rows = [
        {"images": ["scan.nii.gz"], "prompt": "Any stones?", "completion": "No.", "patient": "p1", "id": "a"},
        {
            "images": "scan.nii.gz",
            "prompt": "Which side? Choices: A. left B. right",
            "completion": "B. right",
            "choices": ["left", "right"],
            "answer": "right",
            "kind": "side",
        },
    ]
    for split in ("test", "train"):
        file = root / f"{split}.jsonl"
        own = [{**row, "id": f"{split}-{i}"} if split == "test" else row for i, row in enumerate(rows)]
        file.write_text("".join(json.dumps(row) + "\n" for row in own), encoding="utf-8")
    return file


WRITERS = {
    "m3d-cap": write_m3d,
    "m3d-vqa": write_m3d,
    "ct-rate": write_ct_rate,
    "ct-rate-vqa": write_ct_rate,
    "radgenome": write_radgenome,
    "3d-rad": write_3d_rad,
    "own": write_own,
}


def stored_values(path: Path) -> np.ndarray:
    """Numbers of a NIfTI file before any rescaling."""
    return np.asanyarray(nib.load(path).dataobj.get_unscaled())
