"""Launches variants of the Hopper kernels of the delta rule: `V` says which."""

from types import SimpleNamespace

from kernels import delta_coupling_triton, delta_hopper, delta_hopper_backward, delta_hopper_carry
from kernels import delta_hopper_launch as shipped
from kernels.delta_hopper_launch import CHUNK, _described, _forward_plan, _split, segments_of
from kernels.operands import _gate, _rows, _triton_dtype, padded
from trial import backward as next_backward
from trial import carry as next_carry
from trial import coupling as next_coupling
from trial import hopper as next_hopper
from trial import lean

SHIPPED_COUPLING = delta_coupling_triton.coupling_kernel
V = SimpleNamespace()


def choose(coupling=("ship", None), forward=("ship", 0, 4), carry=("ship", None), backward="ship", plan="ship"):
    """Sets the variant that the door takes from now on."""
    V.coupling, V.forward, V.carry, V.backward, V.plan = coupling, forward, carry, backward, plan
    name, registers = coupling
    V.gate = None
    kernel = SHIPPED_COUPLING if name == "ship" else next_coupling.coupling_kernel
    kernel = kernel if registers is None else _Capped(kernel, registers)
    kernel = InGluon(registers) if name == "gluon" else kernel
    delta_coupling_triton.coupling_kernel = Skipped() if forward[0] == "fused" else kernel
    shipped.forward, shipped.backward = run_forward, run_backward


class Skipped:
    """In place of the couplings' kernel: notes the log decay as `delta.forward` gives it."""

    def __getitem__(self, grid):
        def note(k, beta, gate, *rest, **constants):
            V.gate = None if constants["GATE"] == 0 else gate

        return note


class InGluon:
    """`trial.lean.couple_kernel`, called like the couplings' kernel."""

    def __init__(self, registers):
        self.more = {} if registers is None else {"maxnreg": registers}

    def __getitem__(self, grid):
        def run(k, beta, gate, h, g, *rest, **c):
            chunks = rest[6]
            lean.couple_kernel[(grid[0] // chunks * -(-chunks // 4),)](
                _described(h.flatten(0, 2), [1, CHUNK, CHUNK]), k, beta, gate, g, *rest, K=c["K"], BK=max(32, c["BK"]), C=CHUNK,
                UNIT=c["UNIT"], GATED=c["GATE"] > 0, DOT=c["DOT"], MERGE=c["MERGE"], W=4, num_warps=4, **self.more,
            )  # fmt: skip

        return run


class _Capped:
    def __init__(self, kernel, registers):
        self.kernel, self.registers = kernel, registers

    def __getitem__(self, grid):
        return lambda *a, **c: self.kernel[grid](*a, **c, maxnreg=self.registers)


def carried(walk, operands, given, like, heads, counts, constants):
    name, registers = V.carry
    module = delta_hopper_carry if name == "ship" else next_carry
    batch, segments = like.shape[0], counts[3]
    k_dim, v_dim, tile = constants["K"], constants["V"], constants["BV"]
    tiles = -(-v_dim // tile) + -(-k_dim // tile)
    ends = like.new_empty(batch * heads, segments - 1, k_dim, tiles * tile, dtype=_float())
    states = like.new_empty(batch, heads, segments, k_dim, v_dim, dtype=_float())
    start = ends if given is None else given
    more = constants if registers is None else constants | {"maxnreg": registers}
    getattr(module, walk)[(batch * heads * (segments - 1) * tiles,)](*operands, start, ends, *counts, **more)
    columns = 16 if name == "ship" else 32
    module.combine_kernel[(batch * heads * -(-v_dim // columns),)](
        ends, start, states, segments, K=k_dim, V=v_dim, BK=padded(k_dim), BV=tile, TILE=columns, FIRST=given is not None,
        num_warps=8,
    )  # fmt: skip
    return states


def _float():
    import torch

    return torch.float32


def run_forward(q, k, v, beta, kept, first, o, last, _, *, gated, return_state, keep):
    batch, length, heads, v_dim = v.shape
    k_dim = k.shape[3]
    wide = max(padded(k_dim), CHUNK)
    name, tile, warps, *worker = V.forward
    V.worker, V.warps = (*worker, 4)[:2] if worker else (168, 4)
    segments, planned = _forward_plan(batch * heads, kept, max(k_dim, v_dim) > CHUNK)
    tile = min(tile or planned, max(32, padded(v_dim)))
    if V.plan == "none" or name == "fused":
        segments = 1
    elif V.plan == "all":
        segments = segments_of(batch * heads, kept.couplings.shape[2], v.device)
    of_keys, of_values = [1, CHUNK, 1, wide], [1, CHUNK, 1, tile]
    queries, keys, values, out = _described(q, of_keys), _described(k, of_keys), _described(v, of_values), _described(o, of_values)
    couplings = _described(kept.couplings.flatten(0, 2), [1, CHUNK, CHUNK])
    errors, states = out, out
    if keep:
        errors, states = _described(kept.errors, of_values), _described(kept.states.flatten(0, 2), [1, wide, tile])
    segments, span = _split(kept, segments)
    counts = (length, heads, heads // k.shape[2], segments, span)
    constants = {"K": k_dim, "V": v_dim, "BK": wide, "C": CHUNK, "GATED": gated, "DOT": _triton_dtype(v.dtype)}
    if segments > 1:
        part = min(tile, CHUNK)
        more = constants | {"BV": part, "FIRST": first is not None, "num_warps": 4}
        operands = (keys, _described(v, [1, CHUNK, 1, part]), couplings, beta, kept.decays)
        first = carried("forward_carry_kernel", operands, first, v, heads, counts, more)
    if name != "ship":
        constants |= {"GROUPS": warps // 4}
    if name == "fused":
        return run_fused(
            (queries, keys, values, couplings, out, errors, states), k, beta, kept, first, last, v, counts, segments, constants,
            tile, return_state=return_state, keep=keep,
        )
    module = {"ship": delta_hopper, "next": next_hopper, "lean": lean}[name]
    module.forward_kernel[(batch * heads * segments * -(-v_dim // tile),)](
        queries, keys, values, couplings, out, errors, states, beta, kept.decays, v if first is None else first, last, *counts,
        **constants, BV=tile, FIRST=first is not None, LAST=return_state, KEEP=keep, num_warps=warps,
    )  # fmt: skip


def run_fused(
    descriptors, k, beta, kept, first, last, v, counts, segments, constants, tile, *, return_state, keep
):
    """`V.gate` is the log decay, which the door gives to the couplings' kernel."""
    batch, heads = len(k), counts[1]
    rows, strides, unit = _rows(k)
    gate, gate_strides, gate_every = _gate(V.gate, batch, v)
    assert tile >= v.shape[3]
    lean.fused_kernel[(batch * heads * segments,)](
        *descriptors, rows[0], beta, gate, kept.decays, v if first is None else first, last, *strides, *gate_strides, gate_every,
        *counts, **constants, BV=tile, UNIT=unit, FIRST=first is not None, LAST=return_state, KEEP=keep,
        REGISTERS=V.worker, W=V.warps, MERGE=_merge(), num_warps=4 * constants["GROUPS"],
    )


def _merge():
    import triton.language as tl

    return tl.float16


def run_backward(q, k, do, beta, kept, dlast, grads, dfirst, _, *, gated):
    batch, length, heads, v_dim = do.shape
    k_dim = k.shape[3]
    width = max(padded(k_dim), padded(v_dim), CHUNK)
    of_rows = [1, CHUNK, 1, width]
    dq, dk, dv, dbeta, dgates = grads
    couplings = _described(kept.couplings.flatten(0, 2), [1, CHUNK, CHUNK])
    segments, span = _split(kept, segments_of(batch * heads, kept.couplings.shape[2], do.device))
    counts = (length, heads, heads // k.shape[2], segments, span)
    constants = {"K": k_dim, "V": v_dim, "C": CHUNK, "GATED": gated, "DOT": _triton_dtype(do.dtype)}
    if segments > 1:
        wide, tile = max(padded(k_dim), CHUNK), min(CHUNK, max(32, padded(v_dim)))
        of_keys = [1, CHUNK, 1, wide]
        operands = (_described(q, of_keys), _described(k, of_keys), _described(do, [1, CHUNK, 1, tile]), couplings)
        more = constants | {"BK": wide, "BV": tile, "DLAST": dlast is not None, "num_warps": 4}
        dlast = carried("reverse_carry_kernel", (*operands, beta, kept.decays), dlast, do, heads, counts, more)
    module = delta_hopper_backward if V.backward == "ship" else next_backward
    module.backward_kernel[(batch * heads * segments,)](
        *(_described(x, of_rows) for x in (q, k, do, kept.errors)), _described(kept.states.flatten(0, 2), [1, width, width]),
        couplings, *(_described(x, of_rows) for x in (dq, dk, dv)),
        beta, kept.decays, do if dlast is None else dlast, dbeta, dgates, do if dfirst is None else dfirst, *counts,
        **constants, D=width, GATE_GRAD=dgates.numel() > 0, FIRST=dfirst is not None, DLAST=dlast is not None, num_warps=8,
    )  # fmt: skip
