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
"""Blocks that some bases have, with several slices: against masks, loops and what they must not see."""

import math

import pytest
import torch
from tiny_model import IMAGE_TOKEN, tiny_config, tiny_model, volume_inputs
from torch.testing import assert_close

from ct_moe import ModelError
from ct_moe.modeling_ct_moe import CTMoERotaryEmbedding, apply_rotary


PLANE = {
    "class_token": False,
    "pre_layernorm": False,
    "post_layernorm": True,
    "image_size": 16,
    "rotary_theta": 100.0,
    "num_attention_heads": 2,
}
WINDOWS = {**PLANE, "window_size": 2, "full_attention_layers": [2]}


def features(model, **inputs):
    model.config.pool = [1, 1, 1]
    return model.get_image_features(**inputs).pooler_output


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_windows_span_slices_and_hide_the_rest(attention):
    """The same network without windows, told by a mask of every pair which tokens may see each other."""
    windowed, whole = tiny_model(WINDOWS), tiny_model(PLANE)
    whole.load_state_dict(windowed.state_dict())
    for model in (windowed, whole):
        model.set_attn_implementation(attention)
    inputs = volume_inputs(windowed.config, [3, 2])
    grid, slices = windowed.config.vision_config.grid_size, 3
    window = torch.tensor([(row // 2) * (grid // 2) + column // 2 for row in range(grid) for column in range(grid)])
    alike = window[:, None] == window
    real = inputs["slice_mask"].repeat_interleave(grid**2, dim=1)
    within_volume = alike.repeat(slices, slices)[None, None] & real[:, None, None]

    def only_windows(layer):
        def add_mask(module, args, kwargs):
            if kwargs.get("slicewise") or not layer.is_volume_layer:
                kwargs["attention_mask"] = None
            mask = within_volume if layer.is_volume_layer else alike[None, None]
            filler = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
            return args, {**kwargs, "attention_mask": filler}

        return add_mask

    for number, layer in enumerate(whole.model.vision_tower.layers):
        if number != 2:
            layer.self_attn.register_forward_pre_hook(only_windows(layer), with_kwargs=True)
    with torch.no_grad():
        for one, other in zip(features(windowed, **inputs), features(whole, **inputs)):
            assert_close(one, other, atol=1e-5, rtol=1e-5)
        unmasked = tiny_model(PLANE)
        unmasked.load_state_dict(windowed.state_dict())
        assert (features(unmasked, **inputs)[0] - features(windowed, **inputs)[0]).abs().max() > 1e-3


def test_windows_that_do_not_fit_are_refused():
    with pytest.raises(ModelError, match="5 patches along a side, which windows of 2 do not divide"):
        tiny_config({**WINDOWS, "image_size": 20})


def test_row_and_column_turn_as_written_out_by_hand():
    config = tiny_config(PLANE).vision_config
    (volume_cos, _), (cos, sin) = CTMoERotaryEmbedding(config)(torch.zeros(1, 2, dtype=torch.int32), 16)
    dim = config.hidden_size // config.num_attention_heads
    for token in range(16):
        row, column = divmod(token, 4)
        angles = [place * 100.0 ** (-2 * i / (dim / 2)) for place in (row, column) for i in range(dim // 4)]
        assert_close(cos[0, 0, token], torch.tensor([math.cos(angle) for angle in angles * 2]), atol=1e-6, rtol=0)
        assert_close(sin[0, 0, token], torch.tensor([math.sin(angle) for angle in angles * 2]), atol=1e-6, rtol=0)
    assert torch.equal(volume_cos[0, 0], cos[0, 0].repeat(2, 1))  # every slice at 0: nothing is added


def test_depth_joins_the_plane_and_scores_depend_on_differences():
    config = tiny_config(PLANE).vision_config
    rotary = CTMoERotaryEmbedding(config)
    dim = config.hidden_size // config.num_attention_heads
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 1, 1, 32, dim, generator=generator)

    def scores(micrometres):
        (cos, sin), _ = rotary(torch.tensor([micrometres], dtype=torch.int32), 16)
        return apply_rotary(queries, cos, sin) @ apply_rotary(keys, cos, sin).transpose(-1, -2)

    assert_close(scores([0, 30_000]), scores([500_000, 530_000]), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(scores([0, 30_000]), scores([0, 10_000]), atol=1e-2)


def test_stacked_patches_come_row_by_row():
    model = tiny_model({"image_size": 16}, merge_size=2, merge_mode="stack", pool=(1, 1, 1))
    states = torch.randn(1, 2, 17, 32)
    cells, _ = model.model._pool_tower(states, torch.ones(1, 2, dtype=torch.bool))
    for slice_ in range(2):
        grid = states[0, slice_, 1:].view(4, 4, 32)
        for row in range(2):
            for column in range(2):
                block = [grid[2 * row + i, 2 * column + j] for i in range(2) for j in range(2)]
                assert torch.equal(cells[0, slice_, 2 * row + column], torch.cat(block))


def test_averaged_patches_are_pooled_as_if_they_were_larger():
    model = tiny_model({"image_size": 16}, merge_size=2, merge_mode="mean", pool=(1, 2, 2))
    states = torch.randn(1, 1, 17, 32)
    cells, _ = model.model._pool_tower(states, torch.ones(1, 1, dtype=torch.bool))
    assert_close(cells[0, 0], states[0, 0, 1:].mean(dim=0, keepdim=True), atol=1e-6, rtol=1e-6)


def test_rows_are_separated_and_followed_by_an_overview():
    """By the number of a token: 10 * slice + 3 * row + column, -1 behind a row, -2 before the overview."""
    model = tiny_model(separators="rows", pool=(1, 1, 1))
    model.model.row_token.data.fill_(-1)
    model.model.view_token.data.fill_(-2)
    places = torch.tensor([10.0 * s + 3 * r + c for s in range(2) for r in range(3) for c in range(3)])
    tokens = model.model._separate_rows(places[:, None].expand(-1, 32), 9)[:, 0].tolist()
    slices = [0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 10, 11, 12, -1, 13, 14, 15, -1, 16, 17, 18, -1]
    assert tokens == [*slices, -2, 5, 6, 7, -1, 8, 9, 10, -1, 11, 12, 13, -1]
    assert len(tokens) == model.config.num_visual_tokens(2)
    inputs = volume_inputs(model.config, [4, 2])
    lengths = [len(tokens) for tokens in model.get_image_features(**inputs).pooler_output]
    assert lengths == [model.config.num_visual_tokens(4), model.config.num_visual_tokens(2)]


def seen_by(model, input_ids, **inputs) -> torch.Tensor:
    """`(tokens, tokens)`: does the output of the one change when the embedding of the other does?"""
    embeds = model.get_input_embeddings()(input_ids).detach()
    volumes = model.get_image_features(**inputs)
    embeds[input_ids == IMAGE_TOKEN] = torch.cat(volumes.pooler_output)

    def run(embeds):
        # The placeholders are still known: of the embeddings the language model gets the changed ones.
        handle = model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "inputs_embeds": embeds}), with_kwargs=True
        )
        try:
            return model.model(input_ids=input_ids, mm_encoder_outputs={"image": volumes}).last_hidden_state[0]
        finally:
            handle.remove()

    before = run(embeds)
    seen = []
    for place in range(input_ids.shape[1]):
        changed = embeds.clone()
        changed[0, place] += 1
        seen.append((run(changed) - before).abs().amax(dim=-1) > 1e-6)
    return torch.stack(seen, dim=1)


@pytest.mark.parametrize("kind", ["causal", "image", "prompt"])
def test_who_sees_whom_in_the_language_model(kind):
    model = tiny_model(image_attention=kind, pool=(1, 3, 3))  # a token per slice
    words = [20, 21, *[IMAGE_TOKEN] * 3, 22, *[IMAGE_TOKEN] * 2, 23, 24]
    inputs = volume_inputs(model.config, [3, 2])
    with torch.no_grad():
        seen = seen_by(model, torch.tensor([words]), **inputs)
    expected = torch.ones(len(words), len(words)).tril().bool()
    if kind == "image":
        expected[2:5, 2:5] = expected[6:8, 6:8] = True
    elif kind == "prompt":
        expected[:] = True
    assert torch.equal(seen, expected)


def test_positions_of_three_axes_against_a_loop():
    model = tiny_model({"image_size": 16}, position_axes=3, merge_size=2, merge_mode="stack", pool=(2, 1, 1))
    words = torch.tensor(
        [
            [0, 0, 20, *[IMAGE_TOKEN] * 8, 21, *[IMAGE_TOKEN] * 4, 22],
            [20, *[IMAGE_TOKEN] * 12, 23, 24, 25, 26],
        ]
    )
    mask = torch.tensor([[0, 0] + [1] * 15, [1] * 17])
    places, deltas = model.model._axial_positions(words == IMAGE_TOKEN, [8, 4, 12], mask)
    for row, volumes in enumerate([[2, 1], [3]]):
        expected, following, cells = [], 0, iter(volumes)
        index = 0
        tokens = words[row][mask[row].bool()].tolist()
        while index < len(tokens):
            if tokens[index] != IMAGE_TOKEN:
                expected.append([following] * 3)
                following, index = following + 1, index + 1
                continue
            number = next(cells)
            for z in range(number):
                expected += [[following + 2 * z, following + r, following + c] for r in range(2) for c in range(2)]
            following += max(2 * (number - 1) + 1, 2)
            index += 4 * number
        real = mask[row].bool()
        assert places[:, row, real].T.tolist() == expected
        assert deltas[row].item() == following - int(real.sum())


def test_earlier_layers_reach_the_language_model_in_the_order_of_volumes():
    model = tiny_model({"deepstack_layers": [0, 2]}, pool=(1, 1, 1))
    inputs = volume_inputs(model.config, [2, 3])
    with torch.no_grad():
        both = model.get_image_features(**inputs)
        tower = model.model.vision_tower(**{k: v for k, v in inputs.items() if "guide" not in k})
    assert [tuple(tokens.shape) for tokens in both.deepstack_output] == [(18, 2, 24), (27, 2, 24)]
    states = tower.deepstack_hidden_states[0][1, :3, 1:].flatten(0, 1)  # before any expert: the same without a guide
    expected = model.model.deepstack_projectors[0](states)
    assert_close(both.deepstack_output[1][:, 0], expected, atol=1e-5, rtol=1e-5)
    prefix = model.get_image_features(**inputs, output_prefix_hidden_states=True).prefix_hidden_states
    with pytest.raises(ModelError, match="reads earlier layers"):
        model.get_image_features(**{**inputs, "pixel_values": None}, prefix_hidden_states=prefix)
