"""The engine in a process of its own: the same numbers, the same memory, and an error where the process is gone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from fastgrpo.config import Config
from fastgrpo.engine import child, engine_process
from fastgrpo.engine.completion import Completion, packed, unpacked
from fastgrpo.engine.engine_process import EngineDied, EngineProcess
from fastgrpo.engine.weight_sync import ParityError
from fastgrpo.policy.loading import load_policy
from fastgrpo.policy.model import Policy
from fastgrpo.policy.placement import policy_device, policy_dtype
from tests.engine.test_engine import (
    PROMPTS,
    assert_parity,
    cached_logprobs,
    finish,
    generate,
    key_of,
    optimizer_steps,
    state,
)
from tests.helpers.marks import exact

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def process(tiny_folder: Path) -> Iterator[EngineProcess]:
    """One for all tests, as its start is the slow part: with a further process for the worker, as on a GPU."""
    engine = EngineProcess(
        tiny_folder,
        dtype=str(policy_dtype(Config())).removeprefix("torch."),
        max_model_len=256,
        max_num_seqs=16,
        kv_cache_gib=0.1,
        worker_process=True,
    )
    yield engine
    engine.close()
    engine.close()


@pytest.fixture
def policy(tiny_folder: Path) -> Policy:
    return load_policy(tiny_folder, device=policy_device(), dtype=policy_dtype(Config()))


@pytest.fixture
def synced(process: EngineProcess, policy: Policy) -> Iterator[EngineProcess]:
    process.sync(policy)
    yield process
    process.abort_all()


def gone(pids: list[int]) -> bool:
    """Within seconds; a zombie is gone, which a grandchild is until its new parent has seen it."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not any(pid_status(pid) not in (None, psutil.STATUS_ZOMBIE) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def pid_status(pid: int) -> str | None:
    try:
        return psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return None


def test_completions_survive_packing() -> None:
    completions = [
        Completion(7, [5, 6, 7], [-0.5, -0.25, -1.0], "stop", [0, 0, 1]),
        Completion(3, [], [], "abort", []),
        Completion(4, [9], [-2.0], "length", [2]),
    ]
    assert unpacked(packed(completions)) == completions


@exact
def test_sampled_logprobs_are_the_trainers_before_and_after_steps(synced: EngineProcess, policy: Policy) -> None:
    completions = generate(synced)
    assert [completion.key for completion in completions] == list(range(len(PROMPTS)))
    assert_parity(policy, completions)
    optimizer_steps(policy, 2)
    report = synced.sync(policy)
    assert report.bytes_copied == 0
    assert report.parity_max < 1e-4
    assert_parity(policy, generate(synced))


@exact
def test_what_is_written_here_is_read_there(synced: EngineProcess, policy: Policy) -> None:
    """Without any sync, so nothing can have been copied: the tensors are the same memory."""
    before = synced.score(PROMPTS[:1])[0]
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if name.endswith("q_proj.weight"):
                parameter.mul_(-1.0)
    # Another prompt of the same tokens would be served from the cache.
    after = synced.score([PROMPTS[0][:-1]])[0]
    ours = policy.logprobs([PROMPTS[0][:-1]])[0]
    torch.testing.assert_close(torch.tensor(after), ours, atol=1e-4, rtol=0)
    assert max(abs(one - other) for one, other in zip(before, after, strict=False)) > 1e-3


@exact
def test_weights_change_in_flight_and_each_token_knows_its_own(synced: EngineProcess, tiny_folder: Path) -> None:
    policy = load_policy(tiny_folder)
    changed = (changed_twice(synced, policy, seed=100 * attempt) for attempt in range(30))
    states, finished = next(each for each in changed if each is not None)
    assert sorted(completion.key for completion in finished) == list(range(6))
    for completion in finished:
        assert completion.versions == sorted(completion.versions)
        assert set(completion.versions) == {0, 1, 2}
    expected = cached_logprobs(tiny_folder, states, finished[0])
    assert finished[0].logprobs == pytest.approx(expected, abs=1e-4)


def changed_twice(
    engine: EngineProcess, policy: Policy, seed: int
) -> tuple[list[dict[str, torch.Tensor]], list[Completion]] | None:
    """The weights by version and what they wrote, where no request ended before the second change.

    The other process decodes on by itself, and on a busy machine this one hears of it late.
    """
    engine.sync(policy)
    states, finished = [state(policy)], list[Completion]()
    for key, prompt in enumerate(PROMPTS):
        engine.submit(key, prompt, max_tokens=150, seed=seed + key)
    for version in (1, 2):
        # One that ends says that tokens of all have been decoded since.
        engine.submit(100 + version, PROMPTS[0], max_tokens=8)
        while 100 + version not in [completion.key for completion in finished]:
            finished += engine.step()
        finished += engine.settle()
        if any(completion.key < 100 for completion in finished):
            finish(engine)
            return None
        optimizer_steps(policy, 1)
        time.sleep(0.1)
        report = engine.sync(policy, version=version, in_flight=True)
        assert report.bytes_copied == 0
        states.append(state(policy))
    return states, [completion for completion in finished + finish(engine) if completion.key < 100]


def test_nothing_is_decoded_between_settle_and_step(synced: EngineProcess, policy: Policy) -> None:
    synced.submit(0, PROMPTS[0], max_tokens=100)
    finished = synced.settle()
    synced.submit(1, PROMPTS[1], max_tokens=2)
    synced._send_requests()
    time.sleep(0.3)
    assert synced._hear(0.0) is None
    assert len(finished + finish(synced)) == 2


def test_a_dropped_requests_key_can_be_used_again(synced: EngineProcess) -> None:
    synced.submit(0, PROMPTS[0], max_tokens=200)
    synced.submit(1, PROMPTS[1], max_tokens=8)
    finished = synced.step()
    synced.abort([0, 17])
    synced.submit(0, PROMPTS[0], max_tokens=3)
    synced.submit(2, PROMPTS[2], max_tokens=3)
    synced.abort([2])
    ended = [(one.key, len(one.token_ids)) for one in sorted(finished + finish(synced), key=key_of)]
    # The first may have ended before it was dropped.
    assert [each for each in ended if each != (0, 200)] == [(0, 3), (1, 8)]
    synced.submit(0, PROMPTS[0], max_tokens=200)
    synced.step()
    synced.abort_all()
    assert not synced.busy
    assert len(synced.score([np.array(PROMPTS[0], np.int32)])[0]) == len(PROMPTS[0]) - 1


def test_a_busy_engine_refuses_what_the_other_does(synced: EngineProcess, policy: Policy) -> None:
    synced.submit(1, PROMPTS[1], max_tokens=4)
    with pytest.raises(RuntimeError, match="idle"):
        synced.sync(policy)
    with pytest.raises(RuntimeError, match="idle"):
        synced.score(PROMPTS)
    with pytest.raises(RuntimeError, match=r"Engine\.complete needs an idle"):
        synced.complete(PROMPTS, max_tokens=1, seed=0)
    with pytest.raises(ValueError, match="already"):
        synced.submit(1, PROMPTS[1], max_tokens=4)
    with pytest.raises(ValueError, match="a prompt of 256 tokens does not fit 256 in all"):
        synced.submit(2, [1] * 256, max_tokens=4)


@exact
def test_an_unknown_architecture_is_copied_and_a_lost_one_found(
    synced: EngineProcess, tiny_folder: Path, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastgrpo.engine.shared_weights.SHARED_ARCHITECTURES", frozenset())
    monkeypatch.setattr(engine_process, "BATCH_BYTES", 100_000)
    other = load_policy(tiny_folder)
    for _ in range(2):
        optimizer_steps(other, 1)
        report = synced.sync(other)
        assert report.bytes_copied == sum(parameter.nbytes for parameter in other.model.parameters())
        assert_parity(other, generate(synced))
    monkeypatch.setattr("fastgrpo.engine.weight_sync.adopt_weights", lambda *_: 0)
    optimizer_steps(other, 3, learning_rate=1e-2)
    with pytest.raises(ParityError, match="differ by"):
        synced.sync(other)
    monkeypatch.undo()
    synced.sync(policy)


# What runs in the place of the engine: it takes the options, and then this.
FAKE = """
import os, signal, sys, time
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[1]))
connection.recv()
"""


@pytest.mark.parametrize(
    ("then", "error", "said"),
    [
        (
            "print('out of memory'); os.kill(os.getpid(), 9)",
            EngineDied,
            "was ended by SIGKILL: out of memory; continue",
        ),
        ("sys.exit(3)", EngineDied, "ended with status 3; continue with --resume"),
        ("print('error: a step took long'); sys.exit(2)", EngineDied, "^a step took long$"),
        (
            "connection.send(('failed', 'RuntimeError', 'no kernel\\nof that name'))",
            EngineDied,
            "RuntimeError: no kernel$",
        ),
        (
            "print('(Worker pid=7) ERROR 11-27 12:44:15 [executor.py:9] torch.OutOfMemoryError: 2 GiB', flush=True)\n"
            "connection.send(('failed', 'Exception', 'See stack trace for root cause.'))",
            EngineDied,
            "failed: torch.OutOfMemoryError: 2 GiB$",
        ),
        ("connection.send(('failed', 'ValueError', 'too long'))", ValueError, "^too long$"),
        ("time.sleep(60)", EngineDied, "vLLM has not started after 1 s"),
        ("os.write(connection.fileno(), b'\\0\\0'); time.sleep(60)", EngineDied, "generation hangs"),
    ],
)
def test_whatever_becomes_of_the_process_is_a_typed_error(
    monkeypatch: pytest.MonkeyPatch, then: str, error: type[Exception], said: str
) -> None:
    monkeypatch.setattr(child, "HOST", ("-c", FAKE + then))
    monkeypatch.setattr(engine_process, "START_S", 1.0 if "sleep" in then else 20.0)
    monkeypatch.setattr(engine_process, "GRACE_S", 1.0)
    with pytest.raises(error, match=said):
        EngineProcess("nowhere", max_model_len=16, step_timeout_s=1.0)


def test_a_process_that_stops_answering_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "HOST", ("-c", FAKE + "connection.send(('reply', ({}, 100))); time.sleep(60)"))
    monkeypatch.setattr(engine_process, "FIRST_STEP", 1)
    engine = EngineProcess("nowhere", max_model_len=16, step_timeout_s=1.0)
    told = r"does not answer \(settle\) after 1 s; continue with --resume, and raise engine\.step_timeout_s where"
    with pytest.raises(EngineDied, match=told):
        engine.settle()
    engine.close()


def test_a_long_start_tells_what_the_process_said_last(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(child, "HOST", ("-c", FAKE + "print('capturing graphs', flush=True); time.sleep(1)"))
    monkeypatch.setattr(engine_process, "START_S", 60.0)
    monkeypatch.setattr(engine_process, "TELL_S", 0.1)
    with pytest.raises(EngineDied):
        EngineProcess("nowhere", max_model_len=16, step_timeout_s=1.0)
    assert re.search(r"^vLLM has not started after \d+ s: capturing graphs$", capfd.readouterr().err, re.MULTILINE)


def test_weights_that_cannot_be_shared_leave_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a container forbids CUDA IPC."""

    def refused(_: object) -> None:
        raise RuntimeError("operation not permitted")

    made: list[child.Child] = []
    begin = child.Child.__init__
    monkeypatch.setattr(child.Child, "__init__", lambda self, limit: made.append(self) or begin(self, limit))
    monkeypatch.setattr(child, "HOST", ("-c", FAKE + "connection.send(('reply', ({}, 100))); time.sleep(60)"))
    monkeypatch.setattr(engine_process, "opened", refused)
    with pytest.raises(RuntimeError, match="operation not permitted"):
        EngineProcess("nowhere", max_model_len=16)
    assert made[0].process.poll() is not None


def test_the_process_ends_with_its_parent(tmp_path: Path) -> None:
    """Here while the engine still starts."""
    program = """
import os, subprocess, sys, threading, time
from fastgrpo.engine import child, engine_process
started = []
popen = subprocess.Popen
class Watched(popen):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        print(self.pid, flush=True)
        threading.Timer(0.5, os._exit, [0]).start()
subprocess.Popen = Watched
engine_process.EngineProcess("nowhere", max_model_len=16)
"""
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=240, check=False)
    assert gone([int(done.stdout)])


@exact
def test_the_policy_keeps_its_weights_when_the_process_hangs(
    synced: EngineProcess, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test, as it ends the engine of all of them."""
    expected = policy.logprobs(PROMPTS)
    synced.submit(0, PROMPTS[0], max_tokens=2)
    finish(synced)
    pids = [synced.pid, *(child.pid for child in psutil.Process(synced.pid).children(recursive=True))]
    assert len(pids) >= 2
    monkeypatch.setattr(synced, "_step_timeout_s", 2.0)
    os.kill(synced.pid, signal.SIGSTOP)
    synced.submit(0, PROMPTS[0], max_tokens=4)
    begun = time.monotonic()
    with pytest.raises(EngineDied, match=r"^generation hangs: a step of vLLM took over 2 s; raise engine.step_timeout"):
        finish(synced)
    assert time.monotonic() - begun < 60
    assert gone(pids)
    # Whoever asks next hears the same, and what only drops requests has nothing to do.
    synced.abort_all()
    assert not synced.busy
    with pytest.raises(EngineDied, match="generation hangs"):
        synced.settle()
    for ours, before in zip(policy.logprobs(PROMPTS), expected, strict=True):
        assert torch.equal(ours, before)
