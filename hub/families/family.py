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
"""What has to be known of a kind of base before it can be converted: `Family`, and `Tower` for its vision encoder."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, PreTrainedConfig


class Rule(NamedTuple):
    """Names in a base's files (a pattern for the whole name) -> the name in CT-MoE.

    change: "transpose" for a matrix stored the other way round, "squeeze" for leading dimensions of one. Both are
    exact, and so is the way back.
    """

    pattern: str
    target: str
    change: str = ""


@dataclass(frozen=True)
class Tower:
    """How one kind of vision tower is converted.

    Attributes:
        rules: where its tensors go; patterns follow the tower's own prefix.
        unread: pattern -> why the base's forward never reads such a tensor.
        fields: fields of `CTMoEVisionConfig` -> those of the tower's config.
        constants: what all towers of the kind share.
        settings: fields of `CTMoEVisionConfig` that take more than a name.
        refuse: finding for a config that is of this kind and still not supported, else None.
    """

    rules: list[Rule]
    unread: list[tuple[str, str]]
    fields: dict[str, str]
    constants: dict[str, Any]
    settings: Callable[[PreTrainedConfig], dict[str, Any]] = lambda config: {}
    refuse: Callable[[PreTrainedConfig], str | None] = lambda config: None


# Names of every layout: the original one, which the library writes to this day (`language_model.model.`), that of its
# own modules (`model.language_model.`), and both with and without the `vision_model` that towers once had inside.
TOWER_PREFIX = r"(?:model\.)?vision_tower\.(?:vision_model\.)?"
TEXT_RULES = (
    Rule(r"(?:language_model\.)?(lm_head\.weight)", r"\1"),
    Rule(r"language_model\.model\.(.+)", r"model.language_model.\1"),
    Rule(r"model\.language_model\.(.+)", r"model.language_model.\1"),
)


@dataclass(frozen=True)
class Family:
    """How one kind of base is converted.

    Attributes:
        model_type: of its config.
        name: in words.
        towers: model types of the vision towers it may have.
        text_types: those of its language model.
        settings: its config -> fields of `CTMoEConfig` besides `text_config`, `image_token_id` and
            `tie_word_embeddings`.
        vision: its config -> fields of `CTMoEVisionConfig` that the tower's own config does not hold.
        rules: where tensors go that are neither the tower's nor the language model's.
        unread: pattern -> why the base's forward never reads such a tensor.
        text_rules: where the language model's tensors go.
        tower_prefix: what precedes the names of the tower's tensors, as a pattern.
        refuse: its raw config -> (what, found) of settings that are not supported.
        read_config: folder and raw config -> its config, with `vision_config`, `text_config`, `image_token_id` and
            `tie_word_embeddings`.
        run_base: folder, config, dtype, `input_ids`, one slice, folder of the tower if it is another, folder of the
            converted model -> the base's own logits, with float32 arithmetic.
        fresh: patterns of what neither base nor conversion fills, with the part of the model: new parameters.
        base_inputs: one slice `(1, 3, height, width)`, `input_ids` and its config -> what else the base's own forward
            takes.
        image_tokens: what its tokenizer may call the placeholder.
        image_size: pixels along a side of a slice, where the base leaves them open; a conversion may set others.
        image_text: (what the base's chat template may write for an image, what its processor makes of that, with one
            placeholder where visual tokens go), given the placeholder.
        chat_template: for bases that have none.
        special: what is special about it, for the table of families.
        checkpoints: Hub ids known to fit.
    """

    model_type: str
    name: str
    towers: tuple[str, ...]
    text_types: tuple[str, ...]
    settings: Callable[[PreTrainedConfig], dict[str, Any]]
    vision: Callable[[PreTrainedConfig], dict[str, Any]]
    rules: list[Rule]
    unread: list[tuple[str, str]] = field(default_factory=list)
    text_rules: tuple[Rule, ...] = TEXT_RULES
    tower_prefix: str = TOWER_PREFIX
    refuse: Callable[[dict[str, Any]], Iterator[tuple[str, Any]]] = lambda raw: iter(())
    read_config: Callable[[Path, dict[str, Any]], PreTrainedConfig] = lambda folder, raw: AutoConfig.from_pretrained(
        folder
    )
    run_base: Callable[..., torch.Tensor] | None = None
    fresh: list[tuple[str, str]] = field(default_factory=list)
    image_tokens: tuple[str, ...] = ("<image>",)
    image_size: int | None = None
    base_inputs: Callable[[torch.Tensor, torch.Tensor, PreTrainedConfig], dict[str, Any]] = (
        lambda pixels, input_ids, config: {"pixel_values": pixels}
    )
    image_text: Callable[[str], tuple[tuple[str, ...], str]] = lambda token: ((token,), token)
    chat_template: str | None = None
    special: str = ""
    checkpoints: tuple[str, ...] = ()


def one_feature_layer(raw: dict[str, Any], default: int, strategies: tuple[str, ...], strategy: str) -> Iterator:
    """Refusals of a base with several feature layers, or another select strategy."""
    layer = raw.get("vision_feature_layer", default)
    if type(layer) is not int:
        yield "vision_feature_layer", layer
    found = raw.get("vision_feature_select_strategy", strategy)
    if found not in strategies:
        yield "vision_feature_select_strategy", found


def square(value: int | list[int] | tuple[int, ...]) -> int:
    """One side of a size that may be written as two."""
    return value if isinstance(value, int) else value[0]
