"""The parts of the CUDA double (tests/cuda_double.py) that torch meets: tensors, the calls that must not reach its own
device handling, the operators that it has on CUDA alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.cuda_order import Memory, Stream

if TYPE_CHECKING:
    from tests.cuda_double import CudaDouble

# Operators that torch has on CUDA alone: products of 16-bit factors with a wider result, whose terms are exact in it.
ON_CUDA_ALONE = {
    torch.ops.aten.mm.dtype: lambda a, b, dtype: torch.mm(a.to(dtype), b.to(dtype)),
    torch.ops.aten.addmm.dtype: lambda c, a, b, dtype, **scales: torch.addmm(
        c.to(dtype), a.to(dtype), b.to(dtype), **scales
    ),
    torch.ops.aten.addmm.dtype_out: lambda c, a, b, dtype, out, **scales: out.copy_(
        torch.addmm(c.to(dtype), a.to(dtype), b.to(dtype), **scales)
    ),
}


class DeviceTensor(torch.Tensor):
    """A tensor on a device of the double: `inner` holds its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, memory: Memory, device: torch.device) -> DeviceTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        made.inner, made.memory = inner, memory
        return made

    def record_stream(self, stream: Stream) -> None:
        self.memory.record(stream)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        raise RuntimeError(f"{func} on a tensor of the CUDA double outside its block")


class Calls(TorchFunctionMode):
    """What must not reach torch's own device handling: factories, `.to`, `.cuda`, pinned memory."""

    def __init__(self, double: CudaDouble) -> None:
        super().__init__()
        self.double = double

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)
        if func in (Tensor.to, Tensor.cuda):
            places = [x for x in (*args[1:], kwargs.get("device")) if isinstance(x, (torch.device, str))]
            place = torch.device(places[0]) if places else torch.device("cuda") if func is Tensor.cuda else None
            if place is not None and place.type == "cuda":
                place = self.double.device(place)
                rest = [x for x in args[1:] if not isinstance(x, (torch.device, str, bool)) and x is not None]
                kwargs = {
                    key: value
                    for key, value in kwargs.items()
                    if key not in ("device", "non_blocking") and value is not None
                }
                x = Tensor.to(args[0], *rest, **kwargs) if rest or kwargs else args[0]
                return x if isinstance(x, DeviceTensor) and x.device == place else self.double.upload(x, place)
        elif (
            kwargs.get("device") is not None
            and torch.device(kwargs["device"]).type == "cuda"
            and not any(isinstance(x, DeviceTensor) for x in args)
        ):
            before, self.double.target = self.double.target, self.double.device(kwargs["device"])
            try:
                return func(*args, **{**kwargs, "device": "cpu"})
            finally:
                self.double.target = before
        return func(*args, **kwargs)
