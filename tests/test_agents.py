"""Agents that drive their rollouts through the endpoint, trained on the real engine: the loop, parity, the example."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import torch

import fastgrpo
from fastgrpo.config_keys import resolve
from fastgrpo.rollouts.experience import tally_of
from fastgrpo.training.advantage import to_samples
from fastgrpo.types import Group, Result, Reward, Rollout, Trace
from tests.helpers.chat_model import TOOL, save_chat_model
from tests.helpers.runs import without_report

EXAMPLES = Path(__file__).parents[1] / "examples"
KEYS = {
    "engine.max_model_len": 320,
    "engine.max_num_seqs": 16,
    "engine.kv_cache_gib": 0.05,
    "grpo.steps": 2,
    "grpo.prompts_per_step": 2,
    "grpo.group_size": 4,
    "grpo.max_new_tokens": 16,
    "grpo.lr": 1e-3,
    "grpo.warmup_steps": 0,
    "eval.samples": 1,
}


class Adding:
    """Two turns: whatever the policy writes, the tool's answer follows; the reward is the share of vowels."""

    def prompt(self, problem: Any) -> str:
        return problem.prompt

    async def act(self, problem: Any, access: Any, seed: int) -> list[int]:
        messages: list[Any] = [{"role": "user", "content": problem.prompt}]
        ids: list[int] = []
        async with openai.AsyncOpenAI(base_url=access.base_url, api_key=access.api_key) as client:
            for _ in range(2):
                answer = await client.chat.completions.create(
                    model=access.model, messages=messages, tools=[TOOL], extra_body={"return_token_ids": True}
                )
                ids += answer.choices[0].token_ids
                messages.append(answer.choices[0].message.model_dump(exclude_none=True))
                messages.append({"role": "tool", "tool_call_id": "call_0_0", "content": "3"})
        return ids

    def results(self, problem: Any, rollouts: list[Any]) -> list[Result]:
        for rollout in rollouts:
            trained = zip(rollout.token_ids, rollout.loss_mask, strict=True)
            assert [token for token, mask in trained if mask] == rollout.executions[0], "trained is what was sampled"
        texts = ["".join(rollout.completions) for rollout in rollouts]
        rewards = [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in texts]
        return [Result(reward=Reward(total=total)) for total in rewards]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("policy"))


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["stage"] == "grpo"]


@pytest.mark.engine
@pytest.mark.parametrize("lag", [0, 1])
def test_a_two_turn_tool_agent_trains(model: Path, tmp_path: Path, lag: int) -> None:
    problems = [SimpleNamespace(id=f"p{n}", prompt=f"What is {n} + 2?") for n in range(4)]
    keys = KEYS | {"runs": str(tmp_path), "name": "agents", "grpo.max_lag": lag}
    sets = {"dataset": problems[:3], "eval_dataset": problems[3:]}
    with without_report():
        folder = fastgrpo.train(keys, model=model, environment=Adding(), **sets)
    rows = metrics(folder)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["infrastructure"] == 0 and row["grad_norm"] > 0 for row in rows)
    # The trainer finds the logprobs that vLLM sampled with, at the same places of the same sequences.
    assert rows[0]["sampler_parity"] < (1e-4 if not torch.cuda.is_available() else 2e-2)
    records = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {len(record["completions"]) for record in records} == {2}


def test_each_conversation_of_an_agent_is_a_sample_with_its_reward() -> None:
    def rollout(total: float, *branches: Trace) -> Rollout:
        result = Result(reward=Reward(total=total))
        return Rollout([1, 2], [0, 1], [0.0, -1.0], ["a"], result=result, branches=list(branches))

    group = Group(
        SimpleNamespace(id="q"), "q", [rollout(1.0, Trace([3, 4, 5], [0, 1, 1], [0.0, -2.0, -3.0])), rollout(0.0)]
    )
    samples = to_samples([group], resolve({"grpo.advantage": "dr_grpo"}).grpo)
    assert [sample.token_ids.tolist() for sample in samples] == [[1, 2], [3, 4, 5], [1, 2]]
    assert [sample.advantage for sample in samples] == [0.5, 0.5, -0.5]
    assert samples[1].logprobs.tolist() == [0.0, -2.0, -3.0]
    assert tally_of([group], 1.0).means["completion_tokens"] == (4.0, 2)


@pytest.mark.engine
def test_the_example_with_verifiers_trains(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("verifiers.v1", reason="verifiers is not installed: make verifiers")
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", ["verifiers_env", f"--model={model}", f"--runs={tmp_path}", "--name=example"])
    sys.argv += [f"--{name}={value}" for name, value in (KEYS | {"engine.max_model_len": 800}).items()]
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(EXAMPLES / "verifiers_env.py"), run_name="__main__")
    rows = metrics(tmp_path / "example")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["infrastructure"] == 0 and 0 < row["reward/brevity"] < 0.1 for row in rows)
