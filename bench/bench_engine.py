"""The colocated engine on one device: is the sync zero-copy and right, and what does a GRPO step cost.

    python bench/bench_engine.py [--size 1.5b] [--parts check,memory,train,step] [--save bench/results/engine.md]

The model has the Qwen2.5 shape with random weights. Checks: parity between vLLM and the trainer before and after
optimizer steps, bytes copied by a sync, what sleep frees. Measures: sync, sleep and wake; packed forward and backward;
a whole GRPO step of 64 prompts x 8 completions (prompt 512, completion 1024 tokens) with a trivial reward.
MFU counts 6 FLOP a parameter and token of the layers, 6 of the head for loss tokens only, and causal attention;
recomputation is not counted. Its base is the datasheet rate of an H100 or H200, 989 TFLOP/s.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from fastgrpo.config import Grpo
from fastgrpo.engine import Engine
from fastgrpo.learner import update
from fastgrpo.loss import policy_loss
from fastgrpo.model import Policy, load_policy
from fastgrpo.optimizer import AdamW
from fastgrpo.packing import pack
from fastgrpo.tiny import train_tokenizer
from fastgrpo.types import Sample

SHAPES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28},
}
PEAK_FLOPS = 989e12
GIB = 2**30
KV_GIB = 24.0

rows: list[tuple[str, str]] = []


def report(what: str, value: str) -> None:
    """One line of the table, printed as soon as it is known."""
    rows.append((what, value))
    print(f"{what:<58} {value}", flush=True)


def save_random_model(folder: Path, size: str, device: str) -> None:
    """The Qwen2.5 shape with weights twice the usual size, so that its distributions are not flat."""
    tokenizer = train_tokenizer(["def f(x): return x"], 512)
    config = Qwen2Config(
        vocab_size=2048 if size == "tiny" else 152064 if size == "7b" else 151936,
        num_key_value_heads=4 if size == "7b" else 2,
        max_position_embeddings=32768,
        rope_theta=1e6,
        tie_word_embeddings=size != "7b",
        **SHAPES[size],
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Bench:
    """One engine and one policy, and the clock of their device."""

    def __init__(self, size: str, device: str, *, with_engine: bool) -> None:
        self.size, self.cuda = size, device == "cuda"
        self.prompts, self.group = (64, 8) if self.cuda else (8, 8)
        self.prompt_tokens, self.completion_tokens = (512, 1024) if self.cuda else (128, 128)
        with tempfile.TemporaryDirectory() as folder:
            save_random_model(Path(folder), size, device)
            if with_engine:
                self.engine, seconds = self.timed(lambda: self.start(folder))
                report("engine start, s", f"{seconds:.1f}")
            dtype = torch.bfloat16 if self.cuda else torch.float32
            self.policy = load_policy(folder, device=device, dtype=dtype)

    def start(self, folder: str) -> Engine:
        """vLLM with room for one step's sequences at once."""
        return Engine(
            folder,
            max_model_len=self.prompt_tokens + self.completion_tokens + 32,
            max_num_seqs=self.prompts * self.group,
            dtype="bfloat16" if self.cuda else "float32",
            kv_cache_gb=KV_GIB if self.cuda else 0.2,
            parity_limit=0.2,
        )

    def timed(self, function: Callable[[], object]) -> tuple[object, float]:
        """The function's result and its seconds, to the end of its work on the device."""
        self.synchronize()
        start = time.perf_counter()
        result = function()
        self.synchronize()
        return result, time.perf_counter() - start

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def used_gib(self) -> float:
        """Memory in use on the device, by the driver's count."""
        if not self.cuda:
            return float("nan")
        free, total = torch.cuda.mem_get_info()
        return (total - free) / GIB

    def allocated_peak(self, function: Callable[[], object]) -> tuple[object, float, float]:
        """As `timed`, and the peak of torch's allocator in GiB without the KV cache, which sleeps meanwhile."""
        if not self.cuda:
            return *self.timed(function), float("nan")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        # The allocator goes on counting a sleeping KV cache, which the driver has mapped out.
        counted = KV_GIB if torch.cuda.memory_allocated() / GIB > self.used_gib() else 0.0
        result, seconds = self.timed(function)
        return result, seconds, torch.cuda.max_memory_allocated() / GIB - counted

    def generate(self, completion_tokens: int, *, seeded: bool = False) -> list[Sample]:
        """One batch of rollouts with a reward of nothing but the key's parity: half of each group is right."""
        generator = torch.Generator().manual_seed(1)
        vocab = self.policy.head_weight.shape[0]
        prompts = torch.randint(vocab, (self.prompts, self.prompt_tokens), generator=generator).tolist()
        for key in range(self.prompts * self.group):
            seed = key if seeded else None
            self.engine.submit(key, prompts[key // self.group], max_tokens=completion_tokens, seed=seed)
        samples = []
        while self.engine.busy:
            for done in self.engine.step():
                prompt = prompts[done.key // self.group]
                blank = [0] * len(prompt)
                mask, logprobs = blank + [1] * len(done.token_ids), [0.0] * len(prompt) + done.logprobs
                samples.append(Sample(prompt + done.token_ids, mask, logprobs, 1.0 if done.key % 2 else -1.0))
        return samples

    def optimizer(self) -> AdamW:
        return AdamW(self.policy.model.parameters(), lr=1e-6 if self.cuda else 1e-3)

    def flops(self, samples: list[Sample]) -> float:
        """Useful floating-point operations of forward and backward."""
        config = self.policy.model.config
        head = self.policy.head_weight.numel()
        embedding = self.policy.model.get_input_embeddings().weight.numel()
        total = sum(p.numel() for p in self.policy.model.parameters())
        body = total - embedding - (0 if config.tie_word_embeddings else head)
        tokens = sum(len(sample.token_ids) for sample in samples)
        attention = sum(6 * config.num_hidden_layers * config.hidden_size * len(s.token_ids) ** 2 for s in samples)
        return 6 * body * tokens + 6 * head * sum(sample.loss_tokens for sample in samples) + attention


def check(bench: Bench) -> None:
    """Parity before and after steps; a sync copies nothing after the first."""
    first = bench.engine.sync(bench.policy)
    report("first sync: GiB copied, s", f"{first.bytes_copied / GIB:.2f}, {first.seconds:.3f}")
    report("parity before steps, nats mean / max", f"{first.parity_mean:.4f} / {first.parity_max:.4f}")
    _against_fp32(bench)
    optimizer = bench.optimizer()
    optimizer.lr = 1e-4
    samples = bench.generate(16)[:8]
    bench.engine.sync(bench.policy)
    before = bench.engine.score([samples[0].token_ids])[0]
    reports = []
    for _ in range(3):
        update(bench.policy, optimizer, samples, Grpo(), budget=8192)
        bench.synchronize()
        reports.append(bench.engine.sync(bench.policy))
    after = bench.engine.score([samples[0].token_ids])[0]
    moved = sum(abs(a - b) for a, b in zip(before, after, strict=True)) / len(after)
    worst = max(reports, key=lambda r: r.parity_mean)
    report("parity after 3 steps, nats mean / max", f"{worst.parity_mean:.4f} / {worst.parity_max:.4f}")
    report("moved by the 3 steps, nats mean", f"{moved:.4f}")
    report("sync: bytes copied, ms, canary ms", _sync_line(reports[-1]))
    assert all(r.bytes_copied == 0 for r in reports)
    assert moved > 5 * worst.parity_mean or not bench.cuda, "the steps must be visible above the parity noise"


def _against_fp32(bench: Bench) -> None:
    """How far both are from the same weights in fp32: parity cannot be better than bf16 itself."""
    exact = Policy(copy.deepcopy(bench.policy.model).float(), bench.policy.tokenizer)
    sequences = torch.randint(2048, (4, 48), generator=torch.Generator().manual_seed(2)).tolist()
    truth = torch.cat(exact.logprobs(sequences)).cpu()
    theirs = torch.tensor([logprob for scores in bench.engine.score(sequences) for logprob in scores])
    ours = torch.cat(bench.policy.logprobs(sequences)).cpu()
    off = [float((logprobs - truth).abs().mean()) for logprobs in (theirs, ours)]
    report("distance from fp32, nats mean: vLLM, trainer", f"{off[0]:.4f}, {off[1]:.4f}")


def _sync_line(sync: object) -> str:
    return f"{sync.bytes_copied}, {sync.seconds * 1e3:.2f}, {sync.check_seconds * 1e3:.0f}"


def memory(bench: Bench) -> None:
    """What sleep frees, and that generation is right after it."""
    if bench.cuda:
        torch.cuda.empty_cache()
    awake = bench.used_gib()
    _, slept = bench.timed(bench.engine.sleep)
    asleep = bench.used_gib()
    _, woke = bench.timed(bench.engine.wake)
    report("memory awake -> asleep, GiB", f"{awake:.1f} -> {asleep:.1f}")
    report("sleep, wake, s", f"{slept:.3f}, {woke:.3f}")
    report("parity after wake, nats mean", f"{bench.engine.sync(bench.policy).parity_mean:.4f}")


def fake_samples(bench: Bench, tokens: int) -> list[Sample]:
    length = bench.prompt_tokens + bench.completion_tokens
    vocab = bench.policy.head_weight.shape[0]
    mask = [0] * bench.prompt_tokens + [1] * bench.completion_tokens
    return [
        Sample(torch.randint(vocab, (length,)).tolist(), mask, [0.0] * length, 1.0) for _ in range(tokens // length)
    ]


def train(bench: Bench) -> None:
    """Packed forward, loss head and backward: tokens/s, MFU and memory; layers compiled or not."""
    for compiled in (False, True) if bench.cuda else (False,):
        if compiled:
            bench.policy.compile_layers()
        for checkpointing in (False, True):
            bench.policy.activation_checkpointing(checkpointing)
            _train_once(bench, 16384, f"compiled {_yes(compiled)}, checkpointing {_yes(checkpointing)}")


def _train_once(bench: Bench, budget: int, name: str) -> None:
    samples = fake_samples(bench, budget)
    (batch,) = pack(samples, [1e-6] * len(samples), budget, bench.policy.device)
    config = Grpo(tis_cap=0.0)

    def run() -> None:
        for _ in range(4 if bench.cuda else 1):
            policy_loss(bench.policy, batch, config).loss.backward()

    _, warm = bench.timed(run)
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
    seconds = sorted(bench.timed(run)[1] for _ in range(3))[1] / (4 if bench.cuda else 1)
    peak = (torch.cuda.max_memory_allocated() - start) / GIB if bench.cuda else float("nan")
    bench.policy.model.zero_grad()
    mfu = bench.flops(samples) / seconds / PEAK_FLOPS
    tokens = len(batch.input_ids_T)
    report(
        f"forward + backward, {budget} tokens, {name}",
        f"{tokens / seconds:,.0f} tokens/s, MFU {mfu:.1%}, activations {peak:.1f} GiB (first {warm:.0f} s)",
    )


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def step(bench: Bench) -> None:
    """Whole GRPO steps as the loop runs them: sync, generate, sleep, train, wake; fast, then lean on memory."""
    if bench.cuda:
        bench.policy.compile_layers()
    optimizer = bench.optimizer()
    bench.engine.sync(bench.policy)
    for name, tokens, checkpointing in (("fast", 16384, False), ("fast", 16384, False), ("lean", 8192, True)):
        bench.policy.activation_checkpointing(checkpointing)
        _, sync_s = bench.timed(lambda: bench.engine.sync(bench.policy))
        samples, generate_s = bench.timed(lambda: bench.generate(bench.completion_tokens))
        _, sleep_s = bench.timed(bench.engine.sleep)
        train = partial(update, bench.policy, optimizer, samples, Grpo(), budget=tokens)
        metrics, train_s, peak = bench.allocated_peak(train)
        _, wake_s = bench.timed(bench.engine.wake)
        generated = bench.prompts * bench.group * bench.completion_tokens
        report(
            f"GRPO step, {name} ({tokens} tokens, checkpointing {_yes(checkpointing)}), s",
            f"{sync_s + generate_s + sleep_s + train_s + wake_s:.1f} = generate {generate_s:.1f} "
            f"({generated / generate_s:,.0f} tokens/s) + train {train_s:.1f} "
            f"(MFU {bench.flops(samples) / train_s / PEAK_FLOPS:.1%}, allocator peak {peak:.1f} GiB) "
            f"+ sync, sleep, wake {sync_s + sleep_s + wake_s:.2f}",
        )
        report("  vLLM against trainer over the batch, nats mean", f"{metrics['sampler_parity']:.4f}")
    _, seconds = bench.timed(lambda: bench.generate(128, seeded=True))
    report("generation with a seed for each request, tokens/s", f"{bench.prompts * bench.group * 128 / seconds:,.0f}")


def save(path: Path, size: str, arguments: str) -> None:
    """The table with what it was measured on."""
    import transformers
    import vllm

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    versions = f"torch {torch.__version__}, vLLM {vllm.__version__}, transformers {transformers.__version__}"
    lines = [
        f"# The engine, {size}",
        "",
        f"{device}; {versions}; Python {platform.python_version()}; {datetime.date.today()}",
        "",
        f"    python bench/bench_engine.py {arguments}",
        "",
        "| what | measured |",
        "| --- | --- |",
        *(f"| {what.strip()} | {value} |" for what, value in rows),
        "",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="1.5b")
    parser.add_argument("--parts", default="check,memory,train,step")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    parts: dict[str, Callable[[Bench], None]] = {"check": check, "memory": memory, "train": train, "step": step}
    names = options.parts.split(",")
    bench = Bench(options.size, "cuda" if torch.cuda.is_available() else "cpu", with_engine=names != ["train"])
    failed = 0
    for name in names:
        try:
            parts[name](bench)
        except Exception:
            failed = 1
            report(name, "FAILED")
            traceback.print_exc()
    if options.save:
        save(options.save, options.size, " ".join(sys.argv[1:]))
    return failed


if __name__ == "__main__":
    sys.exit(main())
