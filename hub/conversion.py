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
"""A 2D multimodal base becomes a CT-MoE model: every tensor accounted for, equality measured on the spot.

- `convert_base`: a folder or Hub id of a base of one of `families.FAMILIES` -> a folder that every Auto class loads.
- `plan_conversion`: what that would do, from configs and headers alone.
- `ConversionReport`: what was reused, what the base itself never reads, what was added, and the measured parity.

Nothing is unpickled (weights are safetensors only), and one tensor is in memory at a time. A killed run goes on.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, GenerationConfig, PreTrainedConfig
from transformers.utils import logging

import ct_moe
from ct_moe import (
    ConversionError,
    CTMoEConfig,
    CTMoEForConditionalGeneration,
    CTMoEImageProcessor,
    CTMoEProcessor,
    CTMoEVisionConfig,
)
from ct_moe.configuration_ct_moe import med_2e3, num_visual_tokens, paper_like

from .base_model import (
    Base,
    FileTensor,
    TensorCount,
    load_tokenizer,
    one_line,
    open_base,
    read_chat_template,
    read_image_settings,
    read_json,
    read_tensors,
)
from .chat_template import fit_chat_template
from .conversion_weights import conversion_folder, lazy_weights, write_shards
from .families import TOWERS
from .families.dinov2 import place_image_token
from .folder import write_settings
from .tensor_files import file_hash
from .tensor_mapping import TensorPlan, plan_tensors
from .unconversion import keep_base
from .volume_encoder import VolumeEncoderReport, add_encoder_config, open_volume_encoder, read_volume_encoder


# Of the image processor: how scans become slices. All else about pictures is the base's.
IMAGE_SETTINGS = (
    "slab_mm",
    "max_slices",
    "num_slices",
    "slab_reduction",
    "windows",
    "intensity",
    "reorient",
    "nominal_mm",
    "crop_body",
)


# Fields of the config that no one else sets, whether a family names them or not.
_OF_THE_BASE = {
    "projector_hidden_act",
    "multimodal_projector_bias",
    "projector_layers",
    "projector_norm",
    "projector_norm_eps",
    "merge_size",
    "merge_mode",
    "projector_hidden_size",
    "position_axes",
    "separators",
    "image_attention",
    "first_position",
}
PARITY_LIMIT = 1e-5  # largest absolute difference of two float32 logits, design section 2.2
_SEED = 0  # of the inputs that parity is measured on


@dataclass(frozen=True)
class Parity:
    """Agreement with the base's own class on one slice in float32, design section 2.2."""

    max_abs_difference: float
    max_abs_logit: float
    num_logits: int
    limit: float = PARITY_LIMIT


@dataclass(frozen=True)
class ConversionReport:
    """What became of a base, counted by the keys of its files.

    Attributes:
        base: Hub id, or name of the folder.
        revision: commit of the Hub repository, None for a folder.
        kind: model types of the base, its vision tower and its language model.
        dtype: dtype of the converted weights.
        reused: tensors of the base that are tensors of the converted model.
        unread: tensors of the base that its own forward never reads.
        unread_names: each of them with the reason.
        reused_names: the others, with their names in the converted model.
        changes: of them, how those are turned that the base stores otherwise.
        added: parameters the base does not have.
        added_names: their names, by the part of the model they belong to.
        volume_encoder: what became of the weights of a second, 3D encoder, None without them.
        chat_template: what had to be done to the base's chat template.
        parity: None when it was not measured.
        files: SHA-256 of the base's files with weights.
        versions: of the packages that did the work.
    """

    base: str
    revision: str | None
    kind: dict[str, str]
    dtype: str
    reused: TensorCount
    unread: TensorCount
    unread_names: dict[str, str]
    reused_names: dict[str, str]
    changes: dict[str, str]
    added: TensorCount
    added_names: dict[str, list[str]]
    volume_encoder: VolumeEncoderReport | None
    chat_template: str
    parity: Parity | None
    files: dict[str, str]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "parity": asdict(self.parity) if self.parity else "not measured"}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def __str__(self) -> str:
        revision = f" at {self.revision}" if self.revision else ""
        reasons = Counter(self.unread_names.values())
        lines = [
            f"Converted {self.base}{revision} ({' + '.join(self.kind.values())}), {self.dtype}",
            f"  reused {self.reused}",
            f"  unread {self.unread}",
            *(f"    {count:>3} {reason}" for reason, count in reasons.items()),
            f"  added  {self.added}",
            *(f"    {len(names):>3} {group}" for group, names in self.added_names.items()),
            *([] if self.volume_encoder is None else [str(self.volume_encoder)]),
            f"  chat template: {self.chat_template}",
        ]
        if self.parity is None:
            lines.append("  parity with the base: not measured")
        else:
            lines.append(
                f"  parity with the base: largest logit difference {self.parity.max_abs_difference:.2g} in float32 "
                f"(limit {self.parity.limit:g}, {self.parity.num_logits:,} logits up to "
                f"{self.parity.max_abs_logit:.3g})"
            )
        lines.append("  " + ", ".join(f"{name} {version}" for name, version in self.versions.items()))
        return "\n".join(lines)


def convert_base(
    base: str | Path,
    out: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    parity: bool = True,
    progress: bool = True,
    chat_template: str | None = None,
    preset: Literal["paper_like", "med_2e3"] | None = None,
    volume_encoder: str | Path | None = None,
    volume_encoder_revision: str | None = None,
    vision_tower: str | Path | None = None,
    vision_tower_revision: str | None = None,
    **ct_moe_overrides,
) -> ConversionReport:
    """Convert a 2D multimodal base into a CT-MoE model, and leave nothing behind on any error.

    Args:
        base: folder or Hub id of a base. Of a Hub repository only configs, tokenizer and safetensors are downloaded,
            and no weights before the configs are known to be supported; `HF_HUB_OFFLINE=1` uses the cache alone.
        out: folder to create; it must not exist or be empty.
        revision: branch, tag or commit of a Hub repository.
        dtype: dtype of the converted weights, a `torch.dtype` or its name; by default the base's own.
        parity: measure that the converted model returns the base's logits (design section 2.2). Loads both in float32,
            one after the other.
        progress: show progress on stderr.
        chat_template: Jinja template in place of the base's own.
        preset: `"paper_like"` or `"med_2e3"` for the settings of that name in `configuration_ct_moe`; overrides come
            on top.
        volume_encoder: folder or Hub id of M3D-CLIP, or of an encoder in its format, whose weights the 3D encoder gets
            and whose geometry `volume_encoder_config` takes over; without it a 3D encoder starts from random weights.
        volume_encoder_revision: branch, tag or commit of its Hub repository.
        vision_tower: folder or Hub id of a DINOv2; `base` is then a causal language model, and the projector new.
        vision_tower_revision: branch, tag or commit of its Hub repository.
        **ct_moe_overrides: fields of `CTMoEConfig`, `CTMoEVisionConfig` and `CTMoEImageProcessor` that the base does
            not determine, such as `tasks`, `pool`, `num_experts`, `volume_layers`, `slab_mm` or `intensity`.

    Returns:
        The report, also written as `conversion_report.json`.

    Raises:
        ConversionError: the base or the encoder is missing, incomplete or not supported, a tensor fits nowhere or is
            not filled, an override contradicts the encoder's weights, or the converted model's logits differ from the
            base's by more than 1e-5.
        ModelError: `out` holds something, or an override is out of range.
    """
    with conversion_folder(out) as folder, _progress(progress) as step:
        planned = _plan(
            base,
            step,
            revision=revision,
            dtype=dtype,
            chat_template=chat_template,
            preset=preset,
            volume_encoder=volume_encoder,
            volume_encoder_revision=volume_encoder_revision,
            vision_tower=vision_tower,
            vision_tower_revision=vision_tower_revision,
            **ct_moe_overrides,
        )
        source, plan, tensors = planned.source, planned.plan, planned.tensors
        step("reading the base's files")
        key = {
            "files": {path.name: file_hash(path) for path in sorted({tensor.file for tensor in tensors.values()})},
            "config": planned.config.to_dict(),
            "dtype": str(planned.dtype),
            "versions": _versions(),
        }
        _check_hashes(source, tensors, key["files"])
        weights = lazy_weights(plan, tensors, planned.config, planned.dtype, planned.filled)
        write_shards(folder, weights, key, step)
        step("writing the rest")
        write_settings(planned.config, planned.dtype, planned.generation_config, planned.processor, folder)
        keep_base(source, tensors, plan, folder)
        measured = None
        if parity:
            step("running the base")
            inputs = _parity_inputs(planned.config)
            expected = _run_base(source, planned.dtype, inputs, folder)
            step("running the converted model")
            measured = _compare(_run_converted(folder, inputs), expected)
        report = planned.report(measured, key["files"])
        (folder / "conversion_report.json").write_text(report.to_json(), encoding="utf-8")
    return report


def plan_conversion(base: str | Path, *, progress: bool = True, **options) -> ConversionReport:
    """What `convert_base` would do with the same arguments, from configs and the headers of the files alone.

    Of a Hub repository no weights are downloaded. Nothing is written, and no parity measured.
    """
    with _progress(progress) as step:
        return _plan(base, step, weights=False, **options).report(None, {})


@dataclass(frozen=True)
class _Plan:
    """All that is known before a tensor is read."""

    source: Base
    config: CTMoEConfig
    processor: CTMoEProcessor
    template_note: str
    generation_config: GenerationConfig
    tensors: dict[str, FileTensor]
    plan: TensorPlan
    dtype: torch.dtype
    filled: dict[str, torch.Tensor]  # what a 3D encoder's weights fill
    encoder_report: VolumeEncoderReport | None

    def report(self, parity: Parity | None, files: dict[str, str]) -> ConversionReport:
        plan, base = self.plan, self.source.config
        sizes = [torch.Size(plan.added_shapes[name]).numel() for names in plan.added.values() for name in names]
        return ConversionReport(
            base=self.source.name,
            revision=self.source.commit,
            kind={
                "model": base.model_type,
                "vision": base.vision_config.model_type,
                "text": base.text_config.model_type,
            },
            dtype=str(self.dtype).removeprefix("torch."),
            reused=_total(self.tensors[key].count for key in plan.reused),
            unread=_total(self.tensors[key].count for key in plan.unread),
            unread_names=plan.unread,
            reused_names=plan.reused,
            changes=plan.changes,
            added=_total(TensorCount(1, size, size * self.dtype.itemsize) for size in sizes),
            added_names=plan.added,
            volume_encoder=self.encoder_report,
            chat_template=self.template_note,
            parity=parity,
            files=files,
            versions=_versions(),
        )


def _plan(
    base: str | Path,
    step: Callable[[str], None],
    *,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    chat_template: str | None = None,
    preset: str | None = None,
    volume_encoder: str | Path | None = None,
    volume_encoder_revision: str | None = None,
    vision_tower: str | Path | None = None,
    vision_tower_revision: str | None = None,
    weights: bool = True,
    **overrides,
) -> _Plan:
    dtype = _as_dtype(dtype)
    for name, other, given in (
        ("vision_tower_revision", "vision_tower", vision_tower_revision if vision_tower is None else None),
        ("volume_encoder_revision", "volume_encoder", volume_encoder_revision if volume_encoder is None else None),
    ):
        if given is not None:
            raise ConversionError(name, f"given without a {other}", "Name it too")
    step("reading the base")
    source = open_base(base, revision, vision_tower, vision_tower_revision, weights)
    if preset == "paper_like":
        overrides = {**paper_like(source.config.vision_config.intermediate_size), **overrides}
    elif preset == "med_2e3":
        overrides = {**med_2e3(), **overrides}
    elif preset is not None:
        raise ConversionError("preset", f"{preset!r} is unknown", 'Use "paper_like", "med_2e3", or none')
    if volume_encoder is not None:
        step("reading the 3D encoder")
        encoder = open_volume_encoder(volume_encoder, volume_encoder_revision)
        overrides = add_encoder_config(overrides, encoder)
    image_settings = {name: value for name, value in overrides.items() if name in IMAGE_SETTINGS}
    config = _make_config(source, {name: value for name, value in overrides.items() if name not in IMAGE_SETTINGS})
    processor, template_note = _make_processor(source, config, chat_template, image_settings)

    step("mapping tensors")
    tensors = read_tensors(source)
    plan = plan_tensors({key: tensor.shape for key, tensor in tensors.items()}, config, source.config)
    dtype = dtype or reduce(torch.promote_types, {tensors[key].dtype for key in plan.reused})
    if weights:
        _check_tied(plan, tensors)
    filled, encoder_report = {}, None
    if volume_encoder is not None:
        images = processor.image_processor
        read, encoder_report = read_volume_encoder(
            encoder, config.volume_encoder_config, images.image_mean, images.image_std
        )
        filled = {f"model.volume_encoder.{name}": weight for name, weight in read.items()}
        plan = _without(plan, filled)
    generation_config = _generation_config(source)
    return _Plan(
        source, config, processor, template_note, generation_config, tensors, plan, dtype, filled, encoder_report
    )


def _make_config(source: Base, overrides: dict[str, Any]) -> CTMoEConfig:
    base, family = source.config, source.family
    tower = TOWERS[base.vision_config.model_type]
    vision = tower.constants | {name: getattr(base.vision_config, own) for name, own in tower.fields.items()}
    vision |= tower.settings(base.vision_config) | family.vision(base)
    if family.image_size is not None:
        vision["image_size"] = overrides.pop("image_size", family.image_size)
    top = {
        "text_config": base.text_config,
        "image_token_id": base.image_token_id,
        "tie_word_embeddings": base.tie_word_embeddings,
        **family.settings(base),
    }
    general = {field.name for field in fields(PreTrainedConfig)}
    free_vision = {field.name for field in fields(CTMoEVisionConfig)} - general - vision.keys() - {"num_tasks"}
    free_top = {field.name for field in fields(CTMoEConfig)} - general - top.keys() - {"vision_config"}
    free_top -= {"format_version", *_OF_THE_BASE}
    for name, value in overrides.items():
        if name not in free_vision | free_top:
            raise ConversionError(
                name,
                "not a field that a conversion can set",
                f"Set one of {', '.join(sorted(free_vision | free_top | {*IMAGE_SETTINGS}))}; others are the base's",
            )
        (vision if name in free_vision else top)[name] = value
    try:
        return CTMoEConfig(vision_config=CTMoEVisionConfig(**vision), **top)
    except StrictDataclassError as error:
        raise ConversionError("the configuration", one_line(error), "Give the field a value of its type") from error


def _make_processor(
    source: Base, config: CTMoEConfig, chat_template: str | None, overrides: dict[str, Any]
) -> tuple[CTMoEProcessor, str]:
    """The processor, and what was done to the base's chat template."""
    tokenizer = load_tokenizer(source.name, source.folder)
    if source.tower_folder is not None:
        place_image_token(tokenizer, config.text_config.vocab_size, source.name)
    image_token = tokenizer.convert_ids_to_tokens(config.image_token_id)
    added = config.image_token_id in tokenizer.added_tokens_decoder
    # Of a language model beside a tower of its own any token was chosen that is free.
    if not added or (source.tower_folder is None and image_token not in source.family.image_tokens):
        raise ConversionError(
            source.name,
            f"image_token_index {config.image_token_id} of config.json is {image_token!r} in the tokenizer, "
            + ("" if added else "which is none of its added tokens, ")
            + f"and not {' or '.join(source.family.image_tokens)}",
            "Config and tokenizer do not belong together: download the base again",
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # batches need one; padding is masked, whichever token it is
    template = chat_template or read_chat_template(source) or tokenizer.chat_template
    written, meant = source.family.image_text(image_token)
    if template is None:
        template, owner = source.family.chat_template, "the family"
    else:
        template, owner = template if chat_template else _write_images(template, written, meant), "the base"
    template, change = fit_chat_template(template, tokenizer, image_token)
    note = f"{'the caller' if chat_template else owner}'s own{change}"
    image_settings = read_image_settings(source)
    size = config.vision_config.image_size
    if config.volume_encoder_config is not None:
        if "num_slices" in overrides:
            raise ConversionError("num_slices", "follows from the 3D encoder", "Leave it out")
        overrides = {"num_slices": config.volume_encoder_config.num_slices, **overrides}
    image_processor = CTMoEImageProcessor(
        size={"height": size, "width": size},
        patch_size=config.vision_config.patch_size,
        image_mean=image_settings["image_mean"],
        image_std=image_settings["image_std"],
        **overrides,
    )
    processor = CTMoEProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        chat_template=template,
        image_token=image_token,
        pool=config.pool,
        tasks=config.tasks,
        slice_scoring=config.slice_scoring,
        volume_cell=config.volume_cell,
        merge_size=config.merge_size,
        separators=config.separators,
    )
    return processor, note


def _write_images(template: str, written: tuple[str, ...], meant: str) -> str:
    """A base's template with what its processor makes of an image in place of what the template writes for one."""
    for words in written:
        if words in template:
            return template.replace(words, meant.replace("\n", "\\n")) if meant != words else template
    return template


def _check_tied(plan: TensorPlan, tensors: dict[str, FileTensor]) -> None:
    """Files of a tied base may hold its head as well, but only as a copy of the input embeddings."""
    pair = [key for key in tensors if key in plan.unread and key.endswith("lm_head.weight")]
    pair += [key for key, target in plan.reused.items() if target == "model.language_model.embed_tokens.weight"]
    if len(pair) < 2:
        return
    weights = [tensors[key].read() for key in pair]
    if not torch.equal(*weights):
        raise ConversionError(
            pair[0],
            "differs from the input embeddings, to which config.json ties it",
            "Correct tie_word_embeddings in the base's config.json",
        )


def _without(plan: TensorPlan, filled: dict[str, torch.Tensor]) -> TensorPlan:
    """The plan with fewer added parameters: those that another model's weights fill."""
    added = {group: [name for name in names if name not in filled] for group, names in plan.added.items()}
    return replace(plan, added={group: names for group, names in added.items() if names})


def _check_hashes(source: Base, tensors: dict[str, FileTensor], hashes: dict[str, str]) -> None:
    """In the Hub's cache a large file lies under its SHA-256: a damaged one is found before it is converted."""
    for path in sorted({tensor.file for tensor in tensors.values()}):
        blob = path.resolve().name
        if source.commit is not None and len(blob) == 64 and blob != hashes[path.name]:
            raise ConversionError(path, "is not the file that the Hub has", "Remove it and download it again")


def _versions() -> dict[str, str]:
    return {"transformers": transformers.__version__, "torch": torch.__version__, "ct_moe": ct_moe.__version__}


def _generation_config(source: Base) -> GenerationConfig:
    path = source.folder / "generation_config.json"
    if not path.is_file():
        return GenerationConfig.from_model_config(source.config.text_config)
    content = read_json(path)
    try:
        config = GenerationConfig.from_dict(content)
        config.validate(strict=True)  # the library loads an invalid one, and refuses to save it
    except (ValueError, TypeError) as error:
        raise ConversionError(path, one_line(error), "Correct it in a copy of the base") from error
    return config


class _ParityInputs(NamedTuple):
    input_ids: torch.Tensor
    pixel_values: torch.Tensor
    guide_input_ids: torch.Tensor
    patch_mask: torch.Tensor


def _parity_inputs(config: CTMoEConfig) -> _ParityInputs:
    """One random slice in a random prompt. The guide and the mask drive the added parts, which must add nothing."""
    generator = torch.Generator().manual_seed(_SEED)
    vision = config.vision_config

    def tokens(number: int) -> torch.Tensor:
        ids = torch.randint(config.text_config.vocab_size - 1, (1, number), generator=generator)
        return ids + (ids >= config.image_token_id)  # every token but the placeholder

    placeholders = torch.full((1, _num_slice_tokens(config)), config.image_token_id)
    return _ParityInputs(
        input_ids=torch.cat([tokens(5), placeholders, tokens(11)], dim=1),
        pixel_values=torch.randn(1, vision.num_channels, vision.image_size, vision.image_size, generator=generator),
        guide_input_ids=tokens(7),
        patch_mask=torch.rand(1, 1, vision.grid_size, vision.grid_size, generator=generator) > 0.25,
    )


def _num_slice_tokens(config: CTMoEConfig) -> int:
    """Visual tokens of one slice, as the base has them: not pooled, none of TG-IS."""
    grid = config.vision_config.grid_size
    return num_visual_tokens((1, grid, grid), (1, 1, 1), "none", None, config.merge_size, config.separators)


@torch.no_grad()
def _run_base(source: Base, dtype: torch.dtype, inputs: _ParityInputs, converted: Path) -> torch.Tensor:
    # Rounded to the dtype of the converted weights first: what is compared is what is computed with equal weights.
    family = source.family
    if family.run_base is not None:
        given = (source.config, dtype, inputs.input_ids, inputs.pixel_values, source.tower_folder, converted)
        return family.run_base(source.folder, *given)
    model = AutoModelForImageTextToText.from_pretrained(source.folder, dtype=dtype).float()
    image = family.base_inputs(inputs.pixel_values, inputs.input_ids, source.config)
    return model(input_ids=inputs.input_ids, **image).logits


@torch.no_grad()
def _run_converted(folder: Path, inputs: _ParityInputs) -> torch.Tensor:
    model = CTMoEForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.config.pool = [1, 1, 1]
    model.config.slice_scoring = "none"
    return model(
        input_ids=inputs.input_ids,
        pixel_values=inputs.pixel_values.unsqueeze(1),
        patch_mask=inputs.patch_mask,
        volume_scale=torch.tensor([[-0.3, 0.7]]),
        guide_input_ids=inputs.guide_input_ids,
    ).logits


def _compare(logits: torch.Tensor, expected: torch.Tensor) -> Parity:
    difference = (logits - expected).abs().max().item()
    if not difference <= PARITY_LIMIT:  # so that NaN is refused as well
        raise ConversionError(
            "parity",
            f"logits differ from the base's by {difference:.3g} in float32, more than {PARITY_LIMIT:g}",
            "Report it with the name of the base: a conversion must not change what the base computes",
        )
    return Parity(difference, expected.abs().max().item(), expected.numel())


def _total(counts) -> TensorCount:
    return sum(counts, start=TensorCount())


def _as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise ConversionError("dtype", f"{dtype!r} cannot be used", 'Use "float32", "bfloat16" or "float16"')
    return dtype


@contextmanager
def _progress(show: bool) -> Iterator[Callable[[str], None]]:
    """Yield a function that names the step that begins; the library's own bars show inside it, its advice does not."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # loading without the added parameters would list every one of them
    if not show:
        logging.disable_progress_bar()
    bar = tqdm(disable=not show, bar_format="{desc} [{elapsed}]")
    try:
        yield bar.set_description_str
    finally:
        bar.close()
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
