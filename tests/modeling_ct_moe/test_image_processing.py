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
"""The image processor against a slow reference, hand-computed cases, other libraries and re-stored scans."""

import json
import math
import tracemalloc
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from torch.nn import functional as F

from ct_moe.errors_ct_moe import ModelError, VolumeError
from ct_moe.image_processing_ct_moe import WINDOW_PRESETS, CTMoEImageProcessor
from ct_moe.volume_io_ct_moe import Volume, load_volume


SMALL = {"size": 28, "patch_size": 14}
PLAIN = {"image_mean": 0.0, "image_std": 1.0}  # pixel values are then the windows' own [0, 1]
OUTPUTS = {
    "pixel_values": torch.float32,
    "slice_mask": torch.bool,
    "slice_positions": torch.int32,
    "patch_mask": torch.bool,
    "volume_scale": torch.float32,
}


def a_volume(depth=12, rows=40, columns=40, spacing=(5.0, 1.0, 1.0), seed=0) -> Volume:
    """Smooth enough to be anatomy-like, rough enough to show every misplaced weight."""
    rng = np.random.default_rng(seed)
    hu = rng.normal(0, 200, (depth, rows, columns)) + rng.normal(-200, 500, (depth, 1, columns))
    return Volume(hu.clip(-1024, 3071).astype(np.int16), spacing)


def hounsfield(processor: CTMoEImageProcessor, volume: Volume, channel=0, **kwargs) -> np.ndarray:
    """The HU that a channel holds, (S, height, width), read back through a window that clips nothing."""
    outputs = processor(volume, windows=[(0.0, 16384.0)] * 3, **PLAIN, **kwargs)
    return outputs["pixel_values"][0, :, channel].double().numpy() * 16384 - 8192


# ---- a slow reference, written from the design: double precision, loops, no matrices


def reference_axis(length, spacing, field, size):
    """For every output pixel, its (source index or None for background, weight) pairs."""
    start, cell = (length * spacing - field) / 2, field / size
    reach, rows = math.ceil(field / spacing), []
    for target in range(size):
        centre = start + (target + 0.5) * cell
        pairs = []
        for index in range(-reach, length + reach):
            inside = min((index + 1) * spacing, start + field) - max(index * spacing, start)
            weight = (1 - abs(centre - (index + 0.5) * spacing) / max(cell, spacing)) * inside
            if inside > 0 and weight > 0:
                pairs.append((index if 0 <= index < length else None, weight))
        total = sum(weight for _, weight in pairs)
        rows.append([(index, weight / total) for index, weight in pairs])
    return rows


def reference_slabs(hu, spacing_z, num_slices, reduction):
    thickness = len(hu) * spacing_z / num_slices
    for slab in range(num_slices):
        low, high = slab * thickness, (slab + 1) * thickness
        overlaps = [min(high, (z + 1) * spacing_z) - max(low, z * spacing_z) for z in range(len(hu))]
        inside = [z for z in range(len(hu)) if overlaps[z] > 1e-9]
        if reduction == "mean":
            yield sum(overlaps[z] / thickness * hu[z].astype(np.float64) for z in inside)
        elif reduction == "max":
            yield np.max([hu[z] for z in inside], axis=0).astype(np.float64)
        else:
            yield hu[min(inside, key=lambda z: (round(abs((z + 0.5) * spacing_z - (low + high) / 2), 9), -z))] * 1.0


def reference_hounsfield(hu, spacing, size, num_slices, reduction="mean"):
    field = max(hu.shape[1] * spacing[1], hu.shape[2] * spacing[2])
    row_pairs = reference_axis(hu.shape[1], spacing[1], field, size)
    column_pairs = reference_axis(hu.shape[2], spacing[2], field, size)
    slices = []
    for plane in reference_slabs(hu, spacing[0], num_slices, reduction):
        air = np.full(plane.shape[1], -1024.0)
        tall = [sum(weight * (air if y is None else plane[y]) for y, weight in pairs) for pairs in row_pairs]
        slices.append(
            [
                [sum(weight * (-1024.0 if x is None else line[x]) for x, weight in pairs) for pairs in column_pairs]
                for line in tall
            ]
        )
    return np.array(slices)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(1, 40)),
    spacing=st.tuples(st.floats(0.4, 8), st.floats(0.3, 4), st.floats(0.3, 4)),
    num_slices=st.integers(1, 9),
    reduction=st.sampled_from(["mean", "max", "nearest"]),
    dtype=st.sampled_from([np.int16, np.float32]),
)
def test_agrees_with_the_slow_reference(shape, spacing, num_slices, reduction, dtype):
    volume = a_volume(*shape, spacing)
    volume = Volume(volume.hu.astype(dtype), spacing)
    num_slices = min(num_slices, shape[0])
    processor = CTMoEImageProcessor(size=14, patch_size=7, num_slices=num_slices, slab_reduction=reduction)
    expected = reference_hounsfield(volume.hu, spacing, 14, num_slices, reduction)
    np.testing.assert_allclose(hounsfield(processor, volume), expected, atol=0.02)

    outputs = processor(volume)
    held = expected.reshape(num_slices, 2, 7, 2, 7).max((2, 4))
    decided = np.abs(held + 900) > 0.1
    np.testing.assert_array_equal(outputs["patch_mask"][0].numpy()[decided], held[decided] > -900)
    for channel, (centre, width) in enumerate(WINDOW_PRESETS["chest"].values()):
        mean, std = processor.image_mean[channel], processor.image_std[channel]
        grey = ((expected - (centre - width / 2)) / width).clip(0, 1)
        np.testing.assert_allclose(outputs["pixel_values"][0, :, channel], (grey - mean) / std, atol=1e-3)


# ---- hand-computed cases


def test_slabs_weigh_slices_by_overlap():
    levels = np.array([0, 300, 600], dtype=np.int16)
    volume = Volume(np.broadcast_to(levels[:, None, None], (3, 28, 28)), (2.0, 1.0, 1.0))
    for reduction, expected in {"mean": [100, 500], "max": [300, 600], "nearest": [0, 600]}.items():
        processor = CTMoEImageProcessor(**SMALL, num_slices=2, slab_reduction=reduction)
        values = hounsfield(processor, volume)
        np.testing.assert_allclose(values[:, 14, 14], expected, atol=0.01)
    outputs = CTMoEImageProcessor(**SMALL, num_slices=2)(volume)
    assert outputs["slice_positions"].tolist() == [[0, 3000]]  # slabs of 3 mm, in micrometres
    expected = torch.tensor([[math.log(28 / 400), math.log(3 / 5)]])
    torch.testing.assert_close(outputs["volume_scale"], expected)


def test_windows_are_the_channels():
    volume = Volume(np.full((1, 28, 28), 40, dtype=np.int16), (5.0, 1.0, 1.0))
    values = CTMoEImageProcessor(**SMALL, **PLAIN)(volume)["pixel_values"][0, 0, :, 0, 0]
    # lung -1350..150, soft tissue -160..240, bone -770..1730
    torch.testing.assert_close(values, torch.tensor([1390 / 1500, 0.5, 810 / 2500]))
    clipped = CTMoEImageProcessor(**SMALL, image_mean=0.5, image_std=0.25, windows=[(0, 2), (400, 2), (40, 80)])
    values = clipped(volume)["pixel_values"][0, 0, :, 0, 0]
    torch.testing.assert_close(values, torch.tensor([2.0, -2.0, 0.0]))


def test_each_channel_can_reduce_its_own_way():
    levels = np.array([0, 300, 700], dtype=np.int16)
    volume = Volume(np.broadcast_to(levels[:, None, None], (3, 28, 28)), (2.0, 1.0, 1.0))
    processor = CTMoEImageProcessor(**SMALL, num_slices=1, slab_reduction=["max", "mean", "nearest"])
    for channel, expected in enumerate([700, 1000 / 3, 300]):
        assert hounsfield(processor, volume, channel)[0, 14, 14] == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    ("depth", "spacing", "kwargs", "expected"),
    [
        (60, 5.0, {}, 60),
        (61, 5.0, {}, 61),
        (300, 1.0, {}, 60),
        (301, 1.0, {}, 61),  # a 61st slab, all of them a little thinner
        (300, 1.0 + 1e-7, {}, 60),  # float32 headers do not add a slice
        (400, 1.0, {}, 64),
        (400, 1.0, {"max_slices": 32}, 32),
        (400, 1.0, {"num_slices": 100}, 100),
        (10, 10.0, {}, 10),  # never more than the source has
        (3, 1.0, {"num_slices": 8}, 3),
        (1, 0.5, {}, 1),
        (24, 2.5, {"slab_mm": 10.0}, 6),
    ],
)
def test_number_of_slices(depth, spacing, kwargs, expected):
    volume = Volume(np.zeros((depth, 4, 4), dtype=np.int16), (spacing, 1.0, 1.0))
    outputs = CTMoEImageProcessor(**SMALL, **kwargs)(volume)
    assert outputs["pixel_values"].shape[1] == expected
    thickness = depth * spacing / expected
    assert outputs["slice_positions"][0, -1].item() == round((expected - 1) * thickness * 1000)
    assert outputs["volume_scale"][0, 1].item() == pytest.approx(math.log(thickness / 5), abs=1e-5)


def test_air_patches_are_masked():
    hu = np.full((1, 28, 28), -1000, dtype=np.int16)
    hu[0, 20, 3] = -899  # lower left patch
    hu[0, 3, 20] = -900  # upper right patch: not above the limit
    outputs = CTMoEImageProcessor(**SMALL)(Volume(hu, (5.0, 1.0, 1.0)))
    assert outputs["patch_mask"].tolist() == [[[[False, False], [True, False]]]]


def test_patient_right_is_on_the_left_and_front_on_top():
    hu = np.full((1, 28, 28), -1000, dtype=np.int16)
    hu[0, :14, :14] = 0  # LPS: small x is right, small y is front
    values = hounsfield(CTMoEImageProcessor(**SMALL), Volume(hu, (5.0, 1.0, 1.0)))[0]
    assert values[3, 3] == pytest.approx(0, abs=0.01)
    assert values[3, 24] == values[24, 3] == pytest.approx(-1000, abs=0.01)


# ---- other libraries' resize


@pytest.mark.parametrize("edge", [9, 28, 57, 96])
def test_square_slices_are_resized_as_torch_does(edge):
    volume = a_volume(2, edge, edge)
    expected = F.interpolate(
        torch.from_numpy(volume.hu)[None].double(), size=(28, 28), mode="bilinear", antialias=True
    )[0]
    values = hounsfield(CTMoEImageProcessor(**SMALL), volume)
    np.testing.assert_allclose(values, expected, atol=0.01)


def test_whole_pixels_of_padding_are_resized_as_torch_does():
    volume = a_volume(2, 40, 58)
    padded = F.pad(torch.from_numpy(volume.hu)[None].double(), (0, 0, 9, 9), value=-1024)
    expected = F.interpolate(padded, size=(28, 28), mode="bilinear", antialias=True)[0]
    outputs = CTMoEImageProcessor(**SMALL)
    np.testing.assert_allclose(hounsfield(outputs, volume), expected, atol=0.01)
    assert outputs(volume)["volume_scale"][0, 0].item() == pytest.approx(math.log(58 / 400), abs=1e-5)


def test_anisotropic_pixels_are_enlarged_as_sitk_does():
    volume = a_volume(1, 11, 8, spacing=(5.0, 4.0, 7.0))  # 44 x 56 mm on 28 pixels of 2 mm
    image = sitk.GetImageFromArray(volume.hu[0].astype(np.float64))
    image.SetSpacing((7.0, 4.0))
    image.SetOrigin((3.5, 2.0))
    expected = sitk.GetArrayFromImage(
        sitk.Resample(image, (28, 28), sitk.Transform(), sitk.sitkLinear, (1.0, -5.0), (2.0, 2.0))
    )
    values = hounsfield(CTMoEImageProcessor(**SMALL), volume)[0]
    inner = slice(6, 22), slice(3, 25)  # away from the scan's edge, where sitk extrapolates nothing
    np.testing.assert_allclose(values[inner], expected[inner], atol=0.01)


# ---- the same scan, stored in another way


def restored(volume: Volume, codes: str, dtype, slope: float, intercept: float) -> nib.Nifti1Image:
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine
    image = nib.Nifti1Image(np.ascontiguousarray(volume.hu.transpose(2, 1, 0)), affine)
    image = image.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(codes)))
    stored = nib.Nifti1Image(np.asarray((np.asarray(image.dataobj) - intercept) / slope, dtype), image.affine)
    stored.header.set_slope_inter(slope, intercept)
    return stored


@pytest.mark.parametrize("codes", ["RAS", "LPI", "LAS", "PSR", "SLA"])
@pytest.mark.parametrize(
    ("dtype", "slope", "intercept"),
    [(np.int16, 1, 0), (np.float32, 1, 0), (np.uint16, 1, -1300), (np.float32, 0.5, 7)],
)
def test_restored_scans_give_the_same_input(test_data, tmp_path, codes, dtype, slope, intercept):
    processor = CTMoEImageProcessor(size=112, num_slices=12)
    volume = load_volume(test_data / "totalseg" / "example_ct_sm.nii.gz")
    nib.save(restored(volume, codes, dtype, slope, intercept), tmp_path / "again.nii.gz")
    first, second = processor(volume), processor(str(tmp_path / "again.nii.gz"))
    torch.testing.assert_close(second["pixel_values"], first["pixel_values"], atol=1e-3, rtol=0)
    torch.testing.assert_close(second["volume_scale"], first["volume_scale"], atol=1e-5, rtol=0)
    for name in ("slice_mask", "slice_positions", "patch_mask"):
        assert torch.equal(second[name], first[name])


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 30), st.integers(2, 50), st.integers(2, 50)),
    spacing=st.tuples(st.floats(0.4, 8), st.floats(0.3, 4), st.floats(0.3, 4)),
    order=st.permutations([0, 1, 2]),
    flips=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_strides_do_not_matter(shape, spacing, order, flips):
    volume = a_volume(*shape, spacing)
    flip = tuple(slice(None, None, -1 if flipped else 1) for flipped in flips)
    stored = np.ascontiguousarray(volume.hu[flip].transpose(order))
    view = stored.transpose(np.argsort(order))[flip]
    processor = CTMoEImageProcessor(**SMALL)
    torch.testing.assert_close(
        processor(Volume(view, spacing))["pixel_values"], processor(volume)["pixel_values"], atol=1e-4, rtol=0
    )


def test_rounded_spacings_do_not_matter():
    volume = a_volume(20, 31, 40, spacing=(2.5, 0.9, 0.7))
    again = Volume(volume.hu, tuple(float(np.float32(value) * (1 + 2e-7)) for value in volume.spacing))
    processor = CTMoEImageProcessor(**SMALL)
    torch.testing.assert_close(processor(again)["pixel_values"], processor(volume)["pixel_values"], atol=1e-3, rtol=0)


# ---- images that never were HU


def test_display_images_have_no_windows_and_no_air():
    rng = np.random.default_rng(0)
    volume = Volume(rng.random((6, 20, 20), dtype=np.float32), (1.0, 1.0, 1.0), meta={"intensity": "display"})
    outputs = CTMoEImageProcessor(**SMALL, **PLAIN, intensity="display")(volume)
    expected = F.interpolate(torch.from_numpy(volume.hu)[None], size=(28, 28), mode="bilinear", antialias=True)[0]
    for channel in range(3):
        torch.testing.assert_close(outputs["pixel_values"][0, :, channel], expected, atol=1e-5, rtol=0)
    assert outputs["patch_mask"].all()
    assert outputs["slice_positions"].tolist() == [[0, 5000, 10000, 15000, 20000, 25000]]
    assert outputs["volume_scale"].tolist() == [[0, 0]]
    outputs = CTMoEImageProcessor(**SMALL, intensity="display", max_slices=4, nominal_mm=2.5)(volume)
    assert outputs["slice_positions"].tolist() == [[0, 2500, 5000, 7500]]


def test_display_refuses_what_is_not_scaled():
    volume = Volume(np.full((2, 20, 20), 40, dtype=np.int16), (1.0, 1.0, 1.0))
    with pytest.raises(VolumeError, match=r"values from 40 to 40, where \[0, 1\] is expected"):
        CTMoEImageProcessor(intensity="display")(volume)


@pytest.mark.parametrize(("loaded", "wanted"), [("display", "hu"), ("hu", "display")])
def test_a_volume_loaded_for_the_other_intensity_is_refused(loaded, wanted):
    volume = Volume(np.zeros((2, 20, 20), dtype=np.float32), (1.0, 1.0, 1.0), meta={"intensity": loaded})
    with pytest.raises(VolumeError, match=f'loaded with intensity="{loaded}"'):
        CTMoEImageProcessor(intensity=wanted)(volume)


# ---- body crop


def test_crop_leaves_the_table_out_and_says_the_new_field():
    hu = np.full((4, 200, 200), -1000, dtype=np.int16)
    hu[:, 60:120, 40:140] = 30  # a body of 120 x 200 mm
    hu[:, 150:153, 10:190] = 200  # a table top of 6 mm
    volume = Volume(hu, (5.0, 2.0, 2.0))
    processor = CTMoEImageProcessor(**SMALL, crop_body=True)
    field = processor(volume)["volume_scale"][0, 0].exp().item() * 400
    assert 200 <= field <= 260
    values = hounsfield(processor, volume)[0]
    assert values[14, 14] == pytest.approx(30, abs=0.01)  # still centred on the body
    assert values[26].max() < -900
    outside = CTMoEImageProcessor(**SMALL)(volume)
    assert outside["volume_scale"][0, 0].exp().item() * 400 == pytest.approx(400)


def test_crop_of_air_keeps_the_whole_field():
    volume = Volume(np.full((4, 50, 50), -1000, dtype=np.int16), (5.0, 2.0, 2.0))
    outputs = CTMoEImageProcessor(**SMALL, crop_body=True)(volume)
    assert outputs["volume_scale"][0, 0].exp().item() * 400 == pytest.approx(100)
    assert not outputs["patch_mask"].any()


# ---- batches, paths, nesting


def test_rows_of_a_batch_are_those_of_single_volumes():
    volumes = [a_volume(3, 40, 40, seed=1), a_volume(9, 30, 50, seed=2), a_volume(1, 20, 20, seed=3)]
    processor = CTMoEImageProcessor(**SMALL)
    batch = processor([volumes[0], [volumes[1:]]])
    assert {name: value.dtype for name, value in batch.items()} == OUTPUTS
    assert list(OUTPUTS) == processor.model_input_names
    assert batch["slice_mask"].sum(1).tolist() == [3, 9, 1]
    for row, volume in enumerate(volumes):
        single, depth = processor(volume), len(volume.hu)
        for name, values in single.items():
            stored = batch[name][row]
            assert torch.equal(stored[: len(values[0])], values[0])
            if name != "volume_scale":
                assert not stored[depth:].any()


def test_paths_are_loaded_and_nesting_is_kept(test_data):
    path = str(test_data / "totalseg" / "example_ct_sm.nii.gz")
    processor = CTMoEImageProcessor(**SMALL)
    volume = load_volume(path)
    fetched = processor.fetch_images([path, [volume, path]])
    assert [type(item) for item in fetched] == [Volume, list]
    assert fetched[1][0] is volume
    assert processor.fetch_images(volume) is volume
    assert isinstance(processor.fetch_images(path), Volume)
    batch = processor([path, fetched[1][1]])
    assert torch.equal(batch["pixel_values"][0], batch["pixel_values"][1])


def test_a_volume_of_a_remote_copy_of_the_code_is_a_volume():
    volume = a_volume()
    twin = SimpleNamespace(hu=volume.hu, spacing=volume.spacing, affine=volume.affine, meta=volume.meta)
    processor = CTMoEImageProcessor(**SMALL)
    assert processor.fetch_images([twin])[0] is twin
    assert torch.equal(processor(twin)["pixel_values"], processor(volume)["pixel_values"])


def test_numpy_outputs():
    outputs = CTMoEImageProcessor(**SMALL)(a_volume(), return_tensors="np")
    assert all(isinstance(value, np.ndarray) for value in outputs.values())


def test_neither_autocast_nor_matmul_precision_touches_the_values():
    processor, volume = CTMoEImageProcessor(**SMALL), a_volume()
    expected = processor(volume)["pixel_values"]
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(processor(volume)["pixel_values"], expected)
    finally:
        torch.set_float32_matmul_precision(precision)


def test_no_float_copy_of_the_volume():
    volume = Volume(np.zeros((240, 256, 256), dtype=np.int16)[:, ::-1, ::-1], (1.0, 1.0, 1.0))  # 31 MB
    processor = CTMoEImageProcessor(size=56, num_slices=24)
    processor(volume)
    tracemalloc.start()
    outputs = processor(volume)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak - outputs["pixel_values"].nbytes < 4e6


# ---- settings


def test_settings_survive_saving(tmp_path):
    kwargs = {
        "size": {"height": 56, "width": 56},
        "patch_size": 7,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "slab_mm": 2.5,
        "max_slices": 12,
        "num_slices": 6,
        "slab_reduction": ["mean", "max", "nearest"],
        "windows": [[-600, 1500], [40, 400], [40.5, 80]],
        "intensity": "hu",
        "reorient": False,
        "nominal_mm": 3.0,
        "crop_body": True,
    }
    processor = CTMoEImageProcessor(**kwargs)
    processor.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert {name: stored[name] for name in kwargs} == kwargs
    assert stored["auto_map"] == {"AutoImageProcessor": "image_processing_ct_moe.CTMoEImageProcessor"}
    assert (tmp_path / "image_processing_ct_moe.py").is_file()
    assert (tmp_path / "volume_io_ct_moe.py").is_file()
    again = CTMoEImageProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == processor.to_dict()
    assert CTMoEImageProcessor(**processor.to_dict()).to_dict() == processor.to_dict()
    assert CTMoEImageProcessor.from_pretrained(tmp_path, slab_mm=4.0).slab_mm == 4.0


def test_overrides_last_for_one_call():
    processor, volume = CTMoEImageProcessor(**SMALL, num_slices=3), a_volume()
    before = processor.to_dict()
    assert processor(volume, num_slices=5, windows="wide", size=56)["pixel_values"].shape == (1, 5, 3, 56, 56)
    assert processor(volume, num_slices=None)["pixel_values"].shape[1] == 12
    assert processor.to_dict() == before
    assert processor(volume)["pixel_values"].shape == (1, 3, 3, 28, 28)


def test_the_base_size_may_be_its_shortest_edge():
    processor = CTMoEImageProcessor(size={"shortest_edge": 336})
    assert processor.size == {"height": 336, "width": 336}
    assert processor.grid_size == (24, 24)


@pytest.mark.parametrize(
    "setting",
    [
        {"windows": "liver"},
        {"windows": [(40, 400)]},
        {"windows": [(40, 400), (40, 400), (40, 0)]},
        {"windows": [(40, 400), (40, 400), (40, 80, 1)]},
        {"windows": [(40, 400), (40, 400), (math.nan, 80)]},
        {"windows": 5},
        {"slab_mm": 0},
        {"slab_mm": "5"},
        {"slab_mm": math.inf},
        {"max_slices": 0},
        {"max_slices": 2.5},
        {"num_slices": -1},
        {"num_slices": True},
        {"slab_reduction": "median"},
        {"slab_reduction": ["mean", "max"]},
        {"slab_reduction": 3},
        {"intensity": "HU"},
        {"intensity": "display", "crop_body": True},
        {"reorient": "yes"},
        {"crop_body": 1},
        {"nominal_mm": -5},
        {"size": {"height": 336, "width": 224}},
        {"size": {"height": 330, "width": 330}},
        {"size": 0},
        {"size": "large"},
        {"patch_size": 0},
        {"image_mean": [0.5, 0.5]},
        {"image_mean": "clip"},
        {"image_std": [0.5, 0.5, 0.0]},
        {"do_resize": False},
        {"resample": 3},
    ],
)
def test_a_bad_setting_is_refused_when_it_is_set(setting):
    with pytest.raises(ModelError) as constructed:
        CTMoEImageProcessor(**setting)
    assert list(setting)[-1] in str(constructed.value)
    with pytest.raises(ModelError):
        CTMoEImageProcessor()(a_volume(), **setting)


def test_nothing_to_process_is_an_error():
    with pytest.raises(VolumeError, match="an empty list"):
        CTMoEImageProcessor()([[], []])


def test_captions_name_window_and_reduction():
    assert CTMoEImageProcessor().channel_names[1] == "soft tissue C 40 W 400 HU, mean"
    free = CTMoEImageProcessor(windows=[(0, 1), (1, 2), (2, 3)], slab_reduction=["mean", "max", "nearest"])
    assert free.channel_names[1] == "window C 1 W 2 HU, max"


# ---- scans that are processed already


def three_volumes() -> list[Volume]:
    return [a_volume(3, 40, 40, seed=1), a_volume(9, 30, 50, seed=2), a_volume(1, 20, 20, seed=3)]


def assert_same(first, second):
    assert list(first) == list(second) == list(OUTPUTS)
    for name in OUTPUTS:
        assert first[name].dtype == second[name].dtype
        assert np.array_equal(np.asarray(first[name]), np.asarray(second[name]))


def test_a_row_is_what_a_batch_of_one_holds():
    processor, volume = CTMoEImageProcessor(**SMALL), a_volume()
    for kwargs in ({}, {"num_slices": 5, "windows": "wide", "size": 56}):
        row = processor.process_volume(volume, **kwargs)
        assert all(isinstance(values, np.ndarray) for values in row.values())
        outputs = processor(volume, return_tensors="np", **kwargs)
        assert_same(row, {name: values[0] for name, values in outputs.items()})
    assert processor.num_slices is None


@pytest.mark.parametrize("kept", [(0,), (1,), (0, 2), (0, 1, 2)])
def test_processed_scans_give_the_batch_of_their_volumes(kept):
    processor, volumes = CTMoEImageProcessor(**SMALL), three_volumes()
    images = [processor.process_volume(volume) if i in kept else volume for i, volume in enumerate(volumes)]
    assert_same(processor([images[0], [images[1:]]]), processor(volumes))
    assert_same(processor(images[kept[0]]), processor(volumes[kept[0]]))


def test_a_processed_scan_is_not_touched():
    processor, volumes = CTMoEImageProcessor(**SMALL), three_volumes()
    rows = [processor.process_volume(volume) for volume in volumes]
    copies = [{name: values.copy() for name, values in row.items()} for row in rows]
    for row in rows:
        for values in row.values():
            values.flags.writeable = False  # as from a file that is mapped into memory
    for batch in (processor(rows), processor(rows[0]), processor([rows[1], rows[1]])):
        for values in batch.values():
            values.zero_()
    for row, copy in zip(rows, copies):
        assert_same(row, copy)
    assert processor.fetch_images([rows[0], volumes[0]]) == [rows[0], volumes[0]]


def test_a_series_is_one_scan_and_stored_scans_may_be_mappings(test_data):
    processor = CTMoEImageProcessor(**SMALL)
    path = test_data / "totalseg" / "example_ct_sm.nii.gz"
    expected = processor.process_volume(str(path))
    for stored in ({"path": str(path), "bytes": None}, {"path": None, "bytes": path.read_bytes()}):
        assert_same(processor.process_volume(stored), expected)
        assert_same(processor([stored, stored]), processor([str(path), expected]))
    folder = test_data / "ibsi" / "STS_002_CT"
    files = sorted(path for path in folder.rglob("*") if path.suffix == ".dcm")
    assert_same(processor.process_volume(files), processor.process_volume(folder))


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (
            {"pixel_values": None},
            "with slice_mask, slice_positions, patch_mask, volume_scale and without pixel_values",
        ),
        ({"patch_mask": None, "volume_scale": None}, "and without patch_mask, volume_scale"),
        (
            {"pixel_values": np.zeros((3, 3, 56, 56), np.float32)},
            r"float32 \(3, 3, 56, 56\), .* float32 \(3, 3, 28, 28",
        ),
        ({"pixel_values": np.zeros((1, 3, 3, 28, 28), np.float32)}, r"pixel_values is float32 \(1, 3, 3, 28, 28\)"),
        ({"pixel_values": np.zeros((3, 3, 28, 28), np.float16)}, "pixel_values is float16"),
        ({"pixel_values": torch.zeros(3, 3, 28, 28)}, r"pixel_values is torch.float32 \(3, 3, 28, 28\)"),
        ({"pixel_values": [[0.0]]}, "pixel_values is list"),
        ({"pixel_values": np.float32(0)}, r"pixel_values is float32 \(\)"),
        ({"pixel_values": np.zeros((0, 3, 28, 28), np.float32)}, r"pixel_values is float32 \(0, 3, 28, 28\)"),
        ({"slice_mask": np.ones(4, bool)}, r"slice_mask is bool \(4,\), where an array bool \(3,\) is expected"),
        ({"slice_positions": np.zeros(3)}, "slice_positions is float64"),
        ({"patch_mask": np.ones((3, 4, 4), bool)}, r"patch_mask is bool \(3, 4, 4\), where an array bool \(3, 2, 2\)"),
        ({"volume_scale": np.zeros((1, 2), np.float32)}, r"volume_scale is float32 \(1, 2\)"),
    ],
)
def test_a_processed_scan_that_does_not_fit_is_refused(change, finding):
    processor = CTMoEImageProcessor(**SMALL)
    row = processor.process_volume(three_volumes()[0]) | change
    row = {name: values for name, values in row.items() if values is not None}
    for images in (row, [a_volume(), row]):
        with pytest.raises(VolumeError, match=finding):
            processor(images)


def test_a_processed_scan_is_refused_under_another_size():
    row = CTMoEImageProcessor(**SMALL).process_volume(a_volume())
    for kwargs in ({"size": 56}, {"patch_size": 7}):
        with pytest.raises(VolumeError, match="process_volume gives with the same settings"):
            CTMoEImageProcessor(**SMALL)(row, **kwargs)
        with pytest.raises(VolumeError):
            CTMoEImageProcessor(**{**SMALL, **kwargs})(row)


def test_a_mapping_that_is_no_scan_is_refused():
    with pytest.raises(VolumeError, match="neither path nor bytes"):
        CTMoEImageProcessor()({"labels": 1})


@pytest.mark.parametrize("setting", [{"windows": "liver"}, {"do_resize": False}, {"return_tensors": "pt"}])
def test_a_bad_setting_of_one_row_is_refused(setting):
    with pytest.raises(ModelError, match=next(iter(setting))):
        CTMoEImageProcessor().process_volume(a_volume(), **setting)
