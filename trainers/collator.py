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
"""Rows to batches: TRL's vision collator, which reads the scans, with the guide and the task of every volume.

It runs in the workers of the DataLoader. A row whose scan cannot be read leaves its batch and is named in it.
"""

import signal
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from trl.data_utils import apply_chat_template, prepare_multimodal_messages
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from ct_moe import CTMoEError, DataError, Volume
from ct_moe.processing_ct_moe import UNLABELLED, last_user_text

from .packing import append_conversations
from .volume_cache import VolumeCache


@dataclass
class CTMoEDataCollator(DataCollatorForVisionLanguageModeling):
    """Collates rows of `images`, `prompt`, `completion` and `task` (design section 4).

    Beside what TRL's collator returns, a batch holds the inputs that decide the routing, and, for the trainer:

    - **row_names** (`list[str]`): of the rows in the batch;
    - **row_tasks** (`torch.LongTensor` of shape `(batch_size,)`): their tasks, -100 for none;
    - **num_volumes** (`int`): the volumes that count in the routing losses;
    - **failed_rows** (`list[dict[str, str]]`): `row` and `error` of rows that were left out.

    Rows of `pack_rows` bring their further conversations, and the batch `position_ids` and `segment_ids`.

    Where no row is left, the batch is one with a volume of air, without labels: every process must go through every
    layer.

    Args:
        processor: a [`CTMoEProcessor`].
        volume_cache: where processed scans are kept; `None` processes them anew every time.
        on_error: `"skip"` or `"raise"`, for scans that cannot be read.
        always_volumes: whether batches of text alone get such a row as well: where parameters are spread over
            processes, a process that leaves the vision encoder out keeps the others waiting.
        workers_ignore_sigterm: for [`CTMoESFTTrainer`] while it trains: a launcher signals the whole group, and the
            step that is to be saved needs its batch. Who sets it has to shut the workers down: a process that ends
            otherwise would wait for persistent ones forever.
    """

    completion_only_loss: bool = True
    volume_cache: VolumeCache | None = None
    on_error: str = "skip"
    always_volumes: bool = False
    workers_ignore_sigterm: bool = False

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        if self.workers_ignore_sigterm and torch.utils.data.get_worker_info() is not None:
            # torch's own handler would end the worker; without it the worker ends with its parent.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        examples, failed = self._read(examples)
        names = [example["name"] for example in examples]
        num_volumes = sum(len(example["images"]) for example in examples)
        filled = not examples or (self.always_volumes and not num_volumes)
        if filled:
            examples = [*examples, self._blank()]
        tasks = [example.get("task") or None for example in examples]
        guides = [self._guide(example) for example in examples]

        columns = ("images", "prompt", "completion")  # others, such as `text`, would mean something else to TRL
        output = dict(super().torch_call([{name: example[name] for name in columns} for example in examples]))
        if num_volumes or filled:
            rows = [row for row, example in enumerate(examples) for _ in example["images"]]
            output |= self.processor.routing_inputs([guides[row] for row in rows], [tasks[row] for row in rows])
        if filled:
            output["labels"][-1] = UNLABELLED
        if any(example.get("packed") for example in examples):
            conversations = [
                [self._encode_conversation(example["images"], other) for other in example.get("packed") or []]
                for example in examples
            ]
            output = append_conversations(output, conversations, self.processor.image_token_id, self._pad_token_id)
        # Where a prompt sees all of itself, the answer must not be taken for a part of it.
        output["token_type_ids"] = (output["labels"] != UNLABELLED).long()
        return {
            **output,
            "row_names": names,
            "row_tasks": torch.tensor([self.processor.task_id(task) for task in tasks]),
            "num_volumes": num_volumes,
            "failed_rows": failed,
        }

    def prompt_inputs(self, examples: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """What `generate` needs for the prompts of rows whose scans can be read, and those rows.

        If there are none, the inputs are those of a volume of air.
        """
        readable, _ = self._read(examples)
        return self.encode_prompts(readable or [self._blank()]), readable

    def encode_prompts(self, examples: list[dict[str, Any]], tasks: list[str | None] | None = None) -> dict[str, Any]:
        """What `generate` needs for the prompts of rows whose `images` are processed; `tasks` forces some."""
        messages = [prepare_multimodal_messages(example["prompt"], example["images"]) for example in examples]
        images = [example["images"] for example in examples]
        inputs = self.processor(
            images=images if any(images) else None,
            text=[self.processor.apply_chat_template(prompt, add_generation_prompt=True) for prompt in messages],
            guide=[self._guide(example) for example in examples],
            task=tasks,
            padding=True,
            padding_side="left",
            return_tensors=self.return_tensors,
            add_special_tokens=False,
        )
        return dict(inputs)

    def _read(self, examples: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
        """Rows with their scans processed and a name, and which rows have none because a scan cannot be read."""
        readable, failed = [], []
        for example in examples:
            _check_columns(example)
            name = _row_name(example)
            try:
                images = [self.process(image) for image in _images(example)]
            except (CTMoEError, OSError) as error:  # an OSError: of a disk that went away
                if self.on_error == "raise":
                    raise
                failed.append({"row": name, "error": str(error)})
            else:
                readable.append({**example, "images": images, "name": name})
        return readable, failed

    def process(self, image: Any) -> dict[str, np.ndarray]:
        """A scan as the model sees it, from the cache if there is one."""
        if self.volume_cache is not None:
            return self.volume_cache.read(image)
        return self.processor.image_processor.process_volume(image)

    def _encode_conversation(self, images: list[Any], example: dict[str, Any]) -> tuple[list[int], list[int]]:
        """Tokens of a packed row behind its scans, and of its answer, as TRL's collator makes them of a row."""
        text = apply_chat_template(
            {
                "prompt": prepare_multimodal_messages(example["prompt"], images=images),
                "completion": prepare_multimodal_messages(example["completion"]),
            },
            self.processor,
        )
        asked, said = (
            self.processor.tokenizer(text[name], add_special_tokens=False)["input_ids"]
            for name in ("prompt", "completion")
        )
        return asked[len(asked) - asked[::-1].index(self.processor.image_token_id) :], said

    @property
    def _pad_token_id(self) -> int:
        return self.processor.tokenizer.pad_token_id

    def _guide(self, example: dict[str, Any]) -> str | None:
        return last_user_text(example["prompt"], self.processor.image_token)

    def _blank(self) -> dict[str, Any]:
        image_processor = self.processor.image_processor
        nothing = -1000.0 if image_processor.intensity == "hu" else 0.0
        volume = Volume(
            np.full((1, 16, 16), nothing, dtype=np.float32),
            (image_processor.slab_mm, 25.0, 25.0),
            np.eye(4),
            {"intensity": image_processor.intensity},
        )
        return {
            "images": [image_processor.process_volume(volume)],
            "prompt": [{"role": "user", "content": "-"}],
            "completion": [{"role": "assistant", "content": "-"}],
        }


def _row_name(example: dict[str, Any]) -> str:
    """How messages name a row: its number in the source, or its scans."""
    if example.get("row") is not None:
        numbers = [row["row"] for row in (example, *(example.get("packed") or []))]
        return f"row {numbers[0]}" if len(numbers) == 1 else f"rows {', '.join(map(str, numbers))}"
    return ", ".join(str(image) for image in _images(example) if isinstance(image, str)) or "a row without a number"


def _images(example: dict[str, Any]) -> list[Any]:
    if "images" in example:
        return example["images"] or []
    return [example["image"]]


def _check_columns(example: dict[str, Any]) -> None:
    if "messages" in example or "conversations" in example:
        raise DataError(
            "messages",
            "in this form the text that steers the experts could hold the answer",
            "Split every row into the columns prompt and completion, both lists of messages",
        )
    lists = ["prompt", "completion", *(["images"] if example.get("images") is not None else [])]
    if not all(isinstance(example.get(name), list) for name in lists) or not (
        "images" in example or "image" in example
    ):
        raise DataError(
            _row_name(example) if "images" in example or "image" in example else "a row",
            f"has the columns {', '.join(sorted(example))}, {' and '.join(lists)} not all of them lists",
            "Give images (a list of scans), prompt and completion (lists of messages) and, if known, task; "
            "ct_moe.trainers.load_rows makes them of a file",
        )


__all__ = ["CTMoEDataCollator"]
