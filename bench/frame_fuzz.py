"""Random and mutated frames at the host's parser: `python bench/frame_fuzz.py --jobs 1000000`.

Each job of a cell without a jail gets calls and an end whose jailed bytes are mutated, beside a neighbour whose frames
are well formed. Every job must end typed and as its own failure, and the neighbour must hear what it was sent. The fork
server's parser has the like in tests/sandbox/fuzz_frames.c.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
from collections import Counter
from typing import Any
from unittest import mock

import msgspec

from fastgrpo_sandbox import Limits, Outcome, cell
from fastgrpo_sandbox.cell import DATA, DONE, HEADER, Cell
from fastgrpo_sandbox.guest.wire import result_body
from fastgrpo_sandbox.job import Parcel, Running, RunningSession
from fastgrpo_sandbox.verdict import DONE as REPORT

SECRET = bytes(range(32))
PARCELS = {
    "script": Parcel(Limits(), b""),
    "judged": Parcel(Limits(), b"", judge=b"j", test_count=2),
    "unittest": Parcel(Limits(), b"", secret=SECRET, test_count=2),
    "session": Parcel(Limits(), b"", session=True),
}
CALL = msgspec.msgpack.encode((1, "generate", {"text": "né", "n": [1, 2.5, None, {"k": b"\xff"}], "t": 2**40}))
RESULTS = (
    result_body(),
    result_body("Traceback: é", "KeyError", tests=(True, False)),
    result_body(value=msgspec.msgpack.encode({"answer": ["x", {"y": 1.5}]})),
)
NASTY = (
    b"\xff\xfe",
    b"\xc1",
    b"\x90" * 300,
    b"\x81" * 300,
    b"\xdd\xff\xff\xff\xff",
    b"\xdb\x7f\xff\xff\xff",
    b"\xd8",
    b"",
)


def mutate(rng: random.Random, frame: bytes) -> bytes:
    """`frame` with up to four edits: a byte changed, a piece cut, doubled or replaced by something nasty."""
    data = bytearray(frame)
    for _ in range(rng.randrange(5)):
        start = rng.randrange(len(data) + 1)
        piece = slice(start, start + rng.choice((0, 1, 1, 4, 40)))
        new = rng.choice((rng.randbytes(1), b"", bytes(data[piece]) * 2, rng.choice(NASTY), rng.randbytes(8)))
        data[piece] = new
    return bytes(data)


def report(rng: random.Random, result: bytes, verdict: bytes = b"", reason: int = 0, out: bytes = b"") -> bytes:
    """The fork server's report of a job that sent these frames, or none."""
    sent = (rng.choice((0, 1, 1, 1)), rng.choice((0, 1, 1, 1)))
    status = rng.choice((0, 9, 11, 256))
    return (
        REPORT.pack(reason, status, 0, 0, *sent, 1, 1, 1, 0, len(out), 0, len(result), len(verdict))
        + out
        + result
        + verdict
    )


class Fuzzer:
    """A cell whose fork server is this object, and what became of its jobs."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.seen: Counter[str] = Counter()
        with mock.patch.object(cell, "bwrap_spec", return_value={}):
            self.cell = Cell(0, "run", (), 0, None, lambda _: None)
        self.cell._transport = self.transport = mock.create_autospec(asyncio.Transport, instance=True)

    async def run(self, jobs: int) -> None:
        """Raises AssertionError where a frame reached more than its own job."""
        neighbour = RunningSession(self.cell, PARCELS["session"], self._answer)
        for number in range(jobs):
            await self._job(self.rng.choice(list(PARCELS)))
            if number % 100 == 0:
                self.transport.reset_mock()
                self._feed(neighbour.number, DATA, msgspec.msgpack.encode((number, "neighbour", {})))
                await asyncio.sleep(0)
        assert not self.cell.lost
        assert list(self.cell.occupants.values()) == [neighbour]
        self._feed(
            neighbour.number, DONE, REPORT.pack(*[0] * 4, 1, 0, *[1] * 3, *[0] * 3, len(RESULTS[2]), 0) + RESULTS[2]
        )
        assert neighbour.ended.result().status == "ok"
        assert self.seen["neighbour"] == (jobs + 99) // 100

    async def _job(self, form: str) -> None:
        session = form == "session"
        job = RunningSession(self.cell, PARCELS[form], self._answer) if session else Running(self.cell, PARCELS[form])
        for _ in range(self.rng.randrange(3)):
            self._feed(job.number, DATA, mutate(self.rng, CALL))
        if session:
            await asyncio.sleep(0)
        result, verdict = (mutate(self.rng, self.rng.choice(RESULTS)) for _ in range(2))
        if form == "unittest":
            result += mutate(self.rng, SECRET)
        self._feed(job.number, DONE, report(self.rng, result, verdict, self.rng.randrange(7), self.rng.randbytes(8)))
        self._check(job.ended.result())

    def _check(self, outcome: Outcome) -> None:
        assert outcome.status != "infrastructure", outcome
        self.seen[outcome.status] += 1

    def _feed(self, job: int, kind: int, body: bytes) -> None:
        """Hand a frame to the cell in two pieces, as a socket may give them."""
        data = HEADER.pack(len(body), job, kind) + body
        cut = self.rng.randrange(len(data))
        self.cell.data_received(data[:cut])
        self.cell.data_received(data[cut:])

    async def _answer(self, method: str, params: dict[str, Any]) -> Any:
        self.seen["neighbour" if method == "neighbour" else "calls"] += 1
        return None


def fuzz(jobs: int, seed: int = 0) -> Counter[str]:
    """How `jobs` jobs ended, and how many calls got through."""

    async def run() -> Counter[str]:
        fuzzer = Fuzzer(seed)
        await fuzzer.run(jobs)
        return fuzzer.seen

    return asyncio.run(run())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    print(dict(fuzz(options.jobs, options.seed)))
