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
"""What of a folder may be published, and why something may not: patients, pickles, this machine, invented numbers.

- `publishable_files`: what a folder holds, by names, links and first bytes.
- `check_contents`: code, headers of weights, texts and the card.

Each raises a `PublishError` that names the first finding, and never quotes what was found: it may be a patient's name.
A list of what is known is safer than one of what is bad, so a file that no model folder has is refused too.
"""

import getpass
import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import ModelCard
from PIL import Image

import ct_moe
from ct_moe.errors_ct_moe import PublishError

from .card import read_facts, read_header
from .card_metadata import check_metadata
from .measurements import numbers, read_results
from .unconversion import BASE_FILES


MAX_BYTES = 5 * 10**9 + 10**8  # a shard, and some room for its header
_KNOWN = re.compile(
    rf"base/((language_model|vision_tower)/)?({BASE_FILES}) | base/(tensors\.json|unread\.safetensors) | "
    r"""
    README\.md | LICENSE(\.\w+)? | NOTICE(\.\w+)? | \.gitattributes | card\.yaml | manifest\.json | \w+_ct_moe\.py
    | (generation_|processor_|preprocessor_)?config\.json | chat_template\.(jinja|json)
    | tokenizer(_config)?\.json | tokenizer\.model | special_tokens_map\.json | added_tokens\.json
    | vocab\.(json|txt) | merges\.txt
    | model(-\d{5}-of-\d{5})?\.safetensors | model\.safetensors\.index\.json
    | (adapter/)?adapter_config\.json | (adapter/)?adapter_model\.safetensors
    | training_report(_\w+)?\.json | conversion_report\.json | results[\w.-]*\.json | \.eval_results/[\w.-]+\.yaml
    | (routing|results[\w-]*)\.png
    """,
    re.VERBOSE,
)
_UNSAFE = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill"}
_SCANS = {
    ".dcm", ".dicom", ".ima", ".nii", ".hdr", ".img", ".nrrd", ".nhdr", ".mha", ".mhd", ".raw", ".zraw", ".npy", ".npz"
}  # fmt: skip
_PICKLE = "holds pickled objects, which run code when they are loaded"
_SCAN = "is or may be a scan of a patient"
# Of a tokenizer the vocabulary is no text about anything.
_VOCABULARY = {"vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "special_tokens_map.json"}
_MACHINE_PATHS = (
    r"(?<![\w/.:~-])(?:file://)?/(?:home|root|Users|tmp|var|mnt|media|scratch|data\d*|opt|srv|work|workspace|private"
    r"|gpfs|lustre|beegfs|nfs|net|projects?|proj|storage|cluster|dev/shm|content|kaggle)/[^\s\"'`<>)]+",
    r"\b[A-Za-z]:\\[\w ]",
    r"(?<![\w/])\\\\[\w.-]+\\[\w$]",
    r"\bfile://",
)
_PATIENT = (
    (r"(?i)\bpatient'?s?[ _]?(?:name|id|number|birth[ _]?date|address|age|sex)\b['\"]?\s*[:=]\s*\S", "patient data"),
    (r"\b0010\s?,\s?00[1-4]0\b", "a DICOM tag of a patient"),
    (r"(?i)\b(?:mrn|medical record (?:number|no\.?))\b\W{0,3}\d", "a medical record number"),
    (r"(?i)\b(?:dob|date of birth|born(?: on)?)\b\W{0,3}\d{1,4}[./-]\d{1,2}", "a date of birth"),
    (r"(?i)\baccession ?(?:number|no\.?)\b\W{0,3}\w*\d", "an accession number"),
    (r"\b[A-Z][A-Za-z'-]+\^[A-Z][A-Za-z'-]*", "a name as DICOM writes it"),
    (r"(?<![\w.])[0-2](?:\.(?:0|[1-9]\d*)){6,}(?![\w.])", "a DICOM identifier"),
)
_SECRET = r"\bhf_[A-Za-z0-9]{30,}\b"
_COMMON_NAMES = {"root", "user", "admin", "home", "localhost", "ubuntu", "debian", "runner", "build", "test", "docker"}
_PERCENT = r"(?<![\w.])(\d+(?:\.\d+)?)\s?%(?!\s(?:bootstrap |confidence )?(?:intervals?|CI)\b)"
_SCORE = (
    r"(?i)\b(?:accuracy|f1|auc|auroc|bleu(?:-\d)?|rouge(?:-[\dl])?|cider|meteor|dice|sensitivity|specificity|precision"
    r"|recall)\b[^\d|\n.]{0,30}?(\d+\.\d+)"
)
_RESULTS_HEADING = re.compile(r"(?i)^#+ .*\b(?:results?|evaluation|performance|benchmarks?|scores?|metrics?)\b")


class Finding(NamedTuple):
    """Why a file must not be published, and what to do."""

    file: str
    finding: str
    remedy: str


def publishable_files(folder: str | Path) -> dict[str, Path]:
    """What a folder holds, by names, links and first bytes.

    Args:
        folder: a model folder, or one that holds an adapter only.

    Returns:
        Path in the repository -> file, links resolved, by name.

    Raises:
        PublishError: the first file that must not be published, and how many others there are.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PublishError(folder, "no such folder", "Name a model folder")
    files, findings = {}, []
    for name, path in _walk(folder):
        resolved = _resolved(folder, name, path)
        found = resolved if isinstance(resolved, Finding) else _look_at(name, resolved)
        if found is None:
            files[name] = resolved
        else:
            findings.append(found)
    if not findings and "config.json" not in files and "adapter_config.json" not in files:
        findings.append(Finding(str(folder), "holds no model and no adapter", "Name a model folder"))
    _raise(findings)
    return files


def check_contents(folder: str | Path, *, repo_id: str = "") -> None:
    """Read code, headers of weights, texts and the card of what is about to be uploaded.

    Args:
        folder: that holds exactly this.
        repo_id: where it goes; its owner's name is no secret then.

    Raises:
        PublishError: the first thing in it that must not be published, and how many others there are.
    """
    folder = Path(folder)
    files = {name: path for name, path in _walk(folder) if path.is_file()}
    findings = [finding for name, path in files.items() for finding in _look_into(name, path, repo_id)]
    _raise([*findings, *_look_at_card(folder, files)])


def _raise(findings: list[Finding]) -> None:
    if findings:
        first, others = findings[0], sorted({finding.file for finding in findings[1:]})
        more = f" ({len(findings) - 1} more in {', '.join(others[:5])})" if others else ""
        raise PublishError(first.file, f"{first.finding}{more}", first.remedy)


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    for here, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted([*names, *(f for f in folders if (Path(here) / f).is_symlink())]):
            path = Path(here) / name
            yield path.relative_to(folder).as_posix(), path


def _resolved(folder: Path, name: str, path: Path) -> Path | Finding:
    """A file, or what a link points to: inside of the folder, or this package's own code."""
    if not path.is_symlink():
        return path if path.is_file() else Finding(name, "is no plain file", "Remove it")
    target, code = path.resolve(), Path(ct_moe.__file__).resolve().parent
    if target.is_file() and (target.is_relative_to(folder.resolve()) or target.parent == code):
        return target
    return Finding(name, "is a link to something outside of the folder", "Put the file itself there, or remove it")


def _look_at(name: str, path: Path) -> Finding | None:
    """By content first, since a name says what it likes; then by name."""
    with path.open("rb") as content:
        head = content.read(512)
    size, base = path.stat().st_size, name.rpartition("/")[2].lower()
    suffixes = {f".{part}" for part in base.split(".")[1:]}
    is_dicom = head[128:132] == b"DICM" or (head[:2] in (b"\x08\0", b"\2\0") and re.match(rb"[A-Z]{2}", head[4:6]))
    is_nifti = head[344:348] in (b"n+1\0", b"ni1\0") or head[4:8] in (b"n+2\0", b"ni2\0")
    is_volume = head.startswith((b"NRRD", b"\x93NUMPY", b"ObjectType"))
    if is_dicom or is_nifti or is_volume or suffixes & _SCANS:
        return Finding(name, _SCAN, "Remove it: no scan is ever published")
    if suffixes & _UNSAFE or (head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5" and len(head) > 1):
        return Finding(name, _PICKLE, "Remove it: weights are published as safetensors only")
    if head.startswith((b"PK\3\4", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x89HDF")):
        return Finding(name, "is an archive, which may hold pickles or scans", "Remove it")
    if not _KNOWN.fullmatch(name):
        return Finding(name, "is no file of a model folder", "Remove it, or move it elsewhere")
    if size > MAX_BYTES:
        return Finding(name, f"has {size:,} bytes, over 5 GB", "Save the model again: ct_moe.hub.folder.save_folder")
    if name.endswith(".png") and not _is_plain_png(path):
        return Finding(name, "is no PNG without words in its header", "Draw it again: ct-moe card DIR --picture")
    return None


def _is_plain_png(path: Path) -> bool:
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            picture.load()
            return not set(picture.info) - {"Software", "dpi"}  # as matplotlib writes them
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def _look_into(name: str, path: Path, repo_id: str) -> Iterator[Finding]:
    """Code, weights' headers and texts."""
    if name.endswith("_ct_moe.py"):
        own = Path(ct_moe.__file__).parent / name
        if not own.is_file() or own.read_bytes() != path.read_bytes():
            remedy = "Use this package's file, or publish with the version that wrote the folder"
            yield Finding(name, f"is not the code of ct-moe {ct_moe.__version__}", remedy)
        return
    if name.endswith((".png", ".model")):
        return
    try:
        if name.endswith(".safetensors"):
            content = read_header(path).get("__metadata__", {})
        else:
            text = path.read_text(encoding="utf-8")
            content = json.loads(text) if name.endswith(".json") else text
    except (PublishError, OSError, ValueError) as error:
        finding = error.finding if isinstance(error, PublishError) else f"cannot be read ({type(error).__name__})"
        yield Finding(name, finding, "Write it again, or remove it")
        return
    if Path(name).name == "tokenizer.json" and isinstance(content, dict):
        content = {key: value for key, value in content.items() if key not in ("model", "added_tokens")}
    if name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        yield from _foreign_code(name, content)
    if (
        name.startswith("results")
        and isinstance(content, dict)
        and (content.get("unanswered") or content.get("bad_rows"))
    ):
        yield Finding(name, "names rows of the data set", "Let `ct-moe card DIR --from FILE` copy it without them")
    for place, words in _lines(content):
        if Path(name).name not in _VOCABULARY:
            yield from (Finding(name, f"{finding} {place}", remedy) for finding, remedy in _words(words, repo_id))


def _foreign_code(name: str, content: Any) -> Iterator[Finding]:
    for place, words in _lines(content):
        if "auto_map" in place and "--" in words:
            yield Finding(name, "takes its code from another repository", "Save the folder again with this package")


def _lines(content: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """(where, text): lines of a text, entries of JSON as `key: value`."""
    if isinstance(content, str) and not place:
        yield from ((f"in line {number}", line) for number, line in enumerate(content.splitlines(), 1))
    elif isinstance(content, dict):
        for key, value in content.items():
            inner = f"{place}.{key}" if place else f"in {key}"
            if isinstance(value, dict | list):
                yield inner, str(key)
                yield from _lines(value, inner)
            else:
                yield inner, f"{key}: {value}"
    elif isinstance(content, list):
        for value in content:
            yield from _lines(value, place or "in a list")
    else:
        yield place, str(content)


def _words(words: str, repo_id: str) -> Iterator[tuple[str, str]]:
    if repo_id:
        words = words.replace(repo_id, "")
    if any(re.search(pattern, words) for pattern in _MACHINE_PATHS):
        yield "names a path of this machine", "Write a relative one, or remove it"
    elif any(re.search(rf"(?<![\w-]){re.escape(own)}(?![\w-])", words) for own in _own_names()):
        yield "names the user, the home folder or the host of this machine", "Remove it"
    for pattern, what in _PATIENT:
        if re.search(pattern, words):
            yield f"holds what looks like {what}", "Remove it: nothing about a patient is ever published"
            break
    if re.search(_SECRET, words):
        yield "holds what looks like an access token", "Remove it, and revoke the token"


def _own_names() -> list[str]:
    names = {str(Path.home()), socket.gethostname()}
    try:
        names.add(getpass.getuser())
    except (OSError, KeyError):  # a user without a name, as in some containers
        pass
    return sorted(name for name in names if len(name) > 3 and name.lower() not in _COMMON_NAMES)


def _look_at_card(folder: Path, files: dict[str, Path]) -> Iterator[Finding]:
    """Metadata that validates, and no number that no results file holds."""
    try:
        if "card.yaml" in files:
            read_facts(folder)
        results = read_results(folder)
    except (PublishError, TypeError, KeyError) as error:
        yield _as_finding(error, "results or card.yaml")
        return
    measured = [entry for result in results for entry in _entries(result.model_index("any"))]
    for name in files:
        if name.startswith(".eval_results/"):
            entries = yaml.safe_load(files[name].read_text(encoding="utf-8"))
            entries = entries if isinstance(entries, list) else [None]
            known = {(data, value) for data, _, _, value in measured}
            for entry in entries:
                if (
                    not isinstance(entry, dict)
                    or (entry.get("dataset", {}).get("id"), entry.get("value")) not in known
                ):
                    yield Finding(name, "holds a number that no results file has", "Measure it: ct-moe evaluate")
                    break
    if "README.md" not in files:
        return
    try:
        card = ModelCard(files["README.md"].read_text(encoding="utf-8"), ignore_metadata_errors=True)
        data = card.data.to_dict()
        check_metadata(data)
    except (PublishError, ValueError, TypeError) as error:
        yield _as_finding(error, "README.md")
        return
    if any(entry not in measured for entry in _entries(data.get("model-index", []))):
        finding = "has a result in its model-index that no results file has"
        yield Finding("README.md", finding, "Measure it, then: ct-moe card DIR --write")
    for line in _unmeasured_lines(card.text, numbers(results)):
        finding = f"states a result in line {line} of its text that no results file has"
        yield Finding("README.md", finding, "Measure it: ct-moe evaluate, or leave it out")
        break


def _as_finding(error: Exception, file: str) -> Finding:
    if isinstance(error, PublishError):
        return Finding(error.subject, error.finding, error.remedy)
    return Finding(file, f"cannot be read ({type(error).__name__})", "Write it again: ct-moe card DIR --write")


def _entries(model_index: list[dict[str, Any]]) -> list[tuple]:
    """What a model-index states: (data set, split, metric, value)."""
    return [
        (
            result["dataset"]["type"],
            result["dataset"].get("split"),
            metric.get("name", metric["type"]),
            metric["value"],
        )
        for model in model_index
        for result in model["results"]
        for metric in result["metrics"]
    ]


def _unmeasured_lines(text: str, known: list[float]) -> Iterator[int]:
    """Numbers of lines that state a percentage, a score, or a number in a table of results that nobody measured."""
    in_code, in_results = False, False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            in_code = not in_code
        if in_code:
            continue
        if line.startswith("#"):
            # A heading inside of a results section belongs to it.
            deeper = in_results and line.startswith("###")
            in_results = deeper or bool(_RESULTS_HEADING.match(line))
        said = re.findall(_PERCENT, line) + re.findall(_SCORE, line)
        if in_results and line.lstrip().startswith("|"):
            said += re.findall(r"(?<![\w.-])\d+(?:\.\d+)?(?![\w.]|\s?%)", line)
        if not all(_is_measured(words, known) for words in said):
            yield number


def _is_measured(words: str, known: list[float]) -> bool:
    digits = len(words.partition(".")[2])
    # Half a unit of the last digit for rounding, a whole one for those who cut.
    return any(abs(abs(value) - float(words)) < 10**-digits for value in known)
