"""Recipes: one file each, a function that returns a `Sweep`; its docstring gives command, cost and expected result."""

from collections.abc import Callable
from typing import TypeVar

from bench.sweep import Sweep

RECIPES: dict[str, Callable[..., Sweep]] = {}
"""Recipe functions by name, filled by importing their modules."""

R = TypeVar("R", bound=Callable[..., Sweep])


def recipe(name: str) -> Callable[[R], R]:
    """Registers a recipe under `name`, which is the stem of its file."""

    def register(fn: R) -> R:
        RECIPES[name] = fn
        return fn

    return register
