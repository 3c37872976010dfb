"""
Attention for bf16 training on a CPU, registered with transformers as `attn_implementation="blockwise"`.

It processes a few clips at a time, so that their scores stay in the CPU's cache, and recomputes the attention weights
in the backward pass. With torch's fused kernel (sdpa), a bf16 training step takes about 1.25 times as long (small,
preset 2023, one thread).
"""

import torch
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, TrainingArguments
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .device import choices_for

# Attention scores, over all heads, in memory at one time: 2 MiB in bfloat16.
BLOCK_SCORES = 2**20


class BlockwiseAttention(torch.autograd.Function):
    """Attention without mask or dropout over queries, keys and values of shape `(batch, heads, tokens, head_dim)`."""

    @staticmethod
    def forward(ctx, query, key, value, scaling):
        query, key, value = (tensor.contiguous() for tensor in (query, key, value))  # once instead of in each product
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
            weights = _attention_weights(q, k, ctx.scaling)
            scores = torch._softmax_backward_data(g @ v.transpose(1, 2), weights, -1, weights.dtype).mul_(ctx.scaling)
            torch.bmm(scores, k, out=grad_q)
            torch.bmm(scores.transpose(1, 2), q, out=grad_k)
            torch.bmm(weights.transpose(1, 2), g, out=grad_v)
        return *grads, None


def _attention_weights(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    scores = query.new_empty(len(query), query.shape[1], key.shape[1])
    return torch.baddbmm(scores, query, key.transpose(1, 2), beta=0, alpha=scaling).softmax(-1)


def _blocks(query: torch.Tensor) -> list[slice]:
    """Slices of the batch with at most `BLOCK_SCORES` attention scores each."""
    batch, heads, tokens, _ = query.shape
    size = max(1, BLOCK_SCORES // (heads * tokens * tokens))
    return [slice(start, start + size) for start in range(0, batch, size)]


def blockwise_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Blockwise attention where it applies (bfloat16 on a CPU, no mask, dropout or compiler), else sdpa."""
    applies = query.device.type == "cpu" and query.dtype == torch.bfloat16 and attention_mask is None and dropout == 0
    if not applies or torch.compiler.is_compiling():
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    return BlockwiseAttention.apply(query, key, value, scaling).transpose(1, 2), None


AttentionInterface.register("blockwise", blockwise_attention_forward)
AttentionMaskInterface.register("blockwise", sdpa_mask)


def choose_bf16_attention(model: PreTrainedModel, args: TrainingArguments) -> None:
    """Replaces sdpa by what is fastest on the device, if an ASiT model is to be trained in bf16."""
    if args.bf16 and model.config.model_type == "asit" and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(choices_for(args.device).bf16_attention)
