"""Weak scaling over the GPUs of one host, and what becomes of a run there when one of its ranks is killed.

    python bench/bench_scaling.py [--ranks 1,2,4] [--parts loop,gather,failure] [--save FILE] [--section.key VALUE ...]

loop: `bench_loop.py` on each number of ranks, the same work for each; what each rank keeps of one rank's tokens/s.
gather: `bench_ranks.py` on the most ranks. failure: a rank of the loop is killed after the second step, and half as
many ranks go on from its checkpoint. Without `--ranks`: one, and every doubling up to the host's GPUs.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from engine_setup import Workload, report, run_child, save
from model_shapes import CUDA, SHAPES, chosen, named

PARTS = ("loop", "gather", "failure")
HERE = Path(__file__).parent
# Of the run that is killed: its length is not what is measured, nor is how long its checkpoints take to write.
SHORT = ["--steps", "6", "--size", "0.5b" if CUDA else "tiny", "--checkpoint.every", "1"]
START_S, END_S = 600.0, 120.0


def torchrun(ranks: int, program: str) -> list[str]:
    """The start of a command that runs a benchmark beside this one on `ranks` ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*launcher, str(HERE / program)]


def loop(counts: list[int], arguments: list[str]) -> None:
    """The loop on each of `counts` ranks."""
    alone = None
    for ranks in counts:
        for found in run_child([*torchrun(ranks, "bench_loop.py"), *arguments]):
            alone = found["a GPU"] if ranks == 1 else alone
            kept = f", {found['a GPU'] / alone:.1%} of one rank's" if alone and ranks > 1 else ""
            report(f"{ranks} ranks: tokens/s a GPU in all", f"{found['a GPU']:,.0f}{kept}")


def gather(ranks: int, size: str) -> None:
    """The all-gather of the optimizer on `ranks` ranks."""
    for found in run_child([*torchrun(ranks, "bench_ranks.py"), "--size", size]):
        value = f"{found['ours']:.2f} over {found['floor']:.2f}: {found['ours'] / found['floor']:.2f}"
        report(f"all-gather of {found['gib']:.2f} GiB over {ranks} ranks, ms over NCCL's", value)


def failure(ranks: int, arguments: list[str], folder: Path) -> None:
    """Rank 1 of `ranks` is killed; half of them continue."""
    # A run is resumed with its own settings, on fewer ranks too.
    keys = [*arguments, *SHORT, f"--grpo.prompts_per_step={ranks * Workload('tiny').prompts}", "--folder", str(folder)]
    with tempfile.TemporaryFile() as said:
        command = [*torchrun(ranks, "bench_loop.py"), *keys]
        with subprocess.Popen(command, stderr=said) as agent:
            try:
                await_step(agent, folder, 2)
                members = psutil.Process(agent.pid).children(recursive=True)
                [victim] = [one for one in members if one.ppid() == agent.pid and one.environ().get("RANK") == "1"]
                begun = time.monotonic()
                victim.send_signal(signal.SIGKILL)
                agent.wait(END_S)
                _, left = psutil.wait_procs(members, END_S)
                seconds = time.monotonic() - begun
            finally:
                # Killed, it would leave its ranks behind.
                agent.terminate()
        said.seek(0)
        root = said.read().decode(errors="replace").rpartition("Root Cause")[2]
    first = re.search(r"rank +: (\d+) .*?exitcode +: (-?\d+)", root, re.DOTALL)
    named = f"rank {first[1]}, exit code {first[2]}" if first else "none"
    report(f"rank 1 of {ranks} killed: s until all had ended, the first error", f"{seconds:.1f}, {named}")
    report("  processes that did not end", str(len(left)))
    for found in run_child([*torchrun(ranks // 2, "bench_loop.py"), *keys, "--resume"]):
        report(f"  resumed on {ranks // 2}: last step", f"{found['step']:.0f} of 6")


def await_step(agent: subprocess.Popen[bytes], folder: Path, step: int) -> None:
    """Return when the run in `folder` has ended its `step`."""
    ends = time.monotonic() + START_S
    while not any((path / f"step-{step:06}").exists() for path in folder.glob("runs/*/checkpoints")):
        if agent.poll() is not None or time.monotonic() > ends:
            raise SystemExit(f"error: the run did not end its step {step} (exit status {agent.poll()})")
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--size", choices=SHAPES, default="1.5b" if CUDA else "tiny")
    parser.add_argument("--gather-size", choices=SHAPES, default="7b" if CUDA else "tiny")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--save", type=Path)
    options, keys = parser.parse_known_args()
    parts = chosen(parser, "--parts", options.parts, PARTS)
    gpus = torch.cuda.device_count() if CUDA else 2
    doubled = [str(2**power) for power in range(gpus.bit_length())]
    counts = [int(ranks) for ranks in chosen(parser, "--ranks", options.ranks or ",".join(doubled), doubled)]
    most = max(counts)
    if most == 1:
        parser.error("--ranks needs a number above 1: one rank has nothing to be compared with")
    if "loop" in parts:
        loop(counts, ["--size", options.size, "--steps", str(options.steps), *keys])
    if "gather" in parts:
        gather(most, options.gather_size)
    if "failure" in parts:
        with tempfile.TemporaryDirectory() as folder:
            failure(most, keys, Path(folder))
    if options.save:
        save(options.save, f"{', '.join(map(str, counts))} ranks of one host, {named(options.size)}")


if __name__ == "__main__":
    main()
