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
"""The page: `build_app` makes it, `launch` serves it.

What a session holds lives in memory (`sessions.py`) and ends with the page. The only file is the upload, which is
deleted as soon as it was read; what was uploaded and never read goes with Gradio's `delete_cache`, and all of it when
the server stops.
"""

import base64
import html
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr

from ct_moe import CTMoEError, PromptError
from ct_moe.pipeline_ct_moe import NOTICE, split_report

from ..cli import printable
from .answers import OpenScan, Reader
from .documents import as_json, make_document
from .report_pdf import as_pdf
from .sessions import Sessions
from .slices import contact_sheet, routing_data, routing_picture, slice_pictures
from .structured_report import as_structured_report
from .uploads import LIMITS, UploadLimits, read_upload


WAITING = 16  # questions that may wait for the model; further ones are told to come back
OPEN_SCANS = 16
OPEN_ONE = PromptError("scan", "none is open", "Drop one first; a page that was left alone for long loses its scan")
NO_REPORT = '<p class="quiet">Findings and impression appear here, word by word.</p>'
NO_ANSWERS = '<p class="quiet">Answers appear here. What does not depend on the question is not computed again.</p>'
PROGRESS = gr.Progress()  # Gradio asks for it as a default; what it shows belongs to the call
FONTS = ["system-ui", "Segoe UI", "Helvetica", "Arial", "sans-serif"]  # none that would have to be fetched


def build_app(reader: Reader, limits: UploadLimits = LIMITS, open_scans: int = OPEN_SCANS) -> gr.Blocks:
    """The page for one model.

    Args:
        reader: the model.
        limits: how large an upload may be.
        open_scans: scans that are kept open at a time, over all users.
    """
    sessions = Sessions(open_scans)
    image_processor = reader.image_processor
    scope = f'<p class="scope">Model trained for: {_escaped(reader.scope)}.</p>'  # beside every word it says

    def open_scan(path: str | None, series: str, request: gr.Request, progress=PROGRESS) -> Iterator[tuple]:
        """Ends with what the page shows of the scan, or with an empty page and the reason."""
        sessions.close(request.session_hash)  # first: a refused scan must not leave the last one on the page
        yield "", None, gr.HTML(value=None, routing=None), _report(NO_REPORT), _report(NO_ANSWERS), "", ""
        try:
            progress(0.1, desc="Reading the scan")
            load = {"intensity": image_processor.intensity, "reorient": image_processor.reorient}
            volume = read_upload(path, limits, **load, **_series(series))
            progress(0.5, desc="Preparing the slices")
            scan, pictures = reader.open(volume), slice_pictures(volume, image_processor)
        except CTMoEError as error:
            yield _problem(error), *[gr.skip()] * 6
            return
        finally:
            _delete(path)
        sessions.put(request.session_hash, scan)
        yield _opened(scan, pictures), None, gr.HTML(value=pictures, routing=None), *[gr.skip()] * 4

    def write_report(context: str, request: gr.Request) -> Iterator[tuple]:
        """Outputs: status, report, documents, routing over the slices, routing picture."""
        try:
            scan = _open(sessions, request)
            yield gr.skip(), _report('<p class="quiet">Waiting for the first word ...</p>'), *[gr.skip()] * 3
            for said in reader.ask(scan, context=context.strip() or None):
                text = said if isinstance(said, str) else said["text"]
                yield gr.skip(), _report(_report_text(text) + scope), *[gr.skip()] * 3
            picture = routing_picture(scan, image_processor, said["routing"], reader.scope)
            shown = f'<img alt="Routing picture" src="{picture}">'
            yield (
                "",
                gr.skip(),
                _documents(scan, image_processor),
                gr.HTML(routing=routing_data(said["routing"])),
                shown,
            )
        except CTMoEError as error:
            yield _problem(error), _report(NO_REPORT), *[gr.skip()] * 3

    def answer(question: str, context: str, request: gr.Request) -> Iterator[tuple]:
        """Outputs: status, question box, answers, documents, routing over the slices."""
        try:
            scan = _open(sessions, request)
            if not question.strip():
                raise PromptError("question", "is empty", "Ask something about the scan")
            before = _answers_text(scan)
            for said in reader.ask(scan, question=question.strip(), context=context.strip() or None):
                text = said if isinstance(said, str) else said["answer"]
                shown = _report(before + _answer_text(question.strip(), text) + scope)
                yield "", gr.skip(), shown, *[gr.skip()] * 2
            routing = gr.HTML(routing=routing_data(said["routing"]))
            yield "", "", _report(_answers_text(scan) + scope), _documents(scan, image_processor), routing
        except CTMoEError as error:
            yield _problem(error), *[gr.skip()] * 4

    def close(request: gr.Request) -> None:
        sessions.close(request.session_hash)

    with gr.Blocks(title="CT-MoE", fill_width=True, analytics_enabled=False, delete_cache=(600, 600)) as app:
        gr.HTML(_head(reader))
        with gr.Row():
            with gr.Column(scale=3, min_width=520):
                parts = {name: _resource(f"viewer.{name}") for name in ("html", "css", "js")}
                viewer = gr.HTML(
                    html_template=parts["html"],
                    css_template=parts["css"],
                    js_on_load=parts["js"],
                    routing=None,
                    elem_id="viewer",
                )
            with gr.Column(scale=2, min_width=380):
                upload = gr.File(
                    label=f"Scan: NIfTI or zipped DICOM, up to {limits.upload_mb} MB",
                    file_count="single",
                    height=130,
                    elem_id="upload",
                )
                status = gr.HTML(elem_id="status")
                with gr.Row():
                    context = gr.Textbox(label="Clinical context (optional)", placeholder="fever, cough", scale=3)
                    series = gr.Textbox(label="Series in the zip", placeholder="number", scale=1, min_width=150)
                report_button = gr.Button("Write report", variant="primary", elem_id="write")
                report = gr.HTML(_report(NO_REPORT), elem_id="report")
                with gr.Row():
                    question = gr.Textbox(
                        label="Question about this scan",
                        placeholder="Is there a pleural effusion?",
                        scale=4,
                        elem_id="question",
                        max_length=2000,
                    )
                    ask_button = gr.Button("Ask", scale=1, min_width=80, elem_id="ask")
                answers = gr.HTML(_report(NO_ANSWERS), elem_id="answers")
                documents = gr.HTML(elem_id="documents")
        with gr.Accordion("Routing picture: which parts of the network processed which parts of the scan", open=False):
            picture = gr.HTML(elem_id="routing", elem_classes="routing-picture")

        alone = {"api_visibility": "private", "show_progress_on": status}
        model = {"concurrency_id": "model", "concurrency_limit": 1, **alone}
        upload.upload(
            open_scan,
            [upload, series],
            [status, upload, viewer, report, answers, documents, picture],
            concurrency_limit=2,
            **alone,
        )
        report_button.click(write_report, context, [status, report, documents, viewer, picture], **model)
        asked = ([question, context], [status, question, answers, documents, viewer])
        ask_button.click(answer, *asked, **model)
        question.submit(answer, *asked, **model)
        app.unload(close)
    app.sessions = sessions
    return app.queue(max_size=WAITING, api_open=False)


def launch(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    limits: UploadLimits = LIMITS,
    ready: Callable[[str], None] | None = None,
    **load,
) -> None:
    """Serve the page until it is interrupted. It is never shared through a relay: scans are patients'.

    Args:
        model: folder or Hub id.
        host: address to listen on; by default this machine only.
        port: by default the first free one from 7860 on.
        limits: how large an upload may be.
        ready: called with the page's address once it is served.
        **load: arguments of `Reader`.

    Raises:
        ModelError: there is no model, or it is damaged.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # how containers are stopped: uploads are deleted then too
    reader = Reader(model, **load)
    with upload_folder():
        app = build_app(reader, limits)
        try:
            _, address, _ = app.launch(server_name=host, server_port=port, **launch_options(limits))
        except OSError as error:
            raise CTMoEError("--port", f"no free port ({error})", "Name another") from error
        if ready is not None:
            ready(address)
        try:
            app.block_thread()
        finally:
            app.close(verbose=False)


def launch_options(limits: UploadLimits) -> dict[str, Any]:
    """How the page is served, for `gr.Blocks.launch`: uploads cut off at their limit, nothing fetched elsewhere."""
    colours = gr.themes.Base(primary_hue="blue", neutral_hue="slate", font=FONTS, font_mono=["monospace"])
    return {
        "share": False,
        "quiet": True,
        "prevent_thread_lock": True,
        "show_error": False,
        "max_file_size": limits.upload_mb * 10**6,
        "theme": colours,
        "css": _resource("page.css"),
        "js": "() => document.body.classList.add('dark')",
        "footer_links": [],
        "enable_monitoring": False,
        "ssr_mode": False,
    }


@contextmanager
def upload_folder() -> Iterator[Path]:
    """A folder of this server's own for uploads, gone with all that is in it at the end."""
    with tempfile.TemporaryDirectory(prefix="ct-moe-app-") as folder:
        before = os.environ.get("GRADIO_TEMP_DIR")
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ["GRADIO_TEMP_DIR"]
            else:
                os.environ["GRADIO_TEMP_DIR"] = before


def _open(sessions: Sessions, request: gr.Request) -> OpenScan:
    scan = sessions.get(request.session_hash)
    if scan is None:
        raise OPEN_ONE
    return scan


def _series(series: str) -> dict[str, Any]:
    series = series.strip()
    return {} if not series else {"series": int(series) if series.isdecimal() else series}


def _delete(path: str | None) -> None:
    """The upload, and the folder that Gradio made for it."""
    if path is not None:
        with suppress(OSError):
            Path(path).unlink()
            Path(path).parent.rmdir()


def _head(reader: Reader) -> str:
    name = Path(reader.reporter.model.config.name_or_path).name
    return (
        f'<div class="head"><h1>CT-MoE</h1><span>{_escaped(name)}</span></div>'
        f'<p class="notice"><b>{_escaped(NOTICE)}</b><br>Model trained for: <b>{_escaped(reader.scope)}</b>. '
        "Scans stay in this server's memory until the page is closed.</p>"
    )


def _opened(scan: OpenScan, pictures: dict[str, Any]) -> str:
    slab = "" if pictures["slab_mm"] is None else f" of {pictures['slab_mm']:.1f} mm"
    sizes = " x ".join(f"{step:.2f}" for step in scan.spacing)
    lines = [
        f"Scan open: {len(scan.hu)} slices, voxels of {sizes} mm; the model sees {len(pictures['slices'])}{slab}.",
        *scan.meta["warnings"],
    ]
    return f'<div class="status">{"<br>".join(map(_escaped, lines))}</div>'


def _problem(error: CTMoEError) -> str:
    # Without the advice to pass settings of the loader, which a page does not offer.
    text = re.sub(r'[;.] [^;.]*\bpass (?:check|intensity)="\w+"', "", str(error))
    return f'<div class="problem" role="alert">{_escaped(text)}</div>'


def _report(inside: str) -> str:
    return f'<div class="report">{inside}</div>'


def _report_text(text: str) -> str:
    parts = split_report(text)
    return "".join(
        f"<h3>{name.capitalize()}</h3><p>{_escaped(part)}</p>" for name, part in parts.items() if part is not None
    )


def _answer_text(question: str, answer: str, reused: str = "") -> str:
    note = f'<p class="quiet">Visual work not done again: {_escaped(reused)}.</p>' if reused else ""
    return f'<p class="asked">{_escaped(question)}</p><p>{_escaped(answer)}</p>{note}'


def _answers_text(scan: OpenScan) -> str:
    return "".join(_answer_text(said["question"], said["answer"], said["reused"]) for said in scan.answers)


def _documents(scan: OpenScan, image_processor) -> str:
    document = make_document(scan)
    links = [
        ("JSON", "json", "application/json", as_json(document)),
        ("PDF", "pdf", "application/pdf", as_pdf(document, contact_sheet(scan, image_processor))),
        ("DICOM SR", "dcm", "application/dicom", as_structured_report(document)),
    ]
    return '<div class="documents">' + "".join(_link(*link) for link in links) + "</div>"


def _link(name: str, suffix: str, kind: str, content: bytes) -> str:
    """The document is in the link itself: no file of a session lies on the server."""
    data = base64.b64encode(content).decode()
    return f'<a download="ct-moe-report.{suffix}" href="data:{kind};base64,{data}">Download {name}</a>'


def _escaped(text: str) -> str:
    return html.escape(printable(text))


def _resource(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
