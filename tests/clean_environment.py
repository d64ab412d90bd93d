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
"""A virtual environment as a user makes it."""

import subprocess
import venv
from pathlib import Path


def clean_environment(folder: Path, *packages: str) -> Path:
    """A new virtual environment with those packages: its interpreter."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    # Python compiles what it imports: to compile all packages takes as long as to unpack them.
    pip = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", Path(__file__).parents[1] / "constraints.txt", *packages], check=True)
    return python
