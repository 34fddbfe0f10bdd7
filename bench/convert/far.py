"""Windows of unequal length: few heads look far, the others near.

What a pretrained model recalls from afar goes through few of its heads (Wu et al. 2024, "Retrieval Head"; Xiao et al. 2024,
"DuoAttention"), so keys are worth more there.

Shape legend: B batch, T time, H query heads, G key heads (G divides H), K head width.
"""

from __future__ import annotations

import re
from typing import cast

import torch
from torch import Tensor, nn

from bench.convert.branches import WindowBranch
from bench.convert.fit import AttentionShape
from bench.convert.kept import KeptKeys
from bench.convert.spec import LayerPlan
from bench.errors import UserError
from mixers import State

AUTOMATIC = re.compile(r"auto:([1-9]\d*)")


def automatic(plan: LayerPlan) -> int:
    """How many far heads are to be found by measurement; 0 if the plan names them, or has none."""
    found = AUTOMATIC.fullmatch(plan.far_heads)
    return int(found[1]) if found else 0


def far_heads(plan: LayerPlan, n_layers: int, n_kv_heads: int) -> dict[int, list[int]]:
    """The far key heads that a plan names, by layer.

    Raises:
        UserError: a malformed list, or a layer or head that is not there.
    """
    found: dict[int, set[int]] = {}
    for part in plan.far_heads.replace(" ", "").split(",") if plan.far_heads else []:
        named = re.fullmatch(r"(\d+)(?:\.(\d+))?", part)
        heads = [] if named is None else list(range(n_kv_heads)) if named[2] is None else [int(named[2])]
        if named is None or int(named[1]) >= n_layers or max(heads) >= n_kv_heads:
            raise UserError(
                f"plan.far_heads={plan.far_heads!r} does not name key heads of this model, which has {n_layers} layers of "
                f"{n_kv_heads}; write layer.head, both counted from 0, such as 8.0,18.2 (18 for the whole layer), or auto:12."
            )
        found.setdefault(int(named[1]), set()).update(heads)
    return {layer: sorted(heads) for layer, heads in sorted(found.items())}


def written(heads: dict[int, list[int]]) -> str:
    """Heads by layer as `plan.far_heads` takes them."""
    return ",".join(f"{layer}.{head}" for layer, layer_heads in heads.items() for head in layer_heads)


class UnevenWindow(nn.Module):
    """A window whose length differs between the key heads of a layer; to its callers it is a `WindowBranch`.

    Args:
        far: key heads with the long window, ascending.
        n_kv_heads: G.
        head_dim: K.
        window: keys that the other heads see.
        far_window: keys that far heads see.
        sinks: first tokens that all heads see.
        scored_from: None for the newest keys in far heads; the width D of the layer's input, from which a score says which keys
            stay beyond the newest `window`.
    """

    def __init__(
        self,
        far: list[int],
        n_kv_heads: int,
        head_dim: int,
        *,
        window: int,
        far_window: int,
        sinks: int,
        scored_from: int | None = None,
    ) -> None:
        super().__init__()
        near = [head for head in range(n_kv_heads) if head not in far]
        self.heads = {name: heads for name, heads in (("near", near), ("far", far)) if heads}
        self.near = WindowBranch(len(near), head_dim, window=window, sinks=sinks) if near else None
        if scored_from is None:
            self.far = WindowBranch(len(far), head_dim, window=far_window, sinks=sinks) if far else None
        else:
            self.far = KeptKeys(len(far), head_dim, scored_from, window=window, kept=far_window - window, sinks=sinks)

    def forward(
        self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, state: State | None, x_BTD: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """Mixes a segment: [B, H, T, K] and the new state; `x_BTD`, the layer's input, is for scores of keys."""
        readers = q_BHTK.shape[1] // k_BGTK.shape[1]
        outputs: dict[int, Tensor] = {}
        stored: State = {}
        for name, heads in self.heads.items():
            own = None if state is None else {key.partition(".")[2]: a for key, a in state.items() if key.startswith(f"{name}.")}
            given = (_pick(q_BHTK, heads, readers), _pick(k_BGTK, heads), _pick(v_BGTK, heads), own, x_BTD)
            o, own = self.get_submodule(name)(*given)
            outputs |= dict(zip(heads, o.split(readers, dim=1), strict=True))
            stored |= {f"{name}.{key}": a for key, a in (own or {}).items()}
        return torch.cat([outputs[head] for head in sorted(outputs)], 1), None if state is None else stored

    def score_loss(self, q_BHTK: Tensor, k_BGTK: Tensor, x_BTD: Tensor) -> Tensor:
        """The loss of the scores of far heads' keys; see `KeptKeys.loss`."""
        heads, readers = self.heads["far"], q_BHTK.shape[1] // k_BGTK.shape[1]
        return cast(KeptKeys, self.far).loss(_pick(q_BHTK, heads, readers), _pick(k_BGTK, heads), x_BTD)

    def init_state(self, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> State:
        """The storage before the first token, of near and far heads each as long as they see."""
        states = {name: getattr(self, name).init_state(batch, device=device, dtype=dtype) for name in self.heads}
        return {f"{name}.{key}": a for name, state in states.items() for key, a in state.items()}


def window_branch(plan: LayerPlan, shape: AttentionShape, far: list[int]) -> WindowBranch | UnevenWindow:
    """The softmax branch, whose far heads look farther than the others."""
    sizes = (shape.n_kv_heads, shape.head_dim)
    if far:
        named = {"window": plan.window, "far_window": plan.far_window, "sinks": plan.sinks}
        return UnevenWindow(far, *sizes, **named, scored_from=shape.d_model if plan.far_keys == "best" else None)
    null_shape = (shape.n_heads, plan.sink_logits) if plan.sink_logits else None
    return WindowBranch(*sizes, window=plan.window, sinks=plan.sinks, null_shape=null_shape)


def _pick(a_BHTK: Tensor, heads: list[int], each: int = 1) -> Tensor:
    """The rows of some key heads, `each` neighbouring rows a head; slices, because an index would be copied to the device."""
    if heads[-1] - heads[0] == len(heads) - 1:  # neighbours, which need no copy
        return a_BHTK[:, heads[0] * each : (heads[-1] + 1) * each]
    return torch.cat([a_BHTK[:, head * each : (head + 1) * each] for head in heads], 1)
