"""What loading may cost: no memory to speak of beside the volume, and no crash on any bytes (a short fuzz run)."""

import gzip
import os
import struct
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest


pytest.importorskip("imagecodecs")
fuzz = pytest.importorskip("fuzz_volume_io", exc_type=ImportError)

# Loads a small file first, so that what is imported or allocated once does not count.
PEAK = """
import resource, sys
from ct_moe.volume_io_ct_moe import load_volume
load_volume(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
volume = load_volume(sys.argv[2])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, volume.hu.nbytes, volume.hu.dtype)
"""


def write_nifti(path, shape, dtype, slope=1.0, intercept=0.0):
    """A large body without making it in memory first: one slice, again and again."""
    plane = np.full(shape[:2], -1000, np.float64)
    plane[50:-50, 60:-60] = 40
    plane += np.arange(plane.size).reshape(plane.shape) % 13
    header = nib.Nifti1Header(endianness=">" if dtype.startswith(">") else "<")
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    header.set_sform(np.diag([0.8, 0.7, 2.5, 1]), code=1)
    header["pixdim"][1:4] = 0.8, 0.7, 2.5
    header["vox_offset"], header["magic"] = 352, b"n+1"
    header["scl_slope"], header["scl_inter"] = slope, intercept
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(header.binaryblock + b"\0" * 4)
        content = ((plane - intercept) / slope).astype(dtype).T.tobytes()
        for _ in range(shape[2]):
            file.write(content)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
@pytest.mark.parametrize(
    ("dtype", "slope", "intercept"),
    [("int16", 1, 0), (">i2", 1, 0), ("int32", 1, 0), ("uint16", 1, -1024), ("float64", 1, 0)],
)
def test_loading_takes_little_more_memory_than_the_volume(tmp_path, dtype, slope, intercept):
    write_nifti(tmp_path / "small.nii.gz", (512, 512, 4), dtype, slope, intercept)
    write_nifti(tmp_path / "large.nii.gz", (512, 512, 80), dtype, slope, intercept)
    answer = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "small.nii.gz", tmp_path / "large.nii.gz"],
        check=True, capture_output=True, text=True, env=os.environ,
    ).stdout.split()  # fmt: skip
    peak, volume = int(answer[0]), int(answer[1])
    assert answer[2] == ("float32" if dtype == "float64" else "int16")
    assert peak < volume + 16 * 2**20


def test_a_short_fuzz_run():
    outcomes = [fuzz.run_case(seed=7, number=number) for number in range(500)]
    assert min(outcomes.count("loaded"), outcomes.count("refused")) > 50


@pytest.mark.slow
def test_the_long_fuzz_run():
    script = Path(fuzz.__file__)
    result = subprocess.run(
        [sys.executable, script, "--cases", "20000"], capture_output=True, text=True, check=False, timeout=600
    )
    assert result.returncode == 0, result.stdout
    assert "20000 cases" in result.stdout


def test_every_file_of_the_fuzz_run_loads_undamaged():
    for name, content in fuzz.valid_files().items():
        options = {"spacing": (1, 1, 1)} if name == "npy" else {}
        assert fuzz.load_volume(content, check="off", **options).hu.size > 100, name


def test_a_npy_header_that_claims_gigabytes():
    with pytest.raises(fuzz.VolumeError, match="header is damaged"):
        fuzz.load_volume(b"\x93NUMPY\2\0" + struct.pack("<L", 0xFFFFFFF0) + b"{" * 1000, spacing=(1, 1, 1))
