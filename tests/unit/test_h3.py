"""H3's filters against the state space models that they stand for."""

import math

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


DRIFTS = {
    "as it starts": (lambda p: None),
    "far apart": (lambda p: (p["log_dt"].uniform_(-12, 6), p["log_decay"].uniform_(-8, 8))),
    "squares overflow": (lambda p: (p["log_dt"].uniform_(15, 25), p["log_decay"].uniform_(15, 25))),
    "exponentials overflow": (lambda p: (p["log_dt"].fill_(100), p["log_decay"].fill_(100))),
    "forgets at once": (lambda p: (p["log_dt"].zero_(), p["log_decay"].fill_(math.log(2)), p["frequency"].zero_())),
    "nearly": (lambda p: (p["log_dt"].zero_(), p["log_decay"].normal_(math.log(2), 1e-5), p["frequency"].zero_())),
}


@pytest.mark.parametrize("drift", DRIFTS)
def test_modes_of_any_weights_are_the_bilinear_rule(drift):
    """Against complex numbers in fp64; weight decay and large rates carry time steps where a mode's transition is near -1 or 0."""
    mixer = H3(64, d_state=32)
    with torch.no_grad():
        DRIFTS[drift](dict(mixer.named_parameters()))
    step_HM2, gain_HM2 = mixer._modes()
    weights = {name: weight.detach().double() for name, weight in mixer.named_parameters()}
    dt_H1 = weights["log_dt"].exp()[:, None]
    z_HM = torch.complex(-weights["log_decay"].exp(), weights["frequency"]) * dt_H1 / 2
    transition_HM = (1 + z_HM) / (1 - z_HM)
    write_HM = torch.view_as_complex(weights["write_in"]) * dt_H1 / (1 - z_HM)
    got_HM = torch.exp(torch.view_as_complex(step_HM2.detach().double()))
    torch.testing.assert_close(got_HM, transition_HM, rtol=0, atol=3e-6)
    true_HM = torch.view_as_complex(weights["readout"]) * write_HM
    torch.testing.assert_close(torch.view_as_complex(gain_HM2.detach().double()), true_HM, rtol=1e-6, atol=1e-12)
    response = mixer._filter(64)
    found = torch.autograd.grad(response.square().sum(), [mixer.log_dt, mixer.log_decay, mixer.frequency, mixer.readout])
    assert all(bool(torch.isfinite(one).all()) for one in (response, *found))
