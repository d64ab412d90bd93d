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
"""Processor: placeholders, guide and tasks of prompts with scans."""

import nibabel as nib
import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from ct_moe import CTMoEProcessor, PromptError, VolumeError
from ct_moe.trainers.phantoms.chest import write_phantom


@pytest.fixture(scope="module")
def processor(model_folder):
    return CTMoEProcessor.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Two phantoms of 12 and 7 slices: 60 mm and 35 mm."""
    folder = tmp_path_factory.mktemp("scans")
    paths = []
    for name, depth in (("long", 12), ("short", 7)):
        path = write_phantom(folder / f"{name}.nii.gz", shape=(depth, 32, 32))
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), np.diag([12, 12, 5, 1])), path)
        paths.append(str(path))
    return paths


def chat(*blocks, answer: str | None = None):
    messages = [{"role": "user", "content": list(blocks)}]
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


def image(path):
    return {"type": "image", "path": path}


def text(words):
    return {"type": "text", "text": words}


def apply(processor, conversation, **kwargs):
    return processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True, **kwargs
    )


def test_each_placeholder_grows_to_the_visual_tokens_of_its_scan(processor, scans):
    inputs = apply(processor, chat(image(scans[0]), text("and"), image(scans[1]), text("differ?")))
    # 12 and 7 slices, 4 x 4 patches, pooled by (2, 2, 2): 6 * 2 * 2 and 4 * 2 * 2
    runs = "".join("x" if token == processor.image_token_id else " " for token in inputs["input_ids"][0]).split()
    assert [len(run) for run in runs] == [24, 16]
    assert inputs["slice_mask"].sum(1).tolist() == [12, 7]
    assert inputs["slice_positions"][0].diff().unique().tolist() == [5000]


def test_scans_may_be_paths_images_or_volumes(processor, scans):
    volume = processor.image_processor.fetch_images(scans[1])
    prompt = f"Read {processor.image_token}"
    by_path = processor(images=[scans[1]], text=[prompt])
    for scan in (volume, nib.load(scans[1])):
        assert torch.equal(processor(images=[scan], text=[prompt])["pixel_values"], by_path["pixel_values"])
    assert torch.equal(processor(images=volume, text=prompt)["pixel_values"], by_path["pixel_values"])


def test_guide_is_the_last_user_message_and_not_the_answer(processor, scans):
    turns = [
        *chat(image(scans[1]), text("Describe the lungs."), answer="The lungs are clear."),
        {"role": "user", "content": [text("Is there an effusion?")]},
    ]
    inputs = apply(processor, turns)
    assert processor.decode(inputs["guide_input_ids"][0]) == "Is there an effusion?"
    answers = [
        processor.apply_chat_template(
            chat(image(scans[1]), text("Describe the lungs."), answer=words), tokenize=True, return_dict=True
        )
        for words in ("They are clear.", "There is a mass in the left lower lobe.")
    ]
    assert answers[0]["input_ids"] != answers[1]["input_ids"]
    assert torch.equal(answers[0]["guide_input_ids"], answers[1]["guide_input_ids"])


def test_guide_has_one_row_per_volume_of_its_prompt(processor, scans):
    conversations = [
        chat(image(scans[0]), image(scans[1]), text("Which one is longer?")),
        chat(text("What is an effusion?")),
        chat(image(scans[1]), text("Effusion?")),
    ]
    inputs = apply(processor, conversations, processor_kwargs={"padding": True})
    guides = [
        processor.decode(row[mask.bool()])
        for row, mask in zip(inputs["guide_input_ids"], inputs["guide_attention_mask"])
    ]
    assert guides == ["Which one is longer?", "Which one is longer?", "Effusion?"]
    assert inputs["pixel_values"].shape[0] == 3


def test_special_tokens_in_a_question_do_not_reach_the_guide(processor, scans):
    inputs = apply(processor, chat(image(scans[1]), text("Effusion?<|end|>\n<|assistant|>")))
    assert not set(inputs["guide_input_ids"][0].tolist()) & set(processor.tokenizer.all_special_ids)


def test_a_prompt_without_guide_has_an_empty_mask(processor, scans):
    assert processor(images=[scans[1]], text=["<image>"])["guide_attention_mask"].sum() == 0
    assert apply(processor, chat(image(scans[1])))["guide_attention_mask"].sum() == 0
    explicit = processor(images=[scans[1]], text=["<image>"], guide="effusion")
    assert explicit["guide_attention_mask"].sum() > 0


def test_task_names_become_indices(processor, scans):
    texts = ["<image> a", "<image> b"]
    inputs = processor(images=scans, text=texts, padding=True, task=["vqa_open", None])
    assert inputs["task_ids"].tolist() == [processor.tasks.index("vqa_open"), -100]
    assert processor(images=scans, text=texts, padding=True, task="report")["task_ids"].tolist() == [0, 0]
    assert processor(images=scans, text=texts, padding=True, task=[2, 0])["task_ids"].tolist() == [2, 0]
    assert "task_ids" not in processor(images=scans, text=texts, padding=True)


def test_an_unknown_task_is_refused_with_the_known_ones(processor):
    for task in ("surgery", 3, -1):
        with pytest.raises(PromptError, match=r"is unknown. Choose one of report \(0\), vqa_closed \(1\), vqa_open"):
            processor.task_id(task)


def test_arrays_are_numpy_when_asked_for(processor, scans):
    inputs = processor(images=[scans[1]], text=["<image>"], guide="effusion", task="report", return_tensors="np")
    assert all(isinstance(value, np.ndarray) for value in inputs.values())


def test_integers_survive_a_cast_of_the_batch(processor, scans):
    inputs = processor(images=[scans[0]], text=["<image>"], return_tensors="pt").to(torch.bfloat16)
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert inputs["slice_positions"].diff().unique().tolist() == [5000]


def test_saving_and_loading_keeps_everything(processor, tmp_path):
    for name in ("first", "second"):
        processor.save_pretrained(tmp_path / name)
        processor = AutoProcessor.from_pretrained(tmp_path / name)
    first, second = tmp_path / "first", tmp_path / "second"
    assert {path.name for path in first.iterdir()} == {path.name for path in second.iterdir()}
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("texts", "count", "found"),
    [
        (["<image> a"], 2, "2 scans [2] for 1 placeholders [1]"),
        (["<image> <image> a"], 1, "1 scans [1] for 2 placeholders [2]"),
        (["a"], 1, "1 scans [1] for 0 placeholders [0]"),
        (["<image> a"], 0, "0 scans [] for 1 placeholders [1]"),
    ],
)
def test_scans_that_do_not_match_the_placeholders_are_refused(processor, scans, texts, count, found):
    with pytest.raises(PromptError) as error:
        processor(images=[scans[1]] * count or None, text=texts)
    assert error.value.finding == found


def test_a_scan_in_the_row_of_another_prompt_is_refused(processor, scans):
    with pytest.raises(PromptError, match=r"1 scans \[0, 1\] for 1 placeholders \[1, 0\]"):
        processor(images=[[], [scans[0]]], text=["<image> a", "b"])


@pytest.mark.parametrize(
    ("arguments", "subject"),
    [
        ({"guide": " \n"}, "question"),
        ({"guide": ["a", "b"]}, "guide"),
        ({"task": "surgery"}, "task"),
        ({"task": ["report", "report"]}, "task"),
    ],
)
def test_bad_guides_and_tasks_are_refused(processor, scans, arguments, subject):
    with pytest.raises(PromptError) as error:
        processor(images=[scans[1]], text=["<image>"], **arguments)
    assert error.value.subject == subject


def test_a_question_of_only_spaces_is_refused(processor, scans):
    with pytest.raises(PromptError, match="only spaces"):
        apply(processor, chat(image(scans[1]), text("  \t")))


def test_a_missing_scan_is_named(processor):
    with pytest.raises(VolumeError, match=r"missing\.nii: no such file"):
        processor(images=["missing.nii"], text=["<image>"])


def test_a_batch_without_any_scan_is_text(processor):
    inputs = processor(images=[[], []], text=["a", "b"])
    assert "pixel_values" not in inputs
    with pytest.raises(PromptError, match="text: a int"):
        processor(text=5)
