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
"""Conversion keeps every number of a base, accounts for every tensor, and leaves nothing behind when it cannot."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    LlavaForConditionalGeneration,
)

import ct_moe.hub.conversion
from ct_moe import (
    ConversionError,
    CTMoEConfig,
    CTMoEError,
    CTMoEForConditionalGeneration,
    CTMoEProcessor,
    ModelError,
)
from ct_moe.hub.conversion import convert_base
from ct_moe.hub.folder import save_folder
from ct_moe.hub.tensor_files import LazyTensor
from ct_moe.hub.tiny_base import build_tiny_base


@pytest.fixture(scope="module", params=["phi3", "llama"])
def pair(request, tmp_path_factory):
    """A base, its conversion and the report, for both language models."""
    folder = tmp_path_factory.mktemp(request.param)
    base = build_tiny_base(folder / "base", text_model=request.param)
    report = convert_base(base, folder / "converted", progress=False)
    return base, folder / "converted", report


@pytest.fixture(scope="module")
def phi3(tmp_path_factory):
    """A base and its conversion: not to be changed."""
    folder = tmp_path_factory.mktemp("phi3")
    base = build_tiny_base(folder / "base")
    convert_base(base, folder / "converted", parity=False, progress=False)
    return base, folder / "converted"


@pytest.fixture
def base(phi3, tmp_path):
    """A copy of the base, to be changed."""
    return shutil.copytree(phi3[0], tmp_path / "base")


# --- parity ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_converted_model_returns_the_base_logits(pair, dtype):
    """In every dtype: what is added adds zero, and the rest is computed in the same order."""
    folder, converted, report = pair
    inputs = _one_slice(folder)
    with torch.no_grad():
        expected = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)(**inputs).logits
        logits = _run_converted(CTMoEForConditionalGeneration.from_pretrained(converted, dtype=dtype), inputs)
    assert logits.dtype == dtype
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert report.parity.max_abs_difference <= 1e-5
    assert report.parity.max_abs_logit > 0.1  # logits of nearly zero would agree whatever happens


def test_parity_does_not_hold_for_another_image(pair):
    folder, converted, _ = pair
    inputs = _one_slice(folder)
    with torch.no_grad():
        expected = LlavaForConditionalGeneration.from_pretrained(folder)(**inputs).logits
        inputs["pixel_values"] = inputs["pixel_values"].flip(-1)
        logits = _run_converted(CTMoEForConditionalGeneration.from_pretrained(converted), inputs)
    assert (logits - expected).abs().max() > 1e-3


def test_a_conversion_that_changes_the_logits_is_an_error(base, tmp_path, monkeypatch):
    lazy_weights = ct_moe.hub.conversion.lazy_weights

    def damaged(*args):
        weights = lazy_weights(*args)
        name = "model.vision_tower.layers.1.self_attn.q_proj.bias"
        shape, dtype, read = weights[name]
        weights[name] = LazyTensor(shape, dtype, lambda: read() + 0.1)
        return weights

    monkeypatch.setattr(ct_moe.hub.conversion, "lazy_weights", damaged)
    with pytest.raises(ConversionError, match=r"differ from the base's by .* more than 1e-05"):
        convert_base(base, tmp_path / "out", progress=False)
    assert _names(tmp_path) == ["base"]


# Widths of CLIP ViT-L/14-336, Phi-3-mini and Llama-7B (of LLaVA 1.5); few layers.
CLIP_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "projection_dim": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
REAL_WIDTHS = {
    "phi3": {"hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 32},
    "llama": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32},
}


@pytest.mark.slow
@pytest.mark.parametrize(("text_model", "dtype"), [("phi3", torch.float32), ("llama", torch.bfloat16)])
def test_parity_at_real_widths(tmp_path, text_model, dtype):
    text = {**REAL_WIDTHS[text_model], "vocab_size": 32064, "num_hidden_layers": 1}
    base = build_tiny_base(tmp_path / "base", text_model=text_model, vision=CLIP_LARGE, text=text, dtype=dtype)
    report = convert_base(base, tmp_path / "out", progress=False)
    print(report)
    inputs = _one_slice(base)
    with torch.no_grad():
        expected = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)(**inputs).logits
        model = CTMoEForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32)
        logits = _run_converted(model, inputs)
    assert model.config.vision_config.moe_layers  # of the three layers that are read, two are volume layers
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert report.parity.max_abs_difference <= 1e-5
    assert report.parity.max_abs_logit > 1


# --- every tensor accounted for ---


def test_every_tensor_of_the_files_is_kept_bit_for_bit_or_named_as_unread(pair):
    folder, converted, report = pair
    files, kept = load_file(folder / "model.safetensors"), load_file(converted / "model.safetensors")
    added = {name for names in report.added_names.values() for name in names}
    assert report.reused.tensors + report.unread.tensors == len(files)
    assert report.unread_names.keys() == {
        key for key in files if "encoder.layers.3." in key or "post_layernorm" in key
    }
    # Which tensor went where is not asked of the code under test: the values are random, so equal means the same one.
    read = {key: tensor for key, tensor in files.items() if key not in report.unread_names}
    assert Counter(map(_fingerprint, read.values())) == Counter(
        _fingerprint(tensor) for key, tensor in kept.items() if key not in added
    )
    assert len(kept) == len(read) + len(added)
    assert report.reused.bytes == sum(tensor.nbytes for tensor in read.values())
    assert report.unread.parameters == sum(files[key].numel() for key in report.unread_names)
    assert report.added.bytes == sum(kept[key].nbytes for key in added)


def test_the_base_itself_never_reads_what_is_named_as_unread(pair):
    folder, _, report = pair
    inputs = _one_slice(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        expected = model(**inputs).logits
        for key in report.unread_names:
            name = key.replace("vision_tower.", "model.vision_tower.")
            model.get_parameter(name).fill_(torch.nan)
        assert torch.equal(model(**inputs).logits, expected)


def test_a_tower_read_to_its_last_layer_leaves_only_the_post_layernorm(base, tmp_path):
    _edit_config(base, vision_feature_layer=-1)
    report = convert_base(base, tmp_path / "out", progress=False)
    assert {key.split(".")[1] for key in report.unread_names} == {"post_layernorm"}
    assert report.parity.max_abs_difference <= 1e-5


def test_a_feature_layer_counted_from_the_front(base, tmp_path):
    _edit_config(base, vision_feature_layer=2)
    report = convert_base(base, tmp_path / "out", progress=False)
    assert report.unread.tensors == 2 * 16 + 2
    assert report.parity.max_abs_difference <= 1e-5


@pytest.mark.parametrize("layout", ["original", "library", "modules"])
def test_every_layout_of_the_files_gives_the_same_model(phi3, base, tmp_path, layout):
    weights = load_file(base / "model.safetensors")
    save_file({_rename(key, layout): tensor for key, tensor in weights.items()}, base / "model.safetensors")
    LlavaForConditionalGeneration.from_pretrained(base)  # a layout the library reads
    convert_base(base, tmp_path / "out", parity=False, progress=False)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (phi3[1] / "model.safetensors").read_bytes()


def test_sharded_files(phi3, base, tmp_path):
    _shard(base)
    convert_base(base, tmp_path / "out", parity=False, progress=False)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (phi3[1] / "model.safetensors").read_bytes()


def test_stored_buffers_are_named_as_unread(base, tmp_path):
    buffers = {
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None],
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16),
    }
    _edit_weights(base, lambda weights: weights.update(buffers))
    report = convert_base(base, tmp_path / "out", parity=False, progress=False)
    assert all("buffer" in report.unread_names[key] for key in buffers)


def test_tied_embeddings(tmp_path):
    base = build_tiny_base(tmp_path / "base", text={"tie_word_embeddings": True})
    report = convert_base(base, tmp_path / "out", progress=False)
    assert report.parity.max_abs_difference <= 1e-5
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")

    def add_head(weights):
        weights["language_model.lm_head.weight"] = weights["language_model.model.embed_tokens.weight"].clone()

    _edit_weights(base, add_head)
    report = convert_base(base, tmp_path / "with_head", progress=False)
    assert "tied" in report.unread_names["language_model.lm_head.weight"]
    _edit_weights(base, lambda weights: weights["language_model.lm_head.weight"].add_(1))
    with pytest.raises(ConversionError, match=r"lm_head\.weight: differs from the input embeddings"):
        convert_base(base, tmp_path / "other_head", progress=False)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda w: w.update({"image_newline": torch.ones(128)}),
            "image_newline: .* fits nowhere in CT-MoE, as LLaVA",
        ),
        (
            lambda w: w.update({"vision_tower.encoder.layers.4.mlp.fc1.bias": torch.ones(128)}),
            r"layers\.4\.mlp\.fc1\.bias: .* fits nowhere",
        ),
        (
            lambda w: w.pop("multi_modal_projector.linear_2.weight"),
            r"multi_modal_projector\.linear_2\.weight: no tensor of the base's files",
        ),
        (lambda w: w.pop("language_model.lm_head.weight"), r"lm_head\.weight: no tensor"),
        (
            lambda w: w.update({"vision_tower.encoder.layers.0.mlp.fc1.bias": torch.ones(7)}),
            r"layers\.0\.mlp\.fc1\.bias: shape \[7\] .* \[128\]",
        ),
        (
            lambda w: w.update({"lm_head.weight": w["language_model.lm_head.weight"].clone()}),
            "a second tensor of the base for lm_head.weight",
        ),
        (
            lambda w: w.update({"language_model.lm_head.weight": torch.ones(1024, 128, dtype=torch.int8)}),
            "I8 numbers",
        ),
    ],
    ids=["foreign", "beyond the tower", "missing", "missing head", "shape", "twice", "quantised"],
)
def test_a_tensor_without_its_place_is_an_error(base, tmp_path, edit, message):
    _edit_weights(base, edit)
    with pytest.raises(ConversionError, match=message):
        convert_base(base, tmp_path / "out", progress=False)
    assert _names(tmp_path) == ["base"]


# --- bases that cannot be converted ---

_ONLY = "is not supported. Supported of LLaVA: clip_vision_model or siglip_vision_model with phi3 or llama"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llava_next"}, "model_type 'llava_next' is not supported. The nearest that is: LLaVA. Suppor"),
        ({"model_type": "xyz"}, "model_type 'xyz' is not supported. Supported: LLaVA; LLaVA-OneVision; Phi-3-V"),
        ({"vision_config": {"model_type": "siglip2_vision_model"}}, f"vision tower 'siglip2_vision_model' {_ONLY}"),
        ({"text_config": {"model_type": "bert"}}, f"language model 'bert' {_ONLY}"),
        ({"text_config": {"model_type": "no_such_model"}}, f"language model 'no_such_model' {_ONLY}"),
        ({"vision_feature_layer": [-2, -5]}, rf"vision_feature_layer \[-2, -5\] {_ONLY}"),
        ({"vision_feature_select_strategy": "full"}, f"vision_feature_select_strategy 'full' {_ONLY}"),
    ],
)
def test_an_unsupported_kind_is_refused_by_name_with_what_is_supported(base, tmp_path, change, message):
    _edit_config(base, **change)
    with pytest.raises(ConversionError, match=message):
        convert_base(base, tmp_path / "out", progress=False)
    assert _names(tmp_path) == ["base"]


def _bin_only(base):
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


def _without_a_shard(base):
    _shard(base)
    next(base.glob("model-00002*")).unlink()


def _index_of_another_model(base):
    _shard(base)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    del index["weight_map"]["multi_modal_projector.linear_1.bias"]
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda base: (base / "config.json").unlink(), "no config.json"),
        (lambda base: (base / "config.json").rename(base / "adapter_config.json"), "adapter weights only"),
        (lambda base: (base / "config.json").write_text("{"), r"config\.json: not JSON"),
        (lambda base: _edit_config(base, vision_config={"hidden_size": "wide"}), r"config\.json: not a llava config"),
        (lambda base: _edit_config(base, image_token_index=1024), "image_token_index 1024 is outside"),
        (lambda base: _edit_config(base, image_token_index=1023, text_config={"vocab_size": 2048}), "shape"),
        (lambda base: _edit_config(base, image_token_index=5), "image_token_index 5 .* none of its added tokens"),
        (lambda base: _edit_config(base, projector_hidden_act="relu7"), "unknown activation 'relu7'"),
        (lambda base: _edit_config(base, vision_feature_layer=True), "vision_feature_layer True is not supported"),
        (
            lambda base: (base / "config.json").write_text('{"model_type": "llava", "text_config": 1}'),
            "text_config is",
        ),
        (lambda base: _edit_config(base, quantization_config={"load_in_4bit": True}), "quantised"),
        (lambda base: (base / "model.safetensors").unlink(), "no model.safetensors and no .*index.json"),
        (_bin_only, r"but pytorch_model\.bin\. Only safetensors"),
        (lambda base: (base / "model.safetensors").write_bytes(b"x" * 100), "not a safetensors file"),
        (_without_a_shard, r"model-00002-of-00002\.safetensors: listed in .* missing"),
        (_index_of_another_model, r"multi_modal_projector\.linear_1\.bias: named only in the files"),
        (lambda base: (base / "processor_config.json").write_text("{}"), "image_mean and image_std"),
        (lambda base: (base / "chat_template.jinja").unlink(), "chat_template: the base has none"),
        (lambda base: (base / "chat_template.jinja").write_text("{{ bos_token }}"), "does not write a question"),
        (lambda base: (base / "chat_template.jinja").write_text("{{ 1 / 0 }}"), "does not write a question"),
        (lambda base: (base / "tokenizer.json").unlink(), "no tokenizer that loads"),
        (lambda base: (base / "tokenizer.json").write_text("{}"), "no tokenizer that loads"),
        (lambda base: (base / "generation_config.json").write_text("["), r"generation_config\.json: not JSON"),
        (lambda base: (base / "generation_config.json").write_text('{"temperature": 0.5}'), "generation_config.json"),
    ],
)
def test_a_damaged_base_is_an_error_and_leaves_nothing(base, tmp_path, damage, message):
    damage(base)
    with pytest.raises(ConversionError, match=message) as error:
        convert_base(base, tmp_path / "deep/out", progress=False)
    assert error.value.remedy
    assert _names(tmp_path) == ["base"]


@pytest.mark.parametrize("missing", ["no/such/folder", "/no/such/folder", "./none"])
def test_a_missing_folder(tmp_path, missing):
    with pytest.raises(ConversionError, match="no such folder"):
        convert_base(missing, tmp_path / "out", progress=False)
    assert _names(tmp_path) == []


def test_an_output_folder_that_holds_something(phi3, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("keep")
    with pytest.raises(ModelError, match="not an empty folder"):
        convert_base(phi3[0], tmp_path / "out", progress=False)
    assert _names(tmp_path / "out") == ["mine.txt"]


def test_an_empty_output_folder_is_filled(phi3, tmp_path):
    (tmp_path / "out").mkdir()
    convert_base(phi3[0], tmp_path / "out", parity=False, progress=False)
    assert "config.json" in _names(tmp_path / "out")


# --- the Hub ---


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def test_a_hub_id_offline_comes_from_the_cache(phi3, hub_cache, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = hub_cache / "models--someone--llava-tiny"
    shutil.copytree(phi3[0], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    report = convert_base("someone/llava-tiny", tmp_path / "out", parity=False, progress=False)
    assert (report.base, report.revision) == ("someone/llava-tiny", commit)
    assert f"someone/llava-tiny at {commit}" in str(report)


def test_a_hub_id_that_is_not_there(hub_cache, tmp_path):
    with pytest.raises(ConversionError, match="someone/nothing: no folder of that name, and the Hub did not give it"):
        convert_base("someone/nothing", tmp_path / "out", progress=False)


def test_a_folder_has_no_revision(phi3, tmp_path):
    with pytest.raises(ConversionError, match="a folder has no revision 'main'"):
        convert_base(phi3[0], tmp_path / "out", revision="main", progress=False)


# --- settings ---


def test_converting_twice_gives_identical_files(pair, tmp_path):
    folder, converted, _ = pair
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    convert_base(folder, tmp_path / "again", progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    _assert_same_files(converted, tmp_path / "again")


def test_bfloat16_stays_bfloat16(tmp_path):
    base = build_tiny_base(tmp_path / "base", dtype=torch.bfloat16)
    report = convert_base(base, tmp_path / "out", progress=False)
    assert report.dtype == "bfloat16"
    assert report.parity.max_abs_difference <= 1e-5
    assert {tensor.dtype for tensor in load_file(tmp_path / "out/model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_another_dtype_on_request(phi3, tmp_path, dtype):
    report = convert_base(phi3[0], tmp_path / "out", dtype=dtype, progress=False)
    assert report.dtype == str(dtype).removeprefix("torch.")
    assert report.parity.max_abs_difference <= 1e-5
    assert report.reused.bytes == 4 * report.reused.parameters  # counted in the base's files


@pytest.mark.parametrize("dtype", ["int8", "half precision", torch.int64])
def test_a_dtype_that_is_none(phi3, tmp_path, dtype):
    with pytest.raises(ConversionError, match="cannot be used"):
        convert_base(phi3[0], tmp_path / "out", dtype=dtype)


def test_overrides_reach_both_configs_and_the_processor(phi3, tmp_path):
    report = convert_base(
        phi3[0], tmp_path / "out", progress=False, tasks=["report", "vqa"], pool=[1, 2, 2], num_experts=2
    )
    model = CTMoEForConditionalGeneration.from_pretrained(tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert model.config.tasks == processor.tasks == ["report", "vqa"]
    assert model.config.pool == processor.pool == [1, 2, 2]
    assert model.config.vision_config.num_experts == 2
    assert report.parity.max_abs_difference <= 1e-5


def test_how_scans_become_slices_is_set_with_the_rest(phi3, tmp_path):
    settings = {"slab_mm": 3.0, "max_slices": 8, "slab_reduction": ("mean", "max", "mean"), "intensity": "display"}
    convert_base(phi3[0], tmp_path / "out", progress=False, parity=False, num_experts=2, **settings)
    images = CTMoEProcessor.from_pretrained(tmp_path / "out").image_processor
    assert {name: getattr(images, name) for name in settings} == settings
    assert images.size["height"] == CTMoEConfig.from_pretrained(tmp_path / "out").vision_config.image_size


def test_a_dense_model(phi3, tmp_path):
    report = convert_base(phi3[0], tmp_path / "out", progress=False, moe_layers=[])
    assert list(report.added_names) == ["scale embedding"]
    assert report.parity.max_abs_difference <= 1e-5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"intensity": "raw"}, "intensity: 'raw' is unknown"),
        ({"hidden_size": 32}, "hidden_size: not a field that a conversion can set. Set one of .*num_experts"),
        ({"experts": 4}, "experts: not a field"),
        ({"num_experts": "four"}, "num_experts"),
        ({"num_experts": 0}, "must all be at least 1"),
        ({"pool": [2, 2]}, "not three positive numbers"),
    ],
)
def test_an_override_that_is_none(phi3, tmp_path, override, message):
    with pytest.raises(CTMoEError, match=message):
        convert_base(phi3[0], tmp_path / "out", progress=False, **override)
    assert _names(tmp_path) == []


# --- chat templates ---

TEXT_ONLY = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
BLOCKS_ONLY = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% for block in message['content'] %}"
    "{% if block['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ block['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "change", "expected"),
    [
        (TEXT_ONLY, ", with blocks turned into strings", "<|user|>\n<image>\nWhat is this?<|end|>\n"),
        (BLOCKS_ONLY, ", with strings turned into blocks", "user: <image>\nWhat is this?"),
    ],
    ids=["strings", "blocks"],
)
def test_a_template_of_one_kind_of_content_learns_the_other(base, tmp_path, template, change, expected):
    (base / "chat_template.jinja").write_text(template)
    report = convert_base(base, tmp_path / "out", parity=False, progress=False)
    assert report.chat_template == f"the base's own{change}"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    blocks = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    for content in (blocks, "<image>\nWhat is this?"):
        assert tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False) == expected


def test_the_template_of_an_older_processor(base, tmp_path):
    (base / "chat_template.jinja").unlink()
    (base / "chat_template.json").write_text(json.dumps({"chat_template": BLOCKS_ONLY}))
    convert_base(base, tmp_path / "out", parity=False, progress=False)
    assert (tmp_path / "out/chat_template.jinja").read_text().endswith(BLOCKS_ONLY)


def test_a_template_of_the_caller(phi3, tmp_path):
    report = convert_base(phi3[0], tmp_path / "out", parity=False, progress=False, chat_template=TEXT_ONLY)
    assert report.chat_template == "the caller's own, with blocks turned into strings"
    assert (tmp_path / "out/chat_template.jinja").read_text().endswith(TEXT_ONLY)


# --- the folder ---


def test_the_folder_holds_all_there_is_to_run_it(phi3):
    base, converted = phi3
    package = {path.name for path in Path(ct_moe.__file__).parent.glob("*_ct_moe.py")}
    assert set(_names(converted)) == package | {
        "base",
        "chat_template.jinja",
        "config.json",
        "conversion_report.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((converted / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_ct_moe.CTMoEForConditionalGeneration"
    assert config["custom_pipelines"]["ct-report"]["impl"] == "pipeline_ct_moe.CTReportPipeline"
    assert GenerationConfig.from_pretrained(converted) == GenerationConfig.from_pretrained(base)
    assert str(base.parent) not in "".join(path.read_text() for path in converted.glob("*.json"))


def test_loads_without_the_package_with_the_same_logits(phi3, tmp_path):
    base, converted = phi3
    inputs = _one_slice(base)
    torch.save(inputs, tmp_path / "inputs.pt")
    code = """
import sys
sys.modules["ct_moe"] = None  # any import of the package fails
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, pipeline
from transformers import AutoModel, AutoModelForImageTextToText

folder, inputs = sys.argv[1], torch.load(sys.argv[2] + "/inputs.pt")
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "ct_moe"
assert type(AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)).__name__ == "CTMoEImageProcessor"
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(processor).__name__ == "CTMoEProcessor" and processor.chat_template
assert type(processor.image_processor).__name__ == "CTMoEImageProcessor"
reporter = pipeline(model=folder, trust_remote_code=True)
assert (type(reporter).__name__, reporter.task) == ("CTReportPipeline", "ct-report")
logits = []
for auto_class in (AutoModel, AutoModelForImageTextToText):
    model = auto_class.from_pretrained(folder, trust_remote_code=True)
    assert model.can_generate()
    model.config.pool = [1, 1, 1]
    with torch.no_grad():
        logits.append(model(inputs["input_ids"], pixel_values=inputs["pixel_values"][:, None]).logits)
torch.save(logits, sys.argv[2] + "/logits.pt")
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-c", code, converted, tmp_path], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    with torch.no_grad():
        expected = _run_converted(AutoModelForImageTextToText.from_pretrained(converted), inputs)
    for logits in torch.load(tmp_path / "logits.pt"):
        assert torch.equal(logits, expected)


def test_save_load_and_save_again_gives_identical_files(phi3, tmp_path):
    _, converted = phi3
    model = CTMoEForConditionalGeneration.from_pretrained(converted)
    save_folder(model, AutoProcessor.from_pretrained(converted), tmp_path / "again")
    of_conversion = set(_names(converted)) - set(_names(tmp_path / "again"))
    assert of_conversion == {"base", "conversion_report.json"}
    _assert_same_files(converted, tmp_path / "again", without=of_conversion)


def test_save_folder_refuses_to_mix_with_other_files(phi3, tmp_path):
    model = CTMoEForConditionalGeneration.from_pretrained(phi3[1])
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ModelError, match="not an empty folder"):
        save_folder(model, AutoProcessor.from_pretrained(phi3[1]), tmp_path)


# --- the report ---


def test_report_in_words_and_as_json(pair):
    _, converted, report = pair
    assert json.loads((converted / "conversion_report.json").read_text()) == json.loads(report.to_json())
    assert report.to_dict()["parity"]["limit"] == 1e-5
    assert report.kind == {"model": "llava", "vision": "clip_vision_model", "text": report.kind["text"]}
    assert report.added_names.keys() == {
        "scale embedding",
        "experts",
        "expert routers",
        "guide encoder",
        "task router",
    }
    text = str(report)
    for part in (f"{report.reused.tensors} tensors", "above feature layer -2", "largest logit difference", "torch "):
        assert part in text


def test_parity_that_was_not_measured_is_said_so(phi3, tmp_path):
    report = convert_base(phi3[0], tmp_path / "out", parity=False, progress=False)
    assert report.to_dict()["parity"] == "not measured"
    assert "not measured" in str(report)


def test_progress_goes_to_stderr_and_can_be_switched_off(phi3, tmp_path, capfd):
    convert_base(phi3[0], tmp_path / "quiet", parity=False, progress=False)
    assert capfd.readouterr() == ("", "")
    convert_base(phi3[0], tmp_path / "shown", parity=False)
    out, err = capfd.readouterr()
    assert out == ""
    assert "writing model.safetensors" in err


def _one_slice(base):
    """A question about one random slice, tokenized as the base does it."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = json.loads((base / "config.json").read_text())
    size, patch = model["vision_config"]["image_size"], model["vision_config"]["patch_size"]
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there a nodule?"}]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    input_ids = tokenizer(text.replace("<image>", "<image>" * (size // patch) ** 2), return_tensors="pt").input_ids
    generator = torch.Generator().manual_seed(3)
    return {"input_ids": input_ids, "pixel_values": torch.randn(1, 3, size, size, generator=generator)}


def _run_converted(model, inputs):
    model.config.pool = [1, 1, 1]
    return model(inputs["input_ids"], pixel_values=inputs["pixel_values"][:, None]).logits


def _fingerprint(tensor):
    return tuple(tensor.shape), tensor.double().sum().item(), tensor.flatten()[:4].tolist().__repr__()


def _rename(key, layout):
    if layout == "original":  # of the library's releases before 4.52
        return key.replace("vision_tower.", "vision_tower.vision_model.")
    if layout == "modules":  # of the modules in memory
        key = key.replace("language_model.lm_head", "lm_head").replace("language_model.model.", "language_model.")
        return key if key.startswith("lm_head") else f"model.{key}"
    return key


def _shard(base):
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    keys = sorted(weights)
    files = {"model-00001-of-00002.safetensors": keys[::2], "model-00002-of-00002.safetensors": keys[1::2]}
    for name, part in files.items():
        save_file({key: weights[key] for key in part}, base / name)
    weight_map = {key: name for name, part in files.items() for key in part}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _edit_weights(base, edit):
    weights = load_file(base / "model.safetensors")
    edit(weights)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


def _edit_config(base, **changes):
    path = base / "config.json"
    config = json.loads(path.read_text())
    for name, value in changes.items():
        config[name] = {**config[name], **value} if isinstance(config.get(name), dict) else value
    path.write_text(json.dumps(config))


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def _assert_same_files(one, other, without=()):
    files = [
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (Path(one), Path(other))
    ]
    files = [{name: data for name, data in some.items() if name.parts[0] not in without} for some in files]
    assert files[0].keys() == files[1].keys()
    for name, data in files[0].items():
        assert data == files[1][name], name


def test_the_paper_like_preset_has_one_wide_expert_per_task(phi3, tmp_path):
    base, _ = phi3
    report = convert_base(base, tmp_path / "out", preset="paper_like", pool=[1, 2, 2], progress=False)
    assert report.parity.max_abs_difference <= 1e-5
    model = CTMoEForConditionalGeneration.from_pretrained(tmp_path / "out")
    config = model.config.vision_config
    assert model.config.tasks == ["report", "vqa"]
    assert model.config.pool == [1, 2, 2]
    (moe,) = [layer.moe for layer in model.model.vision_tower.layers if layer.moe is not None]
    assert moe.experts.up_proj.shape == (config.num_experts + 2, config.intermediate_size, config.hidden_size)
    assert moe.group_router is None
    with pytest.raises(ConversionError, match="preset"):
        convert_base(base, tmp_path / "other", preset="tiny", progress=False)
