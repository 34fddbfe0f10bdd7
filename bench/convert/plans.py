"""Which layers are converted: all, none, all but every k-th, a list, or those that KL leaves."""

from __future__ import annotations

from bench.convert.spec import LayerPlan
from bench.errors import UserError


def converted_layers(plan: LayerPlan, n_layers: int) -> list[bool]:
    """For every layer, whether the plan converts it; a `kl:n` plan converts all until `kl_kept` is known.

    Raises:
        UserError: a selection that is impossible with so many layers; `LayerPlan` has refused one of another form.
    """
    text = plan.layers.strip()
    kind, _, number = text.partition(":")
    if text == "all" or kind == "kl":
        if kind == "kl":
            kl_kept(plan, n_layers)
        return [True] * n_layers
    if text == "none":
        return [False] * n_layers
    if kind == "every":
        if not 1 < int(number) <= n_layers:
            raise _impossible(text, n_layers)
        return [(index + 1) % int(number) != 0 for index in range(n_layers)]
    chosen: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        chosen |= set(range(int(first), int(last or first) + 1))
    if not chosen or max(chosen) >= n_layers:
        raise _impossible(text, n_layers)
    return [index in chosen for index in range(n_layers)]


def kl_kept(plan: LayerPlan, n_layers: int) -> int:
    """Number of softmax layers that a `kl:n` plan keeps; 0 for any other plan."""
    kind, _, number = plan.layers.strip().partition(":")
    if kind != "kl":
        return 0
    if not 0 < int(number) < n_layers:
        raise _impossible(plan.layers, n_layers)
    return int(number)


def layer_plans(plan: LayerPlan, n_layers: int) -> list[LayerPlan | None]:
    """One plan a layer, None where softmax stays."""
    return [plan if converted else None for converted in converted_layers(plan, n_layers)]


def _impossible(text: str, n_layers: int) -> UserError:
    return UserError(
        f"--layers {text!r} does not select among {n_layers} layers; write all, none, every:4 (keep every 4th softmax), a list of "
        f"layers to convert such as 0,2,5-9 (counted from 0 to {n_layers - 1}), or kl:n (keep the n that matter most)."
    )
