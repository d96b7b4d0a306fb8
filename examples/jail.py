"""Jails on their own: run untrusted code and test it, three lines.

python examples/jail.py
"""

import asyncio

from fastgrpo_sandbox import AssertTests, SandboxPool

CODE = "def double(x):\n    return 2 * x"
TESTS = AssertTests(asserts=("assert double(2) == 4", "assert double('a') == 'aa'", "assert double(1) == 3"))


async def main() -> None:
    """Judge one solution; the last assertion is wrong on purpose."""
    async with SandboxPool() as pool:
        outcome = await pool.run(CODE, tests=TESTS)
    print(outcome.status, outcome.tests, f"{outcome.pass_rate:.0%}", f"{outcome.wall_s * 1000:.1f} ms")


asyncio.run(main())
