"""`bench`, storing a checkpoint after every step, killed after as many as the first argument says (0 for never).

python -m tests.convert.killed 5 convert --model ...
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from bench.cli import app
from bench.convert import run, saving


def main() -> None:
    """Runs the command."""
    left, store = int(sys.argv.pop(1)), saving.save_checkpoint

    def save(out: Path, content: dict[str, Any]) -> None:
        nonlocal left
        store(out, content)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    saving.save_checkpoint = save
    run.CHECKPOINT_SECONDS = 0.0
    app()


if __name__ == "__main__":
    main()
