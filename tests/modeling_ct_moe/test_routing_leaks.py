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
"""The answer steers nothing: no routing decision depends on it, bit for bit, in training and in generation."""

import pytest
import torch

from ct_moe import load_volume
from ct_moe.hub.conversion import convert_base
from ct_moe.hub.folder import load_folder
from ct_moe.hub.tiny_base import build_tiny_base
from ct_moe.trainers.phantoms.chest import write_phantom


QUESTION = "Is there a pleural effusion?"
ANSWERS = [None, "No.", "Yes, a large one on the left side.", "Write a report. There are stones in both kidneys."]


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A model that scores slices and routes, its own parameters moved off their first values, and a scan."""
    folder = tmp_path_factory.mktemp("leaks")
    base = build_tiny_base(folder / "base")
    convert_base(base, folder / "model", parity=False, progress=False, slice_scoring="tgis", router_jitter=0.1)
    model, processor, _ = load_folder(str(folder / "model"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "language_model" not in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model, processor, load_volume(write_phantom(folder / "scan.nii.gz"))


def conversation(volume, question: str, answer: str | None) -> list[dict]:
    messages = [{"role": "user", "content": [{"type": "image", "image": volume}, {"type": "text", "text": question}]}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def model_inputs(scene, question: str, answer: str | None) -> dict[str, torch.Tensor]:
    _, processor, volume = scene
    return processor.apply_chat_template(
        conversation(volume, question, answer),
        add_generation_prompt=answer is None,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def decisions(model, inputs) -> dict[str, torch.Tensor]:
    """All that was decided about the scan: every router's logits, routed tokens, task, slice scores, losses."""
    torch.manual_seed(0)  # of the jitter
    routing = model(**inputs, labels=inputs["input_ids"], output_router_logits=True).routing
    assert len(routing.router_logits) == len(model.config.vision_config.moe_layers) > 0
    found = {name: value for name, value in routing.items() if name != "router_logits"}
    return found | {f"layer {number}": logits for number, logits in enumerate(routing.router_logits)}


def equal(first, second) -> dict[str, bool]:
    assert first.keys() == second.keys()
    return {name: torch.equal(first[name], second[name]) for name in first}


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_changing_or_removing_the_answer_changes_no_decision(scene, training):
    model = scene[0].train(training)
    first, *others = (decisions(model, model_inputs(scene, QUESTION, answer)) for answer in ANSWERS)
    assert {"task_logits", "slice_scores", "token_mask"} <= first.keys()
    assert ("aux_loss" in first) == training
    for other in others:
        assert all(equal(first, other).values())


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_changing_the_prompt_changes_the_decisions(scene, training):
    model = scene[0].train(training)
    first = decisions(model, model_inputs(scene, QUESTION, ANSWERS[1]))
    other = decisions(model, model_inputs(scene, "Describe the liver.", ANSWERS[1]))
    same = equal(first, other)
    assert not any(same[name] for name in ("layer 0", "task_logits", "slice_scores"))
    assert same["token_mask"]  # what is air does not depend on words


def test_what_was_generated_so_far_changes_no_decision(scene):
    """The decisions of a whole generation, seen in the vision encoder, are those of the prompt alone; made once."""
    model = scene[0].eval()
    inputs = model_inputs(scene, QUESTION, None)
    expected, seen = decisions(model, inputs), []
    hook = model.model.vision_tower.register_forward_hook(lambda module, args, output: seen.append(output))
    generated = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    hook.remove()
    routed = [output.router_logits for output in seen if output.router_logits is not None]
    assert len(routed) == 1
    for number, logits in enumerate(routed[0]):
        assert torch.equal(logits, expected[f"layer {number}"])
    # The whole text, read again: the same decisions.
    attention_mask = torch.ones_like(generated)
    again = decisions(model, {**inputs, "input_ids": generated, "attention_mask": attention_mask})
    assert all(equal(expected, again).values())


def test_an_earlier_answer_is_no_guide_either(scene):
    """In a conversation the guide is the last user message, and nothing that the model said before it."""
    model, processor, volume = scene
    model.eval()

    def routing(answer):
        messages = [*conversation(volume, "What is this?", answer), {"role": "user", "content": QUESTION}]
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        return decisions(model, inputs)

    first = routing("A chest CT.")
    assert all(equal(first, routing("An abdomen with stones.")).values())
    assert all(equal(first, decisions(model, model_inputs(scene, QUESTION, None))).values())
