"""H of every chunk of the delta rule for Hopper, in Gluon, where no warps make it beside a walk: few heads, wide ones under decays.

Four warps make H of a chunk as beside a walk (`kernels.delta_rule.delta_hopper_solve`), and the keys of their next one are on
their way meanwhile. A program has some of the chunks of one head, from the last to the first. The walk is launched while this
kernel runs: its programs start where these have ended, and wait for all of them before they ask for H
(`delta_hopper_beside.bring_first`).

Shape legend: B batch, T time, H heads, N chunks, C = 64 tokens of a chunk, K key width, S = 16 tokens of a block.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents

from kernels._entry import entry
from kernels.delta_rule.delta_hopper import SIZES, barriers, fetch, shared_layout, thread_barrier, turned_layout
from kernels.delta_rule.delta_hopper_beside import S, cumulated, scan_layout, vectors
from kernels.delta_rule.delta_hopper_solve import solved, store_couplings


@entry(do_not_specialize=SIZES, gluon=True)
def couple_kernel(
    k, h, beta, gate, g,
    gate_b: tl.int64, gate_t: tl.int64, gate_every: tl.int32, length: tl.int32, heads: tl.int32, group: tl.int32, walks: tl.int32,
    BK: gl.constexpr, C: gl.constexpr, GATED: gl.constexpr, DOT: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """Grid: (programs * walks,) of every programs-th chunk of one of `walks` = B * H heads. Writes H, and cumulated log2 decays."""
    gdc_launch_dependents()
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_CK = gl.allocate_shared_memory(DOT, [C, BK], shared_layout(BK))
    h_CC = gl.allocate_shared_memory(DOT, [C, C], shared_layout(C))
    x_buffer = gl.allocate_shared_memory(MERGE, [C, C], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    own_buffer = gl.allocate_shared_memory(MERGE, [C, S], gl.SwizzledSharedLayout(8, 4, 2, [1, 0]))
    minus_buffer = gl.allocate_shared_memory(gl.float32, [C], line)
    g_buffer = gl.allocate_shared_memory(gl.float32, [C], line)
    bar = barriers(1).index(0)
    none_CC = gl.zeros([C, C], gl.float32, turned_layout(C))
    chunks, programs = (length + C - 1) // C, gl.num_programs(0) // walks
    order, head_index = gl.program_id(0) // walks, gl.program_id(0) % walks
    batch, head = head_index // heads, head_index % heads
    beta += batch.to(gl.int64) * length * heads + head
    gate += (batch // gate_every) * gate_b + head
    first, shared_head, chunk_0 = chunks - 1 - order, head // group, head_index * chunks
    fetch(bar, 2 * C * BK, (k,), ([batch, first * C, shared_head, 0],), (k_CK,))
    beta_C, step_C = vectors(beta, gate, gate_t, first, length, heads, C, GATED)
    for turn in range(first // programs + 1):
        n = first - turn * programs
        mbarrier.wait(bar, turn % 2)
        gram = warpgroup_mma(k_CK, k_CK.permute([1, 0]), none_CC, use_acc=False, is_async=True)
        minus_buffer.store(-beta_C)
        if GATED:
            gl.store(g + (chunk_0 + n).to(gl.int64) * C + gl.arange(0, C, scan_layout()), cumulated(step_C, g_buffer))
        following = gl.maximum(n - programs, 0)
        beta_C, step_C = vectors(beta, gate, gate_t, following, length, heads, C, GATED)
        gram_CC = warpgroup_mma_wait(0, [gram])
        thread_barrier()
        if n >= programs:
            fetch(bar, 2 * C * BK, (k,), ([batch, following * C, shared_head, 0],), (k_CK,))
        a, h_own = solved(gram_CC, x_buffer, own_buffer, minus_buffer, g_buffer, C, GATED, MERGE)
        tma.store_wait(0)
        thread_barrier()
        store_couplings(h_CC, a, h_own, x_buffer, own_buffer, minus_buffer, g_buffer, C, GATED, DOT, MERGE)
        fence_async_shared()
        thread_barrier()
        tma.async_copy_shared_to_global(h, [chunk_0 + n, 0, 0], h_CC)
    tma.store_wait(0)
