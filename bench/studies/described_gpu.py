"""Kernels that torch.compile writes for a GPU, on a machine that may have none.

A graph is traced on the CPU, moved to a GPU of which only the properties are known, and lowered by
Inductor as far as the code of its kernels; nothing of it runs. Many of the names used here are
PyTorch's own: `KNOWN` says with which versions it has been seen to work.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

KNOWN = ("2.11", "2.14")


@dataclass(frozen=True)
class Properties:
    """Properties of a GPU that Inductor asks for, and its peak rates, for bounds of time.

    bytes_per_s: of its memory. bf16_per_s, fp8_per_s: floating-point operations of dense products.
    """

    name: str = "NVIDIA H100 SXM"
    major: int = 9
    minor: int = 0
    multi_processor_count: int = 132
    warp_size: int = 32
    regs_per_multiprocessor: int = 65536
    max_threads_per_multi_processor: int = 2048
    max_threads_per_block: int = 1024
    shared_memory_per_block_optin: int = 232448
    total_memory: int = 80 * 2**30
    L2_cache_size: int = 50 * 2**20
    bytes_per_s: float = 3.35e12
    bf16_per_s: float = 989e12
    fp8_per_s: float = 1979e12

    @property
    def instructions_per_s(self) -> float:
        """Instructions of single threads: 128 a cycle and multiprocessor, at the clock of the peak.

        An A100 has 2048 operations of dense bf16 products a cycle and multiprocessor, an H100
        4096, a B200 8192.
        """
        cycles_per_s = self.bf16_per_s / self.multi_processor_count / PER_CYCLE[self.major]
        return 128.0 * self.multi_processor_count * cycles_per_s


PER_CYCLE = {8: 2048, 9: 4096, 10: 8192}
"""Operations of dense bf16 products that a multiprocessor does in a cycle, by major capability."""
H100 = Properties()
INSTRUCTIONS = {
    **dict.fromkeys(("constant", "output", "masked", "reduction", "store_reduction"), 0),
    **{"erf": 24, "exp": 2, "rsqrt": 2, "truediv": 8, "index_expr": 2},
}
"""Instructions of one of Inductor's operations on one element; of all others 1. Chosen so that GELU
in bf16, for which ptxas writes 36 for sm_90, counts 32."""
OWN_INSTRUCTIONS = {"quantise_gelu_backward": 56, "quantise_gelu": 46}
"""Instructions an element of our own kernels, as ptxas writes them for sm_90 in rows of 4,096."""


@dataclass(frozen=True)
class Kernel:
    """One kernel of a compiled graph.

    name: of the library's function; of a Triton kernel, the operations of PyTorch that it joins.
    num_bytes: read and written, each tensor once. num_operations: of matrix products and attention,
    in `dtype`; 0 for others. num_instructions: estimate of those of a Triton kernel.
    """

    name: str
    num_bytes: int
    num_operations: int = 0
    dtype: str = ""
    num_instructions: int = 0

    @property
    def is_product(self) -> bool:
        return self.num_operations > 0

    def seconds(self, gpu: Properties) -> float:
        """The least time it can take: of its bytes or of its operations."""
        rate = gpu.fp8_per_s if self.dtype == "fp8" else gpu.bf16_per_s
        return max(self.num_bytes / gpu.bytes_per_s, self.num_operations / rate)


def compiled_kernels(module: nn.Module, x: Tensor, gpu: Properties = H100) -> list[list[Kernel]]:
    """Kernels of the forward pass, and of the gradient with respect to `x`, in order.

    Tensors lie on the CPU and weights want no gradients. What the module computes there is traced,
    so it must ask for no device; functional.scaled_dot_product_attention stands for the GPU's flash
    attention.
    """
    from torch._functorch.aot_autograd import aot_export_joint_simple
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    tensors = dict(module.named_parameters()) | dict(module.named_buffers())

    def function(x: Tensor, *values: Tensor) -> tuple[Tensor]:
        named = dict(zip(tensors, values, strict=True))
        return (torch.func.functional_call(module, named, (x,)),)

    inputs = (x.detach().requires_grad_(), *tensors.values())
    with _described(gpu), patch.object(functional, "scaled_dot_product_attention", _attention):
        joint = aot_export_joint_simple(
            function, inputs, trace_joint=True, decompositions=select_decomp_table()
        )
        passes = min_cut_rematerialization_partition(joint, inputs, num_fwd_outputs=1)
        return [_lowered(graph) for graph in passes]


def _lowered(graph: fx.GraphModule) -> list[Kernel]:
    """The kernels that Inductor makes of a graph."""
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.exc import InductorError
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    graph, inputs = _moved(graph, mode)
    found: list[list[Kernel]] = []

    def stop(lowering: Any) -> None:
        lowering.codegen()
        nodes = lowering.scheduler.nodes
        found.append([kernel for kernel in map(_kernel, nodes) if kernel.num_bytes])
        raise LoweredError

    with patch.object(GraphLowering, "compile_to_module", stop), tracing(TracingContext(mode)):
        try:
            compile_fx_inner(graph, inputs)
        except (InductorError, LoweredError):  # Inductor wraps what is raised on its way
            if not found:
                raise
    return found[0]


class LoweredError(Exception):
    """All is known that was to be known."""


def _moved(graph: fx.GraphModule, mode: Any) -> tuple[fx.GraphModule, list[Tensor]]:
    """The graph on the GPU, and fake inputs for it."""
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    device = torch.device("cuda", 0)
    graph = copy.deepcopy(graph)
    inputs = []
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            with mode:
                inputs.append(
                    torch.empty_strided(
                        value.shape, value.stride(), dtype=value.dtype, device=device
                    )
                )
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": device}
        node.meta.pop("val", None)
        node.meta.pop("tensor_meta", None)
    graph.recompile()
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
    return graph, inputs


def _kernel(node: Any) -> Kernel:
    """The kernel of a node of Inductor's schedule."""
    num_bytes = node.get_read_write_buffers_sizes()
    inner = node.node
    target = getattr(inner, "op_overload", None)
    name = str(getattr(inner, "python_kernel_name", None) or target or "")
    if not name:
        origins = [origin.meta for part in node.get_nodes() for origin in part.node.origins]
        joined = {str(meta.get("original_aten", "aten.")).split(".")[1] for meta in origins}
        name = " ".join(sorted(joined - {""}))
        return Kernel(name, num_bytes, num_instructions=_instructions(node))
    shapes = [[int(size) for size in part.get_size()] for part in inner.inputs]
    if "attention" in name:
        batch, heads, tokens, size = shapes[1]
        products = 5 if "backward" in name else 2
        return Kernel(name, num_bytes, products * 2 * batch * heads * tokens**2 * size, "bf16")
    if name.endswith("mm"):
        first = 1 if "addmm" in name else 0
        (m, k), (_, n) = shapes[first : first + 2]
        dtype = "fp8" if "scaled" in name else "bf16"
        return Kernel(name, num_bytes, 2 * m * n * k, dtype)
    own = next((count for part, count in OWN_INSTRUCTIONS.items() if part in name), 0)
    return Kernel(name, num_bytes, num_instructions=own * math.prod(shapes[0] if own else ()))


def _instructions(node: Any) -> int:
    """Estimate of the instructions of a Triton kernel, in all threads.

    What several of its loops over the same elements compute is counted once, as if rows stayed in
    registers.
    """
    counted: dict[int, Counter[str]] = {}
    for part in node.get_nodes():
        if not hasattr(part, "_body"):  # no kernel of Triton
            continue
        num_elements = math.prod(int(size) for size in part.group[1])
        own = Counter(part._body.op_counts)
        seen = counted.setdefault(num_elements, Counter())
        for name, count in own.items():
            seen[name] = max(seen[name], count)
    return sum(
        num_elements * count * INSTRUCTIONS.get(name, 1)
        for num_elements, counts in counted.items()
        for name, count in counts.items()
    )


@contextmanager
def _described(gpu: Properties) -> Iterator[None]:
    """PyTorch believes that there is this GPU, as far as Inductor asks."""
    import torch._subclasses.fake_tensor
    import torch.utils._triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import config

    facts: dict[str, Any] = {
        "get_device_properties": gpu,
        "get_device_capability": (gpu.major, gpu.minor),
        "get_device_name": gpu.name,
        "current_device": 0,
        "device_count": 1,
        "is_available": True,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "synchronize": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "_lazy_init": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
    }
    of_interface = {
        "get_device_properties": gpu,
        "current_device": 0,
        "device_count": 1,
        "get_raw_stream": 0,
        "exchange_device": 0,
        "maybe_exchange_device": 0,
    }
    of_worker = {"get_device_properties": gpu, "current_device": 0}
    with ExitStack() as stack:
        for owner, values in (
            (torch.cuda, facts),
            (CudaInterface, of_interface),
            (CudaInterface.Worker, of_worker),
            (torch.utils._triton, {"triton_hash_with_backend": "described"}),
            (torch._subclasses.fake_tensor, {"init_gpu_context": None}),
        ):
            for name, value in values.items():
                stack.enter_context(patch.object(owner, name, _always(value)))
        stack.enter_context(config.patch(compile_threads=1, fx_graph_cache=False))
        _forget_machine()
        stack.callback(_forget_machine)
        yield


def _forget_machine() -> None:
    """Clear the caches in which PyTorch keeps what it found out about the machine."""
    from torch._inductor.runtime.hints import DeviceProperties

    for function in (*vars(torch.utils._triton).values(), DeviceProperties.create):
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def _always(value: Any) -> Any:
    return staticmethod(lambda *_, **__: value)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: None = None, dropout_p: float = 0.0, **_: Any
) -> Tensor:
    """Takes the place of torch's function while a module is traced."""
    assert attn_mask is None
    assert not dropout_p
    result: Tensor = torch.ops.described_gpu.attention(q, k, v)[0]
    return result


def _as_flash_leaves_it(x: Tensor) -> Tensor:
    """[B, H, N, D] whose tokens' heads lie side by side in memory."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


@torch.library.custom_op("described_gpu::attention", mutates_args=())
def _flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    raise RuntimeError("described_gpu.attention is traced, never run")


@_flash.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _as_flash_leaves_it(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("described_gpu::attention_backward", mutates_args=())
def _flash_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, result: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    raise RuntimeError("described_gpu.attention_backward is traced, never run")


@_flash_backward.register_fake
def _(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, result: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _as_flash_leaves_it(q), _as_flash_leaves_it(k), _as_flash_leaves_it(v)


def _remember(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.described_gpu.attention_backward(
        gradient, *ctx.saved_tensors
    )
    return result


_flash.register_autograd(_differentiate, setup_context=_remember)
