"""The AdamW step of a whole fleet as one pass over its memory: four reads and three writes of fp32 a parameter.

Shape legend: E members, P parameters of a member.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from kernels._entry import entry

BLOCK, WARPS = 512, 4


@entry(do_not_specialize=["n_parameters"])
def adamw_kernel(
    weights_ptr, gradient_ptr, first_ptr, second_ptr, rates_ptr, steps_ptr, n_parameters,
    decay: tl.float32, rest1: tl.float32, rest2: tl.float32, eps: tl.float32,
    LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of one member's parameters. `rest` is 1 - beta, which would lose four digits if it were made from fp32 here."""
    n_blocks = tl.cdiv(n_parameters, BLOCK)
    member = tl.program_id(0) // n_blocks
    place = tl.program_id(0) % n_blocks * BLOCK + tl.arange(0, BLOCK)
    inside = place < n_parameters
    place = member.to(tl.int64) * n_parameters + place
    rate = tl.load(rates_ptr + member)
    done = tl.load(steps_ptr + member).to(tl.float64)  # in fp32, 1 - 0.999 would lose four digits
    correction1, correction2 = (1 - tl.exp(done * LOG_BETA1)).to(tl.float32), (1 - tl.exp(done * LOG_BETA2)).to(tl.float32)
    gradient = tl.load(gradient_ptr + place, mask=inside, other=0.0)
    first = tl.load(first_ptr + place, mask=inside, other=0.0)
    second = tl.load(second_ptr + place, mask=inside, other=0.0)
    weights = tl.load(weights_ptr + place, mask=inside, other=0.0)
    first += rest1 * (gradient - first)
    second += rest2 * (gradient * gradient - second)
    weights -= rate * decay * weights
    # rounded as IEEE says: the fast division and root would differ from the torch form in the sixth digit
    root = tl.sqrt_rn(tl.div_rn(second, correction2))
    weights -= tl.div_rn(tl.div_rn(rate, correction1) * first, root + eps)
    tl.store(first_ptr + place, first, mask=inside)
    tl.store(second_ptr + place, second, mask=inside)
    tl.store(weights_ptr + place, weights, mask=inside)


def step(
    weights_EP: Tensor,
    gradient_EP: Tensor,
    first_EP: Tensor,
    second_EP: Tensor,
    rates_E: Tensor,
    steps_E: Tensor,
    decay: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """See `kernels.adamw.adamw_step`."""
    steps_E += 1
    members, n_parameters = weights_EP.shape
    grid = (members * triton.cdiv(n_parameters, BLOCK),)
    adamw_kernel[grid](
        weights_EP, gradient_EP, first_EP, second_EP, rates_E, steps_E, n_parameters,
        decay, 1 - beta1, 1 - beta2, eps, LOG_BETA1=math.log(beta1), LOG_BETA2=math.log(beta2), BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
