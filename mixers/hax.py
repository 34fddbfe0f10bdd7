"""HAX: Mamba-2 beside sparse attention whose keys the context chooses.

Source: "Overcoming Long-Context Limitations of State-Space Models via Context-Dependent Sparse Attention" (2025), from its
definition. With x the convolved input of the block,

    y = norm((SSM(x) + e * Attn(q, k, x)) * silu(z)) W_out,    (k, q) = x W,    e = 1 per channel at first

Attention is single-headed, without positions, over at most `budget` keys of each query. What differs from the published code:

- It is causal. There, hashes are centred and normalised by statistics of the whole sequence and drawn anew at every call; here
  they are centred by running means and fixed by a seed. Scaling cannot change the sign of a projection, so none is done.
- A query always hashes to its own key, and the key set is never empty; there, queries without a match read all positions.
- The score of key selection is trained by the task's loss: the logit of every key read, by way of the hash too, has
  log sigmoid(score) added, so a key that helps is pushed up; a key that is not read sends no gradient. There, an auxiliary
  ranking loss with weight 0.1 trains the score on detached inputs, and the score does not enter the logits.
- Dilation counts back from the query; there, it picks absolute columns, which leaves early queries without keys.

Shape legend: B batch, T time, S stored keys, K all keys (S + T), D width, E inner width, N state and key width, R hash rounds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.chosen_keys import attend, bucket_keys, dilated_keys, seen, top_keys
from mixers._base import State, mixer
from mixers._layers import l2_normalize, refuse_context, widen
from mixers._ssd import SSDBlock

KEYS = ("off", "window", "dilated", "lsh", "key_selection", "hax", "full")
HASHED, SCORED, RECENT = ("lsh", "hax"), ("key_selection", "hax"), ("window", "dilated")


@mixer("hax")
class HAX(SSDBlock):
    """Mamba-2 plus attention over the keys of one pattern.

    Args:
        keys: which keys a query reads, its own counted where it is among them. off: no attention, plain Mamba-2. window: the
            last `budget`. dilated: every `dilation`-th back from the query. lsh: the newest that share a hash bucket.
            key_selection: the best-scored so far. hax: half the budget of each of the last two. full: all.
        budget: most keys of a query.
        dilation: period of `dilated`.
        rounds: hash tables; a key matches if it does in any of them.
        bits: hyperplanes of a table, at most 8.
        seed: of the hyperplanes, which also differ between layers.
        d_state: N, of the SSM and of queries and keys.
        head_dim: width of an SSM head, cut down to the inner width where that is smaller.
        expand: E as a multiple of D.
        conv: taps of the short convolution; 0 for none.
    """

    variants = (
        {"keys": "off"},
        {"keys": "window", "budget": 6},
        {"keys": "dilated", "budget": 4, "dilation": 3},
        {"keys": "lsh", "budget": 5, "bits": 2},
        {"keys": "lsh", "budget": 6, "bits": 3, "rounds": 1, "conv": 0, "expand": 1},
        {"keys": "key_selection", "budget": 5},
        {"keys": "hax", "budget": 7, "bits": 3, "head_dim": 8},
        {"keys": "full"},
    )

    def __init__(
        self,
        d_model: int,
        *,
        layer: int = 0,
        pattern: str = "causal_self",
        keys: str = "hax",
        budget: int = 64,
        dilation: int = 16,
        rounds: int = 2,
        bits: int = 8,
        seed: int = 0,
        d_state: int = 32,
        head_dim: int = 16,
        expand: int = 2,
        conv: int = 4,
    ) -> None:
        super().__init__(d_model, pattern=pattern, d_state=d_state, head_dim=head_dim, n_groups=1, expand=expand, conv=conv)
        _check(keys, budget, dilation, rounds, bits)
        self.keys, self.budget, self.dilation = keys, budget, dilation if keys == "dilated" else 1
        if keys == "off":
            return
        self.kq_proj = nn.Linear(self.d_inner, 2 * d_state, bias=False)
        self.gain = nn.Parameter(torch.ones(self.d_inner))
        if keys in SCORED:
            self.score = _Score(d_state)
        if keys in HASHED:
            generator = torch.Generator().manual_seed(1_000_003 * seed + layer)
            planes = torch.randn(rounds, bits, d_state, generator=generator, device="cpu")
            self.register_buffer("planes", planes)

    def forward(
        self, x_BTD: Tensor, state: State | None = None, *, context_BSD: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`."""
        refuse_context(self, context_BSD)
        y, x, z, new_state = self.scan(x_BTD, state)
        if self.keys != "off":
            read, cache = self._read(x, state)
            y = y + self.gain * read
            new_state = None if new_state is None or cache is None else new_state | cache
        return self.project_out(y, z), new_state

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`: the recurrence, and attention to the chosen ones of the stored keys and the own one."""
        y, x, z, new_state = self.scan_step(x_BD, state)
        if self.keys != "off":
            read, cache = self._read(x[:, None], state)
            y, new_state = y + self.gain * read[:, 0], new_state | cache
        return self.project_out(y, z), new_state

    def init_state(
        self, batch: int, max_len: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> State:
        """See `Mixer.init_state`: that of the scan, and the keys that a later query may still choose.

        A window keeps its span, and key selection its best keys, since a key that drops out never returns. Hash buckets are
        refilled from any depth, so `lsh` and `hax` keep all keys, with a byte per hash round and, for `hax`, a score.
        """
        state = self.scan_state(batch, device=device, dtype=dtype)
        if self.keys == "off":
            return state
        size = min(self._stored(), max_len) if self._stored() is not None else max_len

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(batch, *shape, device=device, dtype=dtype)

        state |= {"k": zeros(size, self.d_state), "v": zeros(size, self.d_inner), "position": zeros(dtype=torch.long)}
        if self.keys in SCORED:
            state["score"] = zeros(size)
        if self.keys in HASHED:
            state |= {"code": zeros(size, len(self.planes), dtype=torch.uint8), "k_sum": zeros(self.d_state)}
        if self.keys in SCORED + HASHED:
            state["q_sum"] = zeros(self.d_state)
        return state

    def published_elements(self, seq_len: int) -> int:
        """See `Mixer.published_elements`: the SSM state as Zoology counts it, and keys and values of all stored tokens."""
        stored = 0 if self.keys == "off" else min(seq_len, self._stored() or seq_len)
        return self.d_inner * self.d_state + stored * (self.d_state + self.d_inner)

    def read_elements(self, seq_len: int) -> int:
        """See `Mixer.read_elements`: all but the keys and values that the last of `seq_len` tokens does not read."""
        stored = self.init_state(1, seq_len, device="meta")
        if self.keys == "off":
            return self.state_elements(seq_len)
        unread = stored["k"].shape[1] - min(self._n_read(seq_len), stored["k"].shape[1])
        return self.state_elements(seq_len) - unread * (self.d_state + self.d_inner)

    def _n_read(self, seq_len: int) -> int:
        """Most keys that the query of token `seq_len` reads."""
        return seq_len if self.keys == "full" else min(self.budget, -(-seq_len // self.dilation))

    def _stored(self) -> int | None:
        """Keys that must be stored, or None for all."""
        if self.keys in RECENT:
            return (self.budget - 1) * self.dilation
        return self.budget if self.keys == "key_selection" else None

    def _read(self, x_BTE: Tensor, state: State | None) -> tuple[Tensor, State | None]:
        """Attention over the chosen keys, [B, T, E], and the stored keys afterwards."""
        k_BTN, q_BTN = self.kq_proj(x_BTE).chunk(2, dim=-1)
        new, code_BTR, sums = self._describe(k_BTN, q_BTN, state)
        new |= {"k": k_BTN, "v": x_BTE}
        every = new if state is None else {name: torch.cat((state[name].to(a.dtype), a), 1) for name, a in new.items()}
        filled_BK = self._filled(x_BTE, state)
        mask_BTK = self._choose(every, code_BTR, filled_BK, x_BTE.shape[1])
        log_gate_BK = F.logsigmoid(every["score"]) if "score" in every else None
        read = attend(q_BTN, every["k"], every["v"], mask_BTK, log_gate_BK)
        return read, None if state is None else sums | self._store(every, mask_BTK[:, -1], state, x_BTE.shape[1])

    def _describe(self, k_BTN: Tensor, q_BTN: Tensor, state: State | None) -> tuple[State, Tensor | None, State]:
        """Scores and buckets of the new keys, buckets of the queries, and the running sums after the segment."""
        new: State = {}
        code_BTR, sums = None, {}
        if self.keys in SCORED + HASHED:
            q_sum_BTN = _running(q_BTN, None if state is None else state["q_sum"])
            sums["q_sum"] = q_sum_BTN[:, -1]
        if self.keys in SCORED:
            new["score"] = self.score(k_BTN, q_sum_BTN)
        if self.keys in HASHED:
            k_sum_BTN = _running(k_BTN, None if state is None else state["k_sum"])
            sums["k_sum"] = k_sum_BTN[:, -1]
            count = torch.arange(1, k_BTN.shape[1] + 1, device=k_BTN.device)
            count = (count if state is None else state["position"][:, None] + count)[..., None]
            new["code"] = self._bucket(widen(k_BTN) - k_sum_BTN / count)
            code_BTR = self._bucket(widen(q_BTN) - q_sum_BTN / count)
        return new, code_BTR, {} if state is None else {name: a.to(state[name].dtype) for name, a in sums.items()}

    def _bucket(self, x_BTN: Tensor) -> Tensor:
        """Signs against the hyperplanes of each round as one number, [B, T, R] uint8."""
        with torch.autocast(x_BTN.device.type, enabled=False):
            sides = torch.einsum("btn,rmn->btrm", x_BTN.detach(), self.planes.to(x_BTN.dtype)) > 0
        weight = 2 ** torch.arange(sides.shape[-1], device=sides.device)
        return (sides * weight).sum(-1).to(torch.uint8)

    def _filled(self, x_BTE: Tensor, state: State | None) -> Tensor:
        """Which keys exist, stored and new, [B, K]; recent keys fill their room from the end, others from the start."""
        own = torch.ones(x_BTE.shape[:2], dtype=torch.bool, device=x_BTE.device)
        if state is None:
            return own
        size = state["k"].shape[1]
        slot = torch.arange(size, device=x_BTE.device)
        slot = size - 1 - slot if self.keys in RECENT else slot
        return torch.cat((slot < state["position"][:, None], own), 1)

    def _choose(self, every: State, code_BTR: Tensor | None, filled_BK: Tensor, n_new: int) -> Tensor:
        """The keys that each query reads, [B, T, K]."""
        seen_BTK = seen(n_new, filled_BK)
        if self.keys == "full":
            return seen_BTK
        if self.keys in RECENT:
            n_keys = filled_BK.shape[1]
            return seen_BTK & dilated_keys(n_new, n_keys, budget=self.budget, dilation=self.dilation, device=filled_BK.device)
        best = self.budget // 2 if self.keys == "hax" else self.budget
        mask = torch.zeros_like(seen_BTK)
        if self.keys in SCORED:
            mask = mask | top_keys(every["score"].detach(), filled_BK, seen_BTK, best)
        if self.keys in HASHED:
            mask = mask | bucket_keys(code_BTR, every["code"], seen_BTK, self.budget - best if self.keys == "hax" else best)
        return mask

    def _store(self, every: State, last_BK: Tensor, state: State, n_new: int) -> State:
        """The keys to keep after the segment; `last_BK` is what its last query read."""
        size, end_B = state["k"].shape[1], state["position"] + n_new
        kept = {name: a.to(state[name].dtype) for name, a in every.items()}
        if self.keys in RECENT:
            return {name: a[:, n_new:] for name, a in kept.items()} | {"position": end_B}
        if self.keys == "key_selection":
            slot_BK = torch.where(last_BK, last_BK.cumsum(1) - 1, size)
            return {name: _compact(a, slot_BK, size) for name, a in kept.items()} | {"position": end_B}
        if n_new > size:
            raise ValueError(f"{n_new} tokens do not fit a state made for max_len={size}; make it with a larger max_len")
        slot_BT = state["position"][:, None] + torch.arange(n_new, device=end_B.device)
        return {name: state[name].scatter(1, _index(slot_BT, a), a[:, size:]) for name, a in kept.items()} | {"position": end_B}


class _Score(nn.Module):
    """Write-time score of a key, from the key and the direction of the queries so far: three layers, ReLU between them.

    Args:
        d_key: N.
    """

    def __init__(self, d_key: int) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(nn.Linear(2 * d_key, 2 * d_key) for _ in range(2))
        self.readout = nn.Linear(2 * d_key, 1)

    def forward(self, k_BTN: Tensor, q_sum_BTN: Tensor) -> Tensor:
        """[B, T], in fp32 or better."""
        h = torch.cat((k_BTN, l2_normalize(q_sum_BTN).to(k_BTN.dtype)), -1)
        for layer in self.hidden:
            h = F.relu(layer(h))
        return widen(self.readout(h)[..., 0])


def _check(keys: str, budget: int, dilation: int, rounds: int, bits: int) -> None:
    """Raises ValueError for options that leave a query without keys or a bucket without a byte."""
    if keys not in KEYS:
        raise ValueError(f"keys={keys!r} is not a pattern; choose one of {', '.join(KEYS)}")
    least = 2 if keys == "hax" else 1
    if budget < least or dilation < 1:
        raise ValueError(f"keys={keys}, budget={budget}, dilation={dilation}: budget is {least} or more, dilation 1 or more")
    if rounds < 1 or not 1 <= bits <= 8:
        raise ValueError(f"rounds={rounds}, bits={bits}: at least one round, and 1 to 8 bits, which fit a byte")


def _running(x_BTN: Tensor, before_BN: Tensor | None) -> Tensor:
    """Sums of a segment's prefixes on top of those before it, [B, T, N] in fp32 or better."""
    total = widen(x_BTN).cumsum(1)
    return total if before_BN is None else total + before_BN[:, None]


def _index(slot: Tensor, a: Tensor) -> Tensor:
    """Slots [B, S] as an index into the first two axes of [B, ., ...]."""
    return slot if a.ndim == 2 else slot[..., None].expand(*slot.shape, a.shape[2])


def _compact(a_BK: Tensor, slot_BK: Tensor, size: int) -> Tensor:
    """Rows [B, K, ...] moved to their slots of [B, size, ...]; those of slot `size` are dropped."""
    return a_BK.new_zeros(a_BK.shape[0], size + 1, *a_BK.shape[2:]).scatter(1, _index(slot_BK, a_BK), a_BK)[:, :size]
