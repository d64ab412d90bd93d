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
"""`pipeline("ct-report")`: scans in, structured reports or answers out."""

import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset
from transformers import GenerationConfig, Pipeline

from .errors_ct_moe import ModelError, PromptError
from .routing_ct_moe import routing_maps, routing_statistics
from .volume_io_ct_moe import load_volume


REPORT_PROMPT = "Write a radiology report of this CT scan with findings and impression."
PIPELINES = {
    "ct-report": {
        "impl": "pipeline_ct_moe.CTReportPipeline",
        "pt": ["AutoModelForImageTextToText"],
        "type": "multimodal",
    }
}
NOTICE = (
    "Machine-made text, not a medical device: it can be wrong or leave things out. A radiologist must read the scan."
)
ROUTING_NOTICE = "Routing shows which experts were used. It is not evidence for what the text says."


class CTReportPipeline(Pipeline):
    """Reports and answers about CT scans.

    ```python
    >>> from transformers import pipeline

    >>> reporter = pipeline("ct-report", model="path/or/hub-id", trust_remote_code=True)
    >>> reporter("scan.nii.gz")["findings"]
    >>> reporter("scan.nii.gz", question="Is there a pleural effusion?")["answer"]
    ```

    Call arguments:
        scans: a path, a `Volume` or anything else `load_volume` takes gives one result; a list or tuple of scans gives
            a list of results; a generator or other iterator gives a generator of results. A DICOM series that is a
            list of files goes through `load_volume` first.
        question (`str`, *optional*): a question about the scan; without one a report is written.
        context (`str`, *optional*): indication, phase and the like; becomes part of the prompt.
        check, series, spacing: as in `load_volume`, for scans whose values, folder or file leave it open.
        task (`str` or `int`, *optional*): name or index of the task whose experts serve the request. By default a
            report is sent to the task "report", if the model has one, and a question to the task that its text
            selects.
        batch_size (`int`, *optional*, defaults to 1): scans that go through the model together.
        return_routing (`bool` or `"maps"`, *optional*, defaults to `False`): adds `routing` to the result; with "maps"
            also, as arrays, which expert every patch went to.
        streamer (`BaseStreamer`, *optional*): receives the text as it is generated; one scan at a time.
        max_new_tokens, num_beams and every other generation parameter, also as `generate_kwargs`.

    With this package's own class a Hub model's commit is named by `CTReportPipeline(..., revision=commit)`.

    Returns a `dict` per scan: `scan` (the path as given, if it was one), `task`, `prompt`, `text`; `findings` and
    `impression` of a report (`None` where the text has no such heading) or the `answer` to a question; `num_slices`,
    `slab_mm` (`None` for display intensities), `warnings` of the reader, `processing` (source geometry (z, y, x),
    windows, versions), `model`, `revision`, `scope`, `notice`.
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False
    _pipeline_calls_generate = True
    _default_generation_config = GenerationConfig(max_new_tokens=512)

    def __init__(self, model, *args, revision: str | None = None, **kwargs):
        if model.config.model_type != "ct_moe":  # first: the rest asks a CT-MoE processor for its tasks
            raise ModelError(
                model.config.name_or_path or "model",
                f"a model of type {model.config.model_type!r}",
                "The task ct-report needs a CT-MoE model: make one from a base with `ct-moe convert`",
            )
        super().__init__(model, *args, **kwargs)
        # The library tells neither model nor pipeline which commit it loaded, but puts a Hub repository's code into a
        # module named after it.
        commits = [part for part in type(self).__module__.split(".") if re.fullmatch("[0-9a-f]{40}", part)]
        self.revision = revision or next(iter(commits), None)

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """As in the library, with the processor, which the library's pipelines leave out."""
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)

    def __call__(self, scans, **kwargs) -> dict[str, Any] | list[dict[str, Any]] | Iterator[dict[str, Any]]:
        batch_size = kwargs.pop("batch_size", None) or self._batch_size or 1
        kwargs.pop("num_workers", None)  # the library's; scans are read in threads by the image processor
        if kwargs.get("streamer") is not None and batch_size > 1:
            raise PromptError("streamer", f"cannot follow {batch_size} texts at once", "Use batch_size=1")
        params = [
            {**at_init, **at_call}
            for at_init, at_call in zip(
                (self._preprocess_params, self._forward_params, self._postprocess_params),
                self._sanitize_parameters(**kwargs),
            )
        ]
        if isinstance(scans, (Sequence, Dataset)) and not isinstance(scans, (str, bytes, bytearray, memoryview)):
            return list(self._run_batches(scans, batch_size, params))
        if isinstance(scans, Iterator):
            return self._run_batches(scans, batch_size, params)
        return self.run_single([scans], *params)[0]

    def _run_batches(self, scans: Iterable, batch_size: int, params: list[dict]) -> Iterator[dict[str, Any]]:
        # Batches are made by the processor: the library's default collation cannot pad volumes.
        batch = []
        for scan in scans:
            batch.append(scan)
            if len(batch) == batch_size:
                yield from self.run_single(batch, *params)
                batch = []
        if batch:
            yield from self.run_single(batch, *params)

    def _sanitize_parameters(
        self,
        question=None,
        context=None,
        task=None,
        check=None,
        series=None,
        spacing=None,
        return_routing=None,
        generate_kwargs=None,
        **kwargs,
    ):
        generation = {**(generate_kwargs or {}), **kwargs}
        known = {*vars(GenerationConfig()), "generation_config", "streamer", "logits_processor", "stopping_criteria"}
        if unknown := sorted(set(generation) - known):
            raise PromptError(
                ", ".join(unknown),
                "unknown argument",
                "Use question, context, task, return_routing, batch_size or a parameter of generate",
            )
        check_words(question=question, context=context)
        if self.processor.tasks != self.model.config.tasks:  # at every call: tasks can change in between
            raise ModelError(
                "tasks",
                f"the processor names {self.processor.tasks}, the model {self.model.config.tasks}",
                "Set processor.tasks = model.config.tasks after adding, removing or renaming tasks, and save both",
            )
        self.processor.task_id(task)  # refuses an unknown name
        if generation.get("num_return_sequences", 1) != 1:
            raise PromptError("num_return_sequences", "more than one text per scan", "Leave it at 1")
        preprocess = {"question": question, "context": context, "task": task}
        preprocess |= {"check": check, "series": series, "spacing": spacing}
        preprocess = {name: value for name, value in preprocess.items() if value is not None}
        routing = {} if return_routing is None else {"return_routing": return_routing}
        return preprocess, {**({"generate_kwargs": generation} if generation else {}), **routing}, {}

    def preprocess(self, scans: list, question=None, context=None, task=None, **load) -> dict[str, Any]:
        prompt = question.strip() if question is not None else REPORT_PROMPT
        if context is not None:
            prompt = f"Clinical context: {context.strip()}\n{prompt}"
        if task is None and question is None and "report" in self.processor.tasks:
            task = "report"
        if nested := [scan for scan in scans if isinstance(scan, (list, tuple))]:
            raise PromptError(
                "scans", f"a list of {len(nested[0])} inside the list", "Make it a Volume with load_volume"
            )
        image_processor = self.processor.image_processor
        if load:
            load |= {"intensity": image_processor.intensity, "reorient": image_processor.reorient}
            volumes = [load_volume(scan, **load) for scan in scans]
        else:
            volumes = image_processor.fetch_images(scans)
        conversations = [
            [{"role": "user", "content": [{"type": "image", "image": volume}, {"type": "text", "text": prompt}]}]
            for volume in volumes
        ]
        inputs = self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left", "task": task},
        )
        return {
            "inputs": dict(inputs),
            "prompt": prompt,
            "is_report": question is None,
            "scans": [str(scan) if isinstance(scan, (str, os.PathLike)) else None for scan in scans],
            "warnings": [list(volume.meta.get("warnings", [])) for volume in volumes],
            "sources": [(list(volume.hu.shape), [round(step, 4) for step in volume.spacing]) for volume in volumes],
        }

    def _forward(self, model_inputs: dict[str, Any], generate_kwargs=None, return_routing=False) -> dict[str, Any]:
        inputs = model_inputs.pop("inputs")
        text = {name: inputs.pop(name) for name in ("input_ids", "attention_mask")}
        # Encoded here and not inside generate, which keeps neither the task that was taken nor the routing.
        router_logits = bool(return_routing)
        features = self.model.get_image_features(**inputs, output_router_logits=router_logits, return_dict=True)
        generate_kwargs = self._prepare_generate_kwargs(generate_kwargs or {}, return_dict_in_generate=False)
        generated = self.model.generate(**text, mm_encoder_outputs={"image": features}, **generate_kwargs)
        return {
            **model_inputs,
            "generated": generated[:, text["input_ids"].shape[1] :],
            "num_slices": inputs["slice_mask"].sum(dim=1),
            "volume_scale": inputs["volume_scale"],
            "task_index": features.routing.task_index,
            "routing": self._describe_routing(features.routing, inputs, return_routing) if return_routing else None,
        }

    def postprocess(self, model_outputs: dict[str, Any]) -> list[dict[str, Any]]:
        config = self.model.config
        texts = self.processor.batch_decode(model_outputs["generated"], skip_special_tokens=True)
        in_hu = self.processor.image_processor.intensity == "hu"
        results = []
        for row, text in enumerate(text.strip() for text in texts):
            task_index = -1 if model_outputs["task_index"] is None else int(model_outputs["task_index"][row])
            result = {
                "scan": model_outputs["scans"][row],
                "task": config.tasks[task_index] if task_index >= 0 else None,
                "prompt": model_outputs["prompt"],
                "text": text,
                **(split_report(text) if model_outputs["is_report"] else {"answer": text}),
                "num_slices": int(model_outputs["num_slices"][row]),
                "slab_mm": round(5 * math.exp(float(model_outputs["volume_scale"][row, 1])), 3) if in_hu else None,
                "warnings": model_outputs["warnings"][row],
                "processing": {
                    "source_shape": model_outputs["sources"][row][0],
                    "source_spacing_mm": model_outputs["sources"][row][1],
                    "channels": self.processor.image_processor.channel_names,
                    "dtype": str(self.model.dtype).removeprefix("torch."),
                    "transformers": transformers.__version__,
                    "torch": torch.__version__,
                },
                "model": config.name_or_path,
                "revision": self.revision,
                "scope": config.intended_scope,
                "notice": NOTICE,
            }
            if model_outputs["routing"] is not None:
                result["routing"] = {"task": result["task"], **model_outputs["routing"][row]}
            results.append(result)
        return results

    def _describe_routing(self, routing, inputs, return_routing) -> list[dict[str, Any]]:
        """Per volume: task probabilities, slice scores, and per MoE layer what `routing_statistics` says (nats)."""
        config = self.model.config
        vision = config.vision_config
        statistics = routing_statistics(routing, vision)
        maps = routing_maps(routing, vision) if return_routing == "maps" else None
        probs = None if routing.task_logits is None else routing.task_logits.softmax(dim=-1).tolist()
        described = []
        for row, num_slices in enumerate(inputs["slice_mask"].sum(dim=1).tolist()):
            scores = None if routing.slice_scores is None else routing.slice_scores[row, :num_slices].tolist()
            layers = [
                {"layer": layer, **{name: _numbers(value[row]) for name, value in values.items()}}
                for layer, values in zip(vision.moe_layers, statistics)
            ]
            described.append(
                {
                    "task_probabilities": None if probs is None else dict(zip(config.tasks, probs[row])),
                    "slice_scores": scores,
                    "slice_positions_mm": (inputs["slice_positions"][row, :num_slices] / 1000).tolist(),
                    "layers": layers,
                    "notice": ROUTING_NOTICE,
                }
            )
            if maps is not None:
                described[-1]["maps"] = [
                    {name: value[row, :num_slices].cpu().numpy() for name, value in layer.items()} for layer in maps
                ]
        return described


def _numbers(value: torch.Tensor) -> float | list[float] | None:
    """For JSON, which has no NaN."""
    return None if value.isnan().any() else value.tolist()


def check_words(**texts: str | None) -> None:
    """Refuses a question or a context that is no text or holds only spaces."""
    for name, value in texts.items():
        if value is not None and not isinstance(value, str):
            raise PromptError(name, f"a {type(value).__name__}", "Pass one string for all scans")
        if value is not None and not value.strip():
            raise PromptError(name, "holds only spaces", "Write something, or leave it out")


_HEADING = re.compile(r"^[ \t#*]*(findings|impression|conclusion)[ \t*]*:[ \t*]*", re.IGNORECASE | re.MULTILINE)


def split_report(text: str) -> dict[str, str | None]:
    """`findings` and `impression` by their headings; without any heading all of the text is findings.

    Text before the first heading counts as findings. "Conclusion" is another word for impression.
    """
    sections = {"findings": [], "impression": []}
    name, start = "findings", 0
    for heading in _HEADING.finditer(text):
        sections[name].append(text[start : heading.start()].strip())
        name = "findings" if heading[1].lower() == "findings" else "impression"
        start = heading.end()
    sections[name].append(text[start:].strip())
    return {name: "\n".join(part for part in parts if part) or None for name, parts in sections.items()}


__all__ = ["CTReportPipeline", "split_report"]
