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
"""What of an encoded scan serves a further prompt: `starts_from_prefix` and `reusable_states`."""

from typing import Any

import torch


def starts_from_prefix(config) -> bool:
    """Whether a further prompt can start at the first layer with experts.

    False where the base's language model reads earlier layers as well: these start from the pixels.

    Args:
        config: a `CTMoEConfig`.
    """
    vision = config.vision_config
    first_moe_layer = min(vision.moe_layers, default=vision.num_read_layers)
    return not any(layer < first_moe_layer for layer in vision.deepstack_layers)


def reusable_states(features: Any) -> dict[str, torch.Tensor]:
    """What `get_image_features` takes in place of `pixel_values` for other prompts about the same volumes.

    Args:
        features: of a call with `output_prefix_hidden_states=True`, of a model that `starts_from_prefix`.

    Returns:
        Tensors by name, `(V, ...)`, but `moe_hidden_states` `(2, V, ...)`.
    """
    names = ("moe_hidden_states", "slice_hidden_states", "volume_hidden_states")
    kept = {name: features[name] for name in names if features.get(name) is not None}
    if "moe_hidden_states" not in kept:  # of a model without experts
        kept["prefix_hidden_states"] = features.prefix_hidden_states
    return kept
