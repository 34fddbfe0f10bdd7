"""The converted attention layer: the teacher's projections, a softmax window, a mixer, and the rule that joins them.

Shape legend: B batch, T time, D width, H query heads, G key heads (G divides H), K head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from bench.convert.branches import MixerBranch, Rope, SharedDenominator, WindowBranch, projected, rotate
from bench.convert.combinations import check_rotation, copied_projections, positive, readers_of
from bench.convert.far import UnevenWindow, window_branch
from bench.convert.fit import LONG, AttentionShape, attention_weights, build_mixer, loads_attention, reads_heads
from bench.convert.kept import KeptKeys
from bench.convert.spec import LayerPlan
from bench.errors import UserError
from mixers import State
from mixers._layers import widen
from mixers._ssd import SSDBlock
from mixers.linear_attention import LinearAttention

Branch = Literal["both", "window", "mixer"]
"""Which branches of a converted layer speak; one alone is the referee's ablation."""
GATE_BIAS = -5.0
"""Initial logit of the gate: the layer starts as its window, with under one per cent of the untrained mixer."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class LinearizedAttention(nn.Module):
    """Stands in for a teacher's attention module: same arguments, same output, constant state.

    The four projections (and norms of queries and keys, if the teacher has them) are taken over as they are. A mixer that
    offers `Mixer.mix` reads them; any other mixer reads the layer's input through projections of its own.

    Args:
        attention: the teacher's module, whose parameters are moved in.
        plan: what the layer becomes.
        shape: the teacher's sizes.
        layer_idx: index of the layer, counted from 0.
        far: its key heads with the long window.

    Raises:
        UserError: mixer, window and combination rule do not fit each other or the teacher.
    """

    def __init__(
        self, attention: nn.Module, plan: LayerPlan, shape: AttentionShape, layer_idx: int, far: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.plan, self.shape, self.layer_idx = plan, shape, layer_idx
        self.head_dim = shape.head_dim
        self.ablation: Branch = "both"
        self.stand_in: tuple[nn.Module, ...] = ()  # a tuple hides it from parameters and state_dict
        mixer = build_mixer(plan, shape, layer_idx) if plan.mixer else None
        heads = mixer is None or reads_heads(mixer)
        self.own_projections = mixer if not heads else None
        if heads or plan.window:
            for name in PROJECTIONS:
                self.add_module(name, getattr(attention, name))
            self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.copies = copied_projections(attention, plan, mixer) if plan.projections == "copy" else None
        self.window = window_branch(plan, shape, list(far)) if plan.window else None
        self.joint = self.mixer = self.gate = None
        readers = readers_of(plan, shape, mixer)
        check_rotation(plan, mixer)
        if mixer is None or self.window is None:
            self.mixer = MixerBranch(mixer, readers=readers) if mixer is not None and heads else None
        elif plan.combine == "shared_denominator":
            self.joint, self.window = SharedDenominator(positive(mixer, plan), cast(WindowBranch, self.window)), None
        else:
            self.mixer = MixerBranch(mixer, readers=readers) if heads else None
            if plan.combine == "gate":
                self.gate = nn.Linear(shape.d_model, shape.n_heads if heads else 1)
                nn.init.zeros_(self.gate.weight)
                nn.init.constant_(self.gate.bias, GATE_BIAS)

    def take_over(self, attention: nn.Module) -> None:
        """Starts projections that the mixer has of its own from the teacher's, where it can."""
        for name, own in ({} if self.copies is None else self.copies).items():
            own.load_state_dict(getattr(attention, f"{name}_proj").state_dict())
        if self.own_projections is not None and loads_attention(self.own_projections):
            try:
                self.own_projections.load_attention(attention_weights(attention, self.shape))
            except ValueError as error:
                raise UserError(f"{self.plan.mixer} cannot start from layer {self.layer_idx}: {error}.") from None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Rope,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        padding_BT: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Mixes a segment as transformers calls an attention module.

        Args:
            hidden_states: [B, T, D].
            position_embeddings: see `Rope`.
            attention_mask: the mask of softmax layers, which this layer does not read.
            cache: one whose layer of this index holds a state, or None.
            padding_BT: True at real tokens; None means that all are. Padding leaves states as they are.
            **kwargs: ignored.

        Returns:
            [B, T, D], zero at padding, and None for the attention weights.
        """
        if self.stand_in:
            return self.stand_in[0](hidden_states, position_embeddings=position_embeddings, attention_mask=None)
        kept = None if cache is None else cache.layers[self.layer_idx]
        state = None
        if kept is not None:
            state = kept.state or self.init_state(len(hidden_states), device=hidden_states.device, dtype=hidden_states.dtype)
        rope = cast(Rope, tuple(a.expand(len(hidden_states), -1, -1) for a in position_embeddings))
        if padding_BT is None:
            y_BTD, state = self.segment(hidden_states, rope, state)
        else:
            y_BTD, state = self._padded(hidden_states, rope, state, padding_BT)
        if kept is not None:
            kept.store(state, hidden_states.shape[1])
        return y_BTD, None

    def segment(self, x_BTD: Tensor, rope: Rope, state: State | None) -> tuple[Tensor, State | None]:
        """Mixes a segment without padding; returns [B, T, D] and the new state if one was given."""
        parts = _split(state)
        outputs = self._heads(x_BTD, rope, parts)
        if self.own_projections is not None:
            outputs["own"], parts["own"] = self.own_projections(x_BTD, parts["own"])
        return self._join(outputs), None if state is None else _merge(parts)

    def heads_output(self, x_BTD: Tensor, rope: Rope) -> Tensor:
        """What stage 1 of LoLCATs matches: the heads' joint output before the output projection, [B, T, H K].

        Raises:
            UserError: the mixer has an output projection of its own.
        """
        if self.own_projections is not None:
            raise UserError(f"{self.plan.mixer} has no heads before an output projection; use a recipe that matches mixer_out.")
        return self._joined_heads(self._heads(x_BTD, rope, _split(None)))

    @property
    def scores_keys(self) -> bool:
        """Whether far heads choose their keys by a learned score."""
        return isinstance(self.window, UnevenWindow) and isinstance(self.window.far, KeptKeys)

    def score_loss(self, x_BTD: Tensor, rope: Rope) -> Tensor:
        """What the scores of far heads' keys miss of the attention that they draw from afar; needs `scores_keys`."""
        made = projected(x_BTD, self._maps())
        q, k, _ = self._read(made, rope if self.plan.window_rope == "keep" else None)
        return cast(UnevenWindow, self.window).score_loss(q, k, x_BTD)

    def matrix(self, x_BTD: Tensor, rope: Rope) -> Tensor:
        """What Hedgehog and MOHAWK match first: the mixer's own causal matrix, [B, H, T, T].

        Raises:
            UserError: the mixer has no such matrix with one entry per head and pair of tokens.
        """
        if isinstance(self.own_projections, SSDBlock):
            return self.own_projections.matrix(x_BTD)
        if self.mixer is not None and isinstance(self.mixer.mixer, LinearAttention):
            maps = self._maps() if self.copies is None else list(self.copies.values())
            return self.mixer.matrix(*self._read(projected(x_BTD, maps), rope if self.plan.rope == "keep" else None))
        raise UserError(
            f"attn_weights cannot be matched with {self.plan.mixer} under combine={self.plan.combine}: it needs linear_attention "
            "without a shared denominator, or mamba2; use a recipe that matches attn_out or mixer_out."
        )

    def _heads(self, x_BTD: Tensor, rope: Rope, parts: dict[str, State | None]) -> dict[str, Tensor]:
        """Outputs [B, H, T, K] of the branches that read the teacher's heads, and what the gate reads, [B, T, H] or [B, T, 1].

        The branches' new states go into `parts`.
        """
        outputs: dict[str, Tensor] = {}
        if self.window is self.joint is self.mixer is None:
            return outputs
        maps = [*self._maps(), *(() if self.copies is None else self.copies.values())]
        made = projected(x_BTD, maps if self.gate is None else [*maps, self.gate])
        if self.gate is not None:
            outputs["gate"] = made[-1]
        if self.joint is not None:
            outputs["joint"], parts["joint"] = self.joint(*self._read(made[:3], rope), parts["joint"], self.ablation)
        read: dict[tuple[int, bool], tuple[Tensor, Tensor, Tensor]] = {}
        if self.window is not None:
            turned = self.plan.window_rope == "keep"
            read[0, turned] = self._read(made[:3], rope if turned else None)
            outputs["window"], parts["window"] = self.window(*read[0, turned], parts["window"], x_BTD)
        if self.mixer is not None:
            turned, first = self.plan.rope == "keep", 0 if self.copies is None else 3
            q, k, v = read.get((first, turned)) or self._read(made[first : first + 3], rope if turned else None)
            rotation = rope if self.plan.rope == "after_map" else None
            outputs["mixer"], parts["mixer"] = self.mixer(q, k, v, x_BTD, parts["mixer"], rotation)
        return outputs

    def init_state(self, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> State:
        """The state before the first token: the window in `dtype`, recurrent sums in fp32 or better."""
        parts: dict[str, State | None] = {}
        for name in ("joint", "window", "mixer"):
            branch = getattr(self, name)
            if branch is not None:
                parts[name] = branch.init_state(batch, device=device, dtype=dtype)
        if self.own_projections is not None:
            wide = torch.promote_types(dtype, torch.float32)
            parts["own"] = self.own_projections.init_state(batch, LONG, device=device, dtype=wide)
        return _merge(parts)

    def _maps(self) -> list[nn.Module]:
        """The teacher's projections to queries, keys and values."""
        return [getattr(self, name) for name in PROJECTIONS[:3]]

    def _read(self, qkv: Sequence[Tensor], rope: Rope | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, T, K], keys and values [B, G, T, K] of projections [B, T, .], rotated unless `rope` is None."""
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in qkv)
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        # The kernels scale by K^-1/2; a teacher with another scale has the difference in its queries.
        factor = self.shape.scale * self.head_dim**0.5
        q, k, v = (a.transpose(1, 2) for a in (q if abs(factor - 1) < 1e-6 else q * factor, k, v))
        return (q, k, v) if rope is None else (rotate(q, rope), rotate(k, rope), v)

    def _join(self, outputs: dict[str, Tensor]) -> Tensor:
        """The branches' outputs as the layer's, [B, T, D]."""
        own = outputs.pop("own", None)
        if own is None:
            return self.get_submodule("o_proj")(self._joined_heads(outputs))
        if not outputs:
            return own
        return self._weighted(self.get_submodule("o_proj")(_flat(outputs["window"])), own, outputs.get("gate"))

    def _joined_heads(self, outputs: dict[str, Tensor]) -> Tensor:
        """The heads' joint output, [B, T, H K]."""
        gate = outputs.pop("gate", None)
        if len(outputs) == 1:
            return _flat(*outputs.values())
        # Heads behind time, as the branches store them and the output projection reads them.
        window, mixer = (outputs[name].transpose(1, 2) for name in ("window", "mixer"))
        return self._weighted(window, mixer, None if gate is None else gate[..., None]).flatten(2)

    def _weighted(self, window: Tensor, mixer: Tensor, gate: Tensor | None) -> Tensor:
        """Window and mixer of one shape by the plan's rule or the ablation; the gate's logits broadcast."""
        if self.ablation != "both":
            return window if self.ablation == "window" else mixer
        if gate is None:
            return self.plan.window_weight * window + self.plan.mixer_weight * mixer
        return (window + torch.sigmoid(widen(gate)) * (mixer - window)).to(window.dtype)

    def _padded(self, x_BTD: Tensor, rope: Rope, state: State | None, padding_BT: Tensor) -> tuple[Tensor, State | None]:
        """Rows with the same first and last real token go through `segment` together, without their padding.

        Grouping needs no support from any mixer and is exact; it costs one pass per distinct padding, at prefill only.
        """
        y_BTD = torch.zeros_like(x_BTD)
        state = None if state is None else {name: tensor.clone() for name, tensor in state.items()}
        for rows, start, stop in spans(padding_BT):
            part = None if state is None else {name: tensor[rows] for name, tensor in state.items()}
            cut = cast(Rope, tuple(a[rows, start:stop] for a in rope))
            y, part = self.segment(x_BTD[rows, start:stop], cut, part)
            y_BTD[rows, start:stop] = y.to(y_BTD.dtype)
            if state is not None and part is not None:
                for name, tensor in state.items():
                    tensor[rows] = part[name]
        return y_BTD, state


def spans(padding_BT: Tensor) -> list[tuple[list[int], int, int]]:
    """Rows grouped by where their real tokens lie: (rows, start, stop); rows without any are left out.

    Raises:
        ValueError: padding between real tokens.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for row, real in enumerate(padding_BT.bool().tolist()):
        if not any(real):
            continue
        start, stop = real.index(True), len(real) - real[::-1].index(True)
        if not all(real[start:stop]):
            raise ValueError("the attention mask has padding between real tokens; pad on one side only")
        groups.setdefault((start, stop), []).append(row)
    return [(rows, start, stop) for (start, stop), rows in groups.items()]


def _flat(o: Tensor) -> Tensor:
    """[B, H, T, K] to [B, T, H K]."""
    return o.transpose(1, 2).flatten(2)


def _split(state: State | None) -> dict[str, State | None]:
    parts: dict[str, State | None] = dict.fromkeys(("joint", "window", "mixer", "own"))
    for key, tensor in (state or {}).items():
        branch, _, name = key.partition(".")
        parts[branch] = (parts[branch] or {}) | {name: tensor}
    return parts


def _merge(parts: dict[str, State | None]) -> State:
    return {f"{branch}.{name}": tensor for branch, part in parts.items() for name, tensor in (part or {}).items()}
