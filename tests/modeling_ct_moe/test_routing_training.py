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
"""What training makes of the routers, in toy runs: gradients, collapse, slices that are asked for."""

import pytest
import torch
from tiny_model import IMAGE_TOKEN, prompt_inputs, tiny_config, volume_inputs

from ct_moe import CTMoEForConditionalGeneration
from ct_moe.routing_ct_moe import routing_statistics


@pytest.fixture(autouse=True)
def one_thread():
    """For these sizes the second one costs more than it gives, and much more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fresh_model(vision=None, **fields) -> CTMoEForConditionalGeneration:
    """As converted, zero-initialised where the design says so, in training mode."""
    torch.manual_seed(0)
    return CTMoEForConditionalGeneration(tiny_config(vision, **fields)).train()


def test_the_language_loss_alone_reaches_every_router_from_the_second_step_on():
    model = fresh_model(router_balance_coef=0, router_z_coef=0, task_coef=0)
    assert model.config.vision_config.num_experts_per_tok == 1
    inputs = {**volume_inputs(model.config, [3, 3, 2, 2]), **prompt_inputs(model.config, [[3], [3], [2], [2]])}
    inputs["task_ids"] = torch.tensor([0, 1, 2, -100])
    routers = {n: p for n, p in model.named_parameters() if "_router." in n and "task_router" not in n}
    assert len(routers) == 2 * 2 * 3  # layers, shared and task, W and A and U
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def step():
        optimizer.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        # One row per task; the shared router has one.
        return {name: p.grad.flatten(1).abs().amax(dim=1) for name, p in routers.items()}

    assert not any(rows.any() for rows in step().values())  # the experts still add nothing
    optimizer.step()
    second = step()
    # A is multiplied by W x only, so it moves with the rest; no router waits for another step.
    assert all((rows > 0).all() for rows in second.values()), second
    assert model.model.task_router.weight.grad.any()  # by the unlabelled row


@pytest.mark.parametrize("balanced", [True, False], ids=["with balance loss", "without"])
def test_a_collapsed_router_recovers_with_the_balance_loss_and_not_without(balanced):
    """All tokens of every volume go to one expert of the shared group at first."""
    model = fresh_model(
        {"moe_layers": [3], "guide_interaction": "none", "router_jitter": 0.0},
        tasks=[],
        router_balance_coef=0.01 if balanced else 0.0,
        router_z_coef=0.0,
    )
    inputs = {**volume_inputs(model.config, [3, 3], air=0), **prompt_inputs(model.config, [[3], [3]])}
    layer = model.model.vision_tower.layers[3]
    with torch.no_grad():  # a constant feature of the norm, and one expert that likes it: by 3 nats, as after training
        layer.layer_norm2.weight[0], layer.layer_norm2.bias[0] = 0.0, 1.0
        layer.moe.shared_router.weight[0, :, 0] = 0.0
        layer.moe.shared_router.weight[0, 2, 0] = 3.0

    optimizer = torch.optim.AdamW(model.model.vision_tower.parameters(), lr=3e-3, weight_decay=0.0)
    loads = []
    for _ in range(200):
        optimizer.zero_grad()
        outputs = model(**inputs, labels=inputs["input_ids"], output_router_logits=True)
        outputs.loss.backward()
        optimizer.step()
        statistics = routing_statistics(outputs.routing, model.config.vision_config)
        loads.append(statistics[0]["shared_load"].mean(dim=0))
    assert loads[0][2] == 1.0
    # Of one step alone, rounding decides whether an expert has half of the tokens or none.
    load = torch.stack(loads[-50:]).mean(dim=0)
    if balanced:
        assert load.min() > 0.2  # of 0.25
    else:
        assert load[2] > 0.95


# --- slices that are asked for ---

NUM_SLICES, COLOURS, COLOUR_WORDS, ANSWER_WORDS = 6, 2, (20, 21), (40, 41)


def planted_volumes(config, count: int, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Noise with one slice bright in channel 0 and one bright in channel 1; the prompt asks about one of the two.

    The answer is whether that slice is bright in channel 2 above or below, as every slice is one or the other. The
    mean of all slices does not tell: only who picks the slice can answer. Returns the inputs and the slices asked for.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(high, *shape):
        return torch.randint(0, high, shape, generator=generator)

    size, rows = config.vision_config.image_size, torch.arange(count)
    pixel_values = 0.3 * torch.randn(count, NUM_SLICES, 3, size, size, generator=generator)
    below = random(2, count, NUM_SLICES)
    pixel_values[:, :, 2, : size // 2] += 2.0 * (below == 0)[..., None, None]
    pixel_values[:, :, 2, size // 2 :] += 2.0 * (below == 1)[..., None, None]
    planted = torch.stack([torch.randperm(NUM_SLICES, generator=generator)[:COLOURS] for _ in rows])
    for colour in range(COLOURS):
        pixel_values[rows, planted[:, colour], colour] += 2.0
    asked = random(COLOURS, count)
    target = planted[rows, asked]

    question = torch.tensor(COLOUR_WORDS)[asked, None]
    answer = torch.tensor(ANSWER_WORDS)[below[rows, target], None]
    placeholders = torch.full((count, config.num_visual_tokens(NUM_SLICES)), IMAGE_TOKEN)
    input_ids = torch.cat([torch.ones_like(question), placeholders, question, answer], dim=1)
    labels = input_ids.clone()
    labels[:, :-1] = -100
    inputs = {
        "input_ids": input_ids,
        "labels": labels,
        "pixel_values": pixel_values,
        "slice_positions": (5000 * torch.arange(NUM_SLICES, dtype=torch.int32)).repeat(count, 1),
        "guide_input_ids": question,
        "guide_attention_mask": torch.ones_like(question),
    }
    return inputs, target


@pytest.mark.parametrize("variant", ["centred", "paper"])
def test_the_slice_that_the_prompt_asks_for_learns_the_highest_score(variant):
    """From the answers alone: nobody tells the model which slice it is. With two encoders, on volumes never seen.

    The 3D encoder is blind to channel 2. If it were not, leaving out the slice would tell its answer as well as
    picking it does: the mean of all less the mean of the others.
    """
    torch.manual_seed(0)
    encoder = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_slices": NUM_SLICES,
        "image_size": 12,
        "patch_size": (1, 6, 6),
        "initializer_range": 0.2,
    }
    config = tiny_config(
        {"volume_layers": [], "moe_layers": [], "patch_size": 6, "feature_layer": 2, "initializer_range": 0.2},
        slice_scoring="tgis",
        tgis_variant=variant,
        # Cosines in 24 dimensions are about ten times those at a real width: from 0.07 some seeds never start.
        tgis_temperature={"centred": 0.8, "paper": 5.0}[variant],
        pool=(1, 1, 1),
        volume_encoder_config=encoder,
    )
    config.text_config.initializer_range = 0.2
    model = CTMoEForConditionalGeneration(config).train()
    seen_in_3d = model.model.volume_encoder.embeddings.patch_embedding.weight
    blind = torch.tensor([1.0, 1.0, 0.0]).view(1, 3, 1, 1, 1)
    seen_in_3d.data *= blind
    seen_in_3d.register_hook(lambda gradient: gradient * blind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(200):
        inputs, _ = planted_volumes(config, 64, seed=1 + step)
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
    model.eval()
    inputs, target = planted_volumes(config, 200, seed=0)
    with torch.no_grad():
        outputs = model(**inputs)
    highest = outputs.routing.slice_scores.argmax(dim=-1)
    assert (highest == target).float().mean() > 0.9
    answers = outputs.logits[:, -2].argmax(dim=-1)
    assert (answers == inputs["input_ids"][:, -1]).float().mean() > 0.9
    # The same volumes, the other question: the other slice.
    other = sum(COLOUR_WORDS) - inputs["guide_input_ids"]
    with torch.no_grad():
        moved = model(**{**inputs, "guide_input_ids": other}).routing.slice_scores.argmax(dim=-1)
    assert (moved != highest).float().mean() > 0.9
