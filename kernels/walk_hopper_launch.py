"""Launches the walks for Hopper where they fit: descriptors, configurations, and how rows are shared out.

Shape legend: B batch, T time, H heads of v, G heads of q and k, P segments, K key, V value width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kernels.delta_hopper_launch import ALIGNED, _described
from kernels.operands import _gate_kind, _nothing, _state_like, _triton_dtype, padded
from kernels.walk_decays import gate_every, gate_of
from kernels.walk_pieces import HEADS_AT_ONCE, SHORTEST_SEGMENT, Pieces
from kernels.walk_segments import segments

if TYPE_CHECKING:
    from kernels.walk import Inputs

CHUNK = 64
"""Tokens of a chunk, which are the rows of one product of a warp group."""
WIDTH, NARROWEST = 128, 32
"""The widest heads that fit on chip, and the fewest columns of an output that a program takes."""


class Config(NamedTuple):
    """How a walk is compiled.

    Args:
        groups: groups of four warps.
        stages: chunks that are on their way or read.
        slots: the same of what the decays' gradient reads besides.
    """

    groups: int
    stages: int
    slots: int


FORWARD = {64: Config(1, 4, 0), 128: Config(2, 3, 0)}
BACKWARD = {64: Config(1, 3, 2), 128: Config(2, 3, 1)}
"""By the larger width."""


class Plan(NamedTuple):
    """How rows are shared out to programs.

    Args:
        few: whether heads alone would leave multiprocessors idle, and rows are long: a program then takes NARROWEST columns of an
            output, and the states that enter its segment are kept. Kernels are compiled for both cases, and for no other size.
        pieces: segments of a row.
    """

    few: bool
    pieces: Pieces


def suits(inputs: Inputs) -> bool:
    """Whether the Hopper walks take these inputs: what is known of fake tensors too."""
    q, k, v, starts = inputs.q, inputs.k, inputs.v, inputs.starts
    if starts is not None or not v.is_cuda or torch.cuda.get_device_capability(v.device)[0] != 9:
        return False
    narrow = v.dtype in (torch.float16, torch.bfloat16) and q.dtype == k.dtype == v.dtype
    return narrow and all(x.shape[3] <= WIDTH and x.shape[3] % ALIGNED == 0 for x in (k, v))


def plan(k: Tensor, v: Tensor) -> Plan:
    """Whole rows, or tiles of columns and, where these are not enough, segments of long rows of few heads."""
    from kernels.walk_triton import SEGMENTS, WHOLE

    batch, length, heads, v_dim = v.shape
    wanted = HEADS_AT_ONCE // (batch * heads) if length >= 2 * SHORTEST_SEGMENT else 1
    if wanted < 2:
        return Plan(False, Pieces(WHOLE.value, 1, -(-length // CHUNK) * CHUNK, None))
    tiles = _width(min(k.shape[3], v_dim)) // NARROWEST
    number = max(1, min(wanted // tiles, length // SHORTEST_SEGMENT))
    span = -(-length // (number * CHUNK)) * CHUNK
    number = -(-length // span)
    return Plan(True, Pieces((WHOLE if number == 1 else SEGMENTS).value, number, span, None))


def _width(width: int) -> int:
    """Of a tile on chip."""
    return max(padded(width), CHUNK)


def _aligned(x: Tensor) -> Tensor:
    """Rows as the tensor memory accelerator takes them."""
    fits = x.data_ptr() % 16 == 0 and x.stride(3) == 1 and all(s > 0 and s % ALIGNED == 0 for s in x.stride()[:3])
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _constants(k: Tensor, v: Tensor, configs: dict[int, Config], *, few: bool) -> dict[str, Any]:
    """Compile-time arguments of both kernels."""
    wide_k, wide_v = _width(k.shape[3]), _width(v.shape[3])
    config = configs[max(wide_k, wide_v)]
    constants = {"K": k.shape[3], "V": v.shape[3], "BK": wide_k, "TV": NARROWEST if few else wide_v, "C": CHUNK}
    groups = 1 if few else config.groups
    constants |= {"GROUPS": groups, "STAGES": config.stages, "num_warps": 4 * groups}
    return constants | {"DOT": _triton_dtype(v.dtype)}


def forward(inputs: Inputs, o: Tensor, *, return_state: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.walk.forward`; `o` is written."""
    from kernels import walk_hopper

    q, k, v = (_aligned(x) for x in (inputs.q, inputs.k, inputs.v))
    batch, length, heads, v_dim = v.shape
    few, pieces = plan(k, v)
    gate, kind = gate_of(inputs.log_decay, v), _gate_kind(inputs.log_decay)
    sums, decays = segments(k, v, gate, kind, pieces, CHUNK, reverse=False)
    last = _state_like(v, k.shape[3]) if return_state else _nothing(v)
    entering = entering_like(inputs)
    constants = _constants(k, v, FORWARD, few=few)
    of_keys, of_values = [1, CHUNK, 1, constants["BK"]], [1, CHUNK, 1, constants["TV"]]
    described = [_described(x, block) for x, block in ((q, of_keys), (k, of_keys), (v, of_values), (o, of_values))]
    walk_hopper.forward_kernel[(batch * pieces.number * heads * -(-v_dim // constants["TV"]),)](
        *described, gate, v if inputs.state is None else inputs.state.contiguous(), last, entering, sums, decays,
        length, batch, heads, heads // k.shape[2], gate_every(inputs.log_decay, batch), pieces.number, pieces.length // CHUNK,
        **constants, GATE=kind, START=int(inputs.state is not None), LAST=return_state, ENTER=few,
    )  # fmt: skip
    return o, last, entering


def entering_like(inputs: Inputs) -> Tensor:
    """Room for what `forward` keeps for `backward`: states that enter segments of long rows of few heads [B, P, H, K, V]."""
    k, v = inputs.k, inputs.v
    few, pieces = plan(k, v)
    shape = (v.shape[0], pieces.number, v.shape[2], k.shape[3], v.shape[3])
    return v.new_empty(shape if few else 0, dtype=torch.float32)


def backward(
    rows: tuple[Tensor, ...], inputs: Inputs, entering: Tensor, dlast: Tensor | None, dv: Tensor, dfirst: Tensor,
    *, gate_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries and keys for each head [B, T, H, K], and what sums to that of the cumulated decays [parts, B, H, T].

    See `kernels.walk._walk_back`; `rows` are q, k, v and do.
    """
    from kernels import walk_hopper

    q, k, v, do = (_aligned(x) for x in rows)
    (batch, length, heads, v_dim), k_dim, state = v.shape, k.shape[3], inputs.state
    few, pieces = plan(k, v)
    gate, kind = gate_of(inputs.log_decay, v), _gate_kind(inputs.log_decay)
    sums, decays = segments(q, do, gate, kind, pieces, CHUNK, reverse=True)
    constants = _constants(k, v, BACKWARD, few=few)
    constants |= {
        "BV": _width(v_dim),
        "TK": NARROWEST if few else constants["BK"],
        "SLOTS": BACKWARD[max(_width(k_dim), _width(v_dim))].slots,
    }
    tiles_k, tiles_v = -(-k_dim // constants["TK"]), -(-v_dim // constants["TV"])
    dq, dk = (v.new_empty(batch, length, heads, k_dim) for _ in range(2))
    rowsums = v.new_empty((tiles_k + tiles_v, batch, heads, length) if gate_grad else 0, dtype=torch.float32)
    pointers = (v if state is None else state.contiguous(), entering, v if dlast is None else dlast, dfirst)
    start = walk_hopper.EACH_GIVEN.value if few else int(state is not None)
    for first, parts in ((0, 3),) if not few and constants["BK"] == constants["BV"] else ((0, 2), (2, 1)):
        values = first == walk_hopper.VALUES.value
        block = {name: [1, CHUNK, 1, constants[name]] for name in ("BK", "BV", "TK", "TV")}
        of_keys, of_values = (block["BK"], block["TV"]) if values else (block["TK"], block["BV"])
        walk_hopper.backward_kernel[(batch * pieces.number * heads * parts * (tiles_v if values else tiles_k),)](
            *(_described(x, of_keys) for x in (q, k)), *(_described(x, of_values) for x in (v, do)),
            *(_described(x, block["TK"]) for x in (dq, dk)), _described(dv, block["TV"]),
            gate, *pointers, sums, decays, rowsums,
            length, batch, heads, heads // k.shape[2], gate_every(inputs.log_decay, batch), pieces.number, pieces.length // CHUNK,
            **constants, FIRST_PART=first, PARTS=parts, GATE=kind, START=start, DLAST=int(dlast is not None),
            LAST=state is not None, GATE_GRAD=gate_grad,
        )  # fmt: skip
    return dq, dk, rowsums
