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
"""Volume attention against loops over tokens: all slices, no padding, angles of millimetres."""

import math

import pytest
import torch
from tiny_model import tiny_config, tiny_model, volume_inputs

from ct_moe.modeling_ct_moe import CTMoERotaryEmbedding, apply_rotary


HEAD_DIM, ROTARY_DIM = 16, 8  # of the tiny vision config: 32 / 2 heads, half of each rotated


def rotated(vector: torch.Tensor, micrometres: int) -> torch.Tensor:
    """One head's query or key, turned pair by pair: channel i goes with channel i + rotary_dim / 2."""
    shortest, longest, half = 40.0, 2000.0, ROTARY_DIM // 2
    turned = vector.clone()
    for pair in range(half):
        wavelength = shortest * (longest / shortest) ** (pair / (half - 1))
        angle = 2 * math.pi * (micrometres / 1000) / wavelength
        first, second = vector[pair], vector[pair + half]
        turned[pair] = first * math.cos(angle) - second * math.sin(angle)
        turned[pair + half] = second * math.cos(angle) + first * math.sin(angle)
    return turned


def slow_attention(attention, states, token_micrometres, real, rotate: bool) -> torch.Tensor:
    """`(tokens, D)` of one volume or slice; one query, one head, one key at a time."""
    queries, keys, values = attention.q_proj(states), attention.k_proj(states), attention.v_proj(states)
    output = torch.zeros_like(states)
    for token in range(len(states)):
        for head in range(2):
            part = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
            scores = []
            for other in range(len(states)):
                query, key = queries[token, part], keys[other, part]
                if rotate:
                    query, key = rotated(query, token_micrometres[token]), rotated(key, token_micrometres[other])
                scores.append((query @ key) / math.sqrt(HEAD_DIM) if real[other] else torch.tensor(-math.inf))
            weights = torch.stack(scores).softmax(dim=0)
            output[token, part] = sum(weight * value for weight, value in zip(weights, values[:, part]))
    return attention.out_proj(output)


@pytest.mark.parametrize("is_volume_layer", [False, True], ids=["slice layer", "volume layer"])
@torch.no_grad()
def test_attention_equals_a_loop_over_tokens(is_volume_layer):
    config = tiny_config()
    model = tiny_model().model.vision_tower
    inputs = volume_inputs(config, [3, 2])
    inputs = {name: inputs[name] for name in ("pixel_values", "slice_mask", "slice_positions", "volume_scale")}
    layer = model.layers[1 if is_volume_layer else 0]
    seen = {}
    layer.self_attn.register_forward_hook(lambda module, args, output: seen.update(given=args[0], returned=output[0]))
    model(**inputs)

    tokens = config.vision_config.num_slice_tokens
    for volume in range(2):
        real_slices = inputs["slice_mask"][volume].tolist()
        if is_volume_layer:
            micrometres = [p for p in inputs["slice_positions"][volume].tolist() for _ in range(tokens)]
            real = [flag for flag in real_slices for _ in range(tokens)]
            slow = slow_attention(layer.self_attn, seen["given"][volume], micrometres, real, rotate=True)
            fast = seen["returned"][volume]
            torch.testing.assert_close(fast[real], slow[real], rtol=1e-5, atol=1e-5)
        else:
            for number in range(sum(real_slices)):
                row = volume * 3 + number
                slow = slow_attention(layer.self_attn, seen["given"][row], None, [True] * tokens, rotate=False)
                torch.testing.assert_close(seen["returned"][row], slow, rtol=1e-5, atol=1e-5)


def test_position_zero_is_the_identity_bit_for_bit():
    rotary = CTMoERotaryEmbedding(tiny_config().vision_config)
    states = torch.randn(1, 2, 6, HEAD_DIM)
    (cos, sin), _ = rotary(torch.zeros(1, 2, dtype=torch.int32), num_tokens=3)
    assert torch.equal(apply_rotary(states, cos, sin), states)


def scores_at(micrometres: list[int]) -> torch.Tensor:
    rotary = CTMoERotaryEmbedding(tiny_config().vision_config)
    (cos, sin), _ = rotary(torch.tensor([micrometres], dtype=torch.int32), num_tokens=1)
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 1, 1, len(micrometres), HEAD_DIM, generator=generator)
    return apply_rotary(queries, cos, sin) @ apply_rotary(keys, cos, sin).transpose(-1, -2)


def test_scores_depend_on_the_difference_of_positions_only():
    here, there = scores_at([0, 5_000, 17_500]), scores_at([600_000, 605_000, 617_500])
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)


def test_millimetres_count_and_not_slice_numbers():
    assert not torch.allclose(scores_at([0, 5_000, 10_000]), scores_at([0, 2_500, 5_000]), atol=1e-2)


def test_bfloat16_states_are_turned_in_float32():
    rotary = CTMoERotaryEmbedding(tiny_config().vision_config)
    (cos, sin), _ = rotary(torch.tensor([[412_345]], dtype=torch.int32), num_tokens=1)
    states = torch.randn(1, 1, 1, HEAD_DIM).bfloat16()
    turned = apply_rotary(states, cos, sin)
    exact = rotated(states.double().flatten(), 412_345)
    assert cos.dtype == torch.float32
    assert turned.dtype == torch.bfloat16
    # Half a unit in the last place of bfloat16: the angle itself, 65 radians, is not rounded to it.
    torch.testing.assert_close(turned.flatten().double(), exact, rtol=2**-8, atol=2**-10)


def test_a_fraction_of_zero_leaves_out_depth():
    model = tiny_model(vision={"depth_rotary_fraction": 0.0}).model.vision_tower
    inputs = volume_inputs(model_config := tiny_config(), [3])
    assert model_config.vision_config.depth_rotary_dim == ROTARY_DIM
    far = {**inputs, "slice_positions": inputs["slice_positions"] * 3}
    keep = ("pixel_values", "slice_positions")
    with torch.no_grad():
        near, far = (model(**{name: x[name] for name in keep}).last_hidden_state for x in (inputs, far))
    assert torch.equal(near, far)
