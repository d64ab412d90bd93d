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
"""Metrics that ask a model of their own: BERTScore, RaTEScore and GREEN. Each needs weights that the user has.

Every one is a function (texts, references) -> one number per text, as `score_predictions` takes them. From the command
line: `--scorer bertscore=/models/roberta-large`, `--scorer ratescore`, `--scorer green`, or `--scorer module:function`
for one of your own, a language model as judge for example. Nothing is loaded before it is asked for.
"""

import importlib
import sys
from collections.abc import Callable, Sequence

from ct_moe import CTMoEError, DataError

from .libraries import library


Scorer = Callable[[list[str], list[str]], Sequence[float]]


def find_scorer(name: str) -> tuple[str, Scorer]:
    """A metric's name and its function.

    Args:
        name: `bertscore=MODEL` or `bertscore=MODEL@LAYER`, `ratescore`, `green`, `green=MODEL`, or `module:function`.

    Raises:
        DataError: there is no such metric.
        CTMoEError: its library is not installed.
    """
    kind, _, model = name.partition("=")
    if kind == "bertscore":
        if not model:
            raise DataError("scorer bertscore", "has no model", "Write bertscore=FOLDER, of roberta-large for M3D's")
        folder, _, layer = model.partition("@")
        if layer and not layer.isdecimal():
            raise DataError("scorer bertscore", f"layer {layer!r} is no number", "Write bertscore=FOLDER@17")
        return "bertscore", bert_scorer(folder, int(layer) if layer else None)
    if kind == "ratescore":
        scorer = library("RaTEScore", package="RaTEScore").RaTEScore()
        return "ratescore", lambda texts, references: [100 * x for x in scorer.compute_score(texts, references)]
    if kind == "green":
        scorer = library("green_score", package="green-score").GREEN(model or "StanfordAIMI/GREEN-radllama2-7b")

        def green(texts: list[str], references: list[str]) -> list[float]:
            found = scorer(refs=references, hyps=texts)
            lists = [part for part in found if isinstance(part, (list, tuple)) and len(part) == len(texts)]
            if not lists:
                raise CTMoEError("green_score", "gives no list of scores", "Use a version that does")
            return [100 * float(value) for value in lists[0]]

        return "green", green
    module, colon, function = name.partition(":")
    remedy = "Write bertscore=FOLDER, ratescore, green, or module:function"
    if not colon:
        raise DataError(f"scorer {name}", "is unknown", remedy)
    if "" not in sys.path:
        sys.path.insert(0, "")  # a module of one's own lies beside
    try:
        scorer = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever somebody's module does
        raise DataError(f"scorer {name}", f"cannot be loaded ({type(error).__name__}: {error})", remedy) from error
    if not callable(scorer):
        raise DataError(f"scorer {name}", "is no function", remedy)
    return name, scorer


# Layers that the authors of BERTScore chose on human judgements (bert_score 0.3.13).
_LAYERS = {"roberta-large": 17, "roberta-base": 10, "bert-base-uncased": 9, "bert-large-uncased": 18}


def bert_scorer(model: str, layer: int | None = None, *, batch_size: int = 16) -> Scorer:
    """BERTScore F1 times 100, without idf weights and not rescaled (Zhang et al. 2020), as M3D reports it.

    Args:
        model: folder of an encoder, or Hub id of one that was downloaded before. M3D's numbers are those of
            roberta-large.
        layer: whose hidden states are compared, from 0 for the embeddings. By default the one that the metric's
            authors chose for a model of this name.
        batch_size: texts that go through it together.

    Raises:
        DataError: the model cannot be loaded, or the layer is not known.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    if layer is None:
        layer = _LAYERS.get(model.rstrip("/").rpartition("/")[2])
        if layer is None:
            raise DataError(model, "has no layer chosen for it", f"Name one, as in bertscore={model}@17")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        network = AutoModel.from_pretrained(model, use_safetensors=True, local_files_only=True).eval()
    except (OSError, ValueError) as error:
        remedy = "Name a folder with safetensors, or an id that was downloaded before"
        raise DataError(model, "is no encoder on this machine that can be loaded", remedy) from error
    if not 0 <= layer <= network.config.num_hidden_layers:
        raise DataError(model, f"has no layer {layer}", f"Use 0 to {network.config.num_hidden_layers}")
    special = torch.tensor(sorted({tokenizer.cls_token_id, tokenizer.sep_token_id} - {None}))
    longest = min(tokenizer.model_max_length, 512)

    network.to("cuda" if torch.cuda.is_available() else "cpu")

    @torch.inference_mode()
    def embed(texts: list[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per text unit vectors of its tokens, and which of them count: all but the ones that the tokenizer adds."""
        inputs = tokenize(tokenizer, texts, longest)
        states = network(**inputs.to(network.device), output_hidden_states=True).hidden_states[layer]
        states = torch.nn.functional.normalize(states, dim=-1)
        masks, ids = inputs["attention_mask"].bool(), inputs["input_ids"]
        return [(row[mask], ~torch.isin(i[mask], special.to(i.device))) for row, i, mask in zip(states, ids, masks)]

    def score(texts: list[str], references: list[str]) -> list[float]:
        scores = []
        for start in range(0, len(texts), batch_size):
            part = slice(start, start + batch_size)
            for (said, said_counts), (wanted, wanted_counts) in zip(embed(texts[part]), embed(references[part])):
                if not said_counts.any() or not wanted_counts.any():
                    scores.append(0.0)
                    continue
                alike = said @ wanted.T
                precision = alike.max(1).values[said_counts].mean()
                recall = alike.max(0).values[wanted_counts].mean()
                scores.append(100 * float(2 * precision * recall / (precision + recall)))
        return scores

    return score


def tokenize(tokenizer, texts: Sequence[str], longest: int):
    """Texts as the authors' scorer cuts them, as tensors.

    For RoBERTa and GPT-2 it asks for `add_prefix_space`, which transformers 5 takes no notice of when texts are cut: a
    space in front gives the same ids.
    """
    from transformers import GPT2Tokenizer, RobertaTokenizer

    front = " " if isinstance(tokenizer, (GPT2Tokenizer, RobertaTokenizer)) else ""
    texts = [front + text.strip() if text.strip() else "" for text in texts]
    return tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
