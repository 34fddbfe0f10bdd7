"""Contract checks of a mixer's form: its interface, its state, and how it behaves under torch's transforms.

Each check takes a `Case`, returns a short report, and raises on a breach. Shapes: B batch, T time, S context, D width.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from mixers._base import PATTERNS, REGISTRY, Mixer, State
from mixers._case import LONGEST, Case, Fault, error, forward, require_small, run_steps


def interface(case: Case) -> str:
    """A registered `Mixer` with keyword-only options, whose counts are those of the base class."""
    mixer = case.mixer
    cls = type(mixer)
    if not isinstance(mixer, Mixer):
        raise Fault(f"{cls.__name__} is not a subclass of Mixer")
    registered = REGISTRY.get(cls.name)
    if registered is not cls:
        if registered is None or "name" not in vars(cls):  # an inherited name is that of another class
            raise Fault(f"{cls.__name__} is not registered; decorate it with @mixer(name)")
        files = " and ".join(str(getattr(sys.modules[c.__module__], "__file__", c.__module__)) for c in (cls, registered))
        raise Fault(f"{files} both register the name {cls.name!r}; change one of them")
    parameters = list(inspect.signature(cls).parameters.values())
    loose = [p.name for p in parameters[1:] if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    if parameters[0].name != "d_model" or loose:
        raise Fault(f"the constructor is (d_model, *, ...); not keyword-only: {', '.join(loose) or parameters[0].name}")
    missing = {"layer", "pattern"} - {p.name for p in parameters}
    if missing:
        raise Fault(f"the constructor lacks the keyword {', '.join(sorted(missing))}")
    overridden = [name for name in ("state_elements", "state_bytes") if getattr(cls, name) is not getattr(Mixer, name)]
    if overridden:
        raise Fault(f"{', '.join(overridden)} must not be overridden: the size is counted from init_state")
    unknown = cls.caps.patterns - set(PATTERNS)
    if unknown or "causal_self" not in cls.caps.patterns:
        raise Fault(f"caps.patterns must hold causal_self and only {PATTERNS}; it is {sorted(cls.caps.patterns)}")
    options = [p.name for p in parameters if p.name not in ("d_model", "layer", "pattern")]
    return f"options: {', '.join(options) or 'none'}"


def state_purity(case: Case) -> str:
    """Calls leave the state, the input and the module's own tensors as they were, and return a new state."""
    mixer, x = case.build(), case.inputs(2, 9)
    with torch.no_grad():
        _, state = mixer(x[:, :5], mixer.init_state(2, LONGEST, dtype=x.dtype))
        given = {"x": x} | state
        before = {name: tensor.clone() for name, tensor in (given | mixer.state_dict()).items()}
        calls = {"forward": lambda: mixer(x[:, 5:], state), "step": lambda: mixer.step(x[:, 5], state)}
        for name, call in calls.items():
            keys = list(state)
            y, returned = call()
            after = given | mixer.state_dict()
            changed = [key for key, tensor in before.items() if not torch.equal(tensor, after[key])]
            if changed or list(state) != keys:
                raise Fault(f"{name} changed {', '.join(changed) or 'the keys of the given state'}")
            if returned is state:
                raise Fault(f"{name} returned the given dict; return a new one")
            require_small(error(call()[0], y), f"{name} called twice with the same arguments")
    return f"{len(state)} state tensors left as they were"


def state_declared(case: Case) -> str:
    """The tensors that calls return are those that `init_state` declares, batch first, in both precisions."""
    for dtype in (torch.float32, torch.float64):
        mixer, x = case.build(dtype=dtype), case.inputs(3, 7, dtype=dtype)
        start = mixer.init_state(3, LONGEST, dtype=dtype)
        declared = {name: (tuple(t.shape), t.dtype) for name, t in start.items()}
        unbatched = [name for name, (shape, _) in declared.items() if not shape or shape[0] != 3]
        if unbatched:
            raise Fault(f"batch is not the first axis of {', '.join(unbatched)}")
        with torch.no_grad():
            _, after = mixer(x[:, :6], start)
            _, final = mixer.step(x[:, 6], after)
        for call, state in (("forward", after), ("step", final)):
            measured = {name: (tuple(t.shape), t.dtype) for name, t in state.items()}
            if measured != declared:
                raise Fault(f"{call} returned {_difference(measured, declared)}")
        if mixer.state_elements(LONGEST) * 3 != sum(t.numel() for t in final.values()):
            raise Fault("state_elements differs from the elements that a state holds")
    small, large = case.mixer.state_elements(32), case.mixer.state_elements(64)
    return f"{small} elements at T=32, {large} at T=64"


def _difference(measured: dict, declared: dict) -> str:
    """The first tensor that differs, in words."""
    name = next(key for key in [*measured, *declared] if measured.get(key) != declared.get(key))
    return f"{name} as {measured.get(name, 'nothing')} where init_state declares {declared.get(name, 'nothing')}"


def meta_build(case: Case) -> str:
    """Building and counting need no memory: a plot of a large model's state costs nothing."""
    with torch.device("meta"):
        mixer = case.factory()
    real = [name for name, p in mixer.named_parameters() if not p.is_meta]
    if real:
        raise Fault(f"built on the meta device, yet real: {', '.join(real)}; give no device of your own")
    return f"{sum(p.numel() for p in mixer.parameters())} parameters, {mixer.state_elements(64)} state elements at T=64"


class _Call(nn.Module):
    """A mixer's `forward` and `step` behind one `forward`, the only method that functional_call reaches."""

    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        return self.mixer(x) if state is None else self.mixer.step(x, state)


def vmap_equals_loop(case: Case) -> str:
    """Members with stacked parameters run as one, with gradients, in `forward` and in `step`."""
    members = [_Call(case.build(member=i)) for i in range(3)]
    stacked = stack_module_state(members)
    x_MBTD = torch.stack([case.inputs(2, 33, stream=i) for i in range(3)])

    def call(parameters: dict, buffers: dict, *arguments: Tensor | State) -> tuple[Tensor, State | None]:
        return functional_call(members[0], (parameters, buffers), arguments)

    def run(parameters: dict, buffers: dict, x_BTD: Tensor) -> Tensor:
        return call(parameters, buffers, x_BTD)[0]

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="There is a performance drop")
        together = vmap(run)(*stacked, x_MBTD)
        together.square().sum().backward()
        with torch.no_grad():
            starts = [m.mixer.init_state(2, LONGEST, dtype=x_MBTD.dtype) for m in members]
            state = {name: torch.stack([start[name] for start in starts]) for name in starts[0]}
            stepped = []
            for t in range(3):
                y, state = vmap(call)(*stacked, x_MBTD[:, :, t], state)
                stepped.append(y)
    worst = 0.0
    for i, member in enumerate(members):
        alone = forward(member.mixer, x_MBTD[i])
        alone.square().sum().backward()
        with torch.no_grad():
            alone_stepped, _ = run_steps(member.mixer, x_MBTD[i, :, :3])
        worst = max(worst, error(together[i], alone), error(torch.stack(stepped, 2)[i], alone_stepped))
        for name, parameter in member.named_parameters():
            if parameter.grad is not None:
                worst = max(worst, error(stacked[0][name].grad[i], parameter.grad))
    return require_small(worst, "3 stacked members against the loop over them")


def patterns(case: Case) -> str:
    """Every declared pattern reads what CAB's definition says, and every other one is refused."""
    declared = case.patterns
    for pattern in PATTERNS:
        if pattern not in declared:
            _require_refusal(lambda pattern=pattern: case.build(pattern=pattern), f"the undeclared pattern {pattern}")
        elif pattern.endswith("self"):
            _self_pattern(case, pattern)
        else:
            _cross_pattern(case, pattern)
    return f"serves {', '.join(p for p in PATTERNS if p in declared)}"


def _self_pattern(case: Case, pattern: str) -> None:
    """Self patterns take no context; the noncausal one sees both sides."""
    mixer, x = case.build(pattern=pattern), case.inputs(2, 9).requires_grad_()
    context = case.inputs(2, 5, stream=1)
    _require_refusal(lambda: mixer(x, context_BSD=context), f"a context given to {pattern}")
    y = forward(mixer, x)
    if y.shape != x.shape:
        raise Fault(f"{pattern}: output shape {tuple(y.shape)} for input {tuple(x.shape)}")
    effect_T = _effect(y[:, 4], x)
    sides = {"past": effect_T[:4], "future": effect_T[5:]}
    expected = {"past": True, "future": pattern == "noncausal_self"}
    for side, effects in sides.items():
        if bool((effects > 1e-10).any()) != expected[side]:
            raise Fault(f"{pattern}: the middle output {'ignores' if expected[side] else 'sees'} the {side}")


def _cross_pattern(case: Case, pattern: str) -> None:
    """Cross patterns need a context, read all of it, and answer a query without looking at later queries.

    The causal one also decodes: a state that has read the context answers one query after another.
    """
    mixer, x = case.build(pattern=pattern), case.inputs(2, 9).requires_grad_()
    context = case.inputs(2, 5, stream=1).requires_grad_()
    _require_refusal(lambda: mixer(x), f"{pattern} without a context")
    y, _ = mixer(x, context_BSD=context)
    if y.shape != x.shape:
        raise Fault(f"{pattern}: output shape {tuple(y.shape)} for input {tuple(x.shape)}")
    for t in (0, 8):
        effect_S = _effect(y[:, t], context)
        if not bool((effect_S > 1e-10).all()):
            raise Fault(f"{pattern}: output {t} does not read every context position")
    if bool((_effect(y[:, 4], x)[5:] > 1e-12).any()):
        raise Fault(f"{pattern}: a query's output depends on later queries")
    if pattern == "causal_cross":
        with torch.no_grad():
            first, state = mixer(x[:, :4], mixer.init_state(2, LONGEST, dtype=x.dtype), context_BSD=context)
            rest, _ = run_steps(mixer, x[:, 4:], state)
        require_small(error(torch.cat((first, rest), 1), y), "steps that read the context from the state against forward")


def _effect(y_BD: Tensor, source_BSD: Tensor) -> Tensor:
    """Largest gradient that reaches each position of the source."""
    (gradient,) = torch.autograd.grad(y_BD.square().sum(), source_BSD, retain_graph=True, allow_unused=True)
    return torch.zeros(source_BSD.shape[1]) if gradient is None else gradient.abs().amax((0, 2))


def _require_refusal(call: Callable[[], object], what: str) -> None:
    """A request that the mixer does not serve must raise ValueError."""
    try:
        call()
    except ValueError:
        return
    raise Fault(f"{what} was accepted; raise ValueError")
