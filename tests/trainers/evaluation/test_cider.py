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
"""CIDEr is that of pycocoevalcap, and of a table worked out by hand."""

import math

import numpy as np
import pytest
from pycocoevalcap.cider.cider import Cider

from ct_moe import DataError
from ct_moe.trainers.evaluation.cider import cider_scores, cider_tokens


WORDS = "no acute finding in the left right lung liver a small nodule of mm is seen there".split()


def published(predictions: list[str], references: list[str]) -> list[float]:
    """pycocoevalcap's scores of texts whose words are tokens."""
    said, wanted = ({i: [" ".join(cider_tokens(text))] for i, text in enumerate(t)} for t in (predictions, references))
    return list(Cider().compute_score(wanted, said)[1])


@pytest.mark.parametrize("seed", range(5))
def test_cider_is_that_of_pycocoevalcap(seed):
    rng = np.random.default_rng(seed)
    references = [" ".join(rng.choice(WORDS, rng.integers(1, 40))) for _ in range(30)]
    predictions = [
        " ".join(np.where(rng.random(len(words)) < 0.3, rng.choice(WORDS), words)[rng.integers(0, 3) :])
        for words in map(str.split, references)
    ]
    scores = cider_scores(predictions, references)
    assert scores == pytest.approx(published(predictions, references), abs=1e-9)
    assert max(scores) > 1


def test_real_reports_have_the_published_cider(shared_reports):
    predictions = shared_reports[1:] + shared_reports[:1]
    assert cider_scores(predictions, shared_reports) == pytest.approx(published(predictions, shared_reports), abs=1e-9)
    perfect = cider_scores(shared_reports, shared_reports)
    assert perfect == pytest.approx(published(shared_reports, shared_reports), abs=1e-9)
    assert min(perfect) > max(cider_scores(predictions, shared_reports))


def test_cider_worked_out_by_hand():
    # "no" is in both references and weighs nothing; "mass" and "no mass" weigh log 2, alike in both texts. Of three
    # and four words there is nothing: two of four orders are perfect.
    assert cider_scores(["no mass", "no node"], ["no mass", "no cyst"]) == pytest.approx([5, 0])
    # A second "mass": clipped to one in the product, not in the norm. One bigram more: "mass mass".
    one, two = 1 / 2, 1 / math.sqrt(2)
    wanted = 10 * math.exp(-1 / 72) * (one + two) / 4
    assert cider_scores(["no mass mass", ""], ["no mass", "no cyst"]) == pytest.approx([wanted, 0])


def test_what_every_reference_says_counts_nothing():
    assert cider_scores(["no mass"] * 3, ["no mass"] * 3) == [0, 0, 0]
    assert cider_scores(["no mass"], ["no mass"]) == [0]


def test_tokens_are_words_in_lower_case_without_punctuation():
    text = "Findings: a 5.2 mm nodule (left), not seen. It's new; no others."
    assert cider_tokens(text) == "findings a 5.2 mm nodule left not seen it 's new no others".split()
    assert cider_tokens("") == []


def test_texts_must_be_as_many_as_references():
    with pytest.raises(DataError, match="1 texts for 2 references"):
        cider_scores(["Doe"], ["a", "b"])
