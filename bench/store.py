"""The results store: a folder per run, merged by copying, no server and no lock.

    STORE/<run_id>/record.json      the record; its presence is what makes a run complete
    STORE/<run_id>/curve.parquet    learning curve
    STORE/<run_id>/influence.npz    influence map of the trained model on one example
    STORE/speed/<speed_id>.json     one row of `bench throughput`
    STORE/<eval_id>/eval.json       one model on one task; its presence is what makes the evaluation complete
    STORE/<eval_id>/items.parquet   its items: one row an item and metric

While a run is in flight its folder also holds a claim (`bench.claims`), its progress and its last checkpoint.

Every file is written under a temporary name and renamed, the record last, so a kill at any moment leaves either a
complete run or no run.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from bench.errors import Fault, UserError
from bench.records import EVAL_SCHEMA_VERSION, SCHEMA_VERSION, EvalRecord, RunRecord
from bench.speed_records import SpeedRecord

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

DEFAULT_STORE = Path("results/runs")
Record = TypeVar("Record", RunRecord, EvalRecord, SpeedRecord)


class StoreError(Fault):
    """The store could not be written while runs were in flight."""

    @classmethod
    def of(cls, path: Path, error: OSError) -> StoreError:
        """The error for a failed write."""
        return cls(
            f"{path} could not be written ({error.strerror or type(error).__name__}), so training stopped; what was stored is "
            "kept, and once that is mended (free some space?) the same command goes on."
        )


@dataclass
class Store:
    """A folder of runs; creating the object touches nothing."""

    root: Path = field(default_factory=lambda: DEFAULT_STORE)

    def check_writable(self) -> None:
        """Makes the folder and writes a probe file.

        Raises:
            UserError: the folder cannot be written.
        """
        probe = self.root / f".probe-{os.getpid()}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise UserError(f"The store {self.root} cannot be written ({reason}); choose another folder with --store.") from None

    def path(self, run_id: str) -> Path:
        """Folder of a run."""
        return self.root / run_id

    def put(self, run_id: str, name: str, content: bytes) -> Path:
        """Writes a file of a run as a whole.

        Raises:
            StoreError: it could not be written; an earlier one is still there.
        """
        path = self.path(run_id) / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, content)
        except OSError as error:
            raise StoreError.of(path, error) from error
        return path

    def write(
        self,
        record: RunRecord,
        curve: Sequence[dict[str, float | int | None]] = (),
        influence: dict[str, np.ndarray] | None = None,
    ) -> Path:
        """Writes a run; an earlier record of the same run is replaced, or kept as `record.json.unreadable` if it is not valid.

        Returns:
            The path of the record.

        Raises:
            StoreError: a file could not be written; there is no record then, or the earlier one.
        """
        if curve:
            import pandas as pd

            buffer = io.BytesIO()
            pd.DataFrame(list(curve)).to_parquet(buffer, index=False)
            self.put(record.run_id, "curve.parquet", buffer.getvalue())
        if influence is not None:
            import numpy as np

            buffer = io.BytesIO()
            np.savez_compressed(buffer, **influence)  # type: ignore[arg-type]
            self.put(record.run_id, "influence.npz", buffer.getvalue())
        if self.read(record.run_id) is None:
            _set_aside(self.path(record.run_id) / "record.json")
        return self.put(record.run_id, "record.json", (record.model_dump_json(indent=1) + "\n").encode())

    def read(self, run_id: str) -> RunRecord | None:
        """The record of a run, or None if there is no valid one."""
        record, _ = _parse(self.path(run_id) / "record.json", RunRecord, SCHEMA_VERSION)
        return record

    def load(self) -> tuple[list[RunRecord], list[str]]:
        """All valid records, oldest first, and a warning for each file that is not one; nothing is ever deleted."""
        records, warnings = self._load("*/record.json", RunRecord, SCHEMA_VERSION)
        return sorted(records, key=lambda record: (record.started, record.run_id)), warnings

    def write_speed(self, record: SpeedRecord) -> Path:
        """Writes one row of `bench throughput`; an earlier measurement of the same thing is replaced."""
        target = self.root / "speed" / f"{record.speed_id}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(target, (record.model_dump_json(indent=1) + "\n").encode())
        return target

    def load_speed(self) -> tuple[list[SpeedRecord], list[str]]:
        """All valid rows of `bench throughput`, oldest first, and a warning for each file that is not one."""
        records, warnings = self._load("speed/*.json", SpeedRecord, SCHEMA_VERSION)
        return sorted(records, key=lambda record: (record.started, record.speed_id)), warnings

    def curve(self, run_id: str) -> pd.DataFrame | None:
        """The learning curve of a run, or None."""
        import pandas as pd

        path = self.path(run_id) / "curve.parquet"
        return pd.read_parquet(path) if path.exists() else None

    def influence(self, run_id: str) -> dict[str, np.ndarray] | None:
        """The influence map of a run, or None."""
        import numpy as np

        path = self.path(run_id) / "influence.npz"
        if not path.exists():
            return None
        with np.load(path, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}

    def write_eval(self, record: EvalRecord, items: Sequence[dict[str, Any]] = ()) -> Path:
        """Writes an evaluation, the items first; an earlier one of the same model and task is replaced.

        Returns:
            The path of the record.
        """
        folder = self.path(record.eval_id)
        folder.mkdir(parents=True, exist_ok=True)
        if items:
            import pandas as pd

            buffer = io.BytesIO()
            pd.DataFrame(list(items)).to_parquet(buffer, index=False)
            atomic_write(folder / "items.parquet", buffer.getvalue())
        target = folder / "eval.json"
        if self.read_eval(record.eval_id) is None:
            _set_aside(target)
        atomic_write(target, (record.model_dump_json(indent=1) + "\n").encode())
        return target

    def read_eval(self, eval_id: str) -> EvalRecord | None:
        """The record of an evaluation, or None if there is no valid one."""
        record, _ = _parse(self.path(eval_id) / "eval.json", EvalRecord, EVAL_SCHEMA_VERSION)
        return record

    def load_evals(self) -> tuple[list[EvalRecord], list[str]]:
        """All valid evaluations, oldest first, and a warning for each file that is not one."""
        records, warnings = self._load("*/eval.json", EvalRecord, EVAL_SCHEMA_VERSION)
        return sorted(records, key=lambda record: (record.started, record.eval_id)), warnings

    def eval_items(self, eval_id: str) -> pd.DataFrame | None:
        """The items of an evaluation (columns item, metric, filter, value, given, wanted), or None."""
        import pandas as pd

        path = self.path(eval_id) / "items.parquet"
        return pd.read_parquet(path) if path.exists() else None

    def _load(self, pattern: str, kind: type[Record], newest: int) -> tuple[list[Record], list[str]]:
        """The valid records among the files of a pattern, and a warning for each of the others."""
        parsed = [_parse(path, kind, newest) for path in sorted(self.root.glob(pattern))]
        return [record for record, _ in parsed if record is not None], [warning for _, warning in parsed if warning]


def atomic_write(path: Path, content: bytes) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _set_aside(path: Path) -> None:
    """Keeps what cannot be read, such as a record of a newer version, when another file takes its place."""
    with contextlib.suppress(OSError):
        path.rename(path.with_name(f"{path.name}.unreadable"))


def _parse(path: Path, kind: type[Record], newest: int) -> tuple[Record | None, str]:
    """A record, or None and the reason in one sentence ("" if there is no file)."""
    try:
        content: Any = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError) as error:
        return None, f"Skipped {path}: not readable as JSON ({type(error).__name__}); the file was left as it is."
    version = content.get("schema_version") if isinstance(content, dict) else None
    if not isinstance(version, int):
        return None, f"Skipped {path}: not a Mixer Bench record (no schema_version); the file was left as it is."
    if version > newest:
        return None, (
            f"Skipped {path}: schema version {version} is newer than this program's {newest}; upgrade Mixer Bench to read it."
        )
    try:
        return kind.model_validate(content), ""
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return None, f"Skipped {path}: field {where or '(root)'} is not valid ({first['msg']}); the file was left as it is."
