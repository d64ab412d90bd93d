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
"""Libraries that only some metrics need: `library`."""

from importlib import import_module
from types import ModuleType

from ct_moe import CTMoEError


def library(name: str, *, package: str = "ct-moe[eval]") -> ModuleType:
    """Import a module of an optional dependency.

    Raises:
        CTMoEError: it is not installed; the remedy names the package that brings it.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise CTMoEError(error.name, "is not installed", f'Run: pip install "{package}"') from error
