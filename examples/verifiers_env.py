"""An environment of the package verifiers, here of one's own: `python examples/verifiers_env.py --model PATH`.

From the shell, with any that is installed: `python -m fastgrpo.train --model PATH --environment verifiers:NAME`. Needs
`pip install 'fastgrpo[verifiers]'`, and a model whose chat template knows tools.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import openai
import verifiers.v1 as vf

import fastgrpo
from fastgrpo.cli import parse
from fastgrpo.program import run_program

__all__ = ["Calculator", "Sums"]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
            "required": ["a", "b"],
        },
    },
}


class Sum(vf.TaskData):
    """A question and its answer."""

    answer: str


class SumTask(vf.Task[Sum]):
    """How a conversation about a sum is rewarded."""

    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        """1 where the last message ends with the answer."""
        return float(trace.last_reply.strip().rstrip(".").endswith(self.data.answer))

    @vf.reward(weight=0.1)
    async def brevity(self, trace: vf.Trace) -> float:
        """Less for each character: what a policy that knows nothing can learn first."""
        return 1 / (1 + sum(len(message.content or "") for message in trace.assistant_messages))


class SumsConfig(vf.TasksetConfig):
    """`rows`: how many sums there are."""

    rows: int = 40


class Sums(vf.Taskset[SumTask, SumsConfig]):
    """Sums of two numbers."""

    def load(self) -> Iterator[SumTask]:
        """One task for each."""
        for n in range(1, self.config.rows + 1):
            yield SumTask(Sum(prompt=f"What is {n} + {7 * n}?", answer=str(8 * n)), self.config.task)


class Calculator(vf.Harness[vf.HarnessConfig]):
    """The agent's loop, in this process: verifiers' own, as `null` and `bash`, are programs that it starts with uv."""

    EXECUTES_CODE = NEEDS_CONTAINER = False

    async def launch(
        self, ctx: Any, trace: Any, runtime: Any, endpoint: str, secret: str, mcp_urls: Any, data: Any
    ) -> vf.ProgramResult:
        """Ask, add what is to be added, until nothing is, or the conversation has become too long."""
        messages: list[Any] = (
            [{"role": "user", "content": data.prompt}] if isinstance(data.prompt, str) else data.prompt
        )
        calls: Any = True
        # Loopback has no TLS, and to read certificates takes 30 ms.
        options: dict[str, Any] = {"timeout": None, "http_client": openai.DefaultAsyncHttpxClient(verify=False)}
        async with openai.AsyncOpenAI(base_url=endpoint, api_key=secret, max_retries=0, **options) as client:
            while calls:
                try:
                    answer = await client.chat.completions.create(model=ctx.model, messages=messages, tools=[ADD])
                except openai.BadRequestError as error:
                    if "maximum context length" not in str(error):
                        raise
                    break
                message = answer.choices[0].message
                messages.append(message.model_dump(exclude_none=True))
                calls = message.tool_calls or ()
                for call in calls:
                    total = added(call.function.arguments)
                    messages.append({"role": "tool", "tool_call_id": call.id, "content": total})
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")


def added(arguments: str) -> str:
    """What the tool answers."""
    try:
        values = json.loads(arguments)
        return str(values["a"] + values["b"])
    except (ValueError, KeyError, TypeError) as error:
        return f"error: {error}"


def main() -> None:
    """Train `--model` on it."""
    how = json.dumps({"agent": {"runtime": {"type": "subprocess"}, "max_turns": 4}})
    arguments = ["--environment", "verifiers:verifiers_env", "--data.environment_args", how, "--data.held_out", "8"]
    command = parse([*arguments, *sys.argv[1:]], program="examples.verifiers_env")
    fastgrpo.train(command.config, resume=command.resume, dry_run=command.dry_run)


if __name__ == "__main__":
    run_program(main)
