"""Where the items of a task come from if not from the hub: a local folder shaped like it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.errors import UserError


def check_data_folder(folder: Path) -> None:
    """Refuses a folder that is not there.

    Raises:
        UserError: with what such a folder holds.
    """
    if not folder.is_dir():
        raise UserError(f"There is no data folder {folder}; --data-dir takes a folder that holds OWNER/NAME folders as on the hub.")


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
    check_data_folder(folder)
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
