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
"""CT-MoE configuration: the vision encoder's, and the whole model's."""

from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.utils import auto_docstring

from .errors_ct_moe import ModelError


FORMAT_VERSION = 1
# One class can be registered under one name only, so the second name of the model is written out.
AUTO_MAP = {
    "AutoConfig": "configuration_ct_moe.CTMoEConfig",
    "AutoModel": "modeling_ct_moe.CTMoEForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_ct_moe.CTMoEForConditionalGeneration",
}


@auto_docstring(custom_intro="Configuration of [`CTMoEVisionModel`]: the base's ViT and what makes it read volumes.")
@strict
class CTMoEVisionConfig(PreTrainedConfig):
    r"""
    class_token (`bool`, *optional*, defaults to `True`):
        Whether the base prepends a class token to the patches of a slice.
    patch_bias (`bool`, *optional*, defaults to `False`):
        Whether the base's patch embedding has a bias.
    pre_layernorm (`bool`, *optional*, defaults to `True`):
        Whether a norm precedes the first layer (CLIP).
    post_layernorm (`bool`, *optional*, defaults to `False`):
        Whether the features are read after the base's last norm (SigLIP at feature layer -1).
    norm_type (`str`, *optional*, defaults to `"layer_norm"`):
        Norms inside the layers: `"layer_norm"` or `"rms_norm"` (InternViT-6B).
    qk_norm (`bool`, *optional*, defaults to `False`):
        Whether queries and keys pass an RMS norm over the full width before they are split into heads (InternViT-6B).
    use_layer_scale (`bool`, *optional*, defaults to `False`):
        Whether both residual branches are scaled by a learned vector (InternViT).
    post_norm_type (`str`, *optional*, defaults to `"layer_norm"`):
        That last norm: `"layer_norm"` or `"rms_norm"` (Qwen2.5-VL).
    gated_mlp (`bool`, *optional*, defaults to `False`):
        Whether the FFN is `down(act(gate(x)) * up(x))` (Qwen2.5-VL).
    fused_qkv (`bool`, *optional*, defaults to `False`):
        Whether the base keeps the projections of queries, keys and values in one matrix (Qwen-VL).
    temporal_patch_size (`int`, *optional*, defaults to 1):
        Frames of the base's patch embedding, which sees a slice so many times (Qwen-VL).
    position_embedding (`bool`, *optional*, defaults to `True`):
        Whether positions in the plane have learned embeddings (not in Qwen2.5-VL).
    position_grid (`int`, *optional*):
        Side of the grid of these, where it is not that of the patches: resampled bilinearly (Qwen3-VL).
    rotary_theta (`float`, *optional*):
        Base of the rotary embedding of row and column that turns queries and keys in every layer (Qwen-VL). The slice
        position then joins the lower half of the frequencies of each, instead of turning channels of its own.
    window_size (`int`, *optional*):
        Patches along a side of the windows in which layers outside `full_attention_layers` attend; in a volume layer a
        window spans all slices (Qwen2.5-VL).
    full_attention_layers (`list[int]`, *optional*):
        Layers without windows.
    deepstack_layers (`list[int]`, *optional*):
        Layers whose output reaches the language model as well, behind its first layers (Qwen3-VL).
    feature_layer (`int`, *optional*, defaults to -2):
        Index into the base's hidden states (0 is the embedding output) that the language model reads. Layers above
        it do not exist here.
    volume_layers (`list[int]`, *optional*):
        Layers whose attention spans all slices of a volume; by default the upper half of the layers that are read.
    depth_rotary_fraction (`float`, *optional*, defaults to 0.5):
        Share of every head that is rotated by the slice position.
    depth_wavelengths_mm (`list[float]`, *optional*, defaults to `(40.0, 2000.0)`):
        Shortest and longest wavelength of that rotation, in millimetres.
    moe_layers (`list[int]`, *optional*):
        Volume layers with a TGH-MoE beside their FFN; by default every second one. Empty: a dense model.
    num_experts (`int`, *optional*, defaults to 4):
        Experts of the shared group, and of each task group unless `num_task_experts` is set.
    num_task_experts (`int`, *optional*):
        Experts of each task group. With 1 a task group has no router.
    moe_intermediate_size (`int`, *optional*):
        Width of every expert, by default `hidden_size // 4`.
    shared_group (`bool`, *optional*, defaults to `True`):
        Whether the group that serves every task exists.
    num_tasks (`int`, *optional*, defaults to 0):
        Number of task groups. Set by [`CTMoEConfig`] from its `tasks`.
    use_task_groups (`bool`, *optional*, defaults to `True`):
        Whether the task groups take part. `False` in and after the first, task-shared stage of training, where the
        task router already learns.
    guide_interaction (`str`, *optional*, defaults to `"film"`):
        How the prompt steers the token routers: `"film"` (it scales their input and shifts their logits), `"bias"`
        (it shifts the logits) or `"none"`.
    guide_size (`int`, *optional*, defaults to 256):
        Width of the guide, the pooled embedding of the prompt.
    router_jitter (`float`, *optional*, defaults to 0.01):
        In training router inputs are multiplied by noise drawn uniformly from `1 - router_jitter` to
        `1 + router_jitter`.
    """

    model_type = "ct_moe_vision"
    base_config_key = "vision_config"

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 336
    patch_size: int = 14
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float | int = 0.0
    attention_bias: bool = True
    initializer_range: float = 0.02

    class_token: bool = True
    patch_bias: bool = False
    pre_layernorm: bool = True
    post_layernorm: bool = False
    norm_type: Literal["layer_norm", "rms_norm"] = "layer_norm"
    qk_norm: bool = False
    use_layer_scale: bool = False
    post_norm_type: Literal["layer_norm", "rms_norm"] = "layer_norm"
    gated_mlp: bool = False
    fused_qkv: bool = False
    temporal_patch_size: int = 1
    position_embedding: bool = True
    position_grid: int | None = None
    rotary_theta: float | int | None = None
    window_size: int | None = None
    full_attention_layers: list[int] | None = None
    deepstack_layers: list[int] | None = None

    feature_layer: int = -2
    volume_layers: list[int] | None = None
    depth_rotary_fraction: float | int = 0.5
    depth_wavelengths_mm: list[float | int] | tuple[float | int, ...] = (40.0, 2000.0)

    moe_layers: list[int] | None = None
    num_experts: int = 4
    num_task_experts: int | None = None
    num_experts_per_tok: int = 1
    norm_topk_prob: bool = False
    moe_intermediate_size: int | None = None
    shared_group: bool = True
    num_tasks: int = 0
    use_task_groups: bool = True
    guide_interaction: Literal["film", "bias", "none"] = "film"
    guide_size: int = 256
    router_jitter: float | int = 0.01

    def __post_init__(self, **kwargs):
        read = self.num_read_layers
        if not 0 < read <= self.num_hidden_layers:
            raise ModelError(
                "feature_layer",
                f"{self.feature_layer} selects no layer output of a ViT with {self.num_hidden_layers} layers",
                f"Choose one from {-self.num_hidden_layers} to -1 or from 1 to {self.num_hidden_layers}",
            )
        if self.volume_layers is None:
            self.volume_layers = list(range(read // 2, read))
        if self.moe_layers is None:
            # The first volume layer stays dense where there are several: everything before the first MoE layer is
            # independent of the prompt and can be kept for further questions.
            self.moe_layers = self.volume_layers[1::2] or self.volume_layers[:1]
        if self.num_task_experts is None:
            self.num_task_experts = self.num_experts
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.hidden_size // 4
        self.full_attention_layers = self.full_attention_layers or []
        self.deepstack_layers = self.deepstack_layers or []
        self.depth_wavelengths_mm = [float(wavelength) for wavelength in self.depth_wavelengths_mm]
        self._check_layers(read)
        self._check_geometry()
        self._check_experts()
        super().__post_init__(**kwargs)

    @property
    def num_read_layers(self) -> int:
        """Number of transformer layers up to `feature_layer`: the only ones built, loaded and run."""
        return self.feature_layer if self.feature_layer >= 0 else self.num_hidden_layers + 1 + self.feature_layer

    @property
    def grid_size(self) -> int:
        """Patches along one side of a slice."""
        return self.image_size // self.patch_size

    @property
    def num_slice_tokens(self) -> int:
        """Tokens per slice inside the encoder (N), the class token included."""
        return self.grid_size**2 + int(self.class_token)

    @property
    def num_positions(self) -> int:
        """Learned position embeddings, that of the class token included."""
        return self.num_slice_tokens if self.position_grid is None else self.position_grid**2 + int(self.class_token)

    @property
    def depth_rotary_dim(self) -> int:
        """Leading channels of every head that the slice position rotates; even."""
        return int(self.hidden_size // self.num_attention_heads * self.depth_rotary_fraction) // 2 * 2

    @property
    def num_shared_experts(self) -> int:
        """Experts of the shared group: the first ones of a layer."""
        return self.num_experts if self.shared_group else 0

    @property
    def routes_tasks(self) -> bool:
        """Whether volumes go through the experts of their task."""
        return self.num_tasks > 0 and self.use_task_groups

    def _check_layers(self, read: int) -> None:
        for name, layers, among in (
            ("volume_layers", self.volume_layers, range(read)),
            ("moe_layers", self.moe_layers, self.volume_layers),
        ):
            if layers != sorted(set(layers)) or not set(layers) <= set(among):
                raise ModelError(
                    name,
                    f"{layers} is not an ascending list without repeats of layers among {list(among)}",
                    f"The ViT has {read} layers that are read; MoE layers must be volume layers",
                )

    def _check_geometry(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ModelError(
                "hidden_size",
                f"{self.hidden_size} is not a multiple of num_attention_heads = {self.num_attention_heads}",
                "Take both from the base",
            )
        if self.window_size is not None and (self.class_token or self.grid_size % self.window_size):
            raise ModelError(
                "image_size",
                f"{self.image_size} pixels are {self.grid_size} patches along a side, which windows of "
                f"{self.window_size} do not divide",
                f"Choose a multiple of {self.window_size * self.patch_size} pixels",
            )
        if self.class_token and (self.rotary_theta is not None or self.position_grid is not None):
            raise ModelError("class_token", "with rotary or resampled positions in the plane", "No base has both")
        if not 0.0 <= self.depth_rotary_fraction <= 1.0:
            raise ModelError("depth_rotary_fraction", f"{self.depth_rotary_fraction} is not in [0, 1]", "Use 0.5")
        wavelengths = self.depth_wavelengths_mm
        if len(wavelengths) != 2 or not 0.0 < wavelengths[0] <= wavelengths[1]:
            raise ModelError(
                "depth_wavelengths_mm",
                f"{wavelengths} is not a pair of a shortest and a longest wavelength",
                "Use (40, 2000)",
            )

    def _check_experts(self) -> None:
        if min(self.num_experts, self.num_task_experts, self.num_experts_per_tok) < 1:
            raise ModelError(
                "num_experts",
                f"num_experts = {self.num_experts}, num_task_experts = {self.num_task_experts} and "
                f"num_experts_per_tok = {self.num_experts_per_tok} must all be at least 1",
                "For a model without experts set moe_layers = []",
            )
        if min(self.guide_size, self.moe_intermediate_size) < 1:
            raise ModelError(
                "guide_size",
                f"guide_size = {self.guide_size} and moe_intermediate_size = {self.moe_intermediate_size} must be at "
                "least 1",
                "Leave them out for the defaults",
            )
        routed = [count for count in (self.num_experts, self.num_task_experts) if count > 1]
        if routed and self.num_experts_per_tok > min(routed):
            raise ModelError(
                "num_experts_per_tok",
                f"{self.num_experts_per_tok} experts per token out of a group of {min(routed)}",
                "Lower it, or add experts",
            )
        if self.norm_topk_prob and self.num_experts_per_tok == 1:
            # A renormalised weight at k = 1 is the constant 1, and the router gets no gradient from the language loss.
            raise ModelError(
                "norm_topk_prob",
                "True with num_experts_per_tok = 1 makes every weight 1 and leaves the routers without a gradient",
                "Set norm_topk_prob=False or num_experts_per_tok >= 2",
            )
        if not 0.0 <= self.router_jitter < 1.0:
            raise ModelError("router_jitter", f"{self.router_jitter} is not in [0, 1)", "Use 0.01")


@auto_docstring(custom_intro="Configuration of [`CTMoEVolumeEncoder`]: a ViT with 3D patches, by default as M3D-CLIP.")
@strict
class CTMoEVolumeEncoderConfig(PreTrainedConfig):
    r"""
    num_slices (`int`, *optional*, defaults to 32):
        Slices the position embeddings were made for. Volumes of another number are placed by relative depth.
    patch_size (`list[int]`, *optional*, defaults to `(4, 16, 16)`):
        Slices, rows and columns of a patch.
    qk_norm (`bool`, *optional*, defaults to `False`):
        Whether queries and keys pass an RMS norm, as in [`CTMoEVisionConfig`].
    class_token (`bool`, *optional*, defaults to `True`):
        Whether a class token precedes the patches.
    post_layernorm (`bool`, *optional*, defaults to `False`):
        Whether the features are read after the last norm (M3D-LaMed) or before it (Med-2E3).
    pool (`list[int]`, *optional*, defaults to `(2, 2, 2)`):
        Patches along each axis that are averaged into one visual token.
    """

    model_type = "ct_moe_volume_encoder"
    base_config_key = "volume_encoder_config"
    # It is built of the vision encoder's parts.
    fused_qkv: ClassVar[bool] = False
    gated_mlp: ClassVar[bool] = False

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    num_slices: int = 32
    image_size: int = 256
    patch_size: list[int] | tuple[int, ...] = (4, 16, 16)
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float | int = 0.0
    attention_bias: bool = False
    qk_norm: bool = False
    initializer_range: float = 0.02

    class_token: bool = True
    post_layernorm: bool = False
    pool: list[int] | tuple[int, ...] = (2, 2, 2)

    def __post_init__(self, **kwargs):
        self.patch_size, self.pool = list(self.patch_size), list(self.pool)
        if len(self.patch_size) != 3 or min(self.patch_size) < 1 or len(self.pool) != 3 or min(self.pool) < 1:
            raise ModelError(
                "volume_encoder_config",
                f"patch_size {self.patch_size} and pool {self.pool} are not three positive numbers each",
                "Use (4, 16, 16) and (2, 2, 2)",
            )
        if self.hidden_size % self.num_attention_heads:
            raise ModelError(
                "volume_encoder_config",
                f"hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} attention heads",
                "Take both from the encoder whose weights are used",
            )
        if min(self.grid_size) < 1:
            raise ModelError(
                "volume_encoder_config",
                f"patches {self.patch_size} do not fit into {self.num_slices} slices of {self.image_size} pixels",
                "Use smaller patches",
            )
        super().__post_init__(**kwargs)

    @property
    def grid_size(self) -> tuple[int, int, int]:
        """Patches along z, y and x that have a position embedding."""
        slices, rows, columns = self.patch_size
        return self.num_slices // slices, self.image_size // rows, self.image_size // columns

    @property
    def slices_per_cell(self) -> int:
        """Slices that one visual token spans."""
        return self.patch_size[0] * self.pool[0]

    @property
    def tokens_per_cell(self) -> int:
        """Visual tokens for every `slices_per_cell` slices."""
        return num_pooled_cells(self.grid_size[1:], self.pool[1:])


@auto_docstring(custom_intro="Configuration of [`CTMoEForConditionalGeneration`].")
@strict
class CTMoEConfig(PreTrainedConfig):
    r"""
    image_token_id (`int`, *optional*, defaults to 32000):
        The base's own image placeholder token; every visual token takes the place of one.
    multimodal_projector_bias (`bool`, *optional*, defaults to `True`):
        Whether the base's projector has biases.
    projector_hidden_size (`int`, *optional*):
        Width between its two layers, by default the language model's.
    projector_layers (`int`, *optional*, defaults to 2):
        Linear layers of the projector: 2 with `projector_hidden_act` between them, or 1 (Gemma 3, PaliGemma).
    projector_norm (`str`, *optional*, defaults to `"none"`):
        Norm before the projector: `"layer_norm"` (InternVL) or `"offset_rms_norm"`, whose scale is 1 + its weight
        (Gemma 3).
    projector_norm_eps (`float`, *optional*, defaults to 1e-5):
        Of that norm.
    merge_size (`int`, *optional*, defaults to 1):
        The base makes one visual token of `merge_size` x `merge_size` patches of a slice, before the projector.
    merge_mode (`str`, *optional*, defaults to `"mean"`):
        How: `"mean"` (Gemma 3) or `"stack"`, row by row along the channels (pixel shuffle of InternVL).
    separators (`str`, *optional*, defaults to `"none"`):
        Learned embeddings among the visual tokens: `"end"`, one behind those of a volume (`image_newline` of
        LLaVA-OneVision), or `"rows"`, one behind every row of a slice, and after the volume one more and an overview,
        the mean over its slices (Phi-3-V, where an image is followed by its small copy).
    image_attention (`str`, *optional*, defaults to `"causal"`):
        How the language model sees visual tokens: `"causal"`, `"image"` (those of a volume see each other, Gemma 3) or
        `"prompt"` (everything before the answer sees each other, PaliGemma).
    position_axes (`int`, *optional*, defaults to 1):
        1, or 3 where the language model places visual tokens by slice, row and column (Qwen-VL).
    first_position (`int`, *optional*, defaults to 0):
        Position of the first token in the language model (1 in PaliGemma).
    tasks (`list[str]`, *optional*, defaults to `["report", "vqa_closed", "vqa_open"]`):
        Named kinds of request, one expert group each. Empty: the shared group only.
    pool (`list[int]`, *optional*, defaults to `(2, 2, 2)`):
        Slices, rows and columns of visual tokens that are averaged into one before the projector.
    slice_scoring (`str`, *optional*, defaults to `"none"`):
        `"tgis"` appends the 2D features of all slices, weighted by the text-guided inter-slice scores of Med-2E3.
    tgis_variant (`str`, *optional*, defaults to `"centred"`):
        `"centred"`: cosine to what a slice has and the mean slice has not, learned temperature. `"paper"`: the
        published scalar product, divided by 5.
    tgis_alpha (`float`, *optional*):
        Share of the 3D features in what is scored, by default 0.5, and 0.2 in the published form.
    tgis_temperature (`float`, *optional*):
        What divides the logits of the scores: learned from 0.07, or 5 and fixed in the published form. Cosines of
        random directions are larger in a narrow language model, so below a width of about 1000 start it higher: else
        the softmax is saturated before anything is learned.
    volume_encoder_config (`CTMoEVolumeEncoderConfig`, *optional*):
        A second, 3D encoder whose tokens take the place of the vision encoder's in TG-IS, as in Med-2E3.
    router_balance_coef (`float`, *optional*, defaults to 0.01):
        Weight of the load balance loss beside the language loss.
    router_z_coef (`float`, *optional*, defaults to 0.001):
        Weight of the router z-loss.
    task_coef (`float`, *optional*, defaults to 0.1):
        Weight of the cross-entropy between the task router and the task labels.
    output_router_logits (`bool`, *optional*, defaults to `False`):
        Whether every call returns the router logits.
    format_version (`int`, *optional*, defaults to 1):
        Version of the folder layout and of the meaning of these fields.
    intended_scope (`str`, *optional*, defaults to `"untrained"`):
        Free text: what data the weights were trained for. Shown with every output.
    """

    model_type = "ct_moe"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "vision_config": SubConfigSpec(config_class=CTMoEVisionConfig),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="phi3"),
        "volume_encoder_config": SubConfigSpec(config_class=CTMoEVolumeEncoderConfig, optional=True),
    }
    # Every saved folder carries its own code, checkpoints in the middle of a training run included.
    _auto_class: ClassVar[str | None] = "AutoConfig"

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    volume_encoder_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 32000
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    projector_hidden_size: int | None = None
    projector_layers: Literal[1, 2] = 2
    projector_norm: Literal["none", "layer_norm", "offset_rms_norm"] = "none"
    projector_norm_eps: float = 1e-5
    merge_size: int = 1
    merge_mode: Literal["mean", "stack"] = "mean"
    separators: Literal["none", "end", "rows"] = "none"
    image_attention: Literal["causal", "image", "prompt"] = "causal"
    position_axes: Literal[1, 3] = 1
    first_position: int = 0
    tie_word_embeddings: bool = False

    tasks: list[str] | None = None
    pool: list[int] | tuple[int, ...] = (2, 2, 2)
    slice_scoring: Literal["none", "tgis"] = "none"
    tgis_variant: Literal["centred", "paper"] = "centred"
    tgis_alpha: float | int | None = None
    tgis_temperature: float | int | None = None
    router_balance_coef: float | int = 0.01
    router_z_coef: float | int = 0.001
    task_coef: float | int = 0.1
    output_router_logits: bool = False

    format_version: int = FORMAT_VERSION
    intended_scope: str = "untrained"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.format_version > FORMAT_VERSION:
            raise ModelError(
                "config.json",
                f"format_version {self.format_version} is newer than the {FORMAT_VERSION} this code reads",
                "Update ct-moe, or load with trust_remote_code=True to use the code beside the weights",
            )
        if self.tasks is None:
            self.tasks = ["report", "vqa_closed", "vqa_open"]
        if len(set(self.tasks)) != len(self.tasks) or not all(name.strip() for name in self.tasks):
            raise ModelError("tasks", f"{self.tasks} repeats a name or has an empty one", "Give every task one name")
        self.pool = list(self.pool)
        if len(self.pool) != 3 or min(self.pool) < 1:
            raise ModelError("pool", f"{self.pool} is not three positive numbers", "Use (2, 2, 2), or (1, 1, 1)")
        if min(self.router_balance_coef, self.router_z_coef, self.task_coef) < 0:
            raise ModelError("router_balance_coef, router_z_coef, task_coef", "one is below 0", "Use 0 to turn it off")
        if self.merge_size < 1 or self.vision_config.grid_size % self.merge_size:
            raise ModelError(
                "merge_size",
                f"{self.merge_size} does not divide the {self.vision_config.grid_size} patches along a side",
                "Take it from the base",
            )
        if self.slice_scoring == "tgis" and (self.separators == "rows" or self.position_axes == 3):
            raise ModelError("slice_scoring", '"tgis" with a base that separates or places rows', 'Use "none"')
        self._check_slice_scoring()
        self.vision_config.num_tasks = len(self.tasks)
        if self.vision_config.moe_layers and not self.vision_config.shared_group and not self.tasks:
            raise ModelError(
                "shared_group",
                "False without tasks leaves the MoE layers without a single expert",
                "Name tasks, keep the shared group, or set moe_layers = [] for a dense model",
            )
        self.auto_map = {**AUTO_MAP, **(getattr(self, "auto_map", None) or {})}
        if getattr(self.text_config, "tie_word_embeddings", False):
            self.tie_word_embeddings = True  # saved in the text config by many bases

    @property
    def reads_prompt(self) -> bool:
        """Whether anything depends on the guide: the token routers, the choice of a task group or TG-IS."""
        vision = self.vision_config
        steers_experts = bool(vision.moe_layers) and (vision.guide_interaction != "none" or vision.num_tasks > 0)
        return steers_experts or self.slice_scoring == "tgis"

    @property
    def volume_cell(self) -> list[int] | None:
        """The second, 3D encoder gives so many (slices, tokens): `tokens` visual tokens for every `slices` slices."""
        encoder = self.volume_encoder_config
        return None if encoder is None else [encoder.slices_per_cell, encoder.tokens_per_cell]

    def num_visual_tokens(self, num_slices: int) -> int:
        """Visual tokens, and so placeholders, of a volume of `num_slices` slices (design section 2.4)."""
        grid = self.vision_config.grid_size
        return num_visual_tokens(
            (num_slices, grid, grid),
            self.pool,
            self.slice_scoring,
            self.volume_cell,
            self.merge_size,
            self.separators,
        )

    def _check_slice_scoring(self) -> None:
        if self.tgis_alpha is None:
            self.tgis_alpha = 0.2 if self.tgis_variant == "paper" else 0.5
        if not 0.0 <= self.tgis_alpha <= 1.0:
            raise ModelError("tgis_alpha", f"{self.tgis_alpha} is not in [0, 1]", "Use 0.5, or 0.2 as published")
        if self.tgis_temperature is None:
            self.tgis_temperature = 5.0 if self.tgis_variant == "paper" else 0.07
        if self.tgis_temperature <= 0:
            raise ModelError("tgis_temperature", f"{self.tgis_temperature} is not positive", "Use 0.07")
        if self.volume_encoder_config is None:
            return
        if self.slice_scoring == "none":
            raise ModelError(
                "volume_encoder_config", "the second encoder is read by TG-IS only", 'Set slice_scoring="tgis"'
            )
        if self.vision_config.volume_layers:
            raise ModelError(
                "volume_layers",
                f"{self.vision_config.volume_layers} beside a second, 3D encoder, which gives the 3D features in "
                "their place: nothing would read them",
                "Set volume_layers=[]",
            )


def paper_like(intermediate_size: int) -> dict[str, object]:
    """Fields of the preset `paper_like` (design section 2.6), nearest to what is public of arXiv 2604.10233.

    Two tasks, a shared group routed token by token, and one expert per task; every expert as wide as the base's FFN,
    whose `intermediate_size` is the argument. The paper trains all of it.
    """
    return {"tasks": ["report", "vqa"], "num_task_experts": 1, "moe_intermediate_size": intermediate_size}


def med_2e3() -> dict[str, object]:
    """Fields of the preset `med_2e3`: the published system of arXiv 2411.12783 on a base's own 2D tower.

    The tower stays 2D, without experts and unpooled; a 3D encoder of M3D-CLIP's shape (32 slices of 256 pixels in
    patches of 4 x 16 x 16, pooled to 256 tokens) gives the volume features; TG-IS is in its published form.
    """
    return {
        "tasks": [],
        "volume_layers": [],
        "pool": (1, 1, 1),
        "slice_scoring": "tgis",
        "tgis_variant": "paper",
        "volume_encoder_config": {},
    }


def num_visual_tokens(
    shape: tuple[int, int, int],
    pool: list[int] | tuple[int, ...],
    slice_scoring: str = "none",
    volume_cell: list[int] | None = None,
    merge_size: int = 1,
    separators: str = "none",
) -> int:
    """Visual tokens of a volume of (slices, rows, columns) patches, design section 2.4; the rest as in the config."""
    rows, columns = shape[1] // merge_size, shape[2] // merge_size
    in_plane = num_pooled_cells((rows, columns), pool[1:])
    if separators == "rows":
        in_plane += num_pooled_cells((rows,), pool[1:2])
    slices_per_cell, tokens_per_cell = volume_cell or (pool[0], in_plane)
    tokens = -(-shape[0] // slices_per_cell) * tokens_per_cell
    extra = {"none": 0, "end": 1, "rows": 1 + in_plane}[separators]
    return tokens + extra + (in_plane if slice_scoring == "tgis" else 0)


def num_pooled_cells(shape: tuple[int, ...], pool: list[int] | tuple[int, ...]) -> int:
    """Cells left of a grid after pooling, partial cells counted."""
    cells = 1
    for length, step in zip(shape, pool):
        cells *= -(-length // step)
    return cells


__all__ = ["CTMoEConfig", "CTMoEVisionConfig", "CTMoEVolumeEncoderConfig", "med_2e3", "paper_like"]
