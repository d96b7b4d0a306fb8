"""Writes word problems in GSM8K's form, to try problems without tests offline: `python examples/make_numbers.py FILE`.

They are made from templates of one to six steps, so that longer ones are harder to the simulated worker. For anything
but a trial take GSM8K itself.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

NAMES = ("Ann", "Bo", "Cleo", "Dev", "Eli", "Fay", "Gus", "Hana")
THINGS = ("apples", "books", "coins", "stamps", "marbles", "shells")
STEPS = (
    ("{name} buys {n} more.", "{total} + {n} = {after}", lambda total, n: total + n),
    ("{name} gives {n} to a friend.", "{total} - {n} = {after}", lambda total, n: total - n),
    ("{name} wins as many as there were, {n} times.", "{total} * {m} = {after}", lambda total, n: total * (n + 1)),
)


def question(number: int) -> dict[str, str]:
    """The `number`-th problem: {question, answer}."""
    draw = random.Random(number)
    name, things, total = draw.choice(NAMES), draw.choice(THINGS), draw.randint(20, 90)
    told, worked = [f"{name} has {total} {things}."], []
    for _ in range(1 + number % 6):
        tell, work, then = draw.choice(STEPS)
        n = draw.randint(1, 3)
        after = then(total, n)
        told.append(tell.format(name=name, n=n))
        worked.append(work.format(total=total, n=n, m=n + 1, after=after))
        total = after
    return {
        "question": " ".join([*told, f"How many {things} does {name} have now?"]),
        "answer": "\n".join([*worked, f"#### {total:,}"]),
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/make_numbers.py FILE")
    lines = [json.dumps(question(number)) for number in range(120)]
    try:
        Path(sys.argv[1]).write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        sys.exit(f"error: cannot write {sys.argv[1]}: {error.strerror}; name another file")
