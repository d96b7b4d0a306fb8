"""Rows as their users have them, and one sentence for those that are none."""

import asyncio
import sys
from collections import UserDict
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fastgrpo.config_keys import resolve
from fastgrpo.errors import UserError
from fastgrpo.rollouts import dataset
from fastgrpo.rollouts.dataset import hold_out, read_examples
from fastgrpo.rollouts.reward_functions import RewardFunctions
from fastgrpo.tasks import Task, digests_of, environment_task, reward_task, task_of
from fastgrpo.types import Rollout

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def anything(**_: Any) -> list[float]:
    raise NotImplementedError


def test_rows_keep_their_columns_and_get_an_id() -> None:
    text, chat = read_examples([{"prompt": "Hi", "answer": 4}, {"prompt": MESSAGES, "id": 9}])
    assert (text.id, text.prompt, text.columns) == ("0", "Hi", {"answer": 4})
    assert (chat.id, chat.prompt, chat.columns) == ("9", MESSAGES, {"id": 9})


def test_messages_may_be_an_array_as_pandas_reads_them() -> None:
    (row,) = read_examples([{"prompt": np.array(MESSAGES, dtype=object), "answer": np.array([1])}])
    assert row.prompt == MESSAGES
    assert type(row.prompt) is list


def test_files_may_be_named_by_paths(tmp_path: Path) -> None:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in paths:
        path.write_text('{"prompt": "a"}\n')
    train, held_out = reward_task([anything], dataset=paths).load_problems(resolve({"data.held_out": 0}))
    assert ([row.id for row in train], held_out) == ([f"{path}/0" for path in paths], [])


def test_of_each_set_so_many_rows_are_used_as_data_problems_says() -> None:
    rows = [{"prompt": f"count {number}"} for number in range(20)]
    config = resolve({"data.problems": 6, "data.held_out": 2})
    train, held_out = reward_task([anything], dataset=rows).load_problems(config)
    assert (len(train), len(held_out), len({row.id for row in train + held_out})) == (4, 2, 6)
    assert reward_task([anything], dataset=rows).load_problems(config) == (train, held_out)
    train, held_out = reward_task([anything], dataset=rows, eval_dataset=rows[:9]).load_problems(config)
    assert (len(train), len(held_out)) == (6, 6)
    few = resolve({"data.problems": 20, "data.held_out": 2})
    assert [len(part) for part in reward_task([anything], dataset=rows).load_problems(few)] == [18, 2]


def test_rows_of_several_sets_have_all_their_columns(tmp_path: Path) -> None:
    def code(completions: list[str], tests: list[Any], **_: Any) -> list[float | None]:
        return [None if test is None else 1.0 for test in tests]

    def sums(prompts: Any, completions: Any, completion_ids: Any, answer: list[Any], tests: Any) -> list[float | None]:
        return [None if wanted is None else 2.0 for wanted in answer]

    (tmp_path / "code.jsonl").write_text('{"prompt": "a", "tests": ["assert f()"]}\n')
    (tmp_path / "sums.jsonl").write_text('{"prompt": "b", "answer": 3}\n')
    names = [str(tmp_path / "code.jsonl"), str(tmp_path / "sums.jsonl")]
    for order in (names, names[::-1]):
        train, _ = reward_task([code, sums], dataset=order).load_problems(resolve({"data.held_out": 0}))
        rewards = RewardFunctions([code, sums], deadline_s=20.0)
        for row in train:
            (result,) = asyncio.run(rewards.results(row, [Rollout([7], [1], [0.0], ["hi"])]))
            assert result.reward.terms == ({"code": 1.0} if row.prompt == "a" else {"sums": 2.0})
            assert set(row.columns) == {"tests", "answer"}


def test_a_file_of_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n\n{"prompt": "b", "n": 1}\n')
    assert [example.prompt for example in read_examples(path)] == ["a", "b"]
    path.write_bytes(b'{"prompt": "a", "limit": Infinity, "n": NaN}\n')  # as Python writes them
    assert str(read_examples(path)[0].columns) == "{'limit': inf, 'n': nan}"
    for broken in (b"[1]", b'{"prompt": "\xff"}', b'{"prompt": NaN', b"[" * 100_000, b"NaN" + b"[" * 100_000):
        path.write_bytes(b'{"prompt": "a"}\n' + broken + b"\n")
        with pytest.raises(UserError, match=r"rows.jsonl:2 is no JSON object"):
            read_examples(path)


@pytest.mark.parametrize(
    "row", [{"question": "Hi"}, {"prompt": ""}, {"prompt": []}, {"prompt": [{"role": "user"}]}, {"prompt": 3}]
)
def test_a_row_without_a_prompt_is_named(row: dict) -> None:
    with pytest.raises(UserError, match="row 1 of the data set needs a prompt"):
        read_examples([{"prompt": "fine"}, row])


def test_a_prompt_that_is_none_and_a_column_without_a_name_are_shown() -> None:
    with pytest.raises(UserError, match=r"whose role and content are texts; its prompt is \[\{'role': 'user'\}\]"):
        read_examples([{"prompt": [{"role": "user"}]}])
    with pytest.raises(UserError, match="row 0 of the data set has a column 3: a column's name is a text"):
        read_examples([{"prompt": "Hi", 3: 4}])


class Table(UserDict):
    def __repr__(self) -> str:
        return "Table:\n  prompt"


@pytest.mark.parametrize("rows", [5, {"prompt": ["a"]}, [None], [{"prompt": "fine"}, "text"], Table()], ids=str)
def test_what_is_no_list_of_rows_is_one_sentence(rows: Any) -> None:
    with pytest.raises(UserError, match=r"a data set is a list of rows, each a dict with a prompt, got [^\n]+$"):
        read_examples(rows)


def test_rows_whose_own_code_fails_and_no_rows_to_evaluate_are_one_sentence() -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield {"prompt": "a"}
        raise ValueError("no\nconnection")

    with pytest.raises(UserError, match="the data set cannot be read to its end: it raised ValueError: no connection"):
        read_examples(rows())
    with pytest.raises(UserError, match="eval_dataset has no rows: leave it out"):
        reward_task([anything], dataset=[{"prompt": "a"}], eval_dataset=[]).load_problems(resolve({}))


def test_a_file_of_another_kind_and_a_saved_folder_are_named(tmp_path: Path) -> None:
    for name in ("rows.txt", "rows.jsonl.gz"):
        (tmp_path / name).write_text("a")
        with pytest.raises(
            UserError, match=rf"{name} is a file of another kind than \.jsonl, \.json, \.parquet, \.csv"
        ):
            read_examples(tmp_path / name)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"one that save_to_disk wrote: pass dataset=datasets\.load_from_disk"):
        read_examples(tmp_path / "saved")


def test_a_reward_without_rows_asks_for_them() -> None:
    with pytest.raises(UserError, match="a reward function needs rows with a prompt"):
        reward_task([anything]).load_problems(resolve({}))


@pytest.mark.parametrize(
    ("problems", "sentence"),
    [
        (5, "dataset of an environment is a list of problems, got 5"),
        ("rows.jsonl", "dataset of an environment is a list of problems, got 'rows.jsonl'"),
        ([{"id": 1}], "each problem of dataset is an object with an id"),
        ([], "an environment has nothing to train on"),
    ],
)
def test_problems_of_an_environment_are_objects_with_an_id(problems: Any, sentence: str) -> None:
    environment: Any = SimpleNamespace(prompt=str, act=str, results=str)
    with pytest.raises(UserError, match=sentence):
        environment_task(environment, problems).load_problems(resolve({}))


def test_a_method_that_takes_other_values_is_told_before_anything_starts() -> None:
    def act(problem: Any, access: Any) -> None:
        raise NotImplementedError

    environment: Any = SimpleNamespace(prompt=str, act=act, results=str)
    with pytest.raises(
        UserError, match="environment SimpleNamespace: act is called with 3 values: too many positional"
    ):
        environment_task(environment, [])
    environment.act, environment.execute = lambda problem, access, seed: None, act  # a helper of the agent's own
    environment_task(environment, [])

    async def prompt(problem: Any) -> str:
        raise NotImplementedError

    environment.prompt = prompt
    with pytest.raises(UserError, match="SimpleNamespace: prompt is a coroutine, and must be plain"):
        environment_task(environment, [])


def test_an_environment_is_an_object() -> None:
    with pytest.raises(UserError, match="environment is the class Table: pass an object of it"):
        environment_task(Table, [])  # type: ignore[arg-type]


def test_each_row_has_an_id_of_its_own() -> None:
    """As where a column `id` says which source a row is from; the column stays what it is."""
    rows = read_examples([{"prompt": "a", "id": "gsm8k"}, {"prompt": "b"}, {"prompt": "c", "id": "gsm8k"}])
    assert [row.id for row in rows] == ["gsm8k", "1", "gsm8k#2"]
    assert [row.columns.get("id") for row in rows] == ["gsm8k", None, "gsm8k"]
    assert [row.id for row in read_examples([{"prompt": "a", "id": name} for name in ("a", "a#2", "a")])][2] == "a#2#2"


def test_no_rows_and_no_such_set() -> None:
    with pytest.raises(UserError, match="has no rows"):
        read_examples([])
    with pytest.raises(UserError, match=r"no/such-set"):
        read_examples("no/such-set")
    for path, where in (("/no/such/rows.jsonl", ""), ("rows.parquet", f" in {Path.cwd()}"), ("./rows", " in ")):
        with pytest.raises(UserError, match=f"the data set {path} does not exist{where}"):
            read_examples(path)
    for named in ("", " , ", [""]):
        with pytest.raises(UserError, match=r"data\.dataset names no data set"):
            reward_task([anything], dataset=named).load_problems(resolve({}))


def test_held_out_rows_follow_the_seed() -> None:
    rows = read_examples([{"prompt": str(n)} for n in range(10)])
    train, held = hold_out(rows, 3, seed=1)
    assert (len(train), len(held)) == (7, 3)
    assert held == hold_out(rows, 3, seed=1)[1] != hold_out(rows, 3, seed=2)[1]
    with pytest.raises(UserError, match="leaves nothing"):
        hold_out(rows, 10, seed=1)


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A `datasets` library whose hub has org/sums in two splits and org/one in one; the calls that it had."""
    calls: list[dict[str, Any]] = []
    sums = {name: [{"prompt": f"{name} {n}", "sum": n} for n in range(4)] for name in ("train", "test")}

    def load_dataset(path: str, *, split: str | None = None, **options: Any) -> Any:
        calls.append({"path": path, "split": split} | options)
        if path == "org/gated":
            raise ValueError("Dataset 'org/gated' is a gated dataset on the Hub.\nVisit it")
        if path not in ("org/sums", "org/one"):
            raise ConnectionError("Couldn't reach it (offline mode is enabled)")
        found = sums if path == "org/sums" else {"validation": [{"prompt": "alone"}]}
        return found[split] if split else found

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


def prompts(source: str, split: str = "train") -> list[Any]:
    return [example.prompt for example in read_examples(source, split)]


def test_names_on_the_hub_with_configuration_revision_and_split(fake_hub: list[dict[str, Any]]) -> None:
    assert prompts("org/sums")[0] == "train 0"
    assert prompts("org/sums", "test")[0] == "test 0"
    assert prompts("org/one") == ["alone"], "the only split that there is"
    assert prompts("org/sums/hard@abc123:test")[0] == "test 0"
    assert fake_hub[-1] == {"path": "org/sums", "name": "hard", "revision": "abc123", "split": "test"}
    with pytest.raises(UserError, match=r"has no split dev: append one as org/sums:train"):
        prompts("org/sums", "dev")


@pytest.mark.parametrize("file", ["rows.csv", "data/train/rows.jsonl.gz"])
def test_a_folder_of_data_files_goes_to_the_library(fake_hub: list[dict[str, Any]], tmp_path: Path, file: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    with pytest.raises(UserError, match="does not load"):
        read_examples(tmp_path)
    assert fake_hub == [{"path": str(tmp_path), "split": None}]


@pytest.mark.parametrize("file", ["notes.txt", ".hidden/rows.jsonl", "a/b/model.safetensors", None])
def test_a_folder_without_data_files_is_one_sentence(
    fake_hub: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str | None
) -> None:
    folder = tmp_path / "org" / "sums"
    path = folder / (file or "empty/x")
    path.parent.mkdir(parents=True)
    if file:
        path.touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (str(folder), "./org/sums", "~/org/sums", "org/sums", "org/sums:test"):
        with pytest.raises(UserError, match=r"the folder .*org/sums holds no data files \(.*\.parquet"):
            reward_task([anything]).load_problems(resolve({"data.dataset": name}))
    assert fake_hub == []


def test_a_folder_of_too_many_files_is_left_at_once(
    fake_hub: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "MOST_FILES", 50)
    (tmp_path / "rows.csv").touch()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    with pytest.raises(UserError, match="holds more than 50 files, too many for a data set: name the folder of"):
        read_examples(tmp_path)
    assert fake_hub == []


def test_a_gated_set_and_a_hub_out_of_reach_are_one_sentence(fake_hub: list[dict[str, Any]]) -> None:
    for name, reason in (("org/gated", "gated dataset on the Hub"), ("org/unknown", "offline mode is enabled")):
        with pytest.raises(UserError, match=rf"{name} does not load: .*{reason}.*HF_TOKEN") as caught:
            read_examples(name)
        assert "\n" not in str(caught.value)


def test_several_sets_have_weights_and_ids_of_their_own(fake_hub: list[dict[str, Any]]) -> None:
    names = ("org/sums:train", "org/sums:test")
    config = resolve({"data.dataset": names, "data.weights": (1.0, 2.0), "data.held_out": (0, 1)})
    train, held_out = reward_task([anything]).load_problems(config)
    assert sorted(row.id for row in train if row.id.startswith("org/sums:train")) == [
        f"org/sums:train/{n}" for n in range(4)
    ]
    assert len([row for row in train if row.id.startswith("org/sums:test")]) == 6
    assert len(held_out) == 1
    with pytest.raises(UserError, match=r"data\.weights has 3 values and data\.dataset names 2"):
        reward_task([anything]).load_problems(resolve({"data.dataset": names, "data.weights": (1.0, 2.0, 3.0)}))


def test_sets_that_an_environment_would_not_read_are_refused() -> None:
    environment: Any = SimpleNamespace(prompt=str, act=str, results=str)
    problems = [SimpleNamespace(id=1)]
    with pytest.raises(
        UserError, match=r"data\.dataset = 'rows.jsonl' would not be read: an environment gets its prob"
    ):
        environment_task(environment, problems).load_problems(resolve({"data.dataset": "rows.jsonl"}))
    assert environment_task(environment, problems).load_problems(resolve({})) == (problems, [])


def test_rounds_of_an_agent_which_has_none_are_refused() -> None:
    agent: Any = SimpleNamespace(prompt=str, act=str, results=str)
    environment: Any = SimpleNamespace(prompt=str, execute=str, feedback_text=str, results=str)
    problems, rounds = [SimpleNamespace(id=1)], resolve({"grpo.rounds": 2})
    with pytest.raises(UserError, match=r"grpo\.rounds = 2 would be one: an agent's own code says how often it asks"):
        environment_task(agent, problems).load_problems(rounds)
    assert environment_task(environment, problems).load_problems(rounds) == (problems, [])


def test_training_and_evaluation_sets_of_their_own(fake_hub: list[dict[str, Any]], tmp_path: Path) -> None:
    config = resolve({"data.dataset": "org/sums", "data.eval_dataset": "org/sums", "data.held_out": 3})
    train, held_out = reward_task([anything]).load_problems(config)
    assert [row.prompt for row in train] == [f"train {n}" for n in range(4)]
    assert [row.prompt for row in held_out] == [f"test {n}" for n in range(4)]
    both = reward_task([anything], dataset=["org/sums", "org/one"], eval_dataset="org/one").load_problems(config)
    assert len(both[0]) == 5
    given = reward_task([anything], dataset=[{"prompt": "a"}], eval_dataset="org/one").load_problems(config)
    assert [[row.prompt for row in rows] for rows in given] == [["a"], ["alone"]]


def test_a_data_set_without_end_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "MOST_ITEMS", 10)
    assert len(read_examples({"prompt": "a"} for _ in range(10))) == 10
    with pytest.raises(UserError, match="the data set has more than 10 items, or no end: pass a part of it"):
        read_examples({"prompt": "a"} for _ in count())


def test_what_a_resumed_run_compares_of_its_data(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "set" / "part.jsonl").touch()
    file, folder = str(tmp_path / "rows.jsonl"), str(tmp_path / "set")
    config = resolve({"data.dataset": [file, folder], "data.eval_dataset": "org/one"})
    rewards = reward_task([anything])
    before = digests_of(rewards, config, ([], []))
    assert list(before) == [file, folder, "org/one"]
    for hidden in (".cache/lock", "sub/.DS_Store"):
        (tmp_path / "set" / hidden).parent.mkdir()
        (tmp_path / "set" / hidden).touch()
    assert digests_of(rewards, config, ([], [])) == before
    (tmp_path / "set" / "part.jsonl").rename(tmp_path / "set" / "other.jsonl")
    after = digests_of(rewards, config, ([], []))
    assert [name for name in before if before[name] != after[name]] == [folder]
    # Of problems without a file the ids and prompts, in their order, as far as these are plain.

    def of(task: Task) -> dict[str, str]:
        return digests_of(task, resolve({}), task.load_problems(resolve({"data.held_out": 0})))

    rows = [{"prompt": "a"}, {"prompt": MESSAGES}]
    given, again, turned = (
        of(reward_task([anything], dataset=[{**row, "x": object()} for row in order]))
        for order in (rows, rows, rows[::-1])
    )
    assert given == again != turned
    own = SimpleNamespace(prompt=str, execute=lambda *_: 0, feedback_text=str, results=lambda *_: [])
    given, again, turned = (
        of(environment_task(own, [SimpleNamespace(id=number, prompt=object()) for number in order]))
        for order in ((1, 2), (1, 2), (2, 1))
    )
    assert given == again != turned
    # HumanEval comes with its package, and of tried problems the trial says which are left.
    assert digests_of(task_of(resolve({})), resolve({}), ([], [])) == {}
