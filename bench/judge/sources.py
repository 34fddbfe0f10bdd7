"""Where the items of a task come from: the hub, a local folder shaped like it, or nothing that can be reached."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

from bench.errors import UserError

PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
SECONDS = 3.0
"""How long the hub may take to answer a connection."""


def go_offline_without_hub() -> bool:
    """Asks the hub once and, if it cannot be reached, tells the libraries, which would otherwise retry for a minute per set.

    Must run before `huggingface_hub` is imported.

    Returns:
        Whether the hub can be reached.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return False
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    if any(os.environ.get(name) for name in PROXIES):
        return True
    # Name resolution has no time limit of its own, and without a network it takes most of a minute.
    asked = Thread(target=_connect, args=(host.hostname or "", host.port or 443, answers := []), daemon=True)
    asked.start()
    asked.join(SECONDS)
    if not answers:
        os.environ["HF_HUB_OFFLINE"] = "1"
    return bool(answers)


def _connect(host: str, port: int, answers: list[bool]) -> None:
    with contextlib.suppress(OSError):
        socket.create_connection((host, port), timeout=SECONDS).close()
        answers.append(True)


@contextlib.contextmanager
def data_folder(folder: Path | None) -> Iterator[None]:
    """Within it, data sets load from `folder` where it has one named like the hub id, with a cache of their own.

    `load_dataset` prefers a local path of the data set's name, so the folder becomes the working directory; and its cache ignores
    what the files hold, so an old one would be read silently.

    Args:
        folder: shaped like the hub, `OWNER/NAME/...`; None changes nothing.

    Raises:
        UserError: there is no such folder.
    """
    if folder is None:
        yield
        return
    if not folder.is_dir():
        raise UserError(f"There is no data folder {folder}; --data-dir takes a folder that holds OWNER/NAME folders as on the hub.")
    from datasets import config

    before, home = config.HF_DATASETS_CACHE, Path.cwd()
    with tempfile.TemporaryDirectory(prefix="bench-eval-") as cache:
        config.HF_DATASETS_CACHE = Path(cache)
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(home)
            config.HF_DATASETS_CACHE = before
