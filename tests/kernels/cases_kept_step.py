"""Cases of the fused decoding step of a window that keeps keys, for the interpreter and for a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention import attention_reference, share_heads
from kernels.dispatch import use_backend
from kernels.kept_step import Kept, kept_step
from kernels.step import states_in_place
from kernels.window_step import Stored
from tests.kernels import cases_window_step as windows
from tests.kernels.oracle import SINGLE, SIXTEEN_BIT, poisoned, require_close

SHAPES = (
    # batch, heads of q, heads of k and v, stored keys, sinks, kept keys, K, V
    (3, 4, 2, 20, 3, 30, 16, 16),
    (3, 3, 1, 70, 0, 5, 20, 33),
    (3, 1, 1, 33, 17, 70, 8, 72),
    (3, 17, 1, 1, 1, 1, 64, 5),
)


def draw(shape: tuple[int, ...], *, device: str, dtype: torch.dtype, stored_dtype: torch.dtype | None = None) -> tuple:
    """A token, and storage of sequences that have read nothing, little and much; many scores are equal."""
    *_, room, k_dim, v_dim = shape
    q, k, v, stored = windows.draw((*shape[:5], k_dim, v_dim), device=device, dtype=dtype, stored_dtype=stored_dtype)
    sizes = (*k.shape[:2], room)
    kept_k, kept_v = (torch.randn(*sizes, width, device=device).to(stored_dtype or dtype) for width in (k_dim, v_dim))
    scores = [torch.randint(-4, 4, size, device=device).float() for size in (sizes, (*k.shape[:2], shape[3]), k.shape[:2])]
    share_B = torch.tensor([1.0, 0.5, 0.0], device=device).repeat(len(q))[-len(q) :]
    empty = share_B[:, None, None] * room > torch.arange(room, device=device)
    return q, k, v, scores[2], stored, Kept(kept_k, kept_v, scores[0].masked_fill(empty, float("-inf")), scores[1])


def definition(q: Tensor, k: Tensor, v: Tensor, score: Tensor, stored: Stored, kept: Kept) -> tuple[Tensor, Stored, Kept]:
    """In fp64, a head at a time, with lists; of equal scores the newer key stays."""
    window = stored.k_BGLK.shape[2] + 1
    _, new = windows.definition(q, k, v, stored, window)
    sinks, group = 0 if new.sink_k_BGPK is None else new.sink_k_BGPK.shape[2], q.shape[1] // k.shape[1]
    y, held = torch.zeros(*q.shape[:2], v.shape[2], dtype=torch.float64, device=q.device), Kept(*(x.clone() for x in kept))
    for b, position in enumerate(stored.position_B.tolist()):
        for g in range(k.shape[1]):
            near = [*range(max(0, position - window + 1), position + 1)]
            rows = [(stored, 0, i - position + window - 1) for i in near[:-1]] + [(None, 0, 0)]
            rows += [(new, 3, i) for i in range(sinks) if i < near[0]]
            rows += [(kept, 0, i) for i in range(kept.k_BGPK.shape[2]) if kept.score_BGP[b, g, i] > float("-inf")]
            keys, values = (
                torch.stack([x[b, g] if part is None else part[at + n][b, g, i] for part, at, i in rows]).double()
                for n, x in enumerate((k.to(stored[0].dtype), v.to(stored[1].dtype)))
            )
            pair = (share_heads(x[None, None], group) for x in (keys, values))
            mine = slice(g * group, (g + 1) * group)
            y[b, mine] = attention_reference(q[b, mine, None].double()[None], *pair)[0, :, 0]
            leaves = kept.near_score_BGL[b, g, 0] if position - window + 1 >= sinks else torch.tensor(float("-inf"))
            scores = [*kept.score_BGP[b, g].tolist(), float(leaves)]
            goes = min(range(len(scores)), key=lambda i: (scores[i], i))
            for x, oldest in zip(held[:3], (stored[0][b, g, 0], stored[1][b, g, 0], torch.tensor(scores[-1])), strict=True):
                last = oldest.to(x.device)[None]
                every = torch.cat((x[b, g], last))
                x[b, g] = torch.cat((every[:goes], every[goes + 1 :]))
    held.near_score_BGL.copy_(torch.cat((kept.near_score_BGL, score[:, :, None]), 2)[:, :, 1:])
    return y, new, held


def check(
    shape: tuple[int, ...], device: str, dtype: torch.dtype, *, stored_dtype: torch.dtype | None = None, backend: str = "triton"
) -> None:
    """Output against fp64 and storage to the bit, as new tensors and in place; only the latter changes what is given."""
    token = draw(shape, device=device, dtype=dtype, stored_dtype=stored_dtype)
    *token, stored, kept = token
    y, *wanted = definition(*token, stored, kept)
    before = [None if x is None else x.clone() for x in (*stored, *kept)]
    with use_backend(backend), poisoned():
        found, *new = kept_step(*token, stored, kept)
        with torch.no_grad(), states_in_place():
            given = Stored(*(None if x is None else x.clone() for x in stored)), Kept(*(x.clone() for x in kept))
            again, *same = kept_step(*token, *given)
    require_close({"y": found}, {"y": y}, SINGLE if dtype == torch.float32 else SIXTEEN_BIT)
    assert torch.equal(found, again)
    for old, mine, a, b, c in zip(before, (*stored, *kept), *(sum(map(tuple, x), ()) for x in (new, same, wanted)), strict=True):
        assert old is None or (torch.equal(old, mine) and torch.equal(a, c) and torch.equal(b, c))
    assert all(x is y for x, y in zip(sum(map(tuple, same), ()), sum(map(tuple, given), ()), strict=True))
