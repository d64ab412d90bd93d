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
"""What evaluate.py changes in a model before it is measured, and what it refuses."""

import copy
import sys
from pathlib import Path

import pytest
import torch

from ct_moe import CTMoEForConditionalGeneration, CTMoEProcessor, DataError
from ct_moe.trainers.phantoms.anatomy import draw_phantom
from ct_moe.trainers.phantoms.files import write_nifti


DEMO_MODEL = Path(__file__).parents[2] / "examples" / "demo_model"


@pytest.fixture(scope="module")
def evaluate(load_script):
    return load_script("evaluate")


@pytest.fixture
def model():
    return CTMoEForConditionalGeneration.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()


@pytest.fixture
def dense(model):
    """The same weights in a network that was built without experts."""
    config = copy.deepcopy(model.config)
    config.vision_config.moe_layers = []
    dense = CTMoEForConditionalGeneration(config).eval()
    known = dense.state_dict()
    dense.load_state_dict({name: weights for name, weights in model.state_dict().items() if name in known})
    return dense


@torch.no_grad()
def test_without_experts_the_model_is_the_dense_one(evaluate, model, dense, tmp_path):
    processor = CTMoEProcessor.from_pretrained(DEMO_MODEL)
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the scan."}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    scan = write_nifti(draw_phantom(1), tmp_path / "phantom.nii.gz")
    inputs = processor(images=[str(scan)], text=text, guide="Describe the scan.", return_tensors="pt")
    expected = dense(**inputs).logits
    assert (model(**inputs).logits - expected).abs().max() > 1e-3
    evaluate.leave_out_experts(model)
    torch.testing.assert_close(model(**inputs).logits, expected)


def test_a_model_without_experts_has_none_to_leave_out(evaluate, dense):
    with pytest.raises(DataError, match="--without-experts: the model has no experts"):
        evaluate.leave_out_experts(dense)


def test_a_group_that_the_model_does_not_have_is_refused(evaluate, monkeypatch):
    command = ["evaluate.py", "--model", str(DEMO_MODEL), "--data", "nowhere", "--group", "surgery"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match=r"'surgery' is no task of the model.*report, vqa_closed, vqa_open"):
        evaluate.main()
