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
"""One phantom and one model for the tests of the page."""

from pathlib import Path

import pytest

from ct_moe import load_volume
from ct_moe.trainers.phantoms.anatomy import draw_phantom
from ct_moe.trainers.phantoms.files import write_nifti


DEMO_MODEL = Path(__file__).parents[3] / "examples" / "demo_model"


@pytest.fixture(scope="session")
def phantom(tmp_path_factory) -> Path:
    return Path(write_nifti(draw_phantom(2_000_003, "test"), tmp_path_factory.mktemp("phantom") / "phantom.nii.gz"))


@pytest.fixture(scope="session")
def phantom_volume(phantom):
    return load_volume(phantom)


@pytest.fixture(scope="session")
def reader():
    from ct_moe.hub.app.answers import Reader

    return Reader(str(DEMO_MODEL), max_new_tokens=48, dtype="float32")


@pytest.fixture(scope="session")
def read_scan(reader, phantom_volume):
    """A scan with a report and an answer, to be read only."""
    scan = reader.open(phantom_volume)
    for question in (None, "Is there a pleural effusion?"):
        *_, scan.last = reader.ask(scan, question=question)
    return scan
