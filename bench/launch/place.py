"""What `--launch` says: `local`, `ray` or `slurm`, with options as in `ray:gpus=0.5` and `slurm:partition=gpu,time=120`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bench.device import Device, resolve_device
from bench.errors import UserError, unknown
from bench.launch import Workers
from bench.launch.on_ray import RayOptions, RayWorkers, ray_device
from bench.launch.on_slurm import SlurmOptions, SlurmWorkers, slurm_device
from bench.spec import Frozen


class LocalOptions(Frozen):
    """What `--launch local` takes: nothing."""


OPTIONS = {"local": LocalOptions, "ray": RayOptions, "slurm": SlurmOptions}


@dataclass(frozen=True)
class Place:
    """Where fleets are trained.

    Args:
        text: as given.
        options: the engine's.
    """

    text: str
    options: Frozen

    def device(self, wanted: str) -> Device:
        """What `--device` means there.

        Raises:
            UserError: there is no such device, or no such cluster.
        """
        if isinstance(self.options, RayOptions):
            return ray_device(self.options, wanted)
        if isinstance(self.options, SlurmOptions):
            return slurm_device(self.options, wanted)
        return resolve_device(wanted)

    def workers(self, device: str, jobs: int | None, most: int, store: Path, sweep: Path) -> Workers:
        """What trains there.

        Args:
            device: the resolved device.
            jobs: fleets at a time; None for as many as there is room for.
            most: no more than this.
            store: folder of the store.
            sweep: the driver's file in the store.
        """
        if isinstance(self.options, RayOptions):
            return RayWorkers(self.options, device, jobs, store, sweep)
        if isinstance(self.options, SlurmOptions):
            return SlurmWorkers(self.options, device, jobs, store, sweep)
        from bench.launch.local import LocalWorkers, worker_devices

        return LocalWorkers(worker_devices(device, jobs)[:most], store)


def parse_place(text: str) -> Place:
    """Reads `--launch`.

    Raises:
        UserError: an unknown engine or option, or a value that does not fit.
    """
    engine, _, rest = text.partition(":")
    if engine not in OPTIONS:
        raise unknown("engine of --launch", engine, OPTIONS)
    given: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"Option {part!r} of --launch {engine} has no value; write it as {engine}:{part}=VALUE.")
        given[name.strip()] = value.strip()
    try:
        return Place(text, OPTIONS[engine].model_validate(given))
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            raise unknown(f"option of --launch {engine}", name, OPTIONS[engine].model_fields) from None
        raise UserError(f"Option {name} of --launch {engine} cannot be {given[name]!r}: {first['msg'].lower()}.") from None
