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
"""Processed scans kept on disk between epochs and runs: `VolumeCache`.

Reading what came of a scan takes a fraction of the time that unpacking and resizing it takes. An entry is known by the
content of the scan's files and the settings of the image processor. It shows a patient's anatomy, so only its owner
may read it, and it holds nothing else: no name, no path, no header of the scan.
"""

import hashlib
import json
import os
import re
import tempfile
import time
import warnings
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from ct_moe.errors_ct_moe import TrainingError
from ct_moe.image_processing_ct_moe import WINDOW_PRESETS, CTMoEImageProcessor
from ct_moe.volume_ct_moe import LoadContext
from ct_moe.volume_files_ct_moe import folder_entries, path_entry
from ct_moe.volume_metaimage_ct_moe import MAX_HEADER_BYTES, is_metaimage, is_nrrd
from ct_moe.volume_nifti_ct_moe import header_class
from ct_moe.volume_voxels_ct_moe import VoxelStream


# Part of every key: raise it when `load_volume` or the image processor give other values for the same scan and
# settings, or when entries are written in another form. Entries of older versions are evicted as they age.
FORMAT_VERSION = 1

_ENTRY_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
_PART_PREFIX, _PART_SUFFIX = "ct_moe_", ".part"  # of an entry that is being written
_PART_SECONDS = 3600  # a part that nobody has written to for so long was left by a process that was killed
_LOCK_SECONDS = 60  # the lock is held for milliseconds; a training run does not wait for a stopped process


class VolumeCache:
    """A folder of processed scans, safe for many processes at once; the least recently used make room for new ones.

    Warnings about a scan are given when it is processed, not when it is found here. Each process hashes the files of a
    scan when it first meets it: workers that live for the whole training (`dataloader_persistent_workers`) do it once.

    Args:
        folder: where entries are kept. It is made, for its owner only, if it is not there; a folder that is there
            keeps its mode. Entries can be read by their owner alone in any case.
        image_processor: its settings at the time of each `read` count.
        max_gb: bound on all entries together, in 10^9 bytes, for up to 64 processes at once; what is being written at
            the moment comes on top.

    Attributes:
        hits (`int`): scans found here, by this process.
        misses (`int`): scans processed, by this process.

    Raises:
        TrainingError: the folder cannot be made or written to, or `max_gb` is not above 0.
    """

    def __init__(self, folder: str | Path, image_processor: CTMoEImageProcessor, max_gb: float = 100.0):
        if not isinstance(max_gb, (int, float)) or isinstance(max_gb, bool) or not max_gb > 0:
            raise TrainingError("max_gb", f"{max_gb!r} is not a size", "Pass gigabytes above 0")
        self.folder = Path(os.path.abspath(folder))
        self.image_processor = image_processor
        self.max_bytes = max_gb * 1e9
        self.hits = self.misses = 0
        self._unseen_bytes = 0  # that may be stored before the folder is looked through again
        self._contents: dict[str, str] = {}  # hash of paths, sizes, times and inodes -> hash of the content
        self._has_warned = False
        try:
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
            with self._lock():
                self._remove_old_parts()
                self._evict(self.max_bytes)
        except (OSError, NotImplementedError) as error:
            finding = f"cannot be used as a cache ({type(error).__name__})"
            raise TrainingError(str(folder), finding, "Name a folder that can be made and written to") from error

    def read(self, source: Any) -> dict[str, np.ndarray]:
        """A scan as `image_processor.process_volume` gives it, bit for bit, from disk if it is there.

        Kept are scans in files: a file, a folder, a list of DICOM files, the content of a file as `bytes`, or
        `{"path": ..., "bytes": ...}`. URLs and what is an image, an array or a volume already are processed each time.

        Args:
            source: anything `load_volume` takes.

        Returns:
            The row of the scan. It belongs to the caller.

        Raises:
            VolumeError: the scan cannot be loaded, or does not fit the settings. Nothing is stored.
        """
        key = self._key(source)
        row = None if key is None else self._load(self.folder / key)
        if row is not None:
            self.hits += 1
            return row
        row = self.image_processor.process_volume(source)
        self.misses += 1
        if key is not None and self._key(source) == key:  # else the scan was replaced while it was read
            self._store(self.folder / key, row)
        return row

    def __getstate__(self) -> dict[str, Any]:
        # For another process, which counts and warns for itself.
        return {**vars(self), "hits": 0, "misses": 0, "_has_warned": False, "_unseen_bytes": 0}

    def _key(self, source: Any) -> str | None:
        """File name of a scan's entry; None for a scan that is not kept."""
        try:
            content = self._content(source)
        except (OSError, ValueError):  # loading the scan says what is wrong with it
            return None
        settings = _settings(self.image_processor)
        return None if content is None else f"{_hash(FORMAT_VERSION, settings, content)}.safetensors"

    def _content(self, source: Any) -> str | None:
        """Hash of everything that `load_volume` reads of a scan, whatever the files are called."""
        if isinstance(source, dict):
            source = source.get("path") if source.get("bytes") is None else source["bytes"]
            if isinstance(source, str):  # `datasets` may write "gzip://scan.nii::/path/scan.nii.gz"
                source = re.sub(r"^gzip://[^:]*::", "", source)
        if isinstance(source, bytes):
            return _hash("file", [hashlib.sha256(source).hexdigest()])
        kind, paths = _files(source)
        if not paths:
            return None
        stats = [path.stat() for path in paths]
        look = _hash(*((str(path), s.st_size, s.st_mtime_ns, s.st_ino) for path, s in zip(paths, stats)), kind)
        if look not in self._contents:
            self._contents[look] = _hash(kind, sorted(map(_hash_of_file, paths)))
        return self._contents[look]

    def _load(self, entry: Path) -> dict[str, np.ndarray] | None:
        try:
            row = load_file(entry, backend="pread")
            if row.pop("crc32").tolist() != [_checksum(row)]:
                raise ValueError("damaged")
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError):
            with suppress(OSError):
                entry.unlink()
            return None
        with suppress(OSError):  # it may be evicted by now
            os.utime(entry)
        return row

    def _store(self, entry: Path, row: dict[str, np.ndarray]) -> None:
        """Adds an entry if there can be room for it. A disk that is full or gone costs time, not the training run."""
        content = save({**row, "crc32": np.uint32([_checksum(row)])})
        if len(content) > self.max_bytes:
            return
        try:
            descriptor, part = tempfile.mkstemp(_PART_SUFFIX, _PART_PREFIX, self.folder)  # of mode 0600
            try:
                with open(descriptor, "wb") as file:
                    file.write(content)
                with self._lock():
                    if len(content) > self._unseen_bytes:
                        self._evict(self.max_bytes - len(content), new=entry)
                    else:
                        self._unseen_bytes -= len(content)
                    os.replace(part, entry)
            finally:
                with suppress(OSError):
                    os.unlink(part)
        except (OSError, NotImplementedError) as error:
            if not self._has_warned:
                self._has_warned = True
                warnings.warn(f"{self.folder}: scans are processed each time, not kept ({error})", stacklevel=3)

    def _lock(self) -> FileLock:
        return FileLock(self.folder / "lock", timeout=_LOCK_SECONDS, mode=0o600)

    def _evict(self, room: float, new: Path | None = None) -> None:
        """Removes least recently used entries until those beside the new one fit into `room`; needs the lock.

        Looking through a folder of thousands for every new entry would take longer than writing it: of the room that
        is left, each of 64 processes may fill its share before it looks again.
        """
        entries = []
        for path in self.folder.iterdir():
            if _ENTRY_NAME.fullmatch(path.name) and path != new:
                with suppress(FileNotFoundError):  # it was damaged, and a reader has just removed it
                    stat = path.stat()
                    entries.append((stat.st_mtime_ns, path, stat.st_size))
        excess = sum(size for _, _, size in entries) - room
        for _, path, size in sorted(entries):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size
        self._unseen_bytes = max(-excess, 0) / 64

    def _remove_old_parts(self) -> None:
        """Removes what killed processes were writing; needs the lock."""
        for part in self.folder.glob(f"{_PART_PREFIX}*{_PART_SUFFIX}"):
            with suppress(FileNotFoundError):  # a process that is alive has just finished it
                if part.stat().st_mtime < time.time() - _PART_SECONDS:
                    part.unlink()


def _settings(image_processor: CTMoEImageProcessor) -> dict[str, Any]:
    """The settings that a row depends on, each in one spelling, and None for those that another one overrules."""
    stored = image_processor.to_dict()
    settings = {name: stored.get(name) for name in image_processor.valid_kwargs.__annotations__}
    if isinstance(settings["windows"], str):
        settings["windows"] = list(WINDOW_PRESETS[settings["windows"]].values())
    if isinstance(settings["slab_reduction"], str):
        settings["slab_reduction"] = [settings["slab_reduction"]] * 3
    for name in ("slab_mm", "nominal_mm"):
        settings[name] = float(settings[name])
    idle = ["return_tensors"]
    idle += ["nominal_mm"] if settings["intensity"] == "hu" else ["windows", "slab_mm"]
    idle += ["slab_mm", "max_slices"] if settings["num_slices"] is not None else []
    return settings | dict.fromkeys(idle)


def _files(source: Any) -> tuple[str, list[Path]]:
    """The way `load_volume` reads a source, and the files it reads; none for what is no file on this machine.

    Raises:
        VolumeError: one of them is not there or not a regular file.
    """
    context = LoadContext("scan")
    if isinstance(source, (list, tuple)) and source and all(isinstance(item, (str, os.PathLike)) for item in source):
        return "list", [path_entry(Path(item), context).path for item in source]
    if not isinstance(source, (str, os.PathLike)) or "://" in os.fspath(source):
        return "memory", []
    path = Path(source)
    if path.is_dir():
        return "folder", [entry.path for entry in folder_entries(path, context)]
    with open(path_entry(path, context).path, "rb") as file:
        start = VoxelStream(file, context).read(540)
        file.seek(0)
        header = file.read(2 * MAX_HEADER_BYTES) if is_metaimage(start) or is_nrrd(start) else b""
    names = _data_files(header)
    stem, suffix = os.path.splitext(path.name.removesuffix(".gz"))
    if header_class(start)[1] or suffix == ".img":  # half of a NIfTI pair
        halves = [f"{stem}{half}{packed}" for half in (".hdr", ".img") for packed in ("", ".gz")]
        names = [name for name in halves if name != path.name and (path.parent / name).exists()]
    return "file", [path, *(path_entry(path.parent / name, context).path for name in names)]


def _data_files(header: bytes) -> list[str]:
    """Files that hold the voxels of a MetaImage or NRRD header, by the name it gives; none if they follow it."""
    text = header.decode("latin-1")
    if is_nrrd(header):
        return re.findall(r"^[^\S\n]*data ?file: [^\S\n]*(.*\S)", re.split(r"\n\s*\n", text)[0], re.M | re.I)
    found = re.search(r"^[^\S\n]*ElementDataFile[^\S\n]*=[^\S\n]*(.*\S)", text, re.M)
    return [] if found is None or found[1].upper() == "LOCAL" else [found[1]]


def _hash_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _checksum(row: dict[str, np.ndarray]) -> int:
    """Safetensors notices what is cut off, not what is overwritten."""
    crc = 0
    for name, values in sorted(row.items()):
        crc = zlib.crc32(values, zlib.crc32(f"{name} {values.dtype} {values.shape}".encode(), crc))
    return crc
