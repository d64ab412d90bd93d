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
"""Scores are those worked out by hand, by nltk or in the papers; METEOR is WordNet's or refused; no text is quoted."""

import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from nltk.translate.bleu_score import corpus_bleu, sentence_bleu

from ct_moe import CTMoEError, DataError
from ct_moe.trainers.evaluation.text_metrics import text_metrics, text_scores


LUNGS = ("the lungs are clear and the heart is normal", "the lungs are clear and the heart is large")

# A process of its own, as nltk keeps what it has loaded. Any use of the network ends it.
METEOR_SCRIPT = """
import os, sys
def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        raise AssertionError(event)
sys.addaudithook(refuse)
import nltk
nltk.data.path[:] = [os.environ["NLTK_DATA"]]  # none of the machine's own
from ct_moe import CTMoEError
from ct_moe.trainers.evaluation.text_metrics import text_scores
meteor = {"True": True, "None": None}[sys.argv[1]]
try:
    print(text_scores(sys.argv[2::2], sys.argv[3::2], meteor=meteor).get("meteor"))
except CTMoEError as error:
    print(error)
"""


def score(prediction: str, reference: str) -> dict[str, float]:
    return {name: values[0] for name, values in text_scores([prediction], [reference], meteor=False).items()}


@pytest.mark.parametrize(
    ("prediction", "reference", "bleu1"),
    [
        ("the heart is large", "the heart is very large today", 100 * math.exp(1 - 6 / 4)),  # too short
        ("no no no no", "no mass", 25),  # a word counts as often as the reference has it
        ("the heart is very large today", "the heart is large", 100 * 4 / 6),
        ("no mass", "No mass", 50),  # case counts
        ("No nodule (5.2 mm).", "No nodule ( 5.2 mm ) .", 100),  # tokens, not words
        ("clear", "normal", 0),
    ],
)
def test_bleu1_worked_out_by_hand(prediction, reference, bleu1):
    assert score(prediction, reference)["bleu1"] == pytest.approx(bleu1)


def test_bleu4_worked_out_by_hand():
    assert score(*LUNGS)["bleu4"] == pytest.approx(100 * (8 / 9 * 7 / 8 * 6 / 7 * 5 / 6) ** (1 / 4))
    full = {"bleu1", "bleu2", "rouge1", "rouge2", "rougeL"}  # two words have no three
    wanted = {name: 100 * (name in full) for name in (*full, "bleu3", "bleu4")}
    assert score("no mass", "no mass") == pytest.approx(wanted)


def test_bleu_of_the_corpus_adds_up_counts_and_the_mean_does_not():
    metrics = text_metrics([LUNGS[0], "no mass"], [LUNGS[1], "no mass"], meteor=False)
    assert metrics["corpus_bleu4"] == pytest.approx(100 * (10 / 11 * 8 / 9 * 6 / 7 * 5 / 6) ** (1 / 4))
    assert metrics["bleu4"] == pytest.approx(100 * (5 / 9) ** (1 / 4) / 2)
    assert metrics["bleu1"] == pytest.approx(100 * (8 / 9 + 1) / 2)


@pytest.mark.filterwarnings("ignore:\\nThe hypothesis contains 0 counts:UserWarning")
def test_bleu_is_that_of_nltk():
    rng = np.random.default_rng(0)
    words = np.array("the left lung is clear without mass nodule effusion".split())
    references = [rng.choice(words, size=rng.integers(6, 30)) for _ in range(40)]
    predictions = [
        np.where(rng.random(len(text)) < 0.2, rng.choice(words), text)[: len(text) - 2] for text in references
    ]
    texts = [" ".join(text) for text in predictions], [" ".join(text) for text in references]
    scores = text_scores(*texts, meteor=False)
    for order in (1, 2):  # of higher orders nltk warns where a text has no such n-gram
        weights = (1 / order,) * order
        wanted = [sentence_bleu([list(r)], list(p), weights=weights) for p, r in zip(predictions, references)]
        assert scores[f"bleu{order}"] == pytest.approx([100 * value for value in wanted])
    of_corpus = corpus_bleu([[list(r)] for r in references], [list(p) for p in predictions])
    assert 0.1 < of_corpus < 0.9
    assert text_metrics(*texts, meteor=False)["corpus_bleu4"] == pytest.approx(100 * of_corpus)


def test_rouge_worked_out_by_hand():
    scores = score("the liver normal is", "The liver is normal in size.")
    assert scores["rouge1"] == pytest.approx(100 * 2 * 1 * (4 / 6) / (1 + 4 / 6))
    assert scores["rougeL"] == pytest.approx(100 * 2 * (3 / 4) * (3 / 6) / (3 / 4 + 3 / 6))
    assert scores["rouge2"] == pytest.approx(100 * 2 * (1 / 3) * (1 / 5) / (1 / 3 + 1 / 5))  # "the liver"
    assert score("nodules", "nodule")["rouge1"] == 0  # no stems


@pytest.mark.parametrize(("prediction", "reference"), [("", "no mass"), (" \n", "no mass"), ("no mass", ""), ("", "")])
def test_an_empty_text_scores_0(prediction, reference):
    assert set(text_metrics([prediction], [reference], meteor=False).values()) == {0}
    metrics = text_metrics([prediction, LUNGS[1]], [reference, LUNGS[1]], meteor=False)
    assert [metrics["rouge1"], metrics["bleu4"]] == pytest.approx([50, 50])


@pytest.mark.parametrize(
    ("predictions", "references", "finding"),
    [
        (["Doe Jane"], [], "1 texts for 0 references"),
        ([], [], "there are none"),
        ("Doe Jane", "Doe Jane", "is one text"),
        (["Doe Jane", None], ["a", "b"], "number 2 is a NoneType"),
        (["Doe Jane"], [["b"]], "number 1 is a list"),
    ],
)
def test_what_cannot_be_scored_is_named_and_not_quoted(predictions, references, finding):
    with pytest.raises(DataError, match=finding) as raised:
        text_metrics(predictions, references)
    assert "Doe" not in str(raised.value)


@pytest.mark.parametrize(
    ("library", "module"),
    [("sacrebleu", "sacrebleu.metrics"), ("rouge_score", "rouge_score.rouge_scorer"), ("nltk", "nltk.corpus")],
)
def test_a_missing_library_is_named_with_its_extra(library, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(CTMoEError, match=rf'{library}.* is not installed.*"ct-moe\[eval\]"'):
        text_metrics(["no mass"], ["no mass"])


def test_importing_the_module_loads_no_library():
    libraries = "{'sacrebleu', 'rouge_score', 'nltk', 'numpy', 'torch'}"
    script = f"import sys, ct_moe.trainers.evaluation.text_metrics; print({libraries} & {{*sys.modules}})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


@pytest.fixture(scope="module")
def nltk_data(tmp_path_factory):
    """Data of nltk: a WordNet of the one noun "mass, lump", and a sentence model that has learnt no abbreviation."""
    folder = tmp_path_factory.mktemp("nltk_data")
    wordnet, punkt = folder / "corpora" / "wordnet", folder / "tokenizers" / "punkt_tab" / "english"
    wordnet.mkdir(parents=True)
    punkt.mkdir(parents=True)
    header = "  1 WordNet 3.0 Copyright of a test\n"
    offset = f"{len(header):08}"
    for pos in ("noun", "verb", "adj", "adv"):
        (wordnet / f"{pos}.exc").touch()
        noun = pos == "noun"
        (wordnet / f"data.{pos}").write_text(
            header + f"{offset} 00 n 02 mass 0 lump 0 000 | small and round  \n" * noun
        )
        (wordnet / f"index.{pos}").write_text(
            header + "".join(f"{word} n 1 0 1 0 {offset}  \n" for word in ("lump", "mass") if noun)
        )
    (wordnet / "lexnames").write_text("00\tnoun.Tops\t1\n")
    (wordnet / "index.sense").write_text(f"lump%1:00:00:: {offset} 1 0\nmass%1:00:00:: {offset} 1 0\n")
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (punkt / name).touch()
    return folder


def run_meteor(data, *arguments: str) -> str:
    command = [sys.executable, "-W", "error", "-c", METEOR_SCRIPT, *arguments]
    environment = {**os.environ, "NLTK_DATA": str(data)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_meteor_worked_out_by_hand(nltk_data):
    pairs = [
        ("a small lump", "a small mass"),  # a synonym: 3 matches in 1 chunk
        ("a small cyst", "a small mass"),  # 2 matches in 1 chunk, precision and recall 2/3
        ("Clear. No lumps", "clear . No lump"),  # tokens of two sentences, and a stem
        ("", "a small mass"),
    ]
    printed = run_meteor(nltk_data, "True", *(text for pair in pairs for text in pair))
    whole = 100 * (1 - 0.5 * (1 / 3) ** 3)
    part = 100 * (1 - 0.5 * (1 / 2) ** 3) * 2 / 3
    four = 100 * (1 - 0.5 * (1 / 4) ** 3)
    assert [float(value) for value in printed.strip("[]").split(",")] == pytest.approx([whole, part, four, 0])
    assert run_meteor(nltk_data, "None", *pairs[0]).startswith("[98.1")


def test_meteor_without_its_data_is_refused_or_left_out(nltk_data, tmp_path):
    pair = ("a small lump", "a small mass")
    assert run_meteor(tmp_path, "None", *pair) == "None"
    printed = run_meteor(tmp_path, "True", *pair)
    assert printed.startswith("meteor: nltk finds no complete WordNet.")
    assert "nltk.downloader" in printed
    assert "NLTK_DATA" in printed

    shutil.copytree(nltk_data / "corpora", tmp_path / "corpora")
    assert "no complete sentence model (punkt_tab)" in run_meteor(tmp_path, "True", *pair)
    assert run_meteor(tmp_path, "None", *pair) == "None"


def test_meteor_refuses_a_wordnet_without_one_of_its_files(nltk_data, tmp_path):
    shutil.copytree(nltk_data, tmp_path, dirs_exist_ok=True)
    (tmp_path / "corpora" / "wordnet" / "lexnames").unlink()  # as in Debian's package
    assert "no complete WordNet" in run_meteor(tmp_path, "True", "a small lump", "a small mass")
