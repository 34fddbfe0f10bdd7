"""Whether the hub of Hugging Face answers, asked once."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from threading import Thread
from urllib.parse import urlsplit

PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
SECONDS = 3.0
"""How long the hub may take to answer a connection."""


def go_offline_without_hub() -> bool:
    """Asks the hub once and, if it cannot be reached, tells the libraries, which would otherwise retry for a minute per set.

    Should run before `huggingface_hub` is imported, some of whose users look at the setting only then.

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
        if (constants := sys.modules.get("huggingface_hub.constants")) is not None:
            vars(constants)["HF_HUB_OFFLINE"] = True
    return bool(answers)


def _connect(host: str, port: int, answers: list[bool]) -> None:
    with contextlib.suppress(OSError):
        socket.create_connection((host, port), timeout=SECONDS).close()
        answers.append(True)
