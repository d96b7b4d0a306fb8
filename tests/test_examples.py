"""The examples do what they say, with a tiny policy and an engine that draws at random; a TRL script becomes ours."""

from __future__ import annotations

import asyncio
import difflib
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from openai.types.chat import ChatCompletion

import fastgrpo
from fastgrpo.config_files import read_toml
from fastgrpo.config_keys import checked, resolve
from fastgrpo.policy.demo_policy import create_policy
from fastgrpo.rollouts.experience import OWN_METRICS
from fastgrpo.training import learner
from fastgrpo.types import Reward, Rollout
from fastgrpo_sandbox.requirements import explain
from tests.helpers.chat_model import save_chat_model
from tests.helpers.random_engine import random_engine

ROOT = Path(__file__).parents[1]
SMALL = [
    "--name",
    "run",
    "--grpo.steps",
    "1",
    "--grpo.prompts_per_step",
    "2",
    "--grpo.group_size",
    "2",
    "--grpo.max_new_tokens",
    "16",
    "--engine.max_model_len",
    "256",
    "--engine.kv_cache_gib",
    "0.1",
    "--eval.samples",
    "1",
    "--sandbox.cells",
    "1",
    "--data.held_out",
    "2",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    create_policy(["count the vowels in this sentence", "aeiou bcdfg"] * 4, folder, seed=0, vocab_size=400)
    return folder


@pytest.fixture(autouse=True)
def no_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner, "open_engine", random_engine)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def first_step(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("own_task.py", "vowels"),
        ("reward_function.py", "reward/brevity"),
        pytest.param("code_task.py", "pass_rate", marks=pytest.mark.jail),
    ],
)
def test_an_example_trains(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, metric: str
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--model", str(model), *SMALL])
    runpy.run_path(str(ROOT / "examples" / name))["main"]()
    assert metric in first_step(tmp_path / "runs" / "run")
    assert (tmp_path / "runs" / "run" / "report.html").exists()


def test_trls_tools_and_environments_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_chat_model(tmp_path / "policy")
    monkeypatch.setattr(sys, "argv", ["trl_tools.py", "--model", str(model), *SMALL, "--engine.max_model_len", "600"])
    runpy.run_path(str(ROOT / "examples/trl_tools.py"))["main"]()
    step = first_step(tmp_path / "runs" / "run")
    assert step["infrastructure"] == 0
    assert (
        0
        < step["reward/Counter"]
        < step["reward/total"]
        == pytest.approx(step["reward/Counter"] + step["reward/brevity"])
    )


@pytest.mark.parametrize("asynchronous", [False, True])
def test_tools_are_called_as_trl_calls_them(asynchronous: bool) -> None:
    """What its trainer hands to rewards of the same calls: a wrong one is told to the policy."""
    made = runpy.run_path(str(ROOT / "examples/trl_tools.py"))

    def double(x: int) -> int:
        """
        Double a number.

        Args:
            x: The number.
        """
        return 2 * x

    async def later(x: int) -> int:
        return double(x)

    later.__name__, later.__doc__ = "double", double.__doc__
    replies = iter([[("increase", {"by": 2}), ("double", {"x": 4})], [("increase", {"to": 3}), ("halve", {})], []])

    async def create(messages: list[dict[str, Any]], tools: list[dict[str, Any]], **_: Any) -> ChatCompletion:
        assert messages[0]["content"] == "To 3. It is 0 now."
        assert [tool["function"]["name"] for tool in tools] == ["double", "increase"]
        assert tools[1]["function"]["parameters"]["required"] == ["by"]
        calls = [
            {"id": f"{n}", "type": "function", "function": {"name": name, "arguments": json.dumps(given)}}
            for n, (name, given) in enumerate(next(replies))
        ]
        message = {"role": "assistant", "content": None if calls else "Done.", "tool_calls": calls or None}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        return ChatCompletion.model_validate(
            {"id": "", "object": "chat.completion", "created": 0, "model": "", "choices": [choice]}
        )

    def last(
        prompts: list[Any], completions: list[Any], environments: list[Any], wanted: list[int]
    ) -> list[float | None]:
        assert prompts[0][-1]["content"] == "To 3. It is 0 now."
        assert completions[0][0]["tool_calls"][1]["function"] == {"name": "double", "arguments": {"x": 4}}
        assert completions[0][2] == {"role": "tool", "tool_call_id": "1", "name": "double", "content": "8"}
        roles = " ".join(turn["role"] for turn in completions[0])
        assert roles == "assistant tool tool assistant tool tool assistant"
        assert [turn["content"] for turn in completions[0] if turn["role"] == "tool"][:2] == ["2", "8"]
        assert "unexpected keyword argument 'to'" in completions[0][4]["content"]
        assert completions[0][5]["content"] == "{'error': 'Tool halve not found.'}"
        return [10.0 * environment.value + wanted[0] for environment in environments]

    def none(**_: Any) -> list[float | None]:
        return [None]

    client = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))
    access = SimpleNamespace(client=lambda: client, model="policy")
    tools = [later if asynchronous else double]
    agent = made["Tools"]([last, none], tools=tools, environment_factory=made["Counter"], reward_weights=[0.5, 1.0])
    (problem,) = made["problems"]([{"prompt": [{"role": "user", "content": "To 3."}], "wanted": 3}])
    executed = asyncio.run(agent.act(problem, access, 0))
    (result,) = asyncio.run(agent.results(problem, [Rollout([7], [1], [0.0], ["Done."], executions=[executed])]))
    weights = {"last": 0.5, "none": 1.0, "Counter": 1.0}
    assert result.reward == Reward(total=12.0, terms={"last": 11.5, "Counter": 0.5}, weights=weights)

    def without_environments(prompts: list[Any], completions: list[Any], wanted: list[int]) -> list[float | None]:
        return [None]

    agent = made["Tools"]([without_environments], tools=tools)
    (result,) = asyncio.run(agent.results(problem, [Rollout([7], [1], [0.0], [""], executions=[([], [], None)])]))
    assert result.reward is None, "TRL leaves it out of the baseline, too"


def test_an_openrlhf_agent_trains_as_the_docs_wrap_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps, whose rewards add up; a tensor is a number."""
    (block,) = [block for block in python_blocks() if "class Stepping:" in block]
    made: dict[str, Any] = {}
    exec(block, made)

    class Agent:
        def __init__(self) -> None:
            self.steps = 0

        async def reset(self, states: dict[str, Any]) -> dict[str, Any]:
            return {"observation": states["observation"]}

        async def step(self, states: dict[str, Any]) -> dict[str, Any]:
            self.steps += 1
            assert isinstance(states["action_text"], str)
            rewards = torch.tensor(self.steps + states["label"])
            return {"rewards": rewards, "done": self.steps == 2, "environment_feedback": "Again."}

    problems = [SimpleNamespace(id=n, prompt=f"Count to {n}.", label=0.25) for n in range(4)]
    keys = dict(zip((name.removeprefix("--") for name in SMALL[::2]), SMALL[1::2], strict=True))
    settings = checked(keys, source="test", strict=False) | {"engine.max_model_len": 600, "data.held_out": 0}
    fastgrpo.train(
        settings, model=save_chat_model(tmp_path / "policy"), environment=made["Stepping"](Agent), dataset=problems
    )
    step = first_step(tmp_path / "runs" / "run")
    assert (step["infrastructure"], step["reward/total"]) == (0, 3.5)


@pytest.mark.jail
def test_every_metric_has_its_meaning_in_the_docs(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What switches add included, and what a task of one's own does not."""
    more = ["--grpo.refill=1", "--grpo.overlong_penalty_tokens=4", "--grpo.curriculum=0.5", "--grpo.kl_weight=0.1"]
    names: set[str] = set()
    for name, added in (("reward_function.py", more), ("code_task.py", ["--grpo.max_lag=1"])):
        monkeypatch.setattr(sys, "argv", [name, "--model", str(model), *SMALL, *added, "--name", name])
        runpy.run_path(str(ROOT / "examples" / name))["main"]()
        names |= first_step(tmp_path / "runs" / name).keys()
    assert {"groups_refilled", "reward/overlong", "lag", "pass_rate", "grad_norm"} <= names
    known = set(re.findall(r"`([\w/]+)`", (ROOT / "docs" / "metrics.md").read_text()))
    known |= {f"seconds/{phase}" for phase in known}
    assert names - known - {"stage", "step", "time", "reward/right_count", "reward/brevity"} == set()
    assert {name for name in names if "/" not in name} - OWN_METRICS == {"pass_rate", "solved"}


def python_blocks() -> list[str]:
    """The snippets of docs/own-task.md, without the line that says why one is not run."""
    text = (ROOT / "docs/own-task.md").read_text()
    return re.findall(r"^```python\n(?:# not run.*?\n)?(.*?)^```$", text, re.M | re.S)


def scripts() -> tuple[str, str]:
    """TRL's script and ours, as docs/own-task.md has them."""
    blocks = python_blocks()
    (theirs,) = [block for block in blocks if "GRPOTrainer(" in block]
    (ours,) = [block for block in blocks if 'model="PATH"' in block and "from datasets" in block]
    return theirs, ours


def test_a_trl_script_becomes_ours_with_ten_changed_lines_at_most() -> None:
    theirs, ours = (text.splitlines() for text in scripts())
    changes = difflib.SequenceMatcher(None, theirs, ours, autojunk=False).get_opcodes()
    changed = sum(max(b - a, d - c) for kind, a, b, c, d in changes if kind != "equal")
    assert 0 < changed <= 10


def test_our_version_of_the_trl_script_trains(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = SimpleNamespace(from_list=lambda rows: rows)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(Dataset=dataset))
    text = scripts()[1].replace('model="PATH"', f"model={str(model)!r}").replace('"grpo.steps": 20', '"grpo.steps": 1')
    assert str(model) in text
    exec(compile(text, "docs/own-task.md", "exec"), {"__name__": "__main__"})
    step = first_step(tmp_path / "runs" / "colours")
    assert step["rollouts"] == 64
    assert 0 < step["reward/total"] == pytest.approx(step["reward/right_count"])


def test_the_batch_script_is_sound() -> None:
    subprocess.run(["bash", "-n", str(ROOT / "examples" / "slurm.sbatch")], check=True)


@pytest.mark.parametrize("begun", [False, True])
def test_the_batch_script_starts_one_torchrun_a_node(tmp_path: Path, begun: bool) -> None:
    """What Slurm's programs are asked for, by stand-ins. One that writes a line at a time must not end the script."""
    stand_ins = {"srun": 'echo "srun $*"', "scontrol": "echo first; sleep 0.1; echo second"}
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    if begun:
        (tmp_path / "runs/coder").mkdir(parents=True)
        (tmp_path / "runs/coder/config.toml").touch()
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MODEL": "here", "NAME": "coder", "SLURM_NNODES": "2"}
    variables |= {"SLURM_JOB_ID": "70123", "SLURM_CPUS_PER_TASK": "96", "SLURM_JOB_NODELIST": "first,second"}
    script = ["bash", str(ROOT / "examples" / "slurm.sbatch"), "--grpo.steps", "5"]
    done = subprocess.run(script, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    launch = "srun --kill-on-bad-exit=1 torchrun --nnodes=2 --nproc-per-node=8 --rdzv-id=70123 --rdzv-backend=c10d"
    program = "-m fastgrpo.train --model here --name coder --task code --grpo.steps 5" + " --resume" * begun
    assert done.stdout.splitlines()[-1] == f"{launch} --rdzv-endpoint=first:20123 {program}"


def test_the_image_is_run_with_the_flags_that_the_jails_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgrpo_sandbox.requirements.fixes", lambda: [])
    flags = re.findall(r"--security-opt [\w=]+", explain("Operation not permitted"))
    text = (ROOT / "examples" / "Dockerfile").read_text()
    assert len(flags) == 3
    assert all(flag in text for flag in flags)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.toml")), ids=lambda path: path.stem)
def test_settings_are_read_whole(path: Path) -> None:
    assert resolve(read_toml(path)).workers.kind == "openai"
