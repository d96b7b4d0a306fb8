"""How completions are drawn, and how long is waited for them and for the environment."""

from __future__ import annotations

from dataclasses import dataclass

from fastgrpo.config import Config


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn, and the deadlines in seconds.

    `deadline_s` bounds the wait for one completion, `execute_s` one answer of the environment, and `straggler_s` (0 =
    not at all) what still executes after the batch's last completion. `max_turns`: completions of an agent's rollout.
    """

    max_new_tokens: int
    max_model_len: int
    temperature: float = 1.0
    rounds: int = 1
    max_turns: int = 64
    deadline_s: float = 1800.0
    execute_s: float = 600.0
    straggler_s: float = 0.0

    @classmethod
    def of(cls, config: Config) -> Sampling:
        """How the policy's completions are drawn in training."""
        return cls(
            max_new_tokens=config.grpo.max_new_tokens,
            max_model_len=config.engine.max_model_len,
            temperature=config.grpo.temperature,
            rounds=config.grpo.rounds,
            max_turns=config.grpo.max_turns,
            deadline_s=config.engine.completion_timeout_s,
            execute_s=config.grpo.execute_s,
            straggler_s=config.grpo.straggler_s,
        )

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the longest prompt that leaves room for a completion."""
        return self.max_model_len - self.max_new_tokens
