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
"""The real shapes: every checkpoint that a family names, from its published config, without its weights.

`published_configs/README.md` says where each config and each number of parameters is from.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny_families import build_family
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionModel,
    Phi3ForCausalLM,
    PreTrainedConfig,
)
from transformers.core_model_loading import revert_weight_conversion

from ct_moe import ConversionError, CTMoEConfig
from ct_moe.hub.base_model import Base, open_base
from ct_moe.hub.conversion import _make_config, convert_base
from ct_moe.hub.families import FAMILIES
from ct_moe.hub.families.dinov2 import combine
from ct_moe.hub.families.table import families_table
from ct_moe.hub.tensor_mapping import plan_tensors


CONFIGS = Path(__file__).parent / "published_configs"
README = Path(__file__).parents[2] / "README.md"


class Published(NamedTuple):
    """What is known of a checkpoint.

    parameters: in its files.
    tokens: of 32 slices pooled 2 x 2 x 2, by hand: patches along a side, merged as the base merges them, then halved
        and rounded up, squared, times 16 cells of two slices each.
    unread: tensors that the base's own forward never reads.
    names: some of its tensors with their shapes.
    """

    parameters: int
    tokens: int
    unread: int
    names: dict[str, tuple[int, ...]]


def _llava(width: int) -> dict[str, tuple[int, ...]]:
    return {
        "vision_tower.vision_model.embeddings.position_embedding.weight": (577, 1024),
        "vision_tower.vision_model.pre_layrnorm.bias": (1024,),
        "multi_modal_projector.linear_1.weight": (width, 1024),
        "language_model.lm_head.weight": (32064, width),
        "language_model.model.layers.31.self_attn.o_proj.weight": (width, width),
    }


def _llava_onevision(width: int) -> dict[str, tuple[int, ...]]:
    return {
        "image_newline": (width,),
        "vision_tower.vision_model.embeddings.position_embedding.weight": (729, 1152),
        "vision_tower.vision_model.encoder.layers.25.mlp.fc1.weight": (4304, 1152),
        "language_model.model.norm.weight": (width,),
    }


def _gemma3(width: int) -> dict[str, tuple[int, ...]]:
    return {
        "multi_modal_projector.mm_input_projection_weight": (1152, width),
        "multi_modal_projector.mm_soft_emb_norm.weight": (1152,),
        "vision_tower.vision_model.embeddings.position_embedding.weight": (4096, 1152),
        "language_model.model.embed_tokens.weight": (262208, width),
        "language_model.model.layers.33.self_attn.q_norm.weight": (256,),
    }


def _paligemma(width: int) -> dict[str, tuple[int, ...]]:
    return {
        "multi_modal_projector.linear.weight": (width, 1152),
        "vision_tower.vision_model.embeddings.position_embedding.weight": (1024, 1152),
        "language_model.model.embed_tokens.weight": (257216, width),
    }


def _internvl(width: int) -> dict[str, tuple[int, ...]]:
    return {
        "vision_tower.embeddings.position_embeddings": (1, 1025, 1024),
        "vision_tower.encoder.layer.23.lambda_1": (1024,),
        "multi_modal_projector.linear_1.weight": (width, 4096),
        "language_model.model.embed_tokens.weight": (151674, width),
        "language_model.lm_head.weight": (151674, width),
    }


def _qwen2_5_vl(width: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    return {
        "visual.patch_embed.proj.weight": (1280, 3, 2, 14, 14),
        "visual.blocks.31.mlp.gate_proj.weight": (3420, 1280),
        "visual.merger.mlp.2.weight": (width, 5120),
        "model.embed_tokens.weight": (vocabulary, width),
    }


def _qwen3_vl(width: int, tower: int) -> dict[str, tuple[int, ...]]:
    return {
        "model.visual.patch_embed.proj.weight": (tower, 3, 2, 16, 16),
        "model.visual.pos_embed.weight": (2304, tower),
        "model.visual.deepstack_merger_list.2.linear_fc2.weight": (width, 4 * tower),
        "model.language_model.embed_tokens.weight": (151936, width),
    }


_PHI3_V = {
    "model.vision_embed_tokens.glb_GN": (1, 1, 4096),
    "model.vision_embed_tokens.sub_GN": (1, 1, 1, 4096),
    "model.vision_embed_tokens.img_projection.0.weight": (3072, 4096),
    "model.vision_embed_tokens.img_processor.vision_model.encoder.layers.23.mlp.fc1.weight": (4096, 1024),
    "model.layers.31.self_attn.qkv_proj.weight": (9216, 3072),
}
_DINOV2 = {
    "vision_tower.embeddings.position_embeddings": (1, 1370, 1024),
    "model.layers.27.mlp.gate_proj.weight": (18944, 3584),
}
# 336 / 14 = 24 -> 12 x 12 x 16. Unread at feature layer -2: the 16 tensors of the last layer, and the last layernorm.
_CLIP = {"tokens": 2304, "unread": 18}
# 384 / 14 = 27 -> 14 x 14 x 16, and the token that ends a volume. The layernorm is behind what is read.
_ONEVISION = {"tokens": 3137, "unread": 2}
_GEMMA3 = {"tokens": 1024, "unread": 0}  # 896 / 14 = 64, averaged 4 x 4 to 16 -> 8 x 8 x 16
_PALIGEMMA = {"tokens": 4096, "unread": 0}  # 448 / 14 = 32 -> 16 x 16 x 16
_MERGED = {"tokens": 1024, "unread": 0}  # 448 / 14 = 32, stacked 2 x 2 to 16 -> 8 x 8 x 16
_MERGED_16 = {"tokens": 784, "unread": 0}  # 448 / 16 = 28, stacked 2 x 2 to 14 -> 7 x 7 x 16
# 336 / 14 = 24, stacked 2 x 2 to 12 -> 6 rows of 6 and a separator, 16 times; a separator; the overview, once more 42.
_ROWS = {"tokens": 16 * 42 + 1 + 42, "unread": 18}

CHECKPOINTS = {
    "llava-hf/llava-1.5-7b-hf": Published(7_063_427_072, names=_llava(4096), **_CLIP),
    "llava-hf/llava-1.5-13b-hf": Published(13_351_494_656, names=_llava(5120), **_CLIP),
    "xtuner/llava-phi-3-mini-hf": Published(4_137_176_064, names=_llava(3072), **_CLIP),
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": Published(893_618_208, names=_llava_onevision(896), **_ONEVISION),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": Published(8_030_348_832, names=_llava_onevision(3584), **_ONEVISION),
    "microsoft/Phi-3-vision-128k-instruct": Published(4_146_621_440, names=_PHI3_V, **_ROWS),
    "microsoft/Phi-3.5-vision-instruct": Published(4_146_621_440, names=_PHI3_V, **_ROWS),
    "google/medgemma-4b-it": Published(4_300_079_472, names=_gemma3(2560), **_GEMMA3),
    "google/gemma-3-4b-it": Published(4_300_079_472, names=_gemma3(2560), **_GEMMA3),
    "google/gemma-3-12b-it": Published(12_187_325_040, names=_gemma3(3840), **_GEMMA3),
    "google/paligemma-3b-pt-448": Published(2_924_351_216, names=_paligemma(2048), **_PALIGEMMA),
    "google/paligemma2-3b-pt-448": Published(3_033_127_152, names=_paligemma(2304), **_PALIGEMMA),
    "OpenGVLab/InternVL3-1B-hf": Published(938_193_024, names=_internvl(896), **_MERGED),
    "OpenGVLab/InternVL3-2B-hf": Published(2_088_957_440, names=_internvl(1536), **_MERGED),
    "OpenGVLab/InternVL3-8B-hf": Published(7_944_373_760, names=_internvl(3584), **_MERGED),
    "Qwen/Qwen2.5-VL-3B-Instruct": Published(3_754_622_976, names=_qwen2_5_vl(2048, 151936), **_MERGED),
    "Qwen/Qwen2.5-VL-7B-Instruct": Published(8_292_166_656, names=_qwen2_5_vl(3584, 152064), **_MERGED),
    "Qwen/Qwen3-VL-2B-Instruct": Published(2_127_532_032, names=_qwen3_vl(2048, 1024), **_MERGED_16),
    "Qwen/Qwen3-VL-4B-Instruct": Published(4_437_815_808, names=_qwen3_vl(2560, 1024), **_MERGED_16),
    "Qwen/Qwen3-VL-8B-Instruct": Published(8_767_123_696, names=_qwen3_vl(4096, 1152), **_MERGED_16),
    # 518 / 14 = 37 -> 19 x 19 x 16. The mask token is of pretraining.
    "facebook/dinov2-large with Qwen/Qwen2.5-7B-Instruct": Published(
        304_368_640 + 7_615_616_512, tokens=5776, unread=1, names=_DINOV2
    ),
}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request, tmp_path_factory) -> tuple[Published, Base, CTMoEConfig]:
    base = read_base(request.param, tmp_path_factory.mktemp("published"))
    return CHECKPOINTS[request.param], base, _make_config(base, {})


@pytest.fixture(scope="module")
def tensors(checkpoint) -> dict[str, tuple[int, ...]]:
    return file_tensors(checkpoint[1].config)


def test_its_files_have_the_published_number_of_parameters(checkpoint, tensors):
    assert sum(torch.Size(shape).numel() for shape in tensors.values()) == checkpoint[0].parameters
    assert {name: tensors.get(name) for name in checkpoint[0].names} == checkpoint[0].names


def test_every_tensor_has_its_place_and_its_shape(checkpoint, tensors):
    published, base, config = checkpoint
    plan = plan_tensors(tensors, config, base.config)
    assert plan.reused.keys() | plan.unread.keys() == tensors.keys()
    assert not plan.reused.keys() & plan.unread.keys()
    assert len(plan.unread) == published.unread, Counter(plan.unread.values())
    # What the base does not fill is what every conversion adds, or new by the word of its family.
    fresh = {part for _, part in base.family.fresh}
    assert (
        plan.added.keys() == {"scale embedding", "experts", "expert routers", "guide encoder", "task router"} | fresh
    )


def test_files_that_the_library_writes_today_have_the_same_places(checkpoint, tensors):
    _, base, config = checkpoint
    today = todays_names(tensors)
    if today.keys() == tensors.keys():
        return  # its names have not changed
    places = [plan_tensors(shapes, config, base.config).reused for shapes in (tensors, today)]
    assert todays_names(places[0]) == places[1]


def test_a_volume_has_the_visual_tokens_counted_by_hand(checkpoint):
    assert checkpoint[2].num_visual_tokens(32) == checkpoint[0].tokens


def test_a_size_of_another_checkpoint_is_noticed(tmp_path):
    base = read_base("OpenGVLab/InternVL3-1B-hf", tmp_path)
    shapes = file_tensors(base.config)
    shapes["language_model.lm_head.weight"] = (151936, 896)
    with pytest.raises(ConversionError, match=r"shape \[151936, 896\] in the base's files, \[151674, 896\] by its"):
        plan_tensors(shapes, _make_config(base, {}), base.config)


def test_silence_about_a_tie_is_not_a_tie_of_internvl(tmp_path):
    # The library's own config says so of the same file; its model then unties what differs in the files.
    base = read_base("OpenGVLab/InternVL3-1B-hf", tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).tie_word_embeddings
    assert not base.config.tie_word_embeddings
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "tie_word_embeddings": True}))
    assert open_base(tmp_path, None).config.tie_word_embeddings
    raw["text_config"]["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert open_base(tmp_path, None).config.tie_word_embeddings


def test_a_head_that_internvl_s_config_is_silent_about_is_converted(tmp_path):
    base = build_family("internvl", tmp_path / "base", tie_word_embeddings=False)
    raw = json.loads((base / "config.json").read_text())
    del raw["tie_word_embeddings"]
    (base / "config.json").write_text(json.dumps(raw))
    report = convert_base(base, tmp_path / "converted", progress=False)
    assert report.reused_names["language_model.lm_head.weight"] == "lm_head.weight"
    assert report.parity.max_abs_difference <= 1e-5


def test_long_rope_of_phi3_v_is_read_under_its_published_name(tmp_path):
    rope = read_base("microsoft/Phi-3-vision-128k-instruct", tmp_path).config.text_config.rope_parameters
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["rope_scaling"]["type"] == "su"
    assert rope["rope_type"] == "longrope"
    assert rope["original_max_position_embeddings"] == raw["original_max_position_embeddings"] == 4096
    assert rope["long_factor"] == raw["rope_scaling"]["long_factor"]


def test_every_checkpoint_of_a_family_is_here():
    named = [checkpoint for family in FAMILIES.values() for checkpoint in family.checkpoints]
    assert sorted(named) == sorted(CHECKPOINTS)
    files = {part.split("/")[1] for checkpoint in CHECKPOINTS for part in checkpoint.split(" with ")}
    assert {path.stem for path in CONFIGS.glob("*.json")} == files
    sources = (CONFIGS / "README.md").read_text(encoding="utf-8")
    assert all(f" `{part}` |" in sources for checkpoint in CHECKPOINTS for part in checkpoint.split(" with "))


def test_the_readme_has_the_table_of_families(tmp_path):
    configs = {}
    for number, name in enumerate(CHECKPOINTS):
        configs[name] = _make_config(read_base(name, tmp_path / str(number)), {})
    table = families_table(configs)
    assert table in README.read_text(encoding="utf-8"), f"the README's table should be:\n{table}"


def read_base(checkpoint: str, folder: Path) -> Base:
    """As a conversion reads it, from nothing but its config."""
    parts = checkpoint.split(" with ")
    folders = [folder, folder / "language_model"][: len(parts)]
    for part, place in zip(parts, folders):
        place.mkdir(parents=True, exist_ok=True)
        published = (CONFIGS / f"{part.split('/')[1]}.json").read_text(encoding="utf-8")
        (place / "config.json").write_text(published, encoding="utf-8")
        # The config of Phi-3-V leaves this to its tokenizer.
        (place / "tokenizer.json").write_text('{"added_tokens": [{"id": 32044, "content": "<|image|>"}]}')
    if len(parts) == 1:
        return open_base(folder, None)
    tower, text = map(AutoConfig.from_pretrained, folders)
    image_token_id = 151655  # <|image_pad|> of Qwen2.5
    return Base(checkpoint, None, folders[1], combine(tower, text, image_token_id), folder)


def file_tensors(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the published files. `vision_model` was inside of CLIP and SigLIP when they were written."""
    if config.model_type == "phi3_v":
        return _phi3_v_tensors(config)
    if config.model_type == "dinov2":
        tower = _state_dict(AutoModel, config.vision_config)
        return _state_dict(AutoModelForCausalLM, config.text_config) | {
            f"vision_tower.{name}": shape for name, shape in tower.items()
        }
    tensors = _state_dict(AutoModelForImageTextToText, config)
    if config.vision_config.model_type in ("clip_vision_model", "siglip_vision_model"):
        tensors = {re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name): tensors[name] for name in tensors}
    return tensors


def todays_names(tensors: dict[str, Any]) -> dict[str, Any]:
    """The same in files that the library writes today."""
    return {re.sub(r"^vision_tower\.vision_model\.", "vision_tower.", name): tensors[name] for name in tensors}


def _phi3_v_tensors(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Put together from the library's parts: it has no class for it, and files are as old as its remote code."""
    prefix, width = "model.vision_embed_tokens.", config.text_config.hidden_size
    stacked = 4 * config.vision_config.hidden_size
    with torch.device("meta"):
        tower, text = CLIPVisionModel(config.vision_config), Phi3ForCausalLM(config.text_config)
    tensors = {name: tuple(tensor.shape) for name, tensor in text.state_dict().items()}
    for name, tensor in tower.state_dict().items():
        inside = name.removeprefix("vision_model.")
        tensors[f"{prefix}img_processor.vision_model.{inside}"] = tuple(tensor.shape)
    return tensors | {
        f"{prefix}img_projection.0.weight": (width, stacked),
        f"{prefix}img_projection.0.bias": (width,),
        f"{prefix}img_projection.2.weight": (width, width),
        f"{prefix}img_projection.2.bias": (width,),
        f"{prefix}glb_GN": (1, 1, stacked),
        f"{prefix}sub_GN": (1, 1, 1, stacked),
    }


def _state_dict(auto_class: type, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Of the library's class for `config`, with the names that it saves them under."""
    with torch.device("meta"):
        model = auto_class.from_config(config)
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, own).items()}
