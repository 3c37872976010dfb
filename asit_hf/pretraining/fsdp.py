"""What pretraining needs under FSDP2: options that work here, and an encoder with all its weights."""

import warnings

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from ..modeling_asit import ASiTLayer, ASiTModel


def configure_fsdp(accelerator: Accelerator) -> None:
    """
    Refuses FSDP options that do not work here and replaces two defaults of Accelerate: the modules to shard, and the
    bf16 policy, which would also round spectrograms, losses and the sums of gradients over processes.
    """
    plugin, precision = accelerator.state.fsdp_plugin, accelerator.mixed_precision
    expected = {
        "version": (2, getattr(plugin, "fsdp_version", 1)),
        "state_dict_type": ("FULL_STATE_DICT", plugin.state_dict_type.name),
        "cpu_ram_efficient_loading": (False, plugin.cpu_ram_efficient_loading),  # fails on buffers
    }
    wrong = [f"{name} {value}, got {given}" for name, (value, given) in expected.items() if given != value]
    if wrong:
        raise ValueError(f"fsdp_config: expected {'; '.join(wrong)}. See examples/recipes/fsdp.json")
    if precision not in ("no", "bf16"):
        raise ValueError(f"FSDP: expected float32 or bf16, got {precision}. Set bf16 instead")
    # by default Accelerate also wraps the embeddings, and then fails on the patch embeddings inside them
    plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap or [ASiTLayer.__name__]
    if precision == "bf16":
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    warnings.filterwarnings("ignore", message=".*returned a view tensor")  # no view is changed in place


def unsharded(encoder: ASiTModel) -> ASiTModel:
    """The encoder, or a copy with all its weights if FSDP sharded them; a collective: every process must call it."""
    state = encoder.state_dict()
    if not any(isinstance(value, DTensor) for value in state.values()):
        return encoder
    with torch.device("meta"):  # draws no weights, so the random state does not change
        whole = ASiTModel(encoder.config)
    whole.load_state_dict({name: value.full_tensor() for name, value in state.items()}, assign=True)
    return whole.eval()
