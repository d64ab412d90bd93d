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
"""CIDEr-D: how much a text says that is particular to its own reference (Vedantam et al. 2015, arXiv 1411.5726).

n-grams of one to four words are weighted by how few references hold them, so that the sentences which every report
repeats count little. The numbers are those of pycocoevalcap's `Cider` on the same tokens. Its tokens come from a Java
program; `cider_tokens` cuts by nltk's Penn Treebank rules, with the same punctuation left out.
"""

import math
from collections import Counter
from collections.abc import Sequence

from .libraries import library
from .text_metrics import check_texts


_ORDERS = 4
_SIGMA = 6.0  # of the penalty on another length, in words
_PUNCTUATION = frozenset("'' ' `` ` ( ) { } . ? ! , : - -- ... ; -lrb- -rrb- -lcb- -rcb-".split())


def cider_scores(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """CIDEr-D of every text against its reference, 0 to 10; the corpus has their mean.

    A score depends on all references, since they tell how rare an n-gram is: scores of different sets, or of a part of
    one, do not compare. With one reference, or where all are the same, nothing is particular and every score is 0.

    Args:
        predictions: generated texts.
        references: one text for each, in the same order.

    Raises:
        DataError: the numbers of texts differ, or one is no text.
        CTMoEError: nltk is not installed.
    """
    check_texts(predictions, references)
    wanted = [_ngrams(cider_tokens(text)) for text in references]
    said = [_ngrams(cider_tokens(text)) for text in predictions]
    holders = Counter(ngram for counts in wanted for ngram in counts)
    total = math.log(len(wanted))

    def weigh(counts: Counter) -> list[dict[tuple[str, ...], float]]:
        """tf-idf by order."""
        weights: list[dict] = [{} for _ in range(_ORDERS)]
        for ngram, count in counts.items():
            weights[len(ngram) - 1][ngram] = count * (total - math.log(max(1, holders[ngram])))
        return weights

    return [_similarity(weigh(a), weigh(b), _length(a) - _length(b)) for a, b in zip(said, wanted)]


def cider_tokens(text: str) -> list[str]:
    """Words in lower case without punctuation."""
    tokenizer = library("nltk.tokenize").TreebankWordTokenizer()
    # The tokenizer takes one sentence: a full stop inside the text would stay on its word.
    words = [word for line in text.lower().replace(". ", " . ").splitlines() for word in tokenizer.tokenize(line)]
    return [word for word in words if word not in _PUNCTUATION]


def _ngrams(words: list[str]) -> Counter:
    return Counter(
        tuple(words[start : start + order])
        for order in range(1, _ORDERS + 1)
        for start in range(len(words) - order + 1)
    )


def _length(counts: Counter) -> int:
    # Of bigrams, not of words: so does pycocoevalcap, and so do all published numbers.
    return sum(count for ngram, count in counts.items() if len(ngram) == 2)


def _similarity(said: list[dict], wanted: list[dict], longer_by: int) -> float:
    """Mean over orders of the cosine, where a repeated n-gram counts no more often than the reference has it."""
    values = []
    for a, b in zip(said, wanted):
        norm = math.sqrt(sum(x * x for x in a.values()) * sum(x * x for x in b.values()))
        product = sum(min(weight, b[ngram]) * b[ngram] for ngram, weight in a.items() if ngram in b)
        values.append(product / norm if norm else 0.0)
    return 10 * math.exp(-(longer_by**2) / (2 * _SIGMA**2)) * sum(values) / _ORDERS
