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
"""The tiny base is what transformers' own classes expect, and the same bytes every time."""

import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from ct_moe import ModelError
from ct_moe.hub.tiny_base import build_tiny_base, radiology_sentences


QUESTION = [
    {"role": "system", "content": "Answer in one sentence."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there a pleural effusion?"}]},
]
ANSWER = {"role": "assistant", "content": "No, there is none."}


@pytest.fixture(scope="module", params=["phi3", "llama"])
def base(request, tmp_path_factory):
    return build_tiny_base(tmp_path_factory.mktemp("base") / request.param, text_model=request.param)


def test_two_processes_write_identical_files(base, tmp_path):
    code = (
        "import sys; from ct_moe.hub.tiny_base import build_tiny_base; "
        "build_tiny_base(sys.argv[1], text_model=sys.argv[2])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    again = tmp_path / "again"
    subprocess.run([sys.executable, "-c", code, again, base.name], check=True, env=environment, capture_output=True)
    assert sorted(path.name for path in again.iterdir()) == sorted(path.name for path in base.iterdir())
    for path in base.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_another_seed_changes_the_weights_and_nothing_else(base, tmp_path):
    other = build_tiny_base(tmp_path / "other", text_model=base.name, seed=1)
    changed = [path.name for path in base.iterdir() if path.read_bytes() != (other / path.name).read_bytes()]
    assert changed == ["model.safetensors"]


def test_global_random_state_is_left_alone(tmp_path):
    before = torch.random.get_rng_state()
    build_tiny_base(tmp_path / "base")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_loads_with_every_tensor_in_place(base):
    _, info = LlavaForConditionalGeneration.from_pretrained(base, output_loading_info=True)
    assert not any(info.values()), info


def test_is_a_few_megabytes(base):
    assert sum(path.stat().st_size for path in base.iterdir()) < 5e6


def test_no_vector_is_left_at_its_trivial_value(base):
    with safe_open(base / "model.safetensors", "pt") as weights:
        for key in weights.keys():
            assert weights.get_tensor(key).std() > 0, key


def test_answers_about_an_image(base):
    processor = AutoProcessor.from_pretrained(base)
    model = LlavaForConditionalGeneration.from_pretrained(base)
    prompt = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    inputs = processor(images=Image.new("RGB", (80, 60), "gray"), text=prompt, return_tensors="pt")
    grid = model.config.vision_config.image_size // model.config.vision_config.patch_size
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == grid**2
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert output.shape[1] > inputs["input_ids"].shape[1]


def test_stops_at_the_end_of_the_turn(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    generation = LlavaForConditionalGeneration.from_pretrained(base).generation_config
    assert generation.eos_token_id == tokenizer.convert_tokens_to_ids("<|end|>") == tokenizer.eos_token_id
    assert generation.pad_token_id == tokenizer.pad_token_id != generation.eos_token_id


def test_chat_template_reads_strings_and_blocks_alike(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    text = tokenizer.apply_chat_template([*QUESTION, ANSWER], tokenize=False)
    assert text == (
        "<|system|>\nAnswer in one sentence.<|end|>\n"
        "<|user|>\n<image>\nIs there a pleural effusion?<|end|>\n"
        "<|assistant|>\nNo, there is none.<|end|>\n"
    )
    blocks = [{**message, "content": _as_blocks(message["content"])} for message in [*QUESTION, ANSWER]]
    assert tokenizer.apply_chat_template(blocks, tokenize=False) == text
    # A prompt with the generation prompt is a prefix of the conversation: training on completions relies on it.
    assert text.startswith(tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True))


def test_chat_template_marks_the_answer_with_its_stop_token(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    encoded = tokenizer.apply_chat_template([*QUESTION, ANSWER], return_dict=True, return_assistant_tokens_mask=True)
    marked = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"]) if mask]
    assert tokenizer.decode(marked) == "No, there is none.<|end|>"


@pytest.mark.parametrize(
    "message",
    [{"role": "tool", "content": "x"}, {"role": "user", "content": [{"type": "video"}]}],
    ids=["role", "type"],
)
def test_chat_template_refuses_what_it_would_drop(base, message):
    tokenizer = AutoTokenizer.from_pretrained(base)
    with pytest.raises(Exception, match="Unknown"):
        tokenizer.apply_chat_template([message], tokenize=False)


def test_tokenizer_knows_radiology_and_loses_nothing(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    sentences = radiology_sentences()
    assert len(sentences) == len(set(sentences)) > 400
    tokens = sum(len(tokenizer.encode(sentence)) for sentence in sentences)
    assert sum(map(len, sentences)) / tokens > 4  # characters per token: what full-size tokenizers reach on English
    for text in ["Épanchement pleural, 3 µm\t学", *sentences[::50]]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_refuses_a_folder_that_holds_something(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ModelError, match="not an empty folder"):
        build_tiny_base(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def _as_blocks(content):
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def test_a_tokenizer_of_other_sentences_knows_their_words_whole(tmp_path):
    words = ["xylophonic", "quizzaciously"]
    folder = build_tiny_base(tmp_path / "base", sentences=[" ".join(words)] * 50)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize(" ".join(words)) == ["xylophonic", "Ġquizzaciously"]
    ids = tokenizer("A pleural effusion, 12 mm.")["input_ids"]
    assert tokenizer.decode(ids) == "A pleural effusion, 12 mm."  # words it never saw are spelt
