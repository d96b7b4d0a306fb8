"""Token ids of prompts, answers and feedback: without a chat template, and with those of well-known models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from fastgrpo.config import Model
from fastgrpo.errors import UserError
from fastgrpo.policy.chat import Chat, load_chat
from fastgrpo.policy.demo_policy import END, train_tokenizer
from fastgrpo.policy.folder import end_token_ids
from tests.helpers.chat_model import save_chat_model
from tests.helpers.tiny_model import save_tiny_model

PLAIN = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}" + END + "{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Qwen's: an end of a turn that is not the tokenizer's own, and thoughts that can be switched off.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1].strip() }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# DeepSeek's and QwQ's: the prompt opens the thoughts.
OPENED = CHATML.replace("assistant\n{%", "assistant\n<think>\n{%")
# Gemma's: no system role, an end of a turn beside the end of a text.
GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Llama 2's: a space before the end; GLM's: the next turn's opening is the end of the last one.
LLAMA = (
    "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} " + END + "{% else %}"
    "[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
GLM = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>")
TEMPLATES = {
    "plain": (PLAIN, END),
    "chatml": (CHATML, "<|im_end|>"),
    "opened": (OPENED, "<|im_end|>"),
    "gemma": (GEMMA, "<end_of_turn>"),
    "llama": (LLAMA, END),
    "glm": (GLM, "<|user|>"),
}


def tokenizer(template: str | None = None, *, special: tuple[str, ...] = SPECIAL) -> Any:
    made = train_tokenizer(["write a workflow", "[user] [assistant]"], 300)
    made.add_tokens([AddedToken(token, special=True) for token in special])
    made.chat_template = template
    return made


def chat(name: str, **options: Any) -> Chat:
    return Chat(tokenizer(TEMPLATES[name][0]), **options)


def test_without_a_template_the_text_is_all_there_is() -> None:
    plain = Chat(tokenizer())
    assert plain.tokenizer.decode(plain.prompt_ids("query")) == "query"
    assert plain.tokenizer.decode(plain.feedback_ids("try again", plain.turn_end_id)) == "try again"
    assert plain.stop_token_ids == [plain.tokenizer.eos_token_id] == plain.completion_ids("text")[-1:]


def test_the_template_can_be_left_out(tmp_path: Path) -> None:
    """As a base model's, or where a row's prompt has been rendered already."""
    folder = save_chat_model(tmp_path / "model")
    plain, own = (load_chat(folder, Model(chat_template=use)) for use in (False, True))
    assert plain.tokenizer.decode(plain.prompt_ids("def f(x):")) == "def f(x):"
    rendered = own.tokenizer.decode(own.prompt_ids("def f(x):"))
    assert rendered.endswith("<|im_start|>assistant\n")
    assert plain.prompt_ids(rendered) == own.prompt_ids("def f(x):")
    assert (plain.is_rendered(rendered), own.is_rendered(rendered)) == (False, True)


def test_a_text_that_has_the_token_of_its_beginning_gets_no_second_one() -> None:
    """As what Llama's, Gemma's and Mistral's templates have rendered."""
    tokenizer = train_tokenizer(["count the vowels"] * 4, 300)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    plain = Chat(tokenizer)
    words = tokenizer.encode("count", add_special_tokens=False)
    assert plain.prompt_ids("count") == plain.prompt_ids("<s>count") == [begin, *words]


@pytest.mark.parametrize("template", [None, PLAIN])
def test_what_is_no_unicode_is_a_question_mark(template: str | None) -> None:
    made = Chat(tokenizer(template))
    assert made.prompt_ids("a \ud800 b") == made.prompt_ids("a ? b")
    assert made.feedback_ids("\udcff", made.turn_end_id) == made.feedback_ids("?", made.turn_end_id)


def test_a_template_frames_the_query() -> None:
    ids = chat("plain").prompt_ids("query")
    assert chat("plain").tokenizer.decode(ids) == "[user]query\n[assistant]"


@pytest.mark.parametrize("name", ["chatml", "gemma", "glm"])
def test_a_text_that_is_a_rendered_conversation_is_known(name: str) -> None:
    made, turns = chat(name), [{"role": "user", "content": "?"}]
    rendered = made.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert made.is_rendered(rendered)
    assert not made.is_rendered("What is <b>?")
    assert not made.is_rendered([{"role": "user", "content": rendered}])
    assert not Chat(tokenizer()).is_rendered(rendered)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_turn_ends_where_the_template_ends_it(name: str) -> None:
    made = chat(name)
    end = made.tokenizer.convert_tokens_to_ids(TEMPLATES[name][1])
    assert made.turn_end_id == end == made.completion_ids("x")[-1]
    assert set(made.stop_token_ids) == {end, made.tokenizer.eos_token_id}


@pytest.mark.parametrize("name", TEMPLATES)
def test_turns_are_appended_to_what_was_sampled(name: str) -> None:
    """Where nothing is dropped from earlier turns, the whole conversation is the one that the template renders."""
    made = chat(name)
    answer = [*made.tokenizer.encode("x <b>", add_special_tokens=False), made.turn_end_id]
    ids = [*made.prompt_ids("?"), *answer, *made.feedback_ids("again", answer[-1])]
    text = made.tokenizer.decode(ids)
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x <b>"}]
    turns.append({"role": "user", "content": "again"})
    rendered = made.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    expected = rendered.replace("assistant\nx", "assistant\n<think>\nx") if name == "opened" else rendered
    assert text.replace(" ", "") == expected.replace(" ", "")
    cut = answer[:-1]
    assert made.feedback_ids("again", cut[-1])[: 1 + (name == "llama")][-1] == made.turn_end_id


def test_thoughts_stay_in_what_is_trained_and_are_not_opened_twice() -> None:
    made = chat("opened")
    prompt = made.tokenizer.decode(made.prompt_ids("q"))
    assert prompt.endswith("<think>\n")
    for text in ("<think>why</think>\nx", "<think>\nwhy</think>\nx"):
        assert made.tokenizer.decode(made.completion_ids(text)) == "why</think>\nx<|im_end|>"
    assert chat("chatml").text(chat("chatml").completion_ids("<think>why</think>")) == "<think>why</think>"


def test_tags_that_are_special_tokens_reach_the_parser() -> None:
    made = Chat(tokenizer(CHATML, special=(*SPECIAL, "<think>", "</think>")))
    for end in made.stop_token_ids:
        ids = [*made.completion_ids("<think>why</think>\nx")[:-1], end]
        assert made.text(ids) == "<think>why</think>\nx"
        assert made.text(ids[:-1]) == "<think>why</think>\nx", "cut by the length"


def test_system_prompt_and_template_arguments() -> None:
    made = chat("chatml", system_prompt="be brief", template_kwargs={"enable_thinking": False})
    prompt = made.tokenizer.decode(made.prompt_ids("q"))
    assert prompt.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nq<|im_end|>")
    assert prompt.endswith("<think>\n\n</think>\n\n")
    feedback = made.tokenizer.decode(made.feedback_ids("again", made.turn_end_id))
    assert "be brief" not in feedback
    assert feedback.endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        (GEMMA, {"system_prompt": "x"}, "System role not supported; check model.system_prompt"),
        ("{{ nothing.at.all }}", {}, "chat template fails"),
        (None, {"system_prompt": "x"}, "model.system_prompt needs a chat template"),
        (None, {"template_kwargs": {"a": 1}}, "model.chat_template_kwargs needs a chat template"),
    ],
)
def test_what_a_template_refuses_is_a_user_error(template: str | None, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Chat(tokenizer(template), **options)


def test_a_token_that_the_model_does_not_know_is_named(tmp_path: Path) -> None:
    """As of tokens that were added without new rows: vLLM reads past the embedding's end."""
    added = tokenizer()
    known = added.convert_tokens_to_ids("<|im_end|>")
    folder = save_tiny_model(tmp_path, vocab_size=known)
    added.save_pretrained(folder)
    made = load_chat(folder, Model())
    assert max(made.prompt_ids("write a <|im_start|>")) == known - 1
    for ids in (made.prompt_ids, made.completion_ids, lambda text: made.feedback_ids(text, 5)):
        with pytest.raises(UserError, match=rf"makes '<\|im_end\|>' token {known}, and the model knows {known}:"):
            ids("a <|im_end|>")
    added.chat_template = CHATML
    added.save_pretrained(folder)
    with pytest.raises(UserError, match=f"the model knows {known}"):
        load_chat(folder, Model())


def test_every_end_token_of_the_folder_stops(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path)
    assert load_chat(folder, Model()).stop_token_ids == [256]
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [256, 5, 7]}))
    made = load_chat(folder, Model())
    assert made.stop_token_ids == [5, 7, 256]
    assert made.text([65, 7]) == made.tokenizer.decode([65])


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b'{"eos_token_id": "x"}', b'{"eos_token_id": {}}'])
def test_settings_that_cannot_be_read_are_named(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "generation_config.json").write_bytes(text)
    with pytest.raises(UserError, match=r"generation_config\.json cannot be read: .*; download or save it again"):
        end_token_ids(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4], "time_step_limit": [0.0, Infinity]}')
    assert end_token_ids(tmp_path) == [3, 4]
