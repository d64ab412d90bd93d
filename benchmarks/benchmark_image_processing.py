"""From a .nii.gz to `pixel_values`: time and memory, beside decompression alone and the MONAI chain of the peers.

    python benchmarks/benchmark_image_processing.py
    python benchmarks/benchmark_image_processing.py --scan chest.nii.gz --peers-python ../peers/bin/python

Every measurement runs in its own process, imports left out: the median of `--repeats` runs, and the peak of memory
above what the process held after its imports (Linux only). Without `--scan` a CT-like file of 512 x 512 x 300 int16
voxels is made, with noise that compresses as a scanner's does. Decoders and MONAI that are not installed are left
out with a message; `--peers-python` names an interpreter that has them (pip install monai nibabel isal zlib-ng deflate
cramjam rapidgzip).
"""

import argparse
import gzip
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


SHAPE, SPACING = (300, 512, 512), (1.0, 0.7, 0.7)  # (z, y, x)
NUM_SLICES, PIXELS = 32, 336


# ---- what is measured: each function imports first, then returns the work to be timed


def decode_gzip(path):
    return lambda: _read_all(gzip.open(path), path)


def decode_isal(path):
    from isal import igzip

    return lambda: _read_all(igzip.open(path), path)


def decode_zlib_ng(path):
    from zlib_ng import gzip_ng

    return lambda: _read_all(gzip_ng.open(path), path)


def decode_libdeflate(path):
    import deflate

    return lambda: deflate.gzip_decompress(Path(path).read_bytes(), _uncompressed_bytes(path))


def decode_cramjam(path):
    import cramjam

    return lambda: cramjam.gzip.decompress(Path(path).read_bytes(), output_len=_uncompressed_bytes(path))


def decode_rapidgzip(path):
    import rapidgzip

    return lambda: _read_all(rapidgzip.open(path, parallelization=0), path)  # 0: all cores


def load_only(path):
    from ct_moe.volume_io_ct_moe import load_volume

    return lambda: load_volume(path)


def file_to_pixel_values(path):
    from ct_moe.image_processing_ct_moe import CTMoEImageProcessor

    processor = CTMoEImageProcessor(size=PIXELS, num_slices=NUM_SLICES)
    return lambda: processor(path)


def monai_chain(path):
    from monai.transforms import Compose, CropForeground, LoadImage, Orientation, Resize, ScaleIntensityRange

    chain = Compose(
        [
            LoadImage(image_only=True, ensure_channel_first=True),
            Orientation("LPS"),
            ScaleIntensityRange(-1000, 1000, 0, 1, clip=True),
            CropForeground(),
            Resize((PIXELS, PIXELS, NUM_SLICES), mode="trilinear"),
        ]
    )
    return lambda: chain(path)


DECODERS = {
    "gzip (standard library)": decode_gzip,
    "isal": decode_isal,
    "zlib-ng": decode_zlib_ng,
    "deflate (libdeflate)": decode_libdeflate,
    "cramjam": decode_cramjam,
    "rapidgzip, all cores": decode_rapidgzip,
}
OURS = {"load_volume": load_only, "file to pixel_values": file_to_pixel_values}
PEERS = {"MONAI chain": monai_chain}
MEASUREMENTS = {**DECODERS, **OURS, **PEERS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scan", type=Path, help="a .nii.gz; made if it does not exist")
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter for the decoders and MONAI")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--measure", choices=MEASUREMENTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(_measure(args.measure, str(args.scan))))
        return
    with tempfile.TemporaryDirectory() as folder:
        scan = args.scan or Path(folder) / "scan.nii.gz"
        if not scan.exists():
            print(f"writing a CT-like scan of {' x '.join(map(str, SHAPE[::-1]))} voxels ...")
            write_scan(scan)
        _report(scan, args)


def write_scan(path: Path) -> None:
    """A chest of ellipses, with the correlated noise of a reconstruction and the flat corners outside its field."""
    import nibabel as nib

    depth, rows, columns = SHAPE
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-1 : 1 : rows * 1j, -1 : 1 : columns * 1j]
    stack = np.empty(SHAPE, np.int16)
    for index in range(depth):
        breath = 1 + 0.1 * np.sin(index / 40)
        hu = np.full((rows, columns), -1000.0)
        hu[(x / 0.9) ** 2 + (y / 0.65) ** 2 < 1] = -100  # fat
        hu[(x / 0.84) ** 2 + (y / 0.59) ** 2 < 1] = 50  # muscle
        for side in (-1, 1):
            hu[((x - side * 0.42) / (0.33 * breath)) ** 2 + ((y + 0.05) / (0.45 * breath)) ** 2 < 1] = -850  # lung
        hu[(x / 0.25) ** 2 + ((y + 0.15) / 0.3) ** 2 < 1] = 40  # heart
        hu[(x / 0.1) ** 2 + ((y - 0.4) / 0.12) ** 2 < 1] = 400 if index % 30 < 24 else 80  # vertebra, disc
        noise = rng.normal(0, 35, (rows + 2, columns + 2))
        noise = noise[:-2] / 4 + noise[1:-1] / 2 + noise[2:] / 4
        hu += noise[:, :-2] / 4 + noise[:, 1:-1] / 2 + noise[:, 2:] / 4
        hu[x**2 + y**2 > 1] = -1024
        stack[index] = np.rint(hu).clip(-1024, 3071)
    affine = np.diag([-SPACING[2], -SPACING[1], SPACING[0], 1.0])
    image = nib.Nifti1Image(stack.transpose(2, 1, 0), affine)
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=6))


def _report(scan: Path, args: argparse.Namespace) -> None:
    print(f"{scan.stat().st_size / 1e6:.0f} MB compressed, {_uncompressed_bytes(scan) / 1e6:.0f} MB of voxels")
    print(f"\n{'':28}{'seconds':>9}{'peak MB above imports':>24}")
    seconds = {}
    # Round by round, so that a busy minute of the machine falls on all of them.
    runs = {name: [] for name in MEASUREMENTS}
    for _ in range(args.repeats):
        for name in [name for name in runs if runs[name] is not None]:
            python = sys.executable if name in OURS else args.peers_python
            command = [python, __file__, "--measure", name, "--scan", str(scan)]
            child = subprocess.run(command, capture_output=True, text=True)
            if child.returncode and name in OURS:
                sys.exit(child.stderr)
            elif child.returncode:
                print(f"{name:28}{'left out':>9}  {child.stderr.strip().splitlines()[-1]}")
                runs[name] = None
            else:
                runs[name].append(json.loads(child.stdout.splitlines()[-1]))
    for name, measured in runs.items():
        if measured:
            seconds[name] = statistics.median(run["seconds"] for run in measured)
            print(f"{name:28}{seconds[name]:9.2f}{max(run['peak_mb'] for run in measured):24.0f}")

    fastest = min((name for name in DECODERS if name in seconds), key=seconds.get)
    ours = seconds["file to pixel_values"]
    print(f"\nfile to pixel_values takes {ours / seconds[fastest]:.2f} x the time of the fastest decoder ({fastest})")
    for name in [name for name in PEERS if name in seconds]:
        print(f"{name} takes {seconds[name] / ours:.1f} x the time of file to pixel_values")


def _measure(name: str, scan: str) -> dict[str, float]:
    work = MEASUREMENTS[name](scan)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew here
    before = _memory_mb("VmRSS")
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    del result
    return {"seconds": seconds, "peak_mb": _memory_mb("VmHWM") - before}


def _memory_mb(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def _uncompressed_bytes(path) -> int:
    """The last four bytes of a gzip file."""
    return int.from_bytes(Path(path).read_bytes()[-4:], "little")


def _read_all(file, path) -> np.ndarray:
    voxels = np.empty(_uncompressed_bytes(path), np.uint8)
    view, filled = memoryview(voxels), 0
    with file:
        while count := file.readinto(view[filled : filled + (1 << 20)]):
            filled += count
    return voxels


if __name__ == "__main__":
    main()
