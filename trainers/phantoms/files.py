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
"""Phantoms as files: `write_nifti`, `write_dicom`."""

import hashlib
from pathlib import Path

import nibabel as nib
import numpy as np

from ct_moe import CTMoEError, DataError

from .labels import Phantom


# Axis codes of the stored array, by whether the acquisition is one of the test split alone. The last letter is the
# axis along which the slices are stacked.
ORIENTATIONS = {
    False: ("RAS", "LPS", "ASR", "PSL", "RSA", "LSP"),
    True: ("LAS", "RPS", "PIR", "ASL", "LIA", "RIP"),
}


def plane_of(orientation: str) -> str:
    """Plane of the stored slices."""
    return {"S": "axial", "I": "axial", "R": "sagittal", "L": "sagittal"}.get(orientation[2], "coronal")


def write_nifti(phantom: Phantom, path: str | Path, orientation: str = "RAS") -> Path:
    """Write int16 HU, stored along these axes (nibabel's codes: RAS means right, anterior, superior), compressed."""
    depth, rows, columns = phantom.hu.shape
    spacing = np.array(phantom.spacing)[::-1]
    # (z, y, x) in LPS is (x, y, z) in LPS, whose affine to NIfTI's RAS world flips x and y.
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[:3, 3] = [(columns - 1) / 2 * spacing[0], (rows - 1) / 2 * spacing[1], -(depth - 1) / 2 * spacing[2]]
    image = nib.Nifti1Image(phantom.hu.transpose(2, 1, 0), affine)
    image = image.as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(orientation))
    )
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    return Path(path)


def write_dicom(phantom: Phantom, folder: str | Path, name: str = "phantom") -> Path:
    """Write an axial CT series, a file per slice: 16 bits, explicit VR little endian, intercept -1024.

    Args:
        phantom: what is written.
        folder: made if it is not there; it must be empty, since a slice left over would join the series.
        name: goes into the identifiers, which are the same for the same name and voxels. No date, place or person.

    Raises:
        CTMoEError: pydicom is not installed.
        DataError: `folder` holds something.
    """
    try:
        from pydicom.dataset import FileDataset, FileMetaDataset
        from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
    except ModuleNotFoundError as error:
        raise CTMoEError(error.name, "is not installed", 'Run: pip install "ct-moe[dicom]"') from error

    # Of the voxels as well: the names of two phantoms may be equal, what they are filed under must not be.
    content = hashlib.sha256(np.ascontiguousarray(phantom.hu).data).hexdigest()

    def uid(*parts: object) -> str:
        return generate_uid(entropy_srcs=["ct-moe phantom", name, content, *map(str, parts)])

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise DataError(str(folder), "holds something", "Name a new folder, or empty this one")
    depth, rows, columns = phantom.hu.shape
    step, height, width = phantom.spacing
    for index, plane in enumerate(phantom.hu):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = uid("instance", index)
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.ImplementationClassUID = generate_uid(entropy_srcs=["ct-moe phantom"])
        image = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        image.SOPClassUID, image.SOPInstanceUID = CTImageStorage, uid("instance", index)
        image.StudyInstanceUID, image.SeriesInstanceUID = uid("study"), uid("series")
        image.FrameOfReferenceUID, image.PositionReferenceIndicator = uid("frame"), ""
        image.PatientName, image.PatientID, image.PatientSex = "PHANTOM^SYNTHETIC", f"PHANTOM-{name}", "O"
        image.PatientBirthDate = image.StudyDate = image.StudyTime = image.AccessionNumber = ""
        image.ReferringPhysicianName = image.StudyID = ""
        image.Manufacturer, image.SeriesDescription = "ct-moe phantom", "synthetic chest and upper abdomen"
        image.Modality, image.BodyPartExamined, image.PatientPosition = "CT", "CHESTABDOMEN", "HFS"
        image.ImageType, image.SyntheticData = ["DERIVED", "PRIMARY", "AXIAL"], "YES"
        image.SeriesNumber, image.AcquisitionNumber, image.InstanceNumber = 1, 1, index + 1
        image.KVP = None
        if phantom.phase != "non-contrast":
            image.ContrastBolusAgent = "synthetic"
        # Centred in plane, z from the feet: the affine of `write_nifti`.
        corner = [-(columns - 1) / 2 * width, -(rows - 1) / 2 * height, (index - (depth - 1) / 2) * step]
        # Spacings have 6 decimals, so half of them has 7: exact, and within the 16 characters of the format.
        image.ImagePositionPatient = [f"{value:.7f}" for value in corner]
        image.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        image.PixelSpacing = [f"{height:.6f}", f"{width:.6f}"]
        image.SliceThickness = image.SpacingBetweenSlices = f"{step:.6f}"
        image.Rows, image.Columns = rows, columns
        image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
        image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 16, 15, 0
        image.RescaleIntercept, image.RescaleSlope, image.RescaleType = -1024, 1, "HU"
        image.PixelData = (plane.astype(np.int32) + 1024).astype("<u2").tobytes()
        image.save_as(folder / f"{index:04}.dcm", enforce_file_format=True)
    return folder
