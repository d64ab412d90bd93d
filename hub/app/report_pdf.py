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
"""A document as a PDF. The notice stands on every page."""

import io
from functools import partial
from typing import Any
from xml.sax.saxutils import escape

from reportlab.lib import colors
from reportlab.lib.enums import TA_CENTER
from reportlab.lib.pagesizes import A4
from reportlab.lib.styles import ParagraphStyle, getSampleStyleSheet
from reportlab.lib.units import mm
from reportlab.platypus import Image, Paragraph, SimpleDocTemplate, Spacer, Table
from reportlab.platypus.flowables import KeepTogether

from ..cli import printable


AMBER = colors.HexColor("#ffd25a")


def as_pdf(document: dict[str, Any], picture: bytes) -> bytes:
    """A4 pages with text that can be copied.

    Args:
        document: from `make_document`.
        picture: a JPEG or PNG of slices, its mark burned in.
    """
    styles = getSampleStyleSheet()
    notice = ParagraphStyle("notice", styles["BodyText"], backColor=AMBER, borderPadding=6, alignment=TA_CENTER)
    small = ParagraphStyle("small", styles["BodyText"], fontSize=8, leading=10)
    story = [
        Paragraph(_words(document["title"]), styles["Title"]),
        Paragraph(f"<b>{_words(document['notice'])}</b><br/>{_words(document['status'])}", notice),
        Spacer(0, 5 * mm),
        Paragraph(f"<b>The model was trained for: {_words(document['scope'])}</b>", styles["BodyText"]),
    ]
    report = document["report"] or {}
    for name in ("findings", "impression"):
        if report.get(name):
            story.append(Paragraph(name.capitalize(), styles["Heading2"]))
            story += [Paragraph(_words(line), styles["BodyText"]) for line in report[name].splitlines()]
    if document["answers"]:
        story.append(Paragraph("Questions and answers", styles["Heading2"]))
    for answer in document["answers"]:
        asked = Paragraph(f"<b>{_words(answer['question'])}</b>", styles["BodyText"])
        story.append(KeepTogether([asked, Paragraph(_words(answer["answer"]), styles["BodyText"])]))
    sheet = Image(io.BytesIO(picture))
    sheet._restrictSize(150 * mm, 112 * mm)
    facts = [[Paragraph(_words(text), small) for text in row] for row in _facts(document)]
    story += [
        KeepTogether([Paragraph("What the model saw", styles["Heading2"]), sheet]),
        Paragraph("Where it comes from", styles["Heading2"]),
        Table(facts, colWidths=[35 * mm, 130 * mm], style=[("VALIGN", (0, 0), (-1, -1), "TOP")]),
    ]
    file = io.BytesIO()
    pages = SimpleDocTemplate(
        file,
        pagesize=A4,
        title=document["title"],
        author=document["model"]["software"],
        topMargin=15 * mm,
        bottomMargin=22 * mm,
    )
    footer = partial(_footer, notice=document["notice"], scope=document["scope"])
    pages.build(story, onFirstPage=footer, onLaterPages=footer)
    return file.getvalue()


def _facts(document: dict[str, Any]) -> list[tuple[str, str]]:
    model, scan = document["model"], document["scan"]
    slab = "" if scan["slab_mm"] is None else f" of {scan['slab_mm']:.1f} mm: anything smaller can be hidden"
    revision = f", revision {model['revision']}" if model["revision"] else ""
    return [
        ("Slices", f"{scan['num_slices']}{slab}"),
        ("Windows", "; ".join(dict.fromkeys(scan["processing"]["channels"]))),
        ("Model", f"{model['name']}{revision}, {model['software']}"),
        ("Scan", "; ".join(scan["warnings"]) or "nothing odd was found about the file"),
        ("Made", document["created"]),
        ("Number", document["id"]),
    ]


def _footer(canvas, pages, notice: str, scope: str) -> None:
    canvas.saveState()
    canvas.setFont("Helvetica", 7)
    for line, text in enumerate((notice, f"Trained for: {scope}", f"Page {pages.page}")):
        canvas.drawCentredString(A4[0] / 2, 14 * mm - line * 9, text[:150])
    canvas.restoreState()


def _words(text: str) -> str:
    """For the fonts that every reader of PDF has: what is not in them is shown as a question mark."""
    return escape(printable(text).encode("cp1252", "replace").decode("cp1252"))
