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
"""Scores of generated texts against reference texts: BLEU, ROUGE and METEOR, by well-kept libraries.

A score is computed for every pair of texts, in the way of the benchmark of M3D (arXiv 2404.00578, Bench/eval), whose
tables others compare with; the metric is the mean over pairs. Each score cuts texts into tokens in its own way.
"""

from collections.abc import Callable, Sequence

from ct_moe import CTMoEError, DataError

from .libraries import library


_ORDERS = (1, 2, 3, 4)  # of BLEU


def text_metrics(
    predictions: Sequence[str], references: Sequence[str], *, meteor: bool | None = None
) -> dict[str, float]:
    """Metrics of a corpus, 0 to 100: the means of `text_scores`, and BLEU-4 of the whole corpus.

    `corpus_bleu4` adds up the n-gram counts and lengths of all texts before it takes precisions and brevity penalty
    (Papineni et al. 2002, the BLEU of sacrebleu without smoothing). It is not the mean `bleu4`, which is 0 for every
    text without a common 4-gram, and the two must not share a column.

    Args:
        predictions: generated texts. An empty one scores 0.
        references: one text for each, in the same order.
        meteor: True to insist on METEOR, False to leave it out, None for METEOR where nltk finds its data.

    Returns:
        `bleu1` to `bleu4`, `rouge1`, `rouge2`, `rougeL`, `meteor` (see `meteor`) and `corpus_bleu4`.
    """
    scores = text_scores(predictions, references, meteor=meteor)
    metrics = {name: sum(values) / len(values) for name, values in scores.items()}
    return metrics | {"corpus_bleu4": corpus_bleu(predictions, references)["corpus_bleu4"]}


def corpus_bleu(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """`corpus_bleu1` to `corpus_bleu4`, 0 to 100; see `text_metrics`.

    CT-CHAT and VLM3D print pycocoevalcap's, of words between spaces: those are other numbers.
    """
    check_texts(predictions, references)
    texts = list(predictions), list(references)
    return {f"corpus_bleu{order}": _bleu(max_order=order)(*texts) for order in _ORDERS}


def text_scores(
    predictions: Sequence[str], references: Sequence[str], *, meteor: bool | None = None
) -> dict[str, list[float]]:
    """Scores of every pair of texts, 0 to 100, for means, intervals and records.

    - `bleu1` to `bleu4`: BLEU of one text with n-grams up to that length, by sacrebleu: 13a tokens, case kept, no
      smoothing, with brevity penalty. `bleu1` is 100 times the `evaluate.load("bleu")` with `max_order=1` of
      M3D, whose tokenizer is a copy of sacrebleu's.
    - `rouge1`, `rouge2`, `rougeL`: F1 of words, of pairs of words and of the longest common subsequence, by
      rouge-score: lower case, letters a-z and digits only, no stemming, as in `evaluate.load("rouge")`.
    - `meteor`: by nltk (Lavie and Agarwal 2007; alpha 0.9, beta 3, gamma 0.5) on the tokens of its `word_tokenize`, as
      in `evaluate.load("meteor")`: exact, stem and WordNet matches (nltk looks up stems, so that it misses synonyms
      whose stem is no word). Needs nltk's data `wordnet` and `punkt_tab` on disk; nothing is downloaded, and no
      variant without WordNet takes its place.

    Arguments as in `text_metrics`.
    """
    check_texts(predictions, references)
    bleu = {f"bleu{order}": _bleu(max_order=order) for order in _ORDERS}
    kinds = ["rouge1", "rouge2", "rougeL"]
    rouge = library("rouge_score.rouge_scorer").RougeScorer(kinds, use_stemmer=False)
    meteor_of = None if meteor is False else _meteor(required=meteor is True)
    scores: dict[str, list[float]] = {name: [] for name in (*bleu, *kinds)}
    if meteor_of is not None:
        scores["meteor"] = []
    for prediction, reference in zip(predictions, references):
        for name, metric in bleu.items():
            scores[name].append(metric([prediction], [reference]))
        for name, score in rouge.score(reference, prediction).items():
            scores[name].append(100 * score.fmeasure)
        if meteor_of is not None:
            scores["meteor"].append(100 * meteor_of(prediction, reference))
    return scores


def check_texts(predictions: Sequence[str], references: Sequence[str]) -> None:
    """Raises `DataError` unless both are as many texts, and at least one."""
    for name, texts in (("predictions", predictions), ("references", references)):
        if isinstance(texts, str):
            raise DataError(name, "is one text", "Pass a list of texts")
        for number, text in enumerate(texts, start=1):
            if not isinstance(text, str):
                raise DataError(name, f"number {number} is a {type(text).__name__}", 'Pass texts; "" for none')
    if len(predictions) != len(references):
        finding = f"{len(predictions)} texts for {len(references)} references"
        raise DataError("predictions", finding, "Pass one prediction for each reference, in the same order")
    if not len(predictions):
        raise DataError("predictions", "there are none", "Pass at least one prediction and its reference")


def _bleu(max_order: int) -> Callable[[list[str], list[str]], float]:
    """BLEU of a corpus of predictions and references. One text is a corpus of one."""
    metric = library("sacrebleu.metrics").BLEU(
        max_ngram_order=max_order,
        tokenize="13a",
        smooth_method="none",
        force=True,  # no warning about texts that end in " ."
    )
    return lambda predictions, references: metric.corpus_score(predictions, [references]).score


def _meteor(required: bool) -> Callable[[str, str], float] | None:
    """METEOR of a prediction and its reference, 0 to 1. None where its data is missing and not required."""
    wordnet = library("nltk.corpus").wordnet
    word_tokenize = library("nltk.tokenize").word_tokenize
    score = library("nltk.translate.meteor_score").single_meteor_score
    missing = "WordNet"
    try:
        wordnet.ensure_loaded()
        missing = "sentence model (punkt_tab)"
        word_tokenize("One. Two.")
    except (LookupError, OSError) as error:  # absent, or without one of its files
        if not required:
            return None
        raise CTMoEError(
            "meteor",
            f"nltk finds no complete {missing}",
            "Where there is a network, run `python -m nltk.downloader -d FOLDER wordnet punkt_tab`, and set NLTK_DATA "
            "to that folder; or leave METEOR out",
        ) from error
    return lambda prediction, reference: score(word_tokenize(reference), word_tokenize(prediction))
