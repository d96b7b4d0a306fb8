"""The server and the rewards under the peers' own code, where their packages are installed: sandbox-fusion, verl and
tinker-cookbook (both with --no-deps), and trl."""

from __future__ import annotations

import asyncio
import importlib.util
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from fastgrpo_sandbox.rewards import code_reward, compute_score
from tests.sandbox.server import Server, running_server

pytestmark = pytest.mark.jail
RIGHT = "```python\nprint(int(input()) + 1)\n```"
CASES = {"inputs": ["1\n", "2\n"], "outputs": ["2\n", "2\n"]}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server("--cells", "2", "--preload", "numpy") as server:
        yield server


def needs(*packages: str) -> pytest.MarkDecorator:
    """Skips a test before its fixtures, a server or torch's import, where a package is not installed."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.mark.skipif(missing != [], reason=f"not installed: {', '.join(missing)}")


def file_of(package: str, path: str) -> ModuleType:
    """One file of a package, without importing what the whole package needs."""
    found = importlib.util.find_spec(package)
    assert found is not None
    name = f"peer_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, Path(found.submodule_search_locations[0]) / path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs("sandbox_fusion")
def test_sandbox_fusions_own_client(server):
    import sandbox_fusion as fusion

    ask = {"endpoint": server.url, "max_attempts": 1}
    answer = fusion.run_code(fusion.RunCodeRequest(code="print(input())", language="python", stdin="in"), **ask)
    assert (answer.status, answer.run_result.stdout) == (fusion.RunStatus.Success, "in\n")
    late = fusion.run_code(fusion.RunCodeRequest(code="while True: pass", language="python", run_timeout=0.5), **ask)
    assert (late.status, late.run_result.status) == (fusion.RunStatus.Failed, "TimeLimitExceeded")
    row = {"id": 1, "content": "", "test": ["assert f(1) == 2", "assert f(1) == 3"], "labels": {}}
    request = fusion.SubmitRequest(
        dataset="any", id=1, completion="```python\ndef f(x):\n    return x + 1\n```", config={"provided_data": row}
    )
    judged = fusion.submit(request, **ask)
    assert (judged.accepted, [case.passed for case in judged.tests]) == (False, [True, False])


@needs("verl")
def test_verls_client(server):
    verl = file_of("verl", "utils/reward_score/sandbox_fusion/utils.py")
    programs = {
        "print(int(input()) + 1)": [True, False],
        "int('x')": [-2, -2],
        "while True: pass": [-3, -3],
    }
    for program, wanted in programs.items():
        found, _ = verl.check_correctness(f"{server.url}/run_code", CASES, program, timeout=1)
        assert found == wanted
    calls = {"fn_name": "f", "inputs": ["1", "2"], "outputs": ["2", "4"]}
    found, _ = verl.check_correctness(f"{server.url}/run_code", calls, "def f(x):\n    return x + 1", timeout=5)
    assert found == [True, False]


def test_verls_score_is_ours():
    assert compute_score("taco", RIGHT, CASES) == 0.5


@needs("tinker_cookbook")
def test_tinkers_recipe(server):
    """Its harness runs whole in the jail: files that import each other, numpy, signals."""
    client_file = file_of("tinker_cookbook", "sandbox/sandboxfusion.py")
    harness = file_of("tinker_cookbook", "recipes/code_rl/lcb_utils.py")

    async def judged(program: str) -> bool:
        client = client_file.SandboxFusionClient(url=f"{server.url}/run_code")
        cases = '{"input_output": "{\\"inputs\\": [\\"1\\"], \\"outputs\\": [\\"2\\"]}"}'
        files = {"test_cases.txt": cases, "code.py": program, "testing_util.py": harness.TEST_UTIL}
        passed, answer = await client.run(harness.TEST_CODE % {"timeout": 6}, files, timeout=10)
        await client.close()
        assert answer["run_result"]["status"] == "Finished", answer
        return passed

    assert asyncio.run(judged("print(int(input()) + 1)")) is True
    assert asyncio.run(judged("print(int(input()))")) is False


@needs("trl", "datasets")
def test_trls_trainer(tiny_folder, tmp_path):
    """Two steps of GRPO on the CPU; the rewards arrive as TRL logs them."""
    import datasets
    import trl

    rows = datasets.Dataset.from_dict({"prompt": ["def f(x):\n"] * 8, "asserts": [["assert f(1) == 2"]] * 8})
    settings = trl.GRPOConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, num_generations=4,
        max_completion_length=8, logging_steps=1, report_to=[], use_cpu=True, bf16=False, save_strategy="no",
    )  # fmt: skip
    trainer = trl.GRPOTrainer(str(tiny_folder), reward_funcs=[code_reward], args=settings, train_dataset=rows)
    trainer.train()
    logged = [
        line["rewards/code_reward/mean"] for line in trainer.state.log_history if "rewards/code_reward/mean" in line
    ]
    assert logged == [0.0, 0.0]


@needs("trl", "datasets")
def test_the_example_of_trl_runs(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "trl_with_our_jails.py"))["main"](str(tiny_folder), 1)
    assert (tmp_path / "runs" / "trl").is_dir()
