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
"""Files that no page should be harmed by, with what each must be told."""

import gzip
import io
import stat
import struct
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np


SCRIPT = "<img src=x onerror=alert(1)>"


def zipped(path: Path, *entries: tuple[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return path


def zip_bomb(folder: Path) -> Path:
    return zipped(folder / "bomb.zip", ("a.dcm", bytes(50_000_000)))


def lying_zip(folder: Path) -> Path:
    """Its entry says it is small and inflates to 50 MB."""
    path = zipped(folder / "lying.zip", ("a.dcm", bytes(50_000_000)))
    size = struct.pack("<I", 50_000_000)
    path.write_bytes(path.read_bytes().replace(size, struct.pack("<I", 1000)))
    return path


def crowded_zip(folder: Path) -> Path:
    return zipped(folder / "crowded.zip", *((f"{number}.dcm", b"x") for number in range(5001)))


def climbing_zip(folder: Path) -> Path:
    return zipped(folder / "climbing.zip", ("../../out.dcm", b"x"))


def absolute_zip(folder: Path) -> Path:
    return zipped(folder / "absolute.zip", ("/etc/out.dcm", b"x"))


def linking_zip(folder: Path) -> Path:
    link = zipfile.ZipInfo("link.dcm")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(folder / "linking.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    return folder / "linking.zip"


def nested_zip(folder: Path) -> Path:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("a.dcm", b"x")
    return zipped(folder / "nested.zip", ("inner.zip", inner.getvalue()))


def broken_zip(folder: Path) -> Path:
    (folder / "broken.zip").write_bytes(b"PK\3\4" + bytes(100))
    return folder / "broken.zip"


def page_named_scan(folder: Path) -> Path:
    path = folder / "page.nii.gz"
    path.write_bytes(b"<html><script>alert(1)</script></html>" * 100)
    return path


def picture_named_scan(folder: Path) -> Path:
    path = folder / "picture.nii"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(1000))
    return path


def gzipped_nothing(folder: Path) -> Path:
    path = folder / "nothing.nii.gz"
    path.write_bytes(gzip.compress(bytes(100_000)))
    return path


def two_gigabyte_header(folder: Path) -> Path:
    path = folder / "two_gb.nii"
    path.write_bytes(_header((1024, 1024, 1024)) + bytes(10_000))
    return path


def two_gigabyte_gzip(folder: Path) -> Path:
    path = folder / "two_gb.nii.gz"
    path.write_bytes(gzip.compress(_header((1024, 1024, 1024)) + bytes(5_000_000)))
    return path


def empty_file(folder: Path) -> Path:
    (folder / "empty.nii").touch()
    return folder / "empty.nii"


def script_in_the_name(folder: Path) -> Path:
    path = folder / f"{SCRIPT}.nii.gz"
    path.write_bytes(b"no scan")
    return path


def script_in_the_zip(folder: Path) -> Path:
    return zipped(folder / "script.zip", (f"{SCRIPT}.dcm", b"no scan"))


HOSTILE = {
    zip_bomb: "promises 50 MB in a file of",
    lying_zip: "damaged|no DICOM|unknown format",
    crowded_zip: "5001 files in the zip, over the limit of 5000",
    climbing_zip: "a path that leads out of it",
    absolute_zip: "a path that leads out of it",
    linking_zip: "the archive holds a link",
    nested_zip: "an archive in an archive",
    broken_zip: "a damaged zip archive",
    page_named_scan: "neither NIfTI nor a zip",
    picture_named_scan: "neither NIfTI nor a zip",
    gzipped_nothing: "neither NIfTI nor a zip",
    two_gigabyte_header: "promises 2147 MB in a file of 0.010 MB",
    two_gigabyte_gzip: "promises 2147 MB in a file of",
    empty_file: "neither NIfTI nor a zip",
    script_in_the_name: "neither NIfTI nor a zip",
    script_in_the_zip: "unknown format",
}


def _header(shape: tuple[int, int, int]) -> bytes:
    header = nib.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(np.int16)
    header["magic"], header["vox_offset"] = b"n+1", 352
    return header.binaryblock + bytes(4)
