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
"""Version 1 of CT-RATE becomes version 2 once, on phantoms and on a real scan, and never twice."""

import gzip

import nibabel as nib
import numpy as np
import pytest
from published import stored_values, write_csv, write_version_1

from ct_moe import DataError, VolumeError, load_volume
from ct_moe.trainers.data_sets.ct_rate import scan_path
from ct_moe.trainers.data_sets.ct_rate_fix import fix_scan, fix_scans


NAME = "valid_7_a_1.nii.gz"
COLUMNS = ["VolumeName", "RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing"]


@pytest.mark.parametrize("intercept", [-1024.0, -8192.0])
def test_a_real_scan_comes_back_in_hu_with_its_voxel_size(intercept, test_data, tmp_path):
    real = load_volume(test_data / "totalseg" / "example_ct_sm.nii.gz")
    hu = np.clip(real.hu, -1024, 3000)
    write_version_1(tmp_path, NAME, hu, real.spacing, intercept)
    assert fix_scans(tmp_path, "validation", progress=False) == (1, {})
    path = scan_path(tmp_path, NAME)
    fixed = load_volume(path)
    assert np.array_equal(fixed.hu, np.rint(hu))
    assert fixed.spacing == pytest.approx(real.spacing, rel=1e-5)
    assert stored_values(path).dtype == np.int16
    assert not list(path.parent.glob(".part*"))


def test_what_is_there_is_left_alone_and_nothing_is_rescaled_twice(tmp_path):
    hu = np.linspace(-1000, 1500, 8 * 9 * 10).reshape(8, 9, 10).round()
    source = write_version_1(tmp_path, NAME, hu, (2.0, 0.7, 0.7))
    assert fix_scans(tmp_path, "validation", progress=False) == (1, {})
    target = scan_path(tmp_path, NAME)
    before = target.stat().st_mtime_ns
    assert fix_scans(tmp_path, "validation", progress=False) == (0, {})
    assert target.stat().st_mtime_ns == before
    # A scan of version 2 in the folder of version 1, as some downloads have it.
    source.write_bytes(target.read_bytes())
    target.unlink()
    _, failed = fix_scans(tmp_path, "validation", progress=False)
    assert "repaired scan already" in failed[NAME]
    assert not target.exists()


def test_scans_in_hu_or_with_a_rescaling_are_refused(tmp_path):
    hu = np.linspace(-1000, 1500, 8 * 9 * 10).reshape(8, 9, 10).round()
    arguments = (tmp_path / "out.nii.gz", 1.0, -1024.0, (0.7, 0.7, 2.0))
    nib.save(nib.Nifti1Image(hu.astype(np.int16), np.eye(4)), tmp_path / "hu.nii.gz")
    with pytest.raises(VolumeError, match="is in HU already"):
        fix_scan(tmp_path / "hu.nii.gz", *arguments)
    image = nib.Nifti1Image(hu.astype(np.int16), np.eye(4))
    image.header.set_slope_inter(1, -1024)
    nib.save(image, tmp_path / "scaled.nii.gz")
    with pytest.raises(VolumeError, match="has the rescaling 1, -1024 of its own"):
        fix_scan(tmp_path / "scaled.nii.gz", *arguments)
    assert not (tmp_path / "out.nii.gz").exists()


def test_what_cannot_be_repaired_is_listed_and_the_others_go_on(tmp_path):
    hu = np.zeros((4, 5, 6))
    write_version_1(tmp_path, "valid_8_a_1.nii.gz", hu, (2.0, 0.7, 0.7))
    broken = write_version_1(tmp_path, NAME, hu, (2.0, 0.7, 0.7))
    broken.write_bytes(b"no scan")
    rows = [
        ["Doe, Jane", 1, -1024, "[1, 1]", 1],
        [NAME, 1, -1024, "[0.7, 0.7]", 2],
        ["valid_8_a_1.nii.gz", 1, -1024, "[0.7, 0.7]", 2],
    ]
    metadata = tmp_path / "dataset" / "metadata" / "validation_metadata.csv"
    write_csv(metadata, COLUMNS, *rows)
    _, failed = fix_scans(tmp_path, "validation", progress=False)
    assert set(failed) == {"line 2", NAME}
    assert scan_path(tmp_path, "valid_8_a_1.nii.gz").exists()
    image = nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.eye(4))
    image.header["datatype"] = 999  # a type that there is not
    scan_path(tmp_path, "valid_8_a_1.nii.gz").unlink()
    with gzip.open(broken, "wb") as file:
        file.write(image.header.binaryblock + bytes(4 + 240))
    assert fix_scans(tmp_path, "validation", progress=False) == (1, {**failed, NAME: "HeaderDataError"})
    for cells in (("[0.7, 0.7]", "nan"), ("[0.7, 0.7]", ""), ("NaN", "2"), ("0.7", "2"), ("[0.7, -0.7]", "2")):
        write_csv(metadata, COLUMNS, [NAME, 1, -1024, *cells])
        _, failed = fix_scans(tmp_path, "validation", progress=False)
        assert "no slope or voxel size" in failed[NAME]
    with pytest.raises(DataError, match="has no split test"):
        fix_scans(tmp_path, "test")


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        ("[1.0, 0.0, 0.0, 0.0, 1.0, 0.0]", lambda hu: hu),
        ("[-1, 0, 0, 0, -1, 0]", lambda hu: hu[:, ::-1, ::-1]),  # prone
        ("[1, 0, 0, 0, -1, 0]", lambda hu: hu[::-1, ::-1, :]),  # rows from back to front, so slices from head to feet
        ("[0, 1, 0, -1, 0, 0]", lambda hu: hu.transpose(0, 2, 1)[:, :, ::-1]),
    ],
)
def test_rows_and_columns_lie_as_the_metadata_say(orientation, turned, tmp_path):
    hu = np.linspace(-1000, 1500, 8 * 9 * 10).reshape(8, 9, 10).round()
    write_version_1(tmp_path, NAME, hu, (2.0, 0.7, 0.7))
    metadata = tmp_path / "dataset" / "metadata" / "validation_metadata.csv"
    columns = [*COLUMNS, "ImageOrientationPatient"]
    write_csv(metadata, columns, [NAME, 1, -1024, "[0.7, 0.7]", 2, orientation])
    assert fix_scans(tmp_path, "validation", progress=False) == (1, {})
    fixed = load_volume(scan_path(tmp_path, NAME))
    assert np.array_equal(fixed.hu, turned(hu))
    assert fixed.spacing == pytest.approx((2.0, 0.7, 0.7))


@pytest.mark.parametrize(
    ("orientation", "finding"),
    [
        ("[1, 0, 0, 0, 0, -1]", "its slices are not axial"),
        ("[1, 0, 0, 0, 0.8, 0.6]", "its slices are not axial"),
        ("[1, 0, 0, 1, 0, 0]", "is no orientation"),
        ("", "is no orientation"),
    ],
)
def test_scans_that_are_not_axial_are_left_as_they_are(orientation, finding, tmp_path):
    write_version_1(tmp_path, NAME, np.zeros((4, 5, 6)), (2.0, 0.7, 0.7))
    metadata = tmp_path / "dataset" / "metadata" / "validation_metadata.csv"
    columns = [*COLUMNS, "ImageOrientationPatient"]
    write_csv(metadata, columns, [NAME, 1, -1024, "[0.7, 0.7]", 2, orientation])
    written, failed = fix_scans(tmp_path, "validation", progress=False)
    assert written == 0
    assert finding in failed[NAME]
    assert not scan_path(tmp_path, NAME).exists()
