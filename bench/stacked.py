"""Models of equal shape as one: their parameters are stacked, and the one module is mapped over the stack.

Shape legend: E members, P parameters of a member, B batch, T time, D width, M labelled rows, X outputs, N examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from bench import evaluate
from bench.build import build_model
from bench.data import Picked
from bench.model import LanguageModel
from bench.spec import RunSpec
from synthetic_tasks import Task

RECOMPILE_LIMIT = 256

Function = TypeVar("Function", bound=Callable[..., Any])


class StackedModel:
    """E models that differ in their weights only.

    Args:
        specs: the members; equal but for seed and learning rate.
        task: their task.
        device: where they live.
        precision: "bf16" computes under autocast, with parameters in fp32.
        compiled: whether the training loss goes through `torch.compile`.
    """

    def __init__(self, specs: list[RunSpec], task: Task, device: torch.device, precision: str, *, compiled: bool = False) -> None:
        models = [build_model(spec, task, device) for spec in specs]
        self.module: LanguageModel = models[0]
        for layer in self.module.modules():
            if type(layer) is nn.Linear:
                layer.__class__ = _Linear
        self.device, self.precision = device, precision
        self.shapes = {name: p.shape for name, p in self.module.named_parameters()}
        self.flat_EP = torch.stack([torch.cat([p.detach().flatten() for p in model.parameters()]) for model in models])
        self.leaves = dict(self._views(self.flat_EP, leaf=True))
        self.buffers, self.own_buffers = _stack_buffers(models)
        self._loss = compile_for_cells(self._mapped(_member_loss)) if compiled else self._mapped(_member_loss)
        self._outputs = self._mapped(_member_outputs)

    def __len__(self) -> int:
        """Number of members."""
        return len(self.flat_EP)

    def _views(self, flat_EP: Tensor, *, leaf: bool = False) -> Iterator[tuple[str, Tensor]]:
        start = 0
        for name, shape in self.shapes.items():
            view = flat_EP[:, start : start + shape.numel()].view(-1, *shape)
            yield name, view.detach().requires_grad_() if leaf else view
            start += shape.numel()

    def loss_and_score(self, batch: Picked, keys_EB: Tensor | None, zero_error_E: Tensor) -> tuple[Tensor, Tensor]:
        """Each member's loss, summed over labelled rows, with its graph; and its score, summed over examples; both [E]."""
        return self._loss(self.leaves, self.buffers, (*batch, keys_EB, zero_error_E))

    def gradient(self, loss_E: Tensor, factor_E: Tensor, out_EP: Tensor, *, add: bool) -> None:
        """Writes the gradient of each member's loss times its factor to `out_EP`, or adds it."""
        found = torch.autograd.grad(loss_E, list(self.leaves.values()), factor_E.to(loss_E.dtype), allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for g, p in zip(found, self.leaves.values(), strict=True)]
        flat = [part.reshape(len(self), -1) for part in parts]
        if add:
            out_EP += torch.cat(flat, dim=1)
        else:
            torch.cat(flat, dim=1, out=out_EP)

    @torch.no_grad()
    def outputs(self, batch: Picked) -> Tensor:
        """Outputs at the labelled rows, without dropout, [E, B, M, X]."""
        return self._outputs(self.leaves, self.buffers, (batch.inputs, batch.rows_EBM))

    def member(self, index: int) -> LanguageModel:
        """One member as a module; valid until the next call."""
        weights = {name: view[index] for name, view in self._views(self.flat_EP)}
        own = {name: self.buffers[name][index] for name in self.own_buffers}
        self.module.load_state_dict(weights | own, strict=False)
        return self.module.eval()

    def _mapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Maps a function of (model, parameters and buffers, one member's tensors) over the members.

        A single member is called directly, which lets torch choose kernels that have no batching rule.
        """
        own = self.own_buffers

        def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], tensors: tuple[Tensor | None, ...]) -> Any:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16", cache_enabled=False):
                return function(self.module, {**parameters, **buffers}, *tensors)

        def every(parameters: dict[str, Tensor], buffers: dict[str, Tensor], tensors: tuple[Tensor | None, ...]) -> Any:
            axes = tuple(None if t is None else 0 for t in tensors)
            if next(iter(parameters.values())).shape[0] > 1:
                where = {name: 0 if name in own else None for name in buffers}
                return torch.vmap(one, in_dims=(0, where or None, axes))(parameters, buffers, tensors)
            first = one(
                {name: p[0] for name, p in parameters.items()},
                {name: b[0] if name in own else b for name, b in buffers.items()},
                tuple(None if t is None else t[0] for t in tensors),
            )
            return tuple(t[None] for t in first) if isinstance(first, tuple) else first[None]

        return every


def compile_for_cells(function: Function) -> Function:
    """Compiles once for each cell's shapes; past torch's default of eight it would silently go on without compiling.

    It is compiled whole or not at all. Where torch broke off inside of the map, it ran the map as it was and compiled the functions
    that launch kernels instead, which ended in an illegal memory access.
    """
    from torch._functorch import config as autograd
    from torch._inductor import config

    from bench.graph_passes import Passes
    from bench.joined_rows import JoinRows
    from bench.long_sums import CutLongSums
    from bench.two_terms import TakeTwoTerms

    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    if hasattr(autograd, "force_non_lazy_backward_lowering"):
        # else the backward pass is compiled after the forward pass has run, which holds its activations meanwhile
        autograd.force_non_lazy_backward_lowering = True
    config.post_grad_custom_post_pass = Passes(TakeTwoTerms(), JoinRows(), CutLongSums())
    return cast(Function, torch.compile(function, dynamic=False, fullgraph=True))


class _Linear(nn.Linear):
    """A linear map whose bias autocast rounds, mapped or not: vmap takes a map apart first, and would add an fp32 bias."""

    def forward(self, input: Tensor) -> Tensor:
        bias, kind = self.bias, input.device.type
        if bias is not None and torch.is_autocast_enabled(kind):
            bias = bias.to(torch.get_autocast_dtype(kind))
        return F.linear(input, self.weight, bias)


def _stack_buffers(models: list[LanguageModel]) -> tuple[dict[str, Tensor], frozenset[str]]:
    """The members' buffers, stacked only where they differ, and the names of those."""
    buffers = dict(models[0].named_buffers())
    own = set()
    for name, first in buffers.items():
        every = [dict(model.named_buffers())[name] for model in models]
        if not all(torch.equal(first, other) for other in every):
            buffers[name] = torch.stack(every)
            own.add(name)
    return buffers, frozenset(own)


def _member_loss(
    model: LanguageModel,
    weights: dict[str, Tensor],
    inputs: Tensor,
    rows_BM: Tensor,
    labels_BM: Tensor,
    values_BMK: Tensor | None,
    key_B: Tensor | None,
    zero_error: Tensor,
) -> tuple[Tensor, Tensor]:
    if model.head is None:
        loss_BM, predicted = functional_call(model, weights, (inputs, rows_BM, key_B, labels_BM))
        loss = loss_BM.sum()
    else:
        outputs_BMX = functional_call(model, weights, (inputs, rows_BM, key_B))
        loss, predicted = evaluate.loss_and_predictions(outputs_BMX, labels_BM, values_BMK)
    scores_BM = evaluate.row_scores(predicted, labels_BM, values_BMK, zero_error)
    return loss, evaluate.example_scores(scores_BM, labels_BM).sum()


def _member_outputs(model: LanguageModel, weights: dict[str, Tensor], inputs: Tensor, rows_BM: Tensor) -> Tensor:
    return functional_call(model, weights, (inputs, rows_BM))
