"""
Fake CUDA tensors on a machine without a GPU: torch's fake tensors have a device, a shape and a type, but no values.
Code that runs on them has consistent devices and shapes and never waits for a value, which would raise an error.

torch's CPU build can create fake CUDA tensors but can neither index them with `None` nor differentiate them, since it
has no device guard and no accelerator. Two small libraries, loaded before torch, provide both; building needs g++.

    environment = {**os.environ, "LD_PRELOAD": fake_cuda.build(folder)}
    subprocess.run([sys.executable, "script_with_fake_tensors.py"], env=environment)
"""

import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from asit_hf import fbank_asit

# Reports CUDA as the accelerator of this build.
ACCELERATOR = """
#include <cstdint>
#include <optional>
namespace c10 { enum class DeviceType : int8_t { CPU = 0, CUDA = 1 }; }
namespace at::accelerator {
__attribute__((visibility("default"))) std::optional<c10::DeviceType> getAccelerator(bool) {
  return c10::DeviceType::CUDA;
}
}
"""
# One device with one stream, on which nothing is pending.
HOOKS = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
const Device first(DeviceType::CUDA, 0);
struct Guard : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return first; }
  Device getDevice() const override { return first; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, first); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, first); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
struct Registration {
  Registration() { impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(new Guard); }
} registration;
struct CUDAHooks : at::CUDAHooksInterface {
  CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  bool isBuilt() const override { return false; }
  bool isAvailable() const override { return true; }
  DeviceIndex current_device() const override { return 0; }
};
namespace at {
using at::CUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)
}
"""
# Operations that launch no kernel: views, and uninitialized memory.
NO_KERNEL = {
    *("_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "detach", "diagonal", "expand", "permute"),
    *("reshape", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unflatten"),
    *("unfold", "unsqueeze", "view", "view_as_real", "empty", "empty_like", "empty_strided", "new_empty"),
    *("new_empty_strided", "is_same_size", "lift_fresh", "device", "sym_size", "resolve_conj"),
}


def build(folder: Path) -> str:
    """
    Compiles the two libraries into `folder` and returns the value for `LD_PRELOAD`.

    Raises:
        FileNotFoundError: g++ is not installed.
    """
    if shutil.which("g++") is None:
        raise FileNotFoundError("fake CUDA tensors need g++, which is not installed")
    torch_folder = Path(torch.__file__).parent
    include, libraries = f"-I{torch_folder / 'include'}", torch_folder / "lib"
    links = [include, f"-L{libraries}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{libraries}"]
    built = []
    for name, source, options in (("accelerator", ACCELERATOR, []), ("hooks", HOOKS, links)):
        built.append(str(folder / f"lib{name}.so"))
        command = ["g++", "-O0", "-std=c++20", "-fPIC", "-shared", "-x", "c++", "-", "-o", built[-1], *options]
        subprocess.run(command, input=source, text=True, check=True)
    return " ".join(built)


@contextmanager
def fake_cuda() -> Iterator[None]:
    """
    Within the block, `device="cuda"` makes fake tensors, and fused attention is CUDA's flash-attention kernel. The
    package's caches per device accept fake tensors; they are discarded afterwards.
    """
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(fbank_asit, "_CONSTANTS", {}))
        stack.enter_context(mock.patch.object(fbank_asit, "is_real", return_value=True))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False))
        stack.enter_context(mock.patch("torch.cuda.is_bf16_supported", return_value=True))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", _flash_attention))
        yield


def _flash_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **kwargs):
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]


def to_fake_cuda(model: nn.Module) -> nn.Module:
    """Replaces the model's weights by fake ones on the device, in place."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                value = torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda")
                module._parameters[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
    return model


class KernelCounter(TorchDispatchMode):
    """
    Counts the kernels that operations on CUDA tensors would launch: one each, but one per tensor for a `foreach` whose
    operands differ in shape. Also counts the least bytes that they read and write, and copies from the host.
    """

    def __init__(self):
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.bytes = 0
        self.host_copies: list[tuple[int, ...]] = []  # shapes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        inputs, outputs = (
            [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)] for tree in ((args, kwargs), result)
        )
        tensors = inputs + outputs
        if name in NO_KERNEL or not any(tensor.device.type == "cuda" for tensor in tensors):
            return result
        if name in ("_to_copy", "copy_") and any(tensor.device.type == "cpu" for tensor in inputs):
            self.host_copies.append(tuple(inputs[-1].shape))
        self.kernels[name] += _foreach_launches(args) if name.startswith("_foreach") else 1
        self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


def _foreach_launches(args: tuple) -> int:
    lists = [value for value in args if isinstance(value, (list, tuple)) and isinstance(value[0], torch.Tensor)]
    alike = all([x.shape for x in other] == [x.shape for x in lists[0]] for other in lists)
    return 1 if alike else len(lists[0])
