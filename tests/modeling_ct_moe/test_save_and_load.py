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
"""Folders: written twice the same, read back bit for bit, and filled where the files hold less than the model."""

import filecmp

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import prompt_inputs, tiny_config, tiny_model, volume_inputs

from ct_moe.configuration_ct_moe import CTMoEConfig
from ct_moe.errors_ct_moe import ModelError
from ct_moe.modeling_ct_moe import CTMoEForConditionalGeneration


VOLUME_ENCODER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_slices": 4,
    "image_size": 12,
    "patch_size": (2, 4, 4),
}
OFFLOADED = {
    "as designed": {},
    "scored slices": {"slice_scoring": "tgis"},
    "two encoders": {"slice_scoring": "tgis", "volume_encoder_config": VOLUME_ENCODER},
}


@pytest.mark.parametrize("fields", OFFLOADED.values(), ids=OFFLOADED)
def test_save_load_save_writes_the_same_bytes(fields, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    model = tiny_model({"volume_layers": [], "moe_layers": []} if "volume_encoder_config" in fields else {}, **fields)
    model.save_pretrained(first)
    loaded = CTMoEForConditionalGeneration.from_pretrained(first)
    loaded.save_pretrained(second)
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert {"config.json", "model.safetensors", "modeling_ct_moe.py", "configuration_ct_moe.py"} <= set(names)
    assert filecmp.cmpfiles(first, second, names, shallow=False)[0] == names
    inputs = {**prompt_inputs(model.config, [[3], [2]]), **volume_inputs(model.config, [3, 2])}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, loaded.eval()(**inputs).logits)


def test_a_config_comes_back_with_every_field(tmp_path):
    config = tiny_config(
        {"num_experts": 3, "num_experts_per_tok": 2, "norm_topk_prob": True, "depth_wavelengths_mm": (30, 900)},
        tasks=["report", "vqa"],
        pool=(1, 2, 3),
        intended_scope="contrast-enhanced chest CT of adults",
    )
    config.save_pretrained(tmp_path)
    assert CTMoEConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensors_that_the_files_lack_start_as_in_a_new_model(tmp_path, dtype):
    """What a base's files bring is kept bit for bit; nothing is left as the memory happened to be."""
    model = tiny_model().to(dtype)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    new = ("moe.", "guide_encoder", "task_router", "scale_embedding")
    kept = {name: value for name, value in load_file(file).items() if not any(part in name for part in new)}
    save_file(kept, file, metadata={"format": "pt"})

    def load(seed):
        torch.manual_seed(seed)
        return CTMoEForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype).state_dict()

    state, again, other = load(0), load(0), load(1)
    assert set(state) == set(model.state_dict())
    missing = sorted(set(state) - set(kept))
    assert len(missing) == 2 * 10 + 5 + 2 + 1
    for name, value in state.items():
        assert value.device.type == "cpu"
        assert value.dtype == dtype
        if name in kept:
            assert torch.equal(value, kept[name])
        elif any(
            part in name for part in ("down_proj", "up_proj_bias", "scale", "norm.bias", "proj.bias", "router.bias")
        ):
            assert not value.any(), name
        elif "norm.weight" in name:
            assert torch.equal(value, torch.ones_like(value))
        else:
            assert 0.01 < value.float().std() < 0.03, name  # initializer_range 0.02
            assert torch.equal(value, again[name])
            assert not torch.equal(value, other[name])


def test_a_model_can_be_laid_out_without_memory():
    with torch.device("meta"):
        model = CTMoEForConditionalGeneration(tiny_config())
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert set(model.state_dict()) == set(tiny_model().state_dict())
    assert dict(model.named_buffers()).keys() == dict(tiny_model().named_buffers()).keys()


def test_tied_embeddings_are_one_tensor_after_loading(tmp_path):
    config = tiny_config(tie_word_embeddings=True)
    model = CTMoEForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    loaded = CTMoEForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("fields", OFFLOADED.values(), ids=OFFLOADED)
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_offloaded_to_disk_it_computes_the_same(fields, share, tmp_path):
    """Hooks bring each weight as its module is called; a weight that is read past its module would be a wrong one."""
    vision = {"volume_layers": [], "moe_layers": []} if "volume_encoder_config" in fields else {}
    model = tiny_model(vision, **fields)
    model.save_pretrained(tmp_path / "model")
    memory = int(share * sum(parameter.nbytes for parameter in model.parameters()))
    offloaded = CTMoEForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": memory}, offload_folder=tmp_path / "disk"
    )
    assert "disk" in offloaded.hf_device_map.values()
    inputs = {**volume_inputs(model.config, [3, 2]), **prompt_inputs(model.config, [[3], [2]])}
    with torch.no_grad():
        assert torch.equal(offloaded(**inputs).logits, model(**inputs).logits)
    with pytest.raises(ModelError, match="weights of the model are offloaded"):
        offloaded.add_task("new")
