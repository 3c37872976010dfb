"""PyTorch ASiT encoder and its classifiers ([arXiv 2211.13189](https://arxiv.org/abs/2211.13189))."""

from collections.abc import Callable

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput, TokenClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_asit import ASiTConfig
from .fbank_asit import is_real

logger = logging.get_logger(__name__)

# Attention scores, over all heads, that exist at one time in blockwise attention: 2 MiB in half precision.
BLOCK_SCORES = 2**20


def bicubic_resize_matrix(
    source_size: int, target_sizes: torch.Tensor, num_targets: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """
    The weights of a one-dimensional bicubic resize (a = -0.75, half-pixel centers, clamped borders: what
    `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)` computes), for many target sizes at once.

    Args:
        source_size (`int`): number of source points.
        target_sizes (`torch.Tensor` of shape `(batch,)`): how many points each row is resized to.
        num_targets (`int`): the number of target points computed for every row; those past a row's own size repeat
            the border.

    Returns:
        `torch.Tensor` of shape `(batch, num_targets, source_size)`, rows summing to 1.
    """
    device = target_sizes.device
    # number / tensor would be a product with a rounded reciprocal
    scales = torch.full_like(target_sizes, source_size, dtype=dtype) / target_sizes.to(dtype)
    targets = torch.arange(num_targets, device=device, dtype=dtype) + 0.5
    coordinates = targets * scales[:, None] - 0.5
    first = coordinates.floor()
    distance = coordinates - first
    a = -0.75
    weights = torch.zeros(*coordinates.shape, source_size, device=device, dtype=dtype)
    for tap in (-1, 0, 1, 2):
        x = (distance - tap).abs()
        if tap in (0, 1):
            weight = ((a + 2) * x - (a + 3)) * x * x + 1
        else:
            weight = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        index = (first.long() + tap).clamp(0, source_size - 1)
        weights = weights + weight[..., None] * nn.functional.one_hot(index, source_size).to(dtype)
    return weights


_RESIZE_MATRICES: dict[tuple, torch.Tensor] = {}
MAX_RESIZE_MATRICES = 256


def _resize_matrix(source_size: int, target_size: int, device: torch.device) -> torch.Tensor:
    """[`bicubic_resize_matrix`] of one target size, `(1, target_size, source_size)`, kept for each device."""
    key = (source_size, target_size, device)
    if key not in _RESIZE_MATRICES:
        with torch.inference_mode(False):  # what is made in inference mode could not be trained with later
            sizes = torch.full((1,), target_size, device=device)
            matrix = bicubic_resize_matrix(source_size, sizes, target_size)
        if not is_real(matrix):
            return matrix
        if len(_RESIZE_MATRICES) >= MAX_RESIZE_MATRICES:
            _RESIZE_MATRICES.clear()
        _RESIZE_MATRICES[key] = matrix
    return _RESIZE_MATRICES[key]


class ASiTPatchProjection(nn.Conv2d):
    """
    The convolution of the patches, `(batch, 1, frames, mel)` to `(batch, hidden_size, columns, rows)`. On an
    accelerator it is one matrix product, as patches do not overlap: its libraries are slow at one input channel.
    """

    def forward(self, spectrograms: torch.Tensor) -> torch.Tensor:
        if spectrograms.device.type == "cpu":
            return super().forward(spectrograms)
        return self.multiply(spectrograms)

    def multiply(self, spectrograms: torch.Tensor) -> torch.Tensor:
        """The same as one matrix product."""
        size = self.kernel_size[0]
        columns, rows = spectrograms.shape[2] // size, spectrograms.shape[3] // size
        patches = spectrograms[:, 0, : columns * size, : rows * size]
        patches = patches.unflatten(1, (-1, size)).unflatten(3, (-1, size)).transpose(2, 3).flatten(3)
        return nn.functional.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class ASiTPatchEmbeddings(nn.Module):
    """`input_values` of shape `(batch, frames, mel)` to patch embeddings `(batch, columns, rows, hidden_size)`."""

    def __init__(self, config: ASiTConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.num_mel_bins = config.num_mel_bins
        self.projection = ASiTPatchProjection(1, config.hidden_size, config.patch_size, stride=config.patch_size)

    def forward(self, input_values: torch.Tensor) -> torch.Tensor:
        if input_values.dim() != 3 or input_values.shape[-1] != self.num_mel_bins or input_values.shape[0] == 0:
            raise ValueError(
                f"expected input_values of shape (batch, frames, {self.num_mel_bins} mel bins), "
                f"got {tuple(input_values.shape)}"
            )
        dtype = self.projection.weight.dtype
        if input_values.dtype != dtype and not torch.is_autocast_enabled(input_values.device.type):
            raise ValueError(f"expected input_values of the weights' dtype, {dtype}, got {input_values.dtype}")
        missing = self.patch_size - input_values.shape[1]
        if missing > 0:
            input_values = nn.functional.pad(input_values, (0, 0, 0, missing))
        return self.projection(input_values.unsqueeze(1)).permute(0, 2, 3, 1)


class ASiTEmbeddings(nn.Module):
    """Patches, positions and the CLS token: `(batch, 1 + columns * rows, hidden_size)`, columns (time) first."""

    def __init__(self, config: ASiTConfig):
        super().__init__()
        self.config = config
        columns, rows = config.position_grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.patch_embeddings = ASiTPatchEmbeddings(config)
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + columns * rows, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_values: torch.Tensor, num_time_patches: torch.Tensor | None = None) -> torch.Tensor:
        patches = self.patch_embeddings(input_values)
        patches = patches + self.patch_positions(patches.shape[1], num_time_patches).to(patches.dtype)
        cls_token = self.cls_token + self.position_embeddings[:, :1]
        cls_token = cls_token.to(patches.dtype).expand(patches.shape[0], -1, -1)
        return self.dropout(torch.cat((cls_token, patches.flatten(1, 2)), dim=1))

    def patch_positions(self, columns: int, num_time_patches: torch.Tensor | None = None) -> torch.Tensor:
        """
        Positions of shape `(batch or 1, columns, rows, hidden_size)`, resized bicubically along time to `columns`, or
        for every clip to its own number of columns where `num_time_patches` of shape `(batch,)` is given. Positions of a
        clip in a padded batch are thus those that it has alone.
        """
        source_time_patches, rows = self.config.position_grid
        positions = self.position_embeddings[0, 1:].view(source_time_patches, rows, -1)
        # a graph traced at one length must do for others
        is_known = num_time_patches is None and not torch.compiler.is_compiling()
        if is_known and columns == source_time_patches:
            return positions[None]
        # float32: under autocast the weights would be rounded to 3 digits
        with torch.autocast(positions.device.type, enabled=False):
            if is_known:
                weights = _resize_matrix(source_time_patches, columns, positions.device)
            else:
                if num_time_patches is None:
                    num_time_patches = torch.full((1,), columns, device=positions.device)
                weights = bicubic_resize_matrix(source_time_patches, num_time_patches, columns)
            resized = weights @ positions.float().flatten(1)
        return resized.unflatten(-1, (rows, -1))


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as plain matrix products, which also returns the weights `(batch, heads, tokens, tokens)`."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class _BlockwiseAttention(torch.autograd.Function):
    """
    Attention in half precision on a processor, a few clips at a time, so that their scores stay in its cache: torch's
    fused kernel does not reach the rate of its matrix products there, least of all backward.
    """

    @staticmethod
    def forward(ctx, query, key, value, scaling):
        query, key, value = (tensor.contiguous() for tensor in (query, key, value))  # once, not in every product
        ctx.save_for_backward(query, key, value)
        ctx.scaling = scaling
        output = torch.empty_like(query)
        for block in _blocks(query):
            q, k, v, o = (tensor[block].flatten(0, 1) for tensor in (query, key, value, output))
            torch.bmm(_attention_weights(q, k, scaling), v, out=o)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        inputs = (*ctx.saved_tensors, grad.contiguous())
        grads = tuple(torch.empty_like(tensor) for tensor in inputs[:3])
        for block in _blocks(grad):
            q, k, v, g = (tensor[block].flatten(0, 1) for tensor in inputs)
            grad_q, grad_k, grad_v = (tensor[block].flatten(0, 1) for tensor in grads)
            weights = _attention_weights(q, k, ctx.scaling)  # computed again rather than kept
            scores = torch._softmax_backward_data(g @ v.transpose(1, 2), weights, -1, weights.dtype).mul_(ctx.scaling)
            torch.bmm(scores, k, out=grad_q)
            torch.bmm(scores.transpose(1, 2), q, out=grad_k)
            torch.bmm(weights.transpose(1, 2), g, out=grad_v)
        return *grads, None


def _attention_weights(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    scores = query.new_empty(len(query), query.shape[1], key.shape[1])
    return torch.baddbmm(scores, query, key.transpose(1, 2), beta=0, alpha=scaling).softmax(-1)


def _blocks(query: torch.Tensor) -> list[slice]:
    """Slices of the batch of `(batch, heads, tokens, head_dim)` whose scores make one block."""
    batch, heads, tokens, _ = query.shape
    size = max(1, BLOCK_SCORES // (heads * tokens * tokens))
    return [slice(start, start + size) for start in range(0, batch, size)]


class ASiTAttention(nn.Module):
    """Multi-head self-attention over `(batch, tokens, hidden_size)`."""

    def __init__(self, config: ASiTConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.attention_dropout = config.attention_probs_dropout_prob
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        device_type = hidden_states.device.type
        if torch.is_autocast_enabled(device_type):  # once, not again in each of the three projections
            hidden_states = hidden_states.to(torch.get_autocast_dtype(device_type))
        heads_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(heads_shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self._is_blockwise(query, attention_mask):
            output = _BlockwiseAttention.apply(query, key, value, self.scaling).transpose(1, 2)
            return self.o_proj(output.reshape(hidden_states.shape)), None
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights

    def _is_blockwise(self, query: torch.Tensor, attention_mask: torch.Tensor | None) -> bool:
        return (
            self.config._attn_implementation == "sdpa"
            and query.device.type == "cpu"
            and query.dtype == torch.bfloat16
            and attention_mask is None
            and not (self.training and self.attention_dropout > 0)
            and not torch.compiler.is_compiling()
        )


class ASiTMLP(nn.Module):
    def __init__(self, config: ASiTConfig):
        super().__init__()
        self.activation = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class ASiTLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer. `drop_path_scale` of shape `(2, batch, 1, 1)` scales its two branches per clip."""

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
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        def attend(states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            return self.dropout(self.attention(self.layernorm_before(states), mask, **kwargs)[0])

        def transform(states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            return self.dropout(self.mlp(self.layernorm_after(states)))

        for index, branch in enumerate((attend, transform)):
            scale = None if drop_path_scale is None else drop_path_scale[index]
            hidden_states = _add_branch(hidden_states, attention_mask, branch, scale)
        return hidden_states


def _add_branch(
    hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, branch: Callable, scale: torch.Tensor | None
) -> torch.Tensor:
    """Adds a branch, scaled per clip. On a processor, what is dropped is not computed; a device would have to wait."""
    if scale is None:
        return hidden_states + branch(hidden_states, attention_mask)
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
    # what a pretraining checkpoint holds beside the student's encoder
    _keys_to_ignore_on_load_unexpected = [r"^teacher\.", r"^heads\.", r"^(cls|patch)_center\."]
    _no_split_modules = ["ASiTEmbeddings", "ASiTLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ASiTLayer, "attentions": ASiTAttention}
    _input_embed_layer = "patch_embeddings"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):  # torch's own default, as the authors leave it
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
        config ([`ASiTConfig`]): its sizes.
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
            input_values (`torch.Tensor` of shape `(batch, frames, num_mel_bins)`): normalized log-mel, any number of
                frames; the last ones short of a patch are cut, fewer than one patch are filled up with zeros.
            attention_mask (`torch.Tensor` of shape `(batch, frames)`, *optional*): 1 for real frames, 0 for padding on
                the right. A padded clip gives the output it gives alone.
            drop_path_noise (`torch.Tensor` of shape `(layers, 2, batch)`, *optional*): uniform noise in [0, 1) that
                decides which branches stochastic depth drops in training, for reproducible runs.
            kwargs: `output_hidden_states`, `output_attentions`, `return_dict`, and what the attention takes.

        Returns:
            [`BaseModelOutputWithPooling`]: `last_hidden_state` of shape `(batch, 1 + columns * rows, hidden_size)`,
            CLS first, then the patches, time-major (index = 1 + column * rows + row); `pooler_output` of shape
            `(batch, hidden_size)`, or twice that for `pooling_mode="cls_mean"`.
        """
        if attention_mask is not None and attention_mask.shape != input_values.shape[:2]:
            self._question_mask(attention_mask, input_values)
        num_time_patches = None if attention_mask is None else self._num_time_patches(attention_mask)
        hidden_states = self.embeddings(input_values, num_time_patches)
        num_tokens = hidden_states.shape[1]
        token_mask = None if num_time_patches is None else self._token_mask(num_time_patches, num_tokens)
        layer_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=token_mask
        )
        scales = self._drop_path_scales(hidden_states, drop_path_noise)
        for layer, scale in zip(self.layers, scales):
            hidden_states = layer(hidden_states, layer_mask, scale, **kwargs)
        hidden_states = self.layernorm(hidden_states)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, pooler_output=self._pool(hidden_states, token_mask)
        )

    @torch.compiler.disable
    def _question_mask(self, attention_mask: torch.Tensor, input_values: torch.Tensor) -> None:
        if attention_mask.dim() != 2 or attention_mask.shape[0] != input_values.shape[0]:
            raise ValueError(
                f"expected an attention_mask of shape (batch, frames) {tuple(input_values.shape[:2])}, "
                f"got {tuple(attention_mask.shape)}"
            )
        logger.warning_once(
            f"The attention_mask has {attention_mask.shape[1]} columns for {input_values.shape[1]} frames: the count "
            "of its ones is taken as the clip's frames."
        )

    def _num_time_patches(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """`(batch, frames)` -> `(batch,)`: whole patch columns of real frames, at least one."""
        return (attention_mask.sum(-1) // self.config.patch_size).clamp_min(1)

    def _token_mask(self, num_time_patches: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Boolean `(batch, tokens)`: the CLS token and the patches of real columns."""
        num_real = 1 + num_time_patches * self.config.position_grid[1]
        return torch.arange(num_tokens, device=num_time_patches.device) < num_real[:, None]

    def _drop_path_scales(self, hidden_states: torch.Tensor, noise: torch.Tensor | None) -> list:
        """For each layer `None`, or what its branches are multiplied with, `(2, batch, 1, 1)`."""
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
    ASiT with a linear classifier on the pooled output. `config.problem_type` chooses the loss:
    `"single_label_classification"` (cross-entropy; integer labels, or rows of class probabilities),
    `"multi_label_classification"` (binary cross-entropy) or `"regression"` (mean squared error). Where it is not set,
    the labels decide as in other models: one class is regression, floats are multi-label, integers single-label.

    Args:
        config ([`ASiTConfig`]): the encoder's sizes, `pooling_mode`, `problem_type` and the labels (`id2label`).
    """

    # the losses are means over the batch: Trainer must divide them by the accumulation steps
    accepts_loss_kwargs = False

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
            labels (`torch.Tensor` of shape `(batch,)` or `(batch, num_labels)`, *optional*): class ids, or a target
                for every class.

        Returns:
            [`SequenceClassifierOutput`] with `logits` of shape `(batch, num_labels)` and, given labels, `loss`.
        """
        outputs: BaseModelOutputWithPooling = self.asit(input_values, attention_mask=attention_mask, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self._loss(logits, labels)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.config.problem_type is None:
            if self.num_labels == 1:
                self.config.problem_type = "regression"
            elif labels.is_floating_point():
                self.config.problem_type = "multi_label_classification"
            else:
                self.config.problem_type = "single_label_classification"
        return classification_loss(logits, labels, self.config.problem_type)


LOSSES = {
    "single_label_classification": nn.functional.cross_entropy,
    "multi_label_classification": nn.functional.binary_cross_entropy_with_logits,
    "regression": nn.functional.mse_loss,
}


def classification_loss(logits: torch.Tensor, labels: torch.Tensor, problem_type: str) -> torch.Tensor:
    """
    Mean loss over all leading dimensions, in float32 whatever the precision of the logits.

    Args:
        logits (`torch.Tensor` of shape `(..., num_labels)`).
        labels (`torch.Tensor` of shape `(...)` or `(..., num_labels)`).
        problem_type (`str`): see [`ASiTForAudioClassification`].
    """
    logits, labels = logits.float(), labels.to(logits.device)
    if problem_type not in LOSSES:
        raise ValueError(f"problem_type must be one of {sorted(LOSSES)}, got {problem_type!r}")
    if problem_type == "single_label_classification" and not labels.is_floating_point():
        if labels.shape != logits.shape[:-1]:
            raise ValueError(
                f"{problem_type} needs class ids of shape {tuple(logits.shape[:-1])}, or floats of shape "
                f"{tuple(logits.shape)}, got ids of shape {tuple(labels.shape)}"
            )
        return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
    if logits.shape[-1] == 1 and labels.shape == logits.shape[:-1]:
        labels = labels[..., None]
    if labels.shape != logits.shape:
        raise ValueError(
            f"{problem_type} needs labels of shape {tuple(logits.shape)}, one target for every class, "
            f"got {tuple(labels.shape)}"
        )
    return LOSSES[problem_type](logits.flatten(0, -2), labels.float().flatten(0, -2))


class ASiTForAudioFrameClassification(ASiTPreTrainedModel):
    """
    ASiT with a linear classifier on every patch column: one prediction each `patch_size` frames (160 ms), from the
    mean of the column's patches over mel.

    Args:
        config ([`ASiTConfig`]): the encoder's sizes and the labels (`id2label`).
    """

    accepts_loss_kwargs = False

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
            attention_mask (`torch.Tensor` of shape `(batch, frames)`, *optional*): 1 for real frames; padded columns
                have logits, which mean nothing and do not count in the loss.
            labels (`torch.Tensor` of shape `(batch, columns)` or `(batch, columns, num_labels)`, *optional*): class
                ids (-100: ignored), or a target for every class, where `columns` is `frames // patch_size`.

        Returns:
            [`TokenClassifierOutput`] with `logits` of shape `(batch, columns, num_labels)`.
        """
        outputs: BaseModelOutputWithPooling = self.asit(input_values, attention_mask=attention_mask, **kwargs)
        rows = self.config.position_grid[1]
        columns = outputs.last_hidden_state[:, 1:].unflatten(1, (-1, rows)).mean(2)
        logits = self.classifier(columns)
        loss = None if labels is None else self._loss(logits, labels, attention_mask)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        labels = labels.to(logits.device)
        if labels.shape[:2] != logits.shape[:2]:
            raise ValueError(
                f"frame labels must have one row a patch column, {tuple(logits.shape[:2])}, got {tuple(labels.shape)}"
            )
        multi_label = labels.dim() == 3
        real = torch.ones_like(logits[..., 0], dtype=torch.bool) if multi_label else labels != -100
        if attention_mask is not None:
            num_time_patches = self.asit._num_time_patches(attention_mask)
            real = real & (torch.arange(logits.shape[1], device=logits.device) < num_time_patches[:, None])
        if multi_label:
            losses = nn.functional.binary_cross_entropy_with_logits(
                logits.float(), labels.float(), reduction="none"
            ).mean(-1)
        else:
            losses = nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
        return (losses * real).sum() / real.sum().clamp_min(1)  # 0, not NaN, where nothing is labelled


__all__ = ["ASiTForAudioClassification", "ASiTForAudioFrameClassification", "ASiTModel", "ASiTPreTrainedModel"]
