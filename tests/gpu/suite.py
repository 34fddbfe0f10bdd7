"""The whole GPU suite on one card in minutes: every test file in pytest processes of its own, all side by side.

    python -m tests.gpu.suite RECORD.json [--processes 45] [--seconds 900] [--only test_ssd test_step] [--note TEXT]

Appends a run to the record: commit, assembler, versions, and what passed, failed and was skipped in each file. A file that
was cut off by time counts the tests that its log has seen, and says that it is not whole. What a kernel compiles is shared
through TRITON_CACHE_DIR as usual; TRITON_PTXAS_PATH names the assembler. Needs pytest-xdist.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from triton import knobs

from bench import provenance
from kernels import assembler

FOLDER = Path(__file__).parent
SHARES = {
    "test_linear_recurrence": 7, "test_vector_gate": 7, "test_delta_rule": 6, "test_small_kernels": 6, "test_zoo_on_gpu": 5,
    "test_fleet_graphs": 3, "test_layer_step": 2, "test_indexed_attention": 2, "test_step": 2,
}  # fmt: skip
"""Processes of long files where all have USUAL together; others have one."""
USUAL = 55


class File:
    """A test file on its way.

    Args:
        path: of the file.
        processes: that share its tests.
        folder: for its log and its results.
    """

    def __init__(self, path: Path, processes: int, folder: Path) -> None:
        self.path, self.began = path, time.monotonic()
        self.results, self.log = folder / f"{path.stem}.xml", folder / f"{path.stem}.log"
        self.ended_at: int | None = None
        options = ["-p", "no:benchmark", "-p", "no:cacheprovider", "-v", "-m", "gpu", f"--junitxml={self.results}"]
        options += ["-n", str(processes)] if processes > 1 else []
        with self.log.open("w") as log:
            command = [sys.executable, "-m", "pytest", str(path), *options]
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def ended(self) -> bool:
        """Whether it is over, and takes note of when."""
        over = self.process.poll() is not None
        if over and self.ended_at is None:
            self.ended_at = round(time.monotonic() - self.began)
        return over

    def stop(self) -> None:
        """Ends its processes."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait()

    def found(self) -> dict[str, Any]:
        """What is known of it."""
        row: dict[str, Any] = {"file": f"tests/gpu/{self.path.name}"}
        if self.ended_at is None or not self.results.exists():
            text = self.log.read_text(errors="replace")
            seen = {word.lower(): text.count(f" {word}") for word in ("PASSED", "FAILED", "SKIPPED")}
            return row | seen | {"ended_at_s": self.ended_at, "whole": False}
        suite = ElementTree.parse(self.results).getroot().find("testsuite")
        assert suite is not None
        cases = list(suite.iter("testcase"))
        bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
        skipped = sum(case.find("skipped") is not None for case in cases)
        row |= {"passed": len(cases) - len(bad) - skipped, "failed": len(bad), "skipped": skipped}
        row |= {"ended_at_s": self.ended_at, "whole": True}
        return row | ({"failures": [case.get("name") for case in bad]} if bad else {})


def run(only: list[str], processes: int, seconds: float) -> dict[str, Any]:
    """Runs the files and says what came of them.

    Args:
        only: names of files without ending; all if empty.
        processes: about how many to run side by side.
        seconds: after which what still runs is cut off.
    """
    began = time.monotonic()
    paths = [path for path in sorted(FOLDER.glob("test_*.py")) if not only or path.stem in only]
    with tempfile.TemporaryDirectory() as folder:
        files = [File(path, max(1, SHARES.get(path.stem, 1) * processes // USUAL), Path(folder)) for path in paths]
        going = files
        while going and time.monotonic() - began < seconds:
            time.sleep(0.5)
            going = [file for file in going if not file.ended()]
        for file in files:
            file.stop()
        rows = [file.found() for file in files]
    sums = {key: sum(row[key] for row in rows) for key in ("passed", "failed", "skipped")}
    return {"seconds": round(time.monotonic() - began)} | sums | {"files": rows}


def main() -> None:
    """Runs, appends to the record, prints what did not pass; ends with 1 if something failed or was cut off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("--processes", type=int, default=USUAL)
    parser.add_argument("--seconds", type=float, default=900.0)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--note", default="")
    given = parser.parse_args()
    assembler.tensor_core_obstacle()  # chooses one for Triton
    facts = {
        "commit": provenance.git_state()[0],
        "when": datetime.now(UTC).isoformat(timespec="minutes"),
        "device": torch.cuda.get_device_name(),
        "assembler": f"ptxas {knobs.nvidia.ptxas.version}",
        "versions": provenance.versions(),
        "note": given.note,
    }
    found = facts | run(given.only, given.processes, given.seconds)
    record = json.loads(given.record.read_text()) if given.record.exists() else {"command": "python -m tests.gpu.suite", "runs": []}
    record["runs"].append(found)
    given.record.write_text(json.dumps(record, indent=1) + "\n")
    bad = [row for row in found["files"] if row["failed"] or not row["whole"]]
    for row in bad:
        print(json.dumps(row))
    print(f"{found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped in {found['seconds']} s")
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
