"""Jails on other hosts: the pool's `run` over HTTP, to servers started by `python -m fastgrpo_sandbox serve`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec

from fastgrpo_sandbox.types import Limits, Outcome, SandboxUnavailable, StdioTests, Tests

if TYPE_CHECKING:
    import aiohttp

log = logging.getLogger("fastgrpo_sandbox")
MSGPACK = "application/msgpack"
NEEDS_EXTRA = "jails over HTTP need aiohttp and prometheus-client: install them with `pip install 'fastgrpo[serve]'`"
CONNECT_S = 10.0
GRACE_S = 60.0  # beyond a job's own wall time, for one answer
PAUSE_S = 0.5  # before a host that failed is asked again, doubled with each failure in a row
MAX_PAUSE_S = 30.0
PROBE_S = 30.0
LOST_TRIES = 3  # of a job whose jail failed


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
    """One server: what it has of ours under way, and when it may be asked again after a failure."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.in_flight = 0
        self.failures = 0  # in a row
        self.fault = ""
        self.ready_at = 0.0

    def pause_s(self) -> float:
        """How long it must not be asked."""
        return max(0.0, self.ready_at - time.monotonic())

    def failed(self, reason: str) -> None:
        pause = min(PAUSE_S * 2**self.failures, MAX_PAUSE_S)
        self.failures += 1
        self.fault = reason
        self.ready_at = time.monotonic() + pause
        log.warning("jail server failed: url=%s pause_s=%.1f reason=%r", self.url, pause, reason)

    def busy(self, retry_after_s: float) -> None:
        self.ready_at = time.monotonic() + retry_after_s


class RemotePool:
    """`async with RemotePool(["http://host:8080"], key=...) as pool: outcome = await pool.run(code, tests=...)`.

    Each job goes to the host that has the fewest of ours under way. A host that is full (429) is asked again when it
    says, one that fails after a pause, and meanwhile the others; a job whose jail failed is run again elsewhere. key:
    the servers' bearer key. deadline_s: for one job in all, waiting included; then its outcome is `infrastructure`.
    Raises SandboxUnavailable on entry where no host runs a job, and ImportError without the extra `serve`.
    """

    def __init__(self, urls: Sequence[str], key: str = "", deadline_s: float = 600.0) -> None:
        if isinstance(urls, str) or not urls:
            raise ValueError('urls must be a list of at least one server, such as ["http://127.0.0.1:8080"]')
        self._hosts = [_Host(url.strip()) for url in urls]
        self._key = key
        self._deadline_s = deadline_s
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> RemotePool:
        try:
            import aiohttp
        except ImportError:
            raise ImportError(NEEDS_EXTRA) from None
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
        """Drops what is under way, which the servers then end."""
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
    ) -> Outcome:
        """SandboxPool.run on another host. Cancelling ends the job there. Never raises for what the code does."""
        try:
            content = {path: data.encode() if isinstance(data, str) else data for path, data in (files or {}).items()}
            request = RunRequest(code, stdin, content, tests, limits)
            body = msgspec.msgpack.encode(request)
        except (UnicodeEncodeError, TypeError) as error:
            return Outcome("rejected", error=f"the job cannot be sent: {error}")
        wall_s = (limits or Limits()).wall_s * request.jobs + GRACE_S
        return await self._run_somewhere(body, wall_s)

    async def _run_somewhere(self, body: bytes, wall_s: float) -> Outcome:
        ends_at = time.monotonic() + self._deadline_s
        lost, outcome = 0, None
        while (left := ends_at - time.monotonic()) > 0:
            host = min(self._hosts, key=lambda host: (host.pause_s(), host.in_flight))
            if pause := host.pause_s():
                await asyncio.sleep(min(pause, left))
                continue
            answer = await self._ask(host, body, min(wall_s, left))
            if answer is None:
                continue
            outcome, lost = answer, lost + 1
            if outcome.status != "infrastructure" or lost == LOST_TRIES:
                return outcome
            host.failed(outcome.error)
        faults = "; ".join(f"{host.url}: {host.fault}" for host in self._hosts if host.fault)
        return outcome or Outcome("infrastructure", error=f"no outcome within {self._deadline_s:.0f} s; {faults}")

    async def _ask(self, host: _Host, body: bytes, timeout_s: float) -> Outcome | None:
        """One try on one host. None when it was full or failed, which the host then knows."""
        import aiohttp

        assert self._session is not None, "a RemotePool runs jobs inside its `async with` block"
        host.in_flight += 1
        try:
            async with asyncio.timeout(timeout_s), self._session.post(f"{host.url}/run", data=body) as response:
                answer = await response.read()
                return _outcome(host, response.status, response.headers.get("Retry-After", ""), answer)
        except (aiohttp.ClientError, OSError, TimeoutError, msgspec.DecodeError) as error:
            host.failed(str(error) or type(error).__name__)
            return None
        finally:
            host.in_flight -= 1

    async def _probe(self, host: _Host) -> str:
        """What is wrong with a host; "" when it runs a job."""
        answer = None
        body = msgspec.msgpack.encode(RunRequest("print(6 * 7)"))
        ends_at = time.monotonic() + PROBE_S
        while answer is None and not host.failures and (left := ends_at - time.monotonic()) > 0:
            await asyncio.sleep(min(host.pause_s(), left))
            answer = await self._ask(host, body, left)
        fine = answer is not None and answer.stdout == "42\n"
        return "" if fine else f"{host.url}: {answer.error if answer else host.fault or 'no answer'}"

    def stats(self) -> dict[str, float]:
        """Counters for a live display: jobs under way, hosts, and hosts that have failed since they last answered."""
        return {
            "running": float(sum(host.in_flight for host in self._hosts)),
            "hosts": float(len(self._hosts)),
            "hosts_failed": float(sum(host.failures > 0 for host in self._hosts)),
        }


def _outcome(host: _Host, status: int, retry_after: str, answer: bytes) -> Outcome | None:
    """An answer's outcome. Raises msgspec.DecodeError for what is not one."""
    if status == 200:
        host.failures = 0
        return msgspec.msgpack.decode(answer, type=Outcome)
    if status == 429:
        host.busy(float(retry_after) if retry_after.isdigit() else PAUSE_S)
        return None
    said = _sentence(answer) or f"HTTP {status}"
    if status in (413, 422):
        return Outcome("rejected", error=said)
    host.failed(said)
    return None


def _sentence(answer: bytes) -> str:
    try:
        body: Any = msgspec.json.decode(answer)
        return str(body["error"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return ""
