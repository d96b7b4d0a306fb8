"""The worker's server: its command line, and that it is waited for, told about and stopped."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

from fastgrpo import serve_worker
from fastgrpo.errors import UserError
from fastgrpo.policy import hub
from fastgrpo.serve_worker import command_line, environment, serve
from tests.policy.test_hub import COMMIT, save_adapter

ANSWERS_ONCE = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    log_message = print
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
server.handle_request()
"""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_the_command_line_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    command = command_line("m", 8001, 2048, gpu=False)
    flags = " ".join(command[1:])
    assert flags == (
        "-m vllm.entrypoints.openai.api_server --model m --served-model-name worker --host 127.0.0.1 --port 8001 "
        "--max-model-len 2048 --max-num-seqs 32 --enforce-eager --no-enable-chunked-prefill "
        "--max-num-batched-tokens 4096"
    )
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {1, 0})
    ours = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_SLEEP_WHEN_IDLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0,1"}
    assert environment({"A": "1"}, gpu=False) == {"A": "1", **ours}
    assert environment({"VLLM_CPU_KVCACHE_SPACE": "4"}, gpu=False) == {**ours, "VLLM_CPU_KVCACHE_SPACE": "4"}
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    assert "VLLM_CPU_OMP_THREADS_BIND" not in environment({}, gpu=False)


def test_the_command_line_on_a_gpu_is_plain() -> None:
    assert command_line("m", 8000, 4096, gpu=True)[-2:] == ["--max-model-len", "4096"]
    assert environment({"A": "1"}, gpu=True) == {"A": "1"}


def test_a_server_is_waited_for_and_its_keys_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    assert serve([sys.executable, "-c", ANSWERS_ONCE, str(port)], {}, port) == 0
    assert f'base_url = "http://127.0.0.1:{port}/v1"\nmodel = "worker"' in capsys.readouterr().out


def test_a_command_runs_once_the_server_answers_which_then_stops(tmp_path: Path) -> None:
    port, server = free_port(), [sys.executable, "-c", ANSWERS_ONCE + "import time; time.sleep(60)"]
    note = [sys.executable, "-c", f"open({str(tmp_path / 'note')!r}, 'w'); raise SystemExit(7)"]
    assert serve([*server, str(port)], {}, port, note) == 7
    assert (tmp_path / "note").exists()


def test_sigterm_stops_the_server_and_is_the_exit_status() -> None:
    port = str(free_port())
    server = [sys.executable, "-c", ANSWERS_ONCE + "import time; time.sleep(60)", port]
    program = f"""if True:
        import sys
        from fastgrpo import serve_worker
        serve_worker.refuse_unservable = lambda *_: None
        serve_worker.command_line = lambda *_, **__: {server!r}
        sys.argv[1:] = ["--model", "m", "--port", {port!r}]
        serve_worker.run_program(serve_worker.main)"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any("the worker answers" in line for line in process.stdout)
        process.terminate()
        assert process.wait(60) == 143
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(port)))


@pytest.mark.parametrize("said", [EntryNotFoundError, LocalEntryNotFoundError])
def test_a_models_name_on_the_hub_is_left_to_the_server(monkeypatch: pytest.MonkeyPatch, said: type[Exception]) -> None:
    """Also where the hub cannot be reached: the server may know better."""
    served: list[object] = []
    monkeypatch.setattr(hub, "hf_hub_download", asked := Mock(side_effect=said("none")))
    monkeypatch.setattr(serve_worker, "serve", lambda *given: served.extend(given) or 0)
    monkeypatch.setattr(sys, "argv", ["serve_worker", "--model", "Qwen/Qwen2.5-Coder-0.5B", "--", "train", "--x", "1"])
    assert serve_worker.main() == 0
    assert "Qwen/Qwen2.5-Coder-0.5B" in str(served[0])
    assert served[3] == ["train", "--x", "1"]
    asked.assert_called_once_with("Qwen/Qwen2.5-Coder-0.5B", "adapter_config.json")


def test_a_name_that_the_hub_has_not_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    response = httpx.Response(404, request=httpx.Request("GET", "https://hub"))
    unknown = RepositoryNotFoundError("no", response=response)
    monkeypatch.setattr(hub, "hf_hub_download", Mock(side_effect=unknown))
    with pytest.raises(UserError, match="org/typo is neither a folder here nor a model on the hub"):
        serve_worker.whole("org/typo")
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "True")
    assert serve_worker.whole("org/typo") == "org/typo"


@pytest.mark.parametrize(("name", "wrong"), [("none", "does not exist"), ("model.gguf", "is a file")])
def test_what_is_no_folder_is_told_so(tmp_path: Path, name: str, wrong: str) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UserError, match=f"model folder .*{name} {wrong}: --model takes a folder, or a name on the hub"):
        serve_worker.refuse_unservable(str(tmp_path / name), 4096)


def test_an_adapter_is_served_merged_into_its_base(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = save_adapter(tmp_path / "adapter", str(tiny_folder))
    served: list[Any] = []
    monkeypatch.setattr(serve_worker, "serve", lambda *given: served.extend(given) or 0)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["serve_worker", f"--model=~/{folder.name}"])
    assert serve_worker.main() == 0
    model = Path(served[0][served[0].index("--model") + 1])
    assert model.parent == tmp_path / "cache/fastgrpo/models"
    assert (model / "model.safetensors").is_file()


def test_an_adapter_on_the_hub_is_served_merged_into_its_base(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = save_adapter(tmp_path / "models--org--adapter" / "snapshots" / COMMIT, str(tiny_folder))
    monkeypatch.setattr(hub, "hf_hub_download", lambda name, file: str(folder / file))
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **_: str(folder))
    served: list[Any] = []
    monkeypatch.setattr(serve_worker, "serve", lambda *given: served.extend(given) or 0)
    monkeypatch.setattr(sys, "argv", ["serve_worker", "--model", "org/adapter"])
    assert serve_worker.main() == 0
    model = Path(served[0][served[0].index("--model") + 1])
    assert model.parent == tmp_path / "cache/fastgrpo/models"
    assert (model / "model.safetensors").is_file()


def test_a_server_that_ends_is_a_users_error() -> None:
    with pytest.raises(UserError, match="ended with exit status 3"):
        serve([sys.executable, "-c", "raise SystemExit(3)"], {}, free_port())


def test_what_a_server_that_ended_has_left_is_stopped(tmp_path: Path) -> None:
    """As vLLM's engine, which keeps the GPU's memory, where its server was killed."""
    note = tmp_path / "pid"
    with pytest.raises(UserError, match="ended with exit status 3"):
        serve(["sh", "-c", f"sleep 300 & echo $! > {note}; exit 3"], {}, free_port())
    left = Path("/proc", note.read_text().strip(), "stat")
    for _ in range(100):
        if not left.exists() or left.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("it still runs")


def test_a_port_that_is_taken_is_said_and_nothing_started() -> None:
    """Whatever has it might answer /health, and be taken for the worker."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for port in (taken.getsockname()[1], 99999):
            with pytest.raises(UserError, match=rf"port {port} cannot be served on: .*; choose another --port"):
                serve(["/no/such/program"], {}, port)


def test_a_server_that_never_answers_is_a_users_error_and_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_worker, "START_S", 0.2)
    with pytest.raises(UserError, match=r"did not answer on port \d+ within 0\.2 s"):
        serve([sys.executable, "-c", "import time; time.sleep(60)"], {}, free_port())


def test_a_folder_without_a_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["serve_worker", "--model", str(tmp_path)])
    with pytest.raises(UserError, match=r"there is no config\.json in it"):
        serve_worker.main()
    (tmp_path / "config.json").touch()
    with pytest.raises(UserError, match=r"there is no tokenizer\* in it"):
        serve_worker.main()
    (tmp_path / "tokenizer.json").touch()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--max-model-len", "0"])
    with pytest.raises(UserError, match="--max-model-len 0 leaves no room"):
        serve_worker.main()
