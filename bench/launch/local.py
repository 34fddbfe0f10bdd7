"""Trains fleets in worker processes of this machine: one per core on a CPU, or several that share each GPU.

Workers train and store; the parent only hands out fleets and listens, so a killed worker loses one fleet in flight, and a
killed parent makes its workers save checkpoints and leave.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from bench.device import compiles
from bench.launch import STOP_SECONDS, Event, Fleet, LaunchError, Workers
from bench.launch.handed import pack, unpack
from bench.provenance import usable_cores
from bench.spec import RunSpec

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "268435456", "MALLOC_TRIM_THRESHOLD_": "1073741824", "MALLOC_TOP_PAD_": "67108864"}
"""glibc keeps the memory of a training step for the next one instead of returning it to the system: 5 to 12 % of a step."""
START_HELP = 'see what it printed. A script that starts a sweep must do so under `if __name__ == "__main__":`.'
MAX_LOST_STARTS = 3
"""Workers in a row that may be killed while they start."""
CHANGED = "The code of {code} was changed while the sweep ran; start it again."
MOST_A_GPU, CORES_EACH = 6, 2
"""Workers of a GPU, unless told: some train while the others compile, for which each needs cores."""


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    fleet: Fleet = ()
    started: bool = False


def worker_devices(device: str, jobs: int | None) -> list[str]:
    """The device of each worker.

    Args:
        device: "cpu", "cuda" for every GPU, or "cuda:1".
        jobs: workers wanted, spread round-robin over the GPUs; None for one per core of a CPU, and one per GPU, or where fleets
            are compiled as many as its share of the cores can keep compiling.
    """
    if device == "cpu":
        return ["cpu"] * (jobs or usable_cores())
    gpus = [device]
    if device == "cuda":
        import torch

        gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    a_gpu = min(MOST_A_GPU, usable_cores() // (CORES_EACH * len(gpus))) if compiles(device) else 1
    return [gpus[index % len(gpus)] for index in range(jobs or len(gpus) * max(1, a_gpu))]


class LocalWorkers(Workers):
    """A pool of worker processes.

    Args:
        devices: the device of each worker.
        store: folder of the store.
    """

    def __init__(self, devices: list[str], store: Path) -> None:
        self.devices, self.store, self.device = devices, store, devices[0]
        share = max(1, usable_cores() // len(devices))
        self.threads = int(os.environ.get("OMP_NUM_THREADS") or share)
        # a worker's compiler would start as many processes as there are cores
        self.variables = {**MALLOC, "OMP_NUM_THREADS": str(self.threads), "TORCHINDUCTOR_COMPILE_THREADS": str(share)}
        self.workers: list[_Worker] = []
        self.lost_starts = 0

    def __enter__(self) -> LocalWorkers:
        self.workers = [self._start(device) for device in self.devices]
        return self

    def _start(self, device: str) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        own, seen = _own_gpu(device)
        process = context.Process(target=_worker_main, args=(theirs, own, self.threads, str(self.store)), daemon=True)
        with _environment({key: os.environ.get(key, value) for key, value in self.variables.items()} | seen):
            process.start()
        theirs.close()
        return _Worker(process, ours)

    def idle(self) -> int:
        """Workers without a fleet."""
        return sum(not worker.fleet for worker in self.workers)

    def busy(self) -> set[RunSpec]:
        """Runs of the fleets in flight."""
        return set().union(*(worker.fleet for worker in self.workers))

    def submit(self, fleet: Fleet, outdated: Mapping[str, str]) -> None:
        """Hands a fleet to an idle worker."""
        index = next(index for index, worker in enumerate(self.workers) if not worker.fleet)
        message = pack(fleet), dict(outdated)
        try:
            self.workers[index].pipe.send(message)
        except OSError:  # it died while it had nothing to do, which nobody has listened for
            self._replace(index)
            self.workers[index].pipe.send(message)
        self.workers[index].fleet = fleet

    def events(self, timeout: float) -> Iterator[Event]:
        """What the workers have said, waiting at most `timeout` seconds for the first word."""
        busy = {worker.pipe: index for index, worker in enumerate(self.workers) if worker.fleet}
        if not busy:
            time.sleep(timeout)
        for pipe in wait(list(busy), timeout):
            index = busy[pipe]  # type: ignore[index]
            worker = self.workers[index]
            fleet = worker.fleet
            try:
                kind, content = worker.pipe.recv()
            except (EOFError, OSError):  # the latter in the middle of a message
                yield self._death(index)
                continue
            if kind == "started":
                worker.started, self.lost_starts = True, 0
                continue
            if kind == "finished":
                worker.fleet = ()
            yield Event(kind, fleet, content)

    def _death(self, index: int) -> Event:
        """What the end of a busy worker means to its fleet; unless no worker can start, another takes its place."""
        worker = self.workers[index]
        worker.process.join()
        code = worker.process.exitcode
        if worker.started:
            self._replace(index)
            return Event("died", worker.fleet, _end(code))
        # no fault of the fleet's, which it has not seen
        if code is None or code >= 0:
            return Event("broken", worker.fleet, LaunchError(f"A worker process could not start ({_end(code)}); {START_HELP}"))
        self.lost_starts += 1
        if self.lost_starts > MAX_LOST_STARTS:
            words = f"{self.lost_starts} worker processes in a row were killed while they started ({_end(code)})"
            return Event("broken", worker.fleet, LaunchError(f"{words}; is there too little memory for them?"))
        self._replace(index)
        return Event("lost", worker.fleet, _end(code))

    def _replace(self, index: int) -> None:
        """Starts another worker in place of a dead one."""
        self.workers[index].pipe.close()
        self.workers[index].process.join()
        self.workers[index] = self._start(self.devices[index])

    def stop(self) -> None:
        """Asks every worker to save a checkpoint and leave; ends those that do not within a minute."""
        for worker in self.workers:
            worker.pipe.close()
        for worker in self.workers:
            worker.process.join(STOP_SECONDS)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self.workers = []


def _own_gpu(device: str) -> tuple[str, dict[str, str]]:
    """What a worker calls its device, and the variable that lets it see no other.

    Compiled code names the number of its GPU: where every GPU is number 0 to its worker, one compiler's cache serves them all.
    """
    if not device.startswith("cuda:"):
        return device, {}
    index = device.removeprefix("cuda:")
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "cuda:0", {"CUDA_VISIBLE_DEVICES": seen.split(",")[int(index)].strip() if seen else index}


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Variables for a process that starts inside."""
    before = {key: os.environ.get(key) for key in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def _end(code: int | None) -> str:
    """How a process ended."""
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


def _worker_main(pipe: Connection, device: str, threads: int, store: str) -> None:
    """A worker's life: take a fleet, train it, say so; a closed pipe means stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    import torch

    from bench.runner import execute
    from bench.store import Store, StoreError

    def tell(kind: str, content: object = None) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a gone parent is noticed by `should_stop`
            pipe.send((kind, content))

    tell("started")
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # probabilities of a confident model are denormal and slow a CPU step by a tenth
    while True:
        try:
            runs, outdated = pipe.recv()
            fleet = unpack(runs, CHANGED)
            # the parent says nothing while a fleet trains, so a readable pipe is a closed one
            execute(fleet, torch.device(device), Store(Path(store)), tell=tell, should_stop=pipe.poll, outdated=outdated)
        except (EOFError, ConnectionResetError):
            return
        except (LaunchError, StoreError) as error:
            tell("broken", error)
        tell("finished")
