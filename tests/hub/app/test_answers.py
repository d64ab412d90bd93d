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
import threading
from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ct_moe import PromptError
from ct_moe.hub.app.answers import MAX_FEATURES


SAME_TASK = ("Is there a pleural effusion?", "Is there a liver lesion?")


def last(texts):
    *_, result = texts
    return result


@pytest.fixture
def costs(reader, monkeypatch):
    """Floating-point operations of each visual encoding, in order. Attention is counted only where it is eager."""
    model, counted = reader.reporter.model, []
    encode, before = model.get_image_features, model.config.vision_config._attn_implementation

    def count(**inputs):
        with FlopCounterMode(display=False) as counter:
            features = encode(**inputs)
        counted.append(counter.get_total_flops())
        return features

    model.model.vision_tower.set_attn_implementation("eager")
    monkeypatch.setattr(model, "get_image_features", count)
    yield counted
    model.model.vision_tower.set_attn_implementation(before)


def test_a_second_question_costs_at_most_15_percent_and_gets_the_answer_it_would_get_alone(
    reader, phantom_volume, costs
):
    scan = reader.open(phantom_volume)
    questions = [SAME_TASK[0], SAME_TASK[1], None, SAME_TASK[0]]
    results = [last(reader.ask(scan, question=question)) for question in questions]
    assert [result["reused"] for result in results] == [
        "nothing",
        "all before the experts",
        "all before the experts",
        "everything",
    ]
    assert results[0]["task"] == results[1]["task"] != results[2]["task"]
    first, same_task, other_task = costs
    assert same_task <= 0.15 * first
    assert other_task <= 0.15 * first
    for question, result in zip(questions, results):
        alone = reader.reporter(phantom_volume, question=question, max_new_tokens=reader.max_new_tokens)
        assert result["text"] == alone["text"]
        assert result["task"] == alone["task"]
        assert result["processing"] == alone["processing"]
        assert result["warnings"] == alone["warnings"]


def test_kept_features_equal_those_computed_anew(reader, phantom_volume):
    scan = reader.open(phantom_volume)
    for question in SAME_TASK:
        last(reader.ask(scan, question=question))
    fresh = reader.open(phantom_volume)
    last(reader.ask(fresh, question=SAME_TASK[1]))
    kept, anew = list(scan.features.values())[-1], next(iter(fresh.features.values()))
    assert torch.equal(kept.pooler_output[0], anew.pooler_output[0])
    for ours, theirs in zip(kept.routing.router_logits, anew.routing.router_logits):
        assert torch.equal(ours, theirs)


def test_text_comes_word_by_word_and_the_scan_remembers_what_was_said(reader, phantom_volume):
    scan = reader.open(phantom_volume)
    *texts, result = reader.ask(scan, context="fever")
    assert len(set(texts)) > 3
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert texts[-1] == result["text"]
    assert "fever" in result["prompt"]
    assert scan.report["text"] == result["text"]
    assert "maps" in result["routing"]
    assert "maps" not in scan.report["routing"]
    assert scan.answers == []
    assert scan.hu.base.size == 1  # its shape, and no voxels


def test_only_so_many_features_are_kept(reader, phantom_volume):
    scan = reader.open(phantom_volume)
    for number in range(MAX_FEATURES + 2):
        last(reader.ask(scan, question=f"Question {number}?", max_new_tokens=1))
    assert len(scan.features) == MAX_FEATURES


def test_two_users_at_once_get_what_each_would_get_alone(reader, phantom_volume):
    alone = {question: reader.reporter(phantom_volume, question=question)["text"] for question in SAME_TASK}
    said = {}

    def use(question: str) -> None:
        said[question] = last(reader.ask(reader.open(phantom_volume), question=question))["text"]

    users = [threading.Thread(target=use, args=[question]) for question in SAME_TASK]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert said == alone


def test_a_user_who_leaves_does_not_hold_the_model(reader, phantom_volume):
    scan = reader.open(phantom_volume)
    texts = reader.ask(scan, max_new_tokens=512, min_new_tokens=512)
    next(texts)
    texts.close()
    assert scan.report is None
    assert reader._lock.acquire(timeout=1)
    reader._lock.release()


def test_errors_reach_the_caller(reader, phantom_volume, monkeypatch):
    scan = reader.open(phantom_volume)
    with pytest.raises(PromptError, match="question: holds only spaces"):
        last(reader.ask(scan, question="  "))

    def fail(**inputs):
        raise RuntimeError("broken")

    monkeypatch.setattr(reader.reporter.model, "get_image_features", fail)
    with pytest.raises(RuntimeError, match="broken"):
        last(reader.ask(scan))
    monkeypatch.undo()
    assert last(reader.ask(scan))["text"]
