"""Fleets on a Ray cluster that is already there: an actor for each fleet in flight, with one GPU, a part of one, or CPU cores."""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from bench.device import Device
from bench.errors import UserError
from bench.launch import LaunchError
from bench.launch.remote import End, Job, RemoteWorkers, Said, choose_device
from bench.spec import Frozen

REACH_SECONDS = 10.0


class RayOptions(Frozen):
    """What `--launch ray:` takes."""

    address: str = "auto"
    """The cluster's head, as host:port; auto finds the one of this host or of RAY_ADDRESS."""
    gpus: float | None = Field(default=None, ge=0, le=1)
    """Share of a GPU for a fleet; by default 1 where the cluster has GPUs, and none for `--device cpu`."""
    cpus: float = Field(default=1, gt=0)
    """CPU cores for a fleet."""


class Host:
    """The process of an actor: it trains one fleet after another, and keeps its GPU."""

    def train(self, job: Job) -> Said:
        """Trains a fleet."""
        return job()


@dataclass
class Task:
    """A fleet in flight.

    Args:
        actor: who trains it.
        answer: the reference of what it will say; None once its host could not be reached and only `alive` is waited for.
        alive: is there once the actor is known to have come through.
    """

    actor: Any
    answer: Any
    alive: Any = None


class RayWorkers(RemoteWorkers[Task]):
    """Fleets on a Ray cluster.

    Args:
        options: what was given with `--launch`.
        device: "cpu" or "cuda".
        jobs: most fleets at a time; None for as many as the cluster has room for.
        store: folder of the store.
        sweep: the driver's file in the store.
    """

    def __init__(self, options: RayOptions, device: str, jobs: int | None, store: Path, sweep: Path) -> None:
        super().__init__(device, max(1, int(options.cpus)), store, sweep)
        self.ray, self.jobs = connect(options.address), jobs
        _, gpus = choose_device("ray", device, options.gpus, 0)
        self.needs = {"GPU": gpus, "CPU": options.cpus}
        self.actor = self.ray.remote(num_cpus=options.cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0)(Host)
        self.spare: list[Any] = []

    def slots(self) -> int:
        """As many as the cluster has room for now, and one for a cluster that grows on demand."""
        resources = self.ray.cluster_resources()
        room = min(int(resources.get(name, 0) / need + 1e-6) for name, need in self.needs.items() if need)
        return max(1, room if self.jobs is None else min(room, self.jobs))

    def start(self, job: Job) -> Task:
        """Gives a job to an actor."""
        actor = self.spare.pop() if self.spare else self.actor.remote()
        return Task(actor, actor.train.remote(job))

    def ended(self, handle: Task) -> End | None:
        """How a job ended, or None."""
        waited = handle.answer if handle.alive is None else handle.alive
        ready, _ = self.ray.wait([waited], timeout=0)
        if not ready:
            return None
        try:
            found = self.ray.get(waited)
        except self.ray.exceptions.ActorUnavailableError:  # the cluster does not know yet whether the process or the line is dead
            handle.alive = handle.actor.__ray_ready__.remote()
            return None
        except self.ray.exceptions.RayError as error:
            return _death(error)
        self.spare.append(handle.actor)
        return End(Said() if handle.alive is not None else found)

    def cancel(self, handle: Task) -> None:
        """Ends an actor."""
        self.ray.kill(handle.actor)

    def close(self) -> None:
        """Leaves the cluster, which ends the actors."""
        self.ray.shutdown()


def _death(error: Any) -> End:
    """What the error of a fleet means.

    Raises:
        LaunchError: no fleet could be trained.
    """
    text = str(error)
    if any(words in text for words in ("node has died", "never ran")):
        return End(None, _one_line(error), blameless=True)
    if "actor died unexpectedly" in text and not getattr(error, "actor_init_failed", False):
        return End(None, _one_line(error))
    raise LaunchError(f"A Ray worker could not train ({_one_line(error)}); is this version installed on all hosts?")


def connect(address: str) -> Any:
    """The module `ray`, connected to a cluster.

    Raises:
        UserError: Ray is not installed, or there is no cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise UserError("--launch ray needs Ray; install it with pip install 'mixer-bench[ray]'.") from None
    if ray.is_initialized():
        return ray
    try:
        _reach(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"--launch ray found no Ray cluster at {address} ({_one_line(error)}); start one with `ray start --head`, or "
            "name its head with --launch ray:address=HOST:PORT."
        ) from None
    return ray


def _reach(address: str) -> None:
    """Opens a connection to a head that is named as host:port, and closes it: Ray would try a dead one for many minutes.

    Raises:
        OSError: nobody answers there.
    """
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if separator and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_SECONDS).close()


def ray_device(options: RayOptions, wanted: str) -> Device:
    """Where fleets compute on the cluster.

    Raises:
        UserError: Ray is not installed, there is no cluster, or the choices exclude each other.
    """
    ray = connect(options.address)
    resources, hosts = ray.cluster_resources(), sum(node["Alive"] for node in ray.nodes())
    kind, gpus = choose_device("ray", wanted, options.gpus, int(resources.get("GPU", 0)))
    what = f"{resources.get('GPU', 0):g} GPUs, {gpus:g} a fleet" if kind == "cuda" else f"{resources.get('CPU', 0):g} CPU cores"
    return Device(kind, f"Device: Ray cluster of {hosts} hosts, {what}, {options.cpus:g} CPU cores a fleet.")


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}".rstrip(".")
