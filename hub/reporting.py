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
"""A batch of scans through the report pipeline: a bad scan is recorded and the others go on.

- `open_reporter`: a model folder or Hub id -> the pipeline, with this package's own classes.
- `report_scans`: scans -> one record each, as they are ready.
- `write_jsonl`: records -> a file that appears when they are all in it.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch

from ct_moe import CTMoEError, CTReportPipeline, ModelError, VolumeError, load_volume

from .folder import load_folder
from .routing_picture import draw_routing


def open_reporter(
    model: str, *, revision: str | None = None, device: str | None = None, dtype: str = "auto"
) -> CTReportPipeline:
    """Load a converted or trained CT-MoE model with its processor.

    Args:
        model: folder or Hub id.
        revision: branch, tag or commit of a Hub repository.
        device: `"cpu"`, `"cuda:1"` ...; by default the first accelerator, else the CPU.
        dtype: `"auto"` (the dtype on disk), `"float32"`, `"bfloat16"` ...

    Raises:
        ModelError: there is no CT-MoE model, or it is incomplete or damaged.
    """
    network, processor, revision = load_folder(model, revision=revision, dtype=dtype)
    if processor.chat_template is None:
        raise ModelError(model, "no chat template", "Copy chat_template.jinja of the original folder into it")
    return CTReportPipeline(
        model=network, processor=processor, task="ct-report", device=_device(device), revision=revision
    )


def report_scans(
    reporter: CTReportPipeline,
    scans: Iterable[str],
    *,
    load: dict[str, Any] | None = None,
    batch_size: int = 1,
    pictures: Path | None = None,
    **call,
) -> Iterator[dict[str, Any]]:
    """Yield one record per scan, in order: the pipeline's result, or `scan` and `error` for a scan that failed.

    Args:
        reporter: from `open_reporter`.
        scans: paths.
        load: arguments of `load_volume`, such as `check` and `series`.
        batch_size: scans that go through the model together.
        pictures: new folder for a routing picture of every scan, `scan-0001.png` and so on. Records then have
            `routing`, and the picture's file as `routing_picture`.
        **call: the pipeline's call arguments.
    """
    if pictures is not None:
        call["return_routing"] = "maps"
    # A wrong question or setting fails before the first scan is read, and not once per scan.
    reporter._sanitize_parameters(**call)
    if pictures is not None:
        try:
            pictures.mkdir()
        except OSError as error:
            raise ModelError(str(pictures), f"cannot be made ({error.strerror})", "Name a new folder") from error
    numbers = count(1)
    batch: list[tuple[str, Any]] = []
    image_processor = reporter.processor.image_processor
    load = {"intensity": image_processor.intensity, "reorient": image_processor.reorient, **(load or {})}
    for scan in scans:
        try:
            volume = load_volume(scan, **load)
        except CTMoEError as error:
            volume = error
        batch.append((scan, volume))
        if len(batch) == batch_size:
            yield from _run(reporter, batch, call, pictures, numbers)
            batch = []
    yield from _run(reporter, batch, call, pictures, numbers)


def write_jsonl(records: Iterable[dict[str, Any]], out: str | Path) -> Iterator[dict[str, Any]]:
    """Pass records on while writing them, one JSON object a line; `out` appears under its name at the end.

    A job that is interrupted from the keyboard leaves what was finished, in whole lines; one that crashes leaves it
    under the name of `out` with `.part` added.

    Raises:
        ModelError: `out` exists, or cannot be written.
    """
    out = Path(out)
    part = out.with_name(f"{out.name}.part")
    if out.exists():
        raise ModelError(str(out), "exists", "Name a new file, or remove this one first")
    try:
        file = part.open("w", encoding="utf-8")
    except OSError as error:
        raise ModelError(
            str(out), f"cannot be written ({error.strerror})", "Name a file in a folder that exists"
        ) from error
    with file:
        try:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
                yield record
        except KeyboardInterrupt:
            if not file.tell():
                part.unlink()
                raise
            part.replace(out)
            raise
        except CTMoEError:  # the request itself was wrong: nothing was written
            part.unlink()
            raise
    part.replace(out)


def _run(
    reporter: CTReportPipeline, batch: list[tuple[str, Any]], call: dict, pictures: Path | None, numbers: Iterator[int]
) -> Iterator[dict[str, Any]]:
    good = [volume for _, volume in batch if not isinstance(volume, CTMoEError)]
    try:
        results = reporter(good, batch_size=max(1, len(good)), **call)
    except (CTMoEError, torch.OutOfMemoryError):
        results = [_run_one(reporter, volume, call) for volume in good]  # one of them is bad, the others are not
    remaining = iter(results)
    for scan, volume in batch:
        number = next(numbers)
        result = volume if isinstance(volume, CTMoEError) else next(remaining)
        if pictures is not None and isinstance(result, dict):
            result = _with_picture(result, volume, reporter, pictures / f"scan-{number:04}.png")
        if isinstance(result, Exception):
            yield {"scan": scan, "error": str(result) if str(result).startswith(scan) else f"{scan}: {result}"}
        else:
            yield {**result, "scan": scan}


def _with_picture(
    result: dict[str, Any], volume: Any, reporter: CTReportPipeline, file: Path
) -> dict[str, Any] | CTMoEError:
    """Draws the routing of a result, and takes out the maps, which no JSON could hold."""
    try:
        draw_routing(volume, reporter.processor.image_processor, result["routing"], file)
    except CTMoEError as error:
        return error
    routing = {name: value for name, value in result["routing"].items() if name != "maps"}
    return {**result, "routing": routing, "routing_picture": str(file)}


def _run_one(reporter: CTReportPipeline, volume: Any, call: dict) -> dict[str, Any] | CTMoEError:
    try:
        return reporter(volume, **call)
    except CTMoEError as error:
        return error
    except torch.OutOfMemoryError:
        return VolumeError("the model", "ran out of memory", "Use a smaller batch size, another device or dtype")


def _device(name: str | None) -> torch.device | None:
    if name is None:
        return None
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: "Torch not compiled with CUDA enabled"
        raise ModelError("device", f"{name!r} cannot be used here", "Use cpu, or leave it out") from error
