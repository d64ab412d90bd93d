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
"""Phantoms on disk come back bit by bit and where they were, through this package's readers and through ITK."""

import itertools
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from ct_moe import CTMoEError, DataError, load_volume
from ct_moe.trainers.phantoms.anatomy import draw_phantom
from ct_moe.trainers.phantoms.files import ORIENTATIONS, plane_of, write_dicom, write_nifti
from ct_moe.trainers.phantoms.labels import PHASES, Phantom


EVERY_ORIENTATION = [
    "".join(letters) for axes in itertools.permutations(("RL", "AP", "SI")) for letters in itertools.product(*axes)
]


def small_phantom(shape=(4, 5, 6), spacing=(3.0, 0.812345, 0.912346), phase="arterial", seed=0) -> Phantom:
    """Voxels of the whole range, no two alike in a slice, so that nothing can change places unseen."""
    rng = np.random.default_rng(seed)
    hu = rng.permutation(4096)[: np.prod(shape)].reshape(shape) - 1024
    hu.flat[:3] = -1024, 3071, 0
    return Phantom(hu.astype(np.int16), spacing, phase, [], {}, 0.4, False, {})


def steps():
    """Spacings as phantoms have them: up to six decimals."""
    return st.integers(400_000, 6_000_000).map(lambda step: step / 1e6)


sizes = st.tuples(*[st.integers(2, 7)] * 3)
spacings = st.tuples(steps(), steps(), steps())


def corner(phantom: Phantom) -> list[float]:
    """LPS mm of the first voxel, (x, y, z): the scan is centred on the origin."""
    return [-(n - 1) / 2 * s for n, s in zip(phantom.hu.shape, phantom.spacing)][::-1]


def read_with_itk(image: sitk.Image, phantom: Phantom, tolerance: float) -> None:
    image = sitk.DICOMOrient(image, "LPS")
    assert np.array_equal(sitk.GetArrayFromImage(image), phantom.hu)
    assert image.GetSpacing() == pytest.approx(phantom.spacing[::-1], rel=1e-6)
    assert image.GetOrigin() == pytest.approx(corner(phantom), abs=tolerance)
    assert image.GetDirection() == pytest.approx(np.eye(3).ravel(), abs=1e-6)


def read_with_ours(source: Path, phantom: Phantom, orientation: str) -> None:
    # These voxels are no body; whether they could be CT is another test's matter.
    volume = load_volume(source, check="off")
    assert np.array_equal(volume.hu, phantom.hu)
    assert volume.spacing == pytest.approx(phantom.spacing, rel=1e-6)
    assert volume.affine[:3, 3] == pytest.approx(corner(phantom), abs=1e-4)
    assert volume.meta["stored_orientation"] == orientation
    assert not volume.meta["warnings"]
    stored = load_volume(source, check="off", reorient=False)
    assert sorted(stored.hu.shape) == sorted(phantom.hu.shape)


@pytest.mark.parametrize("orientation", EVERY_ORIENTATION)
def test_nifti_comes_back_from_every_orientation(orientation, tmp_path):
    phantom = small_phantom()
    path = write_nifti(phantom, tmp_path / "scan.nii.gz", orientation)
    image = nib.load(path)
    assert "".join(nib.aff2axcodes(image.affine)) == orientation
    assert image.get_data_dtype() == np.int16
    assert image.header.get_xyzt_units()[0] == "mm"
    read_with_ours(path, phantom, orientation)
    read_with_itk(sitk.ReadImage(str(path)), phantom, 1e-4)


@settings(max_examples=40, deadline=None)
@given(shape=sizes, spacing=spacings, orientation=st.sampled_from(EVERY_ORIENTATION))
def test_nifti_comes_back_from_any_grid(tmp_path_factory, shape, spacing, orientation):
    phantom = small_phantom(shape, spacing)
    read_with_ours(
        write_nifti(phantom, tmp_path_factory.mktemp("grid") / "scan.nii", orientation), phantom, orientation
    )


@settings(max_examples=25, deadline=None)
@given(shape=sizes, spacing=spacings, phase=st.sampled_from(PHASES))
def test_dicom_comes_back_from_any_grid(tmp_path_factory, shape, spacing, phase):
    phantom = small_phantom(shape, spacing, phase)
    folder = write_dicom(phantom, tmp_path_factory.mktemp("grid") / "series")
    read_with_ours(folder, phantom, "LPS")
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    assert len(files) == shape[0]
    read_with_itk(sitk.ReadImage(files), phantom, 1e-6)


@pytest.mark.parametrize("orientation", EVERY_ORIENTATION)
def test_planes_are_named_by_the_axis_that_slices_are_stacked_along(orientation, tmp_path):
    image = nib.load(write_nifti(small_phantom(), tmp_path / "scan.nii", orientation))
    stacked = np.abs(image.affine[:3, 2]).argmax()  # the last index: 0 is left-right, 2 is head-feet
    assert plane_of(orientation) == ("sagittal", "coronal", "axial")[stacked]


def test_both_sets_of_orientations_have_every_plane_and_share_none():
    for orientations in ORIENTATIONS.values():
        assert sorted(map(plane_of, orientations)) == ["axial"] * 2 + ["coronal"] * 2 + ["sagittal"] * 2
    assert not set(ORIENTATIONS[False]) & set(ORIENTATIONS[True])


def test_a_drawn_phantom_is_a_plausible_ct_in_both_formats(tmp_path):
    phantom = draw_phantom(0, findings=("effusion",))
    for source in (write_nifti(phantom, tmp_path / "scan.nii.gz", "PSL"), write_dicom(phantom, tmp_path / "series")):
        volume = load_volume(source)  # checks that it could be CT
        assert np.array_equal(volume.hu, phantom.hu)
        assert volume.spacing == pytest.approx(phantom.spacing, rel=1e-6)
        assert not volume.meta["warnings"]


@pytest.mark.parametrize("phase", PHASES)
def test_dicom_is_a_valid_ct_series_of_nobody(phase, tmp_path, monkeypatch):
    monkeypatch.setattr(pydicom.config.settings, "reading_validation_mode", pydicom.config.RAISE)
    phantom = small_phantom(phase=phase)
    folder = write_dicom(phantom, tmp_path / "series", name="7-train-0")
    images = [pydicom.dcmread(path) for path in sorted(folder.iterdir())]
    assert len(images) == phantom.hu.shape[0]
    for number, image in enumerate(images):
        for element in image:
            assert element.value is not NotImplemented  # reads, and so validates, every one
            assert element.VR not in ("DA", "TM", "DT") or not element.value
        assert image.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
        assert image.file_meta.MediaStorageSOPClassUID == image.SOPClassUID == CTImageStorage
        assert image.file_meta.MediaStorageSOPInstanceUID == image.SOPInstanceUID
        # Of types 1 and 2 in the modules of a CT image: there, and those of type 1 not empty.
        for keyword in (
            "PatientBirthDate PatientSex StudyDate StudyTime ReferringPhysicianName StudyID AccessionNumber "
            "SeriesNumber PositionReferenceIndicator Manufacturer KVP AcquisitionNumber InstanceNumber SliceThickness"
        ).split():
            assert keyword in image, keyword
        for keyword in (
            "StudyInstanceUID SeriesInstanceUID FrameOfReferenceUID ImageType PixelSpacing ImagePositionPatient"
        ).split():
            assert image[keyword].value, keyword
        assert str(image.PatientName).startswith("PHANTOM^")
        assert image.PatientID == "PHANTOM-7-train-0"
        assert image.SyntheticData == "YES"
        assert (image.Modality, image.PatientPosition, image.RescaleType) == ("CT", "HFS", "HU")
        assert "CHEST" in image.BodyPartExamined
        assert (image.RescaleSlope, image.RescaleIntercept) == (1, -1024)
        assert (image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation) == (16, 16, 15, 0)
        assert list(image.ImageOrientationPatient) == [1, 0, 0, 0, 1, 0]
        assert [float(step) for step in image.PixelSpacing] == list(phantom.spacing[1:])
        assert image.SliceThickness == image.SpacingBetweenSlices == phantom.spacing[0]
        assert image.InstanceNumber == number + 1
        assert ("ContrastBolusAgent" in image) == (phase != "non-contrast")
        assert np.array_equal(image.pixel_array.astype(int) - 1024, phantom.hu[number])
    assert len({image.SOPInstanceUID for image in images}) == len(images)
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        assert len({image[keyword].value for image in images}) == 1


def test_files_are_the_same_for_the_same_phantom_and_differ_for_others(tmp_path):
    def series(folder, **kwargs):
        name = kwargs.pop("name", "a")
        folder = write_dicom(small_phantom(**kwargs), tmp_path / folder, name=name)
        return [path.read_bytes() for path in sorted(folder.iterdir())]

    def uid(content):
        return {pydicom.dcmread(pydicom.filebase.DicomBytesIO(each)).SeriesInstanceUID for each in content}

    first = series("first")
    assert series("again") == first
    for folder, changes in (("name", {"name": "b"}), ("voxels", {"seed": 1})):
        assert not uid(series(folder, **changes)) & uid(first)
    paths = [write_nifti(small_phantom(), tmp_path / f"{name}.nii.gz", "LAS") for name in "ab"]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_slices_never_join_a_series_that_is_there(tmp_path):
    write_dicom(small_phantom(), tmp_path / "series")
    with pytest.raises(DataError, match=r"series: holds something\. Name a new folder"):
        write_dicom(small_phantom((2, 3, 3)), tmp_path / "series")
    assert len(list((tmp_path / "series").iterdir())) == 4


def test_a_missing_pydicom_is_named(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "pydicom"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(CTMoEError, match=r'^pydicom.*: is not installed\. Run: pip install "ct-moe\[dicom\]"'):
        write_dicom(small_phantom(), tmp_path / "series")
    assert not list(tmp_path.iterdir())
