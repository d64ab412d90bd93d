"""Feeds `load_volume` damaged and hostile files: it may load them or refuse them, nothing else.

    python tests/fuzz_volume_io.py --cases 20000 --seed 0

Each case takes one small valid file of some format (the valid ones are made here), damages it (bytes, sizes, lengths,
cuts, insertions, pieces of another file; under compression where there is one) and loads it with a memory limit. It
fails if anything but a volume or a `VolumeError` comes back, if a case takes too long, if the process dies, or if it
ever holds more memory than the limit allows. Cases are numbered: `--case 1234` runs a single one in this process.
"""

import argparse
import gzip
import io
import multiprocessing
import resource
import struct
import sys
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from functools import cache
from pathlib import Path

import imagecodecs
import nibabel as nib
import numpy as np
from pydicom.encaps import encapsulate
from tqdm import tqdm

from ct_moe.errors_ct_moe import VolumeError
from ct_moe.volume_io_ct_moe import Volume, VolumeWarning, load_volume


sys.path.insert(0, str(Path(__file__).parent / "modeling_ct_moe"))
from dicom_series import body, compress, enhanced, series


MAX_BYTES = 64 * 2**20  # the limit that every case is loaded with
SLACK_BYTES = 32 * 2**20  # buffers, fragmentation and what the interpreter itself grows by
CASE_SECONDS = 10  # one case takes some milliseconds
CASES_PER_PROCESS = 2000

INTERESTING = [0, 1, 2, 3, 127, 128, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


def dicom_bytes(dataset) -> bytes:
    file = io.BytesIO()
    little = dataset.file_meta.TransferSyntaxUID != "1.2.840.10008.1.2.2"
    dataset.save_as(file, enforce_file_format=True, little_endian=None if little else False)
    return file.getvalue()


def dicom_in(syntax: str, encode=None) -> bytes:
    dataset = series()[2]
    dataset.file_meta.TransferSyntaxUID = syntax
    if encode is not None:
        compress(dataset, encode((body()[2] + 1024).astype(np.uint16)), syntax)
    return dicom_bytes(dataset)


def run_length(pixels: np.ndarray) -> bytes:
    rows = pixels.byteswap().view(np.uint8).reshape(-1, 2)
    planes = [b"".join(b"\x00" + bytes([value]) for value in rows[:, plane]) for plane in range(2)]
    return struct.pack("<16L", 2, 64, 64 + len(planes[0]), *[0] * 13) + planes[0] + planes[1]


def archive(members: dict, method: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as zip_file:
        for name, content in members.items():
            zip_file.writestr(name, content)
    return file.getvalue()


def saved(save, *arguments, **arrays) -> bytes:
    file = io.BytesIO()
    save(file, *arguments, **arrays)
    return file.getvalue()


@cache
def valid_files() -> dict[str, bytes]:
    """One small file of each kind, all of which load."""
    hu = body()
    affine = np.diag([-0.8, -0.7, 2.5, 1])
    nifti = nib.Nifti1Image(hu.T, affine).to_bytes()
    raw = hu.tobytes()
    mha = (
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\n"
        "CompressedData = {}\nTransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\nElementSpacing = 0.8 0.7 2.5\n"
        "DimSize = 12 10 6\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    )
    nrrd = (
        "NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 12 10 6\n"
        "space directions: (0.8,0,0) (0,0.7,0) (0,0,2.5)\nendian: little\nencoding: {}\nspace origin: (0,0,0)\n\n"
    )
    tilted = series(ImageOrientationPatient=[1, 0, 0, 0, 0.94, 0.34])
    slices = {f"{number}.dcm": dicom_bytes(dataset) for number, dataset in enumerate(series())}
    j2k = "1.2.840.10008.1.2.4.90"
    multi = enhanced()
    frames = [imagecodecs.jpeg2k_encode((plane + 1024).astype(np.uint16), level=0, codecformat="j2k") for plane in hu]
    compress(multi, frames[0], j2k)
    multi.PixelData = encapsulate(frames)
    return {
        "nifti": nifti,
        "nifti float": nib.Nifti1Image(hu.T.astype(np.float32), affine).to_bytes(),
        "nifti scaled": nib.Nifti1Image(hu.T * 1.5, affine, dtype=np.int16).to_bytes(),
        "nifti big endian": nib.Nifti1Image(hu.T, affine, nib.Nifti1Header(endianness=">")).to_bytes(),
        "nifti 2": nib.Nifti2Image(hu.T, affine).to_bytes(),
        "nifti gzip": gzip.compress(nifti),
        "npy": saved(np.save, hu),
        "npz": saved(np.savez, hu=hu, spacing=np.array([2.5, 0.7, 0.8])),
        "npz deflated": saved(np.savez_compressed, hu=hu, spacing=np.array([2.5, 0.7, 0.8])),
        "mha": mha.format("False").encode() + raw,
        "mha zlib": mha.format("True").encode() + zlib.compress(raw),
        "nrrd": nrrd.format("raw").encode() + raw,
        "nrrd gzip": nrrd.format("gzip").encode() + gzip.compress(raw),
        "dicom": dicom_in("1.2.840.10008.1.2.1"),
        "dicom implicit": dicom_in("1.2.840.10008.1.2"),
        "dicom big endian": dicom_in("1.2.840.10008.1.2.2"),
        "dicom deflated": dicom_in("1.2.840.10008.1.2.1.99"),
        "dicom jpeg 2000": dicom_in(j2k, lambda p: imagecodecs.jpeg2k_encode(p, level=0, codecformat="j2k")),
        "dicom jpeg-ls": dicom_in("1.2.840.10008.1.2.4.80", imagecodecs.jpegls_encode),
        "dicom jpeg": dicom_in("1.2.840.10008.1.2.4.70", lambda p: imagecodecs.jpeg8_encode(p, lossless=True)),
        "dicom rle": dicom_in("1.2.840.10008.1.2.5", run_length),
        "dicom multi-frame": dicom_bytes(enhanced()),
        "dicom multi-frame jpeg 2000": dicom_bytes(multi),
        "zip": archive(slices, zipfile.ZIP_STORED),
        "zip deflated": archive(slices, zipfile.ZIP_DEFLATED),
        "zip tilted": archive({f"{n}": dicom_bytes(d) for n, d in enumerate(tilted)}, zipfile.ZIP_DEFLATED),
    }


def damage(content: bytes, rng: np.random.Generator) -> bytes:
    """Some of: other bytes, other numbers, a cut, a hole, an insertion, a piece of another file."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 6))):
        if not data:
            break
        # Headers are at the start, and in zips at the end.
        reach = len(data) if rng.random() < 0.4 else min(len(data), 600)
        place = int(rng.integers(reach)) if rng.random() < 0.9 else max(0, len(data) - 1 - int(rng.integers(reach)))
        kind = rng.random()
        if kind < 0.35:
            data[place] = int(rng.integers(256))
        elif kind < 0.45:
            data[place] ^= 1 << int(rng.integers(8))
        elif kind < 0.65:
            value = INTERESTING[int(rng.integers(len(INTERESTING)))]
            width = int(rng.choice([1, 2, 4, 8]))
            order = "little" if rng.random() < 0.7 else "big"
            data[place : place + width] = (value & (2 ** (8 * width) - 1)).to_bytes(width, order)
        elif kind < 0.72:
            values = [np.nan, np.inf, -1.0, 0.0, 1e30, 1e-30]
            data[place : place + 4] = struct.pack("<f", values[int(rng.integers(len(values)))])
        elif kind < 0.8:
            digit = b"0123456789-.eE"[int(rng.integers(14))]
            text = [i for i in range(place, min(place + 200, len(data))) if chr(data[i]).isdigit()]
            data[int(rng.choice(text)) if text else place] = digit
        elif kind < 0.88:
            del data[place:]
        elif kind < 0.92:
            del data[place : place + int(rng.integers(1, 40))]
        elif kind < 0.96:
            data[place:place] = rng.bytes(int(rng.integers(1, 40)))
        else:
            other = list(valid_files().values())[int(rng.integers(len(valid_files())))]
            start = int(rng.integers(len(other)))
            data[place : place + 200] = other[start : start + int(rng.integers(1, 400))]
    return bytes(data)


def rezipped(content: bytes, rng: np.random.Generator) -> bytes:
    """A zip with one damaged member."""
    with zipfile.ZipFile(io.BytesIO(content)) as zip_file:
        members = {name: zip_file.read(name) for name in zip_file.namelist()}
    name = list(members)[int(rng.integers(len(members)))]
    members[name] = damage(members[name], rng)
    return archive(members, zipfile.ZIP_DEFLATED)


def make_case(seed: int, number: int) -> tuple[str, bytes]:
    """The name of the valid file that a case starts from, and the damaged content."""
    rng = np.random.default_rng([seed, number])
    names = list(valid_files())
    name = names[int(rng.integers(len(names)))]
    content = valid_files()[name]
    inside = rng.random() < 0.7  # damage what is compressed, or the compressed bytes
    if name == "nifti gzip" and inside:
        return name, gzip.compress(damage(valid_files()["nifti"], rng), 1)
    if name.startswith(("zip", "npz")) and inside:
        return name, rezipped(content, rng)
    return name, damage(content, rng)


def run_case(seed: int, number: int) -> str:
    """Loads one case; returns "loaded" or "refused", and raises anything that should not have happened."""
    name, content = make_case(seed, number)
    options = {"check": ["refuse", "warn", "off"][number % 3], "max_bytes": MAX_BYTES}
    options |= {"intensity": "display", "reorient": False} if number % 5 == 0 else {}
    if name == "npy":
        options["spacing"] = (2.5, 0.7, 0.8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", VolumeWarning)
        try:
            volume = load_volume(content, **options)
        except VolumeError as error:
            if error.finding.endswith(".") or error.remedy.endswith("."):
                raise AssertionError(f"a sentence with two dots: {error}") from error
            return "refused"
    if not isinstance(volume, Volume) or not np.isfinite(volume.hu).all():
        raise AssertionError("this is no volume")
    return "loaded"


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(seed: int, numbers: list[int], pipe) -> None:
    """Runs cases in a process of its own, and tells before and after each."""
    for content in valid_files().values():  # so that nothing is loaded, or first allocated, later
        spacing = {"spacing": (1, 1, 1)} if content[:6] == b"\x93NUMPY" else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VolumeWarning)
            load_volume(content, **spacing)
    before = peak_bytes()
    for number in numbers:
        pipe.send(("start", number))
        try:
            outcome = run_case(seed, number)
        except BaseException:
            outcome = "FAILED\n" + traceback.format_exc(limit=-4)
        if peak_bytes() - before > MAX_BYTES + SLACK_BYTES:
            outcome = f"FAILED: {(peak_bytes() - before) / 2**20:.0f} MB of memory"
            before = peak_bytes()
        pipe.send(("end", outcome))
    pipe.send(("done", peak_bytes() - before))


def run_process(seed: int, numbers: list[int], progress: tqdm) -> tuple[Counter, list[tuple[int, str]], int]:
    """Outcomes, failures and the most memory of some cases; a process that dies or hangs is replaced."""
    outcomes, failures, most = Counter(), [], 0
    while numbers:
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=work, args=(seed, numbers, theirs))
        process.start()
        theirs.close()
        current, waiting = None, 120  # seconds; the first message comes after the imports
        try:
            while ours.poll(waiting):
                kind, value = ours.recv()
                if kind == "start":
                    current, waiting = value, CASE_SECONDS
                elif kind == "end":
                    outcomes[value.split("\n")[0].split(":")[0]] += 1
                    if value.startswith("FAILED"):
                        failures.append((current, value))
                    progress.update()
                else:
                    most = value
                    numbers = []
                    break
            else:
                failures.append((current, f"FAILED: no answer in {waiting} s"))
        except EOFError:
            process.join()
            failures.append((current, f"FAILED: the process died with exit code {process.exitcode}"))
        process.kill()
        process.join()
        if numbers:
            if current is None:
                break
            outcomes["FAILED"] += 1
            progress.update()
            numbers = numbers[numbers.index(current) + 1 :]
    return outcomes, failures, most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this one in this process")
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(make_case(arguments.seed, arguments.case)[0], run_case(arguments.seed, arguments.case))
        return
    start = time.perf_counter()
    outcomes, failures, most = Counter(), [], 0
    with tqdm(total=arguments.cases) as progress:
        for first in range(0, arguments.cases, CASES_PER_PROCESS):
            numbers = list(range(first, min(first + CASES_PER_PROCESS, arguments.cases)))
            some, failed, memory = run_process(arguments.seed, numbers, progress)
            outcomes += some
            failures += failed
            most = max(most, memory)
    for number, failure in failures:
        print(f"case {number}: {failure}")
    print(
        f"{sum(outcomes.values())} cases in {time.perf_counter() - start:.0f} s: {dict(outcomes)}; "
        f"at most {most / 2**20:.0f} MB above the start, limit {MAX_BYTES / 2**20:.0f} MB"
    )
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
