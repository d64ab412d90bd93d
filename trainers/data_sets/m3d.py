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
"""M3D-Cap and M3D-VQA (arXiv 2404.00578), as they are published: JSON and CSV that name .npy arrays.

```
ROOT/M3D_Cap/M3D_Cap.json        {"train": [{"image": "M3D_Cap_npy/ct_case/000012/X.npy", "text": "..."}], ...}
ROOT/M3D_Cap_npy/...             arrays (1, 32, 256, 256) in [0, 1], beside the reports
ROOT/M3D-VQA/M3D_VQA_train.csv   Image Path, Text, Question Type, Question, Choice A ... D, Answer, Answer Choice
```

The arrays never were HU: the model needs an image processor with `intensity="display"`. Splits were drawn by series
and not by patient, so that series of one case lie in train and in test (BAAI-DCAI/M3D, issue 38): numbers on its test
splits are for comparison with others' alone.
"""

import json
from collections.abc import Iterator
from functools import lru_cache
from os.path import isfile  # False, not an error, for a name that no file can have
from pathlib import Path

from ct_moe import DataError

from .files import read_csv
from .item import BadRow, Item, closed_item, pick


CAP_SPLITS = ("train", "validation", "test", "test100", "test500", "test1k")
VQA_SPLITS = {"train": "train", "validation": "val", "test": "test", "test5k": "test5k"}  # names in files
KINDS = {"1": "plane", "2": "phase", "3": "organ", "4": "abnormality", "5": "location"}
_CAP_PROMPTS = (
    "Describe the findings of this scan.",
    "Write down what this scan shows.",
    "What are the findings in this scan?",
    "Report the findings of this medical image.",
)
_VQA_COLUMNS = (
    "Image Path",
    "Question Type",
    "Question",
    "Choice A",
    "Choice B",
    "Choice C",
    "Choice D",
    "Answer",
    "Answer Choice",
)


def read_cap(root: Path, split: str) -> Iterator[Item | BadRow]:
    """Captions of one split: the report of the case for every one of its series."""
    file = _first(root, "M3D_Cap/M3D_Cap.json", "M3D_Cap_npy/M3D_Cap.json", "M3D_Cap.json")
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))[split]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(str(file), f"cannot be read ({type(error).__name__})", "Download it again") from error
    except KeyError:
        raise DataError(str(file), f"has no split {split}", f"Use one of {', '.join(CAP_SPLITS)}") from None
    if not isinstance(entries, list):
        raise DataError(str(file), f"holds no list of {split}", "Download it again")
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or not all(_is_text(entry.get(name)) for name in ("image", "text")):
            yield BadRow(str(file), number, "no image or no text")
            continue
        try:
            report = (root / entry["text"]).read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:  # of UTF-8 or of the path
            yield BadRow(str(file), number, f"its text cannot be read ({type(error).__name__})")
            continue
        if not report:
            yield BadRow(str(file), number, "its text is empty")
            continue
        yield Item(
            id=f"m3d-cap-{split}-{number}",
            images=[_image(root, entry["image"])],
            prompt=pick(_CAP_PROMPTS, entry["image"]),
            completion=report,
            task="report",
            kind="caption",
            patient=_case(entry["image"]),
            where=(str(file), number),
        )


def read_vqa(root: Path, split: str) -> Iterator[Item | BadRow]:
    """Every row twice, as M3D trains and tests it: closed with its four choices, and open with the choice's text.

    A choice "NA" is none and is not shown; M3D's own loader prints it as "nan".
    """
    if split not in VQA_SPLITS:
        raise DataError(str(root), f"has no split {split}", f"Use one of {', '.join(VQA_SPLITS)}")
    name = f"M3D_VQA_{VQA_SPLITS[split]}.csv"
    file = _first(root, f"M3D-VQA/{name}", f"M3D_VQA/{name}", name)
    for line, row in read_csv(file, _VQA_COLUMNS):
        if isinstance(row, str):
            yield BadRow(str(file), line, row)
            continue
        kind = KINDS.get(row["Question Type"].strip())
        common = {
            "images": [_image(root, row["Image Path"])],
            "kind": kind or "",
            "patient": _case(row["Image Path"]),
            "where": (str(file), line),
        }
        question, answer = row["Question"].strip(), row["Answer"].strip()
        if kind is None or not question or not answer or not row["Image Path"].strip():
            missing = "question type" if kind is None else "image" if not row["Image Path"].strip() else "text"
            yield BadRow(str(file), line, f"no {missing}")
            continue
        choices = [None if row[f"Choice {letter}"] == "NA" else row[f"Choice {letter}"] for letter in "ABCD"]
        closed = closed_item(
            question, choices, row["Answer Choice"], answer, id=f"m3d-vqa-{split}-{line}-closed", **common
        )
        yield BadRow(str(file), line, closed) if isinstance(closed, str) else closed
        yield Item(id=f"m3d-vqa-{split}-{line}-open", prompt=question, completion=answer, task="vqa_open", **common)


@lru_cache(maxsize=1 << 17)
def _image(root: Path, name: str) -> str:
    """The array that a file names or, where only that is there, a NIfTI file of this name."""
    path, as_nifti = root / name, root / f"{name.removesuffix('.npy')}.nii.gz"
    return str(as_nifti if not isfile(path) and isfile(as_nifti) else path)


def _is_text(value) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _case(image: str) -> str:
    """ "ct_case/000012" of "M3D_Cap_npy/ct_case/000012/Axial.npy"."""
    return "/".join(Path(image).parts[-3:-1])


def _first(root: Path, *names: str) -> Path:
    for name in names:
        if isfile(root / name):
            return root / name
    raise DataError(str(root), f"has no {names[0]}", "Name the folder that holds the files as they are published")
