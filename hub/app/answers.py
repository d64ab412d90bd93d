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
"""Reports and answers about opened scans, as they are written; what does not depend on the question is kept.

- `Reader`: one loaded model for all users.
- `OpenScan`: one scan of one user, with what a further question uses again.

Asking again (design.md) is exact: of a scan, everything up to the experts of the first MoE layer is computed once,
and a question that was asked before finds its visual features whole. Between questions of one task the rest is not
shared, since the words of a question also steer which expert a patch goes to.
"""

import threading
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from ct_moe import ModelError
from ct_moe.pipeline_ct_moe import check_words
from ct_moe.volume_ct_moe import Volume

from ..reporting import open_reporter
from ..reusable_states import reusable_states, starts_from_prefix


MAX_FEATURES = 8  # questions per scan whose whole features are kept
STATES = (
    "last_hidden_state",
    "prefix_hidden_states",
    "moe_hidden_states",
    "slice_hidden_states",
    "volume_hidden_states",
)


class OpenScan(dict):
    """What `process_volume` makes of a scan, with what a page and a further question need of it; not its voxels.

    Args:
        volume: the scan.
        processed: from the image processor.
    """

    def __init__(self, volume: Volume, processed: dict[str, np.ndarray]):
        super().__init__(processed)
        # The shape of the voxels without the voxels.
        self.hu = np.broadcast_to(volume.hu.dtype.type(0), volume.hu.shape)
        self.spacing, self.affine, self.meta = volume.spacing, volume.affine, volume.meta
        self.kept: dict[str, torch.Tensor] = {}
        self.features: dict[tuple, Any] = {}
        self.reused = "nothing"
        self.report: dict[str, Any] | None = None
        self.answers: list[dict[str, Any]] = []


class Reader:
    """A model that several users ask at once: one question is answered at a time, the others wait.

    Args:
        model: folder or Hub id.
        max_new_tokens: longest answer.
        **load: arguments of `open_reporter`: `revision`, `device`, `dtype`.
    """

    def __init__(self, model: str, *, max_new_tokens: int = 512, **load):
        self.reporter = open_reporter(model, **load)
        self.max_new_tokens = max_new_tokens
        self._lock = threading.Lock()

    @property
    def scope(self) -> str:
        return self.reporter.model.config.intended_scope

    @property
    def image_processor(self):
        return self.reporter.processor.image_processor

    def open(self, volume: Volume) -> OpenScan:
        """Process a scan, once for all questions."""
        return OpenScan(volume, self.image_processor.process_volume(volume))

    def ask(
        self, scan: OpenScan, question: str | None = None, context: str | None = None, **generation
    ) -> Iterator[str | dict[str, Any]]:
        """Write a report, or answer a question.

        Yields:
            The text so far, again and again, and at last the pipeline's result with `reused`: what of the visual work
            was not done again ("nothing", "all before the experts", "everything"). The result is also added to the
            scan.

        Raises:
            PromptError: the question or the context holds only spaces.
        """
        check_words(question=question, context=context)
        reporter = copy(self.reporter)
        reporter.model = _Remembering(self.reporter.model, scan)
        streamer = TextIteratorStreamer(reporter.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop = threading.Event()
        call = {"max_new_tokens": self.max_new_tokens, "question": question, "context": context, **generation}
        call |= {"streamer": streamer, "stopping_criteria": StoppingCriteriaList([_Stop(stop)])}
        outcome = {}

        def run() -> None:
            try:
                with self._lock:
                    if not stop.is_set():
                        outcome["result"] = reporter(scan, return_routing="maps", **call)
            except Exception as error:  # handed to the caller, in whose thread it is raised
                outcome["error"] = error
            finally:
                streamer.end()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            text = ""
            for piece in streamer:
                text += piece
                yield text.strip()
        finally:
            stop.set()  # of one who has gone, the text is not written to its end
            thread.join()
        if isinstance(error := outcome.get("error"), torch.OutOfMemoryError):
            raise ModelError("the model", "ran out of memory on this scan", "Open a smaller one") from error
        if error is not None:
            raise error
        result = {**outcome["result"], "reused": scan.reused}
        routing = {name: value for name, value in result["routing"].items() if name != "maps"}  # arrays, to be drawn
        if question is None:
            scan.report = {**result, "routing": routing}
        else:
            scan.answers.append({"question": question, **result, "routing": routing})
        yield result


@dataclass
class _Remembering:
    """The model, for one scan: it encodes only what it has not encoded before."""

    model: Any
    scan: OpenScan

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def get_image_features(self, pixel_values, guide_input_ids, guide_attention_mask, task_ids=None, **inputs):
        scan, steering = self.scan, {"guide_input_ids": guide_input_ids, "guide_attention_mask": guide_attention_mask}
        inputs |= {**steering, "task_ids": task_ids}
        key = (tuple(guide_input_ids.flatten().tolist()), None if task_ids is None else int(task_ids))
        if key in scan.features:
            scan.reused = "everything"
            return copy(scan.features[key])
        if scan.kept:
            scan.reused = "all before the experts"
            features = self.model.get_image_features(**inputs, **scan.kept)
        else:
            scan.reused = "nothing"
            features = self.model.get_image_features(
                pixel_values=pixel_values, output_prefix_hidden_states=True, **inputs
            )
            if starts_from_prefix(self.model.config):
                scan.kept = reusable_states(features)
        if len(scan.features) >= MAX_FEATURES:
            del scan.features[next(iter(scan.features))]
        scan.features[key] = replace(features, **dict.fromkeys(STATES))  # large, and kept above
        return copy(scan.features[key])


@dataclass
class _Stop(StoppingCriteria):
    event: threading.Event = field(default_factory=threading.Event)

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)
