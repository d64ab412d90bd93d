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
"""Tensors from file to file, one in memory at a time: what the safetensors library has no function for.

- `write_tensors`: tensors that are read when their turn comes -> one safetensors file, as the library would write it.
- `read_header`, `read_tensor`: where a tensor lies in a file, and that tensor alone, not mapped with all the others.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BLOCK = 1 << 24


class LazyTensor(NamedTuple):
    """A tensor that `read` brings into memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_tensors(path: Path, tensors: dict[str, LazyTensor], metadata: dict[str, str] | None = None) -> str:
    """Write a safetensors file and return its SHA-256. The metadata are by default those of the library."""
    # The library's order: wide numbers first, then by name. It keeps every tensor aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    metadata = {"format": "pt"} if metadata is None else metadata
    header, start = {"__metadata__": metadata} if metadata else {}, 0
    for name in names:
        shape, dtype, _ = tensors[name]
        stop = start + tensors[name].nbytes
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for block in _blocks(encoded, names, tensors):
            file.write(block)
            digest.update(block)
    return digest.hexdigest()


def read_header(path: Path) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """First and last byte of every tensor in a file that the library has opened before, and the file's metadata."""
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    places = {name: tuple(8 + length + place for place in entry["data_offsets"]) for name, entry in header.items()}
    return places, metadata


def read_tensor(path: Path, place: tuple[int, int], shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """That tensor alone."""
    if place[0] == place[1]:
        return torch.empty(shape, dtype=dtype)
    with path.open("rb") as file:
        file.seek(place[0])
        data = np.fromfile(file, dtype=np.uint8, count=place[1] - place[0])
    return torch.from_numpy(data).view(dtype).reshape(shape)


def file_hash(path: Path) -> str:
    """SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _blocks(header: bytes, names: list[str], tensors: dict[str, LazyTensor]) -> Iterable[bytes | memoryview]:
    yield struct.pack("<Q", len(header)) + header
    for name in names:
        tensor = tensors[name].read()
        if tuple(tensor.shape) != tuple(tensors[name].shape) or tensor.dtype != tensors[name].dtype:
            raise AssertionError(f"{name} is not what was announced")  # a bug, and never a file of the wrong length
        if tensor.numel():
            yield memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())
