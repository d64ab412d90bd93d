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
"""Every family of bases: the base's own forward and generation on one slice, every tensor kept, both stages."""

import json

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, build_dinov2, build_family
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.modeling_outputs import CausalLMOutput

from ct_moe import ConversionError, CTMoEConfig, CTMoEForConditionalGeneration, CTMoEProcessor, CTReportPipeline
from ct_moe.hub.base_model import open_base
from ct_moe.hub.conversion import convert_base
from ct_moe.hub.tensor_mapping import change_back
from ct_moe.hub.unconversion import unconvert
from ct_moe.trainers import CTMoEDataCollator
from ct_moe.trainers.recipe import Stage1Config, Stage2Config
from ct_moe.trainers.rows import ROW_FEATURES
from ct_moe.trainers.two_stage import train_stage


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """Name, base, conversion and report of a tiny checkpoint; the base of DINOv2 is two folders."""
    folder = tmp_path_factory.mktemp("family")
    if request.param == "dinov2":
        base, tower = build_dinov2(folder / "base")
        report = convert_base(base, folder / "converted", vision_tower=tower, progress=False)
        return request.param, [base, tower], folder / "converted", report
    base = build_family(request.param, folder / "base")
    # Two windows of 4 patches along a side, and a grid of 4 patches that the learned one of 6 is resampled to.
    size = {"qwen2_5_vl": {"image_size": 112}, "qwen3_vl": {"image_size": 64}}.get(request.param, {})
    report = convert_base(base, folder / "converted", progress=False, **size)
    return request.param, [base], folder / "converted", report


@pytest.fixture(scope="module")
def inputs(pair):
    """One slice in a prompt: for the base's forward pass, and for the conversion."""
    _, folders, converted, _ = pair
    config = CTMoEConfig.from_pretrained(converted)
    config.pool = [1, 1, 1]
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(5, 500, (1, 9), generator=generator)
    places = torch.full((1, config.num_visual_tokens(1)), config.image_token_id)
    input_ids = torch.cat([words[:, :3], places, words[:, 3:]], dim=1)
    size = config.vision_config.image_size
    pixels = torch.randn(1, 3, size, size, generator=generator)
    source = open_base(folders[0], None, *folders[1:])
    if source.family.run_base is not None:
        base = PublishedForward(source, converted, pixels)
        theirs = {"input_ids": input_ids}
    else:
        base = AutoModelForImageTextToText.from_pretrained(folders[0])
        theirs = {"input_ids": input_ids, **source.family.base_inputs(pixels, input_ids, base.config)}
    return theirs, {"input_ids": input_ids, "pixel_values": pixels[:, None]}, base


class PublishedForward:
    """A base without a class in the library, or of two checkpoints."""

    def __init__(self, source, converted, pixels):
        self.source, self.given = source, (pixels, source.tower_folder, converted)

    def __call__(self, input_ids):
        folder, config = self.source.folder, self.source.config
        return CausalLMOutput(
            logits=self.source.family.run_base(folder, config, torch.float32, input_ids, *self.given)
        )

    @torch.no_grad()
    def generate(self, input_ids, attention_mask, max_new_tokens, eos_token_id, **settings):
        for _ in range(max_new_tokens):  # without a cache
            logits = self(input_ids).logits[:, -1]
            logits[:, eos_token_id] = -torch.inf
            input_ids = torch.cat([input_ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
        return input_ids


def converted_model(folder) -> CTMoEForConditionalGeneration:
    model = CTMoEForConditionalGeneration.from_pretrained(folder)
    model.config.pool = [1, 1, 1]
    return model


def test_logits_are_the_base_s(pair, inputs):
    theirs, ours, base = inputs
    with torch.no_grad():
        expected = base(**theirs).logits
        logits = converted_model(pair[2])(**ours).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert expected.abs().max() > 0.1
    ours = {**ours, "pixel_values": ours["pixel_values"].flip(-1)}
    with torch.no_grad():
        assert (converted_model(pair[2])(**ours).logits - expected).abs().max() > 1e-3


def test_twenty_generated_tokens_are_the_base_s(pair, inputs):
    theirs, ours, base = inputs
    model = converted_model(pair[2])
    settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    settings["eos_token_id"] = model.generation_config.eos_token_id
    theirs, ours = ({**given, "attention_mask": torch.ones_like(given["input_ids"])} for given in (theirs, ours))
    expected = base.generate(**theirs, **settings)
    assert torch.equal(model.generate(**ours, **settings), expected)
    assert expected.shape[1] == theirs["input_ids"].shape[1] + 20


def test_every_tensor_is_kept_bit_for_bit_or_named(pair):
    _, folders, converted, report = pair
    theirs = load_file(folders[0] / "model.safetensors")
    for tower in folders[1:]:
        theirs |= {f"vision_tower.{key}": tensor for key, tensor in load_file(tower / "model.safetensors").items()}
    unseen = load_file(converted / "model.safetensors")
    for key, tensor in theirs.items():
        if key in report.unread_names:
            continue
        where = report.reused_names[key]
        kept = unseen.pop(where)
        assert torch.equal(change_back(kept, report.changes.get(key, ""), tuple(tensor.shape)), tensor), key
    assert sorted(unseen) == sorted(name for names in report.added_names.values() for name in names)


def test_unconverting_a_conversion_gives_the_base_bit_for_bit(pair, tmp_path):
    _, folders, converted, report = pair
    back = unconvert(converted, tmp_path / "back")
    assert (back.tensors, back.unread) == (len(report.reused_names), len(report.unread_names))
    assert sorted(back.left) == sorted(name for names in report.added_names.values() for name in names)
    parts = [""] if len(folders) == 1 else ["language_model", "vision_tower"]
    places = [tmp_path / "back" / part for part in parts]
    for folder, place in zip(folders, places):
        written = {path.name: path.read_bytes() for path in place.iterdir()}
        assert written == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_base_s_picture_settings_and_prompt_are_taken_over(pair):
    name, _, converted, report = pair
    processor = CTMoEProcessor.from_pretrained(converted)
    assert processor.image_processor.image_mean == (0.4, 0.5, 0.6)
    assert processor.image_processor.size["height"] == {"qwen2_5_vl": 112, "qwen3_vl": 64}.get(name, 56)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there a nodule?"}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    expected = {
        "gemma3": "<|user|>\n\n\n<start_of_image><image_soft_token><end_of_image>\n\n\nIs there a nodule?<|end|>\n",
        "internvl with rms norms": "<|user|>\n<img><IMG_CONTEXT></img>\nIs there a nodule?<|end|>\n",
        "internvl": "<|user|>\n<img><IMG_CONTEXT></img>\nIs there a nodule?<|end|>\n",
        "phi3_v": "<|user|>\n<|image|>\nIs there a nodule?<|end|>\n",
        "paligemma": "<image>Is there a nodule?\n",
        **dict.fromkeys(
            ("qwen2_5_vl", "qwen3_vl"),
            "<|user|>\n<|vision_start|><|image_pad|><|vision_end|>\nIs there a nodule?<|end|>\n",
        ),
    }.get(name, "<|user|>\n<image>\nIs there a nodule?<|end|>\n")
    assert prompt.startswith(expected)
    assert ("family" in report.chat_template) == (name == "paligemma")


def test_a_real_scan_is_reported(pair, test_data):
    _, _, converted, _ = pair
    model = AutoModelForImageTextToText.from_pretrained(converted)
    reporter = CTReportPipeline(model, processor=AutoProcessor.from_pretrained(converted))
    scan = test_data / "totalseg" / "example_ct_sm.nii.gz"
    result = reporter(str(scan), max_new_tokens=8, min_new_tokens=8)
    assert result["num_slices"] > 1
    assert result["task"] == "report"
    assert reporter(str(scan), question="Is there a nodule?", max_new_tokens=4)["task"] in model.config.tasks


@pytest.mark.filterwarnings(r"ignore:`(is_)?gradient_checkpointing\w*` is deprecated:FutureWarning")
def test_both_stages_train_and_lead_back_to_the_base(pair, tmp_path, test_data):
    name, folders, converted, _ = pair
    scan = str(test_data / "totalseg" / "example_ct_sm.nii.gz")
    rows = [
        {
            "images": [scan],
            "prompt": [{"role": "user", "content": "Write a report."}],
            "completion": [{"role": "assistant", "content": f"Report {number}."}],
            "task": task,
            "row": number,
        }
        for number, task in enumerate(("report", "vqa_closed", "vqa_open", "report"), 1)
    ]
    rows = Dataset.from_list(rows, features=ROW_FEATURES)
    settings = {
        "use_cpu": True,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_num_workers": 0,
        "disable_tqdm": True,
        "generate_samples": 0,
        "train_language_model": "full",
        "activation_checkpointing": False,
    }
    quiet = {"say": lambda line: None}
    first = Stage1Config(output_dir=str(tmp_path / "1"), **settings)
    train_stage(str(converted), first, rows, tmp_path / "stage1", **quiet)
    second = Stage2Config(output_dir=str(tmp_path / "2"), **settings)
    folder = train_stage(str(tmp_path / "stage1"), second, rows, tmp_path / "stage2", **quiet)
    before, after = (load_file(path / "model.safetensors") for path in (converted, folder))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    for part in ("multi_modal_projector", "vision_tower.layers", ".moe.", "language_model"):
        assert any(part in name for name in changed), part
    assert "model.language_model.embed_tokens.weight" not in changed
    # Back in the base's own format: what was trained is there, and its own class runs it.
    report = unconvert(folder, tmp_path / "back")
    assert not report.recast
    place = tmp_path / "back" / ("language_model" if name == "dinov2" else "")
    theirs, back = load_file(folders[0] / "model.safetensors"), load_file(place / "model.safetensors")
    assert theirs.keys() == back.keys()
    assert any(not torch.equal(theirs[key], back[key]) for key in theirs if "layers" in key)
    if name == "dinov2":
        AutoModelForCausalLM.from_pretrained(place)
    elif name != "phi3_v":
        _, loading = AutoModelForImageTextToText.from_pretrained(place, output_loading_info=True)
        assert not loading["missing_keys"]


def _add_unknown(weights, folder):
    weights["model.unknown.weight"] = torch.ones(3)
    return "unknown.weight.*fits nowhere"


def _take_away(weights, folder):
    del weights[next(key for key in weights if "layers.1." in key and key.endswith("norm.weight"))]
    return "no tensor of the base's files fills it"


def _misshape(weights, folder):
    key = next(key for key in weights if key.endswith("q_proj.weight") or key.endswith("qkv_proj.weight"))
    weights[key] = weights[key][:-1].clone()
    return r"shape \[\d+, \d+\] in the base's files"


def _contradict(weights, folder):
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config", config)
    text["intermediate_size"] += 8
    (folder / "config.json").write_text(json.dumps(config))
    return "in the base's files, .* by its config"


def _drop_token(weights, folder):
    """The placeholder becomes a plain word of the vocabulary, as in a tokenizer that was made without pictures."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if not _is_image(token["content"])]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    kept = {name: value for name, value in settings.items() if "token" not in name or name.endswith("_class")}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))
    return "in the tokenizer, .*and not <|has no token"


def _is_image(token):
    return token in ("<image>", "<|image|>", "<image_soft_token>", "<IMG_CONTEXT>", "<|image_pad|>")


@pytest.mark.parametrize("damage", [_add_unknown, _take_away, _misshape, _contradict, _drop_token])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "dinov2"])
def test_what_does_not_belong_together_is_named_before_anything_is_written(family, damage, tmp_path):
    base = build_family(family, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    message = damage(weights, base)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    size = {"qwen2_5_vl": {"image_size": 112}, "qwen3_vl": {"image_size": 64}}.get(family, {})
    with pytest.raises(ConversionError, match=message):
        convert_base(base, tmp_path / "out", progress=False, **size)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_language_model_without_a_spare_row_is_refused_beside_dinov2(tmp_path):
    base, tower = build_dinov2(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    rows = len(AutoTokenizer.from_pretrained(base))
    weights = load_file(base / "model.safetensors")
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[key] = weights[key][:rows].clone()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    with pytest.raises(ConversionError, match="rows of the embeddings have a token, and none is reserved"):
        convert_base(base, tmp_path / "out", vision_tower=tower, progress=False)
    with pytest.raises(ConversionError, match="vision_tower_revision: given without"):
        convert_base(base, tmp_path / "out", vision_tower_revision="main", progress=False)
    with pytest.raises(ConversionError, match="model_type 'qwen2' is not supported here"):
        convert_base(base, tmp_path / "out", vision_tower=base, progress=False)


def test_no_answer_sees_what_comes_after_it(pair, test_data):
    """In training, with the collator's batches: another last word changes nothing before it."""
    _, _, converted, _ = pair
    model = CTMoEForConditionalGeneration.from_pretrained(converted).train()
    collator = CTMoEDataCollator(CTMoEProcessor.from_pretrained(converted))
    batch = collator(
        [
            {
                "images": [str(test_data / "totalseg" / "example_ct_sm.nii.gz")],
                "prompt": [{"role": "user", "content": "Where is the nodule?"}],
                "completion": [{"role": "assistant", "content": "In the right upper lobe of the lung."}],
                "task": "vqa_open",
                "row": 1,
            }
        ]
    )
    inputs = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor) and name != "row_tasks"}
    model.config.vision_config.router_jitter = 0.0
    answer = (inputs["labels"][0] != -100).nonzero()[:, 0]
    changed = inputs["input_ids"].clone()
    changed[0, answer[-2]] = changed[0, answer[0]]
    with torch.no_grad():
        for labelled in (inputs, {k: v for k, v in inputs.items() if k != "token_type_ids"}):
            before, after = (model(**{**labelled, "input_ids": ids}).logits for ids in (inputs["input_ids"], changed))
            torch.testing.assert_close(before[0, : answer[-2]], after[0, : answer[-2]], atol=1e-5, rtol=1e-5)
            assert (before[0, answer[-2] :] - after[0, answer[-2] :]).abs().max() > 1e-4
