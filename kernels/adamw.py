"""AdamW over the flat parameters of a fleet, each member with its own learning rate (Loshchilov & Hutter 2019, algorithm 2).

Shape legend: E members, P parameters of a member.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from kernels._arguments import check_arguments
from kernels.backends import TWO
from kernels.dispatch import pick

BETAS = (0.9, 0.999)
EPS = 1e-8


@torch.no_grad()
def adamw_step(
    weights_EP: Tensor,
    gradient_EP: Tensor,
    first_EP: Tensor,
    second_EP: Tensor,
    rates_E: Tensor,
    steps_E: Tensor,
    *,
    weight_decay: float,
) -> None:
    """One step in place: weights, both moments and the counts of steps; in one launch on a GPU.

    Args:
        weights_EP: fp32, contiguous.
        gradient_EP: fp32, contiguous.
        first_EP: running mean of the gradient.
        second_EP: running mean of its square.
        rates_E: learning rates, fp32.
        steps_E: steps done before this one, fp32.
        weight_decay: decoupled, on every parameter.

    Raises:
        ValueError: shapes, devices or dtypes that do not belong together, or tensors that are not contiguous.
    """
    tensors = {"gradient": gradient_EP, "first": first_EP, "second": second_EP}
    members = weights_EP.shape[:1]
    check_arguments(
        weights_EP,
        {name: (tensor, weights_EP.shape) for name, tensor in tensors.items()}
        | {"rates": (rates_E, members), "steps": (steps_E, members)},
        first="weights",
    )
    for name, tensor in ({"weights": weights_EP} | tensors).items():
        if not tensor.is_contiguous() or tensor.dtype != torch.float32:
            raise ValueError(f"{name} is {tensor.dtype} with strides {tensor.stride()}; AdamW takes contiguous torch.float32")
    if pick("adamw", weights_EP, backends=TWO) == "triton":
        from kernels.between.adamw_triton import step

        with torch.cuda.device_of(weights_EP):  # Triton launches on the current device
            step(weights_EP, gradient_EP, first_EP, second_EP, rates_E, steps_E, weight_decay, *BETAS, EPS)
        return
    for rows in zip(weights_EP, gradient_EP, first_EP, second_EP, steps_E, rates_E, strict=True):
        *parts, rate = ([row] for row in rows)
        weights, gradient, first, second, steps = parts
        adamw(
            weights, gradient, first, second, [], steps, fused=True, amsgrad=False, maximize=False, lr=rate[0],
            beta1=BETAS[0], beta2=BETAS[1], eps=EPS, weight_decay=weight_decay,
        )  # fmt: skip
