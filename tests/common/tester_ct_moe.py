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
"""Tiny configurations and inputs, in the form in which the common tests of transformers ask for them."""

import torch
from transformers import Phi3Config

from ct_moe import (
    CTMoEConfig,
    CTMoEForConditionalGeneration,
    CTMoEModel,
    CTMoEVisionConfig,
    CTMoEVolumeEncoderConfig,
)


class CTMoEVisionModelTester:
    """Three volumes of up to four slices, the first one shorter, with air, millimetres, guides and a task each."""

    def __init__(self, parent):
        self.parent = parent
        self.is_training = True
        self.batch_size = 3
        self.num_slices = 4
        self.num_hidden_layers = 2
        self.num_attention_heads = 2
        self.hidden_size = 32
        self.image_size = 8
        self.patch_size = 4
        self.guide_size = 12
        self.seq_length = (self.image_size // self.patch_size) ** 2 + 1  # of a slice layer
        self.encoder_seq_length = self.seq_length

    def get_config(self) -> CTMoEVisionConfig:
        return CTMoEVisionConfig(
            hidden_size=self.hidden_size,
            intermediate_size=48,
            num_hidden_layers=self.num_hidden_layers + 1,  # the last one of the base is never read
            num_attention_heads=self.num_attention_heads,
            image_size=self.image_size,
            patch_size=self.patch_size,
            hidden_act="gelu",
            volume_layers=[1],
            moe_layers=[1],
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
            guide_size=self.guide_size,
            num_tasks=2,
        )

    def volume_inputs(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        volumes, slices, grid = self.batch_size, self.num_slices, self.image_size // self.patch_size
        slice_mask = torch.ones(volumes, slices, dtype=torch.bool)
        slice_mask[0, -1] = False
        return {
            "pixel_values": torch.randn(volumes, slices, 3, self.image_size, self.image_size, generator=generator),
            "slice_mask": slice_mask,
            "slice_positions": torch.arange(slices, dtype=torch.int32).mul(5000).repeat(volumes, 1),
            "patch_mask": torch.rand(volumes, slices, grid, grid, generator=generator) > 0.3,
            "volume_scale": torch.randn(volumes, 2, generator=generator),
        }

    def prepare_config_and_inputs_for_common(self) -> tuple[CTMoEVisionConfig, dict[str, torch.Tensor]]:
        inputs = self.volume_inputs()
        inputs["guide"] = torch.randn(self.batch_size, self.guide_size, generator=torch.Generator().manual_seed(1))
        inputs["task_index"] = torch.arange(self.batch_size) % 2
        inputs["task_gate"] = torch.ones(self.batch_size)
        return self.get_config(), inputs


class CTMoEVolumeEncoderTester(CTMoEVisionModelTester):
    """The same volumes in patches of two slices."""

    def __init__(self, parent):
        super().__init__(parent)
        grid = self.image_size // self.patch_size
        self.seq_length = self.encoder_seq_length = self.num_slices // 2 * grid**2 + 1

    def get_config(self) -> CTMoEVolumeEncoderConfig:
        return CTMoEVolumeEncoderConfig(
            hidden_size=self.hidden_size,
            intermediate_size=48,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_slices=self.num_slices,
            image_size=self.image_size,
            patch_size=(2, self.patch_size, self.patch_size),
            pool=(1, 2, 2),
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[CTMoEVolumeEncoderConfig, dict[str, torch.Tensor]]:
        inputs = self.volume_inputs()
        return self.get_config(), {name: inputs[name] for name in ("pixel_values", "slice_mask")}


class CTMoEModelTester:
    """Prompts of one volume each, every one with its own guide."""

    base_model_class = CTMoEModel
    conditional_generation_class = CTMoEForConditionalGeneration
    causal_lm_class = CTMoEForConditionalGeneration

    def __init__(self, parent, **fields):
        self.parent = parent
        self.fields = fields
        self.vision = CTMoEVisionModelTester(parent)
        self.is_training = True
        self.batch_size = self.vision.batch_size
        self.vocab_size = 99
        self.hidden_size = 32
        self.num_hidden_layers = 2
        self.num_attention_heads = 2
        self.image_token_id = 20  # the training test writes 1 to 19, resizing the vocabulary keeps 0 to 83
        self.num_image_tokens = self.get_config().num_visual_tokens(self.vision.num_slices)
        self.seq_length = self.num_image_tokens + 7
        self.encoder_seq_length = self.seq_length

    def get_config(self) -> CTMoEConfig:
        text_config = Phi3Config(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=64,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=1,
            max_position_embeddings=512,
            original_max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        return CTMoEConfig(
            vision_config=self.vision.get_config().to_dict(),
            text_config=text_config,
            image_token_id=self.image_token_id,
            tasks=["report", "vqa"],
            **self.fields,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[CTMoEConfig, dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(2)
        text = torch.randint(21, 84, (self.batch_size, self.seq_length), generator=generator)
        text[:, 2 : 2 + self.num_image_tokens] = self.image_token_id
        inputs = {"input_ids": text, "attention_mask": torch.ones_like(text), **self.vision.volume_inputs()}
        guide = torch.randint(21, 84, (self.batch_size, 5), generator=generator)
        return self.get_config(), {**inputs, "guide_input_ids": guide, "guide_attention_mask": torch.ones_like(guide)}
