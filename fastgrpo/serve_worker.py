"""A worker model of one's own: `python -m fastgrpo.serve_worker --model FOLDER [--port 8000] [-- COMMAND ...]`.

Starts vLLM's own OpenAI-compatible server with settings that fit this machine, says when it answers and which keys
`[workers]` needs, and stops it on Ctrl-C or SIGTERM, or after COMMAND, which then begins. On a GPU it takes nine tenths
of the memory: give it one that trains nothing (CUDA_VISIBLE_DEVICES).
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from fastgrpo.errors import UserError, expanded
from fastgrpo.program import run_program

NAME = "worker"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
ELSEWHERE = "VLLM_USE_MODELSCOPE"  # where it is set names are not the hub's
START_S = 900.0
STOP_S = 20.0
# Without a GPU: one GiB of cache instead of most of the memory, and no prefill in pieces, during which a request with a
# seed ends the server ("CPU Generator does not use offset").
_CPU_FLAGS = ("--max-num-seqs", "32", "--enforce-eager", "--no-enable-chunked-prefill", "--max-num-batched-tokens")
# vLLM's own process sleeps between two steps where it would spin on a core that the model needs.
_CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_SLEEP_WHEN_IDLE": "1"}
# Up to so many cores all of them compute; vLLM would leave one to its own processes, of two the half.
_FEW_CORES = 4


def command_line(model: str, port: int, max_model_len: int, *, gpu: bool) -> list[str]:
    """The command that serves `model` to this machine alone; prompt and answer have `max_model_len` tokens together."""
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    address = ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port)]
    length = str(max_model_len)
    return [*server, *address, "--max-model-len", length, *(() if gpu else (*_CPU_FLAGS, str(2 * max_model_len)))]


def environment(of: Mapping[str, str], *, gpu: bool) -> dict[str, str]:
    """The server's environment: `of`, whose own settings win."""
    if gpu:
        return dict(of)
    cores = sorted(os.sched_getaffinity(0))
    few = {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))} if len(cores) <= _FEW_CORES else {}
    return _CPU_ENVIRONMENT | few | dict(of)


def refuse_unservable(model: str, max_model_len: int) -> None:
    """Raises `UserError` for what vLLM would end on with a traceback: no vLLM, model, tokenizer or length."""
    folder = Path(model)
    if find_spec("vllm") is None:
        raise UserError(
            "vLLM, which serves the model, is not installed: pip install 'fastgrpo[cpu]' or 'fastgrpo[gpu]'"
        )
    if max_model_len < 2:
        raise UserError(f"--max-model-len {max_model_len} leaves no room for a prompt and an answer: set 2 or more")
    if HUB_NAME.fullmatch(model) and not folder.exists():
        return
    if not folder.is_dir():
        wrong = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"model folder {model} {wrong}: --model takes a folder, or a name on the hub as OWNER/NAME")
    for pattern in ("config.json", "tokenizer*"):
        if not any(folder.glob(pattern)):
            raise UserError(
                f"--model {model} is no Hugging Face folder with its tokenizer: there is no {pattern} in it"
            )


def whole(model: str) -> str:
    """The `model`, whose home is in it; of an adapter, here or on the hub, the folder in which its base has it merged.

    Raises `UserError` where it cannot be.
    """
    folder = expanded(model)
    is_name = HUB_NAME.fullmatch(model) is not None and not folder.exists() and not os.environ.get(ELSEWHERE)
    if not (is_name or (folder / "adapter_config.json").is_file()) or find_spec("vllm") is None:
        return str(folder)
    from fastgrpo.config_keys import resolve
    from fastgrpo.policy.hub import is_adapter, with_local_model

    if is_name and not is_adapter(model):
        return model
    return with_local_model(resolve({"model.path": model})).model.path


def refuse_busy(port: int) -> None:
    """Raises `UserError` where the port is taken: what has it would answer in the server's place."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or "it is no port"
            raise UserError(f"port {port} cannot be served on: {reason}; choose another --port") from None


def wait_until_it_answers(server: subprocess.Popen[bytes], port: int) -> None:
    """Raises `UserError` where the server ends first or takes longer."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if (code := server.poll()) is not None:
            raise UserError(f"vLLM's server ended with exit status {code}: its reason is above")
        try:
            with direct.open(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise UserError(f"vLLM's server did not answer on port {port} within {START_S:g} s: try a smaller model")


def serve(command: list[str], variables: dict[str, str], port: int, then: Sequence[str] = ()) -> int:
    """Run the server until it ends or is interrupted; returns its exit status.

    Once it answers `then` is run, where it is given: the server is stopped after it, and its exit status is returned.
    """
    refuse_busy(port)
    with subprocess.Popen(command, env=variables, start_new_session=True) as server:
        try:
            wait_until_it_answers(server, port)
            print(
                f'the worker answers; set\n\n[workers]\nkind = "openai"\nbase_url = "http://127.0.0.1:{port}/v1"\n'
                f'model = "{NAME}"\n',
                flush=True,
            )
            return subprocess.call(then) if then else server.wait()
        finally:
            _stop(server)


def _stop(server: subprocess.Popen[bytes]) -> None:
    """The server and the processes it started, which are a group of their own, and may outlive it."""
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            server.wait(STOP_S)
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def main() -> int:
    """Serve one model."""
    parser = argparse.ArgumentParser(prog="python -m fastgrpo.serve_worker", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--model", required=True, help="Hugging Face causal LM: its folder or name on the hub, or an adapter's"
    )
    parser.add_argument("--port", type=int, default=8000, help="port on this machine (8000)")
    parser.add_argument("--max-model-len", type=int, default=4096, help="tokens of prompt + answer (4096)")
    parser.add_argument("command", nargs="*", help="run this once the server answers, and stop the server after it")
    chosen = parser.parse_args()
    model = whole(chosen.model)
    refuse_unservable(model, chosen.max_model_len)
    gpu = os.path.exists("/dev/nvidiactl")
    command = command_line(model, chosen.port, chosen.max_model_len, gpu=gpu)
    return serve(command, environment(os.environ, gpu=gpu), chosen.port, chosen.command)


if __name__ == "__main__":
    run_program(main)
