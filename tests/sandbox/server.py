"""A server of jails as its users start it: a process of its own, on a free port of loopback."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from tests.sandbox.conftest import REPOSITORY

DEADLINE_S = 60
SERVE = ("-m", "fastgrpo_sandbox", "serve")


class Answer(NamedTuple):
    status: int
    headers: Any
    body: Any


class Server:
    """One server process and its address."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> Answer:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask(path, data, {"Content-Type": "application/json", **(headers or {})})

    def ask(self, path: str, data: bytes | None = None, headers: dict[str, str] | None = None) -> Answer:
        request = urllib.request.Request(self.url + path, data, headers or {})
        try:
            with urllib.request.urlopen(request, timeout=DEADLINE_S) as response:
                return _answer(response)
        except urllib.error.HTTPError as error:
            with error:
                return _answer(error)

    def metric(self, name: str) -> float:
        lines = self.ask("/metrics").body.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE_S)


def _answer(response: Any) -> Answer:
    text = response.read().decode()
    is_json = response.headers.get_content_type() == "application/json"
    return Answer(response.status, response.headers, json.loads(text) if is_json else text)


@contextmanager
def running_server(*options: str, program: tuple[str, ...] = SERVE, **environment: str) -> Iterator[Server]:
    """`python -m fastgrpo_sandbox serve` with `options`, or another `program`, until the block ends."""
    process = subprocess.Popen(
        [sys.executable, *program, "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'sandbox'}", **environment},
        start_new_session=True,
    )
    try:
        said = process.stdout.readline()
        assert said.startswith("serving on http"), said
        yield Server(process, said.split()[-1])
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def basic(password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"any:{password}".encode()).decode()}
