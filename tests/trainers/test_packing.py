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
"""Rows about one scan in one: every conversation sees what it would see alone, and the visual work is done once."""

from collections import Counter

import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close
from toy_rows import row

from ct_moe import ModelError, TrainingError
from ct_moe.hub.folder import load_folder
from ct_moe.trainers import CTMoEDataCollator
from ct_moe.trainers.packing import PACKED_FEATURES, pack_rows
from ct_moe.trainers.recipe import Stage1Config, Stage2Config
from ct_moe.trainers.rows import ROW_FEATURES
from ct_moe.trainers.two_stage import train_stage


QUESTIONS = ["Where is the nodule?", "How large is it, in millimetres?", "On which side?", "Is it calcified?"]
SYSTEM = {"role": "system", "content": "You read CT."}


def questions(scan: str, first: int = 1, system: bool = False) -> list[dict]:
    rows = [row(first + i, "vqa_open", f"answer {i} of some words", [scan], text) for i, text in enumerate(QUESTIONS)]
    if system:
        rows = [{**row, "prompt": [SYSTEM, *row["prompt"]]} for row in rows]
    return rows


def data(rows: list[dict]) -> Dataset:
    return Dataset.from_list(rows, features=ROW_FEATURES)


def packed(rows: list[dict]) -> dict:
    """As `pack_rows` joins them, in their order."""
    return {**rows[0], "packed": rows[1:]}


def inputs_of(batch: dict) -> dict:
    return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor) and name != "row_tasks"}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("system", [False, True])
def test_every_conversation_gets_the_logits_it_would_get_alone(trained_model, scans, attention, system):
    model, processor = trained_model
    model.set_attn_implementation(attention)
    collator = CTMoEDataCollator(processor)
    rows = questions(scans[0], system=system)
    short = row(9, "report", "a short report", scans[1:2])
    batch = collator([packed(rows), short])
    guide = {name: batch[name][:1] for name in ("guide_input_ids", "guide_attention_mask", "task_ids")}
    with torch.no_grad():
        together = model(**inputs_of(batch))
        for number, example in enumerate(rows, 1):
            alone = inputs_of(collator([example])) | guide  # routed by the first prompt, as the pack is
            expected = model(**alone).logits[0]
            place = (batch["segment_ids"][0] == number) & batch["attention_mask"][0].bool()
            own = alone["labels"][0] != -100
            tokens = int(place.sum())
            assert torch.equal(batch["input_ids"][0, place], alone["input_ids"][0, -tokens:])
            assert torch.equal(batch["labels"][0, place], alone["labels"][0, -tokens:])
            assert own[-tokens:].sum() == own.sum() > 0
            assert_close(together.logits[0, place], expected[-tokens:], atol=1e-5, rtol=1e-5)
        report = collator([short])
        alone = model(**inputs_of(report))
        length = report["input_ids"].shape[1]
        assert_close(together.logits[1, :length], alone.logits[0], atol=1e-5, rtol=1e-5)
    assert len(batch["pixel_values"]) == 2
    assert batch["row_names"] == ["rows 1, 2, 3, 4", "row 9"]


def test_the_loss_of_a_pack_is_that_of_its_rows(trained_model, scans):
    """With nothing routed by the text, as then the guide of the first row makes no difference."""
    model, processor = trained_model
    collator = CTMoEDataCollator(processor)
    rows = questions(scans[0])
    inputs = [inputs_of(collator(batch)) for batch in ([packed(rows)], rows)]
    losses = []
    for batch in inputs:
        for name in ("guide_input_ids", "guide_attention_mask", "task_ids"):
            del batch[name]
        losses.append(model(**batch).loss)
    assert_close(*losses, atol=1e-6, rtol=1e-6)
    gradients = [torch.autograd.grad(loss, model.model.multi_modal_projector.parameters()) for loss in losses]
    for one, other in zip(*gradients):
        assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_packs_hold_every_row_once_and_only_rows_that_share_all(scans):
    rows = data(
        [
            *questions(scans[0]),
            *questions(scans[1], 5),
            *questions(scans[0], 9, system=True),
            row(13, "vqa_open", "a spot", [], "What is a nodule?"),
            row(14, "vqa_open", "a lump", [], "What is a mass?"),
            row(15, "report", "text", scans[:1]),
            row(16, "vqa_open", "both", scans[:2], "In which of the two?"),
        ]
    )
    packs = pack_rows(rows, 3)
    assert packs.features == PACKED_FEATURES
    members = [[pack["row"], *(other["row"] for other in pack["packed"])] for pack in packs]
    assert sorted(number for pack in members for number in pack) == list(range(1, 17))
    alike = [*[range(1 + 4 * i, 5 + 4 * i) for i in range(3)], *[range(n, n + 1) for n in range(13, 17)]]
    assert all(any(set(pack) <= set(group) for group in alike) for pack in members)
    assert Counter(map(len, members)) == {3: 3, 1: 7}
    for pack in packs:
        for other in pack["packed"]:
            assert other["prompt"] == rows[other["row"] - 1]["prompt"]
            assert other["completion"] == rows[other["row"] - 1]["completion"]
    assert pack_rows(rows, 3).to_list() == packs.to_list() != pack_rows(rows, 3, seed=1).to_list()
    assert pack_rows(rows, 1) is rows


def test_packs_across_tasks_differ_in_nothing_but_the_task(scans):
    rows = data(
        [
            *questions(scans[0]),
            row(5, "report", "text", scans[:1]),
            *questions(scans[1], 6),
            row(10, "vqa_open", "a spot", [], "What is a nodule?"),
        ]
    )
    packs = pack_rows(rows, 9, across_tasks=True)
    members = [[pack["row"], *(other["row"] for other in pack["packed"])] for pack in packs]
    assert sorted(map(sorted, members)) == [[1, 2, 3, 4, 5], [6, 7, 8, 9], [10]]
    for pack in packs:
        assert pack["task"] == rows[pack["row"] - 1]["task"]
    firsts = {pack_rows(rows, 9, seed, across_tasks=True)[0]["task"] for seed in range(20)}
    assert firsts == {"report", "vqa_open"}


def test_a_scan_that_cannot_be_read_takes_its_pack_with_it(trained_model, scans, tmp_path):
    collator = CTMoEDataCollator(trained_model[1])
    batch = collator([packed(questions(str(tmp_path / "none.nii"), 5)), packed(questions(scans[0]))])
    assert batch["row_names"] == ["rows 1, 2, 3, 4"]
    assert [failure["row"] for failure in batch["failed_rows"]] == ["rows 5, 6, 7, 8"]


@pytest.mark.parametrize("across_tasks", [False, True])
def test_a_stage_trains_on_packs(model_folder, scans, settings, tmp_path, across_tasks):
    rows = data([*questions(scans[0]), *questions(scans[1], 5), row(9, "report", "text", scans[:1])])
    seen = []
    stage = Stage1Config(**settings, questions_per_scan=4, pack_across_tasks=across_tasks)
    out = train_stage(str(model_folder), stage, rows, tmp_path / "out", say=seen.append)
    before, after = (load_folder(str(folder), dtype="float32")[0] for folder in (model_folder, out))
    trained = zip(before.model.multi_modal_projector.parameters(), after.model.multi_modal_projector.parameters())
    assert any(not torch.equal(one, other) for one, other in trained)


def test_packs_across_tasks_are_for_stages_without_task_groups(settings):
    assert Stage1Config(**settings, pack_across_tasks=True).pack_across_tasks
    for more in ({"train_task_groups": "full"}, {"even_tasks": True}):
        with pytest.raises(TrainingError, match="pack_across_tasks"):
            Stage1Config(**settings, **more, pack_across_tasks=True)
    with pytest.raises(TrainingError, match="pack_across_tasks"):
        Stage2Config(**settings, pack_across_tasks=True)


@pytest.mark.parametrize("questions_per_scan", [0, -1])
def test_fewer_than_one_question_is_refused(settings, questions_per_scan):
    with pytest.raises(TrainingError, match="questions_per_scan"):
        Stage1Config(**settings, questions_per_scan=questions_per_scan)


def test_streamed_rows_are_refused(scans):
    with pytest.raises(TrainingError, match="streamed rows"):
        pack_rows(data(questions(scans[0])).to_iterable_dataset(), 2)


def test_segments_ask_for_positions_and_for_attention_that_can_be_masked(trained_model):
    model, processor = trained_model
    ids = processor.tokenizer("some words", return_tensors="pt")["input_ids"]
    with pytest.raises(ModelError, match="without position_ids"):
        model(input_ids=ids, segment_ids=torch.zeros_like(ids))
    model.set_attn_implementation({"text_config": "flex_attention"})
    with pytest.raises(ModelError, match="flex_attention"):
        model(input_ids=ids, segment_ids=torch.zeros_like(ids), position_ids=torch.arange(ids.shape[1])[None])
