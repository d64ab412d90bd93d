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
"""The common training test of transformers: a tiny model learns a sequence by heart and generates it."""

import unittest

import pytest
from tester_ct_moe import CTMoEModelTester
from transformers_tests.test_training_mixin import TrainingTesterMixin


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


class CTMoETextTrainingTester(CTMoEModelTester):
    def get_config(self):
        config = super().get_config()
        config.vocab_size = self.vocab_size  # the test reads it here; a composite config has it in its text config
        return config


class CTMoETrainingTest(TrainingTesterMixin, unittest.TestCase):
    model_tester = None  # abstract in the mixin

    def setUp(self):
        self.model_tester = CTMoETextTrainingTester(self)
