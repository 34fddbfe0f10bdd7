"""Identities between members of the zoo: special cases of one recurrence agree, and feature maps keep their promise."""

import pytest
import torch
from torch.nn import functional as F

from kernels import taylor
from kernels.chunked import dplr_recurrence, linear_recurrence
from mixers._feature_maps import FEATURE_MAPS, make_feature_map
from mixers.retention import log_decays


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    shape = (2, 70, 2, 4)
    q, k, v, gates = (torch.randn(shape, dtype=torch.float64) for _ in range(4))
    return q, F.normalize(k, dim=-1), v, -gates.abs(), gates[..., 0].sigmoid()


def test_kda_with_equal_gates_is_gated_delta(inputs):
    q, k, v, log_decay, beta = inputs
    scalar = log_decay[..., 0]
    kda, _ = linear_recurrence(q, k, v, log_decay=scalar[..., None].expand_as(q), beta_BTH=beta)
    torch.testing.assert_close(kda, linear_recurrence(q, k, v, log_decay=scalar, beta_BTH=beta)[0])


def test_gated_delta_without_decay_is_delta(inputs):
    q, k, v, _, beta = inputs
    gated, _ = linear_recurrence(q, k, v, log_decay=torch.zeros_like(beta), beta_BTH=beta)
    torch.testing.assert_close(gated, linear_recurrence(q, k, v, beta_BTH=beta)[0])


def test_dplr_without_erasure_is_gla(inputs):
    q, k, v, log_decay, _ = inputs
    plain, _ = dplr_recurrence(q, k, v, torch.zeros_like(k), k, log_decay_BTHK=log_decay)
    torch.testing.assert_close(plain, linear_recurrence(q, k, v, log_decay=log_decay)[0])


def test_dplr_with_tied_vectors_is_kda(inputs):
    q, k, v, log_decay, beta = inputs
    write = beta[..., None] * k
    tied, _ = dplr_recurrence(q, write, v, -write, log_decay.exp() * k, log_decay_BTHK=log_decay)
    torch.testing.assert_close(tied, linear_recurrence(q, k, v, log_decay=log_decay, beta_BTH=beta)[0])


def test_constant_decay_is_a_scalar_decay(inputs):
    q, k, v, _, beta = inputs
    constant = log_decays("retnet", 2, 0, 1).double()
    expected, _ = linear_recurrence(q, k, v, log_decay=constant.expand_as(beta))
    torch.testing.assert_close(linear_recurrence(q, k, v, log_decay=constant)[0], expected)


def test_delta_recalls_the_last_value_written_to_a_key():
    keys = torch.eye(4, dtype=torch.float64)[torch.tensor([0, 1, 2, 0, 1])][None, :, None]
    values = torch.randn(1, 5, 1, 3, dtype=torch.float64)
    ones = torch.ones(1, 5, 1, dtype=torch.float64)
    o, _ = linear_recurrence(keys, keys, values, beta_BTH=ones)
    torch.testing.assert_close(o, values)


@pytest.mark.parametrize("dim", [1, 3, 16])
def test_taylor_features_multiply_to_the_polynomial(dim):
    phi = make_feature_map("taylor2", 1, dim)
    q, k = torch.randn(2, 50, dim, dtype=torch.float64)
    s = (q * k).sum(-1) / dim**0.5
    expected = 1 + s + s**2 / 2
    torch.testing.assert_close((phi(q) * phi(k)).sum(-1), expected)
    torch.testing.assert_close(taylor.scores((q * k).sum(-1), dim), expected)
    assert phi(q).shape[-1] == phi.features == 1 + dim + dim * (dim + 1) // 2


@pytest.mark.parametrize("kind", FEATURE_MAPS)
def test_feature_maps_have_the_width_they_declare(kind):
    phi = make_feature_map(kind, 2, 4)
    features = phi(torch.randn(3, 5, 2, 4))
    assert features.shape == (3, 5, 2, phi.features)
    if kind not in ("taylor2", "identity"):
        assert (features >= 0).all()


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="there is no feature map 'tailor'"):
        make_feature_map("tailor", 1, 4)
    with pytest.raises(ValueError, match="there is no decay schedule 'fast'"):
        log_decays("fast", 2, 0, 2)
    with pytest.raises(ValueError, match="set n_layers to the depth"):
        log_decays("lightning", 2, 2, 2)
