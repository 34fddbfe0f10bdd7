"""The one interface of the zoo: `Mixer`, its `State`, its `Caps`, and the decorators that register it.

Shape legend: B batch, T time, D model width, S length of a cross-attention context, H heads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from kernels.rows import pick_rows

State = dict[str, Tensor]
"""What a mixer remembers between tokens: named tensors, batch first; returned by every call, never mutated."""

PATTERNS = ("causal_self", "noncausal_self", "causal_cross", "noncausal_cross")
"""CAB's four attention patterns (Zhang et al. 2023, section 3.1). Cross patterns read a context of their own length."""


@dataclass(frozen=True)
class Caps:
    """What cannot be measured about a mixer and so has to be declared.

    Args:
        recurrent: True if `step` costs O(state); False if it recomputes from a stored history (global convolutions).
        patterns: the attention patterns served; `check_contract` proves each of them.
        backends: the kernel backends that `forward` can use.
        max_len: longest sequence the mixer is defined for, or None if unbounded.
    """

    recurrent: bool = True
    patterns: frozenset[str] = frozenset({"causal_self"})
    backends: frozenset[str] = frozenset({"torch"})
    max_len: int | None = None


@dataclass(frozen=True)
class AttentionWeights:
    """The projections of a pretrained attention layer, grouped keys and values repeated to all H heads; Linear layout.

    Args:
        q: [H K, D].
        k: [H K, D].
        v: [H K, D].
        o: [D, H K].
        head_dim: K.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    head_dim: int


class Mixer(nn.Module, ABC):
    """A sequence mixer: maps [B, T, D] to [B, T, D] along time.

    A subclass is final: it implements `forward`, `step` and `init_state`, takes its options as keyword-only
    arguments of `__init__(d_model, *, layer=0, pattern="causal_self", ...)`, and is registered by `@mixer(name)`.
    It must survive `torch.func.vmap` + `functional_call`, the meta device and `torch.compile`: no `.item()`, no Python
    branch on tensor values, no global state.

    Args:
        d_model: width D.
        pattern: which of `PATTERNS` this instance computes.

    Raises:
        ValueError: `pattern` is not one that `caps.patterns` declares.
    """

    name: ClassVar[str] = ""
    caps: ClassVar[Caps] = Caps()
    variants: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    """Option sets that the contract is checked with, small enough for d_model=16."""
    input_maps: ClassVar[tuple[str, ...]] = ()
    """Attributes of the maps, if any, through which alone `mix` reads its x_BTD, whose rows may then be fewer than those of
    qkv_BTE: a caller whose rows share an input repeats what these maps return."""

    def __init__(self, d_model: int, *, pattern: str = "causal_self") -> None:
        super().__init__()
        if pattern not in self.caps.patterns:
            raise ValueError(
                f"{type(self).__name__} does not serve the pattern {pattern!r}; it serves {', '.join(sorted(self.caps.patterns))}"
            )
        self.d_model = d_model
        self.pattern = pattern

    @abstractmethod
    def forward(
        self, x_BTD: Tensor, state: State | None = None, *, context_BSD: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """Mixes a whole segment: training, prefill, or the continuation of a state.

        Args:
            x_BTD: input, [B, T, D], T >= 1.
            state: what earlier segments left behind; None means "from nothing, and return no state".
            context_BSD: keys and values of the cross patterns, [B, S, D]; None for the self patterns.

        Returns:
            The output [B, T, D], and the state after the segment if one was given, else None.
        """

    @abstractmethod
    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """Mixes one token: the recurrence as the paper defines it, and the oracle of `forward`.

        Args:
            x_BD: input of this token, [B, D].
            state: what `init_state`, `forward` or an earlier `step` returned.

        Returns:
            The output [B, D] and the new state; the given state is left as it was.
        """

    @abstractmethod
    def init_state(
        self, batch: int, max_len: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> State:
        """The state before the first token, with room for `max_len` tokens.

        Returns:
            Everything that decoding the next token needs apart from weights; each tensor has `batch` as first axis.
        """

    def at_rows(self, x_BTD: Tensor, rows_BM: Tensor, x_BMD: Tensor) -> Tensor:
        """`forward` from nothing, at some positions only: [B, M, D].

        A mixer that can leave out the work of the other positions overrides it.

        Args:
            x_BTD: input, [B, T, D].
            rows_BM: the positions, int64; as for `kernels.rows.pick_rows`.
            x_BMD: the input there, which callers have at hand.
        """
        return pick_rows(self.forward(x_BTD)[0], rows_BM)

    def mix(self, qkv_BTE: Tensor, x_BTD: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        """`forward` without its projections, so that a pretrained attention layer can supply q, k, v and the output map.

        Optional: a mixer offers it if it reads its input through queries, keys and values of `n_heads` heads.

        Args:
            qkv_BTE: queries, keys and values, each of all heads, one after the other along the last axis.
            x_BTD: the layer's input, which gates read.
            state: as for `forward`.

        Returns:
            The heads' outputs [B, T, H V] before the output projection, and the state as `forward` returns it.

        Raises:
            ValueError: the mixer has no such form.
        """
        raise ValueError(f"{self.name} does not read q, k and v; it keeps projections of its own")

    def load_attention(self, weights: AttentionWeights) -> None:
        """Takes over a pretrained attention layer where the mixer has counterparts of its projections; optional.

        Raises:
            ValueError: the mixer has none, or its shapes differ.
        """
        raise ValueError(f"{self.name} has no counterpart of an attention layer's projections")

    def state_elements(self, seq_len: int) -> int:
        """Number of elements stored per sequence after `seq_len` tokens, counted from `init_state`; final."""
        return sum(t.numel() for t in self.init_state(1, seq_len, device="meta").values())

    def state_bytes(self, seq_len: int, dtype: torch.dtype = torch.float32) -> int:
        """Bytes stored per sequence after `seq_len` tokens with floating-point state in `dtype`; final."""
        state = self.init_state(1, seq_len, device="meta", dtype=dtype)
        return sum(t.numel() * t.element_size() for t in state.values())

    def published_elements(self, seq_len: int) -> int | None:
        """State elements as the source paper or Zoology's plots count them, or None if that is the true count."""
        return None

    def read_elements(self, seq_len: int) -> int:
        """State elements touched to decode one token; differs from the stored count for sparse reads."""
        return self.state_elements(seq_len)


@dataclass(frozen=True)
class Layer:
    """One layer of a pattern: the name of a mixer and its options."""

    mixer: str
    options: dict[str, Any] = field(default_factory=dict)


M = TypeVar("M", bound=type[Mixer])
P = TypeVar("P", bound=Callable[..., tuple[Layer, ...]])

REGISTRY: dict[str, type[Mixer]] = {}
"""Mixer classes by name, filled by importing their modules."""

LAYER_PATTERNS: dict[str, Callable[..., tuple[Layer, ...]]] = {}
"""Named layer patterns (BASED), filled by importing their modules."""


def mixer(name: str) -> Callable[[M], M]:
    """Registers a `Mixer` class under `name`; in this package the name is the file's stem."""

    def register(cls: M) -> M:
        if not (isinstance(cls, type) and issubclass(cls, Mixer)):
            raise ValueError(f"@mixer({name!r}) decorates {cls!r}, which is not a Mixer subclass")
        cls.name = name
        REGISTRY[name] = cls
        return cls

    return register


def layer_pattern(name: str) -> Callable[[P], P]:
    """Registers a function from options to a tuple of `Layer`s, cycled over the depth of a model."""

    def register(fn: P) -> P:
        LAYER_PATTERNS[name] = fn
        return fn

    return register


def heads(d_model: int, n_heads: int, *, what: str = "d_model") -> int:
    """Width of one head, d_model / n_heads.

    Raises:
        ValueError: the head count does not divide the width.
    """
    if n_heads < 1 or d_model % n_heads:
        divisors = [h for h in range(1, d_model + 1) if d_model % h == 0]
        nearest = min(divisors, key=lambda h: abs(h - n_heads))
        raise ValueError(f"n_heads={n_heads} does not divide {what}={d_model}; the nearest head count that does is {nearest}")
    return d_model // n_heads
