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
"""A document as a DICOM Basic Text SR (PS3.3 A.35.1), with the concepts of TID 2000.

It is unverified, partial and preliminary; the observer is a device; patient and study are new and empty: it belongs to
no one until a person files it.
"""

import io
from datetime import datetime
from typing import Any

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import BasicTextSRStorage, ExplicitVRLittleEndian, generate_uid

import ct_moe

from ..cli import printable


MANUFACTURER = "CT-MoE"


def as_structured_report(document: dict[str, Any]) -> bytes:
    """A DICOM file.

    Args:
        document: from `make_document`.
    """
    created, model = datetime.fromisoformat(document["created"]), document["model"]
    date, time = created.strftime("%Y%m%d"), created.strftime("%H%M%S")
    report = Dataset()
    report.SpecificCharacterSet = "ISO_IR 192"
    report.SOPClassUID = BasicTextSRStorage
    for name in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
        setattr(report, name, generate_uid(prefix=None))
    report.InstanceCreationDate = report.StudyDate = report.ContentDate = date
    report.InstanceCreationTime = report.StudyTime = report.ContentTime = time
    report.TimezoneOffsetFromUTC = "+0000"
    report.Modality = "SR"
    report.SeriesDescription = _short(document["title"])
    report.Manufacturer = MANUFACTURER
    report.ManufacturerModelName = _short(model["name"])
    report.DeviceSerialNumber = _short(model["revision"] or "none")
    report.SoftwareVersions = ct_moe.__version__
    report.PatientName = ""
    report.PatientID = f"CT-MOE-{document['id'][:8].upper()}"  # an archive wants one: of this document, of no person
    report.PatientIdentityRemoved = "YES"
    report.DeidentificationMethod = "Nothing of the patient was read"
    for name in ("PatientBirthDate", "PatientSex", "StudyID", "AccessionNumber", "ReferringPhysicianName"):
        setattr(report, name, "")
    report.SeriesNumber = report.InstanceNumber = 1
    report.ReferencedPerformedProcedureStepSequence = []
    report.PerformedProcedureCodeSequence = []
    report.CompletionFlag = "PARTIAL"
    report.CompletionFlagDescription = "Machine-made, not a medical device"
    report.VerificationFlag = "UNVERIFIED"
    report.PreliminaryFlag = "PRELIMINARY"

    report.ValueType = "CONTAINER"
    report.ContinuityOfContent = "SEPARATE"
    report.ConceptNameCodeSequence = [_code("18747-6", "LN", "CT Report")]
    report.ContentSequence = [
        *_observer(model),
        _text("CONTAINS", "121106", "Comment", document["notice"]),
        _text("CONTAINS", "121106", "Comment", f"The model was trained for: {document['scope']}"),
        _text("CONTAINS", "121106", "Comment", document["status"]),
        *_sections(document),
    ]
    report.file_meta = FileMetaDataset()
    report.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = io.BytesIO()
    report.save_as(file, enforce_file_format=True)
    return file.getvalue()


def _observer(model: dict[str, Any]) -> list[Dataset]:
    language = _item("HAS CONCEPT MOD", "CODE", "121049", "Language of Content Item and Descendants")
    language.ConceptCodeSequence = [_code("en", "RFC5646", "English")]
    kind = _item("HAS OBS CONTEXT", "CODE", "121005", "Observer Type")
    kind.ConceptCodeSequence = [_code("121007", "DCM", "Device")]
    uid = _item("HAS OBS CONTEXT", "UIDREF", "121012", "Device Observer UID")
    uid.UID = generate_uid(prefix=None)
    return [
        language,
        kind,
        uid,
        _text("HAS OBS CONTEXT", "121013", "Device Observer Name", model["software"]),
        _text("HAS OBS CONTEXT", "121014", "Device Observer Manufacturer", MANUFACTURER),
        _text("HAS OBS CONTEXT", "121015", "Device Observer Model Name", model["name"]),
        _text("HAS OBS CONTEXT", "121016", "Device Observer Serial Number", model["revision"] or "none"),
    ]


def _sections(document: dict[str, Any]) -> list[Dataset]:
    sections, report = [], document["report"] or {}
    for name, heading, concept in (
        ("findings", ("121070", "Findings"), ("121071", "Finding")),
        ("impression", ("121072", "Impressions"), ("121073", "Impression")),
    ):
        if report.get(name):
            sections.append(_section(heading, [_text("CONTAINS", *concept, report[name])]))
    if document["answers"]:
        texts = [f"Question: {answer['question']}\nAnswer: {answer['answer']}" for answer in document["answers"]]
        sections.append(
            _section(("121078", "Addendum"), [_text("CONTAINS", "121106", "Comment", text) for text in texts])
        )
    return sections


def _section(heading: tuple[str, str], content: list[Dataset]) -> Dataset:
    item = _item("CONTAINS", "CONTAINER", *heading)
    item.ContinuityOfContent = "SEPARATE"
    item.ContentSequence = content
    return item


def _text(relationship: str, code: str, meaning: str, text: str) -> Dataset:
    item = _item(relationship, "TEXT", code, meaning)
    item.TextValue = printable(text)
    return item


def _item(relationship: str, value_type: str, code: str, meaning: str) -> Dataset:
    item = Dataset()
    item.RelationshipType = relationship
    item.ValueType = value_type
    item.ConceptNameCodeSequence = [_code(code, "DCM", meaning)]
    return item


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, scheme, meaning
    return code


def _short(text: str) -> str:
    """What a long string (LO) of DICOM may hold: 64 characters, no backslash."""
    return text.replace("\\", "/")[:64]
