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
"""CT volumes in, model inputs out: Hounsfield windows as channels, square slices, slabs of equal thickness."""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypedDict

import numpy as np
import torch
from torch.nn import functional as F
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, SizeDict
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType, auto_docstring

from .errors_ct_moe import ModelError, VolumeError
from .volume_ct_moe import AIR_HU, Volume
from .volume_io_ct_moe import load_volume


# (centre, width) in HU, one per channel, in channel order. `chest` is the default of the design. `abdomen` and `head`
# take the usual reading windows (Radiopaedia, "Windowing (CT)"; subdural as in the winning entries of the RSNA 2019
# haemorrhage challenge). `wide` keeps every density in the first channel: the ranges [-1024, 1024], [-135, 215] and
# [0, 80] of MedGemma 1.5.
WINDOW_PRESETS = {
    "chest": {"lung": (-600.0, 1500.0), "soft tissue": (40.0, 400.0), "bone": (480.0, 2500.0)},
    "abdomen": {"soft tissue": (50.0, 400.0), "liver": (30.0, 150.0), "bone": (400.0, 1800.0)},
    "head": {"brain": (40.0, 80.0), "subdural": (80.0, 200.0), "bone": (600.0, 2800.0)},
    "wide": {"all": (0.0, 2048.0), "soft tissue": (40.0, 350.0), "brain": (40.0, 80.0)},
}
SLAB_REDUCTIONS = ("mean", "max", "nearest")

AIR_LIMIT_HU = -900.0 + 0.01  # the margin: a rounding error shall not move -900 HU across the limit
BODY_LIMIT_HU = -500.0
REFERENCE_FIELD_MM, REFERENCE_SLAB_MM = 400.0, 5.0  # `volume_scale` is zero here
MAX_THREADS = 8  # every thread holds one volume in memory


class CTMoEImageProcessorKwargs(TypedDict, total=False):
    r"""
    size (`dict[str, int]`, *optional*):
        `{"height": n, "width": n}` of a slice in pixels. Slices are square in millimetres and in pixels.
    patch_size (`int`, *optional*):
        Side in pixels of the vision encoder's patches; divides `size`.
    image_mean (`list[float]`, *optional*):
        The base model's mean, one per channel, of values in [0, 1].
    image_std (`list[float]`, *optional*):
        The base model's standard deviation, one per channel.
    slab_mm (`float`, *optional*):
        Thickest slab that one slice may stand for, unless `max_slices` or `num_slices` forces thicker ones.
    max_slices (`int`, *optional*):
        Most slices per volume.
    num_slices (`int`, *optional*):
        A fixed number of slices per volume, in place of `slab_mm` and `max_slices`.
    slab_reduction (`str` or `list[str]`, *optional*):
        How the source slices of a slab become one: `"mean"` (weighted by overlap), `"max"` or `"nearest"`; one for all
        channels, or one per channel.
    windows (`str` or `list[list[float]]`, *optional*):
        Name of a preset (`"chest"`, `"abdomen"`, `"head"`, `"wide"`), or three (centre, width) in HU.
    intensity (`str`, *optional*):
        `"hu"`, or `"display"` for arrays in [0, 1] that never were Hounsfield units.
    reorient (`bool`, *optional*):
        Whether scans are turned to axial slices, patient right on the left, anterior on top. `False` keeps their
        native plane.
    nominal_mm (`float`, *optional*):
        Distance assumed between the slices of a `"display"` volume.
    crop_body (`bool`, *optional*):
        Whether the field of view shrinks, in plane, to a square around the body (the table is left out).
    return_tensors (`str` or [`~utils.TensorType`], *optional*):
        `"pt"` (also what `None` gives) or `"np"`.
    """

    size: dict[str, int] | int
    patch_size: int
    image_mean: float | list[float] | tuple[float, ...]
    image_std: float | list[float] | tuple[float, ...]
    slab_mm: float
    max_slices: int
    num_slices: int | None
    slab_reduction: str | list[str] | tuple[str, ...]
    windows: str | list[list[float]] | tuple[tuple[float, float], ...]
    intensity: str
    reorient: bool
    nominal_mm: float
    crop_body: bool
    return_tensors: str | TensorType | None


@auto_docstring(custom_intro="Turns CT volumes into the slices that a 2D vision encoder reads (design.md 2.1).")
class CTMoEImageProcessor(BaseImageProcessor):
    # Not an extension of the library's ImagesKwargs: its other options (do_resize, resample, crop_size ...) have no
    # meaning here, and are refused rather than ignored.
    valid_kwargs = CTMoEImageProcessorKwargs
    model_input_names = ["pixel_values", "slice_mask", "slice_positions", "patch_mask", "volume_scale"]
    _auto_class = "AutoImageProcessor"

    size = {"height": 336, "width": 336}
    patch_size = 14
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    slab_mm = 5.0
    max_slices = 64
    num_slices = None
    slab_reduction = "mean"
    windows = "chest"
    intensity = "hu"
    reorient = True
    nominal_mm = 5.0
    crop_body = False

    def __init__(self, **kwargs: Unpack[CTMoEImageProcessorKwargs]):
        foreign = set(ImagesKwargs.__annotations__) - set(CTMoEImageProcessorKwargs.__annotations__)
        self._refuse([name for name in foreign if kwargs.get(name) is not None])
        super().__init__(**kwargs)
        self._set_attributes(**kwargs)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches per slice: rows and columns."""
        return self.size["height"] // self.patch_size, self.size["width"] // self.patch_size

    @property
    def channel_names(self) -> list[str]:
        """What each channel shows, for captions: window, centre and width, slab reduction."""
        if self.intensity == "display":
            return ["display, 0 to 1"] * 3
        names = list(WINDOW_PRESETS[self.windows]) if isinstance(self.windows, str) else ["window"] * 3
        reductions = [self.slab_reduction] * 3 if isinstance(self.slab_reduction, str) else self.slab_reduction
        return [
            f"{name} C {centre:g} W {width:g} HU, {reduction}"
            for name, (centre, width), reduction in zip(names, _hu_windows(self.windows), reductions)
        ]

    def fetch_images(self, images):
        """Loads scans, several of them in threads, and keeps the nesting of the list.

        Args:
            images: one scan, or a (nested) list of them: a `Volume`, or anything `load_volume` takes. A list always
                means several scans; a series that is a list of files goes through `load_volume` first.

        Returns:
            The same nesting, of `Volume` objects; scans that are processed already stay what they are.
        """
        return self._fetch(images, self.intensity, self.reorient)

    @auto_docstring(custom_intro="Processes one CT volume or a (nested) list of them; every row is one volume.")
    def preprocess(self, images, **kwargs: Unpack[CTMoEImageProcessorKwargs]) -> BatchFeature:
        r"""
        images (`Volume`, `str`, `list`):
            One scan, or a (nested) list of them: a `Volume`, a path, or anything `load_volume` takes. Paths are loaded
            in threads and dropped as soon as they are processed. A scan may also be what `process_volume` gave for it
            under these settings: it is used as it is, and copied.

        Returns:
            [`BatchFeature`] with V volumes in order and S slices, padded to the longest with zeros:

            - **pixel_values** (`float32` of shape `(V, S, 3, height, width)`): the windows, normalised.
            - **slice_mask** (`bool` of shape `(V, S)`): `True` for real slices.
            - **slice_positions** (`int32` of shape `(V, S)`): slab centres from the first one, in micrometres.
            - **patch_mask** (`bool` of shape `(V, S, h, w)`): `False` where a patch holds nothing above -900 HU.
            - **volume_scale** (`float32` of shape `(V, 2)`): log(field of view / 400 mm), log(slab / 5 mm).
        """
        settings = self._call_settings(kwargs)
        images = list(_leaves(images))
        if not images:
            raise VolumeError("images", "an empty list of scans", "Pass at least one scan")

        def process(image) -> dict[str, np.ndarray]:
            if not _is_row(image):
                return self._process_volume(_load(image, **settings), **settings)
            row = _checked_row(image, **settings)
            # A single row is not copied when it is stacked, and this one is the caller's.
            return row if len(images) > 1 else {name: values.copy() for name, values in row.items()}

        return BatchFeature(_pad_and_stack(_in_threads(process, images)), tensor_type=settings["return_tensors"])

    def process_volume(self, volume, **kwargs: Unpack[CTMoEImageProcessorKwargs]) -> dict[str, np.ndarray]:
        """One scan's row of every output, to be kept and handed to `preprocess` later in place of the scan.

        Args:
            volume: a `Volume`, or anything `load_volume` takes; a list is the files of one series.
            **kwargs: settings for this call, as in `preprocess`.

        Returns:
            The outputs of `preprocess` as NumPy arrays, without the axis of volumes and without padding.

        Raises:
            VolumeError: the scan cannot be loaded, or does not fit the settings.
            ModelError: a setting is unknown or cannot be.
        """
        if kwargs.get("return_tensors") is not None:
            raise ModelError("return_tensors", "a row is always NumPy arrays", "Leave it out")
        settings = self._call_settings(kwargs)
        return self._process_volume(_load(volume, **settings), **settings)

    def _process_volume(
        self,
        volume: Volume,
        *,
        size: SizeDict,
        patch_size: int,
        image_mean: tuple[float, ...],
        image_std: tuple[float, ...],
        slab_mm: float,
        max_slices: int,
        num_slices: int | None,
        slab_reduction: str | tuple[str, ...],
        windows: str | tuple[tuple[float, float], ...],
        intensity: str,
        nominal_mm: float,
        crop_body: bool,
        **kwargs,
    ) -> dict[str, np.ndarray]:
        """One volume's row of every output, without padding, as NumPy arrays.

        Slabs are reduced before they are resized, and both before the windows: an average of densities is a density,
        an average of clipped values is not. Slab by slab, so that no float copy of the volume ever exists. NumPy and
        not torch, since neither autocast nor `torch.set_float32_matmul_precision` may touch Hounsfield units.
        """
        depth, rows, columns = volume.hu.shape
        spacing_z, spacing_y, spacing_x = volume.spacing
        height, width = size["height"], size["width"]
        is_hu = intensity == "hu"
        loaded_as = volume.meta.get("intensity", intensity)
        if loaded_as != intensity:
            raise VolumeError(
                "images",
                f'a volume loaded with intensity="{loaded_as}" for a processor with intensity="{intensity}"',
                "Use the same for both",
            )

        extent_mm = depth * spacing_z
        # No millimetres are known of a display volume. 10 micrometres forgive the rounding of a stored affine.
        wanted = num_slices or min(max_slices, math.ceil((extent_mm - 0.01) / slab_mm) if is_hu else depth)
        num_slices = max(1, min(wanted, depth))

        box = _body_box(volume) if crop_body else (0, rows, 0, columns)
        top, bottom, left, right = (edge * mm for edge, mm in zip(box, [spacing_y, spacing_y, spacing_x, spacing_x]))
        field_mm = max(bottom - top, right - left)
        row_taps = _resize_taps(rows, spacing_y, (top + bottom - field_mm) / 2, field_mm, height)
        column_taps = _resize_taps(columns, spacing_x, (left + right - field_mm) / 2, field_mm, width)

        # Window and normalisation are one line per channel, clipped: value = clip(hu * slope + offset, low, high).
        centres, widths = (np.float64(_hu_windows(windows)) if is_hu else np.float64([[0.5, 1.0]] * 3)).T
        mean, std = np.float64(image_mean), np.float64(image_std)
        slope, offset = 1 / (widths * std), ((widths / 2 - centres) / widths - mean) / std
        slope, offset, low, high = np.float32([slope, offset, -mean / std, (1 - mean) / std])[:, :, None, None]

        reductions = [slab_reduction] if isinstance(slab_reduction, str) else list(slab_reduction)
        background = AIR_HU if is_hu else 0.0
        pixel_values = np.empty((num_slices, 3, height, width), dtype=np.float32)
        patch_mask = np.ones((num_slices, height // patch_size, width // patch_size), dtype=bool)
        for index in range(num_slices):
            planes = {name: _reduce_slab(volume.hu, index, num_slices, name) for name in set(reductions)}
            # What lies beyond the scan has no taps: shifted by the background, it is zero.
            planes = {name: _resize(plane - background, row_taps, column_taps) for name, plane in planes.items()}
            slab = np.stack([planes[name] for name in reductions]) + np.float32(background)  # (1 or 3, height, width)
            if is_hu:
                patches = slab.reshape(-1, height // patch_size, patch_size, width // patch_size, patch_size)
                patch_mask[index] = patches.max((0, 2, 4)) > AIR_LIMIT_HU
            elif slab.min() < -0.01 or slab.max() > 1.01:
                raise VolumeError(
                    'intensity="display"',
                    f"values from {slab.min():.4g} to {slab.max():.4g}, where [0, 1] is expected",
                    'Scale the array to [0, 1], or use intensity="hu" if these are Hounsfield units',
                )
            np.multiply(slab, slope, out=pixel_values[index])
            pixel_values[index] += offset
            np.clip(pixel_values[index], low, high, out=pixel_values[index])

        step_mm = extent_mm / num_slices if is_hu else nominal_mm
        scale = [math.log(field_mm / REFERENCE_FIELD_MM), math.log(step_mm / REFERENCE_SLAB_MM)] if is_hu else [0, 0]
        return {
            "pixel_values": pixel_values,
            "slice_mask": np.ones(num_slices, dtype=bool),
            "slice_positions": np.rint(np.arange(num_slices) * (step_mm * 1000)).astype(np.int32),
            "patch_mask": patch_mask,
            "volume_scale": np.float32(scale),
        }

    def _fetch(self, images, intensity: str, reorient: bool):
        def load(image):
            return image if _is_row(image) else _load(image, intensity, reorient)

        loaded = iter(_in_threads(load, list(_leaves(images))))
        return _map_leaves(lambda _: next(loaded), images)

    def _call_settings(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Every setting of one call: the processor's own, overridden by those of the call."""
        self._refuse(set(kwargs) - set(self._valid_kwargs_names))
        return self._standardize_kwargs(**{name: getattr(self, name) for name in self._valid_kwargs_names} | kwargs)

    def _standardize_kwargs(self, **settings) -> dict[str, Any]:
        """Checks every setting and brings it to the form in which it is kept: called when set and when overridden."""
        for name in ("patch_size", "max_slices", "num_slices"):
            value = settings[name]
            if (type(value) is not int or value < 1) and (name, value) != ("num_slices", None):
                raise ModelError(name, f"{value!r} is not a positive integer", "Pass 1 or more")
        for name in ("slab_mm", "nominal_mm"):
            if not _is_number(settings[name]) or settings[name] <= 0:
                raise ModelError(name, f"{settings[name]!r} is not a length", "Pass millimetres above 0")
        for name in ("reorient", "crop_body"):
            if type(settings[name]) is not bool:
                raise ModelError(name, f"{settings[name]!r} is not a switch", "Pass True or False")
        if settings["intensity"] not in ("hu", "display"):
            raise ModelError("intensity", f"{settings['intensity']!r} is unknown", 'Choose "hu" or "display"')
        if settings["intensity"] == "display" and settings["crop_body"]:
            raise ModelError("crop_body", 'needs Hounsfield units and intensity is "display"', "Turn one of them off")
        return settings | {
            "size": _square_size(settings["size"], settings["patch_size"]),
            "image_mean": _per_channel("image_mean", settings["image_mean"]),
            "image_std": _per_channel("image_std", settings["image_std"], positive=True),
            "slab_reduction": _checked_reduction(settings["slab_reduction"]),
            "windows": _checked_windows(settings["windows"]),
        }

    def _refuse(self, names) -> None:
        if names:
            raise ModelError(
                ", ".join(sorted(names)),
                f"not a setting of {type(self).__name__}",
                f"Leave it out; the settings are {', '.join(CTMoEImageProcessorKwargs.__annotations__)}",
            )


def _reduce_slab(hu: np.ndarray, index: int, num_slabs: int, reduction: str) -> np.ndarray:
    """Slab `index` of `num_slabs` equal ones, from (z, y, x) to (y, x) float32.

    In units of 1 / num_slabs of a slice, source slice j covers [j * num_slabs, (j + 1) * num_slabs] and the slab
    [index * depth, (index + 1) * depth]: integers, so that no slice joins a slab by a rounding error.
    """
    depth = len(hu)
    start, stop = index * depth, (index + 1) * depth
    first, last = start // num_slabs, -(-stop // num_slabs)
    if reduction == "nearest":
        return hu[(start + stop) // (2 * num_slabs)].astype(np.float32)
    if reduction == "max":
        return hu[first:last].max(axis=0).astype(np.float32)
    edges = np.clip(np.arange(first, last + 1) * num_slabs, start, stop)
    # einsum casts in small blocks and follows any strides: flipped and permuted views need no copy.
    return np.einsum("z,zyx->yx", (np.diff(edges) / depth).astype(np.float32), hu[first:last])


def _resize_taps(length: int, spacing: float, start: float, field: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Antialiased bilinear resize of one axis: for every output pixel its source pixels and their weights.

    The frame [start, start + field] in mm, from the outer edge of the first pixel, is cut into `size` cells. A cell's
    value is the mean of the pixels under a triangle as wide as two cells (two pixels when enlarging), which is
    `interpolate(..., mode="bilinear", antialias=True)`; a pixel cut by the frame's edge counts with the part inside,
    and pixels beyond the scan are background, whose weight is left out: rows may sum to less than 1. Bilinear and not
    bicubic: with negative lobes an edge rings, and ringing at the lung's border is a density that is not there.

    Returns:
        Indices and float32 weights, both of shape (size, taps).
    """
    cell = field / size
    reach = max(cell, spacing)
    targets = start + (np.arange(size)[:, None] + 0.5) * cell
    index = np.floor((targets - reach) / spacing + 0.5).astype(int) + np.arange(math.ceil(2 * reach / spacing))
    left = index * spacing
    inside = np.clip(np.minimum(left + spacing, start + field) - np.maximum(left, start), 0, None)
    weights = np.clip(1 - np.abs(targets - (left + spacing / 2)) / reach, 0, None) * inside
    weights /= weights.sum(1, keepdims=True)
    weights[(index < 0) | (index >= length)] = 0
    return index.clip(0, length - 1), weights.astype(np.float32)


def _resize(plane: np.ndarray, row_taps: tuple, column_taps: tuple) -> np.ndarray:
    """(y, x) to (height, width). Few taps and no BLAS: faster than a dense product, and its threads are not woken."""
    for index, weights in (row_taps, column_taps):
        plane = np.ascontiguousarray(np.einsum("ok,okx->ox", weights, plane[index]).T)  # rows are gathered faster
    return plane


def _body_box(volume: Volume) -> tuple[int, int, int, int]:
    """In-plane bounding box (top, bottom, left, right) of the body, in pixels.

    On a grid of about 4 mm, whatever is denser than lung and at least 20 mm wide in both directions: an erosion drops
    the thin shells of table and mattress. 10 mm of air stay around it; a volume without such a thing is not cropped.
    """
    depth, rows, columns = volume.hu.shape
    step_y, step_x = (max(1, round(4 / spacing)) for spacing in volume.spacing[1:])
    coarse = volume.hu[:: -(-depth // 64), ::step_y, ::step_x] > BODY_LIMIT_HU
    outside = torch.from_numpy(~coarse).float()
    body = (F.max_pool2d(outside[:, None], kernel_size=5, stride=1, padding=2) == 0).any(0)[0].numpy()
    if not body.any():
        return 0, rows, 0, columns
    box = []
    for axis, step, spacing, length in ((1, step_y, volume.spacing[1], rows), (0, step_x, volume.spacing[2], columns)):
        where = np.flatnonzero(body.any(axis))
        margin = 2 * step + math.ceil(10 / spacing)
        box += [max(0, where[0] * step - margin), min(length, where[-1] * step + 1 + margin)]
    return tuple(box)


def _pad_and_stack(rows: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Rows of (S_i, ...) arrays to (V, S, ...) tensors, zero beyond S_i; a single row is not copied."""
    longest = max(len(row["slice_mask"]) for row in rows)
    scale = torch.from_numpy(np.stack([row.pop("volume_scale") for row in rows]))
    stacked = {}
    for name in list(rows[0]):
        if len(rows) == 1:
            stacked[name] = torch.from_numpy(rows[0][name])[None]
            continue
        batch = np.zeros((len(rows), longest, *rows[0][name].shape[1:]), dtype=rows[0][name].dtype)
        for index, row in enumerate(rows):
            values = row.pop(name)
            batch[index, : len(values)] = values
        stacked[name] = torch.from_numpy(batch)
    return stacked | {"volume_scale": scale}


def _load(image, intensity: str, reorient: bool, **kwargs) -> Volume:
    return image if _is_volume(image) else load_volume(image, intensity=intensity, reorient=reorient)


def _is_row(image) -> bool:
    # `load_volume` takes mappings too, of a path and bytes.
    return isinstance(image, Mapping) and not image.keys().isdisjoint(CTMoEImageProcessor.model_input_names)


def _checked_row(row: Mapping, size: SizeDict, patch_size: int, **kwargs) -> dict[str, np.ndarray]:
    """What `process_volume` gave, in a new dict, if it is whole and its slices are of the size that is asked for."""
    remedy = "Pass what process_volume gives with the same settings"
    names = CTMoEImageProcessor.model_input_names
    missing = [name for name in names if name not in row]
    if missing:
        found = ", ".join(name for name in names if name in row)
        raise VolumeError("images", f"a processed scan with {found} and without {', '.join(missing)}", remedy)
    height, width = size["height"], size["width"]
    depth = max([1, *getattr(row["pixel_values"], "shape", ())[:1]])
    expected = {
        "pixel_values": (np.float32, (depth, 3, height, width)),
        "slice_mask": (np.bool, (depth,)),
        "slice_positions": (np.int32, (depth,)),
        "patch_mask": (np.bool, (depth, height // patch_size, width // patch_size)),
        "volume_scale": (np.float32, (2,)),
    }
    for name, (dtype, shape) in expected.items():
        values = row[name]
        if not isinstance(values, np.ndarray) or values.dtype != dtype or values.shape != shape:
            is_array = hasattr(values, "dtype") and hasattr(values, "shape")
            found = f"{values.dtype} {tuple(values.shape)}" if is_array else type(values).__name__
            wanted = f"{np.dtype(dtype)} {shape}"
            raise VolumeError(
                "images", f"a processed scan whose {name} is {found}, where an array {wanted} is expected", remedy
            )
    return {name: row[name] for name in expected}


def _is_volume(image) -> bool:
    # By its fields and not by its class: as remote code, this file and the processor's each import their own `Volume`.
    return all(hasattr(image, field) for field in ("hu", "spacing", "affine", "meta"))


def _leaves(images) -> Iterator:
    if isinstance(images, (list, tuple)):
        for image in images:
            yield from _leaves(image)
    else:
        yield images


def _map_leaves(function: Callable, images):
    if isinstance(images, (list, tuple)):
        return [_map_leaves(function, image) for image in images]
    return function(images)


def _in_threads(function: Callable, items: list) -> list:
    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(len(items), os.cpu_count() or 1, MAX_THREADS)) as pool:
        return list(pool.map(function, items))


def _hu_windows(windows: str | tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
    return tuple(WINDOW_PRESETS[windows].values()) if isinstance(windows, str) else windows


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _checked_windows(windows) -> str | tuple[tuple[float, float], ...]:
    remedy = f"Choose {', '.join(WINDOW_PRESETS)}, or pass three (centre, width) in HU, width above 0"
    if isinstance(windows, str):
        if windows not in WINDOW_PRESETS:
            raise ModelError("windows", f"no preset is called {windows!r}", remedy)
        return windows
    is_triple = isinstance(windows, (list, tuple)) and len(windows) == 3
    if not is_triple or not all(isinstance(window, (list, tuple)) and len(window) == 2 for window in windows):
        raise ModelError("windows", f"{windows!r} is not three pairs of numbers", remedy)
    if not all(_is_number(centre) and _is_number(width) and width > 0 for centre, width in windows):
        raise ModelError("windows", f"{windows!r} holds a window that cannot be", remedy)
    return tuple((float(centre), float(width)) for centre, width in windows)


def _checked_reduction(reduction) -> str | tuple[str, ...]:
    names = [reduction] * 3 if isinstance(reduction, str) else reduction
    is_triple = isinstance(names, (list, tuple)) and len(names) == 3
    if not is_triple or not all(name in SLAB_REDUCTIONS for name in names):
        raise ModelError(
            "slab_reduction",
            f"{reduction!r} is unknown",
            f"Choose one of {', '.join(SLAB_REDUCTIONS)}, or a list of three, one per channel",
        )
    return reduction if isinstance(reduction, str) else tuple(reduction)


def _per_channel(name: str, values, positive: bool = False) -> tuple[float, ...]:
    values = [values] * 3 if _is_number(values) else values
    is_triple = isinstance(values, (list, tuple)) and len(values) == 3
    if not is_triple or not all(_is_number(value) and (value > 0 or not positive) for value in values):
        kind = "positive numbers" if positive else "numbers"
        raise ModelError(name, f"{values!r} is not three {kind}", "Pass one per channel, as the base model has them")
    return tuple(float(value) for value in values)


def _square_size(size, patch_size: int) -> SizeDict:
    """Accepts n, {"height": n, "width": n} and the base's {"shortest_edge": n}: of a square these are the same."""
    edges = set(dict(size).values()) if isinstance(size, (dict, SizeDict)) else {size}
    edge = edges.pop() if len(edges) == 1 else None
    if type(edge) is not int or edge < 1:
        raise ModelError("size", f"{size!r} is not one square", 'Pass {"height": n, "width": n}')
    if edge % patch_size:
        raise ModelError(
            "size",
            f"{edge} pixels are not a whole number of patches of {patch_size}",
            "Pass the base model's image size and patch size",
        )
    return SizeDict(height=edge, width=edge)


__all__ = ["CTMoEImageProcessor"]
