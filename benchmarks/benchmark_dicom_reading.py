"""Reads a DICOM series with `load_volume` and with SimpleITK, side by side, and prints the ratios.

    python benchmarks/benchmark_dicom_reading.py --slices 300 --repeats 7

Two series are made, one uncompressed and one in lossless JPEG 2000: a body in air, with a scanner's noise, 512 x 512,
12 bits, under file names that say nothing about the order. Both readers find, sort and decode the folder in the same
process, by turns, with the files in the page cache; imports are left out. A ratio above 1 means that `load_volume` is
faster. Run it on an idle machine: on a busy one the threads of either have nothing to run on.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from imagecodecs import jpeg2k_encode
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEG2000Lossless, generate_uid
from tqdm import tqdm

from ct_moe import load_volume


SIZE = 512


def body_slice(rng: np.random.Generator, z: float) -> np.ndarray:
    """Stored values (HU + 1024) of a round body with two lungs and a spine, z from 0 to 1."""
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    hu = np.full((SIZE, SIZE), -1000.0)
    hu[(x / 0.8) ** 2 + (y / 0.6) ** 2 < 1] = 40
    for side in (-0.35, 0.35):
        hu[((x - side) / 0.25) ** 2 + (y / (0.2 + 0.2 * z)) ** 2 < 1] = -850
    hu[x**2 + (y - 0.4) ** 2 < 0.01] = 600
    return np.clip(hu + rng.normal(0, 12, hu.shape) + 1024, 0, 4095).astype(np.uint16)


def write_series(folder: Path, num_slices: int, compressed: bool) -> None:
    """Writes slices 1 mm apart, each with the attributes that a CT image has to have."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    uids = {name: generate_uid() for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")}
    for number, name in enumerate(tqdm(rng.permutation(num_slices), desc=folder.name)):
        slice_ = Dataset()
        slice_.file_meta = FileMetaDataset()
        slice_.file_meta.TransferSyntaxUID = JPEG2000Lossless if compressed else ExplicitVRLittleEndian
        slice_.SOPClassUID = CTImageStorage
        slice_.SOPInstanceUID = generate_uid()
        for keyword, uid in uids.items():
            setattr(slice_, keyword, uid)
        slice_.Modality = "CT"
        slice_.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        slice_.PatientName = slice_.PatientID = "phantom"
        slice_.SeriesNumber, slice_.InstanceNumber, slice_.AcquisitionNumber = 2, number + 1, 1
        slice_.SliceThickness = 1
        slice_.ImagePositionPatient = [-200, -200, number]
        slice_.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        slice_.PixelSpacing = [400 / SIZE, 400 / SIZE]
        slice_.SamplesPerPixel, slice_.PhotometricInterpretation = 1, "MONOCHROME2"
        slice_.Rows = slice_.Columns = SIZE
        slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit, slice_.PixelRepresentation = 16, 12, 11, 0
        slice_.RescaleIntercept, slice_.RescaleSlope, slice_.RescaleType = -1024, 1, "HU"
        pixels = body_slice(rng, number / num_slices)
        if compressed:
            code = jpeg2k_encode(pixels, level=0, codecformat="j2k", bitspersample=12)
            slice_.PixelData = encapsulate([code])
            slice_["PixelData"].VR = "OB"
        else:
            slice_.PixelData = pixels.tobytes()
            slice_["PixelData"].VR = "OW"
        slice_.save_as(folder / f"IM{name:06d}", enforce_file_format=True)


def with_simpleitk(folder: Path) -> sitk.Image:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


def seconds(read, folder: Path) -> float:
    start = time.perf_counter()
    read(folder)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        for compressed in (False, True):
            folder = Path(root, "jpeg2000" if compressed else "uncompressed")
            write_series(folder, arguments.slices, compressed)
            same = np.array_equal(load_volume(folder).hu, sitk.GetArrayFromImage(with_simpleitk(folder)))
            pairs = [(seconds(load_volume, folder), seconds(with_simpleitk, folder)) for _ in range(arguments.repeats)]
            ours, theirs = np.array(pairs).T
            print(
                f"{folder.name}, {arguments.slices} slices, {'same' if same else 'DIFFERENT'} voxels: "
                f"load_volume median {np.median(ours):.3f} s (best {ours.min():.3f}), "
                f"SimpleITK median {np.median(theirs):.3f} s (best {theirs.min():.3f}), "
                f"ratio of medians {np.median(theirs) / np.median(ours):.2f}, of bests {theirs.min() / ours.min():.2f}"
            )


if __name__ == "__main__":
    main()
