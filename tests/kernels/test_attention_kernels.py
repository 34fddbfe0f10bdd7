"""Dense and banded attention against the definition."""

import pytest
import torch
from torch import Tensor

from kernels.attention import attention, attention_reference, band_mask, banded_attention


def qkv(length: int, *, history: int = 0, heads: int = 2, width: int = 4, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(batch, heads, length, width, dtype=torch.float64, generator=generator)
    k, v = torch.randn(2, batch, heads, history + length, width, dtype=torch.float64, generator=generator)
    return q, k, v


def by_hand(q: Tensor, k: Tensor, v: Tensor, sees) -> Tensor:
    """Attention one query and one key at a time."""
    y = torch.zeros_like(q)
    for t in range(q.shape[-2]):
        keys = [s for s in range(k.shape[-2]) if sees(t, s)]
        weight = torch.stack([(q[..., t, :] * k[..., s, :]).sum(-1) / q.shape[-1] ** 0.5 for s in keys], -1).exp()
        total = sum(weight[..., i, None] * v[..., s, :] for i, s in enumerate(keys))
        y[..., t, :] = total / weight.sum(-1, keepdim=True)
    return y


def test_reference_is_the_definition():
    q, k, v = qkv(6)
    torch.testing.assert_close(attention_reference(q, k, v, band_mask(6, 6)), by_hand(q, k, v, lambda t, s: s <= t))
    torch.testing.assert_close(attention_reference(q, k, v), by_hand(q, k, v, lambda t, s: True))


def test_attention_equals_the_reference_inside_and_outside_of_vmap():
    q, k, v = qkv(9)
    mask = band_mask(9, 9, window=3)
    causal = attention_reference(q, k, v, band_mask(9, 9))
    torch.testing.assert_close(attention(q, k, v, causal=True), causal)
    torch.testing.assert_close(attention(q, k, v, mask_TS=mask), attention_reference(q, k, v, mask))
    stacked = [torch.stack((a, 2 * a)) for a in (q, k, v)]
    mapped = torch.func.vmap(lambda q, k, v: attention(q, k, v, causal=True))(*stacked)
    torch.testing.assert_close(mapped[0], causal)


def test_vmapped_attention_compiles_as_one_graph():
    stacked = [torch.stack((a, 2 * a)) for a in qkv(9)]
    torch._dynamo.reset()

    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.func.vmap(lambda q, k, v: attention(q, k, v, causal=True))(q, k, v)

    compiled = torch.compile(causal, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*stacked), causal(*stacked))


def members(*tensors: Tensor) -> list[Tensor]:
    return [torch.stack([tensor * (1 + i / 4) for i in range(3)]) for tensor in tensors]


@pytest.mark.parametrize("axes", [(0, 0, 0), (0, None, None), (None, 0, 1), (2, 1, 0)])
@pytest.mark.parametrize("mask_axis", ["none", "shared", "shared by heads", "per sequence", "own", "own per sequence"])
def test_members_are_one_call_with_the_gradients_of_the_loop(axes: tuple, mask_axis: str):
    leaves = [
        (tensor if axis is None else stack.movedim(0, axis)).detach().requires_grad_()
        for tensor, stack, axis in zip(qkv(6, history=3), members(*qkv(6, history=3)), axes, strict=True)
    ]
    draw = torch.Generator().manual_seed(1)
    shape = {"shared by heads": (1, 6, 9), "per sequence": (2, 1, 6, 9), "own per sequence": (3, 2, 1, 6, 9), "own": (3, 6, 9)}
    mask = (torch.rand(shape.get(mask_axis, (6, 9)), generator=draw) < 0.6) | band_mask(6, 9, window=1)
    batched = mask_axis.startswith("own")

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return attention(q, k, v, mask_TS=None if mask_axis == "none" else mask)

    together = torch.func.vmap(call, in_dims=(*axes, 0 if batched else None))(*leaves, mask)
    for i in range(3):
        own = [leaf if axis is None else leaf.select(axis, i) for leaf, axis in zip(leaves, axes, strict=True)]
        own_mask = None if mask_axis == "none" else mask[i] if batched else mask
        alone = attention_reference(*own, own_mask)
        torch.testing.assert_close(together[i], alone)
        weight = torch.randn(alone.shape, dtype=alone.dtype, generator=draw)
        for leaf, got, want in zip(
            leaves,
            torch.autograd.grad((together[i] * weight).sum(), leaves, retain_graph=True),
            torch.autograd.grad((alone * weight).sum(), leaves),
            strict=True,
        ):
            torch.testing.assert_close(got, want, msg=f"gradient of a leaf of shape {tuple(leaf.shape)}")


def test_members_within_members():
    stacked = members(*members(*qkv(5)))
    nested = torch.func.vmap(torch.func.vmap(lambda q, k, v: attention(q, k, v, causal=True)))(*stacked)
    torch.testing.assert_close(nested, attention_reference(*stacked, band_mask(5, 5)))


def test_members_call_the_fused_kernel_once():
    """Neither a loop over members nor the quadratic definition."""
    called = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    stacked = members(*qkv(5))
    with Watch():
        torch.func.vmap(lambda q, k, v: attention(q, k, v, causal=True))(*stacked)
    assert sum("scaled_dot_product" in name for name in called) == 1
    assert not any("softmax" in name or "bmm" in name for name in called)


def test_members_under_autocast():
    stacked = members(*(a.float() for a in qkv(33)))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return attention(q, k, v, causal=True)

    y = torch.func.vmap(call)(*stacked)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), attention_reference(*stacked, band_mask(33, 33)), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (4, 0), (4, 3), (100, 2)])
def test_band_mask_is_its_definition(window: int, sinks: int):
    n_queries, n_keys = 7, 12
    mask = band_mask(n_queries, n_keys, window=window, sinks=sinks)
    for t in range(n_queries):
        for s in range(n_keys):
            age = t + n_keys - n_queries - s
            assert mask[t, s] == (age >= 0 and (age < window or s < sinks))


@pytest.mark.parametrize("length", [1, 5, 33, 64, 65, 129, 200])
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (1, 2), (7, 0), (7, 3), (33, 0), (40, 5), (500, 2)])
def test_banded_equals_masked(length: int, window: int, sinks: int):
    q, k, v = qkv(length)
    sink_kv = (k[:, :, :sinks], v[:, :, :sinks]) if sinks else None
    banded = banded_attention(q, k, v, window=window, sink_kv=sink_kv)
    torch.testing.assert_close(banded, attention_reference(q, k, v, band_mask(length, length, window=window, sinks=sinks)))


@pytest.mark.parametrize("length", [1, 40, 150])
def test_banded_continues_sequences_at_their_own_positions(length: int):
    window, sinks = 6, 2
    past, start = 20, torch.tensor([3, 20])
    q, k, v = qkv(past + length)
    whole = attention_reference(q, k, v, band_mask(past + length, past + length, window=window, sinks=sinks))
    rows, expected = [], []
    for b, p in enumerate(start.tolist()):
        stored = torch.zeros(2, 2, window - 1, 4, dtype=q.dtype)
        kept = min(p, window - 1)
        stored[:, :, window - 1 - kept :] = torch.stack((k[b, :, p - kept : p], v[b, :, p - kept : p]))
        new = torch.stack((k[b, :, p : p + length], v[b, :, p : p + length]))
        rows.append((q[b, :, p : p + length], *torch.cat((stored, new), 2), k[b, :, :sinks], v[b, :, :sinks]))
        expected.append(whole[b, :, p : p + length])
    q_new, k_new, v_new, sink_k, sink_v = (torch.stack(a) for a in zip(*rows, strict=True))
    got = banded_attention(q_new, k_new, v_new, window=window, start_B=start, sink_kv=(sink_k, sink_v))
    torch.testing.assert_close(got, torch.stack(expected))


def test_banded_gradient_equals_masked():
    leaves = [a.requires_grad_() for a in qkv(100)]
    weight = torch.randn(2, 2, 100, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    banded = torch.autograd.grad((banded_attention(*leaves, window=9) * weight).sum(), leaves)
    masked = torch.autograd.grad((attention_reference(*leaves, band_mask(100, 100, window=9)) * weight).sum(), leaves)
    torch.testing.assert_close(banded, masked)


def test_banded_memory_grows_linearly():
    """No tensor of a long call is larger than a few blocks per token."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.untyped_storage().size() // tensor.element_size())
            return out

    with Watch():
        banded_attention(*qkv(4096, heads=1, batch=1), window=33)
    assert largest <= 4096 * 2 * 32 + 4096
