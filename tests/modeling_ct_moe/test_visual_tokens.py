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
"""From features to the prompt: pooling, order, projector, and the placeholders that visual tokens replace."""

import itertools

import pytest
import torch
from tiny_model import IMAGE_TOKEN, prompt_inputs, tiny_config, tiny_model, volume_inputs

from ct_moe.errors_ct_moe import CTMoEError, ModelError, PromptError


POOLS = [(1, 1, 1), (2, 2, 2), (3, 1, 2), (1, 3, 3), (2, 5, 1), (9, 9, 9)]


def slow_visual_tokens(model, features, slices: int) -> list[torch.Tensor]:
    """`features` (S, N, D) of one volume: cell by cell in z, y, x order, each the mean of what exists, projected."""
    grid, (pz, py, px) = model.config.vision_config.grid_size, model.config.pool
    projector, tokens = model.model.multi_modal_projector, []
    for z, y, x in itertools.product(range(0, slices, pz), range(0, grid, py), range(0, grid, px)):
        cell = [
            features[i, -(grid**2) + j * grid + k]
            for i in range(z, min(z + pz, slices))
            for j in range(y, min(y + py, grid))
            for k in range(x, min(x + px, grid))
        ]
        mean = sum(cell) / len(cell)
        hidden = torch.nn.functional.gelu(projector.linear_1.weight @ mean + projector.linear_1.bias)
        tokens.append(projector.linear_2.weight @ hidden + projector.linear_2.bias)
    return tokens


@pytest.mark.parametrize("class_token", [True, False], ids=["class token", "no class token"])
@pytest.mark.parametrize("pool", POOLS, ids=str)
@torch.no_grad()
def test_pooling_equals_loops_over_cells(pool, class_token):
    model = tiny_model({"class_token": class_token}, pool=pool)
    slices = [5, 3, 1]
    features = model.get_image_features(**volume_inputs(model.config, slices))
    assert [len(tokens) for tokens in features.pooler_output] == [model.config.num_visual_tokens(n) for n in slices]
    for volume, tokens in enumerate(features.pooler_output):
        slow = torch.stack(slow_visual_tokens(model, features.last_hidden_state[volume], slices[volume]))
        torch.testing.assert_close(tokens, slow, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_placeholders_are_counted_as_the_cells_that_hold_something(pool):
    config = tiny_config(pool=pool)
    for slices in range(1, 12):
        cells = {
            (z // pool[0], y // pool[1], x // pool[2])
            for z, y, x in itertools.product(range(slices), range(3), range(3))
        }
        assert config.num_visual_tokens(slices) == len(cells)


@torch.no_grad()
def test_visual_tokens_take_the_places_of_the_placeholders_in_order():
    """Rows with two volumes, none and one: the language model is given exactly these embeddings."""
    model = tiny_model()
    rows = [[3, 1], [], [2]]
    volumes = volume_inputs(model.config, [3, 1, 2])
    prompts = prompt_inputs(model.config, rows)
    seen = {}
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    outputs = model(**prompts, **volumes)
    tokens = list(torch.cat(model.get_image_features(**volumes).pooler_output))
    for row, ids in zip(seen["inputs_embeds"], prompts["input_ids"]):
        for embedding, token in zip(row, ids):
            expected = tokens.pop(0) if token == IMAGE_TOKEN else model.get_input_embeddings().weight[token]
            torch.testing.assert_close(embedding, expected, rtol=1e-6, atol=1e-6)
    assert tokens == []
    assert len(outputs.image_hidden_states) == sum(map(model.config.num_visual_tokens, [3, 1, 2]))


@torch.no_grad()
def test_embeddings_of_the_prompt_serve_as_well_as_its_tokens():
    model = tiny_model()
    inputs = {**prompt_inputs(model.config, [[3], [2]]), **volume_inputs(model.config, [3, 2])}
    expected = model(**inputs).logits
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_wrong_number_of_placeholders_is_refused_with_both_counts(change):
    model = tiny_model()
    inputs = {**prompt_inputs(model.config, [[3]]), **volume_inputs(model.config, [3])}
    place = (inputs["input_ids"][0] == (IMAGE_TOKEN if change < 0 else 11)).nonzero()[0]
    inputs["input_ids"][0, place] = 20 if change < 0 else IMAGE_TOKEN
    tokens = model.config.num_visual_tokens(3)
    with pytest.raises(PromptError, match=f"{tokens + change} placeholder tokens for {tokens} visual tokens of 1"):
        model(**inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {**x, "pixel_values": x["pixel_values"][..., :-1]}, r"shape \(1, 3, 3, 12, 11\)"),
        (lambda x: {"pixel_values": x["pixel_values"][0]}, r"shape \(3, 3, 12, 12\)"),
        (lambda x: {**x, "slice_mask": x["slice_mask"][:, 1:]}, r"slice_mask: shape \(1, 2\), expected \(1, 3\)"),
        (lambda x: {**x, "slice_positions": x["slice_positions"][0]}, r"slice_positions: shape \(3,\)"),
        (lambda x: {**x, "patch_mask": torch.ones(1, 3, 4, 4)}, r"shape \(1, 3, 4, 4\), expected \(1, 3, 3, 3\)"),
        (lambda x: {**x, "volume_scale": torch.zeros(1, 3)}, r"volume_scale: shape \(1, 3\), expected \(1, 2\)"),
        (lambda x: {**x, "slice_positions": None}, "missing for volumes of 3 slices"),
        (lambda x: {**x, "task_ids": torch.tensor([3])}, "3 names no task of"),
        (lambda x: {**x, "task_ids": torch.tensor([0, 1])}, "2 rows for 1 volumes"),
        (lambda x: {**x, "pixel_values": None}, "both or neither of pixel_values and prefix_hidden_states"),
        (lambda x: {**x, "prefix_hidden_states": torch.zeros(1, 3, 10, 32)}, "both or neither of pixel_values and"),
        (
            lambda x: {
                **x,
                "pixel_values": None,
                "prefix_hidden_states": torch.zeros(1, 3, 10, 32),
                "slice_positions": None,
            },
            "missing for volumes of 3 slices",
        ),
    ],
)
def test_inputs_that_cannot_be_meant_are_refused(change, message):
    model = tiny_model()
    with pytest.raises(ModelError, match=message) as error:
        model.get_image_features(**change(volume_inputs(model.config, [3])))
    assert isinstance(error.value, CTMoEError)


def test_pixels_and_encoded_volumes_together_are_refused():
    model = tiny_model()
    inputs = {**prompt_inputs(model.config, [[3]]), **volume_inputs(model.config, [3])}
    with torch.no_grad():
        features = model.get_image_features(**volume_inputs(model.config, [3]))
    with pytest.raises(ModelError, match="given together with pixel_values"):
        model(**inputs, mm_encoder_outputs={"image": features})
    with pytest.raises(ModelError, match="both or neither of input_ids and inputs_embeds"):
        model(pixel_values=inputs["pixel_values"])
