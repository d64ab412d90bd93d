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
"""A file from a stranger to a `Volume`: NIfTI, or a zip with the DICOM files of a series. Anything else is refused.

What a file is, its content says; its name is used for nothing and shown nowhere, since it may hold a patient's name or
a script. Nothing is unpacked to disk.
"""

import gzip
import os
import stat
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from ct_moe import VolumeError, load_volume
from ct_moe.volume_ct_moe import Volume, VolumeWarning
from ct_moe.volume_nifti_ct_moe import header_class


UPLOAD = "upload"  # how errors name the file


@dataclass(frozen=True)
class UploadLimits:
    """How large an upload may be, before and after decompression."""

    upload_mb: int = 512  # the file
    volume_mb: int = 1024  # the scan in memory; all files of a zip together
    files: int = 5000  # in a zip
    ratio: int = 100  # decompressed to stored; scans stay below 10, a scan of constant air is no scan


LIMITS = UploadLimits()


def read_upload(path: str | Path, limits: UploadLimits = LIMITS, **load) -> Volume:
    """Load an uploaded scan.

    Args:
        path: where the server has put the upload.
        limits: how large it may be.
        **load: arguments of `load_volume`: `series`, `intensity`, `reorient`, `check`.

    Raises:
        VolumeError: it is no scan, it is not of an accepted format, or it is built to do harm.
    """
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", VolumeWarning)  # they are in the volume
            _check_file(file, limits)
            file.seek(0)
            return load_volume(_Nameless(file), max_bytes=limits.volume_mb * 10**6, **load)
    except VolumeError as error:
        raise VolumeError(UPLOAD, error.finding, error.remedy) from error
    except (OSError, ValueError) as error:
        raise VolumeError(UPLOAD, f"cannot be read ({type(error).__name__})", "Upload it again") from error


class _Nameless:
    """A file without its name: the loader would put it into errors."""

    def __init__(self, file):
        self._file = file

    def __getattr__(self, attribute: str):
        if attribute == "name":
            raise AttributeError(attribute)
        return getattr(self._file, attribute)


def _check_file(file, limits: UploadLimits) -> None:
    """Refuses, before it is read, what no scan is."""
    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode):
        raise VolumeError(UPLOAD, "not a regular file", "Upload the scan itself")
    if found.st_size > limits.upload_mb * 10**6:
        raise VolumeError(UPLOAD, f"{found.st_size / 1e6:.0f} MB, over the limit of {limits.upload_mb} MB", "Crop it")
    start = file.read(540)
    if start[:4] == b"PK\3\4":
        _check_zip(file, found.st_size, limits)
        return
    if start[:2] == b"\x1f\x8b":
        file.seek(0)
        try:
            start = gzip.GzipFile(fileobj=file).read(540)
        except (OSError, EOFError, zlib.error) as error:
            raise VolumeError(UPLOAD, "a damaged gzip file", "Copy or export it again") from error
    kind, _ = header_class(start)
    if kind is None:
        remedy = "Upload a NIfTI file (.nii, .nii.gz) or the DICOM files of one series in a zip"
        raise VolumeError(UPLOAD, "neither NIfTI nor a zip, whatever its name says", remedy)
    if len(start) < kind.sizeof_hdr:
        raise VolumeError(UPLOAD, "a NIfTI header that ends early", "Copy or export it again")
    header = kind(start[: kind.sizeof_hdr], check=False)
    promised = int(header["bitpix"]) // 8
    for size in header["dim"][1:8][: max(0, int(header["dim"][0]))]:
        promised *= max(1, int(size))
    _check_ratio(promised, found.st_size, limits)


def _check_zip(file, stored: int, limits: UploadLimits) -> None:
    """By the sizes that the archive declares; when it is read, no file gives more than it declares."""
    file.seek(0)
    try:
        infos = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise VolumeError(UPLOAD, "a damaged zip archive", "Pack it again") from error
    if len(infos) > limits.files:
        raise VolumeError(
            UPLOAD, f"{len(infos)} files in the zip, over the limit of {limits.files}", "Pack one series"
        )
    total = sum(info.file_size for info in infos)
    if total > limits.volume_mb * 10**6:
        finding = f"{total / 1e6:.0f} MB when unpacked, over the limit of {limits.volume_mb} MB"
        raise VolumeError(UPLOAD, finding, "Pack one series")
    _check_ratio(total, stored, limits)


def _check_ratio(unpacked: int, stored: int, limits: UploadLimits) -> None:
    if unpacked > limits.ratio * stored:
        finding = f"promises {unpacked / 1e6:.0f} MB in a file of {stored / 1e6:.3f} MB, which no scan does"
        raise VolumeError(UPLOAD, finding, "Copy or export it again")
