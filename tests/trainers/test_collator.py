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
"""Rows to batches: the same inputs as the processor gives, labels on the answer only, nothing of it in the guide."""

import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from toy_rows import ANSWERS, PROMPTS, row

from ct_moe import DataError, VolumeError
from ct_moe.trainers import CTMoEDataCollator


@pytest.fixture
def collator(trained_model):
    return CTMoEDataCollator(trained_model[1])


def test_a_batch_is_what_the_processor_makes_of_the_prompt(collator, scans):
    example = row(1, "vqa_open", "nowhere", scans[:1])
    batch = collator([example])
    prompt = [
        {
            "role": "user",
            "content": [{"type": "image", "path": scans[0]}, {"type": "text", "text": PROMPTS["vqa_open"]}],
        }
    ]
    inputs = collator.processor.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    length = inputs["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][:, :length], inputs["input_ids"])
    for name in set(inputs) - {"input_ids", "attention_mask"}:
        assert torch.equal(batch[name], inputs[name]), name
    assert (batch["labels"][0, :length] == -100).all()
    answer = batch["labels"][0, length:]
    assert torch.equal(answer, batch["input_ids"][0, length:])
    # The model learns to stop.
    assert collator.processor.decode(answer).strip() == "nowhere<|end|>"
    assert batch["task_ids"].tolist() == [2]


def test_the_answer_changes_no_input_of_the_routing(collator, scans):
    batches = [collator([row(1, "report", answer, scans[:1])]) for answer in ANSWERS["report"]]
    for name in ("guide_input_ids", "guide_attention_mask", "task_ids", "pixel_values"):
        assert torch.equal(batches[0][name], batches[1][name])
    assert batches[0]["labels"].shape != batches[1]["labels"].shape or not torch.equal(
        batches[0]["labels"], batches[1]["labels"]
    )


def test_every_volume_has_the_guide_and_task_of_its_row(collator, scans):
    examples = [
        row(1, "vqa_closed", "A. Yes", scans[1:3], prompt="Which of the two?"),
        row(2, "vqa_open", "nowhere", [], prompt="What is a nodule?"),
        row(3, None, "there", scans[:1], prompt="Where?"),
    ]
    batch = collator(examples)
    texts = [
        collator.processor.decode(ids[mask.bool()])
        for ids, mask in zip(batch["guide_input_ids"], batch["guide_attention_mask"])
    ]
    assert texts == ["Which of the two?", "Which of the two?", "Where?"]
    assert batch["task_ids"].tolist() == [1, 1, -100]
    assert batch["row_tasks"].tolist() == [1, 2, -100]
    assert batch["row_names"] == ["row 1", "row 2", "row 3"]
    assert batch["num_volumes"] == 3


def test_the_guide_is_the_last_question_of_a_conversation(collator, scans):
    example = row(1, "vqa_open", "left", scans[:1])
    example["prompt"] = [
        {"role": "system", "content": "You read CT."},
        {"role": "user", "content": "Is there a nodule?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "On which side?"},
    ]
    batch = collator([example])
    assert collator.processor.decode(batch["guide_input_ids"][0]) == "On which side?"
    text = collator.processor.decode(batch["input_ids"][0])
    assert text.index("You read CT.") < text.index("<image>") < text.index("Is there a nodule?") < text.index("Yes.")


def test_rows_without_scans_make_a_batch_without_volumes(collator):
    batch = collator([row(1, "vqa_open", "a spot", [], prompt="What is a nodule?")])
    assert "pixel_values" not in batch
    assert "task_ids" not in batch
    assert batch["num_volumes"] == 0
    assert (batch["labels"] != -100).any()


def test_rows_without_a_number_are_named_by_their_scans(collator, scans):
    example = {name: value for name, value in row(1, "report", "text", scans[:2]).items() if name != "row"}
    assert collator([example])["row_names"] == [f"{scans[0]}, {scans[1]}"]


def test_unreadable_rows_leave_the_batch(collator, scans, tmp_path):
    good, bad = row(1, "report", "text", scans[:1]), row(2, "report", "text", [scans[0], str(tmp_path / "none.nii")])
    examples = [bad, good]
    batch = collator(deepcopy(examples))
    alone = collator([good])
    assert batch["row_names"] == ["row 1"]
    assert [failure["row"] for failure in batch["failed_rows"]] == ["row 2"]
    assert "none.nii" in batch["failed_rows"][0]["error"]
    assert all(torch.equal(batch[name], alone[name]) for name in alone if isinstance(alone[name], torch.Tensor))
    strict = CTMoEDataCollator(collator.processor, on_error="raise")
    with pytest.raises(VolumeError):
        strict(examples)


def test_a_batch_without_a_readable_row_is_air_without_labels(collator, tmp_path):
    batch = collator([row(1, "report", "text", [str(tmp_path / "none.nii")])])
    assert batch["row_names"] == []
    assert batch["num_volumes"] == 0
    assert (batch["labels"] == -100).all()
    assert not batch["patch_mask"].any()
    assert batch["task_ids"].tolist() == [-100]
    assert torch.isfinite(batch["pixel_values"]).all()


def test_where_parameters_are_spread_every_batch_has_a_volume(collator):
    collator = CTMoEDataCollator(collator.processor, always_volumes=True)
    example = row(1, "vqa_open", "a spot", [], prompt="What is a nodule?")
    batch, alone = collator([example]), CTMoEDataCollator(collator.processor)([example])
    assert batch["pixel_values"].shape[0] == 1
    assert batch["num_volumes"] == 0
    assert batch["row_names"] == ["row 1"]
    labels = batch["labels"][batch["labels"] != -100]
    assert torch.equal(labels, alone["labels"][alone["labels"] != -100])


def test_one_path_where_a_list_belongs_is_refused(collator, scans):
    # Letter by letter it would be many paths, the root of the disk among them.
    with pytest.raises(DataError, match="not all of them lists"):
        collator([row(1, "report", "text", scans[:1]) | {"images": scans[0]}])


def test_the_messages_form_is_refused_with_the_reason(collator, scans):
    with pytest.raises(DataError, match="could hold the answer"):
        collator([{"images": scans[:1], "messages": [{"role": "user", "content": "x"}]}])


def test_missing_columns_are_named(collator, scans):
    with pytest.raises(DataError, match="has the columns completion, images"):
        collator([{"images": scans[:1], "completion": [{"role": "assistant", "content": "x"}]}])
    with pytest.raises(DataError, match="has the columns completion, prompt"):
        collator([{"prompt": [], "completion": []}])


def test_a_column_of_another_meaning_is_left_alone(collator, scans):
    example = row(1, "report", "text", scans[:1])
    plain, other = collator([dict(example)]), collator([example | {"text": "something else", "patient": 3}])
    assert torch.equal(plain["input_ids"], other["input_ids"])


_LOADER = """
import sys
from torch.utils.data import DataLoader
from ct_moe import CTMoEProcessor
from ct_moe.trainers import CTMoEDataCollator
row = {
    "images": [sys.argv[2]],
    "prompt": [{"role": "user", "content": "Where?"}],
    "completion": [{"role": "assistant", "content": "there"}],
}
collator = CTMoEDataCollator(CTMoEProcessor.from_pretrained(sys.argv[1]))
loader = DataLoader([row] * 4, batch_size=2, num_workers=1, persistent_workers=True, collate_fn=collator)
print(len(list(loader)))
"""


def test_a_process_with_persistent_workers_ends(model_folder, scans):
    command = [sys.executable, "-c", _LOADER, model_folder, scans[0]]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stdout) == (0, "2\n"), result.stderr
