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
"""`generate`: caches, beams, several scans in a prompt, none, and asking again without encoding again."""

import pytest
import torch
from tiny_model import IMAGE_TOKEN, VOLUME_INPUTS, one_volume, prompt_inputs, tiny_model, volume_inputs


# An untrained model may utter the image token, which would then wait for visual tokens.
SETTINGS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "suppress_tokens": [IMAGE_TOKEN]}
ROWS = [[3, 1], [2]]  # two scans in the first prompt, one in the second


@pytest.fixture(scope="module")
def model():
    """With a language model that listens: what it says next depends on all it was given."""
    model = tiny_model()
    with torch.no_grad():
        for name, parameter in model.model.language_model.named_parameters():
            if "_proj" in name:
                parameter *= 3
    return model


@pytest.fixture
def inputs(model):
    return {**prompt_inputs(model.config, ROWS), **volume_inputs(model.config, [3, 1, 2])}


def row_alone(inputs, row: int) -> dict[str, torch.Tensor]:
    """One prompt with its scans and without padding."""
    first, last = [(0, 2), (2, 3)][row]
    real = inputs["attention_mask"][row].bool()
    volumes = {name: inputs[name][first:last] for name in VOLUME_INPUTS if name in inputs}
    if row == 1:
        volumes = one_volume(inputs, 2)
    return {name: inputs[name][row : row + 1, real] for name in ("input_ids", "attention_mask")} | volumes


def new_tokens(sequences, inputs) -> list[list[int]]:
    return sequences[:, inputs["input_ids"].shape[1] :].tolist()


def test_with_and_without_cache_agree(model, inputs):
    with_cache, without = (model.generate(**inputs, **SETTINGS, use_cache=flag) for flag in (True, False))
    assert torch.equal(with_cache, without)
    assert len({token for row in new_tokens(with_cache, inputs) for token in row}) > 2


def test_every_step_equals_a_whole_forward_pass(model, inputs):
    """Greedy by hand: the argmax of a forward pass over everything so far."""
    generated = model.generate(**inputs, **SETTINGS)
    volumes = {name: inputs[name] for name in VOLUME_INPUTS if name in inputs}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(SETTINGS["max_new_tokens"]):
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, **volumes).logits[:, -1]
        logits[:, [IMAGE_TOKEN, model.config.text_config.eos_token_id]] = -torch.inf
        ids = torch.cat([ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    assert torch.equal(generated, ids)


@pytest.mark.parametrize("beams", [1, 2, 3])
def test_a_batch_gives_what_each_prompt_gives_alone(model, inputs, beams):
    together = new_tokens(model.generate(**inputs, **SETTINGS, num_beams=beams), inputs)
    for row in range(2):
        alone = row_alone(inputs, row)
        assert new_tokens(model.generate(**alone, **SETTINGS, num_beams=beams), alone) == [together[row]]


def test_the_score_of_every_beam_is_that_of_its_own_scans(model, inputs):
    """All beams of all prompts, scored by a forward pass of the prompt alone."""
    settings = {**SETTINGS, "num_beams": 2, "num_return_sequences": 2, "length_penalty": 0.0}
    result = model.generate(**inputs, **settings, output_scores=True, return_dict_in_generate=True)
    tokens = new_tokens(result.sequences, inputs)
    for number, (answer, score) in enumerate(zip(tokens, result.sequences_scores.tolist())):
        alone = row_alone(inputs, number // 2)
        answer = torch.tensor([answer])
        alone["input_ids"] = torch.cat([alone["input_ids"], answer], dim=1)
        alone["attention_mask"] = torch.ones_like(alone["input_ids"])
        with torch.no_grad():
            logits = model(**alone).logits[:, -answer.shape[1] - 1 : -1]
        log_probs = logits.log_softmax(dim=-1).gather(2, answer.unsqueeze(-1))
        assert score == pytest.approx(log_probs.sum().item(), rel=1e-4)


def test_swapping_the_two_scans_of_a_prompt_changes_the_answer_scores(model, inputs):
    """Or the order of scans would not matter, and the tests above could not see a mix-up."""
    alone = row_alone(inputs, 0)
    alone["input_ids"] = prompt_inputs(model.config, [[3, 3]])["input_ids"]
    alone["attention_mask"] = torch.ones_like(alone["input_ids"])
    alone["slice_mask"] = torch.ones_like(alone["slice_mask"])
    swapped = alone | {name: alone[name].flip(0) for name in VOLUME_INPUTS if name in alone}
    with torch.no_grad():
        assert not torch.allclose(model(**alone).logits[:, -1], model(**swapped).logits[:, -1], atol=1e-3)


def test_prompts_without_a_scan_work_alone_and_beside_others(model):
    text = prompt_inputs(model.config, [[]])
    alone = new_tokens(model.generate(**text, **SETTINGS), text)
    rows = [[], [2], []]
    prompts = prompt_inputs(model.config, rows)
    real = text["attention_mask"][0].bool()
    prompts["input_ids"][2, -int(real.sum()) :] = text["input_ids"][0, real]
    prompts["attention_mask"][2] = 0
    prompts["attention_mask"][2, -int(real.sum()) :] = 1
    inputs = {**prompts, **volume_inputs(model.config, [2])}
    for beams in (1, 2):
        together = new_tokens(model.generate(**inputs, **SETTINGS, num_beams=beams), inputs)
        alone = new_tokens(model.generate(**text, **SETTINGS, num_beams=beams), text)
        assert together[2] == alone[0]


@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"num_beams": 2}], ids=str)
def test_scans_are_encoded_once_per_call(model, inputs, settings):
    calls = []
    hook = model.model.vision_tower.layers[0].register_forward_hook(lambda *_: calls.append(1))
    model.generate(**inputs, **SETTINGS, **settings)
    hook.remove()
    assert calls == [1]


@pytest.mark.parametrize("beams", [1, 2])
def test_encoded_scans_serve_instead_of_pixels_and_more_than_once(model, inputs, beams):
    volumes = {name: inputs[name] for name in VOLUME_INPUTS if name in inputs}
    prompts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected = model.generate(**inputs, **SETTINGS, num_beams=beams)
    with torch.no_grad():
        features = model.get_image_features(**volumes)
    for _ in range(2):
        asked = model.generate(**prompts, **SETTINGS, num_beams=beams, mm_encoder_outputs={"image": features})
        assert torch.equal(asked, expected)


def test_a_forced_task_reaches_generate(model, inputs):
    """Experts of the forced group alone are blown up: the answer changes if, and only if, it is used."""
    other = tiny_model()
    with torch.no_grad():
        other.load_state_dict(model.state_dict())
        for layer in (2, 3):
            first = other.config.vision_config.num_experts * 3  # task 2
            other.model.vision_tower.layers[layer].moe.experts.down_proj[first:] *= 20
    settings = {**SETTINGS, "output_logits": True, "return_dict_in_generate": True}
    for task, same in ((0, True), (2, False)):
        task_ids = torch.full((3,), task)
        before, after = (m.generate(**inputs, task_ids=task_ids, **settings).logits[0] for m in (model, other))
        assert torch.equal(before, after) is same


def test_sampled_answers_see_their_own_scan(model, inputs):
    settings = {**SETTINGS, "do_sample": True, "top_k": 1, "num_return_sequences": 2}
    sampled = new_tokens(model.generate(**inputs, **settings), inputs)
    greedy = new_tokens(model.generate(**inputs, **SETTINGS), inputs)
    assert sampled == [greedy[0], greedy[0], greedy[1], greedy[1]]
