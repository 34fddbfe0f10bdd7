"""A fleet on its way to the process that trains it: specs as JSON, by the identity that each has for the driver."""

from __future__ import annotations

from collections.abc import Mapping

from bench.launch import Fleet, LaunchError
from bench.provenance import identity_code
from bench.spec import RunSpec, run_id


def pack(fleet: Fleet) -> dict[str, str]:
    """What a worker is sent."""
    return {run_id(spec, identity_code(spec)): spec.model_dump_json() for spec in fleet}


def unpack(runs: Mapping[str, str], fault: str) -> list[RunSpec]:
    """The specs again.

    Args:
        runs: what was sent.
        fault: what to say where the code here is not the driver's; `{code}` stands for what it is the code of.

    Raises:
        LaunchError: the code differs, so a run would be stored where the driver does not look.
    """
    specs = [RunSpec.model_validate_json(text) for text in runs.values()]
    for identity, spec in zip(runs, specs, strict=True):
        if not _same_code(spec, identity):
            raise LaunchError(fault.format(code=f"{spec.model.label()} or {spec.task.name}"))
    return specs


def _same_code(spec: RunSpec, identity: str) -> bool:
    try:
        return run_id(spec, identity_code(spec)) == identity
    except (OSError, SyntaxError, ValueError):  # a file is gone, or was saved half-way through an edit
        return False
