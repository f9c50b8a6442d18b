"""What every Triton kernel of this package shares: when it can run, and the one place where it is launched.

A launch is described once, by the call that makes it (`Kernel.launch`). On real tensors it runs, on their device. On
FakeTensors, which have shapes and no data, it is only noted: so the fake result, the counted launches and what the
compile proof compiles (described.py) come from the very code that runs on a GPU, and none of them can drift from it.

Kernels run on CUDA tensors, or on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1, set before a kernel module
is loaded). Tile sizes come from tiles.py: no autotuning, which would need a driver and would change the numerics from
machine to machine.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from star_fast.ops import dispatch
from star_fast.ops.dispatch import Cost
from star_fast.ops.on_device import on_device

# Fused multiply-add is set explicitly: Triton's default differs between releases.
FP_FUSION = True


class Kernel:
    """A Triton function and what one launch of it must do at least.

    Args:
        title: for people, e.g. "swiglu forward".
        function: the @triton.jit function. Its first argument is a tensor, whose device is where it runs.
        cost: least bytes and FLOPs of a launch, from its arguments by name, beside them `grid`.
    """

    def __init__(self, title: str, function: Any, cost: Callable[[SimpleNamespace], Cost]) -> None:
        self.title, self.function, self.cost = title, function, cost
        self.name: str = function.__name__

    def launch(
        self, grid: tuple[int, ...], arguments: tuple[Any, ...], *, num_warps: int, num_stages: int, **constants: Any
    ) -> None:
        """Run the kernel on the device of its first argument; on FakeTensors only note the launch.

        Args:
            grid: numbers of programs.
            arguments: everything that is not constexpr, in the function's order; None stands for a tensor that is not
                there.
            num_warps, num_stages: from tiles.py.
            constants: the constexpr arguments.
        """
        if torch.compiler.is_compiling():  # Inductor launches on the right device by itself
            self.function[grid](
                *arguments, **constants, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=FP_FUSION
            )
            return
        if dispatch.noting():
            dispatch.note(
                dispatch.Launch(self.name, grid, Call(self, grid, arguments, dict(constants), num_warps, num_stages))
            )
        if isinstance(arguments[0], FakeTensor):
            return
        constants["num_warps"], constants["num_stages"], constants["enable_fp_fusion"] = (
            num_warps,
            num_stages,
            FP_FUSION,
        )
        with on_device(arguments[0].device):
            start(self.function, grid, arguments, constants)


def start(function: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Hand a kernel to Triton. The only line of this package that does."""
    function[grid](*arguments, **options)


class Call(NamedTuple):
    """One launch with all that decides what is compiled for it."""

    kernel: Kernel
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int

    def cost(self) -> Cost:
        """Least bytes and FLOPs of this launch."""
        names = [name for name in self.kernel.function.arg_names if name not in self.constants]
        return self.kernel.cost(
            SimpleNamespace(**dict(zip(names, self.arguments, strict=True)), **self.constants, grid=self.grid)
        )

    def compilation(self, capability: int = 90) -> Compilation:
        """What Triton itself would compile for this launch on a GPU of this compute capability; needs no GPU."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime.jit import JITFunction, MockTensor, create_function_from_signature

        function = self.kernel.function
        if not isinstance(function, JITFunction):  # its interpreted form
            function = JITFunction(function.fn, do_not_specialize=function.kwargs.get("do_not_specialize"))
        target = GPUTarget("cuda", capability, 32)
        backend = make_backend(target)
        settings = {
            **self.constants,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": FP_FUSION,
        }
        # A FakeTensor has no address; Triton's own stand-in counts as aligned, as memory fresh from the allocator is.
        arguments = [MockTensor(x.dtype) if isinstance(x, FakeTensor) else x for x in self.arguments]
        bound, special, options = create_function_from_signature(function.signature, function.params, backend)(
            *arguments, **settings
        )
        options, signature, constants, attributes = function._pack_args(backend, settings, bound, special, options)
        return Compilation(
            f"{self.kernel.name} {special} {options}", function, target, options, signature, constants, attributes
        )


class Compilation(NamedTuple):
    """Input of triton.compile."""

    key: str  # two launches of one key share one compiled kernel
    function: Any
    target: Any
    options: Any
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]

    def compile(self) -> Any:
        """Triton's CompiledKernel; not in a process that interprets kernels."""
        from triton.compiler import ASTSource

        source = ASTSource(self.function, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=self.target, options=self.options.__dict__)


def ceil_div(numbers: int, size: int) -> int:
    """Parts of `size` that hold so many numbers. Triton's own cdiv can be called in a kernel too, for which a host call
    pays 2 us.
    """
    return -(-numbers // size)


def rows_of(x: Tensor) -> tuple[Tensor, int]:
    """(..., D) as rows of unit stride, and the stride from one to the next; a copy only where the strides leave no
    other way.
    """
    if x.is_contiguous():
        return x, x.shape[-1]
    x = x.reshape(-1, x.shape[-1])
    x = x if x.stride(1) == 1 else x.contiguous()
    return x, x.stride(0)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter in this process."""
    return bool(triton.knobs.runtime.interpret)


def why_not_device(*tensors: Tensor | None) -> str | None:
    """None if Triton can run on these tensors' device, else the reason. A FakeTensor's launches are described, which
    needs none.
    """
    tensor = next(t for t in tensors if t is not None)
    device = tensor.device
    if device.type == "cuda" or isinstance(tensor, FakeTensor):
        return None
    if device.type == "cpu" and interpreting():
        return None
    return (
        f"Triton needs CUDA tensors, got {device} (on a CPU only in the interpreter: TRITON_INTERPRET=1 before import)"
    )


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The dtype a kernel computes in for inputs of `dtype`: float64 for float64 (gradcheck), else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def operand(dtype: torch.dtype) -> tl.dtype:
    """The dtype of tl.dot's factors: the inputs' own; in the interpreter, which multiplies bfloat16 as bit patterns,
    float32 instead.
    """
    return {
        torch.float64: tl.float64,
        torch.float32: tl.float32,
        torch.float16: tl.float16,
        torch.bfloat16: tl.float32 if interpreting() else tl.bfloat16,
    }[dtype]
