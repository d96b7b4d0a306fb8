"""Jails on other hosts: the pool's `run` over HTTP, to servers started by `python -m fastgrpo_sandbox serve`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec

from fastgrpo_sandbox.given import require_text, require_texts, require_whole, without_login
from fastgrpo_sandbox.stdio import merge_parts
from fastgrpo_sandbox.turns import Turns
from fastgrpo_sandbox.types import (
    MOST_CASES,
    Limits,
    Outcome,
    SandboxUnavailable,
    StdioTests,
    Tests,
    require_job,
    require_loop,
)

if TYPE_CHECKING:
    import aiohttp

log = logging.getLogger("fastgrpo_sandbox")
MSGPACK = "application/msgpack"
NEEDS_EXTRA = "jails over HTTP need aiohttp and prometheus-client: install them with `pip install 'fastgrpo[serve]'`"
CONNECT_S = 10.0
GRACE_S = 90.0  # beyond a job's own wall time, for one answer
PAUSE_S = 0.5  # before a host that failed is asked again, doubled with each failure in a row
MAX_PAUSE_S = 30.0
PROBE_S = 30.0
LOOK_S = 1.0  # how often a job that waits looks for itself
ADDRESS = re.compile(r"https?://[^/\s:\[\]]+|https?://\[[^\s\[\]]+\]")
UNREADABLE = (msgspec.DecodeError, ValueError, RecursionError)  # that an answer, or a host's name, may raise
MOST_BYTES = 8 << 20  # of cases in one request; a server takes 16 MiB
MOST_ANSWER = 32 << 20  # bytes; an outcome has at most 24 MiB of captured output, where none of it was UTF-8
MOST_SAID = 1000  # characters of a server's reason
LOST_TRIES = 3  # of a job whose jail failed
CLOSED = "the pool is closed: use it inside its `async with`"


class RunRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The body of `POST /run`, as msgpack or JSON: SandboxPool.run's arguments. `files` are bytes (base64 in JSON);
    `tests` carry their form in `type` ("check", "assert", "unittest" or "stdio"). The answer is an Outcome."""

    code: str
    stdin: str = ""
    files: dict[str, bytes] = {}
    tests: Tests | None = None
    limits: Limits | None = None

    @property
    def jobs(self) -> int:
        """How many jails it takes: one for each case of StdioTests."""
        return max(1, len(self.tests.cases)) if isinstance(self.tests, StdioTests) else 1


class _Host:
    """One server: how many of our jobs it has, how many it takes, and when it may be asked again after a failure."""

    def __init__(self, url: str, most: int) -> None:
        self.url = url.rstrip("/")
        self.name = without_login(self.url)  # for messages
        self.in_flight = 0
        self.failures = 0  # in a row
        self.fault = ""
        self._most = most
        self._room = float(most)
        self._ready_at = 0.0

    def pause_s(self) -> float:
        """How long it must not be asked."""
        return max(0.0, self._ready_at - time.monotonic())

    @property
    def is_free(self) -> bool:
        return self.in_flight < self._room and not self.pause_s()

    def answered(self) -> None:
        """The host took a job: it has room for a little more than it had, until it says otherwise."""
        if self.failures:
            log.warning("jail server answers again: url=%s", self.name)
        self.failures = 0
        self._room = min(self._most, self._room + 1 / self._room)

    def failed(self, reason: str) -> None:
        """The host is left alone for a while, longer with each failure; meanwhile its other jobs say nothing new."""
        self.fault = reason
        if self.pause_s():
            return
        pause = min(PAUSE_S * 2**self.failures, MAX_PAUSE_S)
        self._ready_at = time.monotonic() + pause
        level = logging.DEBUG if self.failures else logging.WARNING
        log.log(level, "jail server failed: url=%s pause_s=%.1f reason=%r", self.name, pause, reason)
        self.failures += 1

    def is_full(self, retry_after_s: float) -> None:
        """The host has room for our other jobs, whose ends make more; without any it says how long to wait."""
        self.fault = "its queue is full"
        self._room = max(1, self.in_flight - 1)
        if self.in_flight == 1:
            self._ready_at = time.monotonic() + retry_after_s


class RemotePool:
    """`async with RemotePool(["http://host:8080"], key=...) as pool: outcome = await pool.run(code, tests=...)`.

    Each job goes to the host that has the fewest of ours under way. A host that is full (429) is asked again when it
    says, after half a minute at most, one that fails after a pause, and meanwhile the others; a job whose jail failed
    is run again elsewhere. key: the servers' bearer key. in_flight: jobs, and so connections, for each host; the rest
    wait their turn here. deadline_s: for one job from its turn on, all tries together; then its outcome is
    `infrastructure`. Raises SandboxUnavailable on entry where no host runs a job, and ImportError without the extra
    `serve`.
    """

    def __init__(self, urls: Sequence[str], key: str = "", in_flight: int = 256, deadline_s: float = 600.0) -> None:
        if isinstance(urls, str) or not urls:
            raise ValueError('urls must be a list of at least one server, such as ["http://127.0.0.1:8080"]')
        require_texts("urls", list(urls))
        if odd := [url for url in urls if not ADDRESS.match(url.strip())]:
            raise ValueError(f"urls must be addresses as http://HOST:PORT, got {odd[0].rpartition('@')[2]!r}")
        require_text("key", key)
        require_whole("in_flight", in_flight, 1)
        self._hosts = [_Host(url.strip(), in_flight) for url in urls]
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._key = key
        self._turns = Turns(in_flight * len(urls))
        self._deadline_s = deadline_s
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # that it was opened in

    async def __aenter__(self) -> RemotePool:
        try:
            import aiohttp
        except ImportError:
            raise ImportError(NEEDS_EXTRA) from None
        self._loop = asyncio.get_running_loop()
        headers = {"Content-Type": MSGPACK, "Accept": MSGPACK}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
        self._session = aiohttp.ClientSession(headers=headers, timeout=timeout, connector=aiohttp.TCPConnector(limit=0))
        try:
            faults = [fault for fault in await asyncio.gather(*map(self._probe, self._hosts)) if fault]
            if len(faults) == len(self._hosts):
                raise SandboxUnavailable(f"no jail server works: {'; '.join(faults)}")
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Drops what is under way, which the servers then end: its callers hear SandboxUnavailable."""
        if self._session is not None:
            await self._session.close()

    async def run(
        self,
        code: str,
        *,
        stdin: str = "",
        files: Mapping[str, str | bytes] | None = None,
        tests: Tests | None = None,
        limits: Limits | None = None,
        order: int = 0,
    ) -> Outcome:
        """SandboxPool.run on another host. Cancelling ends the job there. Never raises for what the code does."""
        require_job(code, stdin, files, tests, limits, order)
        require_loop(self._loop)
        async with self._turns.taken(order):
            outcome = await self._run_whole(code, stdin, files, tests, limits)
        if outcome is not None:
            return outcome
        assert isinstance(tests, StdioTests)
        middle = len(tests.cases) // 2
        cases = tests.cases[:middle], tests.cases[middle:]
        parts = [msgspec.structs.replace(tests, cases=part) for part in cases]
        runs = (self.run(code, stdin=stdin, files=files, tests=part, limits=limits, order=order) for part in parts)
        return merge_parts(await asyncio.gather(*runs), [len(part) for part in cases])

    async def _run_whole(
        self,
        code: str,
        stdin: str,
        files: Mapping[str, str | bytes] | None,
        tests: Tests | None,
        limits: Limits | None,
    ) -> Outcome | None:
        """A job whose turn it is, encoded now: what waits takes no memory of its own. None for cases that are too much
        for one request."""
        try:
            content = {path: data.encode() if isinstance(data, str) else data for path, data in (files or {}).items()}
            request = RunRequest(code, stdin, content, tests, limits)
            body = msgspec.msgpack.encode(request)
        except (UnicodeEncodeError, TypeError) as error:
            return Outcome("rejected", error=f"the job cannot be sent: {error}", error_by="host")
        too_much = len(body) > MOST_BYTES or request.jobs > MOST_CASES
        if too_much and request.jobs > 1:
            return None
        return await self._run_somewhere(body, (limits or Limits()).wall_s * request.jobs + GRACE_S)

    async def _run_somewhere(self, body: bytes, wall_s: float) -> Outcome:
        ends_at = time.monotonic() + self._deadline_s
        lost: list[Outcome] = []
        while len(lost) < LOST_TRIES and (left := ends_at - time.monotonic()) > 0:
            try:
                async with asyncio.timeout(left):
                    host = await self._turn()
            except TimeoutError:
                break
            answer = await self._ask(host, body, min(wall_s, left))
            if answer is None:
                continue
            if answer.status != "infrastructure":
                return answer
            host.failed(answer.error)
            lost.append(answer)
        faults = "; ".join(f"{host.name}: {host.fault}" for host in self._hosts if host.fault)
        nothing = f"no outcome within {self._deadline_s:.0f} s; {faults}"
        return lost[-1] if lost else Outcome("infrastructure", error=nothing, error_by="host")

    async def _turn(self) -> _Host:
        """The least busy host that is free, with one more of ours; waits for one."""
        while not (free := [host for host in self._hosts if host.is_free]):
            await self._freed(min([LOOK_S, *filter(None, (host.pause_s() for host in self._hosts))]))
        best = min(free, key=lambda host: host.in_flight)
        best.in_flight += 1
        return best

    async def _freed(self, timeout_s: float) -> None:
        """Returns when a job of ours has ended, for the first that waits, or after `timeout_s`."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            async with asyncio.timeout(timeout_s):
                await waiter
        except TimeoutError:
            pass
        finally:
            with contextlib.suppress(ValueError):
                self._waiting.remove(waiter)

    def _give_back(self, host: _Host) -> None:
        host.in_flight -= 1
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                return waiter.set_result(None)

    async def _ask(self, host: _Host, body: bytes, timeout_s: float) -> Outcome | None:
        """One try on a host whose turn it is. None when it was full or failed, which the host then knows."""
        import aiohttp

        session = self._session
        assert session is not None, "a RemotePool runs jobs inside its `async with` block"
        try:
            if session.closed:
                raise SandboxUnavailable(CLOSED)
            async with asyncio.timeout(timeout_s), session.post(f"{host.url}/run", data=body) as response:
                answer = await _body(response)
                return _outcome(host, response.status, response.headers.get("Retry-After", ""), answer)
        except (aiohttp.ClientError, OSError, TimeoutError, *UNREADABLE) as error:
            if session.closed:
                raise SandboxUnavailable(CLOSED) from None
            host.failed(without_login(str(error)) or type(error).__name__)
            return None
        finally:
            self._give_back(host)

    async def _probe(self, host: _Host) -> str:
        """What is wrong with a host; "" when it runs a job."""
        answer = None
        body = msgspec.msgpack.encode(RunRequest("print(6 * 7)"))
        ends_at = time.monotonic() + PROBE_S
        while answer is None and not host.failures and (left := ends_at - time.monotonic()) > 0:
            await asyncio.sleep(min(host.pause_s(), left))
            host.in_flight += 1
            answer = await self._ask(host, body, left)
        fine = answer is not None and answer.stdout == "42\n"
        return "" if fine else f"{host.name}: {answer.error if answer else host.fault or 'no answer'}"

    def stats(self) -> dict[str, float]:
        """Counters for a live display: jobs under way, hosts, and hosts that have failed since they last answered."""
        return {
            "running": float(sum(host.in_flight for host in self._hosts)),
            "hosts": float(len(self._hosts)),
            "hosts_failed": float(sum(host.failures > 0 for host in self._hosts)),
        }


async def _body(response: aiohttp.ClientResponse) -> bytes:
    """An answer's body. Raises ValueError where it is longer than any outcome."""
    answer = bytearray()
    async for part in response.content.iter_any():
        answer += part
        if len(answer) > MOST_ANSWER:
            raise ValueError(f"an answer of more than {MOST_ANSWER} bytes")
    return bytes(answer)


def _outcome(host: _Host, status: int, retry_after: str, answer: bytes) -> Outcome | None:
    """An answer's outcome. Raises one of UNREADABLE for what is not one."""
    if status == 200:
        outcome = msgspec.msgpack.decode(answer, type=Outcome)
        host.answered()
        return outcome
    if status == 429:
        host.is_full(min(float(retry_after), MAX_PAUSE_S) if retry_after.isdecimal() else PAUSE_S)
        return None
    said = _sentence(answer) or f"HTTP {status}"
    if status in (413, 422):
        return Outcome("rejected", error=said, error_by="host")
    host.failed(said)
    return None


def _sentence(answer: bytes) -> str:
    try:
        body: Any = msgspec.json.decode(answer)
        return str(body["error"])[:MOST_SAID]
    except (*UNREADABLE, KeyError, TypeError):
        return ""
