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
"""TG-IS of design section 2.4: scores and tokens against loops over slices, with one encoder and with two."""

import itertools
import math

import pytest
import torch
from slow_moe import slow_guide
from tiny_model import one_volume, prompt_inputs, tiny_model, volume_inputs

from ct_moe import CTMoEConfig, CTMoEForConditionalGeneration
from ct_moe.configuration_ct_moe import med_2e3
from ct_moe.errors_ct_moe import ModelError


SLICES = [5, 3, 1]
VOLUME_ENCODER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_slices": 8,
    "image_size": 12,
    "patch_size": (2, 4, 4),
    "pool": (2, 2, 1),
}
# Name -> vision fields and fields of the model.
VARIANTS = {
    "centred": ({}, {}),
    "as published": ({}, {"tgis_variant": "paper"}),
    "other weight": ({}, {"tgis_alpha": 0.9}),
    "unpooled": ({}, {"pool": (1, 1, 1)}),
    "uneven pool": ({}, {"pool": (3, 1, 2)}),
    "without experts": ({"moe_layers": []}, {}),
    "all layers 3D": ({"volume_layers": [0, 1, 2, 3]}, {}),
    "purely 2D": ({"volume_layers": [], "moe_layers": []}, {}),
    "two encoders": ({"volume_layers": [], "moe_layers": []}, {"volume_encoder_config": VOLUME_ENCODER}),
    "two encoders, as published": (
        {"volume_layers": [], "moe_layers": []},
        {"volume_encoder_config": VOLUME_ENCODER, "tgis_variant": "paper", "pool": (1, 1, 1)},
    ),
}
variants = pytest.mark.parametrize(("vision", "fields"), VARIANTS.values(), ids=VARIANTS)


def scoring_model(vision=None, **fields):
    return tiny_model(vision, slice_scoring="tgis", **fields)


def slow_projector(projector, x):
    return projector.linear_2.weight @ torch.nn.functional.gelu(
        projector.linear_1.weight @ x + projector.linear_1.bias
    ) + (projector.linear_2.bias)


def slow_cells(grid, pool, projector):
    """Tokens of a `(depth, rows, columns, D)` grid, cell by cell: a list over z of lists of projected means."""
    depth, rows, columns, _ = grid.shape
    cells = []
    for z in range(0, depth, pool[0]):
        tokens = []
        for y, x in itertools.product(range(0, rows, pool[1]), range(0, columns, pool[2])):
            part = grid[z : z + pool[0], y : y + pool[1], x : x + pool[2]].flatten(0, 2)
            tokens.append(slow_projector(projector, sum(part) / len(part)))
        cells.append(tokens)
    return cells


def slow_tgis(model, volume, features_2d, features_3d, token_ids):
    """Scores and visual tokens of one volume from its 2D `(S, rows, columns, D)` and 3D features."""
    config, core = model.config, model.model
    slices = slow_cells(features_2d, [1, *config.pool[1:]], core.multi_modal_projector)
    if config.volume_encoder_config is None:
        cells, per_cell = slow_cells(features_3d, config.pool, core.multi_modal_projector), config.pool[0]
    else:
        encoder = config.volume_encoder_config
        cells, per_cell = slow_cells(features_3d, encoder.pool, core.volume_projector), encoder.slices_per_cell
    guide = slow_guide(model, token_ids)
    target = core.slice_scoring.text_weight @ guide
    alpha = config.tgis_alpha
    states = []
    for j, tokens in enumerate(slices):
        cell = cells[j // per_cell]
        states.append(alpha * sum(cell) / len(cell) + (1 - alpha) * sum(tokens) / len(tokens))
    if config.tgis_variant == "paper":
        logits = [float(state @ target) / 5 for state in states]
    else:
        centre = sum(states) / len(states)
        logits = []
        for state in states:
            norms = float((state - centre).norm() * target.norm())
            cosine = float((state - centre) @ target) / norms if norms else 0.0
            logits.append(cosine / math.exp(float(core.slice_scoring.log_temperature)))
    top = max(logits)
    total = sum(math.exp(value - top) for value in logits)
    scores = [math.exp(value - top) / total for value in logits]
    weighted = [sum(s * tokens[i] for s, tokens in zip(scores, slices)) for i in range(len(slices[0]))]
    return scores, torch.stack([token for cell in cells for token in cell] + weighted)


def slow_2d_features(model, inputs, volume):
    """Each slice alone through a tower without volume layers and experts, `(S, rows, columns, D)`."""
    vision = model.config.vision_config
    flat = type(model.model.vision_tower)(
        type(vision)(**{**vision.to_dict(), "volume_layers": [], "moe_layers": []})
    ).eval()
    missing, _ = flat.load_state_dict(model.model.vision_tower.state_dict(), strict=False)
    assert missing == []
    rows = []
    for j in range(int(inputs["slice_mask"][volume].sum())):
        pixel_values = inputs["pixel_values"][volume : volume + 1, j : j + 1]
        output = flat(pixel_values=pixel_values, volume_scale=inputs["volume_scale"][volume : volume + 1])
        rows.append(output.last_hidden_state[0, 0, -(vision.grid_size**2) :])
    return torch.stack(rows).unflatten(1, (vision.grid_size, vision.grid_size))


@variants
@torch.no_grad()
def test_scores_and_tokens_equal_loops_over_slices_and_cells(vision, fields):
    model = scoring_model(vision, **fields)
    inputs = volume_inputs(model.config, SLICES)
    features = model.get_image_features(**inputs, output_prefix_hidden_states=True)
    grid = model.config.vision_config.grid_size
    for volume, slices in enumerate(SLICES):
        two = slow_2d_features(model, inputs, volume)
        three = features.last_hidden_state[volume, :slices, -(grid**2) :].unflatten(1, (grid, grid))
        if features.volume_hidden_states is not None:
            depth = -(-slices // model.config.volume_encoder_config.patch_size[0])
            three = features.volume_hidden_states[volume, :depth]
        kept = inputs["guide_attention_mask"][volume].bool()
        ids = inputs["guide_input_ids"][volume][kept].tolist()
        scores, tokens = slow_tgis(model, volume, two, three, ids)
        assert features.routing.slice_scores[volume].tolist() == pytest.approx(
            scores + [0.0] * (max(SLICES) - slices), abs=1e-5
        )
        torch.testing.assert_close(features.pooler_output[volume], tokens, rtol=1e-5, atol=1e-5)
        assert len(tokens) == model.config.num_visual_tokens(slices)


@variants
@torch.no_grad()
def test_a_batch_gives_what_each_volume_gives_alone(vision, fields):
    model = scoring_model(vision, **fields)
    inputs = volume_inputs(model.config, SLICES)
    together = model.get_image_features(**inputs)
    for volume, slices in enumerate(SLICES):
        alone = model.get_image_features(**one_volume(inputs, volume))
        torch.testing.assert_close(together.pooler_output[volume], alone.pooler_output[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            together.routing.slice_scores[volume, :slices], alone.routing.slice_scores[0], rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("variant", ["centred", "paper"])
@pytest.mark.parametrize("order", [[3, 0, 4, 2, 1], [4, 3, 2, 1, 0]])
@torch.no_grad()
def test_permuting_slices_permutes_scores(variant, order):
    """With their positions: the model knows millimetres, not slice numbers. One slice per cell, so none changes it."""
    model = scoring_model(tgis_variant=variant, pool=(1, 2, 2))
    inputs = volume_inputs(model.config, [5])
    moved = {**inputs}
    for name in ("pixel_values", "slice_positions", "patch_mask"):
        moved[name] = inputs[name][:, order]
    before, after = (model.get_image_features(**x).routing.slice_scores[0] for x in (inputs, moved))
    torch.testing.assert_close(after, before[order], rtol=1e-4, atol=1e-6)
    assert before.std() > 1e-3  # there is something to permute


@torch.no_grad()
def test_the_prompt_decides_the_scores_and_no_prompt_scores_all_slices_alike():
    model = scoring_model()
    inputs = volume_inputs(model.config, [5, 3])
    scores = model.get_image_features(**inputs).routing.slice_scores
    other = model.get_image_features(**inputs | {"guide_input_ids": inputs["guide_input_ids"].flip(1) + 1})
    assert (other.routing.slice_scores - scores).abs().max() > 1e-3
    without = {name: value for name, value in inputs.items() if not name.startswith("guide")}
    even = torch.tensor([[1 / 5] * 5, [1 / 3] * 3 + [0, 0]])
    empty = inputs | {"guide_attention_mask": torch.zeros_like(inputs["guide_attention_mask"])}
    for unguided in (without, empty):
        torch.testing.assert_close(model.get_image_features(**unguided).routing.slice_scores, even)


@variants
def test_every_part_gets_a_gradient_and_the_published_form_drops_scores_in_training_only(vision, fields):
    model = scoring_model(vision, **fields).train()
    inputs = volume_inputs(model.config, SLICES)
    torch.cat(model.get_image_features(**inputs).pooler_output).square().sum().backward()
    parts = ("slice_scoring", "guide_encoder", "multi_modal_projector", "volume_projector", "volume_encoder")
    seen = set()
    for name, parameter in model.named_parameters():
        if any(f".{part}." in name for part in parts):
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name
            seen.add(name.split(".")[1])
    assert {"slice_scoring", "guide_encoder", "multi_modal_projector"} <= seen
    with torch.no_grad():
        torch.manual_seed(0)
        runs = [model.get_image_features(**inputs).pooler_output[0][-1] for _ in range(20)]
        dropped = any(not torch.equal(runs[0], run) for run in runs)
        jitter = bool(model.config.vision_config.moe_layers)
        assert dropped == (jitter or model.config.tgis_variant == "paper")
        model.eval()
        runs = [model.get_image_features(**inputs).pooler_output[0] for _ in range(2)]
        assert torch.equal(*runs)


@variants
@torch.no_grad()
def test_a_further_question_needs_no_pixels(vision, fields):
    model = scoring_model(vision, **fields)
    inputs = volume_inputs(model.config, SLICES)
    first = model.get_image_features(**inputs, output_prefix_hidden_states=True)
    other = inputs | {"guide_input_ids": inputs["guide_input_ids"].flip(1) + 1}
    expected = model.get_image_features(**other)
    other.pop("pixel_values")
    kept = {
        name: getattr(first, name) for name in ("prefix_hidden_states", "slice_hidden_states", "volume_hidden_states")
    }
    again = model.get_image_features(**other, **kept)
    torch.testing.assert_close(again.routing.slice_scores, expected.routing.slice_scores, rtol=1e-5, atol=1e-6)
    for tokens, wanted in zip(again.pooler_output, expected.pooler_output):
        torch.testing.assert_close(tokens, wanted, rtol=1e-5, atol=1e-5)
    if first.moe_hidden_states is not None:
        kept |= {"prefix_hidden_states": None, "moe_hidden_states": first.moe_hidden_states}
        for tokens, wanted in zip(model.get_image_features(**other, **kept).pooler_output, again.pooler_output):
            assert torch.equal(tokens, wanted)
    for name in ("slice_hidden_states", *(["volume_hidden_states"] if model.model.volume_encoder else [])):
        with pytest.raises(ModelError, match=f"{name}: missing beside prefix_hidden_states"):
            model.get_image_features(**other, **{**kept, name: None})


@variants
@torch.no_grad()
def test_generation_and_beams_take_the_appended_tokens(vision, fields):
    model = scoring_model(vision, **fields)
    inputs = {**prompt_inputs(model.config, [[3, 1], [2]]), **volume_inputs(model.config, [3, 1, 2])}
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "suppress_tokens": [5]}
    cached = model.generate(**inputs, **settings)
    assert torch.equal(cached, model.generate(**inputs, **settings, use_cache=False))
    beams = model.generate(**inputs, **settings, num_beams=2)
    assert beams.shape == cached.shape


@torch.no_grad()
def test_hidden_states_and_attentions_are_those_of_the_volume_pass_alone():
    model, plain = scoring_model(), tiny_model()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if "slice_scoring" not in name})
    inputs = volume_inputs(model.config, SLICES)
    seen = []
    for each in (model, plain):
        each.set_attn_implementation("eager")
        seen.append(each.get_image_features(**inputs, output_hidden_states=True, output_attentions=True))
    for name, number in (("hidden_states", 5), ("attentions", 4)):
        assert len(seen[0][name]) == len(seen[1][name]) == number
        assert all(map(torch.equal, seen[0][name], seen[1][name]))


def test_gradient_checkpointing_changes_nothing():
    inputs = None
    gradients = []
    for checkpointing in (False, True):
        model = scoring_model({"router_jitter": 0.0, "volume_layers": [2, 3]}).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        inputs = inputs or volume_inputs(model.config, SLICES)
        torch.cat(model.get_image_features(**inputs).pooler_output).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_identical_slices_share_the_score_and_one_slice_takes_it_all():
    model = scoring_model()
    inputs = volume_inputs(model.config, [7], air=0)
    inputs["pixel_values"][:] = inputs["pixel_values"][:, :1]
    inputs["slice_positions"][:] = 0
    scores = model.get_image_features(**inputs).routing.slice_scores[0]
    torch.testing.assert_close(scores, torch.full((7,), 1 / 7), rtol=0.05, atol=0)
    alone = model.get_image_features(**volume_inputs(model.config, [1])).routing.slice_scores
    assert alone.tolist() == [[1.0]]


def test_the_published_system_has_its_published_shapes():
    """Med-2E3: 32 slices of 256 pixels give 256 tokens of M3D-CLIP and 256 of the 2D tower (patches of 16)."""
    config = CTMoEConfig(
        vision_config={"image_size": 256, "patch_size": 16, "volume_layers": []},
        **{name: value for name, value in med_2e3().items() if name != "volume_layers"},
    )
    assert config.tgis_alpha == 0.2
    assert config.num_visual_tokens(32) == 256 + 256
    assert config.volume_cell == [8, 64]
    with torch.device("meta"):
        encoder = CTMoEForConditionalGeneration(config).model.volume_encoder
    # A ViT-B: 12 layers of 7,085,568 - 3 * 768 parameters without q, k, v biases, patches, positions, class token.
    layer = 4 * 768**2 + 768 + 2 * 768 * 3072 + 3072 + 768 + 4 * 768
    own = 3 * 4 * 16 * 16 * 768 + 768 + 8 * 16 * 16 * 768 + 768
    assert sum(p.numel() for p in encoder.parameters()) == 12 * layer + own


@torch.no_grad()
def test_the_3d_encoder_stretches_its_depths_over_the_volume_and_resizes_slices():
    model = scoring_model(*[VARIANTS["two encoders"][0]], **VARIANTS["two encoders"][1])
    embeddings = model.model.volume_encoder.embeddings
    table = embeddings.position_embedding  # (4, 3, 3, 16)
    positions = embeddings._positions(8, torch.tensor([4, 2, 1, 8]))
    torch.testing.assert_close(positions[0, :4], table)
    torch.testing.assert_close(positions[1, :2], torch.stack([table[:2].mean(0), table[2:].mean(0)]))
    torch.testing.assert_close(positions[2, 0], table[1:3].mean(0))
    torch.testing.assert_close(positions[3, 2], 0.25 * table[0] + 0.75 * table[1])

    encoder = model.model.volume_encoder
    pixels = torch.full((1, 3, 3, 30, 30), 0.5)
    small = torch.full((1, 3, 3, 12, 12), 0.5)
    torch.testing.assert_close(encoder(pixels).last_hidden_state, encoder(small).last_hidden_state)
