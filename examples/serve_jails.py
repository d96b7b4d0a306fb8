"""Jails over HTTP: one server, asked by RemotePool and in SandboxFusion's form. Needs the extra `serve`.

python examples/serve_jails.py

On hosts of their own: `JAIL_KEY=... python -m fastgrpo_sandbox serve --host 0.0.0.0 --key-env JAIL_KEY` on each, and
`RemotePool(["http://host-a:8080", "http://host-b:8080"], key=...)` or FASTGRPO_SANDBOX_URLS for the trainer's rewards.
"""

import asyncio
import json
import subprocess
import sys
import urllib.request

from fastgrpo_sandbox import AssertTests, RemotePool

CODE = "def double(x):\n    return 2 * x"
TESTS = AssertTests(asserts=("assert double(2) == 4", "assert double('a') == 'aa'", "assert double(1) == 3"))


async def judge(url: str) -> None:
    """The same `run` as SandboxPool's, on another host; the last assertion is wrong on purpose."""
    async with RemotePool([url]) as pool:
        outcome = await pool.run(CODE, tests=TESTS)
    print(outcome.status, outcome.tests, f"{outcome.pass_rate:.0%}")


def run_code(url: str) -> None:
    """What verl's reward manager and SandboxFusion's own client send."""
    body = {"code": "print(6 * 7)", "language": "python", "run_timeout": 5}
    request = urllib.request.Request(f"{url}/run_code", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        answer = json.load(response)
    print(answer["status"], answer["run_result"]["stdout"].strip())


def main() -> None:
    """Start a server on a free port of loopback, ask it twice, stop it."""
    command = [sys.executable, "-m", "fastgrpo_sandbox", "serve", "--port", "0", "--cells", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().split()[-1]
        try:
            asyncio.run(judge(url))
            run_code(url)
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
