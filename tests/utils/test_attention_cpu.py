import pytest
import torch
from tiny import MEL, build
from torch import nn

from asit_hf import ASiTFeatureExtractor, ASiTForPreTraining
from asit_hf.pretraining.arguments import ASiTPreTrainingArguments
from asit_hf.pretraining.trainer import ASiTPreTrainer
from asit_hf.utils import attention_cpu
from asit_hf.utils.attention_cpu import BlockwiseAttention


@pytest.fixture
def blockwise_calls(monkeypatch) -> list:
    """One entry for each call of the blockwise kernel."""
    calls, blocks = [], attention_cpu._blocks
    monkeypatch.setattr(attention_cpu, "_blocks", lambda query: calls.append(query.dtype) or blocks(query))
    return calls


@pytest.mark.parametrize("block", [1, 2**20])
def test_blockwise_attention_in_bfloat16_equals_attention(monkeypatch, block):
    monkeypatch.setattr(attention_cpu, "BLOCK_SCORES", block)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(5, 2, 13, 8, generator=generator, dtype=torch.float64) for _ in range(3)]
    rounded = [value.bfloat16().requires_grad_() for value in inputs]
    exact = [value.detach().double().requires_grad_() for value in rounded]
    output = BlockwiseAttention.apply(*rounded, 8**-0.5)
    expected = nn.functional.scaled_dot_product_attention(*exact)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=0.02)
    direction = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad(output, rounded, direction.bfloat16())
    references = torch.autograd.grad(expected, exact, direction)
    for gradient, reference in zip(gradients, references):
        torch.testing.assert_close(gradient.double(), reference, rtol=0, atol=0.05)


def test_an_encoder_in_bfloat16_agrees_with_sdpa(blockwise_calls):
    values = torch.randn(3, 96, MEL, generator=torch.Generator().manual_seed(0))
    outputs = {}
    for name in ("sdpa", "blockwise"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs[name] = build(attn_implementation=name)(values).last_hidden_state.float()
    assert blockwise_calls == [torch.bfloat16] * 2  # one per layer
    torch.testing.assert_close(outputs["blockwise"], outputs["sdpa"], rtol=0, atol=0.05)


@pytest.mark.parametrize("case", ["float32", "padding"])
def test_sdpa_replaces_the_kernel_where_it_does_not_apply(case, blockwise_calls):
    values = torch.randn(2, 96, MEL, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(96) < torch.tensor([[96], [40]])).long() if case == "padding" else None
    outputs = []
    for name in ("sdpa", "blockwise"):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case == "padding"):
            outputs.append(build(attn_implementation=name)(values, attention_mask=mask).last_hidden_state)
    assert blockwise_calls == []
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("bf16", "given", "expected"),
    [(True, "sdpa", "blockwise"), (True, "eager", "eager"), (False, "sdpa", "sdpa")],
)
def test_the_trainer_chooses_blockwise_attention_for_bf16_on_a_cpu(bf16, given, expected, tmp_path):
    model = build(ASiTForPreTraining, attn_implementation=given)
    args = ASiTPreTrainingArguments(
        str(tmp_path), use_cpu=True, bf16=bf16, max_steps=1, plot_steps=0, report_to="none"
    )
    extractor = ASiTFeatureExtractor(num_mel_bins=MEL)
    ASiTPreTrainer(model, args, extractor, train_dataset=[0] * 8, data_collator=list)
    for encoder in (model.asit, model.teacher["asit"]):
        assert encoder.config._attn_implementation == expected
    model.save_pretrained(tmp_path)
    assert "blockwise" not in (tmp_path / "config.json").read_text()
