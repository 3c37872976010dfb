"""Attention maps of one clip."""

import torch

from ..modeling_asit import ASiTModel, ASiTPreTrainedModel


@torch.inference_mode()
def attention_rollout(model: ASiTPreTrainedModel, input_values: torch.Tensor) -> torch.Tensor:
    """
    The share of every patch in the pooled output by [attention rollout](https://arxiv.org/abs/2005.00928): the product
    over layers of (mean over heads + identity) / 2, read at the tokens that `config.pooling_mode` pools: CLS, the mean
    of the patches, or both in equal parts.

    Args:
        model ([`ASiTModel`], or a model that has one as `asit`; the student's in [`ASiTForPreTraining`]).
        input_values (`torch.Tensor` of shape `(frames, mel)` or `(1, frames, mel)`): one clip from the feature
            extractor. Memory is proportional to its tokens squared, times layers and heads.

    Returns:
        `torch.Tensor` of shape `(time_patches, mel_patches)`, low mel bins first, float32 on the CPU; the shares
        sum to 1.
    """
    encoder = getattr(model, model.base_model_prefix, model)
    clips = input_values[None] if input_values.dim() == 2 else input_values
    if clips.dim() != 3 or len(clips) != 1:
        raise ValueError(f"expected one clip (frames, mel) or (1, frames, mel), got {tuple(input_values.shape)}")
    tokens = None
    for attention in _attentions(encoder, clips.to(encoder.device, encoder.dtype)):
        mean = attention[0].float().mean(0)
        layer = (mean + torch.eye(len(mean), device=mean.device)) / 2
        tokens = layer if tokens is None else layer @ tokens
    cls_token, patches = tokens[0, 1:], tokens[1:, 1:].mean(0)
    pooled = {"cls": cls_token, "mean": patches, "cls_mean": cls_token / cls_token.sum() + patches / patches.sum()}
    shares = pooled[encoder.config.pooling_mode]
    return (shares / shares.sum()).unflatten(0, (-1, encoder.config.position_grid[1])).cpu()


def _attentions(encoder: ASiTModel, input_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Attention weights `(1, heads, tokens, tokens)` of every layer, which only the eager implementation returns."""
    implementation, was_training = encoder.config._attn_implementation, encoder.training
    encoder.set_attn_implementation("eager")
    encoder.eval()
    try:
        return encoder(input_values, output_attentions=True).attentions
    finally:
        encoder.set_attn_implementation(implementation)
        encoder.train(was_training)
