"""Programmatic dependent launch: the programs of a kernel start while those of the kernel before it still end.

Between small kernels of a CUDA graph this hides most of the launch. sm_90 and later; elsewhere, and under the
interpreter, the functions here do nothing.

The rules of this package. A kernel launched so may do four things before ``gdc_wait`` returns: compute addresses,
prefetch into the L2 cache, read what was complete when its predecessor let it start, and write memory that was
allocated before its predecessor's launch and that this one does not touch. ``gdc_wait`` returns when the predecessor
has ended and its writes are visible. A kernel that calls ``gdc_launch_dependents`` behind its own wait therefore
promises its successor that all earlier kernels are complete: only its own outputs need waiting for; one that calls it
before its wait passes on its predecessor's promise and no more; one that calls ``wait_for_inputs`` promises nothing,
and a successor waits before it reads anything. Every kernel waits before it ends, so that the end of one means the
end of all before it.

See "Programmatic Dependent Launch and Synchronization" in NVIDIA's CUDA C++ Programming Guide.
"""

import triton
import triton.language as tl

from . import _runtime

MIN_ARCH = 90


def dependent_launch(tensor):
    """Keyword arguments of a launch on ``tensor``'s device, for a kernel that has the constexpr ``PDL``."""
    allowed = not _runtime.INTERPRET and _runtime.arch(tensor.device) >= MIN_ARCH
    return {"PDL": allowed, "launch_pdl": allowed}


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Let the next kernel's programs start, and wait until all earlier kernels have ended."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch(address):
    """Ask for the 128 bytes around each address in the L2 cache, which every multiprocessor sees: never stale."""
    return tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address.to(tl.int64)], tl.int32, is_pure=False, pack=1
    )  # fmt: skip


@triton.jit
def prefetch_values(values, count, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Bring ``count`` <= BLOCK values to the L2 cache before the wait: a hint, right whoever writes them."""
    if PDL:
        LINE: tl.constexpr = 128 * 8 // values.dtype.element_ty.primitive_bitwidth
        first = tl.arange(0, BLOCK // LINE if BLOCK > LINE else 1) * LINE
        prefetch(values + tl.minimum(first, count - 1))
