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
"""PyTorch CT-MoE model, top to bottom: outputs, depth rotary embedding, vision blocks, TGH-MoE, guide, fusion, head.

One file on purpose: transformers finds attention and experts backends by reading the source of the PreTrainedModel's
own module. Shapes in comments use V volumes, S slices (padded), N tokens per slice, D vision width, E experts, T
routed tokens.
"""

import math
from collections.abc import Callable
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_bidirectional_mask, create_masks_for_generate
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, auto_docstring
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_ct_moe import CTMoEConfig, CTMoEVisionConfig, CTMoEVolumeEncoderConfig, num_pooled_cells
from .errors_ct_moe import ModelError, PromptError
from .routing_ct_moe import routing_losses


# Which ViT takes which side of these is said where the config declares them.
# trf-ignore: TRF041 config.qk_norm, config.norm_type, config.use_layer_scale
# trf-ignore: TRF041 config.pre_layernorm, config.post_layernorm, config.router_jitter
# trf-ignore: TRF041 config.projector_norm, config.projector_layers, config.merge_mode, config.separators
# trf-ignore: TRF041 config.image_attention, config.first_position, config.post_norm_type, config.deepstack_layers
# trf-ignore: TRF041 config.temporal_patch_size, config.position_embedding, config.fused_qkv, config.depth_rotary_dim


ADAPTER_PARTS = ("base_layer.", "lora_", "modules_to_save.", "original_module.")  # names that PEFT gives
VOLUME_ARGS = r"""
    pixel_values (`torch.Tensor` of shape `(num_volumes, num_slices, num_channels, height, width)`, *optional*):
        Windowed slices from [`CTMoEImageProcessor`], one row per volume in placeholder order.
    slice_mask (`torch.Tensor` of shape `(num_volumes, num_slices)`, *optional*):
        True for real slices; by default all are.
    slice_positions (`torch.Tensor` of shape `(num_volumes, num_slices)`, *optional*):
        Slab centres from the first one, in micrometres. Required for more than one slice.
    patch_mask (`torch.Tensor` of shape `(num_volumes, num_slices, rows, columns)`, *optional*):
        False for patches of air, which are not routed; by default all are.
    volume_scale (`torch.Tensor` of shape `(num_volumes, 2)`, *optional*):
        log(field of view / 400 mm) and log(slab / 5 mm); by default zeros.
    guide_input_ids (`torch.Tensor` of shape `(num_volumes, guide_length)`, *optional*):
        Tokens of the prompt that steers the routing, one row per volume.
    guide_attention_mask (`torch.Tensor` of shape `(num_volumes, guide_length)`, *optional*):
        1 for tokens of the prompt. A row of zeros is a volume without guide: shared group only.
    task_ids (`torch.Tensor` of shape `(num_volumes,)`, *optional*):
        Index into `config.tasks` that sends the volume to that group. -100 leaves the choice to the text.
    segment_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
        Several conversations about the same volumes in one row: 0 for what they share, the volumes foremost, then 1,
        2, ... for the tokens of each, which see what is shared and their own. With it `position_ids` are required.
    token_type_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
        0 for the prompt, 1 for the answer, for a base whose prompt sees all of itself; by default all is prompt.
    guide (`torch.Tensor` of shape `(num_volumes, guide_size)`, *optional*):
        Embedding of the prompt.
    task_index (`torch.Tensor` of shape `(num_volumes,)`, *optional*):
        Task group of each volume, -1 for none.
    task_gate (`torch.Tensor` of shape `(num_volumes,)`, *optional*):
        Factor of the task group's output: 1 in value, with the task router's gradient.
    prefix_hidden_states (`torch.Tensor` of shape `(num_volumes, num_slices, num_tokens, hidden_size)`, *optional*):
        An earlier call's output of that name instead of `pixel_values`: a further question costs the later layers.
    moe_hidden_states (`torch.Tensor` of shape `(2, num_volumes, num_slices, num_tokens, hidden_size)`, *optional*):
        An earlier call's output of that name instead of both: the first MoE layer then runs its experts only.
    slice_hidden_states (`torch.Tensor` of shape `(num_volumes, num_slices, num_tokens, hidden_size)`, *optional*):
        Likewise, for a model that scores slices.
    volume_hidden_states (`torch.Tensor` of shape `(num_volumes, depth, rows, columns, hidden_size)`, *optional*):
        Likewise, for a model with a second, 3D encoder.
    output_prefix_hidden_states (`bool`, *optional*, defaults to `False`):
        Whether to return the hidden states that do not depend on the prompt: those before the first MoE layer, those
        inside it and, for TG-IS, before the first volume layer or of whole encoders.
    output_moe_hidden_states (`bool`, *optional*, defaults to `False`):
        Whether to return those inside the first MoE layer.
    slicewise (`bool`, *optional*, defaults to `False`):
        Whether every layer runs slice by slice, without depth positions and experts, as in the base: the 2D features
        of TG-IS. Then `prefix_hidden_states` are those before the first volume layer.
    output_router_logits (`bool`, *optional*):
        Whether to return router logits, by default as the config says.
    mm_encoder_outputs (`dict[str, CTMoEImageFeatures]`, *optional*):
        `{"image": features}` from [`~CTMoEModel.get_image_features`], instead of `pixel_values`.
"""


@auto_docstring(custom_intro="Output of [`CTMoEVisionModel`].")
@dataclass
class CTMoEVisionOutput(BaseModelOutput):
    r"""
    last_hidden_state (`torch.Tensor` of shape `(num_volumes, num_slices, num_tokens, hidden_size)`):
        Features of every slice at the config's `feature_layer`, the class token (if the base has one) first.
    router_logits (`tuple[torch.Tensor]`, *optional*):
        See [`CTMoERoutingOutput`].
    token_mask (`torch.Tensor`, *optional*):
        See [`CTMoERoutingOutput`].
    prefix_hidden_states (`torch.Tensor` of shape `(num_volumes, num_slices, num_tokens, hidden_size)`, *optional*):
        Output of the last layer before the first MoE layer. It does not depend on the prompt.
    moe_hidden_states (`torch.Tensor` of shape `(2, num_volumes, num_slices, num_tokens, hidden_size)`, *optional*):
        Of the first MoE layer, the states after its attention and what its FFN makes of them. Neither depends on the
        prompt. `None` for a model without MoE layers.
    deepstack_hidden_states (`tuple[torch.Tensor]`, *optional*):
        Outputs of the layers in `deepstack_layers`, each `(num_volumes, num_slices, num_tokens, hidden_size)`.
    slice_prefix_hidden_states (`torch.Tensor` of that shape, *optional*):
        Output of the last layer before the first volume layer.
    """

    router_logits: tuple[torch.Tensor] | None = None
    token_mask: torch.Tensor | None = None
    prefix_hidden_states: torch.Tensor | None = None
    moe_hidden_states: torch.Tensor | None = None
    deepstack_hidden_states: tuple[torch.Tensor, ...] | None = None
    slice_prefix_hidden_states: torch.Tensor | None = None


@auto_docstring(custom_intro="How the volumes of a batch were routed, and what training makes of it.")
@dataclass
class CTMoERoutingOutput(ModelOutput):
    r"""
    router_logits (`tuple[torch.Tensor]`, *optional*, returned when `output_router_logits=True`):
        One float32 tensor of shape `(num_volumes, num_slices * num_tokens, routed_experts)` per MoE layer: the shared
        router's logits, then those of the router of the volume's task group.
    token_mask (`torch.Tensor` of shape `(num_volumes, num_slices * num_tokens)`):
        1 for the tokens that were routed: neither air nor padding.
    task_logits (`torch.Tensor` of shape `(num_volumes, num_tasks)`, *optional*):
        The task router's float32 logits.
    task_index (`torch.Tensor` of shape `(num_volumes,)`, *optional*):
        The task group each volume was sent to, -1 for none.
    slice_scores (`torch.Tensor` of shape `(num_volumes, num_slices)`, *optional*):
        TG-IS: the weight of each slice's 2D features, float32, 0 for padding. Routing, not evidence.
    aux_loss (`torch.Tensor`, *optional*, returned in training):
        The weighted sum of the three losses below, to be added to the language loss.
    balance_loss (`torch.Tensor`, *optional*, returned in training):
        Load balance over experts, and over tasks for volumes without a task label.
    z_loss (`torch.Tensor`, *optional*, returned in training):
        Router z-loss.
    task_loss (`torch.Tensor`, *optional*, returned in training):
        Cross-entropy of the task router on labelled volumes.
    """

    router_logits: tuple[torch.Tensor] | None = None
    token_mask: torch.Tensor | None = None
    task_logits: torch.Tensor | None = None
    task_index: torch.Tensor | None = None
    slice_scores: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    balance_loss: torch.Tensor | None = None
    z_loss: torch.Tensor | None = None
    task_loss: torch.Tensor | None = None


@auto_docstring(custom_intro="Visual features of a batch of volumes.")
@dataclass
class CTMoEImageFeatures(BaseModelOutputWithPooling):
    r"""
    pooler_output (`list[torch.Tensor]`):
        Per volume a tensor of shape `(num_visual_tokens, text_hidden_size)`, in z, y, x order; with TG-IS the weighted
        2D features come last.
    prefix_hidden_states (`torch.Tensor`, *optional*):
        See [`CTMoEVisionOutput`].
    moe_hidden_states (`torch.Tensor`, *optional*):
        See [`CTMoEVisionOutput`].
    slice_hidden_states (`torch.Tensor` of shape `(num_volumes, num_slices, num_tokens, hidden_size)`, *optional*):
        TG-IS: the 2D features. They do not depend on the prompt.
    volume_hidden_states (`torch.Tensor` of shape `(num_volumes, depth, rows, columns, hidden_size)`, *optional*):
        The patches of the second, 3D encoder. They do not depend on the prompt.
    deepstack_output (`list[torch.Tensor]`, *optional*):
        Per volume `(num_visual_tokens, num_layers, text_hidden_size)`, for a language model that reads several layers.
    routing (`CTMoERoutingOutput`, *optional*):
        How the volumes were routed.
    """

    deepstack_output: list[torch.Tensor] | None = None
    prefix_hidden_states: torch.Tensor | None = None
    moe_hidden_states: torch.Tensor | None = None
    slice_hidden_states: torch.Tensor | None = None
    volume_hidden_states: torch.Tensor | None = None
    routing: CTMoERoutingOutput | None = None


@auto_docstring(custom_intro="Output of [`CTMoEModel`].")
@dataclass
class CTMoEModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    image_hidden_states (`torch.Tensor` of shape `(num_visual_tokens, text_hidden_size)`, *optional*):
        The visual tokens of all volumes, one after the other.
    router_logits (`tuple[torch.Tensor]`, *optional*, returned when `output_router_logits=True`):
        The vision encoder's router logits, as in `routing`.
    routing (`CTMoERoutingOutput`, *optional*):
        How the volumes were routed.
    rope_deltas (`torch.Tensor` of shape `(batch_size, 1)`, *optional*):
        What the next position is ahead of the number of tokens, where a language model has positions of three axes.
    """

    image_hidden_states: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor] | None = None
    routing: CTMoERoutingOutput | None = None
    rope_deltas: torch.Tensor | None = None


@auto_docstring(custom_intro="Output of [`CTMoEForConditionalGeneration`].")
@dataclass
class CTMoECausalLMOutputWithPast(ModelOutput):
    r"""
    loss (`torch.Tensor` of shape `(1,)`, *optional*, returned when `labels` is provided):
        The language loss, plus the routing's `aux_loss` in training.
    logits (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`):
        Prediction scores of the language modeling head.
    past_key_values (`Cache`, *optional*):
        Keys and values of the language model.
    image_hidden_states (`torch.Tensor` of shape `(num_visual_tokens, text_hidden_size)`, *optional*):
        The visual tokens of all volumes, one after the other.
    router_logits (`tuple[torch.Tensor]`, *optional*, returned when `output_router_logits=True`):
        The vision encoder's router logits, as in `routing`.
    routing (`CTMoERoutingOutput`, *optional*):
        How the volumes were routed.
    rope_deltas (`torch.Tensor` of shape `(batch_size, 1)`, *optional*):
        See [`CTMoEModelOutputWithPast`].
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor] | None = None
    attentions: tuple[torch.Tensor] | None = None
    image_hidden_states: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor] | None = None
    routing: CTMoERoutingOutput | None = None
    rope_deltas: torch.Tensor | None = None


class CTMoERouting(NamedTuple):
    """What every MoE layer of one forward pass shares.

    guide `(V, guide_size)` float32, zeros where there is no prompt; task_index `(V,)`, -1 for no task group;
    task_gate `(V,)`, the straight-through factor of design section 2.3; token_mask `(V, S * N)`; token_index `(T,)`,
    the flat positions where token_mask is True.
    """

    guide: torch.Tensor
    task_index: torch.Tensor
    task_gate: torch.Tensor
    token_mask: torch.Tensor
    token_index: torch.Tensor


class CTMoERotaryEmbedding(nn.Module):
    """Rotary embedding (RoFormer) in float32: of slice positions in millimetres and, in some bases, of the plane.

    The slice position turns by angle_i = 2 pi p / wavelength_i. It has no parameters and is the identity at p = 0, so
    one slice passes as it did in the base.
    """

    def __init__(self, config: CTMoEVisionConfig):
        super().__init__()
        self.config = config

    def forward(self, slice_positions: torch.Tensor, num_tokens: int) -> tuple[tuple | None, tuple | None]:
        """Micrometres `(V, S)` to cosines and sines for volume layers `(V, 1, S * N, dim)` and slice layers
        `(1, 1, N, dim)`, None where nothing turns."""
        depth = self._depth_angles(slice_positions) if self.config.depth_rotary_dim else None
        # CODEPATH: Qwen-VL turns by row and column in every layer.
        if self.config.rotary_theta is None:
            if depth is None:
                return None, None
            return _cos_sin(depth.repeat_interleave(num_tokens, dim=1).unsqueeze(1)), None
        plane = self._plane_angles(slice_positions.device)
        volume = plane.expand(*slice_positions.shape, -1, -1)
        if depth is not None:
            # Pairs come by row and then by column, each from the highest frequency to the lowest.
            volume = volume.clone()
            pairs = self._depth_pairs(depth.shape[-1], plane.shape[-1])
            volume[..., pairs] += depth.unsqueeze(2)
        return _cos_sin(volume.flatten(1, 2).unsqueeze(1)), _cos_sin(plane[None, None])

    def _plane_angles(self, device: torch.device) -> torch.Tensor:
        """`(N, head_dim / 2)`: those of the row, then those of the column."""
        dim = self.config.hidden_size // self.config.num_attention_heads // 2
        exponents = torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim
        frequencies = 1.0 / self.config.rotary_theta**exponents
        places = torch.arange(self.config.grid_size, device=device, dtype=torch.float32)[:, None] * frequencies
        rows = places[:, None].expand(-1, len(places), -1)
        columns = places[None].expand(len(places), -1, -1)
        return torch.cat([rows, columns], dim=-1).flatten(0, 1)

    def _depth_pairs(self, number: int, available: int) -> list[int]:
        per_axis = available // 2
        half = (number + 1) // 2
        return [*range(per_axis - half, per_axis), *range(available - (number - half), available)]

    def _depth_angles(self, slice_positions: torch.Tensor) -> torch.Tensor:
        """`(V, S, depth_rotary_dim / 2)`."""
        shortest, longest = self.config.depth_wavelengths_mm
        wavelengths = torch.logspace(
            math.log10(shortest),
            math.log10(longest),
            self.config.depth_rotary_dim // 2,
            device=slice_positions.device,
            dtype=torch.float32,
        )
        millimetres = slice_positions.float() / 1000  # micrometres are integers: exact up to 16 m
        return 2 * math.pi * millimetres[..., None] / wavelengths


def _cos_sin(angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate_half(hidden_states: torch.Tensor) -> torch.Tensor:
    """Second half of the channels, negated, before the first half."""
    first, second = hidden_states.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the leading channels of queries or keys `(V, heads, S * N, head_dim)`; the rest stays as it is."""
    rotated, kept = states.split([cos.shape[-1], states.shape[-1] - cos.shape[-1]], dim=-1)
    rotated = rotated.float()
    rotated = rotated * cos + rotate_half(rotated) * sin
    return torch.cat([rotated.to(kept.dtype), kept], dim=-1)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
):
    attn_weights = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        attn_weights = attn_weights + attention_mask
    attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)
    attn_weights = nn.functional.dropout(attn_weights, p=dropout, training=module.training)
    attn_output = torch.matmul(attn_weights, value).transpose(1, 2).contiguous()
    return attn_output, attn_weights


class CTMoEScaleEmbedding(nn.Module):
    """W_s of design section 2.2: (log field of view, log slab) `(V, 2)` to an offset `(V, D)`, zero at first.

    Not a `nn.Linear`: the library initialises those itself, before this model could set one to zero.
    """

    def __init__(self, config: CTMoEVisionConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size, 2))

    def forward(self, volume_scale: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(volume_scale.to(self.weight.dtype), self.weight)


class CTMoEVisionEmbeddings(nn.Module):
    """The base's patch, class and position embeddings, plus the physical scale that the resize took away."""

    def __init__(self, config: CTMoEVisionConfig):
        super().__init__()
        self.config = config
        # CODEPATH: Qwen-VL has patches of two frames.
        size, convolution = (config.patch_size, config.patch_size), nn.Conv2d
        if config.temporal_patch_size > 1:
            size, convolution = (config.temporal_patch_size, *size), nn.Conv3d
        self.patch_embedding = convolution(
            config.num_channels, config.hidden_size, kernel_size=size, stride=size, bias=config.patch_bias
        )
        # CODEPATH: CLIP and InternViT have a class token, SigLIP has none.
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size)) if config.class_token else None
        # CODEPATH: Qwen2.5-VL has rotary positions only.
        self.position_embedding = (
            nn.Embedding(config.num_positions, config.hidden_size) if config.position_embedding else None
        )
        self.scale_embedding = CTMoEScaleEmbedding(config)

    def forward(self, pixel_values: torch.Tensor, volume_scale: torch.Tensor) -> torch.Tensor:
        """`(V, S, 3, height, width)` and `(V, 2)` to `(V * S, N, D)`."""
        num_volumes, num_slices = pixel_values.shape[:2]
        pixels = pixel_values.flatten(0, 1).to(self.patch_embedding.weight.dtype)
        if self.config.temporal_patch_size > 1:
            pixels = pixels.unsqueeze(2).expand(-1, -1, self.config.temporal_patch_size, -1, -1)
        embeddings = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        # The scale goes to the patches only. Added to the positions first: once per volume and not per slice.
        offset = self.scale_embedding(volume_scale).unsqueeze(1).expand(-1, embeddings.shape[1], -1)
        if self.class_embedding is not None:
            class_embeds = self.class_embedding.expand(num_volumes * num_slices, 1, -1)
            embeddings = torch.cat([class_embeds, embeddings], dim=1)
            offset = nn.functional.pad(offset, (0, 0, 1, 0))
        if self.position_embedding is not None:
            offset = self._positions(embeddings.device) + offset  # (V, N, D)
        embeddings = (embeddings.unflatten(0, (num_volumes, num_slices)) + offset.unsqueeze(1)).flatten(0, 1)
        return embeddings.contiguous()  # of a convolution, which leaves its channels last

    def _positions(self, device: torch.device) -> torch.Tensor:
        """`(N, D)`, looked up and not read from their weight, so that the hooks of offloading run."""
        positions = self.position_embedding(torch.arange(self.config.num_positions, device=device))
        side, grid = self.config.position_grid, self.config.grid_size
        # CODEPATH: Qwen3-VL resamples a grid of its own.
        if side is None or side == grid:
            return positions
        positions = positions.unflatten(0, (side, side)).permute(2, 0, 1)[None]
        resampled = nn.functional.interpolate(positions.float(), (grid, grid), mode="bilinear", align_corners=True)
        return resampled[0].permute(1, 2, 0).flatten(0, 1).to(positions.dtype)


class CTMoEVisionAttention(nn.Module):
    """The base's self-attention; with position embeddings it turns queries and keys by their slice position."""

    def __init__(self, config: CTMoEVisionConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        # CODEPATH: Qwen-VL keeps the three in one matrix.
        if config.fused_qkv:
            self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.attention_bias)
        else:
            self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)
            self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)
            self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.q_norm = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        if self.config.fused_qkv:
            queries, keys, values = self.qkv(hidden_states).chunk(3, dim=-1)
        else:
            queries, keys, values = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        queries = self.q_norm(queries).view(hidden_shape).transpose(1, 2)
        keys = self.k_norm(keys).view(hidden_shape).transpose(1, 2)
        values = values.view(hidden_shape).transpose(1, 2)
        if position_embeddings is not None:
            queries = apply_rotary(queries, *position_embeddings)
            keys = apply_rotary(keys, *position_embeddings)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            queries,
            keys,
            values,
            attention_mask,
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        return self.out_proj(attn_output.reshape(*input_shape, -1)), attn_weights


class CTMoEVisionMLP(nn.Module):
    """The base's FFN: in a MoE layer the always-on expert."""

    def __init__(self, config: CTMoEVisionConfig):
        super().__init__()
        self.act_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        # CODEPATH: Qwen2.5-VL has a gate.
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size) if config.gated_mlp else None
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.gate is not None:
            return self.fc2(self.act_fn(self.gate(hidden_states)) * self.fc1(hidden_states))
        return self.fc2(self.act_fn(self.fc1(hidden_states)))


@use_experts_implementation(has_gate=False, has_bias=True)
class CTMoEExperts(nn.Module):
    """All routed experts of one layer, `down(act(up(x)))` with biases: shared group first, then task after task.

    Differs from the language-side MoE of the library: no gate, biases, and a zero-initialised down projection.
    """

    def __init__(self, config: CTMoEVisionConfig):
        super().__init__()
        self.num_experts = config.num_shared_experts + config.num_task_experts * config.num_tasks
        width, hidden = config.moe_intermediate_size, config.hidden_size
        self.up_proj = nn.Parameter(torch.empty(self.num_experts, width, hidden))
        self.up_proj_bias = nn.Parameter(torch.empty(self.num_experts, width))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden, width))
        self.down_proj_bias = nn.Parameter(torch.empty(self.num_experts, hidden))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The library's `eager` path, for devices without a grouped matrix product. `(T, D)` in and out."""
        output = torch.zeros_like(hidden_states)
        # Unbound once: indexing would give every expert that is used a whole gradient of zeros.
        up, up_bias = self.up_proj.unbind(), self.up_proj_bias.unbind()
        down, down_bias = self.down_proj.unbind(), self.down_proj_bias.unbind()
        for expert in top_k_index.unique():
            token, slot = torch.where(top_k_index == expert)
            states = nn.functional.linear(hidden_states[token], up[expert], up_bias[expert])
            states = nn.functional.linear(self.act_fn(states), down[expert], down_bias[expert])
            output.index_add_(0, token, states * top_k_weights[token, slot, None])
        return output


class CTMoERouter(nn.Module):
    """Logits r = W (x * (1 + A g)) + U g of one group of experts per volume (design section 2.3).

    Holds the routers of `num_groups` groups and applies to every volume the one it was assigned. A is zero at first.
    The product W (x * (1 + A g)) is computed as (W * (1 + A g)) x: one small matrix per volume instead of a scaled
    copy of every token.
    """

    def __init__(self, config: CTMoEVisionConfig, num_groups: int, num_routed: int):
        super().__init__()
        hidden_size = config.hidden_size
        self.weight = nn.Parameter(torch.empty(num_groups, num_routed, hidden_size))
        # CODEPATH: guide_interaction "film" (the default) has A and U, "bias" U only, "none" neither.
        film, bias = config.guide_interaction == "film", config.guide_interaction != "none"
        self.guide_scale = nn.Parameter(torch.empty(num_groups, hidden_size, config.guide_size)) if film else None
        self.guide_bias = nn.Parameter(torch.empty(num_groups, num_routed, config.guide_size)) if bias else None

    def forward(self, hidden_states: torch.Tensor, guide: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        """float32 `(V, S * N, D)`, `(V, guide_size)` and group numbers `(V,)` to float32 logits `(V, S * N, E)`."""
        weight = self.weight[group].float()  # (V, E, D)
        guide = guide.float().unsqueeze(-1)  # (V, guide_size, 1); FSDP2 casts what a layer is given
        if self.guide_scale is not None:
            weight = weight * (1 + torch.matmul(self.guide_scale[group].float(), guide)).transpose(1, 2)
        logits = torch.matmul(hidden_states, weight.transpose(1, 2))
        if self.guide_bias is not None:
            logits = logits + torch.matmul(self.guide_bias[group].float(), guide).transpose(1, 2)
        return logits


class CTMoETextGuidedMoE(nn.Module):
    """The routed part of a TGH-MoE layer: Shared(x, g) + gate * Task_t(x, g), to be added to FFN(x)."""

    def __init__(self, config: CTMoEVisionConfig):
        super().__init__()
        self.config = config
        self.experts = CTMoEExperts(config)
        # A group of one expert needs no router: its weight is 1.
        shared = config.shared_group and config.num_experts > 1
        tasks = config.num_tasks > 0 and config.num_task_experts > 1
        # CODEPATH: the ablations "task level only" (no shared group or one expert each) and "token level only".
        self.shared_router = CTMoERouter(config, 1, config.num_experts) if shared else None
        self.group_router = CTMoERouter(config, config.num_tasks, config.num_task_experts) if tasks else None

    @property
    def is_active(self) -> bool:
        """False for task groups without a shared one while the task groups are off: the layer is its FFN then."""
        return self.config.shared_group or self.config.routes_tasks

    def forward(self, hidden_states: torch.Tensor, routing: CTMoERouting) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(V, S * N, D)` to the experts' output of the routed tokens `(T, D)` and the logits `(V, S * N, routed)`."""
        config = self.config
        with torch.autocast(hidden_states.device.type, enabled=False):
            states = hidden_states.float()
            if self.training and config.router_jitter > 0:
                states = states * torch.empty_like(states).uniform_(1 - config.router_jitter, 1 + config.router_jitter)
            logits, index, weights = [], [], []
            # CODEPATH: the ablation "task level only" has no shared group.
            if config.shared_group:
                index_, weights_ = self._route(
                    self.shared_router, states, routing.guide, torch.zeros_like(routing.task_index), logits
                )
                index.append(index_)
                weights.append(weights_)
            # CODEPATH: the ablation "token level only" has no task groups, the first stage leaves them out.
            if config.routes_tasks:
                group = routing.task_index.clamp(min=0)
                index_, weights_ = self._route(self.group_router, states, routing.guide, group, logits)
                first = config.num_shared_experts + config.num_task_experts * group
                index.append(index_ + first[:, None, None])
                # Volumes without a task group pass through one with weight 0, which keeps one call for all.
                weights.append(weights_ * (routing.task_gate * (routing.task_index >= 0))[:, None, None])
        top_k_index = torch.cat(index, dim=-1).flatten(0, 1).index_select(0, routing.token_index)
        top_k_weights = torch.cat(weights, dim=-1).flatten(0, 1).index_select(0, routing.token_index)
        routed = hidden_states.flatten(0, 1).index_select(0, routing.token_index)
        output = self.experts(routed, top_k_index, top_k_weights.to(routed.dtype))
        return output, torch.cat(logits, dim=-1) if logits else None

    def _route(self, router, states, guide, group, all_logits) -> tuple[torch.Tensor, torch.Tensor]:
        """Expert numbers inside the group and their weights, both `(V, S * N, k)`; logits are appended to the list."""
        if router is None:
            shape = (*states.shape[:2], 1)
            return states.new_zeros(shape, dtype=torch.long), states.new_ones(shape)
        logits = router(states, guide, group)
        all_logits.append(logits)
        weights, index = logits.softmax(dim=-1).topk(self.config.num_experts_per_tok, dim=-1)
        # CODEPATH: renormalised weights are an option for two and more experts per token, off by default.
        if self.config.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return index, weights


class CTMoEVisionLayer(GradientCheckpointingLayer):
    """A layer of the base's ViT. A volume layer attends over all slices; a MoE layer adds the TGH-MoE to the FFN."""

    def __init__(self, config: CTMoEVisionConfig, layer_idx: int):
        super().__init__()
        norm = nn.RMSNorm if config.norm_type == "rms_norm" else nn.LayerNorm
        self.config = config
        self.is_volume_layer = layer_idx in config.volume_layers
        self.has_windows = config.window_size is not None and layer_idx not in config.full_attention_layers
        self.self_attn = CTMoEVisionAttention(config)
        self.layer_norm1 = norm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CTMoEVisionMLP(config)
        self.layer_norm2 = norm(config.hidden_size, eps=config.layer_norm_eps)
        # CODEPATH: layers outside moe_layers, and all layers of the dense ablation, have an FFN only.
        self.moe = CTMoETextGuidedMoE(config) if layer_idx in config.moe_layers else None
        self.layer_scale1 = nn.Parameter(torch.empty(config.hidden_size)) if config.use_layer_scale else None
        self.layer_scale2 = nn.Parameter(torch.empty(config.hidden_size)) if config.use_layer_scale else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        num_slices: int,
        *routing: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        slice_position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        slicewise: bool = False,
        ffn_output: torch.Tensor | None = None,
        output_ffn: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """`(V * S, N, D)` in and out, and a MoE layer's router logits. Mask and positions are for volume layers.

        With `output_ffn` also what no prompt steers, `(2, V * S, N, D)`: states after attention and FFN output. Given
        those as `hidden_states` and `ffn_output`, only the experts run. With `slicewise` it is the base's layer,
        whatever it is here.

        The fields of `CTMoERouting` come one by one: reentrant checkpointing gives a gradient to tensors among the
        positional arguments only.
        """
        routing = CTMoERouting(*routing)
        slice_shape = hidden_states.shape
        volume_shape = (-1, num_slices * slice_shape[1], slice_shape[2])
        if self.is_volume_layer and not slicewise:
            hidden_states = hidden_states.view(volume_shape)
        else:
            attention_mask, position_embeddings = None, slice_position_embeddings

        if ffn_output is None:
            residual = hidden_states
            hidden_states = self.layer_norm1(hidden_states)
            # CODEPATH: Qwen2.5-VL attends in windows in most layers.
            if self.has_windows:
                hidden_states = self._to_windows(hidden_states)
                attention_mask, position_embeddings = self._window_inputs(
                    len(residual), attention_mask, position_embeddings
                )
            hidden_states, _ = self.self_attn(
                hidden_states,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                **kwargs,
            )
            if self.has_windows:
                hidden_states = self._from_windows(hidden_states, len(residual))
            if self.layer_scale1 is not None:
                hidden_states = self.layer_scale1 * hidden_states
            hidden_states = residual + hidden_states

        residual = hidden_states
        normed = self.layer_norm2(hidden_states)
        hidden_states = self.mlp(normed) if ffn_output is None else ffn_output.view_as(normed)
        unsteered = torch.stack([residual, hidden_states]).view(2, *slice_shape) if output_ffn else None
        router_logits = None
        if self.moe is not None and self.moe.is_active and not slicewise and routing.token_index.shape[0] > 0:
            expert_output, router_logits = self.moe(normed, routing)
            flat = hidden_states.flatten(0, 1)
            hidden_states = flat.index_add(0, routing.token_index, expert_output.to(flat.dtype)).view_as(hidden_states)
        if self.layer_scale2 is not None:
            hidden_states = self.layer_scale2 * hidden_states
        hidden_states = residual + hidden_states
        return hidden_states.view(slice_shape), router_logits, unsteered

    def _to_windows(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(batch_size, S * N, D)` to `(batch_size * windows, S * window tokens, D)`."""
        size, number = self.config.window_size, self.config.grid_size // self.config.window_size
        grid = tokens.unflatten(1, (-1, number, size, number, size))
        return grid.permute(0, 2, 4, 1, 3, 5, 6).flatten(3, 5).flatten(0, 2)

    def _from_windows(self, tokens: torch.Tensor, batch_size: int) -> torch.Tensor:
        size, number = self.config.window_size, self.config.grid_size // self.config.window_size
        grid = tokens.unflatten(0, (batch_size, number, number)).unflatten(3, (-1, size, size))
        return grid.permute(0, 3, 1, 4, 2, 5, 6).flatten(1, 5)

    def _window_inputs(
        self, batch_size: int, mask: torch.Tensor | None, position_embeddings: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor | None, tuple[torch.Tensor, torch.Tensor] | None]:
        """Mask and positions of every window."""
        if mask is not None:
            if not isinstance(mask, torch.Tensor) or mask.ndim != 4 or mask.shape[2] != 1:
                raise ModelError("attention", "windows need sdpa or eager", "Load with attn_implementation sdpa")
            mask = self._to_windows(mask[:, 0, 0, :, None])[:, None, None, :, 0]
        if position_embeddings is not None:
            windows = [self._to_windows(part[:, 0]).unsqueeze(1) for part in position_embeddings]
            # Slices share theirs: one set for every window, repeated for every slice.
            repeats = batch_size // len(position_embeddings[0])
            position_embeddings = tuple(part.repeat(repeats, 1, 1, 1) for part in windows)
        return mask, position_embeddings


class CTMoEGuideEncoder(nn.Module):
    """Prompt embeddings to the guide: attention pooling with a learned query, LayerNorm, Linear."""

    def __init__(self, config: CTMoEConfig):
        super().__init__()
        hidden_size = config.text_config.hidden_size
        self.query = nn.Parameter(torch.empty(hidden_size))
        self.norm = nn.LayerNorm(hidden_size)
        self.proj = nn.Linear(hidden_size, config.vision_config.guide_size)

    def forward(self, embeds: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """`(V, L, text_hidden_size)` and `(V, L)` to float32 `(V, guide_size)`; zeros for an empty prompt."""
        mask = attention_mask.bool()
        scores = torch.matmul(embeds, self.query).float() * embeds.shape[-1] ** -0.5
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        pooled = torch.matmul(scores.softmax(dim=-1).to(embeds.dtype).unsqueeze(1), embeds).squeeze(1)
        return self.proj(self.norm(pooled)).float() * mask.any(dim=-1, keepdim=True)


class CTMoETaskRouter(nn.Linear):
    """Guide to one logit per task, in float32 whatever the dtype of the model. One per model."""

    def __init__(self, config: CTMoEConfig):
        super().__init__(config.vision_config.guide_size, config.vision_config.num_tasks)

    def forward(self, guide: torch.Tensor) -> torch.Tensor:
        with torch.autocast(guide.device.type, enabled=False):
            return nn.functional.linear(guide, self.weight.float(), self.bias.float())


class CTMoEOffsetRMSNorm(nn.Module):
    """RMS norm in float32 whose scale is 1 + its weight, as in Gemma."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        states = hidden_states.float()
        states = states * torch.rsqrt(states.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return (states * (1 + self.weight.float())).to(hidden_states.dtype)


class CTMoEMultiModalProjector(nn.Module):
    """The base's projector, or one like it from another encoder of width `hidden_size`: norm, one or two layers."""

    def __init__(self, config: CTMoEConfig, hidden_size: int | None = None, norm: str | None = None):
        super().__init__()
        bias, text_size = config.multimodal_projector_bias, config.text_config.hidden_size
        inner_size = text_size if config.projector_layers == 1 else config.projector_hidden_size or text_size
        norm = norm or config.projector_norm
        if hidden_size is None:
            stacked = config.merge_size**2 if config.merge_mode == "stack" else 1
            hidden_size = config.vision_config.hidden_size * stacked
        # CODEPATH: InternVL and Gemma 3 have a norm, LLaVA and PaliGemma have none.
        self.norm = nn.Identity()
        if norm == "layer_norm":
            self.norm = nn.LayerNorm(hidden_size, eps=config.projector_norm_eps)
        elif norm == "offset_rms_norm":
            self.norm = CTMoEOffsetRMSNorm(hidden_size, eps=config.projector_norm_eps)
        self.linear_1 = nn.Linear(hidden_size, inner_size, bias=bias)
        # CODEPATH: Gemma 3 and PaliGemma have one layer.
        self.act = ACT2FN[config.projector_hidden_act] if config.projector_layers == 2 else nn.Identity()
        self.linear_2 = nn.Linear(inner_size, text_size, bias=bias) if config.projector_layers == 2 else nn.Identity()

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(self.norm(image_features))))


class CTMoESliceScoring(nn.Module):
    """TG-IS: how much the prompt asks for each slice (design section 2.4, arXiv 2411.12783).

        z_j = a * mean(3D tokens of the cell that holds slice j) + (1 - a) * mean(2D tokens of slice j)
        s   = masked softmax_j( <norm(z_j - mean_j z), norm(t)> / tau ),  tau learned from 0.07      "centred"
        s   = masked softmax_j( <z_j, t> / 5 )                                                        "paper"

    with t = T g and a = `tgis_alpha`. T has no bias: without a prompt all slices count alike. What all slices share
    would swamp what differs, so the centred form takes it away.
    """

    def __init__(self, config: CTMoEConfig):
        super().__init__()
        self.config = config
        # Of this module itself and not of one inside, whose hooks of offloading would not run.
        self.text_weight = nn.Parameter(torch.empty(config.text_config.hidden_size, config.vision_config.guide_size))
        # CODEPATH: the published form has a fixed temperature.
        self.log_temperature = nn.Parameter(torch.empty(1)) if config.tgis_variant == "centred" else None

    def forward(
        self, cell_means: torch.Tensor, slice_means: torch.Tensor, guide: torch.Tensor, slice_mask: torch.Tensor
    ) -> torch.Tensor:
        """3D and 2D means per slice `(V, S, D_text)`, `(V, guide_size)` and `(V, S)` to float32 scores `(V, S)`."""
        with torch.autocast(guide.device.type, enabled=False):
            alpha = self.config.tgis_alpha
            states = alpha * cell_means.float() + (1 - alpha) * slice_means.float()
            target = nn.functional.linear(guide, self.text_weight.float())
            # CODEPATH: the published form has no centring and no norms.
            if self.log_temperature is None:
                logits = torch.matmul(states, target.unsqueeze(-1)).squeeze(-1) / self.config.tgis_temperature
            else:
                weight = slice_mask.unsqueeze(-1).float()
                mean = (states * weight).sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True).clamp(min=1)
                states = states - mean
                # Rounding must not make equal slices differ: what is 1e-5 of the mean and less keeps its size.
                floor = 1e-5 * mean.norm(dim=-1, keepdim=True) + torch.finfo(states.dtype).tiny
                states = states / torch.maximum(states.norm(dim=-1, keepdim=True), floor)
                target = nn.functional.normalize(target, dim=-1)
                logits = torch.matmul(states, target.unsqueeze(-1)).squeeze(-1) / self.log_temperature.float().exp()
            return logits.masked_fill(~slice_mask, torch.finfo(logits.dtype).min).softmax(dim=-1) * slice_mask


@auto_docstring(custom_intro="Flags and weight initialisation shared by all CT-MoE models.")
class CTMoEPreTrainedModel(PreTrainedModel):
    config: CTMoEConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["CTMoEVisionEmbeddings", "CTMoEVisionLayer", "CTMoEVolumeEncoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        std = self.config.get_text_config().initializer_range
        if isinstance(module, CTMoEVisionEmbeddings):
            if module.class_embedding is not None:
                init.normal_(module.class_embedding, std=std)
        elif isinstance(module, CTMoEScaleEmbedding):
            init.zeros_(module.weight)  # a converted model computes what its base computes
        elif isinstance(module, CTMoEExperts):
            init.normal_(module.up_proj, std=std)
            init.zeros_(module.up_proj_bias)
            init.zeros_(module.down_proj)  # likewise
            init.zeros_(module.down_proj_bias)
        elif isinstance(module, CTMoERouter):
            init.normal_(module.weight, std=std)
            if module.guide_scale is not None:
                init.zeros_(module.guide_scale)
            if module.guide_bias is not None:
                init.normal_(module.guide_bias, std=std)
        elif isinstance(module, CTMoEVisionLayer):
            if module.layer_scale1 is not None:
                init.ones_(module.layer_scale1)
                init.ones_(module.layer_scale2)
        elif isinstance(module, CTMoEOffsetRMSNorm):
            init.zeros_(module.weight)
        elif isinstance(module, CTMoEModel):
            for separator in (module.end_token, module.row_token, module.view_token):
                if separator is not None:
                    init.normal_(separator, std=std)
        elif isinstance(module, CTMoEGuideEncoder):
            init.normal_(module.query, std=std)
        elif isinstance(module, CTMoESliceScoring):
            init.normal_(module.text_weight, std=std)
            if module.log_temperature is not None:
                init.constant_(module.log_temperature, math.log(module.config.tgis_temperature))
        elif isinstance(module, CTMoEVolumeEmbeddings):
            init.normal_(module.position_embedding, std=std)
            if module.class_embedding is not None:
                init.normal_(module.class_embedding, std=std)


@auto_docstring(custom_intro="The vision encoder: the base's ViT, 3D in its volume layers, TGH-MoE in its MoE layers.")
class CTMoEVisionModel(CTMoEPreTrainedModel):
    config: CTMoEVisionConfig
    base_model_prefix = "vision_tower"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _input_embed_layer = "patch_embedding"
    _can_record_outputs = {
        "hidden_states": OutputRecorder(CTMoEVisionLayer, num_hidden_layers_key="num_read_layers"),
        "attentions": CTMoEVisionAttention,
        "router_logits": OutputRecorder(CTMoEVisionLayer, index=1),
    }

    def __init__(self, config: CTMoEVisionConfig):
        super().__init__(config)
        # `norm_type` is that of the layers.
        self.embeddings = CTMoEVisionEmbeddings(config)
        self.pre_layernorm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.pre_layernorm else nn.Identity()
        )
        self.layers = nn.ModuleList(CTMoEVisionLayer(config, i) for i in range(config.num_read_layers))
        post_norm = nn.RMSNorm if config.post_norm_type == "rms_norm" else nn.LayerNorm
        self.post_layernorm = (
            post_norm(config.hidden_size, eps=config.layer_norm_eps) if config.post_layernorm else nn.Identity()
        )
        self.rotary = CTMoERotaryEmbedding(config)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    @auto_docstring(custom_args=VOLUME_ARGS)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        slice_mask: torch.Tensor | None = None,
        slice_positions: torch.Tensor | None = None,
        patch_mask: torch.Tensor | None = None,
        volume_scale: torch.Tensor | None = None,
        guide: torch.Tensor | None = None,
        task_index: torch.Tensor | None = None,
        task_gate: torch.Tensor | None = None,
        prefix_hidden_states: torch.Tensor | None = None,
        moe_hidden_states: torch.Tensor | None = None,
        output_prefix_hidden_states: bool = False,
        output_moe_hidden_states: bool = False,
        slicewise: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CTMoEVisionOutput:
        first_moe_layer = min(self.config.moe_layers, default=self.config.num_read_layers)
        first_volume_layer = min(self.config.volume_layers, default=self.config.num_read_layers)
        ffn_output = None
        if moe_hidden_states is not None:
            prefix_hidden_states, ffn_output = moe_hidden_states[0], moe_hidden_states[1].flatten(0, 1)
        if prefix_hidden_states is None:
            self._check_pixel_values(pixel_values)
            num_volumes, num_slices = pixel_values.shape[:2]
            self._check_shapes(num_volumes, num_slices, slice_mask, slice_positions, patch_mask, volume_scale)
            if volume_scale is None:
                volume_scale = pixel_values.new_zeros(num_volumes, 2)
            hidden_states = self.pre_layernorm(self.embeddings(pixel_values, volume_scale))
            first_layer = 0
        else:
            num_volumes, num_slices = prefix_hidden_states.shape[:2]
            self._check_shapes(num_volumes, num_slices, slice_mask, slice_positions, patch_mask, volume_scale)
            hidden_states = prefix_hidden_states.flatten(0, 1)
            first_layer = first_volume_layer if slicewise else first_moe_layer
            if any(layer_idx < first_layer for layer_idx in self.config.deepstack_layers):
                raise ModelError(
                    "prefix_hidden_states",
                    "of a base whose language model reads earlier layers as well",
                    "Pass pixel_values: this kind of base encodes a scan anew for every question",
                )
        device = hidden_states.device
        num_tokens = hidden_states.shape[1]
        if slice_mask is None:
            slice_mask = torch.ones(num_volumes, num_slices, dtype=torch.bool, device=device)
        if slice_positions is None:
            slice_positions = torch.zeros(num_volumes, num_slices, dtype=torch.int32, device=device)

        attention_mask = self._attention_mask(hidden_states.unflatten(0, (num_volumes, num_slices)), slice_mask)
        position_embeddings, slice_position_embeddings = self.rotary(slice_positions, num_tokens)
        routing = self._prepare_routing(slice_mask, patch_mask, num_tokens, guide, task_index, task_gate)

        router_logits = ()
        # Kept only on request: they would stay in memory until the last layer.
        prefixes, unsteered = {}, None
        deepstack = ()
        for layer_idx, layer in enumerate(self.layers[first_layer:], start=first_layer):
            is_before = layer_idx in (first_moe_layer, first_volume_layer) and ffn_output is None
            if output_prefix_hidden_states and is_before:
                prefixes[layer_idx] = hidden_states
            output_ffn = output_moe_hidden_states and layer_idx == first_moe_layer
            hidden_states, layer_logits, layer_unsteered = layer(
                hidden_states,
                num_slices,
                *routing,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                slice_position_embeddings=slice_position_embeddings,
                slicewise=slicewise,
                ffn_output=ffn_output,
                output_ffn=output_ffn,
                **kwargs,
            )
            ffn_output = None
            if layer_idx in self.config.deepstack_layers:
                deepstack += (hidden_states.unflatten(0, (num_volumes, num_slices)),)
            if output_ffn:
                unsteered = layer_unsteered.unflatten(1, (num_volumes, num_slices))
            if layer_logits is not None:
                router_logits += (layer_logits,)
        if output_prefix_hidden_states:
            prefixes[self.config.num_read_layers] = hidden_states  # of a model without such a layer
        slice_shape = (num_volumes, num_slices, num_tokens, -1)
        prefixes = {layer_idx: states.view(slice_shape) for layer_idx, states in prefixes.items()}
        return CTMoEVisionOutput(
            last_hidden_state=self.post_layernorm(hidden_states).view(slice_shape),
            router_logits=router_logits or None,
            token_mask=routing.token_mask.long(),
            prefix_hidden_states=prefixes.get(first_moe_layer),
            moe_hidden_states=unsteered,
            deepstack_hidden_states=deepstack or None,
            slice_prefix_hidden_states=prefixes.get(first_volume_layer),
        )

    def _attention_mask(self, hidden_states: torch.Tensor, slice_mask: torch.Tensor):
        """Hides padded slices from all queries, whatever the backend takes; None where nothing is padded."""
        embeds = hidden_states.flatten(1, 2)  # (V, S * N, D)
        token_mask = slice_mask.repeat_interleave(hidden_states.shape[2], dim=1)
        # Built for one query: sdpa and eager broadcast it, and 64 slices of 577 tokens would need 1.4 GB for all.
        mask = create_bidirectional_mask(self.config, embeds[:, :1], token_mask, encoder_hidden_states=embeds)
        if mask is not None and not isinstance(mask, torch.Tensor):  # the block mask of flex attention does not
            mask = create_bidirectional_mask(self.config, embeds, token_mask)
        return mask

    def _check_pixel_values(self, pixel_values: torch.Tensor) -> None:
        size = self.config.image_size
        expected = (self.config.num_channels, size, size)
        if pixel_values.ndim != 5 or tuple(pixel_values.shape[2:]) != expected:
            raise ModelError(
                "pixel_values",
                f"shape {tuple(pixel_values.shape)}, expected (volumes, slices, {', '.join(map(str, expected))})",
                "Make them with the model's own processor",
            )

    def _check_shapes(
        self,
        num_volumes: int,
        num_slices: int,
        slice_mask: torch.Tensor | None,
        slice_positions: torch.Tensor | None,
        patch_mask: torch.Tensor | None,
        volume_scale: torch.Tensor | None,
    ) -> None:
        if slice_positions is None and num_slices > 1:
            raise ModelError(
                "slice_positions",
                f"missing for volumes of {num_slices} slices",
                "Pass what the processor returned: the model places slices by millimetres, not by number",
            )
        slices, grid = (num_volumes, num_slices), self.config.grid_size
        for name, value, shape in (
            ("slice_mask", slice_mask, slices),
            ("slice_positions", slice_positions, slices),
            ("patch_mask", patch_mask, (*slices, grid, grid)),
            ("volume_scale", volume_scale, (num_volumes, 2)),
        ):
            if value is not None and tuple(value.shape) != shape:
                raise ModelError(
                    name, f"shape {tuple(value.shape)}, expected {shape}", "Make it with the model's own processor"
                )

    def _prepare_routing(
        self,
        slice_mask: torch.Tensor,
        patch_mask: torch.Tensor | None,
        num_tokens: int,
        guide: torch.Tensor | None,
        task_index: torch.Tensor | None,
        task_gate: torch.Tensor | None,
    ) -> CTMoERouting:
        num_volumes = slice_mask.shape[0]
        token_mask = slice_mask[..., None].expand(-1, -1, num_tokens)
        if patch_mask is not None:
            # The class token stands for its slice and is routed with it.
            num_class_tokens = num_tokens - patch_mask.shape[-2] * patch_mask.shape[-1]
            patches = nn.functional.pad(patch_mask.flatten(2), (num_class_tokens, 0), value=True)
            token_mask = token_mask & patches
        token_mask = token_mask.flatten(1)
        if guide is None:
            guide = torch.zeros(num_volumes, self.config.guide_size, device=slice_mask.device)
        if task_index is None:
            task_index = torch.full((num_volumes,), -1, device=slice_mask.device)
        if task_gate is None:
            task_gate = torch.ones(num_volumes, device=slice_mask.device)
        return CTMoERouting(
            guide=guide.float(),
            task_index=task_index,
            task_gate=task_gate,
            token_mask=token_mask,
            token_index=token_mask.flatten().nonzero().squeeze(-1),
        )


class CTMoEVolumeEmbeddings(nn.Module):
    """Patches of several slices, placed by a learned table whose depth is stretched over the volume."""

    def __init__(self, config: CTMoEVolumeEncoderConfig):
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv3d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Parameter(torch.empty(*config.grid_size, config.hidden_size))
        # CODEPATH: encoders trained by contrast (M3D-CLIP) have a class token, others need none.
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size)) if config.class_token else None

    def forward(self, pixel_values: torch.Tensor, slice_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(V, S, 3, height, width)` to tokens `(V, [1 +] depth * rows * columns, D)` and patches along z `(V,)`."""
        size, step = self.config.image_size, self.config.patch_size[0]
        num_volumes, num_slices = slice_mask.shape
        depth = -(-num_slices // step)
        # The last patch of a volume is filled with its last slice.
        last = (slice_mask.sum(dim=1, keepdim=True) - 1).clamp(min=0)
        index = torch.minimum(torch.arange(depth * step, device=slice_mask.device).expand(num_volumes, -1), last)
        volumes = torch.arange(num_volumes, device=slice_mask.device).unsqueeze(1)
        if pixel_values.shape[-1] != size:
            pixel_values = nn.functional.interpolate(
                pixel_values.flatten(0, 1).float(), (size, size), mode="bilinear", antialias=True
            ).unflatten(0, (num_volumes, num_slices))
        pixel_values = pixel_values[volumes, index].transpose(1, 2)  # (V, 3, depth * step, size, size)
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype)).permute(0, 2, 3, 4, 1)
        depths = (slice_mask.sum(dim=1) + step - 1) // step
        embeddings = (patches + self._positions(depth, depths)).flatten(1, 3)
        if self.class_embedding is not None:
            embeddings = torch.cat([self.class_embedding.expand(num_volumes, 1, -1), embeddings], dim=1)
        return embeddings, depths

    def _positions(self, depth: int, depths: torch.Tensor) -> torch.Tensor:
        """`(V, depth, rows, columns, D)`: the table's depth interpolated to span the patches of each volume."""
        table = self.position_embedding
        place = (torch.arange(depth, device=depths.device) + 0.5) * table.shape[0] / depths.clamp(min=1)[:, None] - 0.5
        place = place.clamp(0, table.shape[0] - 1)
        below = place.floor().long()
        share = (place - below)[..., None, None, None].to(table.dtype)
        return table[below] * (1 - share) + table[(below + 1).clamp(max=table.shape[0] - 1)] * share


class CTMoEVolumeEncoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: CTMoEVolumeEncoderConfig):
        super().__init__()
        self.self_attn = CTMoEVisionAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CTMoEVisionMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attn_output, _ = self.self_attn(self.layer_norm1(hidden_states), attention_mask=attention_mask, **kwargs)
        hidden_states = hidden_states + attn_output
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


@auto_docstring(custom_intro="The second encoder of Med-2E3: a ViT with 3D patches, such as M3D-CLIP's.")
class CTMoEVolumeEncoder(CTMoEPreTrainedModel):
    config: CTMoEVolumeEncoderConfig
    base_model_prefix = "volume_encoder"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _input_embed_layer = "patch_embedding"
    _can_record_outputs = {
        "hidden_states": OutputRecorder(CTMoEVolumeEncoderLayer),
        "attentions": CTMoEVisionAttention,
    }

    def __init__(self, config: CTMoEVolumeEncoderConfig):
        super().__init__(config)
        self.embeddings = CTMoEVolumeEmbeddings(config)
        self.layers = nn.ModuleList(CTMoEVolumeEncoderLayer(config) for _ in range(config.num_hidden_layers))
        # CODEPATH: M3D-LaMed reads after the last norm, Med-2E3 before it.
        self.post_layernorm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.post_layernorm else nn.Identity()
        )
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    @auto_docstring(custom_args=VOLUME_ARGS)
    def forward(
        self,
        pixel_values: torch.Tensor,
        slice_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        r"""
        Returns:
            [`BaseModelOutput`] with `last_hidden_state` of shape `(num_volumes, 1 + depth * rows * columns,
            hidden_size)`, the class token (if there is one) first.
        """
        if slice_mask is None:
            slice_mask = torch.ones(pixel_values.shape[:2], dtype=torch.bool, device=pixel_values.device)
        hidden_states, depths = self.embeddings(pixel_values, slice_mask)
        _, rows, columns = self.config.grid_size
        places = torch.arange(hidden_states.shape[1], device=depths.device) - int(self.config.class_token)
        token_mask = places < (depths * rows * columns)[:, None]
        attention_mask = create_bidirectional_mask(self.config, hidden_states, token_mask)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=attention_mask, **kwargs)
        return BaseModelOutput(last_hidden_state=self.post_layernorm(hidden_states))


@auto_docstring(custom_intro="Vision encoder, projector and language model: volumes and text in, hidden states out.")
class CTMoEModel(CTMoEPreTrainedModel):
    def __init__(self, config: CTMoEConfig):
        super().__init__(config)
        self.vision_tower = CTMoEVisionModel._from_config(config.vision_config)
        self.multi_modal_projector = CTMoEMultiModalProjector(config)
        # CODEPATH: in Qwen3-VL the language model reads several layers.
        self.deepstack_projectors = nn.ModuleList(
            CTMoEMultiModalProjector(config, norm="layer_norm") for _ in config.vision_config.deepstack_layers
        )
        # CODEPATH: LLaVA-OneVision closes an image with a learned token; Phi-3-V closes rows, before the projector.
        ends, rows = config.separators == "end", config.separators == "rows"
        self.end_token = nn.Parameter(torch.empty(config.text_config.hidden_size)) if ends else None
        width = self.multi_modal_projector.linear_1.in_features
        self.row_token = nn.Parameter(torch.empty(width)) if rows else None
        self.view_token = nn.Parameter(torch.empty(width)) if rows else None
        self.language_model = AutoModel.from_config(config.text_config)
        vision_config = config.vision_config
        # CODEPATH: TG-IS is off by default.
        self.slice_scoring = CTMoESliceScoring(config) if config.slice_scoring == "tgis" else None
        self.volume_encoder = self.volume_projector = None
        # CODEPATH: the dual-encoder system of Med-2E3.
        if config.volume_encoder_config is not None:
            self.volume_encoder = CTMoEVolumeEncoder._from_config(config.volume_encoder_config)
            self.volume_projector = CTMoEMultiModalProjector(config, config.volume_encoder_config.hidden_size)
        # CODEPATH: the dense ablation, and token-level experts without guide, read no prompt.
        self.guide_encoder = CTMoEGuideEncoder(config) if config.reads_prompt else None
        # CODEPATH: the dense and the token-level ablations have no task groups.
        self.task_router = CTMoETaskRouter(config) if vision_config.moe_layers and vision_config.num_tasks else None
        self.post_init()

    @torch.no_grad()
    def regroup_tasks(self, tasks: list[str], sources: list[int | None]) -> None:
        """Makes `tasks` the tasks of the model: group i copies the present group `sources[i]`, or is new (`None`)."""
        CTMoEConfig(**{**self.config.to_dict(), "tasks": tasks})  # refuses what cannot be, before anything changes
        if any(parameter.is_meta for parameter in self.parameters()):
            raise ModelError("tasks", "weights of the model are offloaded", "Load it without a device_map")
        for name, _ in self.named_parameters():
            if (".moe." in name or "task_router." in name) and any(part in name for part in ADAPTER_PARTS):
                raise ModelError("tasks", f"an adapter holds {name}", "Merge it first: merge_and_unload() of PEFT")
        vision_config = self.vision_tower.config
        self.config.tasks = list(tasks)
        self.config.vision_config.num_tasks = vision_config.num_tasks = len(tasks)
        shared_experts = vision_config.num_shared_experts
        for layer in self.vision_tower.layers:
            if layer.moe is None:
                continue
            moe = self._like(layer.moe, CTMoETextGuidedMoE(vision_config))
            old = dict(layer.moe.named_parameters())
            for name, parameter in moe.named_parameters():
                if name in old:
                    # All experts of a layer are numbered through; routers have a row per group.
                    first, step = 0, 1
                    if name.startswith("experts."):
                        first, step = shared_experts, vision_config.num_task_experts
                    elif name.startswith("shared_router."):
                        first = len(parameter)
                    _copy_groups(old[name], parameter, first, step, sources)
            layer.moe = moe
        self.task_router = self._regrouped_task_router(sources)
        # CODEPATH: models whose experts listen to no prompt have no guide.
        if not self.config.reads_prompt:
            self.guide_encoder = None
        elif self.guide_encoder is None:
            self.guide_encoder = self._like(self.multi_modal_projector, CTMoEGuideEncoder(self.config))

    def _regrouped_task_router(self, sources: list[int | None]) -> "CTMoETaskRouter | None":
        # CODEPATH: the dense and the token-level ablations have no task groups.
        if not self.config.vision_config.moe_layers or not sources:
            return None
        old = self.task_router
        router = self._like(self.multi_modal_projector if old is None else old, CTMoETaskRouter(self.config))
        if old is not None:
            for name in ("weight", "bias"):
                rows, new_rows = getattr(old, name), getattr(router, name)
                _copy_groups(rows, new_rows, 0, 1, sources)
                for index, source in enumerate(sources):
                    if source is None:
                        new_rows[index] = rows.mean(dim=0)
            for index, source in enumerate(sources):
                # A group that is new takes no prompt from the others: their best logit is above the mean of all.
                if source is None or source in sources[:index]:
                    router.bias[index] -= 1
        return router

    def _like(self, old: nn.Module, new: nn.Module) -> nn.Module:
        """`new`, initialised, with dtype, device, mode and frozen parameters of `old`."""
        reference = next(old.parameters())
        new.apply(self.vision_tower._init_weights)
        new.to(reference.device, reference.dtype).train(old.training)
        frozen = {name for name, parameter in old.named_parameters() if not parameter.requires_grad}
        for name, parameter in new.named_parameters():
            parameter.requires_grad_(name not in frozen)
        return new

    @merge_with_config_defaults
    @can_return_tuple
    @auto_docstring(
        custom_intro="Encodes volumes: vision encoder, pooling, projector; with the prompt as guide.",
        custom_args=VOLUME_ARGS,
    )
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        slice_mask: torch.Tensor | None = None,
        slice_positions: torch.Tensor | None = None,
        patch_mask: torch.Tensor | None = None,
        volume_scale: torch.Tensor | None = None,
        guide_input_ids: torch.Tensor | None = None,
        guide_attention_mask: torch.Tensor | None = None,
        task_ids: torch.Tensor | None = None,
        prefix_hidden_states: torch.Tensor | None = None,
        moe_hidden_states: torch.Tensor | None = None,
        slice_hidden_states: torch.Tensor | None = None,
        volume_hidden_states: torch.Tensor | None = None,
        output_prefix_hidden_states: bool = False,
        output_router_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | CTMoEImageFeatures:
        scores_slices = self.config.slice_scoring == "tgis"
        inputs = self._check_encoded(
            pixel_values, prefix_hidden_states, moe_hidden_states, slice_hidden_states, volume_hidden_states
        )
        self._check_rows(inputs.shape[0], guide_input_ids, guide_attention_mask, task_ids)
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        if task_ids is None:
            task_ids = torch.full((inputs.shape[0],), -100, device=inputs.device)
        if slice_mask is None:
            slice_mask = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
        slice_mask = slice_mask.bool()
        guide, has_guide = self._encode_guide(guide_input_ids, guide_attention_mask)
        task_logits, task_index, task_gate = self._choose_task(guide, has_guide, task_ids)
        volume = {
            "pixel_values": pixel_values,
            "slice_mask": slice_mask,
            "slice_positions": slice_positions,
            "patch_mask": patch_mask,
            "volume_scale": volume_scale,
        }
        outputs = self.vision_tower(
            **volume,
            guide=guide,
            task_index=task_index,
            task_gate=task_gate,
            prefix_hidden_states=prefix_hidden_states,
            moe_hidden_states=moe_hidden_states,
            output_prefix_hidden_states=output_prefix_hidden_states or scores_slices,
            output_moe_hidden_states=output_prefix_hidden_states,
            return_dict=True,
            **kwargs,
        )
        slice_scores = None
        # CODEPATH: TG-IS is off by default.
        if scores_slices:
            if slice_hidden_states is None:
                slice_hidden_states = self._encode_slices(volume, outputs)
            if volume_hidden_states is None and self.volume_encoder is not None:
                volume_hidden_states = self._encode_volumes(pixel_values, slice_mask)
            visual_tokens, slice_scores = self._score_and_project(
                outputs.last_hidden_state, slice_hidden_states, volume_hidden_states, guide, slice_mask
            )
        else:
            cells, cell_mask = self._pool_tower(outputs.last_hidden_state, slice_mask)
            visual_tokens = [row.flatten(0, 1) for row in cells[cell_mask].split(cell_mask.sum(dim=1).tolist())]
            if self.row_token is not None:
                visual_tokens = [self._separate_rows(tokens, cells.shape[2]) for tokens in visual_tokens]
            lengths = [len(tokens) for tokens in visual_tokens]
            visual_tokens = list(self.multi_modal_projector(torch.cat(visual_tokens)).split(lengths))
        deepstack = self._project_deepstack(outputs.deepstack_hidden_states, slice_mask)
        if self.end_token is not None:
            visual_tokens = [torch.cat([tokens, self.end_token[None].to(tokens.dtype)]) for tokens in visual_tokens]
        losses = {}
        if self.training:
            losses = routing_losses(
                self.config, outputs.router_logits, outputs.token_mask, task_logits, task_index, has_guide, task_ids
            )
        return CTMoEImageFeatures(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=visual_tokens,
            deepstack_output=deepstack,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            prefix_hidden_states=outputs.prefix_hidden_states if output_prefix_hidden_states else None,
            moe_hidden_states=outputs.moe_hidden_states,
            slice_hidden_states=slice_hidden_states if output_prefix_hidden_states else None,
            volume_hidden_states=volume_hidden_states if output_prefix_hidden_states else None,
            routing=CTMoERoutingOutput(
                router_logits=outputs.router_logits if output_router_logits else None,
                token_mask=outputs.token_mask,
                task_logits=task_logits,
                task_index=task_index,
                slice_scores=slice_scores,
                **losses,
            ),
        )

    def _check_encoded(
        self,
        pixel_values: torch.Tensor | None,
        prefix_hidden_states: torch.Tensor | None,
        moe_hidden_states: torch.Tensor | None,
        slice_hidden_states: torch.Tensor | None,
        volume_hidden_states: torch.Tensor | None,
    ) -> torch.Tensor:
        """The one of the first three that was given, `(V, S, ...)`."""
        attended = None if moe_hidden_states is None else moe_hidden_states[0]
        given = [states for states in (pixel_values, prefix_hidden_states, attended) if states is not None]
        if len(given) != 1:
            raise ModelError(
                "pixel_values",
                "both or neither of pixel_values and prefix_hidden_states (or moe_hidden_states) were given",
                "Give one",
            )
        # CODEPATH: TG-IS is off by default.
        if pixel_values is None and self.config.slice_scoring == "tgis":
            missing = {"slice_hidden_states": slice_hidden_states}
            if self.volume_encoder is not None:
                missing["volume_hidden_states"] = volume_hidden_states
            for name, value in missing.items():
                if value is None:
                    raise ModelError(
                        name,
                        "missing beside prefix_hidden_states, for a model that scores slices",
                        "Pass all that the earlier call returned with output_prefix_hidden_states=True",
                    )
        return given[0]

    def _encode_slices(self, volume: dict[str, torch.Tensor | None], outputs: CTMoEVisionOutput) -> torch.Tensor:
        """2D features `(V, S, N, D)`: the tower run slice by slice in every layer, without experts, as in the base."""
        # CODEPATH: without volume layers (as beside a 3D encoder) the tower has run so already.
        if not self.config.vision_config.volume_layers:
            return outputs.last_hidden_state
        volume = {**volume, "pixel_values": None}
        prefix = outputs.slice_prefix_hidden_states
        outputs = self.vision_tower(**volume, prefix_hidden_states=prefix, slicewise=True, return_dict=True)
        return outputs.last_hidden_state

    def _encode_volumes(self, pixel_values: torch.Tensor, slice_mask: torch.Tensor) -> torch.Tensor:
        """3D features of the second encoder, `(V, depth, rows, columns, D)` without the class token."""
        config = self.config.volume_encoder_config
        tokens = self.volume_encoder(pixel_values, slice_mask, return_dict=True).last_hidden_state
        return tokens[:, int(config.class_token) :].unflatten(1, (-1, *config.grid_size[1:]))

    def _score_and_project(
        self,
        features: torch.Tensor,
        slice_hidden_states: torch.Tensor,
        volume_hidden_states: torch.Tensor | None,
        guide: torch.Tensor | None,
        slice_mask: torch.Tensor,
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """TG-IS: per volume the 3D tokens and then the 2D tokens, weighted by the slice scores `(V, S)`."""
        config = self.config
        if volume_hidden_states is None:
            cells, cell_mask = self._pool_tower(features, slice_mask)
            slices_per_cell, projector = config.pool[0], self.multi_modal_projector
        else:
            encoder = config.volume_encoder_config
            exists = slice_mask[:, :: encoder.patch_size[0]]  # padding comes last
            cells, cell_mask = _pool_cells(volume_hidden_states, exists, encoder.pool)
            slices_per_cell, projector = encoder.slices_per_cell, self.volume_projector
        cells = projector(cells[cell_mask])  # (cells of all volumes, tokens per cell, D_text)
        slices, _ = self._pool_tower(slice_hidden_states, slice_mask, [1, *config.pool[1:]])
        slices = self.multi_modal_projector(slices[slice_mask])  # (slices of all volumes, tokens per slice, D_text)

        num_volumes, num_slices = slice_mask.shape
        cell_means = cells.new_zeros(*cell_mask.shape, cells.shape[-1])
        cell_means[cell_mask] = cells.mean(dim=1)
        slice_means = slices.new_zeros(*slice_mask.shape, slices.shape[-1])
        slice_means[slice_mask] = slices.mean(dim=1)
        cell_of_slice = torch.arange(num_slices, device=cells.device) // slices_per_cell
        if guide is None:
            guide = torch.zeros(num_volumes, config.vision_config.guide_size, device=cells.device)
        scores = self.slice_scoring(cell_means[:, cell_of_slice], slice_means, guide, slice_mask)

        weights = scores
        # CODEPATH: dropout belongs to the published form.
        if self.training and config.tgis_variant == "paper":
            weights = nn.functional.dropout(scores, 0.1)
        num_cells, num_real = cell_mask.sum(dim=1).tolist(), slice_mask.sum(dim=1).tolist()
        weights = weights[slice_mask].to(slices.dtype).split(num_real)
        # A matrix product per volume, which sums in float32 whatever the dtype.
        weighted = [torch.tensordot(s, own, dims=1) for s, own in zip(weights, slices.split(num_real))]
        return [torch.cat([own.flatten(0, 1), sum_]) for own, sum_ in zip(cells.split(num_cells), weighted)], scores

    def _project_deepstack(
        self, hidden_states: tuple[torch.Tensor, ...] | None, slice_mask: torch.Tensor
    ) -> list[torch.Tensor] | None:
        """Per volume `(tokens, layers, D_text)`: what the first layers of the language model add to its tokens."""
        if hidden_states is None:
            return None
        layers = []
        for states, projector in zip(hidden_states, self.deepstack_projectors):
            cells, cell_mask = self._pool_tower(states, slice_mask)
            layers.append(projector(cells[cell_mask]))
        stacked = torch.stack(layers, dim=2)  # (cells of all volumes, tokens per cell, layers, D_text)
        return [row.flatten(0, 1) for row in stacked.split(cell_mask.sum(dim=1).tolist())]

    def _separate_rows(self, tokens: torch.Tensor, tokens_per_cell: int) -> torch.Tensor:
        """`(tokens, D)` of one volume with a token behind every row, then one more and the mean over its slices."""
        config = self.config
        columns = num_pooled_cells((config.vision_config.grid_size // config.merge_size,), config.pool[2:])
        cells = tokens.unflatten(0, (-1, tokens_per_cell // columns, columns))
        cells = torch.cat([cells, cells.mean(dim=0, keepdim=True)])
        ends = self.row_token.to(tokens.dtype).expand(*cells.shape[:2], 1, -1)
        *volume, overview = torch.cat([cells, ends], dim=2).flatten(1, 2)
        return torch.cat([*volume, self.view_token[None].to(tokens.dtype), overview])

    def _check_rows(
        self,
        num_volumes: int,
        guide_input_ids: torch.Tensor | None,
        guide_attention_mask: torch.Tensor | None,
        task_ids: torch.Tensor | None,
    ) -> None:
        for name, rows in (
            ("guide_input_ids", guide_input_ids),
            ("guide_attention_mask", guide_attention_mask),
            ("task_ids", task_ids),
        ):
            if rows is not None and rows.shape[0] != num_volumes:
                raise ModelError(
                    name,
                    f"{rows.shape[0]} rows for {num_volumes} volumes",
                    "Give one row per volume: a prompt with two volumes has its guide and its task twice",
                )
        # CODEPATH: a model without task groups needs no labels and ignores them.
        if self.task_router is None or task_ids is None or task_ids.numel() == 0:
            return
        if int(task_ids.max()) >= len(self.config.tasks):
            raise ModelError(
                "task_ids",
                f"{int(task_ids.max())} names no task of {self.config.tasks}",
                "Give indices into the tasks of the config, or -100 to let the text choose",
            )

    def _encode_guide(
        self, guide_input_ids: torch.Tensor | None, guide_attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Guide `(V, guide_size)` and which volumes have one `(V,)`. The input embeddings get no gradient."""
        if self.guide_encoder is None or guide_input_ids is None:
            return None, None
        if guide_attention_mask is None:
            guide_attention_mask = torch.ones_like(guide_input_ids)
        embeds = self.get_input_embeddings()(guide_input_ids).detach()
        return self.guide_encoder(embeds, guide_attention_mask), guide_attention_mask.bool().any(dim=-1)

    def _choose_task(
        self, guide: torch.Tensor | None, has_guide: torch.Tensor | None, task_ids: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Task logits `(V, num_tasks)`, the group of each volume `(V,)` and its straight-through factor `(V,)`.

        A label or a caller's `task_ids` decides; else the text does; without text there is no group.
        """
        if self.task_router is None:
            return None, None, None
        if guide is None:
            return None, task_ids.clamp(min=-1), None
        logits = self.task_router(guide)
        probs = logits.softmax(dim=-1)
        task_ids, has_guide = task_ids.to(logits.device), has_guide.to(logits.device)
        forced = task_ids >= 0
        index = torch.where(forced, task_ids, probs.argmax(dim=-1).masked_fill(~has_guide, -1))
        chosen = probs.gather(1, index.clamp(min=0).unsqueeze(1)).squeeze(1)
        gate = torch.where(forced, torch.ones_like(chosen), 1 + (chosen - chosen.detach()))  # exactly 1 in value
        return logits, index, gate

    def _pool_tower(
        self, features: torch.Tensor, slice_mask: torch.Tensor, pool: list[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `_pool_cells`, from the vision encoder's `(V, S, N, D)`; class tokens are left out."""
        grid = self.config.vision_config.grid_size
        features = features[:, :, -(grid**2) :].unflatten(2, (grid, grid))
        features = _merge_patches(features, self.config.merge_size, self.config.merge_mode)
        return _pool_cells(features, slice_mask, pool or self.config.pool)

    def get_placeholder_mask(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, image_features: list[torch.Tensor]
    ) -> torch.Tensor:
        """Where visual tokens go, `(batch_size, sequence_length, 1)`; their number must match exactly."""
        if input_ids is None:
            placeholder = self.get_input_embeddings()(
                torch.full((), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
            )
            mask = (inputs_embeds == placeholder).all(-1)
        else:
            mask = input_ids == self.config.image_token_id
        num_placeholders, num_features = int(mask.sum()), sum(len(features) for features in image_features)
        if num_placeholders != num_features:
            raise PromptError(
                "input_ids",
                f"{num_placeholders} placeholder tokens for {num_features} visual tokens of {len(image_features)} "
                "volumes",
                "Let the model's own processor expand the placeholders, with the pool of the model's config",
            )
        return mask.unsqueeze(-1)

    def _attention_blocks(
        self,
        inputs_embeds: torch.Tensor,
        placeholders: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> torch.Tensor | None:
        """`(batch_size, sequence_length)`: tokens of one number see each other, -1 is causal; None where all are."""
        # CODEPATH: Gemma 3 joins the visual tokens of an image, PaliGemma the whole prompt.
        if self.config.image_attention == "image":
            if placeholders is None:
                return None
            inside = placeholders[..., 0]
            starts = inside & ~nn.functional.pad(inside, (1, 0))[:, :-1]
            return (starts.cumsum(dim=1) - 1).masked_fill(~inside, -1)
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            return None
        if token_type_ids is None:
            if self.training:
                raise ModelError(
                    "token_type_ids",
                    "missing in training: the answer would see itself before it is written",
                    "Pass labels, or 0 for the prompt and 1 for the answer",
                )
            return torch.zeros(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)
        return torch.where(token_type_ids == 0, 0, -1)

    def _axial_positions(
        self, placeholders: torch.Tensor, lengths: list[int], attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Slice, row and column of every token, `(3, batch_size, sequence_length)`, all three alike for text.

        Text goes on behind the longest side of a volume; `(batch_size, 1)` is what that adds to the number of tokens.
        """
        grid = self.config.vision_config.grid_size // self.config.merge_size
        rows, columns = (num_pooled_cells((grid,), [step]) for step in self.config.pool[1:])
        positions = torch.zeros(3, *placeholders.shape, dtype=torch.long, device=placeholders.device)
        deltas = []
        volumes = iter(lengths)
        for row, inside in enumerate(placeholders):
            real = torch.ones_like(inside) if attention_mask is None else attention_mask[row].bool()
            inside = inside[real].cpu()
            places = torch.arange(len(inside)).repeat(3, 1)
            visual, shift = inside.nonzero()[:, 0].tolist(), 0
            while visual:
                first, length = visual[0], next(volumes)
                axes = (torch.arange(number) for number in (length // (rows * columns), rows, columns))
                cells = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
                cells = cells * torch.tensor(self.config.pool)[:, None]  # in units of the base's own tokens
                places[:, first : first + length] = cells + first + shift
                shift += max(int(cells.max()) + 1, grid) - length
                places[:, first + length :] = torch.arange(first + length, len(inside)) + shift
                visual = visual[length:]
            positions[:, row, real] = places.to(positions.device)
            deltas.append(shift)
        return positions, torch.tensor(deltas, device=positions.device).unsqueeze(1)

    def _segment_mask(
        self,
        segment_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """`(batch_size, 1, sequence_length, sequence_length)`: causal, and blind to the other segments."""
        attention = self.language_model.config._attn_implementation
        if attention not in ("sdpa", "eager"):
            raise ModelError("segment_ids", f"cannot be masked in {attention!r}", "Load with attn_implementation sdpa")
        windows = "sliding_attention" in (getattr(self.language_model.config, "layer_types", None) or [])
        if windows or self.config.image_attention != "causal" or self.config.position_axes != 1:
            raise ModelError(
                "segment_ids", "need causal attention, no windows, plain positions", "Set questions_per_scan to 1"
            )
        if position_ids is None:
            raise ModelError("segment_ids", "given without position_ids", "Count on from the shared part in each")
        seen = (segment_ids[:, None, :] == 0) | (segment_ids[:, None, :] == segment_ids[:, :, None])
        if attention_mask is not None:
            seen &= attention_mask.bool()[:, None, :]
        seen = seen.tril()[:, None]
        if attention == "sdpa":
            return seen
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)

    @can_return_tuple
    @auto_docstring(custom_args=VOLUME_ARGS)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        slice_mask: torch.Tensor | None = None,
        slice_positions: torch.Tensor | None = None,
        patch_mask: torch.Tensor | None = None,
        volume_scale: torch.Tensor | None = None,
        guide_input_ids: torch.Tensor | None = None,
        guide_attention_mask: torch.Tensor | None = None,
        task_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        segment_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, CTMoEImageFeatures] | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | CTMoEModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ModelError("input_ids", "both or neither of input_ids and inputs_embeds were given", "Give one")
        if pixel_values is not None and mm_encoder_outputs:
            raise ModelError("mm_encoder_outputs", "given together with pixel_values", "Give one of them")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        features = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            features = self.get_image_features(
                pixel_values=pixel_values,
                slice_mask=slice_mask,
                slice_positions=slice_positions,
                patch_mask=patch_mask,
                volume_scale=volume_scale,
                guide_input_ids=guide_input_ids,
                guide_attention_mask=guide_attention_mask,
                task_ids=task_ids,
                output_router_logits=output_router_logits,
                return_dict=True,
            )
        image_hidden_states = placeholders = None
        if features is not None:
            placeholders = self.get_placeholder_mask(input_ids, inputs_embeds, features.pooler_output)
            placeholders = placeholders.to(inputs_embeds.device)
            image_hidden_states = torch.cat(features.pooler_output).to(inputs_embeds.device, inputs_embeds.dtype)
            inputs_embeds = inputs_embeds.masked_scatter(placeholders, image_hidden_states)

        # CODEPATH: PaliGemma counts its tokens from 1.
        if position_ids is None and self.config.first_position:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + seen
            position_ids = position_ids + self.config.first_position
        if segment_ids is not None:
            attention_mask = self._segment_mask(segment_ids, attention_mask, position_ids, inputs_embeds.dtype)
        # CODEPATH: most bases are causal throughout.
        elif self.config.image_attention != "causal":
            blocks = self._attention_blocks(inputs_embeds, placeholders, token_type_ids, past_key_values)
            attention_mask = create_masks_for_generate(
                self.language_model.config,
                inputs_embeds,
                attention_mask,
                past_key_values,
                position_ids,
                block_sequence_ids=blocks,
            )
        rope_deltas = None
        # CODEPATH: Qwen-VL places visual tokens by slice, row and column.
        if placeholders is not None and position_ids is None and self.config.position_axes == 3:
            lengths = [len(tokens) for tokens in features.pooler_output]
            position_ids, rope_deltas = self._axial_positions(placeholders[..., 0], lengths, attention_mask)
        # CODEPATH: in Qwen3-VL the first layers of the language model add what earlier layers of the tower saw.
        if features is not None and features.deepstack_output is not None:
            kwargs["visual_pos_masks"] = placeholders[..., 0]
            stacked = torch.cat(features.deepstack_output).to(inputs_embeds.device, inputs_embeds.dtype)
            kwargs["deepstack_visual_embeds"] = list(stacked.unbind(dim=1))
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        routing = None if features is None else features.routing  # a chunked prefill hands on the pooled features only
        return CTMoEModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_hidden_states,
            router_logits=None if routing is None else routing.router_logits,
            routing=routing,
            rope_deltas=rope_deltas,
        )


@auto_docstring(custom_intro="CT-MoE with its language modeling head: reports and answers from CT volumes.")
class CTMoEForConditionalGeneration(CTMoEPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    # Every saved folder carries its own code, checkpoints in the middle of a training run included.
    _auto_class = "AutoModel"

    def __init__(self, config: CTMoEConfig):
        super().__init__(config)
        self.model = CTMoEModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    @auto_docstring(custom_intro="See [`~CTMoEModel.get_image_features`], which takes the same arguments.")
    def get_image_features(
        self, pixel_values: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple | CTMoEImageFeatures:
        return self.model.get_image_features(pixel_values=pixel_values, **kwargs)

    def add_task(self, name: str, init_from: str | None = None) -> None:
        """Adds an expert group for a new kind of request; all that is there stays as it is, bit for bit.

        Until it is trained or forced the group is idle: its experts add nothing or what those of `init_from` add, and
        the task router's logit for it is one below that of `init_from`, or below the mean of all tasks.

        The processor holds the names as well (`processor.tasks = model.config.tasks`), and an optimizer made before
        does not know the new parameters.

        Args:
            name: of the task.
            init_from: a task whose experts and routers are copied; by default they are made anew, their output zero.

        Raises:
            ModelError: the name is taken or empty, `init_from` is unknown, or weights are offloaded.
        """
        tasks = self.config.tasks
        source = None if init_from is None else self._task_index(init_from)
        self.model.regroup_tasks([*tasks, name], [*range(len(tasks)), source])

    def remove_task(self, name: str) -> None:
        """Removes a task with its expert group; the others stay as they are, bit for bit. See [`~.add_task`].

        Raises:
            ModelError: there is no such task, or it is the last expert group of the model.
        """
        index = self._task_index(name)
        kept = [number for number in range(len(self.config.tasks)) if number != index]
        self.model.regroup_tasks([self.config.tasks[number] for number in kept], kept)

    def rename_task(self, name: str, new_name: str) -> None:
        """Gives a task another name; no weight changes. See [`~.add_task`]."""
        index = self._task_index(name)
        tasks = [new_name if number == index else task for number, task in enumerate(self.config.tasks)]
        CTMoEConfig(**{**self.config.to_dict(), "tasks": tasks})  # refuses a name that is taken or empty
        self.config.tasks = tasks

    def _task_index(self, name: str) -> int:
        if name not in self.config.tasks:
            known = ", ".join(self.config.tasks) or "none"
            raise ModelError("task", f"{name!r} is unknown", f"Choose one of {known}")
        return self.config.tasks.index(name)

    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        rope_deltas = inputs.pop("rope_deltas", None)
        if inputs.get("position_ids") is not None and self.config.first_position:
            inputs["position_ids"] = inputs["position_ids"] + self.config.first_position
        # CODEPATH: Qwen-VL. `forward` places a prompt; what follows counts on behind it.
        if self.config.position_axes == 3:
            if rope_deltas is not None:
                inputs["position_ids"] = inputs["position_ids"] + rope_deltas
            elif inputs.get("pixel_values") is not None or inputs.get("mm_encoder_outputs"):
                inputs["position_ids"] = None
        return inputs

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if outputs.get("rope_deltas") is not None:
            model_kwargs["rope_deltas"] = outputs.rope_deltas
        return model_kwargs

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, *args, **kwargs):
        """Left to `forward`, which knows where visual tokens are, unless all attention is causal."""
        if config.image_attention != "causal":
            return attention_mask
        return create_masks_for_generate(config, inputs_embeds, attention_mask, *args, **kwargs)

    def save_pretrained(self, *args, **kwargs) -> None:
        # With this import the library copies the pipeline's file as well; the config says what it is for.
        from .pipeline_ct_moe import PIPELINES

        self.config.custom_pipelines = deepcopy(PIPELINES)  # loading a pipeline edits it in place
        # As `from_pretrained` sets them: a folder saved again after loading is the same, byte for byte.
        for name in self.config.sub_configs:
            if getattr(self.config, name) is not None:
                getattr(self.config, name).dtype = self.dtype
        super().save_pretrained(*args, **kwargs)

    def _expand_multimodal_outputs(self, input_ids, mm_encoder_output, **kwargs) -> dict[str, CTMoEImageFeatures]:
        # The library writes one entry per beam into the caller's own features. A copy keeps them for another question.
        expanded = super()._expand_multimodal_outputs(
            input_ids, {name: copy(features) for name, features in mm_encoder_output.items()}, **kwargs
        )
        for name, features in mm_encoder_output.items():
            if features.deepstack_output is not None:
                stacked = copy(features)
                stacked.pooler_output = features.deepstack_output
                stacked = super()._expand_multimodal_outputs(input_ids, {name: stacked}, **kwargs)[name]
                expanded[name].deepstack_output = stacked.pooler_output
        return expanded

    @can_return_tuple
    @auto_docstring(custom_args=VOLUME_ARGS)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        slice_mask: torch.Tensor | None = None,
        slice_positions: torch.Tensor | None = None,
        patch_mask: torch.Tensor | None = None,
        volume_scale: torch.Tensor | None = None,
        guide_input_ids: torch.Tensor | None = None,
        guide_attention_mask: torch.Tensor | None = None,
        task_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        segment_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, CTMoEImageFeatures] | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | CTMoECausalLMOutputWithPast:
        # CODEPATH: PaliGemma, whose prompt sees all of itself and never the answer.
        if self.config.image_attention == "prompt" and token_type_ids is None and labels is not None:
            token_type_ids = (labels != -100).long()
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            slice_mask=slice_mask,
            slice_positions=slice_positions,
            patch_mask=patch_mask,
            volume_scale=volume_scale,
            guide_input_ids=guide_input_ids,
            guide_attention_mask=guide_attention_mask,
            task_ids=task_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            segment_ids=segment_ids,
            token_type_ids=token_type_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits = self.lm_head(hidden_states)

        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
            if outputs.routing is not None and outputs.routing.aux_loss is not None:
                loss = loss + outputs.routing.aux_loss.to(loss.device)
        return CTMoECausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            router_logits=outputs.router_logits,
            routing=outputs.routing,
            rope_deltas=outputs.rope_deltas,
        )


def _copy_groups(old: torch.Tensor, new: torch.Tensor, first: int, step: int, sources: list[int | None]) -> None:
    """Copies `first` rows that all groups share, then for each group the `step` rows of the group in `sources`."""
    new[:first] = old[:first]
    for index, source in enumerate(sources):
        if source is not None:
            new[first + index * step :][:step] = old[first + source * step :][:step]


def _pool_cells(
    features: torch.Tensor, slice_mask: torch.Tensor, pool: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(V, S, rows, columns, D)` and `(V, S)` to `(V, cells, tokens per cell, D)` and which cells exist `(V, cells)`.

    A cell spans `pool[0]` slices; partial cells average what exists.
    """
    cell_mask = slice_mask
    if any(step > 1 for step in pool):
        # In float32: rounding of the sums would make equal slices differ.
        exists = slice_mask[:, :, None, None, None].expand(*features.shape[:4], 1).float()
        count = _sum_cells(exists, pool)
        features = (_sum_cells(features * exists, pool) / count.clamp(min=1)).to(features.dtype)
        cell_mask = count[:, :, 0, 0, 0] > 0
    return features.flatten(2, 3), cell_mask


def _merge_patches(features: torch.Tensor, size: int, mode: str) -> torch.Tensor:
    """`(V, S, rows, columns, D)`: `size` x `size` patches to one, as the base does before its projector."""
    if size == 1:
        return features
    features = features.unflatten(3, (-1, size)).unflatten(2, (-1, size)).transpose(3, 4)
    # CODEPATH: Gemma 3 averages patches, InternVL stacks their channels.
    return features.mean(dim=(4, 5)) if mode == "mean" else features.flatten(4)


def _sum_cells(grid: torch.Tensor, pool: list[int]) -> torch.Tensor:
    """Sums `(V, S, rows, columns, D)` over cells of `pool`, the last ones of each axis padded with zeros."""
    padding = [0, 0]
    for length, step in zip(grid.shape[3:0:-1], pool[::-1]):
        padding += [0, -length % step]
    grid = nn.functional.pad(grid, padding)
    for axis, step in zip((1, 3, 5), pool):
        grid = grid.unflatten(axis, (-1, step))
    return grid.sum(dim=(2, 4, 6))


__all__ = [
    "CTMoEForConditionalGeneration",
    "CTMoEModel",
    "CTMoEPreTrainedModel",
    "CTMoEVisionModel",
    "CTMoEVolumeEncoder",
]
