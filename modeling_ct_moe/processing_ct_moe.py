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
"""Volumes and text to model inputs: placeholders expanded to the number of visual tokens, the prompt as guide."""

from typing import Any

import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, Unpack
from transformers.utils import auto_docstring

from .configuration_ct_moe import num_visual_tokens
from .errors_ct_moe import ModelError, PromptError


UNLABELLED = -100


@auto_docstring(custom_intro="To this processor a volume is an image: chat templates and `images=` take CT scans.")
class CTMoEProcessor(ProcessorMixin):
    _auto_class = "AutoProcessor"

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        image_token: str = "<image>",
        pool: list[int] | tuple[int, ...] = (2, 2, 2),
        tasks: list[str] | tuple[str, ...] = (),
        slice_scoring: str = "none",
        volume_cell: list[int] | None = None,
        merge_size: int = 1,
        separators: str = "none",
        **kwargs,
    ):
        r"""
        image_token (`str`, *optional*, defaults to `"<image>"`):
            The base's image placeholder, one token of its vocabulary.
        pool (`list[int]`, *optional*, defaults to `(2, 2, 2)`):
            As in [`CTMoEConfig`]: it decides how many placeholders a volume takes.
        tasks (`list[str]`, *optional*):
            As in [`CTMoEConfig`]: the names `task=` may take.
        slice_scoring (`str`, *optional*, defaults to `"none"`):
            As in [`CTMoEConfig`]: `"tgis"` takes placeholders for the weighted 2D features as well.
        volume_cell (`list[int]`, *optional*):
            As in [`CTMoEConfig`]: (slices, tokens) of a second, 3D encoder, which gives `tokens` visual tokens for
            every `slices` slices in place of the vision encoder.
        merge_size (`int`, *optional*, defaults to 1):
            As in [`CTMoEConfig`].
        separators (`str`, *optional*, defaults to `"none"`):
            As in [`CTMoEConfig`].
        """
        self.pool = list(pool)
        self.slice_scoring = slice_scoring
        self.volume_cell = volume_cell
        self.merge_size = merge_size
        self.separators = separators
        self.tasks = list(tasks)
        self.image_token = image_token
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token_id = self.tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id is None or self.image_token_id == self.tokenizer.unk_token_id:
            raise ModelError(
                "image_token", f"{image_token!r} is not in the tokenizer's vocabulary", "Name the base's own"
            )

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "guide_input_ids", "guide_attention_mask"]

    @auto_docstring(custom_intro="Processes texts with their volumes; the keyword arguments are the library's.")
    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        guide: str | list[str | None] | None = None,
        task: str | int | list[str | int | None] | None = None,
        **kwargs: Unpack[ProcessingKwargs],
    ) -> BatchFeature:
        r"""
        images (`Volume`, `str`, `list`, *optional*):
            Scans in the order of their placeholders, flat or one list per text, as for [`CTMoEImageProcessor`].
        guide (`str` or `list[str]`, *optional*):
            Per text the words that steer the routing; `None` for none. `apply_chat_template` takes the last user
            message. Never the answer.
        task (`str`, `int` or a list of them, *optional*):
            Per text a name from `tasks`, or its index there, that decides the expert group; `None` leaves it to the
            guide.

        Returns:
            [`BatchFeature`] with the tokenizer's outputs and, for V volumes, those of [`CTMoEImageProcessor`],
            **guide_input_ids** and **guide_attention_mask** of shape `(V, guide_length)` (a volume without guide has a
            mask of zeros) and, if `task` is given, **task_ids** of shape `(V,)` (-100 for none).
        """
        if isinstance(text, str):
            text = [text]
        elif text is not None and not isinstance(text, (list, tuple)):
            raise PromptError("text", f"a {type(text).__name__}", "Pass a string, or a list of strings")
        if isinstance(images, (list, tuple)) and not any(row != [] and row != () for row in images):
            images = None  # a batch that happens to hold no scan
        outputs = super().__call__(images=images, text=text, **kwargs)
        if images is None or text is None:
            return outputs
        rows = [row for row, sample in enumerate(text) for _ in range(sample.count(self.image_token))]
        guides = [_per_text("guide", guide, text)[row] for row in rows]
        tasks = None if task is None else [_per_text("task", task, text)[row] for row in rows]
        routing = self.routing_inputs(guides, tasks)
        as_numpy = isinstance(outputs["pixel_values"], torch.Tensor) is False
        return BatchFeature({**outputs, **{k: v.numpy() if as_numpy else v for k, v in routing.items()}})

    def apply_chat_template(self, conversation, chat_template=None, processor_kwargs=None, **kwargs):
        """As in the library, with scans as images. Unless given, the guide is the last user message's text."""
        if kwargs.get("tokenize"):
            conversations, _ = self._normalize_conversations(conversation)
            guides = [last_user_text(messages, self.image_token) for messages in conversations]
            processor_kwargs = {"guide": guides, **(processor_kwargs or {})}
        return super().apply_chat_template(
            conversation, chat_template=chat_template, processor_kwargs=processor_kwargs, **kwargs
        )

    def routing_inputs(
        self, guides: list[str | None], tasks: list[str | int | None] | None = None
    ) -> dict[str, torch.Tensor]:
        """The model inputs that decide the routing, from one guide (and task) per volume.

        Args:
            guides: the words that steer the routing; `None` for a volume without.
            tasks: names or indices from `tasks`; `None` leaves a volume's choice to its guide.

        Returns:
            **guide_input_ids** and **guide_attention_mask** of shape `(V, guide_length)`, right-padded, and, with
            `tasks`, **task_ids** of shape `(V,)`.
        """
        inputs = self._guide_inputs(guides)
        if tasks is not None:
            inputs["task_ids"] = torch.tensor([self.task_id(task) for task in tasks])
        return inputs

    def task_id(self, task: str | int | None) -> int:
        """Index of a task, given by name or index, in `tasks`; -100 for `None`; PromptError for an unknown one."""
        if task is None:
            return UNLABELLED
        if task in self.tasks:
            return self.tasks.index(task)
        if not isinstance(task, int) or task not in range(len(self.tasks)):
            known = ", ".join(f"{name} ({index})" for index, name in enumerate(self.tasks))
            raise PromptError("task", f"{task!r} is unknown", f"Choose one of {known or 'none'}")
        return task

    def save_pretrained(self, *args, **kwargs):
        """As in the library, without what it leaves behind.

        That is `auto_map` on the processor that was saved, and how this machine found the tokenizer in its config.
        """
        for name in ("is_local", "local_files_only"):
            self.tokenizer.init_kwargs.pop(name, None)
        saved = super().save_pretrained(*args, **kwargs)
        vars(self).pop("auto_map", None)
        return saved

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        # Scans are not fetched here but by the image processor, which drops each one as soon as it is processed.
        return images, None if text is None else list(text), None, None

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs) -> None:
        if images is None and text is None:
            raise PromptError("processor", "neither images nor text", "Pass at least one of them")
        if text is None:
            return
        if not all(isinstance(sample, str) for sample in text):
            raise PromptError("text", f"a list of {type(text[0]).__name__}", "Pass a string, or a list of strings")
        placeholders = [sample.count(self.image_token) for sample in text]
        nested = isinstance(images, (list, tuple)) and any(isinstance(row, (list, tuple)) for row in images)
        if nested:
            volumes = [len(row) if isinstance(row, (list, tuple)) else 1 for row in images]
            fits = volumes == placeholders
        else:
            volumes = [] if images is None else [len(images) if isinstance(images, (list, tuple)) else 1]
            fits = sum(volumes) == sum(placeholders)
        if not fits:
            raise PromptError(
                "prompt",
                f"{sum(volumes)} scans {volumes} for {sum(placeholders)} placeholders {placeholders}",
                f"The {self.image_token} tokens in the prompts should be the same as the number of scans: write one "
                "for each, in order, or use the chat template",
            )

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        _, _, rows, columns = image_inputs["patch_mask"].shape
        num_slices = int(image_inputs["slice_mask"][image_idx].sum())
        shape = (num_slices, rows, columns)
        return self.image_token * num_visual_tokens(
            shape, self.pool, self.slice_scoring, self.volume_cell, self.merge_size, self.separators
        )

    def _process_images(self, images, **kwargs) -> tuple[BatchFeature, list[str]]:
        processed = self.image_processor(images, **kwargs)
        count = len(processed["pixel_values"])
        return processed, [self.replace_image_token(processed, index) for index in range(count)]

    def _guide_inputs(self, guides: list[str | None]) -> dict[str, torch.Tensor]:
        """Tokens of one guide per volume, right-padded; special tokens that a text spells out are dropped."""
        special = set(self.tokenizer.all_special_ids) | {self.image_token_id}
        rows = []
        for guide in guides:
            if guide is not None and not guide.strip():
                raise PromptError("question", "holds only spaces", "Ask something, or leave it out")
            ids = [] if guide is None else self.tokenizer(guide.strip(), add_special_tokens=False)["input_ids"]
            rows.append(torch.tensor([token for token in ids if token not in special], dtype=torch.long))
        length = max(1, *(len(row) for row in rows))
        input_ids = torch.zeros(len(rows), length, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for index, row in enumerate(rows):
            input_ids[index, : len(row)] = row
            attention_mask[index, : len(row)] = 1
        return {"guide_input_ids": input_ids, "guide_attention_mask": attention_mask}


def last_user_text(messages: list[dict[str, Any]], image_token: str) -> str | None:
    """The guide of a conversation: text of the last user message without placeholders, `None` if it has no text.

    Raises:
        PromptError: that text holds only spaces.
    """
    content = next((message.get("content") for message in reversed(messages) if message["role"] == "user"), None)
    if content is None:
        return None
    texts = [content] if isinstance(content, str) else [block["text"] for block in content if block["type"] == "text"]
    if not texts:
        return None
    text = "\n".join(texts).replace(image_token, "").strip()
    if not text:
        raise PromptError("question", "holds only spaces", "Ask something, or leave it out")
    return text


def _per_text(name: str, values: str | int | list[str | int | None] | None, text: list[str]) -> list[str | int | None]:
    if values is None or isinstance(values, (str, int)):
        return [values] * len(text)
    if len(values) != len(text):
        raise PromptError(name, f"{len(values)} entries for {len(text)} texts", "Give one per text")
    return list(values)


__all__ = ["CTMoEProcessor", "last_user_text"]
