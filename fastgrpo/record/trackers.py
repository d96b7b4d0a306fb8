"""Weights & Biases or trackio beside TensorBoard: the same curves under the same names, and tables of samples."""

from __future__ import annotations

import importlib
import os
import re
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from fastgrpo.errors import UserError, first_line, replace_file

PROJECT = "fastgrpo"
# Rows of a table of samples, and steps from one table to the next.
TABLE_ROWS, TABLE_EVERY = 16, 10
COLUMNS = ("step", "problem_id", "status", "reward", "prompt", "completion")
# What is left to upload then stays on this disk (`wandb sync`).
FINISH_S = 120.0


class Tracker:
    """W&B or trackio, which have one interface. Each stage is a run there, since it counts its own steps.

    A run that cannot begin is a `UserError`; what fails later ends the tracking, with one line to `say`, and no more.
    """

    def __init__(
        self, module: Any, folder: Path, settings: Mapping[str, Any], say: Callable[[str], object], token: str
    ) -> None:
        self._module, self._folder, self._settings, self._say, self._token = module, folder, settings, say, token
        self._run: Any = None

    def stage(self, name: str) -> None:
        """Begin the stage's run, or go on with it after a resume. Raises UserError."""
        self.close()
        called = f"{self._folder.name}-{name}"
        options: dict[str, Any] = {"name": f"{called}-{self._token}", "embed": False}
        if self._module.__name__ == "wandb":
            # Its copy of the console would be drawn over by the live display.
            quiet = self._module.Settings(console="off", silent=True)
            options = {"name": called, "id": f"{self._token}-{name}", "dir": str(self._folder), "settings": quiet}
        try:
            self._run = self._module.init(
                project=os.environ.get("WANDB_PROJECT") or PROJECT,
                group=self._folder.name,
                config=dict(self._settings),
                resume="allow",
                **options,
            )
        except Exception as error:
            raise UserError(
                f"record.tracker {self._module.__name__} does not start: {first_line(error)}; log in, work offline "
                "(WANDB_MODE=offline), or set record.tracker back to none"
            ) from error

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """One point of each curve."""
        self._send(step, lambda: dict(metrics))

    def samples(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """A table of some of the step's rollouts, of the first step and every tenth."""
        if step % TABLE_EVERY == 1:
            rows = [_row(step, record) for record in records[:TABLE_ROWS]]
            self._send(step, lambda: {"samples": self._module.Table(columns=list(COLUMNS), data=rows)})

    def close(self) -> None:
        """End the stage's run; an upload that outlasts `FINISH_S` is left to the tracker's own means."""
        if self._run is None:
            return
        run, self._run = self._run, None
        failed: list[Exception] = []
        thread = threading.Thread(target=_finish, args=(run, failed), name="tracker", daemon=True)
        thread.start()
        thread.join(FINISH_S)
        if thread.is_alive():
            self._say(f"{self._module.__name__} still uploads after {FINISH_S:.0f} s: left as it is")
        for error in failed:
            self._say(f"{self._module.__name__} did not finish: {first_line(error)}")

    def _send(self, step: int, made: Callable[[], dict[str, Any]]) -> None:
        if self._run is None:
            return
        try:
            self._run.log(made(), step=step)
        except Exception as error:
            self._say(f"{self._module.__name__} fails ({first_line(error)}): the curves go on in metrics.jsonl alone")
            self._run = None


def tracker_module(name: str) -> ModuleType | None:
    """The module of the tracker called `name`, None for none. Raises UserError where it is not installed."""
    try:
        return None if name == "none" else importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"record.tracker {name} cannot be imported ({error}): pip install 'fastgrpo[{name}]'") from None


def find_tracker(name: str, folder: Path, settings: Mapping[str, Any], say: Callable[[str], object]) -> Tracker | None:
    """The tracker called `name` for the run in `folder`, None for none. Raises UserError where it is not installed.

    The run's id there is kept in the folder: a resumed run goes on, another one of the same name is another.
    """
    module = tracker_module(name)
    if module is None:
        return None
    kept = folder / "tracker.id"
    if not kept.exists():
        replace_file(kept, uuid.uuid4().hex[:8].encode())
    token = kept.read_bytes().decode(errors="replace")
    if not re.fullmatch("[0-9a-f]{8}", token):
        raise UserError(f"{kept} is damaged: put the id of the tracker's run there, or remove it for another run")
    return Tracker(module, folder, settings, say, token)


def _row(step: int, record: Mapping[str, Any]) -> list[Any]:
    prompt, reward = record.get("prompt", ""), (record.get("reward") or {}).get("total")
    if not isinstance(prompt, str):
        prompt = "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    completion = "\n\n".join(record.get("completions", ()))
    return [step, str(record.get("problem_id", "")), record.get("status", ""), reward, prompt, completion]


def _finish(run: Any, failed: list[Exception]) -> None:
    try:
        run.finish()
    except Exception as error:
        failed.append(error)
