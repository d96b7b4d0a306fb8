"""The strict configuration: every mistake is one sentence, and what is written is what is read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgrpo import doctor, errors, report, run_folder
from fastgrpo.cli import configuration_of, parse, usage
from fastgrpo.config import LOSS_PRESETS, Config
from fastgrpo.config_doc import type_of
from fastgrpo.config_elsewhere import ELSEWHERE, NO_KEY
from fastgrpo.config_files import flat, read_toml, to_toml
from fastgrpo.config_keys import KEYS, checked, resolve
from fastgrpo.errors import UserError
from fastgrpo.program import run_program
from fastgrpo.run_folder import DATA, MODEL, TOKENIZER, held_name, only_writer, open_folder
from tests.helpers.full_disk import full_disk

ENDPOINT = "--workers.kind openai --workers.base_url http://localhost:8000/v1 --workers.model large"


def config(*arguments: str) -> Config:
    return parse(arguments, program="fastgrpo.train").config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--grop.steps 4", "unknown key 'grop.steps'; did you mean 'grpo.steps'?"),
        ("--grpo.max_tokens 4", "did you mean"),
        ("--grpo 3", "'grpo' is a section"),
        ("--zzz 1", "unknown key 'zzz'; --help lists all keys"),
        ("--grpo.num_generations 4", "unknown key 'grpo.num_generations'; here it is 'grpo.group_size'"),
        ("--beta 0.1", "unknown key 'beta'; here it is 'grpo.kl_weight'"),
        ("--actor_rollout_ref.rollout.n 8", "'actor_rollout_ref.rollout.n'; here it is 'grpo.group_size'"),
        ("--trainer.test_freq 5", "'trainer.test_freq'; here it is 'eval.every'"),
        ("--eval.steps 5", "'eval.steps'; here it is 'eval.every'"),
        ("--logging_steps 1", "'logging_steps'; it has no key here: every step is logged, and every completion"),
        ("--sapo_temperature_neg 3", "it has no key here: grpo.loss_function takes a loss of your own"),
        ("--actor.clip_ratio_c 3", "'actor.clip_ratio_c'; here it is 'grpo.clip_dual'"),
        (
            "--grpo.decay cosine --grpo.decay_steps 0",
            "grpo.decay and grpo.min_lr_ratio say how lr falls over grpo.decay_steps, which are 0",
        ),
        (
            "--grpo.min_lr_ratio 0.1 --grpo.decay_steps 0",
            "grpo.min_lr_ratio say how lr falls over grpo.decay_steps, which are 0: set these",
        ),
        ("--min_lr 1e-7", "unknown key 'min_lr'; here it is 'grpo.min_lr_ratio'"),
        ("--grpo.clip_dual 0.9", "grpo.clip_dual = 0.9 would clip a ratio of 1: set it above 1"),
        ("--data.use_shm 1", "unknown key 'data.use_shm'; --help lists all keys"),
        ("--trainer.lr 1", "did you mean 'grpo.lr'"),
        ("--sftt.lr 1", "did you mean 'sft.lr'"),
        ("--evl.temprature 1", "did you mean 'eval.temperature'"),
        ("--checkpont.every 3", "did you mean 'checkpoint.every'"),
        ("--grpo.lr x", "grpo.lr must be float, got 'x' (str)"),
        ("--grpo.lr -1", "grpo.lr must be float > 0.0, got '-1'"),
        ("--sft.lr inf", "sft.lr must be a finite number"),
        ("--seed 1.5", "seed must be int, got '1.5'"),
        ("--grpo.ratio foo", "grpo.ratio must be token | sequence | cispo, got 'foo'"),
        ("--grpo.clip_low 1.5", "grpo.clip_low must be float <= 1.0, got '1.5'"),
        ("--grpo.temperature 0.001", "grpo.temperature must be float >= 0.01, got '0.001'"),
        ("--eval.temperature 2.5", "eval.temperature must be float <= 2.0, got '2.5'"),
        ("--name ../b", "name must be a text of letters, digits, '_', '.' and '-' that begins with a letter or digit"),
        ("--seed", "--seed needs a value"),
        ("--runs --dry-run", "--runs needs a value, and --dry-run is an option"),
        (
            "--grpo.max_new_tokens 4096",
            "grpo.max_new_tokens = 4096 leaves no room for a prompt in engine.max_model_len",
        ),
        ("--config /nope.toml", "cannot read the configuration file /nope.toml: No such file"),
        ("stray", "unexpected argument 'stray'"),
        ("--model.chat_template false --model.system_prompt x", "model.system_prompt goes with a chat template, and"),
        ("--workers.kind openai", "set workers.base_url and workers.model too"),
        ("--workers.others.small.model m", "workers.others name endpoints: set workers.kind to openai too"),
        ("--workers.others.small.modl m", "unknown key 'workers.others.small.modl'; did you mean 'workers.model'?"),
        ("--workers.others.small.kind openai", "unknown key 'workers.others.small.kind'"),
        ("--workers.others.small.prompt_price -1", "workers.others.small.prompt_price must be float >= 0.0, got '-1'"),
        (f"{ENDPOINT} --workers.others.worker.model m", "workers.name and workers.others.worker are one name"),
        (f"{ENDPOINT} --workers.drop top_p", "workers.drop names 'top_p': only max_tokens, temperature and seed"),
        (f"{ENDPOINT} --workers.others.a.extra_body [1]", "workers.others.a.extra_body must be a JSON object"),
        ("--grpo.mini_batches 9999", "grpo.mini_batches = 9999 are more parts than the 128 rollouts"),
        ("--grpo.max_new_tokens 8 --grpo.overlong_penalty_tokens 9", "overlong_penalty_tokens is above grpo.max_new_t"),
        ("--grpo.advantage rloo --grpo.reward_scale group", "advantage rloo and grpo.reward_scale group exclude"),
        ("--grpo.advantage rloo --grpo.reward_scale terms", "advantage rloo and grpo.reward_scale terms exclude"),
        (
            "--grpo.group_size 65536 --grpo.prompts_per_step 10000",
            "655,360,000 rollouts at once, more than 1,048,576: lower one of them",
        ),
        ("--grpo.curriculum 0.1 --grpo.prompts_per_step 5", "0.1 of grpo.prompts_per_step = 5 is no problem at all"),
        ("--grpo.loss cispo --grpo.clip_dual 3", "cispo's is bounded by it whatever the advantage: set clip_dual"),
        ("--model.lora_alpha 16", "model.lora_alpha scales the adapters of model.lora_rank, which is not set"),
        ("--data.environment_args {}", "data.environment_args are those of data.environment: name it"),
        ("--task code --reward.judge large", "reward.judge goes with task flow and its own reward: leave it out"),
        ("--reward.judge large --data.reward m:f", "reward.judge goes with task flow and its own reward"),
        ("--engine.kv_cache_gib 1e300", "engine.kv_cache_gib must be float <= 1048576.0, got '1e300'"),
        ("--grpo.micro_batch_tokens 1000000000", "grpo.micro_batch_tokens must be int <= 4194304, got '1000000000'"),
        ("--engine.max_num_seqs 100000", "engine.max_num_seqs must be int <= 65536, got '100000'"),
        ("--engine.step_timeout_s 1e300", "engine.step_timeout_s must be float <= 1000000.0, got '1e300'"),
        ("--sandbox.output_bytes 8388608", "sandbox.output_bytes must be int <= 4194304, got '8388608'"),
        ("--grpo.max_lag 9999", "x (1 + grpo.max_lag) are 1,280,000 rollouts at once, more than 1,048,576"),
        ("--grpo.max_lag 1 --grpo.refill 2", "grpo.max_lag and grpo.refill above 0 exclude each other"),
        ("--grpo.in_flight true", "set grpo.max_lag to 1 or more"),
        ("--grpo.top_p 0", "grpo.top_p must be float > 0.0"),
        ("--grpo.top_p 0.9 --grpo.importance_correction sequence_mask", "set it to token_truncate or token_mask"),
        ("--workers.cache_dir c --reward.efficiency_by dollars", "answers for no dollars, and reward.efficiency_by is"),
    ],
)
def test_mistake_on_the_command_line_is_one_sentence(arguments: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        config(*arguments.split())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


MEANT = """
grpo.step grpo.steps, grpo.grup_size grpo.group_size, grpo.groupsize grpo.group_size, grpo.temprature
grpo.temperature, grpo.topp grpo.top_p, grpo.maxnewtokens grpo.max_new_tokens, grpo.max_tokens grpo.max_new_tokens,
grpo.kl grpo.kl_weight, grpo.warmup grpo.warmup_steps, warmup grpo.warmup_steps, model.lora model.lora_rank,
model.pth model.path, nam name, engine.memory engine.gpu_memory_utilization, engine.gpu_memory
engine.gpu_memory_utilization, worker.model workers.model, engine.kv_cache engine.kv_cache_gib, engine.tp
engine.tensor_parallel, engine.lr grpo.lr, sft.learning_rate sft.lr, workers.url workers.base_url, workers.api_key
workers.api_key_env, sandbox.memory sandbox.memory_mb, eval.evry eval.every, sandbox.timeout sandbox.wall_s,
data.path data.dataset, grpo.held_out data.held_out, group_sise grpo.group_size, output_path runs, max_length
engine.max_model_len, checkpoint.keeps checkpoint.keep, model.checkpointing model.gradient_checkpointing,
model.dtype engine.dtype
"""


@pytest.mark.parametrize("pair", MEANT.split(","))
def test_a_key_that_is_likely_meant_is_named(pair: str) -> None:
    given, meant = pair.split()
    with pytest.raises(UserError, match=rf"unknown key '{given}'; (did you mean|here it is) '{meant}'"):
        checked({given: 1}, source="here")


UNLIKE = """
grpo.max grpo.patience grpo.noise grpo.rank grpo.baseline grpo.critic_lr model.layers model.device model.hidden_size
engine.model engine.max engine.block_size engine.swap_space engine.quantization data.columns data.streaming data.split
sandbox.network sandbox.image sandbox.packages workers.proxy eval.metric checkpoint.format checkpoint.path reward.scale
reward.weight record.level device debug metrics profile cache port n deterministic early_stopping log_level a.b.c x. .x
"""


@pytest.mark.parametrize("name", UNLIKE.split())
def test_nothing_is_suggested_for_a_key_that_is_like_none(name: str) -> None:
    """It was whatever was likest: retries for metrics, grpo.stop for engine.tp, grpo.lr for model.lora."""
    with pytest.raises(UserError, match=rf"^here: unknown key '{re.escape(name)}'; --help lists all keys$"):
        checked({name: 1}, source="here")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[grpo]\nstep = 3", "unknown key 'grpo.step'; did you mean 'grpo.steps'?"),
        ("[grpo]\nsteps = '3'", "grpo.steps must be int, got '3' (str)"),
        ("[grpo]\nsteps = true", "grpo.steps must be int, got True (bool)"),
        ("[model]\ngradient_checkpointing = 1", "must be bool, got 1 (int)"),
        ("grpo = 3", "'grpo' is a section"),
        ("seed = {a = 1}", "seed must be int, got {'a': 1} (dict)"),
        ("[grpo.steps]", "grpo.steps must be int, got {} (dict)"),
        ("model.chat_template_kwargs = {a = 1}", "must be the text that json.dumps makes of it, got {'a': 1}"),
        ("grpo.stop = ['a', 1]", "grpo.stop must be str, or a list of such, got ['a', 1] (list)"),
        ("[workers]\nothers = 3", "unknown key 'workers.others': a worker is a table [workers.others.NAME]"),
        ("[workers.others.'a b']\nmodel = 'x'", "a worker is a table [workers.others.NAME], its NAME letters, digits"),
        ("steps = = 3", "is not TOML"),
    ],
)
def test_mistake_in_a_file_names_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "my.toml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_toml(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_name_in_another_encoding_is_one_sentence() -> None:
    for arguments in (["--runs", "a\udcff"], ["--data.dataset", "a.jsonl,b\udcff.jsonl"]):
        with pytest.raises(UserError, match=rf"command line: {arguments[0][2:]} must be Unicode text"):
            config(*arguments)
    assert config("--runs", "é →").runs == "é →"


def test_a_dict_in_the_place_of_its_json_is_told_so() -> None:
    with pytest.raises(
        UserError, match=r"chat_template_kwargs must be the text that json\.dumps makes of it, got {'a': 1}"
    ):
        checked({"model.chat_template_kwargs": {"a": 1}}, source="train(config)")


def test_a_checkpoint_and_its_adapter_lead_to_the_configuration_of_their_run(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run/checkpoints/step-000010"
    (checkpoint / "adapter").mkdir(parents=True)
    for name in ("config.toml", "metrics.jsonl"):
        (tmp_path / "run" / name).touch()
    for model in (tmp_path / "run/sft", checkpoint, checkpoint / "adapter"):
        assert configuration_of(str(model)) == str(tmp_path / "run/config.toml")
    assert configuration_of(str(tmp_path)) is None


def test_command_line_wins_over_file_wins_over_default(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text("seed = 1\n[grpo]\nsteps = 7\nlr = 1")
    result = config("--config", str(path), "--grpo.steps=9", "--model", "/m")
    assert (result.seed, result.grpo.steps, result.grpo.lr, result.model.path) == (1, 9, 1.0, "/m")
    assert result.grpo.group_size == Config().grpo.group_size


@pytest.mark.parametrize("loss", LOSS_PRESETS)
def test_loss_preset_fills_what_is_not_set(loss: str) -> None:
    result = config("--grpo.loss", loss, "--grpo.clip_high", "0.5").grpo
    values = {"ratio": result.ratio, "normaliser": result.normaliser, "advantage": result.advantage}
    assert values == {key: LOSS_PRESETS[loss][key] for key in values}
    assert (result.clip_low, result.clip_high) == (LOSS_PRESETS[loss]["clip_low"], 0.5)


def test_defaults_are_the_default_preset() -> None:
    assert resolve({}) == Config()


def test_new_loss_over_a_resolved_file_replaces_its_parts(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(to_toml(Config()))
    plain = config("--model", "folder", "--grpo.loss", "gspo").grpo
    assert config("--config", str(path), "--grpo.loss", "gspo").grpo == plain


def test_the_home_folder_may_be_written_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve({"runs": "~/all", "name": "a"}).folder == tmp_path / "all" / "a"
    run = tmp_path / "all" / "a"
    (run / "checkpoints/step-000001").mkdir(parents=True)
    (run / "config.toml").write_text("seed = 7")
    (run / "metrics.jsonl").write_text("")
    assert config("--config=~/all/a/config.toml").seed == 7
    assert configuration_of("~/all/a/checkpoints/step-000001") == str(run / "config.toml")


@given(
    text=st.text(st.characters(exclude_categories=["Cs"])),
    lr=st.floats(min_value=1e-300, max_value=1e300),
    steps=st.integers(0, 10**9),
    checkpointing=st.booleans(),
)
def test_toml_round_trip(
    tmp_path_factory: pytest.TempPathFactory, text: str, lr: float, steps: int, checkpointing: bool
) -> None:
    values = {"model.path": text, "grpo.lr": lr, "grpo.steps": steps, "model.gradient_checkpointing": checkpointing}
    before = resolve(values)
    path = tmp_path_factory.getbasetemp() / "round_trip.toml"
    path.write_text(to_toml(before), encoding="utf-8", newline="")
    assert resolve(read_toml(path)) == before


def test_another_worker_differs_in_what_it_sets(tmp_path: Path) -> None:
    prices = "--workers.prompt_price 3 --workers.others.small.prompt_price 0.5"
    first = config(
        *ENDPOINT.split(), *prices.split(), *["--workers.others.small.model", "little", "--runs"], str(tmp_path)
    )
    path = tmp_path / "several.toml"
    path.write_text(to_toml(first), encoding="utf-8")
    assert resolve(read_toml(path)) == first
    own, small = first.workers.by_name().items()
    assert (own[0], own[1].model, own[1].prompt_price) == ("worker", "large", 3.0)
    assert (small[0], small[1].model, small[1].prompt_price) == ("small", "little", 0.5)
    assert small[1].base_url == own[1].base_url
    open_folder(first, resume=False)
    cheaper = resolve(flat(first) | {"workers.others.small.prompt_price": 0.1})
    open_folder(cheaper, resume=True)
    with pytest.raises(UserError, match=r"workers\.others\.small\.model was 'little' and is now 'tiny'"):
        open_folder(resolve(flat(first) | {"workers.others.small.model": "tiny"}), resume=True)


def test_resume_reads_the_runs_own_configuration(tmp_path: Path) -> None:
    first = config("--runs", str(tmp_path), "--grpo.lr", "0.5")
    open_folder(first, resume=False)
    line = parse(["--runs", str(tmp_path), "--resume", "--grpo.steps", "99"], program="p")
    assert line.resume
    assert line.config.grpo.lr == 0.5
    assert line.config.grpo.steps == 99
    with pytest.raises(UserError, match="nothing to resume"):
        config("--runs", str(tmp_path), "--name", "other", "--resume")


def test_a_run_with_a_key_that_is_refused_by_now_goes_on_once_that_is_mended(tmp_path: Path) -> None:
    """The command line cannot mend it: what it says must be what the run began with."""
    runs = ("--runs", str(tmp_path))
    saved = open_folder(config(*runs, "--grpo.loss", "cispo", "--model.lora_rank", "0"), resume=False) / "config.toml"
    text = saved.read_text()
    saved.write_text(text.replace("clip_dual = 0.0", "clip_dual = 3.0"))
    with pytest.raises(UserError, match=rf"^{saved} is no .* set clip_dual to 0; mend it in that file, which was cut"):
        config(*runs, "--resume", "--grpo.clip_dual", "0")
    saved.write_text(text)
    open_folder(config(*runs, "--resume"), resume=True)


def test_adapters_scale_is_passed_where_their_rank_is_said_to_be_none() -> None:
    """As on the command line over a file with both, and in a run's own file, which has all keys."""
    assert config("--model.lora_alpha", "16", "--model.lora_rank", "0").model.lora_rank == 0
    assert resolve(flat(config("--model.lora_alpha", "16", "--model.lora_rank", "8"))).model.lora_alpha == 16


def test_a_runs_model_is_judged_by_that_runs_configuration(tmp_path: Path) -> None:
    """Its held-out problems, prompt and workers: with others, problems it was trained on would count as held out."""
    folder = open_folder(config("--runs", str(tmp_path), "--seed", "3", "--data.held_out", "9"), resume=False)
    (folder / "metrics.jsonl").write_text("")
    for model in (folder / "sft", folder / "checkpoints/step-000010"):
        model.mkdir(parents=True)
        words = ["--model", str(model), "--eval.samples", "7"]
        own = parse(words, program="fastgrpo.evaluate", of_run=True).config
        assert (own.seed, own.data.held_out, own.eval.samples, own.model.path) == (3, 9, 7, str(model))
        assert parse(words, program="fastgrpo.train").config.seed == 0
    (folder / "metrics.jsonl").unlink()
    assert parse(words, program="fastgrpo.evaluate", of_run=True).config.seed == 0


def test_what_is_found_out_about_a_run_that_was_set_aside_is_not_the_next_one_s(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        folder = open_folder(config("--runs", str(tmp_path), "--grpo.steps", "7"), resume=False)
        (folder / "metrics.jsonl").touch()
        (folder / "checkpoints/step-000001").mkdir(parents=True)
    assert f"an earlier run of this name is kept as {tmp_path / 'demo.1'};" in capsys.readouterr().err

    def asked(*more: str) -> Config:
        words = ["--model", str(tmp_path / "demo.1/checkpoints/step-000001"), *more]
        return parse(words, program="fastgrpo.evaluate", of_run=True).config

    assert (asked().folder, asked().grpo.steps) == (tmp_path / "demo.1", 7)
    assert asked("--name", "other").folder.name == "other"


def test_refused_resume_leaves_the_runs_configuration_as_it_was(tmp_path: Path) -> None:
    folder = open_folder(config("--runs", str(tmp_path)), resume=False)
    before = (folder / "config.toml").read_text()
    with pytest.raises(UserError, match=r"cannot resume .*config.toml: grpo.lr was .* and is now 0.5"):
        open_folder(config("--runs", str(tmp_path), "--resume", "--grpo.lr", "0.5"), resume=True)
    assert (folder / "config.toml").read_text() == before
    longer = config("--runs", str(tmp_path), "--resume", "--grpo.steps", "99")
    assert "steps = 99" in (open_folder(longer, resume=True) / "config.toml").read_text()


def save_model(folder: Path, *, weights: bytes = bytes(10**6)) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_a_run_continues_with_its_model_wherever_that_is_and_with_no_other(tmp_path: Path) -> None:
    first = save_model(tmp_path / "first")
    runs = ["--runs", str(tmp_path / "runs")]
    open_folder(config(*runs, "--model", str(first)), resume=False)
    moved = first.rename(tmp_path / "[moved]")
    open_folder(config(*runs, "--resume", "--model", str(moved)), resume=True)
    tuned = save_model(tmp_path / "tuned", weights=bytes(500_000) + b"1" + bytes(499_999))
    with pytest.raises(UserError, match=r"model\.path was '.*moved.*' and is now '.*tuned', which is another model"):
        open_folder(config(*runs, "--resume", "--model", str(tuned)), resume=True)
    (moved / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"the files in .*moved.* have changed, which is another model"):
        open_folder(config(*runs, "--resume"), resume=True)


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "generation_config.json"])
def test_a_run_continues_with_its_tokenizer_and_with_no_other(tmp_path: Path, name: str) -> None:
    model, runs = save_model(tmp_path / "model"), ["--runs", str(tmp_path / "runs")]
    (model / "tokenizer.json").write_text("[1]")
    folder = open_folder(config(*runs, "--model", str(model)), resume=False)
    (model / "README.md").write_text("found good")
    open_folder(config(*runs, "--resume"), resume=True)
    (model / name).write_text("[2]")
    with pytest.raises(UserError, match=rf"cannot resume {folder}: {name} in {model} changed since it began"):
        open_folder(config(*runs, "--resume"), resume=True)
    (folder / TOKENIZER).unlink()  # as of a run that an older version began
    open_folder(config(*runs, "--resume"), resume=True)


def test_a_run_is_one_process_s_at_a_time(tmp_path: Path) -> None:
    mine, taken = (
        tmp_path / "runs" / "mine",
        rf"mine is under way \(process {os.getpid()} on .+\): wait for its end, or",
    )
    with (
        held_name(mine),
        held_name(tmp_path / "runs" / "other"),
        pytest.raises(UserError, match=taken),
        held_name(mine),
    ):
        pytest.fail("both have it")
    with held_name(mine):
        pass
    mine.mkdir()
    (tmp_path / "latest").symlink_to(mine)
    for one, other in ((mine, tmp_path / "latest"), (tmp_path / "latest", mine)):
        with held_name(one), pytest.raises(UserError, match=taken), held_name(other):
            pytest.fail("both have it by the link")


@pytest.mark.parametrize("damage", [b"", b"[]", b"null", b"{", b'{"a": 3}', b'{"a": "b"}', b"\xff", b"0" * 31])
@pytest.mark.parametrize("name", [MODEL, TOKENIZER, DATA])
def test_a_damaged_digest_is_named_and_may_be_removed(tmp_path: Path, name: str, damage: bytes) -> None:
    model, runs = save_model(tmp_path / "model"), ["--runs", str(tmp_path / "runs")]
    folder = open_folder(config(*runs, "--model", str(model)), resume=False)
    (folder / name).write_bytes(damage)
    with pytest.raises(UserError, match=rf"{folder / name} is damaged: .*remove that file and continue with --resume"):
        open_folder(config(*runs, "--resume"), resume=True)
    assert (folder / name).read_bytes() == damage
    (folder / name).unlink()
    open_folder(config(*runs, "--resume"), resume=True)


def test_an_empty_configuration_is_not_the_defaults(tmp_path: Path) -> None:
    folder = open_folder(config("--runs", str(tmp_path)), resume=False)
    (folder / "config.toml").write_bytes(b"")
    with pytest.raises(UserError, match=rf"{folder}/config.toml is empty: put the run's configuration back"):
        config("--runs", str(tmp_path), "--resume")


def test_a_full_disk_costs_a_resumed_run_nothing(tmp_path: Path) -> None:
    folder = open_folder(config("--runs", str(tmp_path)), resume=False)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    longer = config("--runs", str(tmp_path), "--resume", "--grpo.steps", "99")
    with (
        full_disk(100),
        pytest.raises(UserError, match=r"cannot write .*config.toml: File too large; free space, then continue"),
    ):
        open_folder(longer, resume=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_who_writes_results_waits_for_another_and_names_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "WRITER_S", 0.1)
    with (
        only_writer(tmp_path / "run"),
        pytest.raises(UserError, match=rf"another program has been writing its results into {tmp_path}/run for 0.1 s"),
        only_writer(tmp_path / "run"),
    ):
        pytest.fail("both write")
    with held_name(tmp_path / "run"), only_writer(tmp_path / "run"):
        pass  # a training under way holds its name, not its results


def test_a_run_without_a_digest_continues_where_its_model_was(tmp_path: Path) -> None:
    model, runs = save_model(tmp_path / "model"), ["--runs", str(tmp_path / "runs")]
    (open_folder(config(*runs, "--model", str(model)), resume=False) / MODEL).unlink()
    with pytest.raises(UserError, match="another model"):
        open_folder(config(*runs, "--resume", "--model", str(save_model(tmp_path / "copy"))), resume=True)
    open_folder(config(*runs, "--resume"), resume=True)


def test_new_run_sets_an_earlier_one_of_its_name_aside(tmp_path: Path) -> None:
    for seed in range(3):
        folder = open_folder(config("--runs", str(tmp_path), "--seed", str(seed)), resume=False)
        (folder / "metrics.jsonl").write_text(str(seed))
    seeds = {path.name: (path / "metrics.jsonl").read_text() for path in tmp_path.iterdir()}
    assert seeds == {"demo": "2", "demo.1": "0", "demo.2": "1"}


def test_a_run_that_could_not_begin_is_not_told_to_continue(tmp_path: Path) -> None:
    with (
        full_disk(100),
        pytest.raises(UserError, match=r"cannot write .*config.toml: File too large; free space or set --runs"),
    ):
        open_folder(config("--runs", str(tmp_path)), resume=False)


def test_unwritable_folder_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the run's folder"):
        open_folder(config("--runs", str(tmp_path / "file")), resume=False)


def test_help_lists_every_key_with_its_default() -> None:
    text = usage("fastgrpo.train")
    assert all(f"--{name} " in text for name in KEYS)
    assert [name for name, key in KEYS.items() if not key.help] == []
    assert list(flat(Config())) == list(KEYS)


def test_other_trainers_names_lead_to_keys() -> None:
    assert {name: key for name, key in ELSEWHERE.items() if key not in KEYS or name in KEYS} == {}
    assert NO_KEY.keys() & (ELSEWHERE.keys() | KEYS.keys()) == set()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("vllm_importance_sampling_correction", "'grpo.tis_cap'"),
        ("top_entropy_quantile", "whatever its entropy"),
        ("actor_rollout_ref.actor.megatron.router_replay.mode", "'grpo.routing_replay'"),
        ("policy.router_replay.enabled", "'grpo.routing_replay'"),
        ("moe_enable_routing_replay", "'grpo.routing_replay'"),
        ("inference.enable_return_routed_experts", "'grpo.routing_replay'"),
        ("use_routing_replay", "not those of the old policy's pass"),
        ("entropy_coef_min", "grpo.entropy_weight stays"),
        ("environment_factory", "environment="),
        ("custom_reward_function.name", "'data.reward'"),
        ("reward.custom_reward_function.reward_kwargs", "functools.partial"),
        ("actor_rollout_ref.rollout.val_kwargs.temperature", "'eval.temperature'"),
        ("reward.model_name_or_path", "asked by a reward function"),
        ("actor.agent_func_path", "environment="),
        ("num_epoch", "'grpo.steps'"),
        ("custom_generate_function_path", "environment="),
        ("orchestrator.sampling.max_tokens", "'grpo.max_new_tokens'"),
        ("inference.parallel.tp", "'engine.tensor_parallel'"),
        ("actor.eps_clip", "grpo.clip_low and grpo.clip_high"),  # one number there for both
        ("generation_batch_size", "'grpo.prompts_per_step'"),
        ("rollout.batch_size", "'grpo.prompts_per_step'"),
        ("train.batch_size", "'grpo.mini_batches'"),  # OpenRLHF's: the samples of an update
        ("actor_rollout_ref.actor.use_kl_loss", "'grpo.kl_weight'"),
        ("use_tis", "'grpo.tis_cap'"),
        ("tis_clip_low", "no lower bound"),
        ("ckpt.path", "'runs'"),
        ("orchestrator.model.name", "'model.path'"),
        ("reward_model.reward_manager", "asked by a reward function"),
        ("reward_model.rollout.tensor_model_parallel_size", "asked by a reward function"),
        ("reward_model.sandbox_fusion.url", "'sandbox.hosts'"),
        ("critic.model_name_or_path", "without a critic"),
        ("critic.optim.lr", "without a critic"),
        ("actor.adam.betas", "grpo.beta1, beta2"),
        ("actor.muon.ns_steps", "AdamW is the one"),
        ("logger.wandb.group", "WANDB_RUN_GROUP"),
        ("local_rank", "torchrun"),
        ("trainer.scheduler.type", "'grpo.decay'"),
        ("algorithm.kl_ctrl.type", "grpo.kl_weight stays"),
        ("cast_lm_head_to_fp32", "fp32 in training"),
    ],
)
def test_another_trainers_key_leads_to_what_it_is_here(name: str, told: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"unknown key {name!r}; ") + f"(here|it has).*{re.escape(told)}"):
        checked({name: 1}, source="train(config)")


def test_another_trainers_key_is_told_what_ours_counts() -> None:
    """As theirs may count something else: epochs, samples, a learning rate in the place of a share of one."""
    for name, key in (("num_train_epochs", "grpo.steps"), ("global_batch_size", "grpo.mini_batches")):
        with pytest.raises(UserError, match=re.escape(f"here it is {key!r}: {KEYS[key].help}")):
            checked({name: 1}, source="train(config)")


def test_from_python_a_folder_may_be_a_path_and_a_list_is_called_so() -> None:
    assert checked({"runs": Path("a/b"), "data.dataset": Path("c")}, source="train") == {
        "runs": "a/b",
        "data.dataset": "c",
    }
    with pytest.raises(UserError, match=r"grpo\.stop must be str, or a list of such, got None"):
        checked({"grpo.stop": None}, source="train")


def test_a_key_that_names_a_function_says_how() -> None:
    for key, said in (("grpo.loss_function", "a text module:function"), ("data.reward", "as reward=, got")):
        with pytest.raises(UserError, match=f"{key} must be .*{said}"):
            checked({key: len}, source="train")


def test_a_program_that_trains_nothing_resumes_nothing() -> None:
    assert "--resume" not in usage("fastgrpo.evaluate", of_run=True)
    with pytest.raises(UserError, match=r"fastgrpo\.evaluate begins none"):
        parse(["--resume"], program="fastgrpo.evaluate", of_run=True)


@pytest.mark.parametrize("main", [doctor.main, report.main])
def test_help_says_how_a_program_is_called(
    main: Callable[[], int | None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["program", "--help"])
    assert not main()
    assert capsys.readouterr().out.startswith(f"usage: python -m {main.__module__} ")


def test_every_whole_number_has_both_bounds() -> None:
    """A slip of the keyboard is one sentence, and not memory that runs out in the middle of a run."""
    numbers = [name for name, key in KEYS.items() if type_of(key.type).startswith("int")]
    assert {"eval.samples", "data.held_out", "grpo.steps"} <= set(numbers)
    for name in numbers:
        for value in (-1, 10**12):
            with pytest.raises(UserError, match=f"{name} must be int [<>]=? [0-9]+"):
                checked({name: value}, source="a test")


def test_every_key_is_read_somewhere() -> None:
    package = Path(errors.__file__).parent
    others = [path for path in package.rglob("*.py") if path.name not in ("config.py", "cli.py")]
    source = "\n".join(path.read_text(encoding="utf-8") for path in others)
    read_here = {"name", "runs"}
    unread = [name for name in KEYS if not re.search(rf"\.{name.split('.')[-1]}\b", source) and name not in read_here]
    assert unread == []


@pytest.mark.parametrize(
    ("outcome", "code", "message"),
    [
        (UserError("disk full"), 2, "error: disk full\n"),
        (
            OSError(28, "No space left on device", "runs/x"),
            2,
            "error: cannot use runs/x: No space left on device; {CHECK}\n",
        ),
        (PermissionError(13, "Permission denied", "/x"), 2, "error: cannot use /x: Permission denied; {CHECK}\n"),
        (
            OSError(36, "File name too long", "a" * 400),
            2,
            f"error: cannot use {'a' * 300}: File name too long; shorten it\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (None, 0, ""),
        (3, 3, ""),
    ],
)
def test_run_program_exit_codes(
    outcome: BaseException | int | None, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int | None:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    with pytest.raises(SystemExit) as caught:
        run_program(main)
    assert caught.value.code == code
    assert capsys.readouterr().err == message.replace("{CHECK}", "check the disk's space and the owner")
    assert sys.exc_info()[0] is None


@pytest.mark.parametrize("main", ["parse(['--help'], program='any')", "print('much')", "print('much ' * 100_000)"])
def test_a_reader_that_has_read_enough_ends_a_program_without_a_word(main: str) -> None:
    code = f"from fastgrpo.cli import parse; from fastgrpo.program import run_program; run_program(lambda: {main})"
    read, write = os.pipe()
    os.close(read)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open(write, "wb") as gone:
        command = [sys.executable, "-c", code]
        ended = subprocess.run(command, stdout=gone, stderr=subprocess.PIPE, env=environment, timeout=240, check=False)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_without_a_model_the_demo_runs_and_with_one_its_settings_do_not_apply() -> None:
    demo, own = config(), config("--model", "folder")
    assert demo.data.instruction == "short"
    assert demo.grpo.lr > 1e-4 > own.grpo.lr
    assert own == msgspec.structs.replace(Config(), model=msgspec.structs.replace(Config().model, path="folder"))


@pytest.mark.parametrize(
    ("text", "value"), [("9", 9), ("33, 86", (33, 86)), ("9,", None), ("-1", None), ("1,-1", None), ("a,b", None)]
)
def test_a_key_for_several_takes_one_or_a_list(tmp_path: Path, text: str, value: object) -> None:
    if value is None:
        with pytest.raises(UserError, match=r"data\.held_out must be"):
            checked({"data.held_out": text}, source="command line", strict=False)
        return
    given = checked({"data.held_out": text}, source="command line", strict=False)
    assert given == {"data.held_out": value}
    path = tmp_path / "config.toml"
    path.write_text(to_toml(resolve(given | {"data.dataset": ("humaneval", "a,b.jsonl")})))
    assert flat(resolve(read_toml(path))) == flat(resolve(given | {"data.dataset": ("humaneval", "a,b.jsonl")}))
    assert resolve(read_toml(path)).data.held_out == value


@pytest.mark.parametrize(
    "find",
    [lambda: config("--runs", "~nobody_of_that_name/runs").folder, lambda: errors.cache_folder("models")],
)
def test_a_home_that_is_not_there_is_named(find: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user has no entry in /etc/passwd."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.getuid", lambda: 123456)
    told = r"no home folder for the (~ of ~.*: set HOME, or|~\w+ of ~.*:) write the whole path"
    with pytest.raises(UserError, match=told):
        find()
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert errors.cache_folder("models") == Path("/cache/fastgrpo/models")
