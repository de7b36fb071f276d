"""Barriers in shared memory at which each warp arrives by itself, for programs in Gluon.

Gluon's own arrival is behind a barrier of the whole warp group. A ring has a barrier for each slot, which its
readers' warps let go of; they lie in static shared memory, eight bytes apart, known by address.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# All of a program's static shared memory is whole kilobytes: dynamic memory behind it must be aligned so.
_EMPTY = gl.constexpr("{ .shared .align 1024 .b64 empty[128]; mov.u32 $0, empty; }")
_INIT = gl.constexpr(
    "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;"
    " @p mbarrier.init.shared::cta.b64 [$1], $2; mov.u32 $0, 0; }"
)
_ARRIVE = gl.constexpr(
    "{ .reg .pred p, q; setp.ne.u32 q, $2, 0; elect.sync _|p, 0xFFFFFFFF; and.pred p, p, q;"
    " @p mbarrier.arrive.shared::cta.b64 _, [$1]; mov.u32 $0, 0; }"
)
_AWAIT = gl.constexpr(
    "{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [$1], $2; @!p bra again; mov.u32 $0, 0; }"
)
_GROUP = gl.constexpr("bar.sync 0, $2; mov.u32 $0, $1;")


@gluon.jit
def make_empty(SLOTS: gl.constexpr, WARPS: gl.constexpr):
    """The address of SLOTS barriers of WARPS arrivals each; for every thread after the next barrier."""
    empty = gl.inline_asm_elementwise(_EMPTY, "=r", [], gl.int32, is_pure=False, pack=1)
    for slot in gl.static_range(SLOTS):
        count = WARPS
        gl.inline_asm_elementwise(_INIT, "=r,r,r", [empty + 8 * slot, count], gl.int32, is_pure=False, pack=1)
    return empty


@gluon.jit
def arrive(barrier, when):
    """A warp's arrival, where ``when`` is true."""
    gl.inline_asm_elementwise(
        _ARRIVE, "=r,r,r", [barrier, when.to(gl.int32)], gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def await_phase(barrier, parity):
    """Until the phase of this parity is over; parity 1 of a new barrier is."""
    gl.inline_asm_elementwise(_AWAIT, "=r,r,r", [barrier, parity], gl.int32, is_pure=False, pack=1)


@gluon.jit
def group_barrier(value, THREADS: gl.constexpr):
    """``value``, when THREADS threads, those before partitions begin, have come here."""
    threads = THREADS
    return gl.inline_asm_elementwise(_GROUP, "=r,r,n", [value, threads], gl.int32, is_pure=False, pack=1)


@gluon.jit
def next_slot(slot, phase, SLOTS: gl.constexpr):
    """The slot after this one of a ring, and the parity of its phase, which changes with every lap."""
    slot += 1
    if slot == SLOTS:
        slot = 0
        phase ^= 1
    return slot, phase
