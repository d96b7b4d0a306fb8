"""fastgrpo_sandbox: untrusted Python in bubblewrap-grade jails at fork speed; knows nothing of torch or RL."""

from fastgrpo_sandbox.blocking import BlockingSandboxPool
from fastgrpo_sandbox.counting import count_tests
from fastgrpo_sandbox.extract import extract_code
from fastgrpo_sandbox.job import refusal
from fastgrpo_sandbox.pool import SandboxPool, Session
from fastgrpo_sandbox.ray_servers import ray_servers
from fastgrpo_sandbox.remote import RemotePool
from fastgrpo_sandbox.spread import SpreadPool
from fastgrpo_sandbox.types import (
    AssertTests,
    CallError,
    CheckTests,
    EndSession,
    Limits,
    Outcome,
    SandboxUnavailable,
    StdioTests,
    Tests,
    UnittestTests,
)

__all__ = [
    "AssertTests",
    "BlockingSandboxPool",
    "CallError",
    "CheckTests",
    "EndSession",
    "Limits",
    "Outcome",
    "RemotePool",
    "SandboxPool",
    "SandboxUnavailable",
    "Session",
    "SpreadPool",
    "StdioTests",
    "Tests",
    "UnittestTests",
    "count_tests",
    "extract_code",
    "ray_servers",
    "refusal",
]
