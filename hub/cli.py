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
"""The command line, `ct-moe`: `convert`, `train`, `report`, `evaluate`, `push` and others (`ct-moe --help`).

Every command imports what it needs when it runs, so that `--help` answers at once. Bad input ends in one line on
stderr and exit code 1; wrong usage in exit code 2.
"""

import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR, getLogger
from pathlib import Path
from typing import Annotated, Literal

import typer

import ct_moe
from ct_moe.errors_ct_moe import CTMoEError


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="CT-MoE: a 2D multimodal model that reads whole CT volumes. Not a medical device.",
)

ModelOption = Annotated[str, typer.Option("--model", "-m", help="Folder made by `ct-moe convert`, or a Hub id.")]
SeriesOption = Annotated[
    str | None,
    typer.Option(help="Which series of a DICOM folder or zip: its number in the list of the error, or UID."),
]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")]
CheckOption = Annotated[
    Literal["refuse", "warn", "off"],
    typer.Option(help="Values that are not those of a CT scan: refuse them, warn about them, or load without a look."),
]


def main() -> None:
    """Entry point: no traceback for the user, exit code 1 for every failure."""
    try:
        app()
    except CTMoEError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted", code=130)
    except Exception as error:
        if os.environ.get("CT_MOE_DEBUG"):
            traceback.print_exc()
        _fail(
            f"unexpected {type(error).__name__}: {' '.join(str(error).split())}. "
            "Set CT_MOE_DEBUG=1 to see where, and please report it."
        )


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(f"ct-moe {ct_moe.__version__}")
        raise typer.Exit


@app.command()
def convert(
    base: Annotated[str, typer.Argument(help="Folder or Hub id of a 2D multimodal model of a supported family.")],
    out: Annotated[Path, typer.Argument(help="New folder for the converted model.")],
    revision: RevisionOption = None,
    dtype: Annotated[str | None, typer.Option(help="Dtype of the converted weights; by default the base's.")] = None,
    parity: Annotated[bool, typer.Option(help="Measure that the logits equal the base's.")] = True,
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file in place of the base's chat template.")
    ] = None,
    preset: Annotated[
        Literal["paper_like", "med_2e3"] | None,
        typer.Option(help="Settings nearest to the paper's, or those of Med-2E3 (a second, 3D encoder and TG-IS)."),
    ] = None,
    volume_encoder: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of M3D-CLIP, whose weights the 3D encoder of med_2e3 gets."),
    ] = None,
    volume_encoder_revision: RevisionOption = None,
    vision_tower: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of a DINOv2. BASE is then a causal language model, the projector new."),
    ] = None,
    vision_tower_revision: RevisionOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, from configs and file headers alone; write nothing.")
    ] = False,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="Config field as NAME=JSON, e.g. --set num_experts=8 --set 'tasks=[\"report\"]'."),
    ] = None,
) -> None:
    """Convert a 2D multimodal base into a CT-MoE model, every pretrained parameter reused."""
    with _quiet_libraries():
        from ct_moe.hub.conversion import convert_base, plan_conversion

        settings = _settings(setting or [])
        if chat_template is not None:
            settings["chat_template"] = _read_text(chat_template)
        settings |= {"volume_encoder": volume_encoder, "volume_encoder_revision": volume_encoder_revision}
        settings |= {"vision_tower": vision_tower, "vision_tower_revision": vision_tower_revision}
        settings |= {"revision": revision, "dtype": dtype, "preset": preset}
        if dry_run:
            print(plan_conversion(base, **settings))
            print("Nothing was written.")
            return
        print(convert_base(base, out, parity=parity, **settings))
    print(
        f"Wrote {out}. It was never trained on CT: take none of its reports seriously before it is. "
        "(Parity holds for one slice without pooling.)"
    )


@app.command()
def unconvert(
    folder: Annotated[Path, typer.Argument(help="Converted, trained or merged model.")],
    out: Annotated[Path, typer.Argument(help="New folder for the base's own files.")],
    base: Annotated[
        Path | None, typer.Option(help="Folder of a conversion of the same base, where FOLDER has no files of it.")
    ] = None,
) -> None:
    """Write the base's own format again, with the parameters as they are now; experts and routers stay behind."""
    with _quiet_libraries():
        from ct_moe.hub.unconversion import unconvert as write_base

        print(f"Wrote {out}:\n{write_base(folder, out, base)}")


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="Recipe in YAML: model, data and the settings of both stages.")],
    stage: Annotated[
        int | None, typer.Option(min=1, max=2, help="Train this stage only; by default both, one after the other.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="Setting in place of the recipe's: NAME=VALUE or stage1.NAME=VALUE."),
    ] = None,
) -> None:
    """Train in two stages. Cut off at any moment, the same command goes on from the last checkpoint.

    Several processes: accelerate launch --config_file FILE -m ct_moe.hub.cli train --config RECIPE
    """
    with _quiet_libraries():
        try:
            import peft  # noqa: F401 (read later, but missing from the start)

            from ct_moe.trainers.recipe import load_recipe
            from ct_moe.trainers.two_stage import train_two_stage
        except ModuleNotFoundError as error:
            raise CTMoEError(error.name, "is not installed", 'Run: pip install "ct-moe[train]"') from error

        from accelerate import PartialState

        recipe = load_recipe(config, setting or [])
        train_two_stage(recipe=recipe, stages=(1, 2) if stage is None else (stage,))
        PartialState().destroy_process_group()


@app.command()
def report(
    scans: Annotated[list[str], typer.Argument(help="Scans: files, or folders that hold one series each.")],
    model: ModelOption,
    question: Annotated[str | None, typer.Option(help="Ask this instead of writing a report.")] = None,
    context: Annotated[str | None, typer.Option(help="Indication, contrast phase and the like.")] = None,
    task: Annotated[str | None, typer.Option(help="Task whose experts serve the request: name or number.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write one JSON object per scan to this new file.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it is generated.")] = False,
    routing: Annotated[
        Path | None,
        typer.Option(help="Draw per scan what the experts did into this new folder, and add it to the records."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Scans that go through the model together.")] = 1,
    series: SeriesOption = None,
    check: CheckOption = "refuse",
    revision: RevisionOption = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda:0 ...; by default the first accelerator.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 ...")] = "auto",
    allow_failures: Annotated[
        bool, typer.Option("--allow-failures", help="Exit with 0 although scans failed.")
    ] = False,
) -> None:
    """Write a report of each scan, or answer a question about it. A scan that fails is recorded, the others go on."""
    with _quiet_libraries():
        from tqdm import tqdm
        from transformers import TextStreamer

        from ct_moe.hub.reporting import open_reporter, report_scans, write_jsonl
        from ct_moe.pipeline_ct_moe import check_words

        if stream and batch_size > 1:
            raise CTMoEError("--stream", "cannot follow several texts at once", "Leave out --batch-size")
        check_words(question=question, context=context)  # and the output file: before the weights are read
        for new in (out, routing):
            if new is not None and (new.exists() or not new.parent.is_dir()):
                found = "exists" if new.exists() else "is in no existing folder"
                raise CTMoEError(str(new), found, "Name a new one in a folder that exists")
        reporter = open_reporter(model, revision=revision, device=device, dtype=dtype)
        chosen = int(task) if task is not None and task.isdecimal() else task
        call = {"question": question, "context": context, "task": chosen, "max_new_tokens": max_new_tokens}
        if stream:
            call["streamer"] = TextStreamer(reporter.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        load = {"check": check, **_series(series)}
        records = report_scans(reporter, scans, load=load, batch_size=batch_size, pictures=routing, **call)
        if out is not None:
            records = write_jsonl(records, out)
        failed = 0
        for record in tqdm(records, total=len(scans), desc="scans", unit="scan", disable=stream):
            if "error" in record:
                failed += 1
                _warn(f"failed: {record['error']}")
            else:
                for warning in record["warnings"]:
                    _warn(f"{record['scan']}: {warning}")
                tqdm.write(_summary(record, with_text=not stream), file=sys.stdout)
    if failed:
        _warn(f"{failed} of {len(scans)} scans failed")
        if not allow_failures or failed == len(scans):
            raise typer.Exit(1)


@app.command()
def view(
    scan: Annotated[str, typer.Argument(help="A scan: a file, or a folder that holds one series.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder or Hub id whose settings to show; by default ours.")
    ] = None,
    windows: Annotated[str | None, typer.Option(help="Preset: chest, abdomen, head or wide.")] = None,
    columns: Annotated[int, typer.Option(min=1, help="Slices to show.")] = 6,
    series: SeriesOption = None,
    check: CheckOption = "refuse",
    revision: RevisionOption = None,
) -> None:
    """Draw what the model will see of a scan: its slices in every window, with sides and millimetres."""
    with _quiet_libraries():
        from ct_moe import CTMoEImageProcessor, load_volume
        from ct_moe.hub.folder import check_model
        from ct_moe.hub.picture import draw_slices

        settings = {} if windows is None else {"windows": windows}
        if model is None:
            processor = CTMoEImageProcessor(**settings)
        else:
            revision = check_model(model, revision)
            processor = CTMoEImageProcessor.from_pretrained(model, revision=revision, **settings)
        settings = {"intensity": processor.intensity, "reorient": processor.reorient, **_series(series)}
        volume = load_volume(scan, check=check, **settings)
        for warning in volume.meta["warnings"]:
            _warn(f"{scan}: {warning}")
        draw_slices(volume, processor, out, columns=columns, title="What the model sees")
    print(f"Wrote {out}")


@app.command()
def inspect(
    scan: Annotated[str, typer.Argument(help="A scan: a file, or a folder that holds one series.")],
    series: SeriesOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Print a scan's shape, spacing, orientation, HU range and all that is odd about it. Exit code 1 if refused."""
    with _quiet_libraries():
        from ct_moe.hub.inspection import inspect_scan, inspection_text

        description = inspect_scan(scan, **_series(series))
    print(json.dumps(description, indent=2) if as_json else inspection_text(description))
    if description["refused"] is not None:
        raise typer.Exit(1)


@app.command()
def tasks(
    model: Annotated[str, typer.Argument(help="Folder made by `ct-moe convert`, or a Hub id.")],
    add: Annotated[
        list[str] | None, typer.Option(help="Task to add: NAME, or NAME=TASK to start from a copy of TASK.")
    ] = None,
    remove: Annotated[list[str] | None, typer.Option(help="Task to remove.")] = None,
    rename: Annotated[list[str] | None, typer.Option(help="OLD=NEW.")] = None,
    out: Annotated[Path | None, typer.Option(help="New folder for the changed model.")] = None,
    revision: RevisionOption = None,
) -> None:
    """List the tasks of a model; or rename, remove and add some (in this order), all other weights untouched."""
    with _quiet_libraries():
        from ct_moe.hub.tasks import edit_tasks, list_tasks

        changed = bool(add or remove or rename)
        if changed != (out is not None):
            remedy = "Name a new folder with the changes: the model itself is not changed"
            raise CTMoEError("--out", "missing" if changed else "nothing to write", remedy)
        if changed:
            renamed = [_pair(pair, "--rename", "OLD=NEW") for pair in rename or []]
            added = [tuple(pair.split("=", 1)) if "=" in pair else (pair, None) for pair in add or []]
            names = edit_tasks(model, out, rename=renamed, remove=remove or [], add=added, revision=revision)
        else:
            names = list_tasks(model, revision)
    print("\n".join(f"{index} {name}" for index, name in enumerate(names)) or "no tasks")
    if out is not None:
        print(f"Wrote {out}")


@app.command("tiny-base")
def tiny_base(
    out: Annotated[Path, typer.Argument(help="New folder for the base.")],
    text_model: Annotated[Literal["phi3", "llama"], typer.Option(help="Language model.")] = "phi3",
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
) -> None:
    """Build a LLaVA base of a few MB with random weights, to try the other commands on."""
    with _quiet_libraries():
        from ct_moe.hub.tiny_base import build_tiny_base

        build_tiny_base(out, text_model=text_model, seed=seed)
    print(f"Wrote {out}: random weights, it can say nothing meaningful.")


@app.command("app")
def serve_app(
    model: ModelOption,
    host: Annotated[
        str, typer.Option(help="Address to listen on; by default this machine only. Scans are never sent elsewhere.")
    ] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="By default the first free from 7860 on.")] = None,
    max_upload_mb: Annotated[int, typer.Option(min=1, help="Largest file that may be uploaded.")] = 512,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    revision: RevisionOption = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda:0 ...; by default the first accelerator.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 ...")] = "auto",
) -> None:
    """Serve a page for the browser: slices, report, questions, documents. Not a medical device."""
    with _quiet_libraries():
        try:
            from ct_moe.hub.app.interface import launch
            from ct_moe.hub.app.uploads import UploadLimits
        except ModuleNotFoundError as error:
            raise CTMoEError(error.name, "is not installed", 'Run: pip install "ct-moe[app]"') from error

        launch(
            model,
            host=host,
            port=port,
            limits=UploadLimits(upload_mb=max_upload_mb, volume_mb=max(1024, 2 * max_upload_mb)),
            ready=lambda address: print(f"Open {address} (Ctrl+C ends it)", flush=True),
            max_new_tokens=max_new_tokens,
            revision=revision,
            device=device,
            dtype=dtype,
        )


@app.command()
def phantom(
    out: Annotated[Path, typer.Argument(help="New folder for scans, rows and labels.")],
    n: Annotated[int, typer.Option("--n", min=1, help="Training scans.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Another seed gives other scans.")] = 0,
    validation: Annotated[int | None, typer.Option(min=0, help="Validation scans; by default a tenth.")] = None,
    test: Annotated[int | None, typer.Option(min=0, help="Test scans; by default a quarter.")] = None,
    file_format: Annotated[
        Literal["nifti", "dicom", "both"], typer.Option("--format", help="Files of the scans.")
    ] = "nifti",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that draw; by default one per core.")] = None,
) -> None:
    """Draw synthetic CT scans of known content, with reports, questions and answers to train and measure on."""
    with _quiet_libraries():
        from ct_moe.trainers.phantoms.data_set import write_phantoms

        rows = write_phantoms(
            out, n=n, seed=seed, validation=validation, test=test, file_format=file_format, workers=workers
        )
    print(f"Wrote {out}: " + ", ".join(f"{count:,} {split} rows" for split, count in rows.items()))
    print(f"No patient is in it. Train on it: ct-moe train --config RECIPE --set train_data={out / 'train.jsonl'}")


@app.command()
def check(
    data: Annotated[str, typer.Argument(help="m3d-cap, m3d-vqa, ct-rate, ct-rate-vqa, radgenome, 3d-rad or own.")],
    root: Annotated[Path, typer.Argument(help="Folder of the download; for own also a .csv, .tsv or .jsonl file.")],
    split: Annotated[str, typer.Option(help="Split to look through.")] = "train",
    scans: Annotated[
        Literal["none", "there", "load"], typer.Option(help="Look for the scans, or load every one of them.")
    ] = "there",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Scans loaded at a time; by default one per core.")
    ] = None,
    intensity: Annotated[
        Literal["hu", "display"], typer.Option(help="What your own scans hold; published data sets know theirs.")
    ] = "hu",
    items: Annotated[
        Path | None, typer.Option(help="File for all rows with their ids, as JSONL: what another system is to answer.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File for everything found, as JSON.")] = None,
) -> None:
    """Look through a download before training: lines that cannot be used, scans that are missing or broken."""
    with _quiet_libraries():
        try:
            from ct_moe.trainers.data_sets.catalogue import find_data_set
            from ct_moe.trainers.data_sets.check import check_data_set, check_text
        except ModuleNotFoundError as error:
            raise CTMoEError(error.name, "is not installed", 'Run: pip install "ct-moe[train]"') from error

        about = find_data_set(data)
        for new in (items, out):  # before hours of loading
            if new is not None and (new.is_dir() or not new.parent.is_dir()):
                found = "is a folder" if new.is_dir() else "is in no existing folder"
                raise CTMoEError(str(new), found, "Name a file in a folder that exists")
        found = check_data_set(data, root, split, scans=scans, intensity=intensity, items=items, workers=workers)
    print(check_text(found, about, split))
    old = [root / "dataset" / name for name in ("train", "valid")]
    if found.missing and data.startswith("ct-rate") and any(folder.is_dir() for folder in old):
        print("Scans of version 1 are there: ct-moe fix-ct-rate makes those of version 2 of them.")
    if out is not None:
        out.write_text(json.dumps(found.as_dict(), indent=2) + "\n", encoding="utf-8")
        print(f"Wrote {out}")
    if not found.is_whole:
        raise typer.Exit(1)


@app.command("fix-ct-rate")
def fix_ct_rate(
    root: Annotated[Path, typer.Argument(help="Folder of the download.")],
    split: Annotated[Literal["train", "validation"], typer.Option(help="Split to repair.")] = "train",
    out: Annotated[
        Path | None, typer.Option(help="Where the repaired scans go; by default beside the others.")
    ] = None,
) -> None:
    """Write scans of CT-RATE's version 1, whose headers are empty, as scans of version 2: in HU, with voxel size."""
    with _quiet_libraries():
        from ct_moe.trainers.data_sets.ct_rate_fix import fix_scans

        written, failed = fix_scans(root, split, out=out)
    print(f"{written} scans repaired")
    for name, finding in failed.items():
        _warn(f"{name}: {finding}")
    if failed:
        _fail(f"{len(failed)} scans could not be repaired")


@app.command()
def evaluate(
    out: Annotated[Path, typer.Option(help="Results, .json; answers and a picture lie beside it.")],
    model: Annotated[str | None, typer.Option(help="Folder or Hub id of a CT-MoE model.")] = None,
    data: Annotated[
        str | None, typer.Option(help="m3d-cap, m3d-vqa, ct-rate, ct-rate-vqa, radgenome, 3d-rad or own.")
    ] = None,
    root: Annotated[Path | None, typer.Option(help="Folder of the download.")] = None,
    split: Annotated[str | None, typer.Option(help="By default the test or else the validation split.")] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="Answers of any system instead of a model: JSONL or CSV with id, prediction.")
    ] = None,
    baselines: Annotated[str, typer.Option(help="Of majority, blind, nearest, labels; separated by commas.")] = "",
    rows: Annotated[int | None, typer.Option(min=1, help="So many rows, always the same ones.")] = None,
    labeller: Annotated[
        str | None, typer.Option(help="Report classifier for the 18 labels: folder or Hub id; by default rules.")
    ] = None,
    scorer: Annotated[
        list[str] | None, typer.Option(help="bertscore=FOLDER, ratescore, green, module:function.")
    ] = None,
    meteor: Annotated[
        bool | None, typer.Option("--meteor/--no-meteor", help="By default where nltk finds a WordNet.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that go through the model together.")] = 8,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer; by default by task.")] = None,
    volume_cache: Annotated[Path | None, typer.Option(help="Folder for processed scans.")] = None,
    revision: RevisionOption = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 ...")] = "float32",
) -> None:
    """Answer a data set and score the answers, or score those of another system. A killed run goes on where it was.

    Several processes: accelerate launch --multi_gpu --num_processes N -m ct_moe.hub.cli evaluate ...
    """
    with _quiet_libraries():
        try:
            from ct_moe.trainers.evaluation.evaluate import evaluate as run
            from ct_moe.trainers.evaluation.results import format_results
        except ModuleNotFoundError as error:
            raise CTMoEError(error.name, "is not installed", 'Run: pip install "ct-moe[train,eval]"') from error

        result = run(
            out,
            model=model,
            data=data,
            root=root,
            split=split,
            predictions=predictions,
            baselines=[name.strip() for name in baselines.split(",") if name.strip()],
            rows=rows,
            labeller=labeller,
            scorers=scorer or (),
            meteor=meteor,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            volume_cache=volume_cache,
            revision=revision,
            dtype=dtype,
        )
    if result:
        for bad in result["bad_rows"][:10]:
            _warn(bad)
        if result["bad_rows"]:
            _warn(f"{len(result['bad_rows'])} lines cannot be used and are not scored")
        for unanswered in list(result["unanswered"].values())[:10]:
            _warn(f"not answered: {unanswered}")
        print(format_results(result))
        print(f"Wrote {out}")
        if not result["counts"]["scored"]:
            raise CTMoEError(str(out), "no row was answered", "Look for the scans: ct-moe check")


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(help="Model folder, or one that holds an adapter only.")],
    write: Annotated[
        bool,
        typer.Option("--write", help="Write README.md into it, in place of one that is there, instead of printing."),
    ] = False,
    add: Annotated[
        list[Path] | None,
        typer.Option("--from", help="Results, training or conversion report from elsewhere, to be put into it."),
    ] = None,
    picture: Annotated[
        bool, typer.Option("--picture", help="Draw where a synthetic phantom goes inside the model, as routing.png.")
    ] = False,
) -> None:
    """Make a model card of what lies in a folder: configs, reports, results, and card.yaml for the rest."""
    with _quiet_libraries():
        from ct_moe.hub.card import draw_card_picture, model_card, write_card

        if (add or picture) and not write:
            raise CTMoEError("--from" if add else "--picture", "changes the folder", "Add --write")
        if picture:
            draw_card_picture(folder)
        if not write:
            print(str(model_card(folder)), end="")
            return
        print(f"Wrote {write_card(folder, add or [])}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Model folder, or one that holds an adapter only.")],
    repo_id: Annotated[str, typer.Argument(help="Where to: ORG/NAME.")],
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    revision: Annotated[str, typer.Option(help="Branch; made if it does not exist.")] = "main",
    tag: Annotated[
        str | None, typer.Option(help="Name of the commit, which the card loads; by default made of the files' hash.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Of an adapter: Hub id of the model it belongs to.")] = None,
    base_revision: Annotated[str | None, typer.Option(help="Commit of that model.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and prove the folder, upload nothing.")] = False,
) -> None:
    """Publish a folder in one commit, after proving that it works without this package and holds nothing private."""
    with _quiet_libraries():
        from ct_moe.hub.publishing import push_folder

        settings = {"private": private, "revision": revision, "tag": tag, "dry_run": dry_run}
        print(push_folder(folder, repo_id, base=base, base_revision=base_revision, say=_warn, **settings))


@app.command()
def pull(
    repo_id: Annotated[str, typer.Argument(help="ORG/NAME.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
    revision: RevisionOption = None,
) -> None:
    """Download a published model at one commit, every file checked against its manifest."""
    with _quiet_libraries():
        from ct_moe.hub.publishing import pull_folder

        commit = pull_folder(repo_id, out, revision)
    print(f"Wrote {out}: {repo_id} at {commit}")


def _summary(record: dict, with_text: bool) -> str:
    slab = "" if record["slab_mm"] is None else f", {record['slab_mm']:g} mm slabs"
    lines = [f"{record['scan']}: {record['num_slices']} slices{slab}, task {record['task'] or 'none'}"]
    if with_text:
        for name in ("findings", "impression", "answer"):
            if record.get(name):
                lines.append(f"{name.capitalize()}: {printable(record[name])}")
    scope = "The model is untrained" if record["scope"] == "untrained" else f"Model trained for: {record['scope']}"
    lines.append(f"{scope}. {record['notice']}\n")
    return "\n".join(lines)


def printable(text: str) -> str:
    """Generated text for a terminal, which would obey the control characters that a model may produce."""
    return "".join(character if character.isprintable() or character == "\n" else "\ufffd" for character in text)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CTMoEError(str(path), f"cannot be read ({type(error).__name__})", "Name a text file") from error


def _series(series: str | None) -> dict:
    if series is None:
        return {}
    return {"series": int(series) if series.isdecimal() else series}


def _settings(pairs: list[str]) -> dict:
    settings = {}
    for pair in pairs:
        name, value = _pair(pair, "--set", "NAME=JSON, e.g. num_experts=8")
        try:
            settings[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            settings[name.strip()] = value  # a bare word is a string: --set guide_interaction=bias
    return settings


def _pair(text: str, option: str, form: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise CTMoEError(option, f"{text!r} has no =", f"Write {form}")
    return name, value


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Progress and errors are this package's own; what the reader warned about is in the records."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # ... but not what training leaves out.
        warnings.filterwarnings("default", module="ct_moe.trainers", message=".* lines cannot be used, the first is")
        from huggingface_hub.utils import logging as hub_logging
        from transformers.utils import logging

        logging.disable_progress_bar()
        hub_logging.set_verbosity_error()
        # It misses a package for a fast path at every start, whatever the command.
        getLogger("bitsandbytes").setLevel(ERROR)
        yield


def _warn(message: str) -> None:
    from tqdm import tqdm

    tqdm.write(f"ct-moe: {message}", file=sys.stderr)


def _fail(message: str, code: int = 1) -> None:
    print(f"ct-moe: error: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
