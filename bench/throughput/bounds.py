"""What an operation must move and compute by its definition: the physical bound that every time is compared with.

Bytes: each input and output once; backward reads the inputs and the output's gradient and writes the inputs' gradients.
Operations: a multiplication and an addition are two. A recurrence on a matrix state is counted in chunks of 64 tokens, since
tensor cores cannot run it token by token: with C = 64, for each token and head,

    without the delta rule   forward 2 C (K + V) + 4 F V,        backward 2 C (3 K + 2 V) + 10 F V
    with it                  forward 2 C (3 K + 2 V) + 6 K V,    backward 2.5 times that

F being K, or the number of features that the keys are mapped to. Softmax attention takes 2 (K + V) for each key that a
query sees, and 2.5 times that backward.

Shape legend: B batch, T length, H heads of v, G heads of q and k, K key, V value width, F features, D channels, N states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

CHUNK = 64
GATE_BYTES = 4
"""Scalar decays and write strengths come in fp32, as mixers make them."""


class Shape(NamedTuple):
    """Sizes of a kernel's tensors; those that an operation lacks are 1."""

    batch: int
    length: int
    heads: int = 1
    groups: int = 1
    key: int = 1
    value: int = 1

    def sizes(self) -> dict[str, int]:
        """By name, for a record."""
        return self._asdict()


@dataclass(frozen=True)
class Cost:
    """Bytes and operations of a call."""

    bytes: int
    flops: int

    def __add__(self, other: Cost) -> Cost:
        """Both calls one after the other."""
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def seconds(self, bytes_per_second: float, flops_per_second: float) -> tuple[float, float]:
        """Time of the bytes and time of the operations."""
        return self.bytes / bytes_per_second, self.flops / flops_per_second


def recurrence(shape: Shape, mode: str, *, gate: str, delta: bool, item: int, features: int | None = None) -> Cost:
    """A linear recurrence in one of the modes.

    Args:
        shape: its sizes.
        mode: forward, train, prefill or decode.
        gate: none, constant, scalar or vector; a vector gate has the item size of the keys.
        delta: whether the delta rule is on.
        item: bytes of an element of q, k, v, o.
        features: width that q and k are mapped to in the operation, or None.
    """
    tokens = shape.batch * (1 if mode == "decode" else shape.length)
    width = features or shape.key
    per_gate = {"none": 0, "constant": 0, "scalar": GATE_BYTES, "vector": item * shape.key}[gate]
    inputs = tokens * (item * (2 * shape.groups * shape.key + shape.heads * shape.value) + shape.heads * per_gate)
    inputs += tokens * shape.heads * GATE_BYTES * delta + GATE_BYTES * shape.heads * (gate == "constant")
    output = tokens * shape.heads * shape.value * item
    state = 4 * shape.batch * shape.heads * width * shape.value
    if mode == "decode":
        return Cost(2 * state + inputs + output, tokens * shape.heads * width * shape.value * (6 if delta else 4))
    forward, backward = _chunked_flops(shape.key, shape.value, width, delta=delta)
    cost = Cost(inputs + output, tokens * shape.heads * forward)
    if mode == "train":
        cost += Cost(2 * inputs + output, tokens * shape.heads * backward)
    return cost + Cost(2 * state, 0) if mode == "prefill" else cost


def _chunked_flops(key: int, value: int, width: int, *, delta: bool) -> tuple[int, int]:
    """Operations of a token and head, forward and backward."""
    if delta:
        forward = 2 * CHUNK * (3 * key + 2 * value) + 6 * key * value
        return forward, forward * 5 // 2
    return 2 * CHUNK * (key + value) + 4 * width * value, 2 * CHUNK * (3 * key + 2 * value) + 10 * width * value


def attention(shape: Shape, mode: str, *, item: int, pairs: int) -> Cost:
    """Softmax attention where the queries of a sequence see this many keys together; a decoded token sees them alone."""
    tokens = shape.batch * shape.length
    kv = item * shape.groups * (shape.key + shape.value)
    query, output = item * shape.heads * shape.key, item * shape.heads * shape.value
    per_pair = 2 * shape.heads * (shape.key + shape.value)
    if mode == "decode":
        return Cost(shape.batch * (pairs * kv + query + output), shape.batch * pairs * per_pair)
    forward = Cost(tokens * (query + kv + output), shape.batch * pairs * per_pair)
    backward = Cost(tokens * (2 * (query + kv) + output), forward.flops * 5 // 2)
    return forward + backward if mode == "train" else forward


def visible_pairs(length: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees, the own one included."""
    window = min(window or length, length)
    return window * (window + 1) // 2 + (length - window) * window


def selective_scan(shape: Shape, mode: str, *, item: int) -> Cost:
    """Mamba's scan: `heads` channels with `key` states each; time steps in fp32."""
    tokens = shape.batch * shape.length
    inputs = tokens * (shape.heads * (item + GATE_BYTES) + 2 * item * shape.key)
    output, work = tokens * shape.heads * item, 6 * tokens * shape.heads * shape.key
    forward = Cost(inputs + output, work)
    return forward + Cost(2 * inputs + output, 2 * work) if mode == "train" else forward


def elementwise_scan(shape: Shape, mode: str, *, item: int) -> Cost:
    """h_t = a_t h_{t-1} + x_t on `heads` channels."""
    one = shape.batch * shape.length * shape.heads
    forward = Cost(3 * item * one, 2 * one)
    return forward + Cost(5 * item * one, 4 * one) if mode == "train" else forward


def short_conv(shape: Shape, mode: str, *, item: int, taps: int) -> Cost:
    """A depthwise causal convolution of `heads` channels."""
    one = shape.batch * shape.length * shape.heads
    forward = Cost(2 * item * one, 2 * taps * one)
    return forward + Cost(3 * item * one, 4 * taps * one) if mode == "train" else forward


def mixer(mode: str, *, batch: int, length: int, ends: int, weights: int, linear: int) -> Cost:
    """A whole mixer: its input, output and weights once, and the products of its linear maps.

    What lies between the projections is not counted, so that this is a bound for any algorithm.

    Args:
        mode: as for `recurrence`.
        batch: sequences.
        length: tokens of each.
        ends: bytes of input and output for a token.
        weights: bytes of all weights.
        linear: number of weights in linear maps, each multiplied once a token.
    """
    tokens = batch * (1 if mode == "decode" else length)
    forward = Cost(tokens * ends + weights, 2 * linear * tokens)
    return forward + Cost(tokens * ends + 2 * weights, 2 * forward.flops) if mode == "train" else forward
