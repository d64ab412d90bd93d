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
"""The 3D encoder computes with M3D-CLIP's weights what MONAI's own ViT does, or its files are refused."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ct_moe import (
    ConversionError,
    CTMoEForConditionalGeneration,
    CTMoEProcessor,
    CTMoEVolumeEncoder,
    CTMoEVolumeEncoderConfig,
    ModelError,
)
from ct_moe.hub.cli import app
from ct_moe.hub.conversion import convert_base
from ct_moe.hub.tiny_base import build_tiny_base
from ct_moe.hub.volume_encoder import open_volume_encoder, read_volume_encoder


# M3D-CLIP's names. Depth, rows and columns are cut differently, so that no two axes can be taken for each other.
TINY = {
    "img_size": [8, 32, 32],
    "patch_size": [4, 8, 16],
    "hidden_size": 24,
    "mlp_dim": 48,
    "num_layers": 2,
    "num_heads": 2,
}
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """MONAI's ViT and the folder of its weights: not to be changed."""
    folder = tmp_path_factory.mktemp("published") / "m3d-clip-tiny"
    return build_encoder(folder, **TINY), folder


@pytest.fixture
def encoder(published, tmp_path):
    """A copy of the folder, to be changed."""
    return shutil.copytree(published[1], tmp_path / "encoder")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_tiny_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def converted(published, base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "model"
    report = convert_base(base, folder, preset="med_2e3", volume_encoder=published[1], progress=False)
    return folder, report


# --- parity with MONAI ---


@pytest.mark.parametrize("post_layernorm", [False, True])
def test_features_are_those_of_monai(published, post_layernorm):
    vit, folder = published
    values = torch.rand(2, 1, 8, 32, 32, generator=torch.Generator().manual_seed(1))
    model = load_encoder(folder, post_layernorm=post_layernorm)
    expected = reference(vit, values, post_layernorm)
    assert expected.std() > 0.5  # features of nearly zero would agree whatever happens
    features = run(model, values)
    assert features.shape == expected.shape == (2, 1 + 2 * 4 * 2, 24)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)
    for axis in (2, 3, 4):
        assert (run(model, values.flip(axis)) - expected).abs().max() > 1e-2


def test_three_windows_give_the_features_of_their_mean(published):
    vit, folder = published
    windows = torch.rand(1, 3, 8, 32, 32, generator=torch.Generator().manual_seed(2))
    expected = reference(vit, windows.mean(dim=1, keepdim=True), post_layernorm=False)
    torch.testing.assert_close(run(load_encoder(folder), windows), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("post_layernorm", [False, True])
def test_features_at_the_published_widths(tmp_path, post_layernorm):
    """All of M3D-CLIP's own numbers, which its config may leave out, but the number of layers."""
    vit = build_encoder(tmp_path / "encoder", num_layers=2).double()  # in float32 the order of sums tells, by CPU
    values = torch.rand(1, 1, 32, 256, 256, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = reference(vit, values, post_layernorm)
    features = run(load_encoder(tmp_path / "encoder", post_layernorm=post_layernorm).double(), values)
    assert features.shape == (1, 1 + 8 * 16 * 16, 768)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)  # the fold is kept in float32


def test_an_empty_config_is_that_of_the_published_encoder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "m3d_clip"}')
    fields = open_volume_encoder(tmp_path).fields
    assert CTMoEVolumeEncoderConfig(**fields).to_dict() == CTMoEVolumeEncoderConfig().to_dict()


def test_the_fold_is_computed_in_float32(encoder):
    edit_weights(encoder, lambda weights: weights.update({key: w.bfloat16() for key, w in weights.items()}))
    weights, _ = read(encoder)
    file = load_file(encoder / "model.safetensors")
    weight = file["vision_encoder.patch_embedding.patch_embeddings.1.weight"].double().view(24, 1, 4, 8, 16)
    expected = weight * torch.tensor(STD).double().view(3, 1, 1, 1) / 3
    torch.testing.assert_close(
        weights["embeddings.patch_embedding.weight"].double(), expected, rtol=1e-6, atol=0
    )  # bfloat16 keeps 3 digits
    assert weights["layers.0.mlp.fc1.weight"].dtype == torch.bfloat16


# --- conversion ---


def test_a_converted_model_has_the_encoder(converted, published, base):
    folder, report = converted
    vit, _ = published
    model = CTMoEForConditionalGeneration.from_pretrained(folder)
    processor = CTMoEProcessor.from_pretrained(folder)
    assert processor.image_processor.num_slices == 8
    config = model.config.volume_encoder_config
    assert (config.hidden_size, config.num_hidden_layers, config.grid_size) == (24, 2, (2, 4, 2))
    values = torch.rand(1, 1, 8, 32, 32, generator=torch.Generator().manual_seed(1))
    images = processor.image_processor
    features = run(model.model.volume_encoder, values, images.image_mean, images.image_std)
    torch.testing.assert_close(features, reference(vit, values, False), rtol=0, atol=1e-5)
    assert report.parity.max_abs_difference <= 1e-5
    assert "3D encoder" not in report.added_names
    assert "projector of the 3D encoder" in report.added_names


def test_every_tensor_of_the_encoder_is_kept_bit_for_bit_or_named_as_unread(converted, published):
    folder, report = converted
    file, kept = load_file(published[1] / "model.safetensors"), load_file(folder / "model.safetensors")
    encoder = {key: weight for key, weight in kept.items() if key.startswith("model.volume_encoder.")}
    added = {name for names in report.added_names.values() for name in names}
    assert report.reused.tensors + len(encoder) + len(added) == len(kept)
    assert report.volume_encoder.reused.tensors + report.volume_encoder.unread.tensors == len(file)
    assert report.volume_encoder.unread_names.keys() == {
        key for key in file if not key.startswith("vision_encoder.") or key.startswith("vision_encoder.norm.")
    }
    # Which tensor went where is not asked of the code under test: the values are random, so equal means the same one.
    copied = []
    for key, weight in file.items():
        if key not in report.volume_encoder.unread_names and ".patch_embeddings." not in key:
            copied += weight.chunk(3) if "qkv" in key else [weight]
    folded = [key for key in encoder if "patch_embedding." in key]
    assert sorted(map(content, copied)) == sorted(content(encoder[key]) for key in encoder if key not in folded)
    assert len(folded) == 2


def test_the_report_names_the_encoder(converted):
    folder, report = converted
    assert json.loads((folder / "conversion_report.json").read_text()) == json.loads(report.to_json())
    assert report.to_dict()["volume_encoder"]["encoder"] == "m3d-clip-tiny"
    text = str(report)
    for part in ("3D encoder m3d-clip-tiny\n", f"{report.volume_encoder.reused.tensors} tensors", "2 last norm"):
        assert part in text


def test_without_weights_the_encoder_is_named_among_the_added(base, tmp_path):
    tiny = {"num_slices": 8, "image_size": 32, "patch_size": [4, 8, 8], "hidden_size": 24, "num_attention_heads": 2}
    report = convert_base(
        base, tmp_path / "out", preset="med_2e3", volume_encoder_config=tiny, parity=False, progress=False
    )
    assert report.volume_encoder is None
    assert all(name.startswith("model.volume_encoder.") for name in report.added_names["3D encoder"])


def test_another_dtype_and_settings_that_the_weights_leave_open(published, base, tmp_path):
    settings = CTMoEVolumeEncoderConfig(
        **{**open_volume_encoder(published[1]).fields, "post_layernorm": True, "pool": [1, 2, 2]}
    )
    for name, given in {"object": settings, "dict": {"post_layernorm": True, "pool": (1, 2, 2)}}.items():
        report = convert_base(
            base,
            tmp_path / name,
            preset="med_2e3",
            volume_encoder=published[1],
            volume_encoder_config=given,
            dtype="bfloat16",
            parity=False,
            progress=False,
        )
        model = CTMoEForConditionalGeneration.from_pretrained(tmp_path / name)
        assert model.config.volume_encoder_config.pool == [1, 2, 2]
        assert not any("norm" in key for key in report.volume_encoder.unread_names)
        norm = load_file(published[1] / "model.safetensors")["vision_encoder.norm.weight"]
        assert torch.equal(model.model.volume_encoder.post_layernorm.weight, norm.bfloat16())


def test_cross_attention_that_monai_saves_and_never_runs_is_named_as_unread(published, encoder):
    vit, _ = published
    unused = {f"vision_encoder.{key}": weight for key, weight in vit.state_dict().items() if "cross_attn" in key}
    assert unused  # of the installed version
    unused["vision_encoder.blocks.0.cross_attn.to_q.weight"] = torch.ones(24, 24)  # of older ones
    edit_weights(encoder, lambda weights: weights.update(unused))
    weights, report = read(encoder)
    assert all("cross-attention" in report.unread_names[key] for key in unused)
    assert weights.keys() == read(published[1])[0].keys()


def test_a_hub_id_comes_with_its_commit(published, base, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache/models--someone--m3d-clip-tiny"
    shutil.copytree(published[1], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/v1").write_text(commit)
    names = {"volume_encoder": "someone/m3d-clip-tiny", "volume_encoder_revision": "v1"}
    report = convert_base(base, tmp_path / "out", preset="med_2e3", parity=False, progress=False, **names)
    assert (report.volume_encoder.encoder, report.volume_encoder.revision) == ("someone/m3d-clip-tiny", commit)
    assert f"3D encoder someone/m3d-clip-tiny at {commit}" in str(report)


def test_command_line(published, base, tmp_path):
    arguments = ["convert", base, tmp_path / "out", "--preset", "med_2e3", "--volume-encoder", published[1]]
    result = CliRunner().invoke(app, [*map(str, arguments), "--no-parity"])
    assert result.exit_code == 0
    assert "3D encoder m3d-clip-tiny" in result.stdout


# --- encoders and settings that do not fit ---


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hidden_size": 48}, "hidden_size is 48, and 24 with the weights of m3d-clip-tiny"),
        ({"patch_size": (4, 8, 8)}, r"patch_size is \(4, 8, 8\), and \[4, 8, 16\] with the weights"),
        ({"num_slices": 16}, "num_slices is 16, and 8 with"),
        ({"num_channels": 1}, "num_channels is 1, and 3 with"),
        (CTMoEVolumeEncoderConfig(), "hidden_size is 768, and 24 with"),
        ("large", "'large' is not a JSON object"),
    ],
)
def test_settings_that_contradict_the_weights(published, base, tmp_path, given, message):
    with pytest.raises(ConversionError, match=f"^volume_encoder_config: {message}"):
        convert_base(
            base,
            tmp_path / "out",
            preset="med_2e3",
            volume_encoder=published[1],
            volume_encoder_config=given,
            progress=False,
        )
    assert not list(tmp_path.iterdir())


def _bin_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_bin_only, r"but pytorch_model\.bin\. Only safetensors .*torch\.load\(.*weights_only=True"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: edit_config(folder, model_type="clip"), "model_type 'clip' is not supported. Supported: M3D"),
        (lambda folder: edit_config(folder, in_channels=3), "in_channels 3 is not supported"),
        (lambda folder: edit_config(folder, pos_embed="conv"), "pos_embed 'conv' is not supported"),
        (lambda folder: edit_config(folder, img_size=[8, 32, 64]), "slices of 32 x 64 are not supported"),
        (lambda folder: edit_config(folder, img_size=256), r"config\.json: not the config of an encoder"),
        (lambda folder: edit_config(folder, num_heads=0), r"config\.json: not the config of an encoder"),
        (lambda folder: edit_config(folder, hidden_size="wide"), r"config\.json: not the config of an encoder"),
        (lambda folder: edit_config(folder, num_heads=5), "hidden_size 24 is not a multiple of 5"),
        (lambda folder: edit_config(folder, mlp_dim=64), r"linear1\.weight: shape \[48, 24\] .* \[64, 24\]"),
        (lambda folder: edit_config(folder, num_layers=3), r"blocks\.2\.attn\.qkv\.weight: missing"),
        (lambda folder: edit_config(folder, num_layers=1), r"blocks\.1\..* without a place here"),
        (lambda folder: edit_weights(folder, lambda w: w.pop("vision_encoder.cls_token")), "cls_token: missing"),
        (
            lambda folder: edit_weights(folder, lambda w: w.update({"vision_encoder.pos": torch.ones(3)})),
            r"vision_encoder\.pos: a tensor of encoder without a place here",
        ),
        (
            lambda folder: edit_weights(
                folder, lambda w: w.update({"vision_encoder.blocks.0.attn.qkv.bias": torch.ones(72)})
            ),
            r"qkv\.bias: a tensor of encoder without a place here",
        ),
    ],
)
def test_an_encoder_that_does_not_fit_is_an_error_and_leaves_nothing(encoder, base, tmp_path, damage, message):
    damage(encoder)
    with pytest.raises(ConversionError, match=message) as error:
        convert_base(base, tmp_path / "deep/out", preset="med_2e3", volume_encoder=encoder, progress=False)
    assert error.value.remedy
    assert list(tmp_path.iterdir()) == [encoder]


def test_an_encoder_that_nothing_would_read(published, base, tmp_path):
    with pytest.raises(ModelError, match="the second encoder is read by TG-IS only"):
        convert_base(base, tmp_path / "out", volume_encoder=published[1], progress=False)
    with pytest.raises(ConversionError, match="volume_encoder_revision: given without a volume_encoder"):
        convert_base(base, tmp_path / "out", volume_encoder_revision="main", progress=False)
    names = {"volume_encoder": published[1], "volume_encoder_revision": "main"}
    with pytest.raises(ConversionError, match="a folder has no revision 'main'"):
        convert_base(base, tmp_path / "out", preset="med_2e3", progress=False, **names)
    assert not list(tmp_path.iterdir())


def build_encoder(folder, **sizes):
    """MONAI's ViT with random weights, and a folder of them as M3D-CLIP is published."""
    from monai.networks.nets import ViT  # seconds, so not before a test needs it

    defaults = {"img_size": [32, 256, 256], "patch_size": [4, 16, 16]}
    vit = ViT(1, **{**defaults, **sizes}, proj_type="perceptron", classification=True, spatial_dims=3).eval()
    del vit.classification_head  # M3D-CLIP has none, and so its ViT returns the normed tokens
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in vit.named_parameters():
            std = weight.shape[-1] ** -0.5 if weight.ndim == 2 else 0.3
            weight.normal_(float("norm" in name and name.endswith("weight")), std, generator=generator)
    width = sizes.get("hidden_size", 768)
    unread = {
        "language_encoder.embeddings.word_embeddings.weight": (30, width),
        "language_encoder.pooler.dense.bias": (width,),
        "mm_vision_proj.weight": (width, width),
        "mm_vision_proj.bias": (width,),
        "mm_language_proj.weight": (width, width),
        "mm_language_proj.bias": (width,),
        "logit_scale": (),
    }
    weights = {f"vision_encoder.{key}": w for key, w in vit.state_dict().items() if "cross_attn" not in key}
    folder.mkdir()
    save_file(weights | {name: torch.ones(shape) for name, shape in unread.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "m3d_clip", "in_channels": 1, **sizes}))
    return vit


@torch.no_grad()
def reference(vit, values, post_layernorm):
    """MONAI's features of (V, 1, depth, rows, columns) in [0, 1]."""
    normed, hidden_states = vit(values)
    return normed if post_layernorm else hidden_states[-1]


def read(folder, **settings):
    source = open_volume_encoder(folder)
    return read_volume_encoder(source, CTMoEVolumeEncoderConfig(**source.fields, **settings), MEAN, STD)


def load_encoder(folder, **settings):
    model = CTMoEVolumeEncoder(CTMoEVolumeEncoderConfig(**open_volume_encoder(folder).fields, **settings)).eval()
    model.load_state_dict(read(folder, **settings)[0])
    return model


@torch.no_grad()
def run(model, values, mean=MEAN, std=STD):
    """Our features of the same values, in one channel or three, normalised as the image processor does it."""
    mean, std = (torch.tensor(numbers).view(3, 1, 1, 1) for numbers in (mean, std))
    return model(((values - mean) / std).transpose(1, 2)).last_hidden_state


def content(tensor):
    return tensor.numpy().tobytes()


def edit_weights(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
