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
"""The taught base of the ablations: what it has of the demo model, what it learns, and that it is the same again."""

import argparse
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from transformers import AutoProcessor, LlavaForConditionalGeneration

from ct_moe import CTMoEForConditionalGeneration, CTMoEProcessor, DataError
from ct_moe.trainers.collator import CTMoEDataCollator
from ct_moe.trainers.phantoms.data_set import write_phantoms
from ct_moe.trainers.rows import load_rows


@pytest.fixture(scope="module")
def teach_base(load_script):
    return load_script("teach_base")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("taught") / "data"
    write_phantoms(folder, n=3, validation=0, test=0, workers=1, progress=False)
    return folder


def settings(teach_base, data: Path, folder: Path, **more) -> argparse.Namespace:
    known = {"model": teach_base.DEMO_MODEL, "data": data, "out": folder / "base"}
    known |= {"layers": folder / "layers", "scans": 3, "steps": 60, "batch": 16, "lr": 1e-3}
    known |= {"reader": folder / "reader", "reader_steps": 8, "reader_batch": 2}
    return argparse.Namespace(**known | more)


@pytest.fixture(scope="module")
def made(teach_base, data, tmp_path_factory) -> Path:
    """Folder with a base, its layers and its reader, taught in a few steps by the committed demo model."""
    folder = tmp_path_factory.mktemp("taught")
    teach_base.make_base(settings(teach_base, data, folder))
    return folder


@pytest.fixture(scope="module")
def demo(teach_base):
    return CTMoEForConditionalGeneration.from_pretrained(teach_base.DEMO_MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def convert(load_script, made, tmp_path_factory):
    """The base, converted with settings."""
    train_demo = load_script("train_demo")

    def convert(**settings):
        folder = tmp_path_factory.mktemp("converted") / "model"
        train_demo.make_model(made / "base", folder, **{**train_demo.SETTINGS, **settings})
        return CTMoEForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    return convert


READER = ("lm_head.", "model.language_model.", "model.multi_modal_projector.")


def test_all_but_the_volume_layers_and_the_reader_is_the_demo_models(convert, demo):
    theirs = dict(demo.named_parameters())
    volume = ("model.vision_tower.layers.2.", "model.vision_tower.layers.3.")
    converted = convert()
    shared = [name for name, _ in converted.named_parameters() if name in theirs]
    for name in shared:
        own = converted.get_parameter(name)
        if "embed_tokens" in name or (
            name.startswith("model.vision_tower.") and not name.startswith(volume) and "scale" not in name
        ):
            assert torch.equal(own, theirs[name]), name
        elif name.startswith(READER) and own.ndim == 2:
            assert not torch.equal(own, theirs[name]), name
            cosine = torch.nn.functional.cosine_similarity(own.flatten(), theirs[name].flatten(), dim=0)
            assert cosine > 0.9, name  # it went on from there
        elif name.startswith(volume) and own.ndim == 2 and ".moe." not in name:
            assert not torch.equal(own, theirs[name]), name
            # Not near to them either: with the numbers that the demo model's base began with, they would be.
            cosine = torch.nn.functional.cosine_similarity(own.flatten(), theirs[name].flatten(), dim=0)
            assert abs(cosine) < 0.1, name


def test_it_is_taught_what_the_demo_model_says(teach_base, made, demo, data, tmp_path):
    """Nearer to it than the same layers before a step, on the slices it learned from."""
    processor = CTMoEProcessor.from_pretrained(teach_base.DEMO_MODEL)
    base = LlavaForConditionalGeneration.from_pretrained(made / "base", dtype=torch.float32).eval()
    row = processor.image_processor.process_volume(str(data / "train/scans/00000.nii.gz"))
    row = {name: torch.from_numpy(value)[None] for name, value in row.items()}
    untaught = teach_base.empty_base(processor.tokenizer, tmp_path / "untaught").eval()
    teach_base.take_demo(untaught, demo)
    with torch.inference_mode():
        wanted = demo.model.vision_tower(**row).last_hidden_state[0, :, 1:]
        off = []
        for model in (base, untaught):
            states = model.model.vision_tower(row["pixel_values"][0], output_hidden_states=True).hidden_states[-2]
            off.append((states[:, 1:] - wanted).square().mean() / wanted.var())
    assert off[0] < 0.5 * off[1]


def test_the_reader_learns_to_read_all_slices_on_average(teach_base, convert, demo, data):
    """The answers that it learned from are likelier than with the demo model's reader, on the same visual tokens."""
    model = convert(volume_layers=[], moe_layers=[], pool=[24, 2, 2])
    assert model.config.vision_config.volume_layers == []
    collator = CTMoEDataCollator(CTMoEProcessor.from_pretrained(model.name_or_path))
    rows = [row for row in load_rows(data / "train.jsonl") if row["task"] == "vqa_closed"][:8]
    batch = collator([row | {"task": None} for row in rows])
    batch = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor) and name != "row_tasks"}
    assert (batch["input_ids"] == model.config.image_token_id).sum(1).tolist() == 8 * [16]  # of up to 24 slices
    losses = []
    with torch.inference_mode():
        losses.append(model(**batch).loss)
        for name, parameter in demo.named_parameters():
            if name.startswith(READER):
                model.get_parameter(name).copy_(parameter)
        losses.append(model(**batch).loss)
    assert losses[0] < 0.8 * losses[1]


def test_what_is_learned_from_is_what_the_base_computes(teach_base, made):
    base = LlavaForConditionalGeneration.from_pretrained(made / "base", dtype=torch.float32).eval()
    pixel_values = torch.randn(2, 3, 128, 128)
    with torch.inference_mode():
        states = teach_base.SliceLayers(base, 2)(pixel_values)
        expected = base.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(states, expected)


def test_kept_layers_give_the_same_base_without_data(teach_base, made, tmp_path):
    kept = {"layers": made / "layers", "reader": made / "reader"}
    teach_base.make_base(settings(teach_base, tmp_path / "none", tmp_path, **kept))
    for file in (made / "base").iterdir():
        assert (tmp_path / "base" / file.name).read_bytes() == file.read_bytes(), file.name
    assert AutoProcessor.from_pretrained(tmp_path / "base").tokenizer.pad_token_id is not None


def test_the_committed_files_fit(teach_base, tmp_path):
    kept = {"layers": teach_base.LAYERS, "reader": teach_base.READER}
    teach_base.make_base(settings(teach_base, tmp_path / "none", tmp_path, **kept))
    assert (tmp_path / "base" / "model.safetensors").is_file()


@pytest.mark.parametrize("kept", ["layers", "reader"])
def test_files_of_another_model_are_refused(teach_base, made, tmp_path, kept):
    tensors = load_file(made / kept)
    name = next(iter(tensors))
    with safe_open(made / kept, framework="pt") as opened:
        metadata = opened.metadata()
    wrong = [tensors | {name: torch.ones(2, 3)}, {name: tensors[name]}, tensors | {"x": torch.ones(1)}]
    files = [save(content, metadata) for content in wrong] + [b"none", save(tensors, {"base": "another"})]
    for content in files:
        (tmp_path / kept).write_bytes(content)
        files = {"layers": made / "layers", "reader": made / "reader"} | {kept: tmp_path / kept}
        with pytest.raises(DataError, match=f"{kept}: is not of this base"):
            teach_base.make_base(settings(teach_base, tmp_path / "none", tmp_path, **files))
        assert not (tmp_path / "base").exists()


def test_missing_phantoms_are_named(teach_base, tmp_path):
    with pytest.raises(DataError, match=r"has no train_labels\.jsonl"):
        teach_base.make_base(settings(teach_base, tmp_path / "none", tmp_path))
    assert not (tmp_path / "base").exists()
    assert not (tmp_path / "layers").exists()
