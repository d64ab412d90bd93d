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
"""Whether arithmetic in bfloat16 is the fast choice: `has_native_bfloat16`."""

import torch


def has_native_bfloat16(device: str | torch.device) -> bool:
    """False on an x86 CPU of at most AVX2: a product of bfloat16 matrices takes it tens of times that of float32."""
    return torch.device(device).type != "cpu" or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "NO AVX")
