"""Sequences of any lengths in one row of tokens, and the same as a padded batch.

Shape legend: N packed sequences, T tokens of all of them, L tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from kernels._arguments import check_dtype
from kernels.values import is_checking

Recurrence = Callable[..., tuple[Tensor, Tensor | None]]


def check_packing(cu_seqlens: Tensor, v_1T: Tensor) -> None:
    """Refuses bounds that cannot be those of packed sequences; values only where looking costs no synchronisation.

    Raises:
        ValueError: not one row, or bounds that are no increasing integers from 0 to the number of tokens.
    """
    batch, length = v_1T.shape[:2]
    if batch != 1:
        raise ValueError(f"v has shape {tuple(v_1T.shape)}; with cu_seqlens the batch is one row of packed sequences")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; it must be [N + 1] with N at least 1")
    check_dtype("cu_seqlens", cu_seqlens, (torch.int32, torch.int64))
    if cu_seqlens.device != v_1T.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device} and v on {v_1T.device}; move them to one device")
    if not is_checking() and (cu_seqlens.is_cuda or torch.compiler.is_compiling()):
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length or any(late <= early for early, late in pairwise(bounds)):
        raise ValueError(f"cu_seqlens is {bounds}; it must rise from 0 to {length} tokens, and no sequence may be empty")


def run_padded(recurrence: Recurrence, cu_seqlens: Tensor, q_1T: Tensor, k_1T: Tensor, v_1T: Tensor, **named: Tensor | None):
    """A recurrence on packed sequences by one that knows only batches: one row each, padded at the end.

    Padding has keys, values and beta of zero and does not decay, so it leaves states alone. The longest sequence is looked up,
    which waits for the device, and rows are as long as that one, so a pack of one long and many short sequences wastes memory.

    Args:
        recurrence: `linear_recurrence` without packing.
        cu_seqlens: where each sequence starts, and the end of the last.
        q_1T: queries in one row, and so are the keys and values.
        k_1T: keys.
        v_1T: values.
        named: log_decay ([H] or with tokens), beta_BTH, and a state for each sequence.

    Returns:
        Outputs in one row, and the state of each sequence or None.
    """
    bounds = cu_seqlens.long()
    lengths = bounds.diff()
    position_L = torch.arange(int(lengths.max()), device=bounds.device)
    inside_NL = position_L < lengths[:, None]
    token_NL = torch.where(inside_NL, bounds[:-1, None] + position_L, 0)

    def padded(x_1T: Tensor) -> Tensor:
        rows = x_1T[0, token_NL]
        return torch.where(inside_NL.view(*inside_NL.shape, *[1] * (rows.ndim - 2)), rows, 0)

    decay = named.get("log_decay")
    if decay is not None and decay.ndim == 1:  # the same for all tokens, of which padding is none
        named["log_decay"] = decay.expand(1, q_1T.shape[1], -1)
    parts = {name: x if x is None or name == "state_BHKV" else padded(x) for name, x in named.items()}
    o_NL, states = recurrence(padded(q_1T), padded(k_1T), padded(v_1T), **parts)
    return o_NL[inside_NL][None], states
