"""Rows as their users have them, and one sentence for those that are none."""

from pathlib import Path

import pytest

from fastgrpo.errors import UserError
from fastgrpo.rollouts.dataset import hold_out, read_examples

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def test_rows_keep_their_columns_and_get_an_id() -> None:
    text, chat = read_examples([{"prompt": "Hi", "answer": 4}, {"prompt": MESSAGES, "id": 9}])
    assert (text.id, text.prompt, text.columns) == ("0", "Hi", {"answer": 4})
    assert (chat.id, chat.prompt, chat.columns) == ("9", MESSAGES, {})


def test_a_file_of_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n\n{"prompt": "b", "n": 1}\n')
    assert [example.prompt for example in read_examples(path)] == ["a", "b"]
    path.write_text('{"prompt": "a"}\n[1]\n')
    with pytest.raises(UserError, match=r"rows.jsonl:2 is no JSON object"):
        read_examples(path)


@pytest.mark.parametrize(
    "row", [{"question": "Hi"}, {"prompt": ""}, {"prompt": []}, {"prompt": [{"role": "user"}]}, {"prompt": 3}]
)
def test_a_row_without_a_prompt_is_named(row: dict) -> None:
    with pytest.raises(UserError, match="row 1 of the data set needs a prompt"):
        read_examples([{"prompt": "fine"}, row])


def test_no_rows_and_no_such_set() -> None:
    with pytest.raises(UserError, match="has no rows"):
        read_examples([])
    with pytest.raises(UserError, match=r"no/such-set"):
        read_examples("no/such-set")


def test_held_out_rows_follow_the_seed() -> None:
    rows = read_examples([{"prompt": str(n)} for n in range(10)])
    train, held = hold_out(rows, 3, seed=1)
    assert (len(train), len(held)) == (7, 3)
    assert held == hold_out(rows, 3, seed=1)[1] != hold_out(rows, 3, seed=2)[1]
    with pytest.raises(UserError, match="leaves nothing"):
        hold_out(rows, 10, seed=1)
