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
"""Metrics with models: BERTScore is that of its authors' library, the others are found or refused by name."""

import socket
import sys
import types

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizerFast, GPT2Tokenizer, RobertaTokenizer

from ct_moe import CTMoEError, DataError
from ct_moe.trainers.evaluation.model_scorers import bert_scorer, find_scorer, tokenize


TEXTS = ["a nodule in the lung", "no effusion", "the lung", "nodule nodule", "a"]
REFERENCES = ["a nodule", "effusion in the lung no", "the lung", "no lung", "the nodule in a lung"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"a nodule in the lung no effusion".split()]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("layer", [1, 3])
def test_bertscore_is_that_of_its_library(encoder, layer):
    from bert_score.utils import bert_cos_score_idf, get_idf_dict
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model = BertModel.from_pretrained(encoder).eval()
    model.encoder.layer = model.encoder.layer[:layer]  # as the library cuts it
    idf = dict.fromkeys(range(len(tokenizer)), 1.0) | {tokenizer.cls_token_id: 0, tokenizer.sep_token_id: 0}
    assert callable(get_idf_dict)
    wanted = bert_cos_score_idf(model, REFERENCES, TEXTS, tokenizer, idf, device="cpu", batch_size=2)[:, 2]
    scores = bert_scorer(encoder, layer, batch_size=3)(TEXTS, REFERENCES)
    assert scores == pytest.approx((100 * wanted).tolist(), abs=1e-3)
    assert scores[2] == pytest.approx(100, abs=1e-3)
    assert max(scores[:2]) < 99.9


def test_an_empty_text_has_no_bertscore(encoder):
    assert bert_scorer(encoder, 2)(["", "a", " \n"], ["a", "a", ""]) == pytest.approx([0, 100, 0], abs=1e-3)


@pytest.mark.parametrize(
    ("name", "finding"),
    [
        ("bertscore", "has no model"),
        ("bertscore={encoder}", "has no layer chosen"),
        ("bertscore={encoder}@x", "is no number"),
        ("bertscore={encoder}@4", "has no layer 4"),
        ("bertscore=/nowhere@2", "is no encoder"),
        ("best", "is unknown"),
        ("json:best", "cannot be loaded"),
        ("json:__name__", "is no function"),
    ],
)
def test_what_is_no_metric_is_refused(name, finding, encoder):
    with pytest.raises(DataError, match=finding):
        find_scorer(name.format(encoder=encoder))


@pytest.mark.parametrize(("name", "package"), [("ratescore", "RaTEScore"), ("green", "green-score")])
def test_a_missing_package_is_named(name, package):
    with pytest.raises(CTMoEError, match=f"is not installed.*pip install {chr(34)}{package}"):
        find_scorer(name)


def test_scorers_of_other_packages_are_called_as_they_want_it(monkeypatch, encoder):
    """RaTEScore 0.6 and green-score are not installed: only the calls are looked at, not the numbers."""

    class RaTEScore:
        def compute_score(self, candidate_list, reference_list):
            return [float(a == b) for a, b in zip(candidate_list, reference_list)]

    class GREEN:
        def __init__(self, model):
            assert model == "judge"

        def __call__(self, refs, hyps):
            return 0.5, 0.1, [0.25 + (a == b) / 2 for a, b in zip(refs, hyps)], "summary", None

    monkeypatch.setitem(sys.modules, "RaTEScore", types.SimpleNamespace(RaTEScore=RaTEScore))
    monkeypatch.setitem(sys.modules, "green_score", types.SimpleNamespace(GREEN=GREEN))
    assert find_scorer("ratescore")[1](["a", "b"], ["a", "c"]) == [100, 0]
    assert find_scorer("green=judge")[1](["a", "b"], ["a", "c"]) == [75, 25]
    name, scorer = find_scorer("os.path:commonprefix")
    assert (name, scorer(["ab", "ac"])) == ("os.path:commonprefix", "a")
    assert find_scorer(f"bertscore={encoder}@2")[0] == "bertscore"


@pytest.mark.parametrize("kind", [RobertaTokenizer, GPT2Tokenizer])
def test_byte_level_tokenizers_see_a_word_at_the_start_as_inside_a_text(kind, tmp_path):
    """As the authors' scorer asks of them by `add_prefix_space`."""
    learnt = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    learnt.train_from_iterator([*TEXTS, *REFERENCES] * 9, vocab_size=330, special_tokens=special, show_progress=False)
    learnt.save_model(str(tmp_path))
    files = {"vocab": str(tmp_path / "vocab.json"), "merges": str(tmp_path / "merges.txt"), "pad_token": "<pad>"}
    kind(**files).save_pretrained(tmp_path / "plain")
    asked = kind(**files, add_prefix_space=True)
    texts = [*TEXTS, " a nodule\n", ""]
    ids = tokenize(AutoTokenizer.from_pretrained(tmp_path / "plain"), texts, 32)["input_ids"]
    wanted = asked([text.strip() for text in texts], padding=True, return_tensors="pt")["input_ids"]
    assert torch.equal(ids, wanted)
    assert ids[0].tolist() != kind(**files)(TEXTS[0])["input_ids"]


def test_no_encoder_is_downloaded(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(DataError, match="is no encoder on this machine"):
        bert_scorer("nobody/roberta-large")
