"""Programmatic dependent launch (sm_90 and later): a kernel starts while the one before it in the stream still runs.

The rules of this package. A kernel launched so may do three things before ``gdc_wait`` returns: compute addresses,
prefetch into the L2 cache, and read what was complete when its predecessor let it start. ``gdc_wait`` returns when
the predecessor has ended and its writes are visible. A kernel that calls ``gdc_launch_dependents`` behind its own
wait therefore promises its successor that all earlier kernels are complete: only its own outputs need waiting for.
Every kernel waits before it ends, so that the end of one means the end of all before it.
"""

import triton
import triton.language as tl


@triton.jit
def prefetch(address):
    """Ask for the 128 bytes around each address in the L2 cache, which every multiprocessor sees: never stale."""
    return tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address.to(tl.int64)], tl.int32, is_pure=False, pack=1
    )  # fmt: skip
