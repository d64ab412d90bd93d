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
import tracemalloc
import zipfile

import numpy as np
import pytest
from hostile import HOSTILE, SCRIPT, two_gigabyte_header

from ct_moe import VolumeError, load_volume
from ct_moe.hub.app.uploads import UploadLimits, read_upload


def test_a_nifti_file_and_a_zipped_dicom_series_are_read_whatever_they_are_called(test_data, tmp_path):
    nifti, dicom = test_data / "totalseg" / "example_ct_sm.nii.gz", test_data / "totalseg" / "example_ct_dicom"
    (tmp_path / "a.exe").write_bytes(nifti.read_bytes())
    with zipfile.ZipFile(tmp_path / "b.txt", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in dicom.iterdir():
            archive.write(file, file.name)
    for upload, source in (("a.exe", nifti), ("b.txt", dicom)):
        volume, wanted = read_upload(tmp_path / upload), load_volume(source)
        assert np.array_equal(volume.hu, wanted.hu)
        assert volume.spacing == wanted.spacing


@pytest.mark.parametrize("build", HOSTILE, ids=lambda build: build.__name__)
def test_files_that_try_to_harm_are_refused_before_they_take_memory(build, tmp_path):
    path = build(tmp_path)
    tracemalloc.start()
    with pytest.raises(VolumeError, match=HOSTILE[build]) as refused:
        read_upload(path)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert refused.value.subject == "upload"
    assert str(tmp_path) not in str(refused.value)
    assert path.stem not in str(refused.value)
    assert sorted(tmp_path.iterdir()) == [path]


def test_no_name_of_a_file_reaches_the_error(tmp_path):
    path = tmp_path / f"DOE_JOHN{SCRIPT}.nii"
    path.write_bytes(two_gigabyte_header(tmp_path).read_bytes()[:500])
    with pytest.raises(VolumeError) as refused:
        read_upload(path, UploadLimits(ratio=10**9, volume_mb=10**6))
    assert "DOE" not in str(refused.value)
    assert "onerror" not in str(refused.value)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"upload_mb": 0}, "over the limit of 0 MB"),
        ({"volume_mb": 1}, "over the limit of 1 MB"),
        ({"ratio": 1}, "which no scan does"),
    ],
    ids=str,
)
def test_limits_are_settings(limits, message, test_data):
    with pytest.raises(VolumeError, match=message):
        read_upload(test_data / "totalseg" / "example_ct.nii.gz", UploadLimits(**limits))


def test_what_the_loader_refuses_is_said_as_the_loader_says_it(test_data):
    with pytest.raises(VolumeError, match=r"upload: .*CT"):
        read_upload(test_data / "totalseg" / "example_mr_sm.nii.gz")
