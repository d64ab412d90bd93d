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
"""The kinds of bases that can be converted: `FAMILIES`, by the model type of their config.

How to add one: docs/add_a_family.md.
"""

from .dinov2 import DINOV2
from .family import Family, Tower
from .gemma3 import GEMMA3
from .internvl import INTERNVL
from .llava import LLAVA
from .llava_onevision import LLAVA_ONEVISION
from .paligemma import PALIGEMMA
from .phi3_v import PHI3_V
from .qwen_vl import QWEN2_5_VL, QWEN3_VL
from .towers import TOWERS


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        LLAVA,
        LLAVA_ONEVISION,
        PHI3_V,
        GEMMA3,
        PALIGEMMA,
        INTERNVL,
        QWEN2_5_VL,
        QWEN3_VL,
        DINOV2,
    )
}

__all__ = ["FAMILIES", "TOWERS", "Family", "Tower"]
