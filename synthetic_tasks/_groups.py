"""Finite groups as multiplication tables: cyclic, symmetric, alternating, and direct products.

Shape legend: G elements. Element 0 is the identity; entry [a, b] is the product a b (first b, then a).
"""

from __future__ import annotations

import re
from functools import cache
from itertools import permutations

import numpy as np

MAX_ORDER = 720


@cache
def group_table(name: str) -> np.ndarray:
    """The multiplication table [G, G] int64 of a group such as "Z60", "S5", "A5" or "A4xZ5".

    Raises:
        ValueError: the name is not of that form, or the group is too large.
    """
    table = np.zeros((1, 1), dtype=np.int64)
    for factor in name.split("x"):
        table = _product(table, _simple(name, factor))
    return table


def _simple(name: str, factor: str) -> np.ndarray:
    """The table of one factor of the group `name`."""
    match = re.fullmatch(r"([ZSA])([1-9]\d*)", factor)
    if match is None:
        raise ValueError(f"group {name!r}: {factor!r} is no group; write Z (cyclic), S (symmetric) or A (alternating) and a size")
    kind, size = match[1], int(match[2])
    if (kind == "Z" and size > MAX_ORDER) or (kind != "Z" and size > 6):
        raise ValueError(f"group {name!r}: {factor} is too large; at most Z{MAX_ORDER}, S6 and A6")
    if kind == "Z":
        return np.add.outer(np.arange(size), np.arange(size)) % size
    elements = _permutations(kind, size)
    index = {p: i for i, p in enumerate(elements)}
    return np.array([[index[tuple(a[i] for i in b)] for b in elements] for a in elements])


def _permutations(kind: str, size: int) -> list[tuple[int, ...]]:
    """The elements of a symmetric (S) or alternating (A) group in the order of its table."""
    return [p for p in permutations(range(size)) if kind == "S" or _even(p)]


def moved_points(name: str) -> np.ndarray:
    """How many points each element of a symmetric or alternating group moves, [G].

    Raises:
        ValueError: the group is not one of permutations.
    """
    if re.fullmatch(r"[SA][1-6]", name) is None:
        raise ValueError(f"the elements of {name} are no permutations; use a symmetric or alternating group such as S5 or A5")
    size = int(name[1])
    return (np.array(_permutations(name[0], size)) != np.arange(size)).sum(axis=1)


def _even(permutation: tuple[int, ...]) -> bool:
    """Whether the number of inversions is even."""
    size = len(permutation)
    return sum(permutation[i] > permutation[j] for i in range(size) for j in range(i + 1, size)) % 2 == 0


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Table of the direct product."""
    size = len(left) * len(right)
    if size > MAX_ORDER:
        raise ValueError(f"a direct product of order {size} is too large; at most {MAX_ORDER}")
    table = left[:, None, :, None] * len(right) + right[None, :, None, :]
    return table.reshape(size, size)


def commutators(table: np.ndarray) -> np.ndarray:
    """Elements of the commutator subgroup, ascending: the identity alone in commutative groups, all in perfect ones such as A5."""
    order = len(table)
    inverse = np.argmin(table, axis=1)  # the identity is 0
    a, b = np.divmod(np.arange(order**2), order)
    members = np.unique(table[table[a, b], table[inverse[a], inverse[b]]])
    while True:
        grown = np.unique(table[np.ix_(members, members)])
        if grown.size == members.size:
            return members
        members = grown
