"""What the engine's benchmarks share: the shapes with random weights, the workload, clocks, a table.

MFU counts 6 FLOP a parameter and token of the layers, 6 of the head for loss tokens only, and causal attention, for
what is computed: a prompt that a group shares once, and nothing for recomputation. Its base is the datasheet rate of an
H100 or H200, 989 TFLOP/s.
"""

from __future__ import annotations

import asyncio
import atexit
import copy
import datetime
import gc
import json
import platform
import random
import string
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import uvloop
from model_shapes import CUDA, GIB, device_name, random_model, shape, timed
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastgrpo.engine.engine import Engine
from fastgrpo.engine.engine_process import EngineProcess
from fastgrpo.engine.opening import AnyEngine
from fastgrpo.policy.chat import Chat
from fastgrpo.policy.demo_policy import END
from fastgrpo.policy.loading import load_policy
from fastgrpo.rollouts.environment import Environment
from fastgrpo.rollouts.rollouts import collect
from fastgrpo.types import Group, Result, Reward, Rollout, Sampling

rows: list[tuple[str, str]] = []


def report(what: str, value: str) -> None:
    """One line of the table, printed as soon as it is known."""
    rows.append((what, value))
    print(f"{what:<70} {value}", flush=True)


def save(path: Path, title: str) -> None:
    """The table, with what it was measured on and the command that made it."""
    import transformers
    import vllm

    versions = f"torch {torch.__version__}, vLLM {vllm.__version__}, transformers {transformers.__version__}"
    lines = [
        f"# {title}",
        "",
        f"{device_name()}; {versions}; Python {platform.python_version()}; {datetime.date.today()}",
        "",
        f"    python bench/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}",
        "",
        "| what | measured |",
        "| --- | --- |",
        *(f"| {what.strip()} | {value} |" for what, value in rows),
        "",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")


def letter_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One token for each byte and never a merge, so that a text of letters is a prompt of as many tokens.

    Every id of the model decodes to something. The end token is the last: a random model draws it now and then, and
    `Endless` goes on.
    """
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    names += [f"x{number}" for number in range(len(names), vocab_size - 1)] + [END]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def save_model(size: str, folder: str | Path) -> None:
    """The random model and its tokenizer, into `folder`."""
    random_model(size, "cuda" if CUDA else "cpu").save_pretrained(folder)
    letter_tokenizer(shape(size).vocab_size).save_pretrained(folder)
    release_memory()


@contextmanager
def saved_model(size: str) -> Iterator[str]:
    """A folder with the random model and its tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(size, folder)
        yield folder


def used_gib(device: int | None = None) -> float:
    """Memory in use on the device (the present one), by the driver's count."""
    if not CUDA:
        return float("nan")
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / GIB


class MemoryPeaks:
    """The driver's count of memory in use, read every 20 ms by a thread: the peak of each phase, in GiB."""

    def __init__(self) -> None:
        self.phase, self.peaks = "start", dict[str, float]()
        self._device = torch.cuda.current_device() if CUDA else None
        self._over, self._thread = threading.Event(), threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        # A thread inside the driver's code when Python ends would end the program by an error.
        atexit.register(self._end)

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self.peaks[self.phase] = max(self.peaks.get(self.phase, 0.0), used_gib(self._device))

    def _end(self) -> None:
        self._over.set()
        self._thread.join()

    def take(self) -> dict[str, float]:
        """The peaks since the last call."""
        peaks, self.peaks = self.peaks, {}
        return peaks


class Trivial:
    """An environment that costs nothing: half of each group is right."""

    def __init__(self, texts: dict[str, str]) -> None:
        self.texts = texts

    def prompt(self, problem: Any) -> str:
        return self.texts[problem.id]

    async def execute(self, problem: Any, completion: str, seed: int) -> None:
        return None

    def feedback_text(self, execution: Any) -> str:
        return ""

    def results(self, problem: Any, rollouts: list[Rollout]) -> list[Result]:
        return [Result(reward=Reward(total=float(number % 2))) for number in range(len(rollouts))]


class Workload:
    """64 prompts of 512 random letters and groups of 8 completions of 1,024 tokens; on a CPU a few short ones."""

    def __init__(self, size: str) -> None:
        self.vocab = shape(size).vocab_size
        self.prompts, self.group = (64, 8) if CUDA else (8, 4)
        self.prompt_tokens, self.completion_tokens = (512, 1024) if CUDA else (64, 32)
        self.max_model_len = self.prompt_tokens + self.completion_tokens + 32

    def shorter(self) -> Workload:
        """The same with a quarter of the completions' length."""
        short = copy.copy(self)
        short.completion_tokens //= 4
        return short

    @property
    def sequences(self) -> int:
        return self.prompts * self.group

    @property
    def generated(self) -> int:
        """Tokens generated in a step."""
        return self.sequences * self.completion_tokens

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of two whole groups, whose prompts are computed once."""
        return 2 * (self.prompt_tokens + self.group * self.completion_tokens)

    def text(self, draw: random.Random) -> str:
        """A prompt."""
        return "".join(draw.choices(string.ascii_letters, k=self.prompt_tokens))

    def problems(self, seed: int, count: int | None = None) -> tuple[list[Any], Trivial]:
        """`count` problems, those of one step where it is None, and the environment that knows their texts."""
        draw = random.Random(seed)
        texts = {f"p{number}": self.text(draw) for number in range(count or self.prompts)}
        made = [SimpleNamespace(id=name, prompt=text, difficulty=0.5) for name, text in texts.items()]
        return made, Trivial(texts)

    def prompt_ids(self, encode: Callable[[str], list[int]]) -> list[list[int]]:
        """The token ids of each sequence's prompt: `group` of each problem of a step."""
        problems, environment = self.problems(1)
        encoded = [encode(environment.prompt(problem)) for problem in problems]
        return [ids for ids in encoded for _ in range(self.group)]

    def sampling(self) -> Sampling:
        return Sampling(max_new_tokens=self.completion_tokens, max_model_len=self.max_model_len)


class Endless:
    """An engine whose completions never end before their last token."""

    def __init__(self, engine: AnyEngine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def submit(self, key: int, prompt_ids: Sequence[int], **sampling: Any) -> None:
        self._engine.submit(key, prompt_ids, **sampling | {"stop_token_ids": ()})


class Setup:
    """One engine and one policy that lives in its memory."""

    def __init__(
        self,
        folder: str,
        work: Workload,
        *,
        kv_gib: float = 16.0,
        parity_threshold: float = 0.2,
        engine: Callable[..., Any] = EngineProcess if CUDA else Engine,
    ) -> None:
        self.folder, self.work, self.kv_gib = folder, work, kv_gib
        options: dict[str, Any] = {
            "dtype": "bfloat16" if CUDA else "float32",
            "kv_cache_gib": kv_gib if CUDA else 0.2,
            "max_model_len": work.max_model_len,
            "max_num_seqs": work.sequences,
            "parity_threshold": parity_threshold,
        }
        self.engine, self.start_seconds = timed(lambda: engine(folder, **options))
        dtype = torch.bfloat16 if CUDA else torch.float32
        self.policy = load_policy(folder, device="cuda" if CUDA else "cpu", dtype=dtype)
        self.first_sync = self.engine.sync(self.policy)

    def collect(self, problems: Sequence[Any], environment: Environment, seed: int) -> list[Group]:
        """Rollouts as the training loop collects them."""
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(self.rollouts(problems, environment, seed))

    async def rollouts(self, problems: Sequence[Any], environment: Environment, seed: int) -> list[Group]:
        """`collect`, in a running loop."""
        engine: Any = Endless(self.engine)
        return await collect(
            engine,
            environment,
            Chat(self.policy.tokenizer),
            problems,
            group_size=self.work.group,
            sampling=self.work.sampling(),
            seed=seed,
        )


def release_memory() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def start_peak(kv_gib: float) -> float:
    """Reset torch's peak; the GiB of a sleeping KV cache, which torch goes on counting though it is not there."""
    if not CUDA:
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    return kv_gib if torch.cuda.memory_allocated() / GIB > used_gib() else 0.0


def emit(name: str, values: dict[str, Any]) -> None:
    """A line of JSON for the parent process."""
    print("JSON " + json.dumps({"name": name} | values), flush=True)


def run_child(command: Sequence[str], environment: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Run a benchmark in a process of its own, show what it prints, return its lines of JSON."""
    found = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("JSON "):
                found.append(json.loads(line.removeprefix("JSON ")))
            print(line, end="", flush=True)
    if child.returncode:
        report(f"{' '.join(Path(word).name for word in command[1:])} ended with", str(child.returncode))
    return found
