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
"""The common processor tests of transformers, on scans instead of pictures."""

import tempfile
import unittest
from pathlib import Path
from unittest.mock import patch

import nibabel
import numpy as np
import pytest
from transformers import AutoTokenizer
from transformers_tests import test_processing_common
from transformers_tests.test_processing_common import ProcessorTesterMixin

from ct_moe import CTMoEImageProcessor, CTMoEProcessor, Volume
from ct_moe.hub.tiny_base import CHAT_TEMPLATE, build_tiny_base


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


def a_scan() -> Volume:
    random = np.random.default_rng(0)
    return Volume(random.integers(-1000, 1000, (4, 30, 30), dtype=np.int16), (5.0, 1.0, 1.0))


class CTMoEProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = CTMoEProcessor

    @classmethod
    def _setup_image_processor(cls):
        return CTMoEImageProcessor(size={"height": 28, "width": 28}, patch_size=14)

    @classmethod
    def _setup_tokenizer(cls):
        with tempfile.TemporaryDirectory() as folder:
            return AutoTokenizer.from_pretrained(build_tiny_base(folder))

    @staticmethod
    def prepare_processor_dict():
        return {"chat_template": CHAT_TEMPLATE, "pool": [2, 1, 1], "tasks": ["report", "vqa"]}

    def setUp(self):
        volume = a_scan()
        scan = Path(self.enterContext(tempfile.TemporaryDirectory()), "scan.nii.gz")
        nibabel.save(nibabel.Nifti1Image(volume.hu.T, np.diag([1.0, 1.0, 5.0, 1.0])), scan)
        # Where the tests download a picture, or set do_rescale so that no pixel is above 0.
        self.enterContext(patch.dict(test_processing_common.MODALITY_INPUT_DATA, {"images": [str(scan)] * 2}))
        self.enterContext(patch.object(test_processing_common, "url_to_local_path", lambda url: str(scan)))
        images = test_processing_common.MODALITY_TEST_SPECS["images"]
        self.enterContext(patch.dict(images, {"init_time_kwargs": {"image_mean": 2.0}}))

    def prepare_images_inputs(self, batch_size=None, nested=False):
        if batch_size is None:
            return a_scan()
        return [[a_scan()] if nested else a_scan() for _ in range(batch_size)]

    @unittest.skip(reason="sets do_normalize, which is no setting of scans: windows are always normalised")
    def test_save_load_pretrained_additional_features(self):
        pass
