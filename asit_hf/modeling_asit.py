"""PyTorch ASiT encoder and its classifiers ([arXiv 2211.13189](https://arxiv.org/abs/2211.13189))."""

from collections.abc import Callable
from importlib import import_module
from os import PathLike
from typing import Any, Unpack

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput, TokenClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_asit import ASiTConfig, read_adapter

logger = logging.get_logger(__name__)

MAX_FRAMES = 3000  # 30 s; `ASiTModel.embed` splits longer clips, as the cost of attention grows with their square


def bicubic_resize_matrix(
    source_size: int, target_sizes: torch.Tensor, num_targets: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """
    Matrices `(batch, num_targets, source_size)` of one-dimensional bicubic resizes to `target_sizes`, `(batch,)`,
    equal to `torch.nn.functional.interpolate` with `mode="bicubic", align_corners=False` (a = -0.75, half-pixel
    centers, clamped borders). Rows past a matrix's own target size repeat the border.
    """
    device = target_sizes.device
    # number / tensor would be a product with a rounded reciprocal
    scales = torch.full_like(target_sizes, source_size, dtype=dtype) / target_sizes.to(dtype)
    coordinates = (torch.arange(num_targets, device=device, dtype=dtype) + 0.5) * scales[:, None] - 0.5
    first, taps, a = coordinates.floor(), torch.arange(-1, 3, device=device), -0.75
    x = ((coordinates - first)[..., None] - taps).abs()
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    index = (first.long()[..., None] + taps).clamp(0, source_size - 1)
    weights = torch.where(x <= 1, near, far)[..., None] * nn.functional.one_hot(index, source_size).to(dtype)
    return weights.sum(-2)


class ASiTPatchProjection(nn.Conv2d):
    """
    Patch convolution, `(batch, 1, frames, mel)` to `(batch, hidden_size, time_patches, mel_patches)`. Accelerators
    compute it as one matrix product, because their convolution kernels are slow with a single input channel.
    """

    def forward(self, spectrograms: torch.Tensor) -> torch.Tensor:
        return super().forward(spectrograms) if spectrograms.device.type == "cpu" else self.multiply(spectrograms)

    def multiply(self, spectrograms: torch.Tensor) -> torch.Tensor:
        """The convolution as one matrix product."""
        size = self.kernel_size[0]
        patches = spectrograms[:, 0].unfold(1, size, size).unfold(2, size, size).flatten(3)
        return nn.functional.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class ASiTPatchEmbeddings(nn.Module):
    """`input_values` of shape `(batch, frames, mel)` to `(batch, time_patches, mel_patches, hidden_size)`."""

    def __init__(self, config: ASiTConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.num_mel_bins = config.num_mel_bins
        self.projection = ASiTPatchProjection(1, config.hidden_size, config.patch_size, stride=config.patch_size)

    def forward(self, input_values: torch.Tensor) -> torch.Tensor:
        if input_values.dim() != 3 or input_values.shape[-1] != self.num_mel_bins or input_values.shape[0] == 0:
            expected = f"(batch, frames, {self.num_mel_bins} mel bins)"
            raise ValueError(f"expected input_values of shape {expected}, got {tuple(input_values.shape)}")
        dtype = self.projection.weight.dtype
        if input_values.dtype != dtype and not torch.is_autocast_enabled(input_values.device.type):
            raise ValueError(f"expected input_values of the weights' dtype, {dtype}, got {input_values.dtype}")
        missing = self.patch_size - input_values.shape[1]
        if isinstance(missing, torch.SymInt):  # an exported graph is for shorter and longer clips
            missing = torch.sym_max(missing, 0)
        if isinstance(missing, torch.SymInt) or missing > 0:
            input_values = nn.functional.pad(input_values, (0, 0, 0, missing))
        return self.projection(input_values.unsqueeze(1)).permute(0, 2, 3, 1)


class ASiTEmbeddings(nn.Module):
    """
    CLS token, patch embeddings and positions: `input_values` of shape `(batch, frames, mel)` to
    `(batch, 1 + time_patches * mel_patches, hidden_size)`, in time-major order.
    """

    def __init__(self, config: ASiTConfig):
        super().__init__()
        self.config = config
        time_patches, mel_patches = config.position_grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.patch_embeddings = ASiTPatchEmbeddings(config)
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + time_patches * mel_patches, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_values: torch.Tensor, num_time_patches: torch.Tensor | None = None) -> torch.Tensor:
        patches = self.patch_embeddings(input_values)
        patches = patches + self.patch_positions(patches.shape[1], num_time_patches).to(patches.dtype)
        cls_token = self.cls_token + self.position_embeddings[:, :1]
        cls_token = cls_token.to(patches.dtype).expand(patches.shape[0], -1, -1)
        return self.dropout(torch.cat((cls_token, patches.flatten(1, 2)), dim=1))

    def patch_positions(self, time_patches: int, num_time_patches: torch.Tensor | None = None) -> torch.Tensor:
        """
        Position embeddings `(batch or 1, time_patches, mel_patches, hidden_size)`, resized bicubically along time: to
        `num_time_patches` of each clip, `(batch,)`, if given, so that padding does not change them.
        """
        learned_time_patches, mel_patches = self.config.position_grid
        positions = self.position_embeddings[0, 1:].view(learned_time_patches, mel_patches, -1)
        if num_time_patches is None:
            # a compiled graph must not depend on this length, since it is reused for others
            if not torch.compiler.is_compiling() and time_patches == learned_time_patches:
                return positions[None]
            num_time_patches = torch.full((1,), time_patches, device=positions.device)
        with torch.autocast(positions.device.type, enabled=False):  # bfloat16 would round the weights to 3 digits
            weights = bicubic_resize_matrix(learned_time_patches, num_time_patches, time_patches)
            resized = weights @ positions.float().flatten(1)
        return resized.unflatten(-1, (mel_patches, -1))


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """
    Attention as matrix products: queries, keys and values `(batch, heads, tokens, head_dim)` to the output
    `(batch, tokens, heads, head_dim)` and the weights `(batch, heads, tokens, tokens)`.
    """
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class ASiTAttention(nn.Module):
    """Multi-head self-attention over `(batch, tokens, hidden_size)`."""

    def __init__(self, config: ASiTConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.attention_dropout = config.attention_probs_dropout_prob
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        width, bias = config.hidden_size, config.qkv_bias
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=bias) for _ in range(3))
        self.o_proj = nn.Linear(width, width)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        device_type = hidden_states.device.type
        if torch.is_autocast_enabled(device_type):  # cast once instead of in each projection
            hidden_states = hidden_states.to(torch.get_autocast_dtype(device_type))
        heads_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(heads_shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        implementation = self.config._attn_implementation
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        kwargs |= {"dropout": self.attention_dropout if self.training else 0.0, "scaling": self.scaling}
        output, weights = attention(self, query, key, value, attention_mask, **kwargs)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


class ASiTMLP(nn.Module):
    def __init__(self, config: ASiTConfig):
        super().__init__()
        self.activation = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class ASiTLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer. `drop_path_scale` of shape `(2, batch, 1, 1)` scales attention and MLP per clip."""

    def __init__(self, config: ASiTConfig):
        super().__init__()
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = ASiTAttention(config)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ASiTMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        drop_path_scale: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        # no annotations: torch.compile of torch 2.6 cannot trace `|` in them
        def attend(states, mask):
            return self.dropout(self.attention(self.layernorm_before(states), mask, **kwargs)[0])

        def transform(states, mask):
            return self.dropout(self.mlp(self.layernorm_after(states)))

        scales = (None, None) if drop_path_scale is None else drop_path_scale
        hidden_states = _add_branch(hidden_states, attention_mask, attend, scales[0])
        return _add_branch(hidden_states, attention_mask, transform, scales[1])


def _add_branch(
    hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, branch: Callable, scale: torch.Tensor | None
) -> torch.Tensor:
    """Adds a residual branch, scaled by `scale` of shape `(batch, 1, 1)`."""
    if scale is None:
        return hidden_states + branch(hidden_states, attention_mask)
    # A CPU computes only kept branches, 5 % less work at a rate of 0.1; an accelerator would wait to learn which.
    if hidden_states.device.type == "cpu" and not torch.compiler.is_compiling():
        kept = scale.flatten().nonzero().flatten()
        if 0 < len(kept) < len(scale):
            mask = None if attention_mask is None else attention_mask[kept]
            return hidden_states.index_add(0, kept, branch(hidden_states.index_select(0, kept), mask) * scale[kept])
    return torch.addcmul(hidden_states, branch(hidden_states, attention_mask), scale)


class ASiTPreTrainedModel(PreTrainedModel):
    """Weights, loading and saving shared by all ASiT models."""

    config: ASiTConfig
    config_class = ASiTConfig
    base_model_prefix = "asit"
    main_input_name = "input_values"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    # beside the encoder, a pretraining checkpoint holds the teacher (or the student), heads and centers
    _keys_to_ignore_on_load_unexpected = [r"^(teacher|student|classifier)\.", r"^heads\.", r"^(cls|patch)_center\."]
    _no_split_modules = ["ASiTEmbeddings", "ASiTLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ASiTLayer, "attentions": ASiTAttention}
    _input_embed_layer = "patch_embeddings"
    accepts_loss_kwargs = False  # losses are means over the batch, so Trainer must divide them by accumulation steps

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike | None,
        *args: Any,
        config: ASiTConfig | str | PathLike | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        As in Transformers. The local folder of an adapter of peft gives its base model with the adapter merged into
        it and with the classes of the `config.json` saved beside it; as `ASiTModel`, the encoder of that model. Its
        loading info names the weights that neither the base model nor the adapter has.

        Raises:
            `ValueError`: weights of the base model have another shape, and the adapter does not replace them.
        """
        path, adapter_kwargs = pretrained_model_name_or_path, kwargs.get("adapter_kwargs") or {}
        folder = adapter_kwargs.get("_adapter_model_path", path)  # the auto classes pass the base model as the path
        if (adapter := read_adapter(folder)) is None:
            return super().from_pretrained(path, *args, config=config, **kwargs)
        kwargs.pop("adapter_kwargs", None)
        dtype = {name: kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs}
        # a `config` from `pipeline()` may be that of the base model, which does not know the adapter's classes
        config, kwargs = cls.config_class.from_pretrained(folder, return_unused_kwargs=True, **kwargs)
        peft, folder = import_module("peft"), str(folder)
        # an adapter of a model with a head names the encoder, which may also have been adapted alone
        with_head = any(".asit." in name for name in peft.load_peft_weights(folder, device="cpu"))
        is_frame = config.architectures == [ASiTForAudioFrameClassification.__name__]
        classifier = ASiTForAudioFrameClassification if is_frame else ASiTForAudioClassification
        trained = classifier if cls is ASiTModel and with_head else cls
        base, verbosity = adapter["base_model_name_or_path"], logging.get_verbosity()
        returns_info, ignores = (
            kwargs.pop(name, False) for name in ("output_loading_info", "ignore_mismatched_sizes")
        )
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        # the base model has no classifier, or one for other classes, and the adapter has its own
        logging.set_verbosity_error()
        try:
            load = super(ASiTPreTrainedModel, trained).from_pretrained
            model, info = load(base, *args, config=config, **dtype, **kwargs)
        finally:
            logging.set_verbosity(verbosity)
        # those that the adapter replaces, and those that an encoder does without
        replaced = {*(adapter.get("modules_to_save") or ()), *(["classifier"] if trained is not cls else [])}
        for name in ("missing_keys", "mismatched_keys"):
            keys = [(key, key) if isinstance(key, str) else (key[0], key) for key in info[name]]
            info[name] = {key for weight, key in keys if replaced.isdisjoint(weight.split("."))}
        for weight, found, expected in info["mismatched_keys"] if not ignores else ():
            raise ValueError(f"{base}: expected {weight} of shape {tuple(expected)}, got {tuple(found)}")
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"]))
            logger.warning(f"neither {base} nor the adapter {folder} has {missing}: random values, to be trained")
        # not `load_adapter`, which in transformers 5.6 leaves out the classifier
        adapted = model if with_head or cls is ASiTModel else model.asit
        peft.PeftModel.from_pretrained(adapted, folder).merge_and_unload()
        model = (model if trained is cls else model.asit).eval()
        return (model, info) if returns_info else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):  # torch's default, as in the official code
            init.kaiming_uniform_(module.weight, a=5**0.5)
            fan_in = module.weight[0].numel()
            init.uniform_(module.bias, -(fan_in**-0.5), fan_in**-0.5)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, ASiTEmbeddings):
            init.trunc_normal_(module.cls_token, std=std)
            init.trunc_normal_(module.position_embeddings, std=std)


class ASiTModel(ASiTPreTrainedModel):
    """
    The ASiT encoder: a vision transformer on 16 x 16 patches of a normalized log-mel spectrogram.

    Args:
        config ([`ASiTConfig`]): the architecture.
    """

    def __init__(self, config: ASiTConfig):
        super().__init__(config)
        self.embeddings = ASiTEmbeddings(config)
        self.layers = nn.ModuleList([ASiTLayer(config) for _ in range(config.num_hidden_layers)])
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embeddings

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        drop_path_noise: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            input_values (`torch.Tensor` of shape `(batch, frames, num_mel_bins)`): normalized log-mel spectrograms of
                any length. Trailing frames that do not fill a patch are cut; clips shorter than one patch are padded
                with zeros.
            attention_mask (`torch.Tensor` of shape `(batch, frames)`, *optional*): 1 for real frames, 0 for padding on
                the right. A padded clip gets the same output as alone.
            drop_path_noise (`torch.Tensor` of shape `(layers, 2, batch)`, *optional*): uniform noise in [0, 1) that
                decides which branches stochastic depth drops in training, for reproducible runs.
            kwargs: `output_hidden_states`, `output_attentions`, `return_dict` and arguments of the attention.

        Returns:
            [`BaseModelOutputWithPooling`]: `last_hidden_state` of shape
            `(batch, 1 + time_patches * mel_patches, hidden_size)`, where patch `(t, m)` is token
            `1 + t * mel_patches + m`; `pooler_output` of shape `(batch, hidden_size)`, or `(batch, 2 * hidden_size)`
            with `pooling_mode="cls_mean"`.
        """
        if attention_mask is not None and attention_mask.shape != input_values.shape[:2]:
            self._check_mask(attention_mask, input_values)
        num_time_patches = None if attention_mask is None else self._num_time_patches(attention_mask)
        hidden_states = self.embeddings(input_values, num_time_patches)
        token_mask = None  # (batch, tokens): true for the CLS token and the patches of real frames
        if num_time_patches is not None:
            num_real = 1 + num_time_patches * self.config.position_grid[1]
            token_mask = torch.arange(hidden_states.shape[1], device=num_real.device) < num_real[:, None]
        layer_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=token_mask
        )
        for layer, scale in zip(self.layers, self._drop_path_scales(hidden_states, drop_path_noise)):
            hidden_states = layer(hidden_states, layer_mask, scale, **kwargs)
        hidden_states = self.layernorm(hidden_states)
        return BaseModelOutputWithPooling(hidden_states, self._pool(hidden_states, token_mask))

    def embed(
        self, input_values: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> BaseModelOutputWithPooling:
        r"""
        Embeddings of clips of any length, for sentence-transformers. Longer clips than 30 s are embedded in windows
        of that length, cut to whole patches, and averaged with the windows' numbers of time patches as weights.

        Args:
            input_values (`torch.Tensor` of shape `(batch, frames, num_mel_bins)`): as in `forward`, of any
                floating-point type.
            attention_mask (`torch.Tensor` of shape `(batch, frames)`, *optional*): as in `forward`.

        Returns:
            [`BaseModelOutputWithPooling`] with `pooler_output` alone.
        """
        values, patch_size = input_values.to(self.dtype), self.config.patch_size
        window = MAX_FRAMES // patch_size * patch_size
        if values.shape[1] < window + patch_size:
            return BaseModelOutputWithPooling(pooler_output=self(values, attention_mask).pooler_output)
        logger.warning_once(
            f"clips longer than {window / 100:.2f} s are embedded in windows of that length, whose embeddings are "
            f"averaged; the longest clip here has {values.shape[1] / 100:.2f} s"
        )
        mask = values.new_ones(values.shape[:2], dtype=torch.long) if attention_mask is None else attention_mask
        time_patches = self._num_time_patches(mask)
        pooled = values.new_zeros(len(values), self.config.pooled_size, dtype=torch.float32)
        for start in range(0, values.shape[1], window):
            in_window = (time_patches - start // patch_size).clamp(0, window // patch_size)
            rows = in_window.nonzero()[:, 0]
            if len(rows):
                part, real = values[rows, start : start + window], mask[rows, start : start + window]
                weights = (in_window / time_patches)[rows, None]
                pooled.index_add_(0, rows, weights * self(part, real).pooler_output.float())
        return BaseModelOutputWithPooling(pooler_output=pooled.to(self.dtype))

    @torch.compiler.disable
    def _check_mask(self, attention_mask: torch.Tensor, input_values: torch.Tensor) -> None:
        if attention_mask.dim() != 2 or attention_mask.shape[0] != input_values.shape[0]:
            expected = f"expected an attention_mask of shape (batch, frames) {tuple(input_values.shape[:2])}"
            raise ValueError(f"{expected}, got {tuple(attention_mask.shape)}")
        entries = f"{attention_mask.shape[1]} entries per clip for {input_values.shape[1]} frames"
        logger.warning_once(f"attention_mask has {entries}; its number of ones is used as the clip's length in frames")

    def _num_time_patches(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """Time patches of real frames, at least one: `(batch, frames)` to `(batch,)`."""
        return (attention_mask.sum(-1) // self.config.patch_size).clamp_min(1)

    def _drop_path_scales(self, hidden_states: torch.Tensor, noise: torch.Tensor | None) -> list:
        """Factors of each layer's two branches, `(2, batch, 1, 1)`, or `None` without stochastic depth."""
        num_layers, rate, batch = len(self.layers), self.config.drop_path_rate, hidden_states.shape[0]
        if not self.training or rate == 0:
            return [None] * num_layers
        if noise is None:
            noise = torch.rand(num_layers, 2, batch, device=hidden_states.device)
        if noise.shape != (num_layers, 2, batch):
            raise ValueError(f"expected drop_path_noise of shape {(num_layers, 2, batch)}, got {tuple(noise.shape)}")
        rates = torch.linspace(0, rate, num_layers, device=noise.device)[:, None, None]
        scales = (noise >= rates) / (1 - rates)
        return list(scales[..., None, None].to(hidden_states.dtype))

    def _pool(self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
        cls_token, patches = hidden_states[:, 0], hidden_states[:, 1:]
        if self.config.pooling_mode == "cls":
            return cls_token
        if token_mask is None:
            mean = patches.mean(1)
        else:
            weights = token_mask[:, 1:, None].to(patches.dtype)
            mean = (patches * weights).sum(1) / weights.sum(1)
        return mean if self.config.pooling_mode == "mean" else torch.cat((cls_token, mean), dim=-1)


class ASiTForAudioClassification(ASiTPreTrainedModel):
    """
    ASiT with a linear classifier on the pooled output.

    Args:
        config ([`ASiTConfig`]): the architecture. `problem_type` chooses the loss: `"single_label_classification"`
            (cross-entropy with class ids or probabilities), `"multi_label_classification"` (binary cross-entropy) or
            `"regression"` (mean squared error). `None` is set from the first labels: regression for a single class,
            multi-label for floats, single-label for integers.
    """

    def __init__(self, config: ASiTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.asit = ASiTModel(config)
        self.classifier = nn.Linear(config.pooled_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        r"""
        Args:
            input_values (`torch.Tensor` of shape `(batch, frames, num_mel_bins)`): see [`ASiTModel`].
            attention_mask (`torch.Tensor` of shape `(batch, frames)`, *optional*): 1 for real frames.
            labels (`torch.Tensor` of shape `(batch,)` or `(batch, num_labels)`, *optional*): class ids, or one target
                for each class.

        Returns:
            [`SequenceClassifierOutput`] with `logits` of shape `(batch, num_labels)` and, with `labels`, `loss`.
        """
        outputs: BaseModelOutputWithPooling = self.asit(input_values, attention_mask=attention_mask, **kwargs)
        logits, loss = self.classifier(outputs.pooler_output), None
        if labels is not None:
            if self.config.problem_type is None:
                kind = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
                self.config.problem_type = "regression" if self.num_labels == 1 else kind
            loss = classification_loss(logits, labels, self.config.problem_type)
        return SequenceClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


LOSSES = {
    "single_label_classification": nn.functional.cross_entropy,
    "multi_label_classification": nn.functional.binary_cross_entropy_with_logits,
    "regression": nn.functional.mse_loss,
}


def classification_loss(logits: torch.Tensor, labels: torch.Tensor, problem_type: str) -> torch.Tensor:
    """
    Mean loss over all leading dimensions, in float32, of logits `(..., num_labels)` and labels `(...)` or
    `(..., num_labels)`. For `problem_type`, see [`ASiTForAudioClassification`].
    """
    logits, labels = logits.float(), labels.to(logits.device)
    if problem_type not in LOSSES:
        raise ValueError(f"expected a problem_type of {sorted(LOSSES)}, got {problem_type!r}")
    if problem_type == "single_label_classification" and not labels.is_floating_point():
        if labels.shape != logits.shape[:-1]:
            expected = f"class ids of shape {tuple(logits.shape[:-1])} or floats of shape {tuple(logits.shape)}"
            raise ValueError(f"{problem_type} expects {expected}, got ids of shape {tuple(labels.shape)}")
        return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
    if logits.shape[-1] == 1 and labels.shape == logits.shape[:-1]:
        labels = labels[..., None]
    if labels.shape != logits.shape:
        raise ValueError(
            f"{problem_type} expects labels of shape {tuple(logits.shape)}, one target for each class, "
            f"got {tuple(labels.shape)}"
        )
    return LOSSES[problem_type](logits.flatten(0, -2), labels.float().flatten(0, -2))


class ASiTForAudioFrameClassification(ASiTPreTrainedModel):
    """
    ASiT with a linear classifier on every time patch, averaged over mel: one prediction for every `patch_size` frames
    (160 ms).

    Args:
        config ([`ASiTConfig`]): the architecture.
    """

    def __init__(self, config: ASiTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.asit = ASiTModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        r"""
        Args:
            input_values (`torch.Tensor` of shape `(batch, frames, num_mel_bins)`): see [`ASiTModel`].
            attention_mask (`torch.Tensor` of shape `(batch, frames)`, *optional*): 1 for real frames. Logits of
                padding are meaningless and do not count in the loss.
            labels (`torch.Tensor`, *optional*): class ids of shape `(batch, time_patches)` (-100: ignored), or one
                target for each class, `(batch, time_patches, num_labels)`.

        Returns:
            [`TokenClassifierOutput`] with `logits` of shape `(batch, time_patches, num_labels)` and, with `labels`,
            `loss`.
        """
        outputs: BaseModelOutputWithPooling = self.asit(input_values, attention_mask=attention_mask, **kwargs)
        patches = outputs.last_hidden_state[:, 1:].unflatten(1, (-1, self.config.position_grid[1]))
        logits = self.classifier(patches.mean(2))
        loss = None if labels is None else self._loss(logits, labels, attention_mask)
        return TokenClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        labels = labels.to(logits.device)
        if labels.shape[:2] != logits.shape[:2]:
            raise ValueError(
                f"expected labels for (batch, time_patches) {tuple(logits.shape[:2])}, got shape {tuple(labels.shape)}"
            )
        logits = logits.float()
        if labels.dim() == 3:
            losses = nn.functional.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").mean(-1)
            real = torch.ones_like(losses, dtype=torch.bool)
        else:
            losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
            real = labels != -100
        if attention_mask is not None:
            num_time_patches = self.asit._num_time_patches(attention_mask)
            real = real & (torch.arange(logits.shape[1], device=logits.device) < num_time_patches[:, None])
        return (losses * real).sum() / real.sum().clamp_min(1)  # 0 instead of NaN if no frame is labelled


__all__ = ["ASiTForAudioClassification", "ASiTForAudioFrameClassification", "ASiTModel", "ASiTPreTrainedModel"]
