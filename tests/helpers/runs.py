"""Runs of the loop on tasks of the tests' own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

from fastgrpo.config import Config
from fastgrpo.tasks import Task
from fastgrpo.train import run


@contextmanager
def without_report() -> Iterator[None]:
    """Runs in the block leave out the report, and the collection of garbage before their first step: plots, and a look
    through all that is imported, take longer than the steps of a tiny policy."""
    report = mock.patch("fastgrpo.train.write_report", lambda folder: f"none in {folder}")
    with report, mock.patch("fastgrpo.training.schedule.nothing_here_garbage", nullcontext):
        yield


def run_without_report(config: Config, task: Task, *, resume: bool = False) -> Path:
    """The run's folder."""
    with without_report():
        asyncio.run(run(config, resume=resume, task=task))
    return config.folder
