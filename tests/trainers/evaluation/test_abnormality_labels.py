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
"""Labels of reports: the rules on sentences of each kind, and scores worked out by hand."""

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from ct_moe import DataError
from ct_moe.trainers.data_sets.ct_rate import ABNORMALITIES
from ct_moe.trainers.evaluation.abnormality_labels import classifier_labels, crg_score, label_scores, rule_labels


def named(text: str) -> set[str]:
    return {name for name, value in zip(ABNORMALITIES, rule_labels([text])[0]) if value}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A central venous catheter is seen.", {"Medical material"}),
        ("Calcified atheroma plaques in the aorta.", {"Arterial wall calcification"}),
        ("The heart is enlarged. Minimal pericardial effusion.", {"Cardiomegaly", "Pericardial effusion"}),
        ("Calcification in the coronary arteries.", {"Coronary artery wall calcification"}),
        ("Sliding type hiatal hernia.", {"Hiatal hernia"}),
        ("Mediastinal lymphadenopathy.", {"Lymphadenopathy"}),
        ("Enlarged lymph nodes in the mediastinum.", {"Lymphadenopathy"}),
        ("Paraseptal emphysema; linear atelectasis.", {"Emphysema", "Atelectasis"}),
        ("Several nodules of 5.2 mm in both lungs.", {"Lung nodule"}),
        ("Patchy ground-glass opacities.", {"Lung opacity"}),
        ("Fibrotic sequelae at the apex.", {"Pulmonary fibrotic sequela"}),
        ("Pleural fluid on the left.", {"Pleural effusion"}),
        ("Mosaic attenuation.", {"Mosaic attenuation pattern"}),
        ("Peribronchial thickening and bronchiectasis.", {"Peribronchial thickening", "Bronchiectasis"}),
        ("Consolidation with interlobular septal thickening.", {"Consolidation", "Interlobular septal thickening"}),
        # Denied, in every place that a denial may stand.
        ("No pleural effusion or pericardial effusion.", set()),
        ("Pleural effusion was not detected.", set()),
        ("Lymphadenopathy is not observed, nor is there consolidation.", set()),
        ("Without emphysema.", set()),
        ("The heart is not enlarged.", set()),
        ("The heart size has not increased.", set()),
        ("Aorta shows no calcification.", set()),
        ("Calcific atheroma plaques in the coronary arteries.", {"Coronary artery wall calcification"}),
        (
            "Calcification of the aorta, calcification of the coronary arteries.",
            {"Arterial wall calcification", "Coronary artery wall calcification"},
        ),
        ("No nodule, but consolidation on the left.", {"Consolidation"}),
        ("No nodule. Consolidation on the left.", {"Consolidation"}),
        ("A nodule is seen. No effusion was detected.", {"Lung nodule"}),
        ("Findings: Normal.", set()),
        ("", set()),
    ],
)
def test_rules_find_what_is_said_and_not_what_is_denied(text, found):
    assert named(text) == found


def test_rules_read_a_real_report(shared_reports):
    # Cyst and fluid are told of the pericardium and the kidney; no free fluid, all of the thorax is fine.
    assert named(shared_reports[0]) == set()
    labels = rule_labels(shared_reports)
    assert labels.shape == (len(shared_reports), 18)
    effusions = labels[:, ABNORMALITIES.index("Pleural effusion")]
    assert effusions.tolist() == [
        int("pleural effusion" in text.lower() and "No pleural effusion" not in text) for text in shared_reports
    ]


SAID = np.array([[1, 0, 1], [1, 1, 0], [0, 0, 0], [1, 0, 0]])
TRUE = np.array([[1, 0, 0], [1, 0, 0], [1, 0, 1], [0, 0, 0]])


def test_scores_worked_out_by_hand():
    scores = label_scores(SAID, TRUE)
    # Label 0: two hits of three said and three true; label 1 is never true, label 2 never hit.
    assert scores["per_label"]["0"] == pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "support": 3})
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)
    assert scores["micro_f1"] == pytest.approx(2 * 2 / (5 + 4))
    assert (scores["micro_precision"], scores["micro_recall"]) == pytest.approx((2 / 5, 2 / 4))
    # X = 12, A = 4: r = 1, U = 4; two hits, two missed, three false: s = 2 - 2 - 3 = -3.
    assert scores["crg"] == pytest.approx(4 / (8 + 3))
    assert "macro_f1_interval" not in scores


def test_crg_of_the_best_and_of_silence():
    assert crg_score(TRUE, TRUE) == pytest.approx(1)
    assert crg_score(np.zeros_like(TRUE), TRUE) == pytest.approx(1 / 3)
    assert crg_score(SAID, np.zeros_like(TRUE)) is None


def test_intervals_draw_whole_patients():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, (60, 18))
    said = np.where(rng.random(truth.shape) < 0.2, 1 - truth, truth)
    alone = label_scores(said, truth, list(range(60)))
    # Three times the same patient: the same scores, and no more certain.
    thrice = label_scores(np.repeat(said, 3, 0), np.repeat(truth, 3, 0), np.repeat(range(60), 3).tolist())
    for name in ("macro_f1", "micro_f1"):
        assert thrice[name] == pytest.approx(alone[name])
        low, high = alone[f"{name}_interval"]
        assert low < alone[name] < high
        assert thrice[f"{name}_interval"] == pytest.approx(alone[f"{name}_interval"], abs=0.01)


def test_labels_of_other_shapes_are_refused():
    with pytest.raises(DataError, match=r"\(2, 3\) for \(4, 3\)"):
        label_scores(SAID[:2], TRUE)


def build_classifier(folder, names, seed=0):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "nodule", "no", "effusion"]
    (folder).mkdir()
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        initializer_range=1.0,
    )
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    return model


def test_a_classifier_labels_by_name_whatever_its_order(tmp_path):
    order = np.random.default_rng(0).permutation(18)
    model = build_classifier(tmp_path / "model", [ABNORMALITIES[i].upper() for i in order])
    texts = ["a nodule", "no effusion", "nodule nodule a"]
    label = classifier_labels(str(tmp_path / "model"), batch_size=2)
    found = label(texts)
    tokenizer = BertTokenizerFast.from_pretrained(tmp_path / "model")
    for text, row in zip(texts, found):
        with torch.inference_mode():
            scores = model(**tokenizer(text, return_tensors="pt")).logits[0].sigmoid().numpy()
        assert row[order].tolist() == (scores >= 0.5).astype(int).tolist()
    assert 0 < found.mean() < 1
    assert label.name == "classifier model"


def test_a_classifier_with_other_labels_is_refused(tmp_path):
    build_classifier(tmp_path / "few", ABNORMALITIES[:5])
    with pytest.raises(DataError, match="has 5 labels"):
        classifier_labels(str(tmp_path / "few"))
    build_classifier(tmp_path / "other", [f"finding {i}" for i in range(18)])
    with pytest.raises(DataError, match="has other labels"):
        classifier_labels(str(tmp_path / "other"))
    with pytest.raises(DataError, match="no classifier"):
        classifier_labels(str(tmp_path / "nothing"))
