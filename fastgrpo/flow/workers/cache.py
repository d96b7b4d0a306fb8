"""Workers' answers on disk: one file each, named by the hash of what was asked."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import msgspec

from fastgrpo.errors import UserError
from fastgrpo.flow.workers.protocol import Reply

log = logging.getLogger(__name__)


class Cache:
    """Answers under `folder`. Raises `UserError` where it cannot be made."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create workers.cache_dir {folder}: {error.strerror}; set another folder") from None

    def _path(self, asked: Any) -> Path:
        name = hashlib.sha256(msgspec.json.encode(asked, order="deterministic")).hexdigest()
        return self._folder / name[:2] / f"{name}.json"

    def read(self, asked: Any) -> Reply | None:
        """The answer to what was asked before, its tokens kept, its price and seconds 0; a broken file is absent."""
        try:
            found = msgspec.json.decode(self._path(asked).read_bytes(), type=Reply)
        except (OSError, msgspec.MsgspecError):
            return None
        return msgspec.structs.replace(found, cost_usd=0.0, seconds=0.0)

    def write(self, asked: Any, reply: Reply) -> None:
        """Whole or not at all; a full disk costs the cache, not the run."""
        path = self._path(asked)
        whole = path.with_name(f"{path.name}.{os.getpid()}.{id(reply)}")
        try:
            path.parent.mkdir(exist_ok=True)
            whole.write_bytes(msgspec.json.encode(reply))
            whole.replace(path)
        except OSError as error:
            whole.unlink(missing_ok=True)
            log.warning("cannot cache a worker's answer in %s: %s", path.parent, error.strerror)
