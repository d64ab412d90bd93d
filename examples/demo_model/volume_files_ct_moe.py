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
"""Where bytes come from: one file, a folder, a zip archive, or memory. Nothing is ever extracted to disk.

An `Entry` is one file of those, read whole, in part from its start, or straight into an array. Everything that could
lead elsewhere or blow up (links out of a folder, pipes, zip paths that climb out, bombs) is refused before it is read.
"""

import os
import stat
import struct
import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from huggingface_hub.constants import HF_HUB_CACHE

from .errors_ct_moe import VolumeError
from .volume_ct_moe import LoadContext


# More files than any study has; a folder with more was named by mistake.
MAX_FILES = 50_000

_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # bzip2 and lzma can grow a millionfold in one read


@dataclass
class BytesEntry:
    """A file that is already in memory."""

    name: str
    content: bytes | memoryview

    @property
    def size(self) -> int:
        return len(self.content)

    def head(self, num_bytes: int) -> bytes:
        """The first bytes."""
        return bytes(self.content[:num_bytes])

    def read(self) -> bytes:
        """The whole content."""
        return bytes(self.content)

    def readinto(self, offset: int, view: memoryview) -> int:
        """Fills the view from `offset` on and returns how many bytes there were."""
        part = self.content[offset : offset + len(view)]
        view[: len(part)] = part
        return len(part)


@dataclass
class PathEntry:
    """A regular file on disk."""

    name: str
    path: Path
    size: int

    def head(self, num_bytes: int) -> bytes:
        """The first bytes."""
        with open(self.path, "rb", buffering=0) as file:
            return file.read(num_bytes)

    def read(self) -> bytes:
        """The whole content."""
        with open(self.path, "rb", buffering=0) as file:
            return file.read()

    def readinto(self, offset: int, view: memoryview) -> int:
        """Fills the view from `offset` on and returns how many bytes there were."""
        with open(self.path, "rb", buffering=0) as file:
            file.seek(offset)
            return _fill(file, view)


@dataclass
class ZipEntry:
    """A file in a zip archive; the archive must stay open. Threads may read entries of one archive at once."""

    name: str
    archive: zipfile.ZipFile
    info: zipfile.ZipInfo

    @property
    def size(self) -> int:
        return self.info.file_size

    @contextmanager
    def open(self):
        """The member as a file that is read forwards."""
        try:
            with self.archive.open(self.info) as file:
                yield file
        except VolumeError:
            raise
        except (ValueError, struct.error) as error:  # offsets and names that make no sense
            raise zipfile.BadZipFile(str(error)) from error

    def head(self, num_bytes: int) -> bytes:
        """The first bytes."""
        with self.open() as file:
            return file.read(num_bytes)

    def read(self) -> bytes:
        """The whole content."""
        with self.open() as file:
            return file.read(self.size)

    def readinto(self, offset: int, view: memoryview) -> int:
        """Fills the view from `offset` on and returns how many bytes there were."""
        with self.open() as file:
            file.seek(offset)
            return _fill(file, view)


@dataclass
class InflatedEntry:
    """What follows `start` in another entry, inflated: the dataset of a DICOM file in the deflated transfer syntax.

    It is inflated anew for each reading, and no further than that needs, so that a bomb stays small.
    """

    source: BytesEntry | PathEntry | ZipEntry
    start: int

    @property
    def name(self) -> str:
        return self.source.name

    def head(self, num_bytes: int) -> bytes:
        """The first bytes."""
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(self.source.read()[self.start :], num_bytes)

    def readinto(self, offset: int, view: memoryview) -> int:
        """Fills the view from `offset` on and returns how many bytes there were."""
        part = self.head(offset + len(view))[offset:]
        view[: len(part)] = part
        return len(part)


Entry = BytesEntry | PathEntry | ZipEntry | InflatedEntry

# What reading an entry can raise, beside what the reader of its format finds wrong.
READ_ERRORS = (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)


def path_entry(path: Path, context: LoadContext) -> PathEntry:
    """A path as an entry, if it is a regular file. The path itself may be a link: the caller named it."""
    try:
        found = os.stat(path)
    except FileNotFoundError as error:
        name = "" if str(path) == context.subject else f": {path.name}"  # one file of a list
        raise context.error(f"no such file{name}", "Check the path") from error
    except (OSError, ValueError) as error:  # a null byte in the name is a ValueError
        raise context.error(f"cannot be opened ({type(error).__name__})", "Check the path") from error
    if not stat.S_ISREG(found.st_mode):
        raise context.error(f"not a regular file: {path.name}", "Pass the path of a scan")
    return PathEntry(path.name, path, found.st_size)


def open_path(entry: PathEntry, context: LoadContext) -> BinaryIO:
    """Opens a file for as long as the load lasts."""
    try:
        return context.files.enter_context(open(entry.path, "rb"))
    except OSError as error:
        raise context.error(f"cannot be opened ({type(error).__name__})", "Check its permissions") from error


def folder_entries(folder: Path, context: LoadContext) -> list[PathEntry]:
    """Every regular file under a folder, in a fixed order.

    Links to what is under the folder anyway are passed over; a link that leads out of it is refused, since it would
    read files that the caller did not name. Only the Hub's cache is made of links, and they stay in it.
    """
    home = Path(os.path.realpath(folder))
    cache = Path(os.path.realpath(HF_HUB_CACHE))
    in_cache = home.is_relative_to(cache)
    entries = []

    def unreadable(error: OSError):
        raise context.error(f"a folder cannot be read ({type(error).__name__})", "Check its permissions") from error

    for root, folders, names in os.walk(home, onerror=unreadable):
        folders.sort()
        for name in sorted([*names, *(name for name in folders if os.path.islink(os.path.join(root, name)))]):
            path = Path(root, name)
            if path.is_symlink():
                target = Path(os.path.realpath(path))
                if target.is_relative_to(home):
                    continue
                if not (in_cache and target.is_relative_to(cache)):
                    raise context.error(f"{name} is a link that leads out of the folder", "Copy the files themselves")
            try:
                found = path.stat()
            except OSError as error:
                raise context.error(f"{name} cannot be read ({type(error).__name__})", "Copy it again") from error
            if stat.S_ISREG(found.st_mode):
                entries.append(PathEntry(name, path, found.st_size))
            if len(entries) > MAX_FILES:
                raise context.error(f"more than {MAX_FILES} files", "Pass the folder of one study")
    return entries


def zip_entries(archive: zipfile.ZipFile, context: LoadContext) -> list[ZipEntry]:
    """Every file in an archive, in a fixed order, if all of them may be read."""
    infos = archive.infolist()
    if len(infos) > MAX_FILES:
        raise context.error(f"more than {MAX_FILES} files in the archive", "Pass the archive of one study")
    entries = []
    for info in infos:
        path = PurePosixPath(info.filename.replace("\\", "/"))
        name = path.name
        if path.is_absolute() or ".." in path.parts or (path.parts and ":" in path.parts[0]):
            raise context.error("the archive holds a path that leads out of it", "Do not trust this archive")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise context.error(f"the archive holds a link, {name}", "Pack the files themselves")
        if not name or info.is_dir():
            continue
        if info.flag_bits & 1:
            raise context.error("the archive is encrypted", "Unpack it and pass the folder")
        if info.compress_type not in _ZIP_METHODS:
            raise context.error("the archive uses a compression other than deflate", "Unpack it and pass the folder")
        context.claim(info.file_size, f"{name} in the archive")
        entries.append(ZipEntry(name, archive, info))
    return sorted(entries, key=lambda entry: entry.info.filename)


def _fill(file: BinaryIO, view: memoryview) -> int:
    filled = 0
    while filled < len(view):
        count = file.readinto(view[filled:])
        if not count:
            break
        filled += count
    return filled
