"""Launches `step_triton.step_kernel` on torch tensors: tiles, strides, and which programs have to wait for each other.

Shape legend: B batch, H heads of v and of the state, G heads of q and k, K key, V value width, C channels of a convolution, J taps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kernels.step_form import StepForm
from kernels.steps import step_pieces_triton as pieces
from kernels.steps.step_triton import step_kernel


class Config(NamedTuple):
    """How the kernel is compiled.

    Args:
        elements: of the state that one program holds, key width times value columns.
        warps: warps of a program.
        registers: most of a thread, or None.
    """

    elements: int
    warps: int
    registers: int | None = None


CONFIG = Config(8192, 4)
WHOLE_HEAD = Config(16_384, 4)
"""Of a layer that norms its heads: one program for a head of 128 x 128, so that nobody waits for other programs."""

DECAYS = {"log": pieces.LOG, "rate": pieces.RATE, "sigmoid": pieces.SIGMOID}
NORMS = {
    "none": pieces.NO_NORM,
    "rms": pieces.RMS_NORM,
    "layer": pieces.LAYER_NORM,
    "row": pieces.ROW_NORM,
    "sums": pieces.SUM_NORM,
}
GATES = {"none": pieces.NO_OUTPUT_GATE, "silu": pieces.SILU_GATE, "sigmoid": pieces.SIGMOID_GATE}


class Around(NamedTuple):
    """The tensors of what a layer does around its recurrence, each None where it does not.

    Args:
        taps: [C, J] of the short convolution over the channels of q, k and v.
        conv_bias: [C].
        tail: [B, J - 1, C].
        decay_bias: [H] or [H, K].
        log_rate: [H].
        sums: [B, H, K].
        skip: [H].
        norm_weight: [V] for rms, [H, V] for layer and row.
        norm_bias: [H, V].
        gate: [B, H V].
    """

    taps: Tensor | None = None
    conv_bias: Tensor | None = None
    tail: Tensor | None = None
    decay_bias: Tensor | None = None
    log_rate: Tensor | None = None
    sums: Tensor | None = None
    skip: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    gate: Tensor | None = None


PLAIN, NOTHING_AROUND = StepForm(), Around()


def tile_widths(k_dim: int, v_dim: int, config: Config = CONFIG) -> tuple[int, int]:
    """The padded key width and the value columns of a program."""
    keys = max(16, triton.next_power_of_2(k_dim))
    return keys, max(1, min(config.elements // keys, triton.next_power_of_2(v_dim)))


def config_of(form: StepForm, k_dim: int, v_dim: int) -> Config:
    """The shipped configuration."""
    normed = form.norm in ("rms", "layer")
    return WHOLE_HEAD if normed and tile_widths(k_dim, v_dim)[1] < v_dim else CONFIG


def spread(block_k: int, block_v: int, config: Config) -> dict[str, int]:
    """Places beside keys and values that make tiles of at least as many elements as a program has threads."""
    threads = 32 * config.warps
    return {"KEY_PLACES": max(2, threads // block_k), "VALUE_PLACES": max(1, threads // block_v)}


def together(form: StepForm, tiles: int, group: int, *, taps: bool) -> int:
    """Which programs have something that only the last of them can do: those of a row, of a head, or none."""
    if form.norm == "row" or (taps and group > 1):
        return pieces.PER_ROW.value
    return (pieces.PER_HEAD if tiles > 1 and (taps or form.norm in ("rms", "layer", "sums")) else pieces.ALONE).value


def step(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    decay: Tensor | None,
    beta_BH: Tensor | None,
    a_BHK: Tensor | None,
    b_BHK: Tensor | None,
    old: Tensor,
    new: Tensor,
    form: StepForm = PLAIN,
    around: Around = NOTHING_AROUND,
    places: tuple[int, int, int] = (0, 0, 0),
    new_tail: Tensor | None = None,
    new_sums: Tensor | None = None,
) -> Tensor:
    """Launches the step from the contiguous state `old` to `new`.

    Args:
        q: queries [B, G, K]; or q, k and v as one row [B, C], without k and v.
        k: keys [B, G, K].
        v: values [B, H, V].
        decay: [B, H], [B, H, K], or [H] expanded over the batch.
        beta_BH: write strengths, before their sigmoid where the form says so.
        a_BHK: left vector of a rank-one transition.
        b_BHK: right vector of it.
        old: state [B, H, K, V].
        new: the same or another tensor.
        form: what a layer does around the recurrence.
        around: tensors of it.
        places: first channels of q, k and v in one row.
        new_tail: where the tail goes.
        new_sums: where the sums of keys go.

    Returns:
        The output [B, H, V].
    """
    batch, heads, k_dim, v_dim = old.shape
    (q, k, v), steps, groups = _heads(q, k, v, old)
    config = config_of(form, k_dim, v_dim)
    block_k, block_v = tile_widths(k_dim, v_dim, config)
    tiles = -(-v_dim // block_v)
    o_BHV = v.new_empty(batch, heads, v_dim)
    gate = v if decay is None else decay if decay.ndim == 2 else _rows(decay)
    beta = v if beta_BH is None else beta_BH
    a, b = (v if x is None else _rows(x) for x in (a_BHK, b_BHK))
    steps += [stride for x in (gate, beta, a, b) for stride in x.stride()[:2]]
    kind = pieces.NO_GATE if decay is None else pieces.SCALAR_GATE if decay.ndim == 2 else pieces.VECTOR_GATE
    channels, taps = (0, 0) if around.taps is None else around.taps.shape
    wait = together(form, tiles, heads // groups, taps=taps > 1)
    raw, arrived = _meeting_place(o_BHV, form, wait)
    dense = {name: v if x is None else x.contiguous() for name, x in around._asdict().items()}
    out_gate = v if around.gate is None else _rows(around.gate)
    step_kernel[(batch * heads * tiles,)](
        q, k, v, gate, dense["decay_bias"], dense["log_rate"], beta, a, b, old, new,
        dense["taps"], dense["conv_bias"], dense["tail"], v if new_tail is None else new_tail,
        dense["sums"], v if new_sums is None else new_sums, dense["skip"], dense["norm_weight"], dense["norm_bias"],
        out_gate, raw, arrived, o_BHV, *steps, out_gate.stride(0), *places, channels, heads, heads // groups,
        form.scale, form.key_scale, 1 / form.temperature, form.max_beta, form.eps,
        K=k_dim, V=v_dim, BK=block_k, BV=block_v, TOGETHER=wait,
        **spread(block_k, block_v, config), **constants(form, around, kind.value, beta_BH, a_BHK),
        num_warps=config.warps, maxnreg=config.registers,
    )  # fmt: skip
    return o_BHV


def _heads(
    q: Tensor, k: Tensor | None, v: Tensor | None, state: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], list[int], int]:  # fmt: skip
    """q, k and v with dense rows, their strides over rows and heads, and the heads of q and k."""
    _, heads, k_dim, v_dim = state.shape
    if k is None or v is None:
        x = _rows(q)
        groups = (x.shape[1] - heads * v_dim) // (2 * k_dim)
        return (x, x, x), [x.stride(0), k_dim, x.stride(0), k_dim, x.stride(0), v_dim], groups
    q, k, v = (_rows(x) for x in (q, k, v))
    return (q, k, v), [stride for x in (q, k, v) for stride in x.stride()[:2]], q.shape[1]


def _meeting_place(o_BHV: Tensor, form: StepForm, wait: int) -> tuple[Tensor, Tensor]:
    """Where programs that wait for each other leave outputs that are not normed yet, and count who has arrived."""
    if wait == pieces.ALONE.value:
        return o_BHV, o_BHV
    normed = form.norm == "row" or (wait == pieces.PER_HEAD.value and form.norm in ("rms", "layer"))
    raw = torch.empty_like(o_BHV, dtype=torch.float32) if normed else o_BHV
    return raw, torch.zeros(o_BHV.shape[0] * o_BHV.shape[1], dtype=torch.int32, device=o_BHV.device)


def constants(form: StepForm, around: Around, gate: int, beta: object | None, a: object | None) -> dict[str, Any]:
    """The kernel's flags."""
    return {
        "GATE": gate,
        "DECAY": DECAYS[form.decay].value,
        "STEPPED": form.stepped,
        "DELTA": beta is not None,
        "OPEN_BETA": form.open_beta,
        "RANK_ONE": a is not None,
        "TAPS": 0 if around.taps is None else around.taps.shape[1],
        "CONV_BIAS": around.conv_bias is not None,
        "SILU": form.silu,
        "UNIT": form.unit,
        "SKIP": around.skip is not None,
        "NORM": NORMS[form.norm].value,
        "NORM_WEIGHT": around.norm_weight is not None,
        "NORM_BIAS": around.norm_bias is not None,
        "OUTPUT_GATE": GATES[form.gate].value,
    }


def _rows(x: Tensor) -> Tensor:
    """The same tensor if its last dimension is dense."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
