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
"""Rows about one scan, encoded together: the features that each row would have alone, for every kind of model."""

import pytest
import torch
from tiny_model import tiny_model, volume_inputs

from ct_moe.trainers.evaluation.answering import _encode


@pytest.mark.parametrize(
    ("vision", "fields"),
    [
        ({}, {}),
        ({"moe_layers": []}, {}),
        ({}, {"slice_scoring": "tgis"}),
        ({"deepstack_layers": [0, 2]}, {"pool": (1, 1, 1)}),  # whose early layers start from the pixels
    ],
    ids=["experts", "no experts", "slice scores", "earlier layers"],
)
@torch.no_grad()
def test_shared_scans_give_every_row_its_own_features(vision, fields):
    model = tiny_model(vision, **fields).eval()
    inputs = volume_inputs(model.config, [2, 3, 3])
    guides = {name: values for name, values in inputs.items() if name.startswith("guide")}
    of_row = [1, 0, 1, 1, 0]
    inputs = {name: values[of_row] for name, values in inputs.items()}
    # Each row another text: those of the three volumes and two of them turned round.
    inputs |= {name: torch.cat([values, values[:2].flip(1)]) for name, values in guides.items()}
    scans = [{}, {}]
    asked = []
    model.model.vision_tower.layers[0].register_forward_hook(lambda module, args, output: asked.append(len(output[0])))
    together = _encode(model, inputs, [scans[number] for number in of_row])
    shared = asked[0]
    expected = model.get_image_features(**inputs, return_dict=True)
    assert (shared < asked[-1]) == (not vision.get("deepstack_layers"))
    for ours, wanted in zip(together.pooler_output, expected.pooler_output, strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
