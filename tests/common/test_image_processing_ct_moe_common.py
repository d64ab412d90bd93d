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
"""The common image processor tests of transformers, on scans instead of pictures."""

import unittest

import numpy as np
import pytest
from transformers_tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin

from ct_moe import CTMoEImageProcessor, Volume


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


class CTMoEImageProcessingTester(ImageProcessingTester):
    def __init__(self, parent):
        super().__init__(
            parent,
            size={"height": 28, "width": 28},
            patch_size=14,
            image_mean=[0.5, 0.5, 0.5],
            image_std=[0.2, 0.3, 0.4],
            slab_mm=4.0,
            max_slices=8,
        )

    def _get_image_processing_classes(self):
        return {"pil": CTMoEImageProcessor}

    def prepare_image_inputs(self, batch_size=None, **kwargs):
        return scans(self.batch_size if batch_size is None else batch_size)


def scans(count: int) -> list[Volume]:
    random = np.random.default_rng(0)
    return [Volume(random.integers(-1000, 1000, (4, 30, 40), dtype=np.int16), (5.0, 1.0, 1.0)) for _ in range(count)]


class CTMoEImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = CTMoEImageProcessingTester
    test_cast_dtype = True

    @unittest.skip(reason="passes bare arrays, which have no millimetres: a scan is a Volume or a file")
    def test_call_numpy(self):
        pass

    @unittest.skip(reason="passes bare tensors, which have no millimetres: a scan is a Volume or a file")
    def test_call_pytorch(self):
        pass

    @unittest.skip(reason="passes pictures, which have neither slices nor Hounsfield units")
    def test_call_pil(self):
        pass

    @unittest.skip(reason="passes four-channel pictures; the channels here are three windows of one scan")
    def test_call_numpy_4_channels(self):
        pass

    @unittest.skip(reason="sets do_convert_rgb, which is no setting of scans")
    def test_image_processor_from_dict_with_kwargs_has_attributes(self):
        pass

    @unittest.skip(reason="asks for a torchvision backend; Hounsfield units are resized and windowed in NumPy")
    def test_new_models_require_torchvision_backend(self):
        pass

    @unittest.skip(reason="loads in a process that neither imports ct_moe nor passes trust_remote_code")
    def test_pil_can_run_without_torchvision(self):
        pass
