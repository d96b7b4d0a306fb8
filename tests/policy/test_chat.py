"""Token ids of prompts and feedback, with and without a chat template."""

import pytest

from fastgrpo.policy.chat import completion_ids, feedback_ids, prompt_ids
from fastgrpo.policy.demo_policy import END, train_tokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}" + END + "{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def plain():
    return train_tokenizer(["write a workflow", "[user] [assistant]"], 300)


@pytest.fixture
def chat(plain):
    plain.chat_template = TEMPLATE
    return plain


def test_without_a_template_the_text_is_all_there_is(plain) -> None:
    assert plain.decode(prompt_ids(plain, "query")) == "query"
    assert plain.decode(feedback_ids(plain, "try again", plain.eos_token_id)) == "try again"


def test_completions_end_with_the_token_that_generation_stops_at(plain) -> None:
    assert completion_ids(plain, "text")[-1] == plain.eos_token_id


def test_a_template_frames_the_query(chat) -> None:
    assert chat.decode(prompt_ids(chat, "query")) == "[user]query\n[assistant]"


def test_feedback_continues_the_conversation_without_a_second_end(chat) -> None:
    after_stop = feedback_ids(chat, "again", chat.eos_token_id)
    assert chat.decode(after_stop) == "\n[user]again\n[assistant]"
    cut_short = feedback_ids(chat, "again", 5)
    assert cut_short == [chat.eos_token_id, *after_stop]
