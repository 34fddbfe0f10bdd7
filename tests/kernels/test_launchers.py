"""Launchers of one name: Python mixes them up when one is imported twice, so each kernel has a copy of its own."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
from triton.runtime import build

from kernels._launchers import apart, keep_apart

SOURCE = """
#include <Python.h>
static PyObject *launch(PyObject *self, PyObject *args) { return PyLong_FromLong(%d); }
static PyMethodDef methods[] = {{"launch", launch, METH_VARARGS, ""}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "__launcher", NULL, -1, methods};
PyMODINIT_FUNC PyInit___launcher(void) { return PyModule_Create(&module); }
"""


@pytest.fixture(autouse=True)
def as_triton_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, and Triton's own import even where a kernel of this process has changed it."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(
        build, "_load_module_from_path", getattr(build._load_module_from_path, "__wrapped__", build._load_module_from_path)
    )


def load(number: int) -> ModuleType:
    """Compiled or found in the cache, and imported, as Triton's driver does for each kernel."""
    return build.compile_module_from_src(SOURCE % number, "__launcher")


def test_a_second_import_writes_into_another_launcher() -> None:
    """What is mended here: if this fails, Python or Triton no longer need it."""
    load(1)
    other = load(2)
    load(1)
    assert other.launch() == 1


def test_each_keeps_its_own() -> None:
    before = load(3)
    keep_apart()
    modules = [load(n) for n in (4, 3, 5, 4)]
    assert before.launch() == 3
    assert [module.launch() for module in modules] == [4, 3, 5, 4]


def test_threads_keep_theirs() -> None:
    keep_apart()
    with ThreadPoolExecutor(8) as pool:
        modules = list(pool.map(load, [n % 4 for n in range(64)]))
    assert [module.launch() for module in modules] == [n % 4 for n in range(64)]


def test_nothing_is_imported_before_a_copy_is_made() -> None:
    shared, free = ModuleType("shared"), threading.Event()

    def import_(name: str, path: str) -> ModuleType:
        shared.launch = path
        if path == "first":
            free.wait(0.2)  # a second import would come in here
        return shared

    importing = apart(import_)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(importing, ["name"] * 2, ["first", "second"])
    assert (first.launch, second.launch) == ("first", "second")


def test_triton_is_told_once() -> None:
    keep_apart()
    told = build._load_module_from_path
    keep_apart()
    assert build._load_module_from_path is told
