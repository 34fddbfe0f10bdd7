"""A sound toy mixer and broken copies of it, each with the checks of the contract that it fails.

Some faults cannot be told apart from outside: a forward that looks ahead also differs from its step.
"""

import torch
from torch import nn

from mixers import Caps, Mixer


class Sound(Mixer):
    """A leaky integrator: s_t = a s_{t-1} + W x_t, y_t = s_t V."""

    name = "toy"

    def __init__(self, d_model, *, layer=0, pattern="causal_self"):
        super().__init__(d_model, pattern=pattern)
        self.in_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)
        self.log_decay = nn.Parameter(torch.zeros(d_model))

    def integrate(self, u_BTD, s_BD):
        age = torch.arange(u_BTD.shape[1], device=u_BTD.device)
        gap = age[:, None] - age
        decay = torch.sigmoid(self.log_decay)
        weight = torch.where(gap[..., None] >= 0, decay ** gap.clamp(min=0)[..., None], 0)
        s_BTD = torch.einsum("tsd,bsd->btd", weight, u_BTD)
        return s_BTD if s_BD is None else s_BTD + decay ** (age[:, None] + 1) * s_BD[:, None]

    def forward(self, x_BTD, state=None, *, context_BSD=None):
        if context_BSD is not None:
            raise ValueError("no context here")
        s_BTD = self.integrate(self.in_proj(x_BTD), None if state is None else state["s"])
        return self.out_proj(s_BTD), None if state is None else {"s": s_BTD[:, -1]}

    def step(self, x_BD, state):
        s = torch.sigmoid(self.log_decay) * state["s"] + self.in_proj(x_BD)
        return self.out_proj(s), {"s": s}

    def init_state(self, batch, max_len, *, device="cpu", dtype=torch.float32):
        return {"s": torch.zeros(batch, self.d_model, device=device, dtype=dtype)}


class LooksAhead(Sound):
    def forward(self, x_BTD, state=None, *, context_BSD=None):
        y, state = super().forward(x_BTD, state, context_BSD=context_BSD)
        return y + 0.1 * x_BTD.mean(1, keepdim=True), state


class LooksAheadOnlyWithState(Sound):
    def forward(self, x_BTD, state=None, *, context_BSD=None):
        y, new = super().forward(x_BTD, state, context_BSD=context_BSD)
        return (y if state is None else y + 0.1 * x_BTD.mean(1, keepdim=True)), new


class StepDecaysTwice(Sound):
    def step(self, x_BD, state):
        s = torch.sigmoid(self.log_decay) ** 2 * state["s"] + self.in_proj(x_BD)
        return self.out_proj(s), {"s": s}


class StepRoundsToSinglePrecision(Sound):
    def step(self, x_BD, state):
        y, state = super().step(x_BD, state)
        return y.float().to(y.dtype), state


class ForgetsBetweenSegments(Sound):
    def forward(self, x_BTD, state=None, *, context_BSD=None):
        if state is not None and x_BTD.shape[1] > 1:
            state = {"s": torch.zeros_like(state["s"])}
        return super().forward(x_BTD, state, context_BSD=context_BSD)


class LosesThePrefill(Sound):
    def forward(self, x_BTD, state=None, *, context_BSD=None):
        y, state = super().forward(x_BTD, state, context_BSD=context_BSD)
        return y, None if state is None else {"s": 0 * state["s"]}


class IgnoresHistory(Sound):
    def forward(self, x_BTD, state=None, *, context_BSD=None):
        if context_BSD is not None:
            raise ValueError("no context here")
        return self.out_proj(self.in_proj(x_BTD)), state if state is None else dict(state)

    def step(self, x_BD, state):
        return self.out_proj(self.in_proj(x_BD)), dict(state)


class CutsTheGradient(Sound):
    def integrate(self, u_BTD, s_BD):
        return super().integrate(u_BTD.detach() + 0.5 * (u_BTD - u_BTD.detach()), s_BD)


class ForgetsThePastAtRows(Sound):
    def at_rows(self, x_BTD, rows_BM, x_BMD):
        return self.out_proj(self.in_proj(x_BMD))


class MixesTheBatch(Sound):
    def forward(self, x_BTD, state=None, *, context_BSD=None):
        y, state = super().forward(x_BTD, state, context_BSD=context_BSD)
        return y + 0.1 * x_BTD.mean(0), state

    def step(self, x_BD, state):
        y, state = super().step(x_BD, state)
        return y + 0.1 * x_BD.mean(0), state


class ScalesByLength(Sound):
    def forward(self, x_BTD, state=None, *, context_BSD=None):
        y, new = super().forward(x_BTD, state, context_BSD=context_BSD)
        return (y * (1 + 1 / x_BTD.shape[1]) if state is None else y), new


class OneClockForTheBatch(Sound):
    """Keeps the number of tokens seen, and reads that of the first sequence for all."""

    def forward(self, x_BTD, state=None, *, context_BSD=None):
        seen = torch.zeros(len(x_BTD), dtype=x_BTD.dtype) if state is None else state["seen"]
        y, new = super().forward(x_BTD, state, context_BSD=context_BSD)
        clock = seen[0] + torch.arange(1, x_BTD.shape[1] + 1)
        return y / clock[:, None], None if new is None else new | {"seen": seen + x_BTD.shape[1]}

    def step(self, x_BD, state):
        y, new = super().step(x_BD, state)
        return y / (state["seen"][0] + 1), new | {"seen": state["seen"] + 1}

    def init_state(self, batch, max_len, *, device="cpu", dtype=torch.float32):
        seen = torch.zeros(batch, device=device, dtype=dtype)
        return super().init_state(batch, max_len, device=device, dtype=dtype) | {"seen": seen}


class WritesIntoTheState(Sound):
    @torch.no_grad()
    def step(self, x_BD, state):
        y, new = super().step(x_BD, state)
        state["s"].copy_(new["s"])
        return y, new


class RemembersOnTheModule(Sound):
    def __init__(self, d_model, *, layer=0, pattern="causal_self"):
        super().__init__(d_model, pattern=pattern)
        self.register_buffer("calls", torch.zeros(()))

    def step(self, x_BD, state):
        with torch.no_grad():
            self.calls = self.calls + 1
        return super().step(x_BD, state)


class CountsItsCalls(Sound):
    """Hidden memory in a plain attribute, which shows only in what it computes."""

    calls = 0

    def step(self, x_BD, state):
        self.calls += 1
        y, new = super().step(x_BD, state)
        return y + 1e-3 * (self.calls > 1), new


class CarriesMoreThanItDeclares(Sound):
    def forward(self, x_BTD, state=None, *, context_BSD=None):
        y, new = super().forward(x_BTD, state, context_BSD=context_BSD)
        return y, None if new is None else new | {"last": x_BTD[:, -1]}


class DeclaresAnotherPrecision(Sound):
    def init_state(self, batch, max_len, *, device="cpu", dtype=torch.float32):
        return super().init_state(batch, max_len, device=device, dtype=torch.bfloat16)


class PutsTheBatchSecond(Sound):
    def init_state(self, batch, max_len, *, device="cpu", dtype=torch.float32):
        return {"s": torch.zeros(1, batch, self.d_model, device=device, dtype=dtype)}

    def forward(self, x_BTD, state=None, *, context_BSD=None):
        y, new = super().forward(x_BTD, state if state is None else {"s": state["s"][0]}, context_BSD=context_BSD)
        return y, new if new is None else {"s": new["s"][None]}

    def step(self, x_BD, state):
        y, new = super().step(x_BD, {"s": state["s"][0]})
        return y, {"s": new["s"][None]}


class BuildsOnTheCpu(Sound):
    def __init__(self, d_model, *, layer=0, pattern="causal_self"):
        super().__init__(d_model, pattern=pattern)
        self.log_decay = nn.Parameter(torch.zeros(d_model, device="cpu"))


class BranchesOnValues(Sound):
    def forward(self, x_BTD, state=None, *, context_BSD=None):
        if x_BTD.abs().max().item() > 1e6:
            raise ValueError("too large")
        return super().forward(x_BTD, state, context_BSD=context_BSD)


class WritesIntoAnUnbatchedTensor(Sound):
    def step(self, x_BD, state):
        y, new = super().step(x_BD, state)
        out = torch.zeros(y.shape, dtype=y.dtype)
        out.copy_(y)
        return out, new


class TakesAnyContext(Sound):
    def forward(self, x_BTD, state=None, *, context_BSD=None):
        return super().forward(x_BTD, state)


class ClaimsToSeeTheFuture(Sound):
    caps = Caps(patterns=frozenset({"causal_self", "noncausal_self"}))


class ReadsOnlyTheFirstOfTheContext(Sound):
    caps = Caps(patterns=frozenset({"causal_self", "noncausal_cross"}))

    def forward(self, x_BTD, state=None, *, context_BSD=None):
        if self.pattern == "causal_self":
            return super().forward(x_BTD, state, context_BSD=context_BSD)
        if context_BSD is None:
            raise ValueError("a context is needed")
        return self.out_proj(x_BTD + context_BSD[:, :1]), None


class AnswersInSinglePrecision(Sound):
    def forward(self, x_BTD, state=None, *, context_BSD=None):
        y, state = super().forward(x_BTD, state, context_BSD=context_BSD)
        return y.to(torch.promote_types(y.dtype, torch.float32)), state


class TakesPositionalOptions(Sound):
    def __init__(self, d_model, layer=0, pattern="causal_self"):
        super().__init__(d_model, layer=layer, pattern=pattern)


class CountsItsOwnState(Sound):
    def state_elements(self, seq_len):
        return self.d_model


FAULTS = {
    LooksAhead: "causality step split prefill gradients padding patterns",
    LooksAheadOnlyWithState: "causality split",
    StepDecaysTwice: "step prefill gradients",
    StepRoundsToSinglePrecision: "step prefill gradients",
    ForgetsBetweenSegments: "split",
    LosesThePrefill: "prefill split",
    IgnoresHistory: "history patterns",
    CutsTheGradient: "gradients",
    ForgetsThePastAtRows: "rows",
    MixesTheBatch: "batch ragged",
    ScalesByLength: "padding step split prefill gradients",
    OneClockForTheBatch: "ragged",
    WritesIntoTheState: "purity gradients",
    RemembersOnTheModule: "purity",
    CountsItsCalls: "purity step prefill vmap",
    CarriesMoreThanItDeclares: "state",
    DeclaresAnotherPrecision: "state",
    PutsTheBatchSecond: "state ragged",
    BuildsOnTheCpu: "meta",
    BranchesOnValues: "vmap",
    WritesIntoAnUnbatchedTensor: "vmap",
    TakesAnyContext: "patterns",
    ClaimsToSeeTheFuture: "patterns",
    ReadsOnlyTheFirstOfTheContext: "patterns",
    AnswersInSinglePrecision: "precision",
    TakesPositionalOptions: "interface",
    CountsItsOwnState: "interface",
}
