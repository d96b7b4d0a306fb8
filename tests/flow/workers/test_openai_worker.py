"""The OpenAI-compatible worker against a stub on loopback: what it sends, retries, pays for, caches and refuses."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fastgrpo.config import Workers
from fastgrpo.errors import UserError
from fastgrpo.flow.workers.openai import OpenAIWorker
from fastgrpo.flow.workers.protocol import Reply, Request, RequestRejected, WorkerError
from tests.flow.conftest import ADD


class Stub(ThreadingHTTPServer):
    """Answers chat requests with the statuses of `script` in turn, then 200; records bodies and concurrency."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[tuple[int, dict[str, Any]]] = []
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.delay_s = 0.0
        self.lock, self.inside, self.most = threading.Lock(), 0, 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.keys.append(self.headers.get("Authorization", ""))
            self.server.inside += 1
            self.server.most = max(self.server.most, self.server.inside)
            status, answer = self.server.script.pop(0) if self.server.script else (200, chat(len(self.server.bodies)))
        time.sleep(self.server.delay_s)
        with self.server.lock:
            self.server.inside -= 1
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def chat(number: int) -> dict[str, Any]:
    message = {"role": "assistant", "content": f"answer {number}"}
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "stub",
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        "usage": {"prompt_tokens": 1000, "completion_tokens": 500, "total_tokens": 1500},
    }


@pytest.fixture
def stub() -> Iterator[Stub]:
    server = Stub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(5)


def endpoint(stub: Stub, **settings: Any) -> Workers:
    return Workers(**{"kind": "openai", "base_url": stub.url, "model": "stub", "timeout_s": 5.0} | settings)


def request(text: str = "hello", seed: int = 1) -> Request:
    messages = [{"role": "user", "content": text}]
    return Request(operator="generate", problem=ADD, messages=messages, codes=("secret code",), seed=seed)


def ask(endpoint: Workers, *requests: Request) -> list[Reply]:
    async def main() -> list[Reply]:
        worker = OpenAIWorker(endpoint, backoff_s=0.01)
        try:
            return list(await asyncio.gather(*[worker.ask(each) for each in requests]))
        finally:
            await worker.aclose()

    return asyncio.run(main())


def test_a_request_carries_messages_and_seed_and_no_secret(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_KEY", "k-1")
    [reply] = ask(endpoint(stub, api_key_env="STUB_KEY", prompt_price=2.0, completion_price=4.0), request())
    assert reply.text == "answer 1"
    assert (reply.prompt_tokens, reply.completion_tokens) == (1000, 500)
    assert reply.cost_usd == pytest.approx(0.004)
    assert reply.seconds > 0
    [body] = stub.bodies
    assert body["messages"] == [{"role": "user", "content": "hello"}]
    assert (body["model"], body["seed"]) == ("stub", 1)
    assert ADD.solution not in json.dumps(body)
    assert "secret" not in json.dumps(body)
    assert stub.keys == ["Bearer k-1"]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_failures_are_tried_again(stub: Stub, status: int) -> None:
    stub.script = [(status, {"error": {"message": "busy"}})] * 2
    [reply] = ask(endpoint(stub), request())
    assert (reply.text, len(stub.bodies)) == ("answer 3", 3)


def test_retries_are_exhausted_in_one_sentence(stub: Stub) -> None:
    stub.script = [(503, {"error": {"message": "down"}})] * 9
    with pytest.raises(WorkerError, match=r"^worker endpoint http\S+ answered 503: .*\(3 attempts\)$"):
        ask(endpoint(stub, retries=2), request())
    assert len(stub.bodies) == 3


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "set the environment variable OPENAI_API_KEY"),
        (404, "does not know the model 'stub'"),
        (400, "answered 400"),
    ],
)
def test_lasting_failures_are_not_tried_again(stub: Stub, status: int, said: str) -> None:
    stub.script = [(status, {"error": {"message": "no"}})] * 9
    with pytest.raises(WorkerError, match=said):
        ask(endpoint(stub), request())
    assert len(stub.bodies) == 1


def test_too_long_a_request_is_the_workflows_fault(stub: Stub) -> None:
    stub.script = [(400, {"error": {"message": "maximum context length is 4096", "code": "context_length_exceeded"}})]
    with pytest.raises(RequestRejected):
        ask(endpoint(stub), request())


def test_an_unreachable_endpoint_is_one_sentence(stub: Stub) -> None:
    with pytest.raises(WorkerError, match=r"cannot be reached; start it or correct workers\.base_url") as caught:
        ask(endpoint(stub, base_url="http://127.0.0.1:9/v1", retries=1), request())
    assert "\n" not in str(caught.value)


def test_a_silent_endpoint_meets_its_deadline(stub: Stub) -> None:
    stub.delay_s = 1.0
    start = time.perf_counter()
    with pytest.raises(WorkerError, match=r"did not answer within 0\.1 s"):
        ask(endpoint(stub, timeout_s=0.1, retries=1), request())
    assert time.perf_counter() - start < 3


def test_an_answer_without_choices_is_a_failure(stub: Stub) -> None:
    stub.script = [(200, chat(1) | {"choices": []})]
    with pytest.raises(WorkerError, match="without choices"):
        ask(endpoint(stub), request())


def test_concurrency_is_bounded(stub: Stub) -> None:
    stub.delay_s = 0.05
    replies = ask(endpoint(stub, concurrency=3), *[request(seed=seed) for seed in range(12)])
    assert len(replies) == 12
    assert 2 <= stub.most <= 3


def test_cached_answers_cost_nothing_and_seeds_differ(stub: Stub, tmp_path: Path) -> None:
    cached = endpoint(stub, cache_dir=str(tmp_path / "cache"), prompt_price=1.0)
    [first, other] = ask(cached, request(seed=1), request(seed=2))
    assert first.text != other.text
    assert first.cost_usd > 0
    [again] = ask(cached, request(seed=1))
    assert (again.text, again.cost_usd, again.prompt_tokens) == (first.text, 0.0, 1000)
    assert len(stub.bodies) == 2
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert [path.suffix for path in files] == [".json", ".json"]


def test_a_broken_cache_file_is_replaced(stub: Stub, tmp_path: Path) -> None:
    cached = endpoint(stub, cache_dir=str(tmp_path))
    ask(cached, request())
    [path] = [path for path in tmp_path.rglob("*") if path.is_file()]
    path.write_bytes(path.read_bytes()[:10])
    assert ask(cached, request())[0].text == "answer 2"
    assert ask(cached, request())[0].text == "answer 2"


def test_a_cache_that_cannot_be_written_is_a_users_error(stub: Stub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot create workers\.cache_dir"):
        ask(endpoint(stub, cache_dir=str(tmp_path / "file" / "cache")), request())
