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
import io
import json

import pydicom
import pytest
from pypdf import PdfReader

from ct_moe.hub.app.documents import as_json, make_document
from ct_moe.hub.app.report_pdf import as_pdf
from ct_moe.hub.app.slices import contact_sheet
from ct_moe.hub.app.structured_report import as_structured_report


HOSTILE = "<b>Größe</b> ${x} {{y}} \\ & 漢字 <script>alert(1)</script>\nImpression\x00"


@pytest.fixture(scope="module")
def document(read_scan):
    return make_document(read_scan)


def sr(document):
    return pydicom.dcmread(io.BytesIO(as_structured_report(document)))


def texts(item) -> list[tuple[str, str]]:
    """Concept and text of every item below, in order."""
    found = []
    for child in item.ContentSequence:
        if child.ValueType == "TEXT":
            found.append((child.ConceptNameCodeSequence[0].CodeMeaning, child.TextValue))
        if "ContentSequence" in child:
            found += texts(child)
    return found


def pdf_text(content: bytes) -> str:
    return " ".join(" ".join(page.extract_text() for page in PdfReader(io.BytesIO(content)).pages).split())


def test_json_holds_all_that_was_said_and_where_it_comes_from(document, read_scan, reader):
    read = json.loads(as_json(document))
    assert read == json.loads(json.dumps(document))
    assert read["report"]["findings"] == read_scan.report["findings"]
    assert read["answers"][0]["question"] == "Is there a pleural effusion?"
    assert read["answers"][0]["answer"] == read_scan.answers[0]["answer"]
    assert read["scope"] == read["model"]["scope"] == reader.scope
    assert "phantoms" in read["scope"]
    assert "not a medical device" in read["notice"]
    assert read["model"]["name"] == "demo_model"  # and not the path on the server
    assert "/" not in as_json({**document, "report": None, "answers": [], "scan": None}).decode()


def test_the_structured_report_is_unverified_partial_and_by_a_device(document, read_scan, reader):
    report = sr(document)
    assert report.SOPClassUID == pydicom.uid.BasicTextSRStorage
    assert (report.CompletionFlag, report.VerificationFlag, report.PreliminaryFlag) == (
        "PARTIAL",
        "UNVERIFIED",
        "PRELIMINARY",
    )
    assert "VerifyingObserverSequence" not in report
    observer = {item.ConceptNameCodeSequence[0].CodeMeaning: item for item in report.ContentSequence}
    assert observer["Observer Type"].ConceptCodeSequence[0].CodeMeaning == "Device"
    assert observer["Device Observer Model Name"].TextValue == "demo_model"
    said = texts(report)
    assert ("Finding", read_scan.report["findings"]) in said
    assert ("Comment", f"The model was trained for: {reader.scope}") in said
    assert any("not a medical device" in text for _, text in said)
    assert any("Is there a pleural effusion?" in text for _, text in said)


def test_structured_reports_belong_to_no_patient_and_never_share_a_uid(read_scan):
    first, second = (sr(make_document(read_scan)) for _ in range(2))
    for report in (first, second):
        assert (report.PatientName, report.PatientBirthDate, report.PatientSex) == ("", "", "")
        assert report.PatientIdentityRemoved == "YES"
        assert "CurrentRequestedProcedureEvidenceSequence" not in report
    for name in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID"):
        assert first[name].value != second[name].value


def test_the_pdf_holds_text_and_the_notice_on_every_page(document, read_scan, reader):
    content = as_pdf(document, contact_sheet(read_scan, reader.image_processor))
    text = pdf_text(content)
    for part in (
        read_scan.report["findings"],
        "Is there a pleural effusion?",
        read_scan.answers[0]["answer"],
        f"The model was trained for: {reader.scope}",
        "Unverified and partial",
    ):
        assert " ".join(part.split()) in text
    pages = PdfReader(io.BytesIO(content)).pages
    assert all("not a medical device" in page.extract_text() for page in pages)
    assert sum(len(page.images) for page in pages) == 1


def test_words_of_a_model_that_look_like_code_stay_words(document, read_scan, reader):
    said = {**document["report"], "findings": HOSTILE, "impression": None, "text": HOSTILE}
    changed = {**document, "report": said}
    assert json.loads(as_json(changed))["report"]["findings"] == HOSTILE
    findings = next(text for concept, text in texts(sr(changed)) if concept == "Finding")
    assert findings == HOSTILE.replace("\x00", "\ufffd")
    text = pdf_text(as_pdf(changed, contact_sheet(read_scan, reader.image_processor)))
    assert "<b>Größe</b> ${x} {{y}} \\ & ?? <script>alert(1)</script>" in text


def test_answers_alone_make_a_document(reader, phantom_volume):
    scan = reader.open(phantom_volume)
    list(reader.ask(scan, question="Is there ascites?"))
    document = make_document(scan)
    assert document["report"] is None
    assert {concept for concept, _ in texts(sr(document))} & {"Finding", "Impression"} == set()
    assert "Is there ascites?" in pdf_text(as_pdf(document, contact_sheet(scan, reader.image_processor)))
