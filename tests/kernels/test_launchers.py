"""The same launcher is never built twice at once, by threads or by processes; different ones are."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

from kernels._launchers import build_once, one_at_a_time


def build(src: str, log: Path) -> None:
    """Writes down when it ran."""
    began = time.monotonic()
    time.sleep(0.05)
    with log.open("a") as file:
        file.write(f"{src} {began} {time.monotonic()}\n")


def spans(log: Path, src: str) -> list[tuple[float, float]]:
    """When a source was built."""
    rows = [line.split() for line in log.read_text().splitlines()]
    return sorted((float(began), float(ended)) for name, began, ended in rows if name == src)


def some(folder: Path, log: Path) -> None:
    """Four threads: three build the same source."""
    locked = one_at_a_time(build, folder)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda src: locked(src, log=log), ["a", "a", "a", "b"]))


def test_one_source_is_built_by_one_at_a_time(tmp_path: Path) -> None:
    processes = [multiprocessing.get_context("fork").Process(target=some, args=(tmp_path, tmp_path / "log")) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    a = spans(tmp_path / "log", "a")
    assert len(a) == 6
    assert all(ended <= began for (_, ended), (began, _) in pairwise(a))


def test_different_sources_are_built_side_by_side(tmp_path: Path) -> None:
    some(tmp_path, tmp_path / "log")
    ((began, ended),) = spans(tmp_path / "log", "b")
    assert any(first < ended and began < last for first, last in spans(tmp_path / "log", "a"))


def test_tritons_driver_is_told_once() -> None:
    from triton.backends.nvidia import driver

    build_once()
    told = driver.compile_module_from_src
    build_once()
    assert driver.compile_module_from_src is told
    assert not hasattr(told.__wrapped__, "__wrapped__")
