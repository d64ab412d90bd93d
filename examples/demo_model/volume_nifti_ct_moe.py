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
"""NIfTI-1 and NIfTI-2: files, header/image pairs, and nibabel images in memory.

The header is read by nibabel; the voxels are streamed past it (nibabel reads a .nii.gz at half the speed and needs
twice the memory).
"""

from typing import BinaryIO

import nibabel as nib
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.spatialimages import HeaderDataError

from .volume_ct_moe import LoadContext, StoredVolume
from .volume_geometry_ct_moe import check_numbers, spacing_of
from .volume_voxels_ct_moe import VoxelStream, check_end, check_type, read_voxels, three_axes, voxels_of


# RAS, the convention of NIfTI, to LPS, the one of DICOM.
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])

# Header extensions are notes; nothing honest is larger.
MAX_VOXEL_OFFSET = 1 << 26

_UNIT_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # unknown, metre, millimetre, micron
_SINGLE_MAGIC = {b"n+1\0": nib.Nifti1Header, b"n+2\0": nib.Nifti2Header}
_PAIR_MAGIC = {b"ni1\0": nib.Nifti1Header, b"ni2\0": nib.Nifti2Header}


def header_class(start: bytes) -> tuple[type | None, bool | None]:
    """The nibabel header class for a file that starts so, and whether its voxels lie in another file."""
    for magic in (start[344:348], start[4:8]):
        if magic in _SINGLE_MAGIC:
            return _SINGLE_MAGIC[magic], False
        if magic in _PAIR_MAGIC:
            return _PAIR_MAGIC[magic], True
    return None, None


def read_nifti(header_file: BinaryIO, image_file: BinaryIO | None, context: LoadContext) -> StoredVolume:
    """Reads one file, or a pair.

    Args:
        header_file (`BinaryIO`): seekable; gzipped or not.
        image_file (`BinaryIO`, *optional*): the .img of a pair.
        context (`LoadContext`): limits and findings.
    """
    stream = VoxelStream(header_file, context)
    start = stream.read(348)
    kind, is_pair = header_class(start)
    if kind is None:
        raise context.error("no NIfTI header", "Pass a NIfTI-1 or NIfTI-2 file (ANALYZE has no orientation)")
    start += stream.read(kind.sizeof_hdr - len(start))
    header = _header(kind, start, context)
    shape, dtype, slope, intercept = _voxel_layout(header, context)
    offset = float(header["vox_offset"])
    if not (0 <= offset <= MAX_VOXEL_OFFSET and offset.is_integer()):
        raise context.error(f"the voxels start at byte {offset:g}", "The header is damaged: export the scan again")
    if is_pair:
        if image_file is None:
            raise context.error("half of a NIfTI pair without its .img", "Pass the path of the .hdr beside its .img")
        stream = VoxelStream(image_file, context)
    elif offset < stream.position:
        offset = stream.position + 4  # 0 is written by some tools; the four extension flags follow the header
    affine = _affine(header, context)
    stream.skip(int(offset) - stream.position)
    voxels = read_voxels(stream, shape[::-1], dtype, slope, intercept, context)
    check_end(stream, voxels, context)
    return StoredVolume(voxels, affine, _facts("nifti", shape, dtype, slope, intercept))


def read_nibabel(image: nib.spatialimages.SpatialImage, context: LoadContext) -> StoredVolume:
    """Reads a nibabel image, from its file if it still lies in one, else as a view of its array if the type allows."""
    header, affine = image.header, image.affine
    if affine is None:
        raise context.error("the nibabel image has no affine", "Set one that maps voxels to RAS millimetres")
    is_nifti = isinstance(header, nib.Nifti1Header)
    if is_nifti and not (header["sform_code"] or header["qform_code"]):
        _doubt_orientation(context)
    elif isinstance(header, nib.AnalyzeHeader) and not is_nifti:
        _doubt_orientation(context)
    affine = RAS_TO_LPS @ _millimetres(header if is_nifti else None, context) @ np.asarray(affine, np.float64)

    shape = three_axes(image.shape, context)
    data = image.dataobj
    slope, intercept = 1.0, 0.0
    if isinstance(data, ArrayProxy):
        slope, intercept = float(data.slope), float(data.inter)
    else:
        data = np.asanyarray(data)
    check_type(data.dtype, context)
    facts = _facts("nifti" if is_nifti else type(header).__name__, shape, data.dtype, slope, intercept)
    if isinstance(data, ArrayProxy) and str(data.file_like).endswith((".nii", ".img", ".gz")) and data.order == "F":
        try:
            with open(data.file_like, "rb") as file:
                stream = VoxelStream(file, context)
                stream.skip(data.offset)
                voxels = read_voxels(stream, shape[::-1], data.dtype, slope, intercept, context)
                check_end(stream, voxels, context)
        except FileNotFoundError as error:
            raise context.error("the file behind the nibabel image is gone", "Load the image again") from error
        return StoredVolume(voxels, affine, facts)
    if isinstance(data, ArrayProxy):  # in memory, or in a form that only nibabel reads
        context.claim(int(np.prod(shape, dtype=object)) * data.dtype.itemsize, "the volume")
        try:
            data = data.get_unscaled()
        except (OSError, ValueError, EOFError) as error:
            raise context.error("the voxels cannot be read", "The file is truncated: load it again") from error
    voxels, owned = voxels_of(data.reshape(shape).T, slope, intercept, context)
    return StoredVolume(voxels, affine, facts, owned)


def _header(kind: type, start: bytes, context: LoadContext):
    """The header as nibabel understands it, in the byte order it was written in."""
    try:
        header = kind(start, check=False)
    except (HeaderDataError, ValueError, nib.wrapstruct.WrapStructError) as error:
        raise context.error("the NIfTI header is truncated or damaged", "Copy or export it again") from error
    if int(header["sizeof_hdr"]) != kind.sizeof_hdr:
        raise context.error(f"the NIfTI header says it is {int(header['sizeof_hdr'])} bytes long", "Export it again")
    return header


def _voxel_layout(header, context: LoadContext) -> tuple[tuple[int, int, int], np.dtype, float, float]:
    """Shape (i, j, k), stored type, slope and intercept, or the reason why this is no volume."""
    dims = [int(size) for size in header["dim"]]
    if not 1 <= dims[0] <= 7:
        raise context.error(f"the header says {dims[0]} dimensions", "The header is damaged: export the scan again")
    shape = three_axes(dims[1 : dims[0] + 1], context)
    try:
        dtype = header.get_data_dtype()
    except (HeaderDataError, KeyError) as error:
        raise context.error(f"unknown voxel type {int(header['datatype'])}", "Export it as int16") from error
    check_type(dtype, context)
    if int(header["bitpix"]) != dtype.itemsize * 8:
        raise context.error(
            f"{int(header['bitpix'])} bits per voxel, but type {dtype} has {dtype.itemsize * 8}",
            "The header is damaged: export the scan again",
        )
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not np.isfinite(slope):  # the format's way to say "not scaled"
        slope, intercept = 1.0, 0.0
    if not np.isfinite(intercept) or abs(slope) > 1e6 or abs(intercept) > 1e9:
        raise context.error(f"rescale slope {slope:g}, intercept {intercept:g}", "Repair scl_slope and scl_inter")
    return shape, dtype, slope, intercept


def _millimetres(header, context: LoadContext) -> np.ndarray:
    """The scaling of world coordinates to mm."""
    code = int(header["xyzt_units"]) & 7 if header is not None else 2
    if code not in _UNIT_MM:
        context.warn(f"unknown unit of length {code}, taken as millimetres")
    elif _UNIT_MM[code] != 1.0:
        context.warn(f"lengths are in {'metres' if code == 1 else 'microns'} and were converted to millimetres")
    scale = _UNIT_MM.get(code, 1.0)
    return np.diag([scale, scale, scale, 1.0])


def _affine(header, context: LoadContext) -> np.ndarray:
    """Index (i, j, k) to LPS mm, from the sform, else the qform."""
    pixdim = header["pixdim"][1:4].astype(np.float64)
    if not (np.isfinite(pixdim).all() and (pixdim > 0).all()):
        sizes = ", ".join(f"{step:g}" for step in pixdim)
        raise context.error(f"voxel size ({sizes}) in the header", "Repair pixdim: every size must be above zero")
    sform = header.get_sform() if int(header["sform_code"]) else None
    qform = None
    if int(header["qform_code"]):
        try:
            qform = header.get_qform()
        except (HeaderDataError, ValueError) as error:
            if sform is None:
                raise context.error("the qform is no rotation", "Repair the header's quaternion") from error
    if sform is None and qform is None:
        _doubt_orientation(context)
        affine = header.get_base_affine()
    else:
        affine = qform if sform is None else sform
    for each in (sform, qform):
        if each is not None:
            check_numbers(each, context)
    if sform is not None and not np.allclose(spacing_of(sform)[::-1], pixdim, rtol=0.01):
        context.warn("voxel sizes of the sform and of pixdim differ; the sform was used")
    elif sform is not None and qform is not None:
        corners = np.array([[0, 0, 0, 1], [*(header["dim"][1:4] - 1.0), 1]]).T
        if np.abs((sform - qform) @ corners).max() > pixdim.max():
            context.warn("sform and qform place the volume differently; the sform was used")
    return RAS_TO_LPS @ _millimetres(header, context) @ affine


def _doubt_orientation(context: LoadContext) -> None:
    if context.intensity == "hu":
        context.doubt("neither sform nor qform is set: the orientation is unknown", "Write an sform into the header")


def _facts(name: str, shape, dtype: np.dtype, slope: float, intercept: float) -> dict:
    return {
        "format": name,
        "stored_shape": list(shape),
        "stored_dtype": dtype.newbyteorder("=").name,
        "rescale": [slope, intercept],
    }
