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
from safetensors.torch import save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from ct_moe import CTMoEForConditionalGeneration, CTMoEProcessor, DataError
from ct_moe.trainers.phantoms.data_set import write_phantoms


@pytest.fixture(scope="module")
def teach_base(load_script):
    return load_script("teach_base")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("taught") / "data"
    write_phantoms(folder, n=3, validation=0, test=0, workers=1, progress=False)
    return folder


def settings(teach_base, data: Path, folder: Path, **more) -> argparse.Namespace:
    known = {"model": teach_base.DEMO_MODEL, "layers": folder / "layers", "out": folder / "base"}
    return argparse.Namespace(**{**known, "data": data, "scans": 3, "steps": 60, "batch": 16, "lr": 1e-3, **more})


@pytest.fixture(scope="module")
def made(teach_base, data, tmp_path_factory) -> Path:
    """Folder with a base and its layers, taught in a few steps by the committed demo model."""
    folder = tmp_path_factory.mktemp("taught")
    teach_base.make_base(settings(teach_base, data, folder))
    return folder


@pytest.fixture(scope="module")
def demo(teach_base):
    return CTMoEForConditionalGeneration.from_pretrained(teach_base.DEMO_MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def converted(load_script, made, tmp_path_factory):
    train_demo = load_script("train_demo")
    folder = tmp_path_factory.mktemp("converted") / "model"
    train_demo.make_model(made / "base", folder, **train_demo.SETTINGS)
    return CTMoEForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def test_all_but_the_volume_layers_is_the_demo_models(converted, demo):
    theirs = dict(demo.named_parameters())
    volume = ("model.vision_tower.layers.2.", "model.vision_tower.layers.3.")
    shared = [name for name, _ in converted.named_parameters() if name in theirs]
    for name in shared:
        own = converted.get_parameter(name)
        if name.startswith(("lm_head.", "model.language_model.", "model.multi_modal_projector.")) or (
            name.startswith("model.vision_tower.") and not name.startswith(volume) and "scale" not in name
        ):
            assert torch.equal(own, theirs[name]), name
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


def test_what_is_learned_from_is_what_the_base_computes(teach_base, made):
    base = LlavaForConditionalGeneration.from_pretrained(made / "base", dtype=torch.float32).eval()
    pixel_values = torch.randn(2, 3, 128, 128)
    with torch.inference_mode():
        states = teach_base.SliceLayers(base, 2)(pixel_values)
        expected = base.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(states, expected)


def test_kept_layers_give_the_same_base_without_data(teach_base, made, tmp_path):
    teach_base.make_base(settings(teach_base, tmp_path / "none", tmp_path, layers=made / "layers"))
    for file in (made / "base").iterdir():
        assert (tmp_path / "base" / file.name).read_bytes() == file.read_bytes(), file.name
    assert AutoProcessor.from_pretrained(tmp_path / "base").tokenizer.pad_token_id is not None


def test_the_committed_layers_fit(teach_base, tmp_path):
    teach_base.make_base(settings(teach_base, tmp_path / "none", tmp_path, layers=teach_base.LAYERS))
    assert (tmp_path / "base" / "model.safetensors").is_file()


def test_layers_of_another_model_are_refused(teach_base, tmp_path):
    for content in ({"0.mlp.fc1.weight": torch.ones(2, 2)}, None):
        if content is None:
            (tmp_path / "layers").write_bytes(b"none")
        else:
            save_file(content, tmp_path / "layers")
        with pytest.raises(DataError, match="layers: "):
            teach_base.make_base(settings(teach_base, tmp_path / "none", tmp_path))
        assert not (tmp_path / "base").exists()


def test_missing_phantoms_are_named(teach_base, tmp_path):
    with pytest.raises(DataError, match=r"has no train_labels\.jsonl"):
        teach_base.make_base(settings(teach_base, tmp_path / "none", tmp_path))
    assert not (tmp_path / "base").exists()
    assert not (tmp_path / "layers").exists()
