"""A run of the loop on a task of the test's own."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

from fastgrpo.config import Config
from fastgrpo.tasks import Task
from fastgrpo.train import run


def run_without_report(config: Config, task: Task, *, resume: bool = False) -> Path:
    """The run's folder. Its report is left out, and the collection of garbage before its first step: plots, and a look
    through all that is imported, take longer than the steps of a tiny policy."""
    report = mock.patch("fastgrpo.train.write_report", lambda folder: f"none in {folder}")
    with report, mock.patch("fastgrpo.training.schedule.nothing_here_garbage", nullcontext):
        asyncio.run(run(config, resume=resume, task=task))
    return config.folder
