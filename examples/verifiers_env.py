"""An environment of the package verifiers, here of one's own: `python examples/verifiers_env.py --model PATH`.

From the shell, with any that is installed: `python -m fastgrpo.train --model PATH --environment verifiers:NAME`. Needs
`pip install 'fastgrpo[verifiers]'`, and a model whose chat template knows tools.
"""

from __future__ import annotations

import sys
from typing import Any

import fastgrpo
from fastgrpo.cli import parse
from fastgrpo.program import run_program


def add(a: float, b: float) -> float:
    """Add two numbers.

    Args:
        a: The first one.
        b: The second one.
    """
    return a + b


def right(completion: list[Any], answer: str) -> float:
    """1 where the last message ends with the answer."""
    return float(str(completion[-1].content).strip().rstrip(".").endswith(answer))


def brevity(completion: list[Any]) -> float:
    """Less for each character: what a policy that knows nothing can learn first."""
    return 1 / (1 + sum(len(str(message.content)) for message in completion))


def load_environment(rows: int = 40, max_turns: int = 4) -> Any:
    """What verifiers calls for an environment of this module's name."""
    import verifiers
    from datasets import Dataset

    made = Dataset.from_list(
        [{"question": f"What is {n} + {7 * n}?", "answer": str(8 * n)} for n in range(1, rows + 1)]
    )
    rubric = verifiers.Rubric(funcs=[right, brevity], weights=[1.0, 0.1])
    return verifiers.ToolEnv(tools=[add], dataset=made, rubric=rubric, max_turns=max_turns)


def main() -> None:
    """Train `--model` on it."""
    arguments = ["--environment", "verifiers:verifiers_env", "--data.held_out", "8", *sys.argv[1:]]
    command = parse(arguments, program="examples.verifiers_env")
    fastgrpo.train(command.config, resume=command.resume, dry_run=command.dry_run)


if __name__ == "__main__":
    run_program(main)
