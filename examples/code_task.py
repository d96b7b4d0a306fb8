"""The plain code task on problems of your own: `python examples/code_task.py --model PATH --grpo.steps 20`.

The policy writes a program, the jails run the tests, the share of hidden ones that pass is the reward. problems.jsonl
beside this file shows the form of a problem; from the shell the same is

    python -m fastgrpo.train --task code --dataset examples/problems.jsonl --model PATH
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

import fastgrpo
from fastgrpo.cli import parse
from fastgrpo.program import run_program

PROBLEMS = Path(__file__).with_name("problems.jsonl")


def main() -> None:
    """Train `--model` to write programs; two of the problems are kept for evaluation."""
    command = parse(sys.argv[1:], program="examples.code_task")
    data = msgspec.structs.replace(command.config.data, dataset=str(PROBLEMS), held_out=2)
    config = msgspec.structs.replace(command.config, task="code", data=data)
    fastgrpo.train(config, resume=command.resume, dry_run=command.dry_run)


if __name__ == "__main__":
    run_program(main)
