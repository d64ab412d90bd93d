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
"""Makes the common tests of the installed transformers importable as `transformers_tests`.

They are in no wheel: the sdist of exactly the installed version is fetched with pip, once per version, and only its
`tests/` folder is unpacked, into pytest's cache. The name differs from the original's `tests`, which this repository
and others use too. What those files import from a full checkout, and the sdist leaves out, is filled in below.
"""

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

import pytest
from filelock import FileLock


PACKAGE = "transformers_tests"
# A checkout has these beside the tests: a list of tiny models on the Hub, and the source. Some tests import the latter
# under the name of the installed transformers, so that an empty file gives them the installed one.
ABSENT_FILES = {"tests/utils/tiny_model_summary.json": "{}", "src/transformers/__init__.py": ""}
FOREIGN_MARKERS = [
    "accelerate_tests",
    "all_flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "flash_attn_test",
    "is_expert_parallel_test",
    "is_fsdp_test",
    "is_pipeline_test",
    "is_tensor_parallel_test",
    "is_training_test",
    "order",
    "torch_compile_test",
]


def pytest_configure(config):
    for marker in FOREIGN_MARKERS:
        config.addinivalue_line("markers", f"{marker}: used by the tests of transformers")


def pytest_ignore_collect(collection_path, config):
    # Collecting imports the test modules, and importing them fetches the sdist: not in a run without slow tests.
    if config.option.markexpr == "not slow":
        return True


def pytest_pycollect_makemodule(module_path, parent):
    """Runs before a test module of this folder is imported."""
    if PACKAGE not in sys.modules:
        install_library_tests(parent.config.cache)


def install_library_tests(cache: pytest.Cache) -> None:
    version = importlib.metadata.version("transformers")
    folder = cache.mkdir(f"transformers-{version}")
    with FileLock(folder / "fetching.lock"):  # by the first of several workers
        if not (folder / PACKAGE).is_dir():
            try:
                fetch_sdist_tests(version, folder / PACKAGE)
            except (subprocess.CalledProcessError, tarfile.TarError) as error:
                reason = f"cannot fetch the sdist of transformers {version}: {getattr(error, 'stderr', None) or error}"
                pytest.fail(reason, pytrace=False) if os.environ.get("CI") else pytest.skip(reason)

    sys.path.append(str(folder))
    for name, content in absent_modules().items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(content)


def fetch_sdist_tests(version: str, package: Path) -> None:
    """Makes a package of the test files, and of nothing else, in the sdist."""
    with tempfile.TemporaryDirectory(dir=package.parent) as download:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
        command += ["--no-binary", "transformers", f"transformers=={version}", "--dest", download]
        subprocess.run(command, check=True, capture_output=True, text=True)
        (archive,) = Path(download).glob("*.tar.gz")
        unpacked = Path(download, package.name)
        unpacked.mkdir()
        with tarfile.open(archive) as sdist:
            for member in sdist.getmembers():
                path = Path(member.name)
                if member.isfile() and path.parent.name == "tests" and path.suffix == ".py":
                    (unpacked / path.name).write_bytes(sdist.extractfile(member).read())
        for name, content in ABSENT_FILES.items():
            path = package.parent / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        (unpacked / "__init__.py").touch()
        unpacked.rename(package)  # last, so that an interrupted run leaves nothing behind


def absent_modules() -> dict[str, dict]:
    """What the sdist leaves out: tests of generation and of export, and helpers that need a full checkout."""
    return {
        f"{PACKAGE}.exporters": {},
        f"{PACKAGE}.exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
        f"{PACKAGE}.generation": {},
        f"{PACKAGE}.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
        f"{PACKAGE}.utils": {},
        # Settings that every configuration takes, all different from their defaults.
        f"{PACKAGE}.utils.test_configuration_utils": {
            "config_common_kwargs": {
                "return_dict": False,
                "output_hidden_states": True,
                "output_attentions": True,
                "dtype": "float16",
                "chunk_size_feed_forward": 5,
                "architectures": ["AModel"],
                "problem_type": "regression",
                "id2label": {0: "a", 1: "b"},
                "label2id": {"a": 0, "b": 1},
            }
        },
        # Gives the local copy of a sample picture; scans are not pictures, so there is none.
        "fetch_hub_objects_for_ci": {"url_to_local_path": lambda url: url},
    }
