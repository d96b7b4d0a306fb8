"""The OpenAI-compatible worker against a stub on loopback: what it sends, retries, pays for, caches and refuses."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fastgrpo.config import Workers
from fastgrpo.errors import UserError
from fastgrpo.flow.types import NoAnswer, Reply, Request, RequestRejected, WorkerError
from fastgrpo.flow.workers.endpoint import Endpoint
from fastgrpo.flow.workers.openai import OpenAIWorker
from tests.flow.conftest import ADD
from tests.helpers.work import calls_of


@pytest.fixture(autouse=True)
def soon_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgrpo.flow.workers.endpoint.BACKOFF_S", 0.01)


class Stub(ThreadingHTTPServer):
    """Answers chat requests with the statuses of `script` in turn, then 200; records bodies and concurrency."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[tuple[int, dict[str, Any]]] = []
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.asked: list[tuple[str, str | None]] = []  # the path, and what a proxy would be told of who asks
        self.delay_s, self.trickle_s = 0.0, 0.0
        self.cut = 0  # how many of the next requests get no answer
        self.headers: dict[str, str] = {}
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
            self.server.asked.append((self.path, self.headers.get("Proxy-Authorization")))
            self.server.keys.append(self.headers.get("Authorization", ""))
            self.server.inside += 1
            self.server.most = max(self.server.most, self.server.inside)
            status, answer = self.server.script.pop(0) if self.server.script else (200, chat(len(self.server.bodies)))
        time.sleep(self.server.delay_s)
        with self.server.lock:
            self.server.inside -= 1
            self.server.cut, cut = max(self.server.cut - 1, 0), self.server.cut > 0
        if cut:
            self.close_connection = True
            return
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            for piece in [data[i : i + 8] for i in range(0, len(data), 8)] if self.server.trickle_s else [data]:
                self.wfile.write(piece)
                time.sleep(self.server.trickle_s)

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


def request_of(**fields: Any) -> Request:
    return msgspec.structs.replace(request(), **fields)


def ask(endpoint: Workers, *requests: Request) -> list[Reply]:
    async def main() -> list[Reply]:
        worker = OpenAIWorker(endpoint)
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
        (404, r"answered 404: no; correct workers\.model \('stub'\) or workers\.base_url"),
        (400, "answered 400: no"),
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


def test_a_temperature_of_the_workflows_that_is_refused_is_its_fault(stub: Stub) -> None:
    refusal = (400, {"error": {"message": "temperature must be at most 1"}})
    stub.script = [refusal] * 2
    with pytest.raises(RequestRejected, match=r"takes no temperature of 1\.5 \(answered 400: temperature must be"):
        ask(endpoint(stub), request_of(temperature=1.5))
    with pytest.raises(WorkerError, match=r"workers\.drop"):
        ask(endpoint(stub), request())


def test_an_unreachable_endpoint_is_one_sentence(stub: Stub) -> None:
    with pytest.raises(
        WorkerError, match=r"cannot be reached \(.*(refused|failed).*; start it or correct workers\.base"
    ) as caught:
        ask(endpoint(stub, base_url="http://127.0.0.1:9/v1", retries=1), request())
    assert "\n" not in str(caught.value)


def test_a_silent_endpoint_meets_its_deadline(stub: Stub) -> None:
    stub.delay_s = 30.0
    start = time.perf_counter()
    with pytest.raises(WorkerError, match=r"did not answer within 0\.1 s"):
        ask(endpoint(stub, timeout_s=0.1, retries=1), request())
    assert time.perf_counter() - start < 20


def test_an_answer_that_trickles_meets_the_deadline_too(stub: Stub) -> None:
    stub.trickle_s = 0.05
    with pytest.raises(WorkerError, match=r"did not answer within 0\.3 s"):
        ask(endpoint(stub, timeout_s=0.3, retries=0), request())


def test_an_error_under_status_200_is_tried_again(stub: Stub) -> None:
    stub.script = [(200, chat(1) | {"choices": []}), (200, {"error": {"message": "Provider returned error"}})]
    assert ask(endpoint(stub), request())[0].text == "answer 3"
    stub.script = [(200, {"error": {"message": "Provider returned error"}})] * 9
    with pytest.raises(WorkerError, match=r"answered with an error: Provider returned error \(2 attempts\)"):
        ask(endpoint(stub, retries=1), request())


def test_the_time_that_the_endpoint_asks_for_is_waited_and_bounded(stub: Stub) -> None:
    stub.script = [(429, {"error": {"message": "busy"}})]
    stub.headers = {"Retry-After": "1"}
    start = time.perf_counter()
    [reply] = ask(endpoint(stub), request())
    assert time.perf_counter() - start > 1
    assert reply.seconds < 1  # what was waited is not the answer's time
    one = Endpoint(endpoint(stub))
    assert one._pause(0, 3600.0) == 60.0
    assert one._pause(0, 0.0) <= 0.01


def test_no_answer_is_typed_and_never_cached(stub: Stub, tmp_path: Path) -> None:
    empty = chat(1)
    empty["choices"][0] |= {"finish_reason": "length", "message": {"role": "assistant", "content": None}}
    stub.script = [(200, empty)]
    cached = endpoint(stub, cache_dir=str(tmp_path))
    with pytest.raises(NoAnswer, match=r"raise workers\.max_tokens \(1 attempt\)"):
        ask(cached, request())
    assert ask(cached, request())[0].text == "answer 2"


def test_the_newer_name_of_max_tokens_is_found(stub: Stub) -> None:
    said = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    stub.script = [(400, {"error": {"message": said, "code": "unsupported_parameter"}})] * 2
    assert len(ask(endpoint(stub, max_tokens=7), request(seed=1), request(seed=2))) == 2
    assert [body.get("max_completion_tokens") for body in stub.bodies[2:]] == [7, 7]
    assert not any("max_tokens" in body for body in stub.bodies[2:])


@pytest.mark.parametrize("name", ["temperature", "seed"])
def test_a_refused_parameter_is_named_and_can_be_dropped(stub: Stub, name: str, tmp_path: Path) -> None:
    stub.script = [(400, {"error": {"message": f"Unsupported value: '{name}' does not support this."}})]
    with pytest.raises(WorkerError, match=rf"if it refuses {name}, name that in workers\.drop"):
        ask(endpoint(stub), request())
    cached = endpoint(stub, drop=f"{name}, max_tokens", extra_body='{"top_p": 0.9}', cache_dir=str(tmp_path))
    first, second = ask(cached, request(seed=1), request(seed=2))
    assert first.text != second.text
    assert {name, "max_tokens"}.isdisjoint(stub.bodies[-1])
    assert stub.bodies[-1]["top_p"] == 0.9


def test_workers_are_asked_by_name_at_their_own_price(stub: Stub) -> None:
    others = {"small": {"model": "tiny", "prompt_price": 1.0}, "large": {"temperature": 0.1}}
    settings = endpoint(stub, name="main", prompt_price=2.0, others=others)
    asked = [request(), request_of(worker="small", temperature=0.0), request_of(worker="large")]
    costs = [ask(settings, each)[0].cost_usd for each in [*asked, request_of(worker="main")]]
    assert costs == pytest.approx([0.002, 0.001, 0.002, 0.002])
    assert [body["model"] for body in stub.bodies] == ["stub", "tiny", "stub", "stub"]
    assert [body["temperature"] for body in stub.bodies] == [0.7, 0.0, 0.1, 0.7]
    with pytest.raises(RequestRejected, match=r"no worker 'huge'; choose one of: main, small, large"):
        ask(settings, request_of(worker="huge"))


@pytest.mark.parametrize("url", ["127.0.0.1:8000/v1", "localhost:8000", "ftp://x/v1", "http://", "http://a b/v1"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(UserError, match=r"is no address such as http://localhost:8000/v1"):
        OpenAIWorker(Workers(base_url=url, model="m"))


@pytest.mark.parametrize("url", [" {}", "{}/", "{}/chat/completions", "{}\n"])
def test_an_address_is_read_as_meant(stub: Stub, url: str) -> None:
    assert ask(endpoint(stub, base_url=url.format(stub.url)), request())[0].text == "answer 1"


def test_a_key_is_sent_without_white_space_or_refused(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", " sk-abc\n")
    ask(endpoint(stub), request())
    assert stub.keys == ["Bearer sk-abc"]
    for broken in ("sk-\u201c", "sk a", "sk\na"):
        monkeypatch.setenv("OPENAI_API_KEY", broken)
        with pytest.raises(UserError, match="the key in OPENAI_API_KEY"):
            OpenAIWorker(endpoint(stub))


def test_a_proxy_in_the_way_is_named(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(WorkerError, match=r"through the proxy http://127\.0\.0\.1:9 .*NO_PROXY=127\.0\.0\.1"):
        ask(endpoint(stub, retries=0), request())


def set_proxy(monkeypatch: pytest.MonkeyPatch, **environment: str) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_a_proxy_is_asked_by_its_own_name_and_not_told_the_key(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    port, far = stub.server_port, endpoint(stub, base_url="http://far.example/v1")
    for name, value, said in (
        ("http_proxy", f"http://127.0.0.1:{port}", None),
        ("http_proxy", f"http://me:pw@127.0.0.1:{port}", "Basic bWU6cHc="),
        ("all_proxy", f"127.0.0.1:{port}", None),
    ):
        set_proxy(monkeypatch, **{name: value})
        assert ask(far, request())[0].text == f"answer {len(stub.bodies)}"
        assert stub.asked[-1] == ("http://far.example/v1/chat/completions", said)
        assert stub.keys[-1].startswith("Bearer ")
    set_proxy(monkeypatch, http_proxy="http://127.0.0.1:9", no_proxy="127.0.0.1")
    assert ask(endpoint(stub), request())[0].text == "answer 4"


def test_a_proxy_that_is_none_for_http_is_one_sentence(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    set_proxy(monkeypatch, all_proxy="socks5://127.0.0.1:9")
    with pytest.raises(UserError, match=r"socks5://127\.0\.0\.1:9 is none for HTTP, .*NO_PROXY=127\.0\.0\.1 goes past"):
        OpenAIWorker(endpoint(stub))


@pytest.mark.parametrize(
    "proxy",
    ["http://anna:ge%40heim@127.0.0.1:9", "http://anna:ge@heim@127.0.0.1:9", "socks5://anna:geheim@127.0.0.1:9"],
)
def test_neither_a_proxys_login_nor_an_addresses_is_told(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    set_proxy(monkeypatch, http_proxy=proxy)
    worker = Workers(kind="openai", base_url="http://otto:geheim@far.example/@a/v1", model="m", retries=0)
    with pytest.raises((WorkerError, UserError), match=r"//127\.0\.0\.1:9.*far\.example") as raised:
        ask(worker, request())
    assert not re.search("anna|otto|heim", str(raised.value))


def test_a_login_is_in_no_warning_and_in_no_word_on_a_wrong_address(
    stub: Stub, caplog: pytest.LogCaptureFixture
) -> None:
    stub.script = [(400, {"error": {"message": "the prompt is longer than the context length"}})]
    with pytest.raises(RequestRejected):
        ask(endpoint(stub, base_url=stub.url.replace("//", "//otto:geheim@")), request())
    assert f"worker endpoint {stub.url} refuses a request" in caplog.text
    with pytest.raises(UserError, match=r"workers.base_url '\S*host' is no address such as") as raised:
        OpenAIWorker(endpoint(stub, base_url="http://otto:ge/heim@host"))
    assert "otto" not in str(raised.value)


def test_a_name_and_a_password_in_the_address_are_sent_in_place_of_a_key(stub: Stub) -> None:
    ask(endpoint(stub, base_url=stub.url.replace("//", "//me:pw@")), request())
    assert stub.keys == ["Basic bWU6cHc="]


def test_a_connection_that_is_lost_is_tried_again(stub: Stub) -> None:
    stub.cut = 1
    assert ask(endpoint(stub), request())[0].text == "answer 2"
    stub.cut = 9
    with pytest.raises(WorkerError, match=r"cannot be reached \(.*\); start it or .* \(2 attempts\)$"):
        ask(endpoint(stub, retries=1), request())


def test_half_a_character_in_a_question_is_the_workflows_fault(stub: Stub) -> None:
    with pytest.raises(RequestRejected, match="half a character"):
        ask(endpoint(stub), request("\ud800"))


def test_a_request_is_little_work_for_the_loop_that_reads_the_verdicts_too(stub: Stub) -> None:
    """About 900 calls of functions; OpenAI's client takes 7,600, and more with each connection beside."""
    stub.delay_s = 0.2
    requests = [request(seed=seed) for seed in range(64)]
    assert calls_of(lambda: ask(endpoint(stub, concurrency=32), *requests)) / len(requests) < 2500


def test_a_refusal_for_length_is_seen_once(stub: Stub, caplog: pytest.LogCaptureFixture) -> None:
    stub.script = [(400, {"error": {"message": "maximum context length is 4096"}})] * 2

    async def main() -> None:
        worker = OpenAIWorker(endpoint(stub))
        for _ in range(2):
            with pytest.raises(RequestRejected, match="maximum context length is 4096"):
                await worker.ask(request())
        await worker.aclose()

    asyncio.run(main())
    assert [record.message.count("lower workers.max_tokens") for record in caplog.records] == [1]


def test_an_empty_answer_is_an_answer_and_said_once(stub: Stub, caplog: pytest.LogCaptureFixture) -> None:
    empty = chat(1)
    empty["choices"][0]["message"]["content"] = ""
    stub.script = [(200, empty)] * 2
    replies = ask(endpoint(stub), request(seed=1), request(seed=2))
    assert [(reply.text, reply.completion_tokens) for reply in replies] == [("", 500)] * 2
    assert [record.message.count("answers without a word") for record in caplog.records] == [1]
    assert len(stub.bodies) == 2


def test_the_wait_for_a_turn_and_for_the_next_attempt_is_told(stub: Stub) -> None:
    told: list[str] = []

    @contextmanager
    def waiting() -> Iterator[None]:
        told.append("waits")
        yield
        told.append("goes on")

    stub.script = [(503, {"error": {"message": "busy"}})]
    ask(endpoint(stub), request_of(waiting=waiting))
    assert told == ["waits", "goes on"] * 2


def test_concurrency_is_bounded(stub: Stub) -> None:
    stub.delay_s = 0.05
    replies = ask(endpoint(stub, concurrency=3), *[request(seed=seed) for seed in range(12)])
    assert len(replies) == 12
    assert 2 <= stub.most <= 3


def test_requests_of_the_step_that_is_due_go_before_those_of_later_ones(stub: Stub) -> None:
    ask(endpoint(stub, concurrency=1), *[request_of(order=order, seed=order) for order in (5, 2, 1, 2, 0)])
    assert [body["seed"] for body in stub.bodies] == [5, 0, 1, 2, 2]


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
    for number, broken in enumerate((path.read_bytes()[:10], b'{"text": "\xff"}'), 2):
        path.write_bytes(broken)
        assert ask(cached, request())[0].text == f"answer {number}"
        assert ask(cached, request())[0].text == f"answer {number}"


def test_a_cache_that_cannot_be_written_is_a_users_error(stub: Stub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot create workers\.cache_dir"):
        ask(endpoint(stub, cache_dir=str(tmp_path / "file" / "cache")), request())
