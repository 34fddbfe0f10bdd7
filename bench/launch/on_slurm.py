"""Fleets as Slurm jobs through submitit, one job a fleet; `cluster=local` makes them processes of this machine, for trials."""

from __future__ import annotations

import contextlib
import shutil
import time
import warnings
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field

from bench.device import Device
from bench.errors import UserError, unknown
from bench.launch import LaunchError
from bench.launch.remote import End, Job, RemoteWorkers, choose_device
from bench.spec import Frozen

IN_QUEUE = 32
"""Most fleets in Slurm's queue unless `--jobs` says otherwise."""
BLAMELESS = ("NODE_FAIL", "PREEMPTED", "TIMEOUT", "CANCELLED", "REQUEUED", "BOOT_FAIL")
"""States of killed jobs that are not the fleet's doing."""
RESULT_SECONDS = {"slurm": 30.0, "local": 1.0}
"""How long an ended job's answer may take to appear on a shared disk."""


class SlurmOptions(Frozen):
    """What `--launch slurm:` takes; any further option is one of sbatch's, such as partition, account, qos or constraint."""

    model_config = ConfigDict(frozen=True, extra="allow")

    cluster: Literal["slurm", "local"] = "slurm"
    """Slurm, or processes of this machine."""
    gpus: int | None = Field(default=None, ge=0, le=1)
    """GPUs of a fleet; by default 1 with `--device cuda`, else none."""
    cpus: int = Field(default=1, gt=0)
    """CPU cores of a fleet."""
    time: int = Field(default=60, gt=0)
    """Minutes; a job that needs more is queued again and goes on."""
    mem: float | None = Field(default=None, gt=0)
    """Memory in GiB."""


class SlurmWorkers(RemoteWorkers[Any]):
    """Fleets in Slurm's queue; a handle is a submitit job.

    Args:
        options: what was given with `--launch`.
        device: "cpu" or "cuda".
        jobs: most fleets in the queue.
        store: folder of the store.
        sweep: the driver's file in the store.
    """

    def __init__(self, options: SlurmOptions, device: str, jobs: int | None, store: Path, sweep: Path) -> None:
        super().__init__(device, options.cpus, store, sweep)
        self.most = jobs or IN_QUEUE
        self.patience = RESULT_SECONDS[options.cluster]
        self.executor = make_executor(options, device, self.store.root / ".submitit")
        self.gone: dict[str, float] = {}

    def slots(self) -> int:
        """Fleets that may be in the queue."""
        return self.most

    def start(self, job: Job) -> Any:
        """Queues a job."""
        try:
            return self.executor.submit(job)
        except Exception as error:  # whatever sbatch has against it
            raise LaunchError(f"Slurm did not take a job: {' '.join(str(error).split())}.") from None

    def ended(self, handle: Any) -> End | None:
        """How a job ended, or None."""
        if not handle.done():
            return None
        if not handle.paths.result_pickle.exists():
            since = self.gone.setdefault(handle.job_id, time.monotonic())
            if time.monotonic() - since < self.patience:
                return None
            state = handle.state
            return End(None, f"state {state} of job {handle.job_id}", state.split()[0].rstrip("+") in BLAMELESS)
        error = handle.exception()
        if error is not None:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            cause = next((line for line in reversed(lines) if "Error" in line and not line.startswith("-")), lines[-1])
            raise LaunchError(f"A job could not train: {cause}; its log is {handle.paths.stderr}.")
        return End(handle.result())

    def cancel(self, handle: Any) -> None:
        """Cancels a job."""
        with contextlib.suppress(Exception):  # it may have ended meanwhile
            handle.cancel()


def slurm_device(options: SlurmOptions, wanted: str) -> Device:
    """Where fleets compute in their jobs.

    Raises:
        UserError: submitit or Slurm is missing, an option is not one of sbatch's, or the choices exclude each other.
    """
    allowed = load_submitit().SlurmExecutor._valid_parameters()
    for name in options.model_extra or {}:
        if name not in allowed:
            raise unknown("option of --launch slurm", name, {*SlurmOptions.model_fields, *allowed})
    if options.cluster == "slurm" and shutil.which("srun") is None:
        raise UserError(
            "--launch slurm found no Slurm here (there is no srun); run it on a login node, or try it out with "
            "--launch slurm:cluster=local."
        )
    kind, gpus = choose_device("slurm", wanted, options.gpus, 0)
    what = f"{gpus:g} GPU and {options.cpus} CPU cores" if gpus else f"CPU, {options.cpus} cores"
    return Device(kind, f"Device: jobs in {options.cluster}, {what} and {options.time} minutes each, a fleet a job.")


def load_submitit() -> Any:
    """The module `submitit`.

    Raises:
        UserError: it is not installed.
    """
    try:
        import submitit
    except ImportError:
        raise UserError("--launch slurm needs submitit; install it with pip install 'mixer-bench[slurm]'.") from None
    return submitit


def make_executor(options: SlurmOptions, device: str, logs: Path) -> Any:
    """A submitit executor; logs and pickled jobs go to a folder."""
    executor = load_submitit().AutoExecutor(folder=logs, cluster=options.cluster)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sbatch's own options mean nothing to the local executor
        executor.update_parameters(
            name="bench",
            timeout_min=options.time,
            cpus_per_task=options.cpus,
            gpus_per_node=int(device == "cuda"),
            mem_gb=options.mem,
            **{f"slurm_{name}": value for name, value in (options.model_extra or {}).items()},
        )
    return executor
