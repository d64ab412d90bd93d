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
"""What the page keeps of a scan, for models that differ in what a further question needs."""

import numpy as np
import pytest
import torch
from tiny_families import build_family

from ct_moe.hub.app.answers import Reader
from ct_moe.hub.conversion import convert_base
from ct_moe.hub.tiny_base import build_tiny_base
from ct_moe.volume_ct_moe import Volume


MODELS = {
    "one": ({}, "all before the experts"),
    "no experts": ({"moe_layers": []}, "all before the experts"),
    "slice scores": ({"slice_scoring": "tgis"}, "all before the experts"),
    "3D encoder": ({"preset": "med_2e3"}, "all before the experts"),
    # Its language model reads early layers of the tower as well: every question starts from the pixels.
    "qwen3_vl": ({"image_size": 64}, "nothing"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_further_question_gets_the_answer_that_it_would_get_alone(name, tmp_path):
    settings, reused = MODELS[name]
    base = build_family(name, tmp_path / "base") if name == "qwen3_vl" else build_tiny_base(tmp_path / "base")
    convert_base(base, tmp_path / "model", parity=False, progress=False, **settings)
    reader = Reader(str(tmp_path / "model"), max_new_tokens=8, dtype="float32")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in reader.reporter.model.named_parameters():
            if ".moe." in parameter_name:  # new experts add nothing
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    hu = np.random.default_rng(0).integers(-1000, 600, (12, 40, 40)).astype(np.int16)
    volume = Volume(hu, (5.0, 3.0, 3.0), None, {"warnings": [], "intensity": "hu"})
    scan = reader.open(volume)
    for question in ("Is there a stone?", "Where is it?"):
        *_, result = reader.ask(scan, question=question)
        alone = reader.reporter(volume, question=question, max_new_tokens=8)
        assert result["text"] == alone["text"]
        assert (
            result["routing"]["slice_scores"]
            == reader.reporter(volume, question=question, max_new_tokens=1, return_routing=True)["routing"][
                "slice_scores"
            ]
        )
    assert result["reused"] == reused
