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
"""Pipeline: structured results from scans, alone, in batches and streamed."""

import json

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, TextStreamer, pipeline

from ct_moe import CTReportPipeline, ModelError, PromptError, VolumeError, load_volume
from ct_moe.hub.tiny_base import build_tiny_base
from ct_moe.pipeline_ct_moe import REPORT_PROMPT, split_report


@pytest.fixture(scope="module")
def reporter(model_folder):
    # Named, since otherwise the folder's own copy of the class runs: test_clean_environment.py is for that.
    return pipeline(
        "ct-report", model=str(model_folder), pipeline_class=CTReportPipeline, trust_remote_code=True, device="cpu"
    )


@pytest.fixture(scope="module")
def scans(test_data):
    folder = test_data / "totalseg"
    return [str(folder / name) for name in ("example_ct_sm.nii.gz", "aorta_ct_cropped.nii.gz", "example_ct.nii.gz")]


def test_a_report_is_structured_and_can_be_written_as_json(reporter, scans, model_folder):
    result = reporter(scans[0], max_new_tokens=6, return_routing=True)
    assert result["scan"] == scans[0]
    assert result["task"] == "report"
    assert result["prompt"] == REPORT_PROMPT
    assert result["findings"] == result["text"]
    assert result["impression"] is None
    assert (result["num_slices"], result["slab_mm"]) == (18, 5.0)  # 30 slices of 3 mm
    assert result["model"] == str(model_folder)
    assert "not a medical device" in result["notice"]
    assert "not evidence" in result["routing"]["notice"]
    assert sum(result["routing"]["task_probabilities"].values()) == pytest.approx(1)
    for layer in result["routing"]["layers"]:
        assert sum(layer["shared_load"]) == pytest.approx(1)
        assert sum(layer["task_load"]) == pytest.approx(1)
    assert json.loads(json.dumps(result)) == result


def test_result_equals_the_model_used_by_hand(reporter, scans):
    processor, model = reporter.processor, reporter.model
    question = "Is the aorta dilated?"
    messages = [{"role": "user", "content": [{"type": "image", "path": scans[1]}, {"type": "text", "text": question}]}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    generated = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    expected = processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    result = reporter(scans[1], question=f" {question} ", max_new_tokens=12)
    assert result["answer"] == result["text"] == expected
    assert "findings" not in result
    with torch.no_grad():
        routing = model(**inputs).routing
    assert result["task"] == model.config.tasks[routing.task_index[0]]


def test_a_batch_gives_each_scan_its_own_result(reporter, scans):
    alone = [reporter(scan, max_new_tokens=8) for scan in scans]
    assert reporter(scans, batch_size=2, max_new_tokens=8) == alone
    assert list(reporter(iter(scans), batch_size=3, max_new_tokens=8)) == alone
    assert reporter(load_volume(scans[0]), max_new_tokens=8) == {**alone[0], "scan": None}
    assert reporter([]) == []


def test_context_and_task_reach_the_model(reporter, scans):
    result = reporter(scans[0], question="Any stone?", context="flank pain", task="vqa_open", max_new_tokens=2)
    assert result["task"] == "vqa_open"
    assert result["prompt"] == "Clinical context: flank pain\nAny stone?"


def test_text_can_be_streamed(reporter, scans, capsys):
    streamer = TextStreamer(reporter.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    result = reporter(scans[0], max_new_tokens=8, streamer=streamer)
    assert capsys.readouterr().out.strip() == result["text"]


@pytest.mark.parametrize(
    ("arguments", "subject"),
    [
        ({"question": "   "}, "question"),
        ({"question": ["Effusion?"]}, "question"),
        ({"context": ""}, "context"),
        ({"task": "surgery"}, "task"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"qestion": "Effusion?"}, "qestion"),
    ],
)
def test_bad_requests_are_refused(reporter, scans, arguments, subject):
    with pytest.raises(PromptError) as error:
        reporter(scans[0], **arguments)
    assert error.value.subject == subject


def test_a_scan_that_is_a_list_is_refused(reporter, scans):
    with pytest.raises(PromptError, match="load_volume"):
        reporter([scans])


def test_what_was_refused_can_be_let_through_as_the_error_says(reporter, test_data):
    result = reporter(str(test_data / "totalseg" / "example_mr_sm.nii.gz"), check="off", max_new_tokens=2)
    assert result["processing"]["source_shape"] == [20, 91, 117]


def test_columns_of_a_dataset_are_lists_of_scans(reporter, scans):
    from datasets import Dataset
    from transformers.pipelines.pt_utils import KeyDataset

    dataset = Dataset.from_dict({"images": scans[:2]})
    expected = reporter(scans[:2], max_new_tokens=2)
    assert reporter(dataset["images"], max_new_tokens=2) == expected
    assert reporter(KeyDataset(dataset, "images"), max_new_tokens=2, num_workers=2) == expected


def test_streaming_a_batch_is_refused(reporter, scans):
    with pytest.raises(PromptError, match="batch_size=1"):
        reporter(scans, streamer=TextStreamer(reporter.processor.tokenizer), batch_size=2)


def test_a_scan_that_is_not_ct_is_refused(reporter, test_data):
    with pytest.raises(VolumeError, match="this is not CT"):
        reporter(str(test_data / "totalseg" / "example_mr_sm.nii.gz"))


def test_a_saved_pipeline_is_whole(reporter, scans, tmp_path):
    reporter.save_pretrained(tmp_path / "saved")
    again = pipeline("ct-report", model=str(tmp_path / "saved"), trust_remote_code=True)
    assert again(scans[0], max_new_tokens=4)["text"] == reporter(scans[0], max_new_tokens=4)["text"]
    code = {path.name for path in (tmp_path / "saved").glob("*_ct_moe.py")}
    assert {"processing_ct_moe.py", "pipeline_ct_moe.py", "volume_dicom_ct_moe.py"} <= code


def test_a_folder_of_another_model_is_refused(tmp_path):
    base = build_tiny_base(tmp_path / "base")
    with pytest.raises(ModelError, match="type 'llava'"):
        pipeline("ct-report", model=str(base), pipeline_class=CTReportPipeline)


def test_a_model_of_another_type_is_refused(reporter):
    tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    with pytest.raises(ModelError, match="type 'bert'"):
        CTReportPipeline(model=BertForMaskedLM(tiny), processor=reporter.processor)


@pytest.mark.parametrize(
    ("text", "findings", "impression"),
    [
        ("Findings: clear lungs.\nImpression: normal.", "clear lungs.", "normal."),
        (
            "**FINDINGS:**\nLungs: clear.\nHeart: normal.\n\nCONCLUSION:\nNormal.",
            "Lungs: clear.\nHeart: normal.",
            "Normal.",
        ),
        ("Impression: normal.", None, "normal."),
        ("The impression is of a normal scan.", "The impression is of a normal scan.", None),
        ("Technique: plain.\nFindings: none.", "Technique: plain.\nnone.", None),
        ("", None, None),
    ],
)
def test_sections_are_found_by_their_headings(text, findings, impression):
    assert split_report(text) == {"findings": findings, "impression": impression}
