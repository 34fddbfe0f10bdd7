"""Launchers of one name: Python mixes them up when one is imported twice, so each is imported once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from triton.runtime.build import compile_module_from_src

from kernels._launchers import load_once, once

SOURCE = """
#include <Python.h>
static PyObject *launch(PyObject *self, PyObject *args) { return PyLong_FromLong(%d); }
static PyMethodDef methods[] = {{"launch", launch, METH_VARARGS, ""}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "__launcher", NULL, -1, methods};
PyMODINIT_FUNC PyInit___launcher(void) { return PyModule_Create(&module); }
"""


def load(src: str) -> Any:
    """As Triton's driver loads a launcher."""
    return compile_module_from_src(src, "__launcher")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def test_a_second_import_writes_into_another_launcher() -> None:
    """What is mended here: if this fails, Python or Triton no longer need it."""
    first, second = SOURCE % 1, SOURCE % 2
    load(first)
    other = load(second)
    load(first)
    assert other.launch() == 1


def test_each_keeps_its_own() -> None:
    loading = once(load)
    modules = [loading(SOURCE % n) for n in (3, 4, 3)]
    assert [module.launch() for module in modules] == [3, 4, 3]
    assert modules[0] is modules[2]


def test_threads_wait_for_the_same_source_only() -> None:
    both, counts = threading.Barrier(2, timeout=30), {"a": 0, "b": 0}

    def build(src: str) -> str:
        counts[src] += 1
        both.wait()  # passes only when both sources are being built
        return src

    building = once(build)
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(building, "aabbab")) == list("aabbab")
    assert counts == {"a": 1, "b": 1}


def test_tritons_driver_is_told_once() -> None:
    from triton.backends.nvidia import driver

    load_once()
    told = driver.compile_module_from_src
    load_once()
    assert driver.compile_module_from_src is told
    assert not hasattr(told.__wrapped__, "__wrapped__")
