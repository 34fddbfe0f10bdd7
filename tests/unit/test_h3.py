"""H3's filters against the state space models that they stand for."""

import pytest
import torch

from mixers.h3 import H3, _impulse_response


@pytest.mark.parametrize("d_state", [2, 16, 64])
def test_shift_filter_is_the_impulse_response(d_state):
    mixer = H3(6, d_state=d_state).double()
    torch.nn.init.normal_(mixer.shift_in)
    state_DN, response = torch.zeros(6, d_state, dtype=torch.float64), []
    for lag in range(d_state):
        written_DN = mixer.shift_in if lag == 0 else 0
        state_DN = torch.cat((torch.zeros_like(state_DN[:, :1]), state_DN[:, :-1]), 1) + written_DN
        response.append((mixer.shift_taps * state_DN).sum(1) + (mixer.shift_skip if lag == 0 else 0))
    true_DK = torch.stack(response, 1)
    weights = [mixer.shift_taps, mixer.shift_in, mixer.shift_skip]
    for length in (1, d_state // 2, d_state, 2 * d_state):
        got_DK, want_DK = mixer._shift_filter(length), true_DK[:, :length]
        torch.testing.assert_close(got_DK, want_DK)
        weight_DK = torch.randn_like(want_DK)
        want = torch.autograd.grad(want_DK, weights, weight_DK, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(got_DK, weights, weight_DK), want)


@pytest.mark.parametrize(("modes", "length"), [(1, 1), (8, 40), (64, 256)])
def test_impulse_response_is_the_sum_over_modes(modes, length):
    step = torch.stack((-0.05 * torch.rand(3, modes), torch.pi * torch.rand(3, modes)), -1).double().requires_grad_()
    gain = torch.randn(3, modes, 2, dtype=torch.float64, requires_grad=True)
    powers = torch.exp(torch.view_as_complex(step)[..., None] * torch.arange(length))
    want = 2 * (torch.view_as_complex(gain)[..., None] * powers).sum(1).real
    got, weight = _impulse_response(step, gain, length), torch.randn_like(want)
    torch.testing.assert_close(got, want)
    true = torch.autograd.grad(want, (step, gain), weight)
    torch.testing.assert_close(torch.autograd.grad(got, (step, gain), weight), true)
