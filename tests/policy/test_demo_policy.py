"""The embedded policy: an ordinary Hugging Face folder, the same for the same corpus and seed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrpo.policy.demo_policy import create_policy, policy_config, train_tokenizer
from fastgrpo.policy.loading import load_policy
from fastgrpo.training.model_sizes import count_parameters

CORPUS = ["async def workflow(problem):\n    return await generate(problem)\n", "Problem:\ndef add(a, b):\n"] * 3
TOKENIZER = train_tokenizer(CORPUS, 400)


@given(st.text(max_size=200))
@settings(max_examples=100)
def test_any_text_survives_the_tokenizer(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = [tmp_path_factory.mktemp(f"policy{number}") for number in range(3)]
    for folder, seed in zip(made, (0, 0, 1), strict=True):
        create_policy(CORPUS, folder, seed=seed, vocab_size=400)
    return made


def test_it_loads_through_the_same_path_as_any_policy(folders) -> None:
    policy = load_policy(folders[0])
    assert policy.tokenizer.decode(policy.tokenizer.encode("await generate")) == "await generate"
    assert policy.model.config.eos_token_id == policy.tokenizer.eos_token_id


def test_it_is_small_enough_for_two_cores_and_large_enough_to_learn() -> None:
    assert 1e6 < count_parameters(policy_config()) < 5e6


def test_the_seed_alone_decides_its_weights(folders) -> None:
    first, again, other = (load_policy(folder).head_weight for folder in folders)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
