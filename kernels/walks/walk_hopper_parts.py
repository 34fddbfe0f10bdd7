"""What the Hopper walks of `walk_hopper` and `walk_hopper_back` share, in Gluon: places, decays, first states.

Cumulated decays of a chunk come as a line of numbers, less half of the whole chunk's, beside the rows
(`walk_lines_triton`), or follow from one rate. Each thread reads from the line what its rows and columns need, so that
nothing is summed or exchanged in a walk. All exponents that are used are <= 0: rows that enter the state are decayed on their
way into registers, rows that were read from it when they are there, and pairs of a chunk where their scores are.

Shape legend: B batch, T time, H heads, P segments, N chunks of C = 64 tokens, D rows and E columns of a state.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma

from kernels.delta_rule.delta_hopper import at_stage, fetch
from kernels.walks.walk_triton import LOG2_E, NO_GATE, SCALAR_GATE

# What differs from call to call is not specialised, so that a new batch, length or head count compiles nothing.
SIZES = ["length", "heads", "group", "gate_every", "segments", "span"]


@gluon.constexpr_function
def line_layout():
    """A line of fp32 numbers as copies bring it."""
    return gl.NVMMASharedLayout(0, 32, rank=2)


@gluon.constexpr_function
def state_layout(rows, width, groups):
    """Registers of a state, of whose rows each of the warp groups has its part, or of its columns where rows are few."""
    if rows < 64 * groups:
        return gl.NVMMADistributedLayout([3, 0], [4, groups], [16, width // groups, 16])
    return gl.NVMMADistributedLayout([3, 0], [4 * groups, 1], [16, width, 16])


@gluon.jit
def program(index, heads, segments):
    """Head, segment and batch of a program."""
    return index % heads, index // heads % segments, index // heads // segments


@gluon.jit
def chunks_of(piece, span, length, C: gl.constexpr):
    """First chunk of a segment, and how many it has."""
    return piece * span, gl.minimum(span, (length + C - 1) // C - piece * span)


@gluon.jit
def bring(
    bars, sources, stages, rows, line, step, BYTES: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, GATE: gl.constexpr
):  # fmt: skip
    """Starts to copy rows of a chunk, and its line of scalar decays, into their stage."""
    bar, targets = bars.index(step % STAGES), at_stage(stages, step % STAGES)
    if GATE == SCALAR_GATE:
        fetch(bar, BYTES + 4 * C, sources, rows + (line,), targets)
    else:
        fetch(bar, BYTES, sources, rows, targets)


@gluon.jit
def let_launch():
    """Lets programs of the next kernel start beside those of this one, if it is launched so."""
    gl.inline_asm_elementwise("griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def await_launch():
    """Waits until the kernel before this one has ended."""
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def await_stage(bars, step, STAGES: gl.constexpr):
    """Waits until the copies of a step have arrived."""
    mbarrier.wait(bars.index(step % STAGES), step // STAGES % 2)


@gluon.jit
def await_rest(bars, step, COUNT: gl.constexpr, STAGES: gl.constexpr):
    """Waits for the copies of so many steps that were begun and are not used."""
    for rest in gl.static_range(COUNT):
        await_stage(bars, step + rest, STAGES)


@gluon.jit
def rate_of(gate, batch, head, heads, gate_every, CONSTANT: gl.constexpr):
    """Log2 decay of a token under a constant gate, else zero."""
    rate = 0.0
    if CONSTANT:
        rate = gl.load(gate + (batch // gate_every * heads + head)) * LOG2_E
    return rate


@gluon.jit
def half_of(lines, rate, batch, head, heads, t, length, C: gl.constexpr, GATE: gl.constexpr):
    """Half of a chunk's log2 decay."""
    half = 0.0
    if GATE == SCALAR_GATE:
        chunks = (length + C - 1) // C
        half = gl.load(lines + ((batch * heads + head).to(gl.int64) * chunks * C + t + C - 1))
    elif GATE != NO_GATE:
        half = 0.5 * rate * gl.minimum(length - t, C).to(gl.float32)
    return half


@gluon.jit
def falls(stage, rate, t, length, C: gl.constexpr, GATE: gl.constexpr, LAYOUT: gl.constexpr):
    """Log2 decays of a chunk up to and with each token, less half of the chunk's; padding does not decay."""
    if GATE == SCALAR_GATE:
        return stage[-1]._reinterpret(gl.float32, [C], gl.SwizzledSharedLayout(1, 1, 1, [0])).load(LAYOUT)
    count = gl.minimum(length - t, C).to(gl.float32)
    return rate * (gl.minimum((gl.arange(0, C, LAYOUT) + 1).to(gl.float32), count) - 0.5 * count)


@gluon.jit
def entering(
    rows_CD, stage, rate, half, t, length, tall: gl.constexpr,
    C: gl.constexpr, GATE: gl.constexpr, REVERSE: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """Rows of a chunk transposed, and decayed to where the state leaves it, as the left operand of the state's product."""
    left: gl.constexpr = gl.DotOperandLayout(0, tall, 2)
    fall_C = falls(stage, rate, t, length, C, GATE, gl.SliceLayout(0, left))
    keep_C = gl.exp2((half + fall_C) if REVERSE else (half - fall_C))
    return (rows_CD.permute([1, 0]).load(left).to(gl.float32) * keep_C[None, :]).to(DOT)


@gluon.jit
def add_rows(
    state_DE, a_CD, b_CE, stage, rate, half, t, length, tall: gl.constexpr,
    C: gl.constexpr, GATE: gl.constexpr, REVERSE: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """Starts the product that decays a state over a chunk and adds its rows."""
    if GATE == NO_GATE:
        state = warpgroup_mma(a_CD.permute([1, 0]), b_CE, state_DE, is_async=True)
    else:
        a_DC = entering(a_CD, stage, rate, half, t, length, tall, C, GATE, REVERSE, DOT)
        state = warpgroup_mma(a_DC, b_CE, state_DE * gl.exp2(2.0 * half), is_async=True)
    return state


@gluon.jit
def state_of(
    given, sums, decays, place, heads, segments, offsets, inside, layout: gl.constexpr,
    SIZE: gl.constexpr, BD: gl.constexpr, BE: gl.constexpr, GIVEN: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    """The state that a walk starts from: zero or given, and what the segments before make of it."""
    batch, head, piece = place
    state_DE = gl.zeros([BD, BE], gl.float32, layout)
    if GIVEN:
        state_DE += gl.load(given + (batch * heads + head).to(gl.int64) * SIZE + offsets, mask=inside, other=0.0)
    for n in range((segments - 1 - piece) if REVERSE else piece):
        index = (batch * segments + ((segments - 1 - n) if REVERSE else n)) * heads + head
        added = gl.load(sums + index.to(gl.int64) * SIZE + offsets, mask=inside, other=0.0)
        state_DE = state_DE * gl.exp2(gl.load(decays + index)) + added
    return state_DE


@gluon.constexpr_function
def row_sums_layout(groups):
    """Registers of sums of 64 rows that are `sums_layout`, one for what each warp group has of them, [64, groups]."""
    return gl.DistributedLinearLayout(
        [[8, 0]], [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0], [0, 1]][: groups + 1], [], [64, groups]
    )


@gluon.constexpr_function
def column_sums_layout(groups):
    """Registers of sums of 64 such columns, one for what each of four warps has of them, [4, 64]."""
    of_registers, of_warps = [[0, 1], [0, 8], [0, 16], [0, 32]], [[1, 0], [2, 0], [0, 32]]
    lanes = [[0, 2], [0, 4], [0, 0], [0, 0], [0, 0]]
    return gl.DistributedLinearLayout(of_registers[: 5 - groups], lanes, of_warps[: groups + 1], [], [4, 64])


@gluon.jit
def row_sums(x_RC, ROWS: gl.constexpr, COLS: gl.constexpr, GROUPS: gl.constexpr):
    """Sums of the part of each row that a warp group has, [ROWS, GROUPS]: nothing is exchanged between warps."""
    sums_RP = gl.sum(x_RC.reshape([ROWS, GROUPS, COLS // GROUPS]), 2)
    return gl.convert_layout(sums_RP, row_sums_layout(GROUPS), assert_trivial=True)


@gluon.jit
def column_sums(x_RC, ROWS: gl.constexpr, COLS: gl.constexpr, GROUPS: gl.constexpr):
    """Sums of the part of each column that one of four warps has, [4, COLS]."""
    return gl.convert_layout(gl.sum(x_RC.reshape([4, ROWS // 4, COLS]), 1), column_sums_layout(GROUPS), assert_trivial=True)


@gluon.jit
def store_sums(to, sums, stride, ROWS_FIRST: gl.constexpr, C: gl.constexpr, GROUPS: gl.constexpr):
    """Writes `row_sums` (ROWS_FIRST) or `column_sums` of a chunk, whose parts lie `stride` apart."""
    if ROWS_FIRST:
        layout: gl.constexpr = row_sums_layout(GROUPS)
        token, part = gl.arange(0, C, gl.SliceLayout(1, layout))[:, None], gl.arange(0, GROUPS, gl.SliceLayout(0, layout))[None, :]
        gl.store(to + (part * stride + token), sums)
    else:
        across: gl.constexpr = column_sums_layout(GROUPS)
        warp, column = gl.arange(0, 4, gl.SliceLayout(1, across))[:, None], gl.arange(0, C, gl.SliceLayout(0, across))[None, :]
        gl.store(to + (warp * stride + column), sums)
