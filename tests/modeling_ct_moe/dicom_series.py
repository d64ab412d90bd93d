"""Made-up DICOM series for tests: one dataset per slice, every attribute open to change."""

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid


SERIES = "1.2.3.4"


def body(shape=(6, 10, 12)) -> np.ndarray:
    """HU (z, y, x) of a lump in air in which no two voxels of a row are alike."""
    hu = np.full(shape, -1000)
    hu[1:-1, 2:-3, 3:-2] = 40
    hu[0, 0, 0] = 900
    return (hu + np.arange(hu.size).reshape(shape) % 11).astype(np.int16)


def slice_dataset(hu: np.ndarray, z: float = 0.0, **changes) -> Dataset:
    """One axial slice, stored as HU + 1024 in 12 unsigned bits; `changes` are attributes by keyword (`None`: none)."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = generate_uid()
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.Modality = "CT"
    dataset.PatientName, dataset.PatientID = "DOE^JANE", "SECRET-77"
    dataset.SeriesInstanceUID = SERIES
    dataset.SeriesNumber, dataset.InstanceNumber = 3, 1
    dataset.SliceThickness = 9
    dataset.ImagePositionPatient = [-20, -30, z]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.PixelSpacing = [0.7, 0.8]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = hu.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = 1, -1024, "HU"
    set_pixels(dataset, (hu + 1024).astype("<u2").tobytes())
    for keyword, value in changes.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    return dataset


def set_pixels(dataset: Dataset, content: bytes) -> None:
    dataset.PixelData = content + b"\0" * (len(content) % 2)
    dataset["PixelData"].VR = "OW"


def compress(dataset: Dataset, code: bytes, syntax: str) -> Dataset:
    dataset.PixelData = encapsulate([code])
    dataset["PixelData"].VR = "OB"
    dataset.file_meta.TransferSyntaxUID = syntax
    return dataset


def series(hu=None, step: float = 2.5, **changes) -> list[Dataset]:
    """Slices from the feet up; a change may be a function of the slice's number."""
    hu = body() if hu is None else hu
    return [
        slice_dataset(
            plane,
            number * step,
            **{keyword: value(number) if callable(value) else value for keyword, value in changes.items()},
        )
        for number, plane in enumerate(hu)
    ]


def write(folder, datasets, names=None):
    """Writes datasets as files, whose names say nothing about their order, and returns the folder."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    names = names or [f"{name:05d}" for name in rng.permutation(len(datasets))]
    for name, dataset in zip(names, datasets):
        little = dataset.file_meta.TransferSyntaxUID != "1.2.840.10008.1.2.2"
        dataset.save_as(folder / name, enforce_file_format=True, little_endian=little if not little else None)
    return folder


def enhanced(hu=None, step: float = 2.5, **changes) -> Dataset:
    """The same as one multi-frame dataset, with its frames stored from the head down."""
    hu = body() if hu is None else hu
    dataset = slice_dataset(hu[0])
    dataset.SOPClassUID = EnhancedCTImageStorage
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope"):
        delattr(dataset, keyword)
    dataset.RescaleIntercept = 77  # at the top it means nothing
    shared, orientation, measures, rescale = Dataset(), Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    measures.PixelSpacing, measures.SliceThickness = [0.7, 0.8], 9
    rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = 1, -1024, "HU"
    shared.PlaneOrientationSequence = Sequence([orientation])
    shared.PixelMeasuresSequence = Sequence([measures])
    shared.PixelValueTransformationSequence = Sequence([rescale])
    dataset.SharedFunctionalGroupsSequence = Sequence([shared])
    frames = []
    for number in reversed(range(len(hu))):
        position, group = Dataset(), Dataset()
        position.ImagePositionPatient = [-20, -30, number * step]
        group.PlanePositionSequence = Sequence([position])
        frames.append(group)
    dataset.PerFrameFunctionalGroupsSequence = Sequence(frames)
    dataset.NumberOfFrames = len(hu)
    set_pixels(dataset, (hu[::-1] + 1024).astype("<u2").tobytes())
    for keyword, value in changes.items():
        setattr(dataset, keyword, value)
    return dataset
