"""The endpoint over a scripted engine, asked by OpenAI's own client: what is recorded, keys, disconnects, hangs."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import aiohttp
import msgspec
import openai
import pytest

from fastgrpo.engine.completion import Completion
from fastgrpo.policy.chat import Chat
from fastgrpo.rollouts.endpoint import open_endpoint
from fastgrpo.rollouts.generator import open_generator
from fastgrpo.rollouts.openai_form import Refused, Request
from fastgrpo.rollouts.rollouts import Rollouts, collect
from fastgrpo.rollouts.session import FirstPrompts, Session
from fastgrpo.types import Result, Reward, Sampling
from tests.helpers.chat_model import TOOL, chat_tokenizer

TOKENIZER = chat_tokenizer()
SAMPLING = Sampling(max_new_tokens=40, max_model_len=600, execute_s=20, max_turns=6)
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
PROBLEMS = [SimpleNamespace(id="p0")]


class Scripted:
    """Writes the `texts` one after the other, each one token a step at most; `None` is never finished."""

    def __init__(self, *texts: str | None) -> None:
        self.texts, self.open = list(texts), dict[int, Any]()
        self.seen: list[list[int]] = []
        self.options: list[dict[str, Any]] = []
        self.aborted: list[int] = []

    @property
    def busy(self) -> bool:
        return bool(self.open)

    def submit(self, key: int, prompt_ids: list[int], **options: Any) -> None:
        self.seen.append(list(prompt_ids))
        self.options.append(options)
        text = self.texts.pop(0)
        self.open[key] = None if text is None else split_apart(text)

    def step(self) -> list[Any]:
        done = [key for key, ids in self.open.items() if ids is not None]
        answers = [(key, self.open.pop(key)) for key in done]
        return [Completion(key, ids, logprobs_of(ids), "stop", [0] * len(ids)) for key, ids in answers]

    def abort(self, keys: list[int]) -> None:
        self.aborted += keys
        for key in keys:
            self.open.pop(key, None)

    def abort_all(self) -> None:
        self.open.clear()


def split_apart(text: str) -> list[int]:
    """One token a letter: ids that no tokenizer would choose, as a policy may."""
    return [*(id for letter in text for id in TOKENIZER.encode(letter)), TOKENIZER.convert_tokens_to_ids("<|im_end|>")]


def logprobs_of(ids: list[int]) -> list[float]:
    return [-(token % 97) / 10 - 0.1 for token in ids]


class Acting:
    """An agent made of one coroutine; `direct`: it asks by the client that the rollout gives, not over HTTP."""

    direct = False

    def __init__(self, act: Callable[[Any], Awaitable[Any]]) -> None:
        self._act = act

    def prompt(self, problem: Any) -> str:
        return "What is 1 + 2?"

    async def act(self, problem: Any, access: Any, seed: int) -> Any:
        if self.direct:
            return await self._act(access.client())
        async with openai.AsyncOpenAI(base_url=access.base_url, api_key=access.api_key, max_retries=0) as client:
            return await self._act(client)

    def results(self, problem: Any, rollouts: list[Any]) -> list[Result]:
        return [Result(reward=Reward(total=1.0), record={"execution": r.executions[-1]}) for r in rollouts]


def rollout_of(engine: Scripted, act: Callable[[Any], Awaitable[Any]], sampling: Sampling = SAMPLING, size: int = 1):
    groups = asyncio.run(
        collect(engine, Acting(act), Chat(TOKENIZER), PROBLEMS, group_size=size, sampling=sampling, seed=0)
    )
    return groups[0].rollouts[0]


@pytest.fixture(params=[False, True], ids=["http", "direct"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Acting, "direct", request.param)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


async def ask(client: openai.AsyncOpenAI, messages: list[Any], **options: Any) -> Any:
    answer = await client.chat.completions.create(model="policy", messages=messages, **options)
    return answer.choices[0]


async def two_turns(client: openai.AsyncOpenAI) -> str:
    """What any agent with tools does: call, run, tell, ask again."""
    messages: list[Any] = [user("What is 1 + 2?")]
    choice = await ask(client, messages, tools=[TOOL])
    (call,) = choice.message.tool_calls
    arguments = json.loads(call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": str(sum(arguments.values()))}
    messages += [choice.message.model_dump(exclude_none=True), result]
    return (await ask(client, messages, tools=[TOOL])).message.content


@pytest.mark.usefixtures("both_ways")
def test_a_tool_agent_is_trained_on_what_was_sampled_and_nothing_else() -> None:
    """The second turn's prefix would be tokenised otherwise; it is appended to the ids all the same."""
    engine = Scripted(CALL, "It is 3.")
    rollout = rollout_of(engine, two_turns)
    first, second = split_apart(CALL), split_apart("It is 3.")
    assert TOKENIZER.encode(CALL) != first[:-1], "the case is there"
    prompt = engine.seen[0]
    told = rollout.token_ids[len(prompt) + len(first) : -len(second)]
    assert rollout.token_ids == prompt + first + told + second
    assert engine.seen[1] == prompt + first + told
    assert TOKENIZER.decode(told) == (
        "\n<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    assert rollout.loss_mask == [0] * len(prompt) + [1] * len(first) + [0] * len(told) + [1] * len(second)
    masked = [0.0] * len(told)
    assert rollout.logprobs == [0.0] * len(prompt) + logprobs_of(first) + masked + logprobs_of(second)
    assert rollout.branches == []
    assert rollout.completions == [CALL, "It is 3."]
    assert rollout.result.record == {"execution": "It is 3."}
    assert "add" in TOKENIZER.decode(prompt)
    assert [option["seed"] for option in engine.options] == [
        engine.options[0]["seed"],
        engine.options[0]["seed"] + 1,
    ]


@pytest.mark.parametrize(
    "changed",
    [
        [user("q"), {"role": "assistant", "content": "answer"}, user("again")],
        [user("in short: q"), user("again")],
        [user("q"), {"role": "assistant", "content": "thought answer"}, {"role": "assistant", "content": "x"}],
    ],
    ids=["thoughts dropped", "summed up", "words put in"],
)
def test_a_changed_history_begins_a_sample_of_its_own(changed: list[Any]) -> None:
    async def act(client: openai.AsyncOpenAI) -> None:
        await ask(client, [user("q")])
        await ask(client, changed)

    engine = Scripted("thought answer", "second")
    rollout = rollout_of(engine, act)
    (branch,) = rollout.branches
    for trace, prompt, text in zip(rollout.traces, engine.seen, ("thought answer", "second"), strict=True):
        written = split_apart(text)
        assert trace.token_ids == prompt + written
        assert trace.loss_mask == [0] * len(prompt) + [1] * len(written)
        assert trace.logprobs == [0.0] * len(prompt) + logprobs_of(written)
    assert engine.seen[1] == Chat(TOKENIZER).prompt_ids(changed)
    assert rollout.written == sum(branch.loss_mask) + sum(rollout.loss_mask)


def test_two_answers_to_the_same_messages_are_two_samples() -> None:
    async def act(client: openai.AsyncOpenAI) -> None:
        first = await ask(client, [user("q")])
        history = [user("q"), {"role": "assistant", "content": first.message.content}, user("go on")]
        await asyncio.gather(ask(client, history), ask(client, history))

    engine = Scripted("one", "two", "three")
    rollout = rollout_of(engine, act)
    (branch,) = rollout.branches
    assert rollout.token_ids[: -len(split_apart("two"))] == engine.seen[1] == engine.seen[2]
    # What both share is trained once.
    assert sum(rollout.loss_mask) == len(split_apart("one")) + len(split_apart("two"))
    assert branch.loss_mask == [0] * len(engine.seen[2]) + [1] * len(split_apart("three"))


def test_space_the_form_of_arguments_and_a_called_tool_s_name_change_nothing() -> None:
    async def act(client: openai.AsyncOpenAI) -> None:
        choice = await ask(client, [user("q")], tools=[TOOL])
        message = choice.message.model_dump(exclude_none=True)
        message["content"] = f" {message['content']}\n"
        message["tool_calls"][0]["function"]["arguments"] = '{ "b": 2, "a": 1 }'
        result = {
            "role": "tool",
            "tool_call_id": message["tool_calls"][0]["id"],
            "content": [{"type": "text", "text": "3"}],
        }
        said = await ask(client, [user("q"), message, result], tools=[TOOL])
        named = result | {"name": "add"}
        answer = {"role": "assistant", "content": said.message.content}
        await ask(client, [user("q"), message, named, answer, user("sure?")], tools=[TOOL])
        other = named | {"tool_call_id": "another"}
        await ask(client, [user("q"), message, other, answer, user("sure?")], tools=[TOOL])

    assert len(rollout_of(Scripted(f"I add. {CALL}", "3", "yes", "no"), act).branches) == 1


def test_what_is_returned_is_what_was_sampled() -> None:
    async def act(client: openai.AsyncOpenAI) -> Any:
        body = {"return_token_ids": True, "seed": 5}
        answer = await client.chat.completions.create(
            model="any", messages=[user("q")], logprobs=True, max_tokens=7, temperature=0.1, extra_body=body
        )
        return answer.model_dump()

    engine = Scripted("abc")
    answer = rollout_of(engine, act).result.record["execution"]
    ids = split_apart("abc")
    assert answer["prompt_token_ids"] == engine.seen[0]
    assert answer["choices"][0]["token_ids"] == ids
    tokens = answer["choices"][0]["logprobs"]["content"]
    assert [each["logprob"] for each in tokens] == logprobs_of(ids)
    assert "".join(each["token"] for each in tokens) == "abc<|im_end|>"
    assert answer["usage"]["total_tokens"] == len(engine.seen[0]) + len(ids)
    assert engine.options[0]["max_tokens"] == 7
    assert engine.options[0]["temperature"] == 1.0, "the run's, as it is trained"
    assert engine.options[0]["seed"] != 5


@pytest.mark.usefixtures("both_ways")
def test_a_stop_text_ends_what_the_agent_reads_and_stays_in_what_is_trained() -> None:
    async def act(client: openai.AsyncOpenAI) -> Any:
        first = await ask(client, [user("q")], stop=["Obs:", ""])
        history = [user("q"), first.message.model_dump(exclude_none=True), user("5")]
        second = await ask(client, history, stop="Obs:")
        return [first.message.content, first.finish_reason, second.message.content]

    engine = Scripted("Act: add Obs:", "done")
    rollout = rollout_of(engine, act, replace(SAMPLING, stop=("END",)))
    assert rollout.result.record["execution"] == ["Act: add ", "stop", "done"]
    assert [option["stop"] for option in engine.options] == [("END", "Obs:")] * 2
    assert rollout.branches == []
    prompt, written = engine.seen[0], split_apart("Act: add Obs:")
    assert rollout.token_ids[: len(prompt) + len(written)] == prompt + written
    assert rollout.loss_mask[len(prompt) : len(prompt) + len(written)] == [1] * len(written)


@pytest.mark.usefixtures("both_ways")
def test_a_client_that_streams_gets_the_same() -> None:
    async def act(client: openai.AsyncOpenAI) -> Any:
        stream = await client.chat.completions.create(model="policy", messages=[user("q")], tools=[TOOL], stream=True)
        chunks = [chunk async for chunk in stream]
        again = await client.chat.completions.create(model="policy", messages=[user("q")])
        assert len({chunk.id for chunk in chunks}) == 1
        assert again.id != chunks[0].id
        return [chunks[0].choices[0].delta.tool_calls[0].function.name, chunks[-1].choices[0].finish_reason]

    assert rollout_of(Scripted(CALL, "a"), act).result.record["execution"] == ["add", "tool_calls"]


def test_a_plain_agent_runs_in_a_thread_with_the_plain_client() -> None:
    class Plain(Acting):
        def act(self, problem: Any, access: Any, seed: int) -> str:  # type: ignore[override]
            assert threading.current_thread() is not threading.main_thread()
            with openai.OpenAI(base_url=access.base_url, api_key=access.api_key) as client:
                answer = client.chat.completions.create(model=access.model, messages=[user("q")])
            return answer.choices[0].message.content

    engine = Scripted(*["abc"] * 4)
    groups = asyncio.run(
        collect(engine, Plain(two_turns), Chat(TOKENIZER), PROBLEMS, group_size=4, sampling=SAMPLING, seed=0)
    )
    assert [rollout.result.record["execution"] for rollout in groups[0].rollouts] == ["abc"] * 4


def test_a_plain_agent_may_ask_by_the_given_client_in_a_loop_of_its_own() -> None:
    class Plain(Acting):
        def act(self, problem: Any, access: Any, seed: int) -> str:  # type: ignore[override]
            async def asked(client: Any) -> str:
                answer = await client.chat.completions.create(model=access.model, messages=[user("q")])
                return answer.choices[0].message.content

            async def inside() -> str:
                return await asked(access.client())

            return asyncio.run(asked(access.client())) + asyncio.run(inside())

    collected = collect(
        Scripted(*["abc"] * 4), Plain(two_turns), Chat(TOKENIZER), PROBLEMS, group_size=2, sampling=SAMPLING, seed=0
    )
    groups = asyncio.run(asyncio.wait_for(collected, 30))
    assert [rollout.result.record["execution"] for rollout in groups[0].rollouts] == ["abcabc"] * 2


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"{", "the request is malformed"),
        (b"[]", "the request is malformed"),
        ({"messages": []}, "Expected `array` of length >= 1"),
        ({"messages": [{"role": "clown", "content": "x"}]}, "Invalid enum value 'clown'"),
        ({"messages": [user("q")], "n": 2}, "n above 1 is not supported"),
        ({"messages": [user("q")], "stop": ["x"] * 17}, "stop with more than 16 texts is not supported"),
        ({"messages": [user("q")], "stop": [5]}, "the request is malformed"),
        ({"messages": [user("q")], "max_tokens": 0}, "Expected `int` >= 1"),
        ({"messages": [user("q")], "tool_choice": "required"}, "tool_choice other than auto and none is not"),
        (
            {"messages": [user("q")], "chat_template_kwargs": {"enable_thinking": False}},
            "run's model.chat_template_kwargs",
        ),
        ({"messages": [user("q")], "guided_json": {}}, "guided_json is not supported"),
        ({"messages": [user("q")], "tools": [{"type": "function"}]}, "each of tools needs a function with a name"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'image_url' cannot be read"),
        ({"messages": [user("q " * 900)]}, "maximum context length is 600 tokens"),
    ],
)
def test_a_bad_request_is_answered_by_a_sentence(body: Any, sentence: str) -> None:
    async def act(client: openai.AsyncOpenAI) -> None:
        await ask(client, [user("q")])
        status, said = await post(client.base_url, client.api_key, body)
        assert status == 400
        assert said["error"]["type"] == "invalid_request_error"
        assert sentence in said["error"]["message"]

    engine = Scripted("fine")
    assert rollout_of(engine, act).result.status == "ok"
    assert len(engine.seen) == 1


async def post(base_url: Any, key: str, body: Any, path: str = "chat/completions") -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession() as session, session.post(f"{base_url}{path}", data=data, headers=headers) as got:
        return got.status, await got.json()


@pytest.mark.usefixtures("both_ways")
def test_a_wrong_key_is_401_and_a_key_ends_with_its_rollout() -> None:
    keys: list[str] = []

    async def act(client: openai.AsyncOpenAI) -> None:
        await ask(client, [user("q")])
        keys.append(client.api_key)
        with pytest.raises(openai.AuthenticationError, match="belongs to no rollout"):
            await ask(client.with_options(api_key="wrong"), [user("q")])
        if client.api_key != keys[0]:
            other = client.with_options(api_key=keys[0])
            with pytest.raises(openai.AuthenticationError):
                await always(other.models.list)
        status, said = await post(client.base_url, client.api_key, {}, path="nothing")
        assert (status, said["error"]["code"]) == (404, "http")
        assert said["error"]["message"].startswith("/v1/nothing is not answered by this endpoint, POST /v1/chat/compl")
        assert (await client.models.list()).data[0].id == "policy"

    assert rollout_of(Scripted("a", "b"), act, size=2).result.status == "ok"
    assert len(set(keys)) == 2


def test_one_client_may_ask_for_all_rollouts_by_their_keys_as_session_ids() -> None:
    async def act(client: openai.AsyncOpenAI) -> None:
        shared = client.with_options(api_key="EMPTY")
        await ask(shared, [user("q")], extra_headers={"X-Session-ID": client.api_key})
        with pytest.raises(openai.AuthenticationError, match="belongs to no rollout"):
            await ask(shared, [user("q")], extra_headers={"X-Session-ID": "another"})

    rollout = rollout_of(Scripted("a"), act)
    assert (rollout.result.status, rollout.completions) == ("ok", ["a"])


def test_the_address_is_one_for_all_batches_of_a_generator() -> None:
    class Noting(Acting):
        async def act(self, problem: Any, access: Any, seed: int) -> Any:
            addresses.append(access.base_url)
            return await super().act(problem, access, seed)

    async def main() -> None:
        agent = Noting(lambda client: ask(client, [user("q")]))
        async with open_generator(Scripted(*"abcd")) as generator:
            batch = (generator, agent, Chat(TOKENIZER), PROBLEMS)
            for at_once in (1, 2, 1):
                jobs = (collect(*batch, group_size=1, sampling=SAMPLING, seed=0) for _ in range(at_once))
                await asyncio.gather(*jobs)

    addresses: list[str] = []
    asyncio.run(main())
    assert (len(addresses), len(set(addresses))) == (4, 1)


@pytest.mark.parametrize("path", ["chat", "models"])
def test_the_given_client_goes_nowhere_but_to_the_policy(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the rollout's key nor anything else leaves for another host, whose certificate nobody would look at."""

    async def act(client: openai.AsyncOpenAI) -> None:
        await ask(client, [user("q")])
        for url in (
            "https://127.0.0.1:1/v1",
            "https://api.example.com/v1",
            str(client.base_url).replace("http", "https"),
        ):
            other = client.with_options(base_url=url)
            with pytest.raises(openai.APIStatusError, match=r"speaks to the policy at http://127\.0\.0\.1.* alone"):
                await (ask(other, [user("q")]) if path == "chat" else always(other.models.list))

    monkeypatch.setattr(Acting, "direct", True)
    engine = Scripted("a")
    assert rollout_of(engine, act).result.status == "ok"
    assert len(engine.seen) == 1


async def always(call: Callable[[], Awaitable[Any]]) -> None:
    while True:
        await call()


@pytest.mark.usefixtures("both_ways")
def test_turns_are_bounded() -> None:
    async def act(client: openai.AsyncOpenAI) -> None:
        while True:
            await ask(client, [user("q")])

    rollout = rollout_of(Scripted(*"abcdef"), act)
    assert rollout.result.status == "infrastructure"
    assert "at most grpo.max_turns = 6 completions" in rollout.result.error


@pytest.mark.usefixtures("both_ways")
def test_a_client_that_goes_away_frees_its_request() -> None:
    engine = Scripted(None, "abc")

    async def act(client: openai.AsyncOpenAI) -> str:
        with pytest.raises(openai.APITimeoutError):
            await ask(client.with_options(timeout=0.3), [user("q")])
        for _ in range(100):
            if engine.aborted:
                break
            await asyncio.sleep(0.02)
        assert engine.aborted == [0]
        assert not engine.busy
        return (await ask(client, [user("q")])).message.content

    rollout = rollout_of(engine, act)
    assert rollout.result.record == {"execution": "abc"}
    assert len(rollout.traces) == 1


async def hangs(client: openai.AsyncOpenAI) -> None:
    await ask(client, [user("q")])
    await asyncio.Event().wait()


async def raises(client: openai.AsyncOpenAI) -> None:
    await ask(client, [user("q")])
    raise ZeroDivisionError("the agent divides")


LINE_THAT_RAISES = f"test_endpoint.py:{raises.__code__.co_firstlineno + 2}"


async def idle(client: openai.AsyncOpenAI) -> None:
    return None


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (hangs, "problem p0: act took longer than grpo.execute_s = 0.3 s without a request to the policy"),
        (raises, f"problem p0: act raised ZeroDivisionError: the agent divides ({LINE_THAT_RAISES})"),
        (idle, "problem p0: act returned without a request to the policy"),
    ],
)
def test_an_agent_that_fails_costs_its_own_rollout(act: Any, reason: str) -> None:
    limit = 0.3 if act is hangs else 30.0
    rollout = rollout_of(Scripted("abc"), act, Sampling(max_new_tokens=8, max_model_len=600, execute_s=limit))
    assert rollout.result.status == "infrastructure"
    assert rollout.result.error == reason


def test_the_deadline_of_an_agent_does_not_count_the_wait_for_the_engine() -> None:
    waits = iter([4.4, 0.2])

    class Slow(Scripted):
        def step(self) -> list[Any]:
            threading.Event().wait(next(waits))
            return super().step()

    # The agent's own time is its client's, which a busy machine makes long.
    sampling = Sampling(max_new_tokens=8, max_model_len=600, execute_s=4.0)
    rollout = rollout_of(Slow(CALL, "3"), two_turns, sampling)
    assert rollout.result.status == "ok"
    assert rollout.writing_s > 4.5


@pytest.mark.usefixtures("both_ways")
def test_an_engine_that_fails_ends_the_run_with_its_own_error() -> None:
    class Broken(Scripted):
        def step(self) -> list[Any]:
            raise RuntimeError("device lost")

    async def patient(client: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.InternalServerError, match="the engine failed"):
            await ask(client, [user("q")])
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="device lost"):
        rollout_of(Broken("abc"), patient)


def test_tools_without_a_chat_template_are_refused() -> None:
    plain = chat_tokenizer()
    plain.chat_template = None

    async def main() -> tuple[int, Any]:
        async with served(Chat(plain)) as (url, key):
            return await post(url, key, {"messages": [user("q")], "tools": [TOOL]})

    status, said = asyncio.run(main())
    assert status == 400
    assert "the policy has no chat template, so that tools cannot be shown" in said["error"]["message"]


def leaving(engine: Scripted, left: list[asyncio.Task[Any]]) -> Any:
    """What an agent does that has one answer and ends while its second request is under way, which is `left`."""

    async def act(client: openai.AsyncOpenAI) -> None:
        await ask(client, [user("q")])
        left.append(asyncio.create_task(ask(client, [user("r")])))
        while len(engine.seen) < 2:
            await asyncio.sleep(0.01)

    return act


def test_a_request_that_outlives_its_rollout_ends_with_it() -> None:
    """Of an agent in this process: the engine is told, and whoever still waits hears of it."""
    engine, left = Scripted("abc", None), []

    async def main() -> None:
        agent = Acting(leaving(engine, left))
        agent.direct = True
        await collect(engine, agent, Chat(TOKENIZER), PROBLEMS, group_size=1, sampling=SAMPLING, seed=0)
        with pytest.raises(openai.APIConnectionError):
            await asyncio.wait_for(left[0], 10)

    asyncio.run(main())
    assert not engine.busy


@pytest.mark.usefixtures("both_ways")
def test_the_engine_is_free_once_it_has_dropped_what_an_agent_left_under_way() -> None:
    """Else it would still decode as its weights change, and be told to drop a request beside the sync."""

    class Slow(Scripted):
        def abort(self, keys: list[int]) -> None:
            time.sleep(0.2)
            super().abort(keys)

    engine, left = Slow("abc", None), []

    async def main() -> None:
        async with open_generator(engine) as generator:
            options = {"group_size": 1, "sampling": SAMPLING, "seed": 0}
            rollouts = Rollouts(generator, Acting(leaving(engine, left)), Chat(TOKENIZER), PROBLEMS, **options)
            await asyncio.wait_for(rollouts.generated(), 10)
            assert not engine.busy
            await rollouts.groups()
        await asyncio.gather(*left, return_exceptions=True)

    asyncio.run(main())


def test_nothing_is_recorded_after_a_rollout_s_end_where_its_request_was_answered_just_then() -> None:
    """Python 3.11's `wait_for` gives an answer that is there to whom it is to cancel."""

    async def answered(*_: Any) -> Completion:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        ids = split_apart("late")
        return Completion(0, ids, logprobs_of(ids), "stop", [0] * len(ids))

    async def main() -> None:
        chat = Chat(TOKENIZER)
        session = Session(answered, chat, SAMPLING, 0, FirstPrompts(chat))
        request = msgspec.json.decode(json.dumps({"messages": [user("q")]}), type=Request)
        async with session.clock:
            asked = asyncio.create_task(session.answer(request))
            await asyncio.sleep(0.01)
            await session.close()
        with pytest.raises(Refused, match="this rollout has ended"):
            await asked
        assert session.rollout().token_ids == session.rollout().completions == []

    asyncio.run(main())


def test_a_group_s_prompt_is_tokenised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(Chat, "prompt_ids", lambda self, turns, tools=(): made.append(turns) or [1, 2, 3])

    async def act(client: openai.AsyncOpenAI) -> None:
        await ask(client, [user("q")])

    engine = Scripted(*["abc"] * 4)
    asyncio.run(collect(engine, Acting(act), Chat(TOKENIZER), PROBLEMS, group_size=4, sampling=SAMPLING, seed=0))
    assert (made, engine.seen) == ([[user("q")]], [[1, 2, 3]] * 4)


@asynccontextmanager
async def served(chat: Chat) -> AsyncIterator[tuple[str, str]]:
    async def never(*_: Any) -> Any:
        await asyncio.Event().wait()

    session = Session(never, chat, replace(SAMPLING, max_turns=64), 0, FirstPrompts(chat))
    async with open_endpoint() as endpoint, endpoint.serving(session) as access, session.clock:
        yield f"{access.base_url}/", access.api_key


def test_the_endpoint_stops_with_requests_under_way() -> None:
    async def main() -> Any:
        async with served(Chat(TOKENIZER)) as (url, key):
            pending = [asyncio.create_task(post(url, key, {"messages": [user("q")]})) for _ in range(18)]
            async with asyncio.timeout(10):
                while sum(task.done() for task in pending) < 2:
                    await asyncio.sleep(0.01)
        return await asyncio.wait_for(asyncio.gather(*pending, return_exceptions=True), 10)

    outcomes = asyncio.run(main())
    refused = [each for each in outcomes if isinstance(each, tuple)]
    assert [status for status, _ in refused] == [429, 429], "16 requests of a rollout at once"
    assert all(isinstance(each, aiohttp.ClientError) for each in outcomes if each not in refused)
