"""What a model attends to in one clip."""

import torch

from ..modeling_asit import ASiTModel, ASiTPreTrainedModel


@torch.inference_mode()
def attention_rollout(model: ASiTPreTrainedModel, input_values: torch.Tensor) -> torch.Tensor:
    """
    How much of every patch reaches the pooled output through attention, by
    [attention rollout](https://arxiv.org/abs/2005.00928): the product over layers of (mean over heads + identity) / 2.
    The rows of the tokens that `config.pooling_mode` pools count: CLS, the patches' mean, or both in equal parts.

    Args:
        model ([`ASiTModel`], or a model that has one as `asit`; of [`ASiTForPreTraining`] it is the student's).
        input_values (`torch.Tensor` of shape `(frames, mel)` or `(1, frames, mel)`): one clip, as the feature
            extractor gives it. Memory is in proportion to its tokens squared, times layers and heads.

    Returns:
        `torch.Tensor` of shape `(columns, rows)`, columns over time and rows from low to high mel bins, float32 on the
        processor; shares that sum to 1.
    """
    encoder = getattr(model, model.base_model_prefix, model)
    clip = one_clip(input_values).to(encoder.device, encoder.dtype)
    tokens = None
    for attention in _attentions(encoder, clip[None]):
        mean = attention[0].float().mean(0)
        layer = (mean + torch.eye(len(mean), device=mean.device)) / 2
        tokens = layer if tokens is None else layer @ tokens
    cls_token, patches = tokens[0, 1:], tokens[1:, 1:].mean(0)
    reached = {"cls": cls_token, "mean": patches, "cls_mean": cls_token / cls_token.sum() + patches / patches.sum()}
    shares = reached[encoder.config.pooling_mode]
    return (shares / shares.sum()).unflatten(0, (-1, encoder.config.position_grid[1])).cpu()


def one_clip(input_values: torch.Tensor) -> torch.Tensor:
    clip = input_values[0] if input_values.dim() == 3 and len(input_values) == 1 else input_values
    if clip.dim() != 2:
        raise ValueError(
            f"expected one clip of shape (frames, mel) or (1, frames, mel), got {tuple(input_values.shape)}"
        )
    return clip


def _attentions(encoder: ASiTModel, input_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Every layer's weights `(1, heads, tokens, tokens)`; only the eager implementation returns them."""
    implementation, was_training = encoder.config._attn_implementation, encoder.training
    encoder.set_attn_implementation("eager")
    encoder.eval()
    try:
        return encoder(input_values, output_attentions=True).attentions
    finally:
        encoder.set_attn_implementation(implementation)
        encoder.train(was_training)
