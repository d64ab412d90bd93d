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
"""The common model tests of transformers, on the vision encoder and on the whole model."""

import unittest
from unittest.mock import patch

import pytest
from tester_ct_moe import CTMoEModelTester, CTMoEVisionModelTester, CTMoEVolumeEncoderTester
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_MAPPING_NAMES
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin

from ct_moe import (
    CTMoEConfig,
    CTMoEForConditionalGeneration,
    CTMoEModel,
    CTMoEVisionConfig,
    CTMoEVisionModel,
    CTMoEVolumeEncoder,
    CTMoEVolumeEncoderConfig,
)


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


class CTMoEVisionModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (CTMoEVisionModel,)
    additional_model_inputs = ["slice_positions"]  # required wherever there are several slices
    test_resize_embeddings = False  # there are no tokens

    def setUp(self):
        self.model_tester = CTMoEVisionModelTester(self)
        self.config_tester = ConfigTester(self, config_class=CTMoEVisionConfig, has_text_modality=False)
        self.enterContext(patch.dict(MODEL_MAPPING_NAMES, {"ct_moe_vision": "CTMoEVisionModel"}))

    def test_config(self):
        self.config_tester.run_common_tests()

    @unittest.skip(reason="asks for an nn.Embedding of tokens; the input embeddings of a ViT are a convolution")
    def test_model_get_set_embeddings(self):
        pass


class CTMoEVolumeEncoderTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (CTMoEVolumeEncoder,)
    test_resize_embeddings = False  # there are no tokens

    def setUp(self):
        self.model_tester = CTMoEVolumeEncoderTester(self)
        self.config_tester = ConfigTester(self, config_class=CTMoEVolumeEncoderConfig, has_text_modality=False)
        self.enterContext(patch.dict(MODEL_MAPPING_NAMES, {"ct_moe_volume_encoder": "CTMoEVolumeEncoder"}))
        # These tests take every class for a mixture of experts whose module defines experts; this one has none.
        if self._testMethodName.startswith(("test_eager_matches_batched_and_grouped", "test_moe_models_record")):
            self.skipTest("the 3D encoder has no experts, only its file has")

    def test_config(self):
        self.config_tester.run_common_tests()

    @unittest.skip(reason="asks for an nn.Embedding of tokens; the input embeddings of a ViT are a convolution")
    def test_model_get_set_embeddings(self):
        pass


class CTMoEModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (CTMoEModel, CTMoEForConditionalGeneration)
    _is_composite = True

    def setUp(self):
        self.model_tester = CTMoEModelTester(self)
        self.config_tester = ConfigTester(self, config_class=CTMoEConfig, has_text_modality=False)
        # The tests know by these tables which class has a language modeling head, and give labels to no other.
        for table, name in (
            (MODEL_MAPPING_NAMES, "CTMoEModel"),
            (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "CTMoEForConditionalGeneration"),
        ):
            self.enterContext(patch.dict(table, {"ct_moe": name}))

    def _image_features_prepare_config_and_inputs(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        return config, {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}

    def test_config(self):
        self.config_tester.run_common_tests()

    @unittest.skip(reason="the mixin of the generation tests, which it asks for, is not in the sdist")
    def test_generation_tester_mixin_inheritance(self):
        pass


class CTMoESliceScoringModelTest(CTMoEModelTest):
    """The same with TG-IS, for which the vision encoder runs twice."""

    def setUp(self):
        super().setUp()
        self.model_tester = CTMoEModelTester(self, slice_scoring="tgis")
