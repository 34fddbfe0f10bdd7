"""What the walks of the delta rule for Hopper share, in Gluon: the sums of `delta_triton`, their order spelled out.

A walk is a chain of products that wait for each other. Plain Triton waits for each of them and for every load; here the tensor
memory accelerator brings a chunk's rows while the one before is computed, and products that nobody waits for run behind those
of the chain.

Barriers are put in by the compiler, which does not know how long an asynchronous product reads: a buffer is written again only
after a barrier that follows the wait for its last reader.

Shape legend: B batch, T time, H heads, N chunks, C = 64 tokens of a chunk, K key, V value width.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

# What differs from call to call is not specialised, so that a new batch, length or head count compiles nothing.
SIZES = ["length", "heads", "group", "segments", "span", "gate_b", "gate_t", "gate_every"]

thread_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # the latter from Triton 3.7 on


@gluon.constexpr_function
def sums_layout(width, groups=1):
    """Registers of sums that are `width` columns wide, of which each of the warp groups has its part."""
    return gl.NVMMADistributedLayout([3, 0], [4, groups], [16, width // groups, 16])


@gluon.constexpr_function
def turned_layout(width):
    """Registers of sums of 64 rows and `width` columns in one warp group."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])


@gluon.constexpr_function
def shared_layout(width, rank=2):
    """16-bit rows in shared memory as tensor cores read them."""
    return gl.NVMMASharedLayout(min(2 * width, 128), 16, rank=rank)


@gluon.jit
def place(part, per_head, segments, span, n_chunks, REVERSE: gl.constexpr):
    """Head of a program and its segment in the order of the walk, of which a head has `per_head`; first and last chunk."""
    head_index, order = part // per_head, part % per_head
    segment = segments - 1 - order if REVERSE else order
    return head_index, order, segment * span, gl.minimum(segment * span + span, n_chunks) - 1


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr = 1):
    """Barriers on which copies report their bytes, or partitions that they have arrived."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(COUNT):
        mbarrier.init(bars.index(index), count=ARRIVALS)
    fence_async_shared()
    return bars


@gluon.jit
def fetch(bar, BYTES: gl.constexpr, sources, places, targets):
    """Starts to copy blocks into shared memory; the barrier tells when all have arrived."""
    mbarrier.expect(bar, BYTES)
    for index in gl.static_range(len(sources)):
        tma.async_copy_global_to_shared(sources[index], places[index], bar, targets[index])


@gluon.jit
def at_stage(buffers, index):
    """Of buffers with a place for each stage, those of one stage."""
    views = ()
    for buffer in gl.static_range(len(buffers)):
        views = views + (buffers[buffer].index(index),)
    return views


@gluon.jit
def factors_of(beta, g, n, i, length, heads, C: gl.constexpr, GATED: gl.constexpr):
    """Beta of a chunk, zero beyond the end; its cumulated log2 decays, and the last of them."""
    t_C = n * C + i
    beta_C = gl.load(beta + t_C.to(gl.int64) * heads, mask=t_C < length, other=0.0).to(gl.float32)
    g_C, g_all = beta_C, 0.0
    if GATED:
        g_C, g_all = gl.load(g + t_C), gl.load(g + n * C + C - 1)
    return beta_C, g_C, g_all


@gluon.jit
def columns_of(rows, e_start, V: gl.constexpr, K: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr):
    """Where a tile of a state's columns is in [K, V], for a layout of rows, and what of it is inside."""
    d, e = gl.arange(0, BK, gl.SliceLayout(1, rows)), e_start + gl.arange(0, BV, gl.SliceLayout(0, rows))
    return d[:, None] * V + e[None, :], (d < K)[:, None] & (e < V)[None, :]


@gluon.jit
def given_state(
    given, index, rows, e_start, V: gl.constexpr, K: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, GIVEN: gl.constexpr
):  # fmt: skip
    """A tile of a state's columns as a walk starts with it: of the state given, or zero."""
    state_KV = gl.zeros([BK, BV], gl.float32, rows)
    if GIVEN:
        offsets, inside = columns_of(rows, e_start, V, K, BK, BV)
        state_KV = gl.load(given + index.to(gl.int64) * K * V + offsets, mask=inside, other=0.0)
    return state_KV
