"""The engine in a loop of the reader's own, as docs/own-task.md has it."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine
DOCS = Path(__file__).parents[2] / "docs" / "own-task.md"


def test_the_loop_of_the_docs_runs(tiny_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", DOCS.read_text(), re.M | re.S)
    (loop,) = [block for block in blocks if "with open_engine(" in block]
    update = "\n        for parameter in policy.model.parameters():\n            parameter.data.mul_(1.01)\n"
    names: dict[str, object] = {}
    exec(loop.replace('"PATH"', repr(str(tiny_folder))).replace("        ...", update), names)
    reports = [line.split() for line in capfd.readouterr().out.splitlines() if re.fullmatch(r"\d+ [\d.e-]+", line)]
    assert [copied for copied, _ in reports] == ["0", "0"]
    assert len(names["done"]) == 8  # type: ignore[arg-type]
