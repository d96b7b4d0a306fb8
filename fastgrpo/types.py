"""The nouns of the engine, each once. Names carry shapes: T tokens of a packed batch, S sequences, N loss tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Self

import msgspec
import numpy as np
import torch

if TYPE_CHECKING:
    from fastgrpo.config import Config


class Reward(msgspec.Struct, frozen=True, kw_only=True):
    """What a rollout earned: `total` moves the policy; `terms` says by name what it is made of, as it is logged.

    `weights`: how much a term, weighted already, counts once its deviation is divided out (`grpo.reward_scale` terms),
    0 or more; empty where the terms are told alone, and need not add up to the total.
    """

    total: float
    terms: dict[str, float] = {}
    weights: dict[str, float] = {}


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What an environment makes of one rollout, all that the engine asks of it.

    `status` is counted and shown. "infrastructure" means that the environment itself failed: such a rollout has no
    `reward`, is left out of its group's baseline and never scored 0; `error` says why. `metrics` are numbers whose
    means over the rollouts are logged by their names; `record` is added to the rollout's line in samples.jsonl.
    `answered_at`: when, by `time.perf_counter()`, the last service that the rollout asked, such as a worker model, had
    answered; None where none was asked.
    """

    status: str = "ok"
    reward: Reward | None = None
    metrics: dict[str, float] = {}
    record: dict[str, Any] = {}
    error: str = ""
    answered_at: float | None = None


INFRASTRUCTURE: Final = "infrastructure"
UNENDED = Result(status=INFRASTRUCTURE, error="the rollout has not ended")


@dataclass(slots=True)
class Trace:
    """One sequence as it was sampled: an entry for each token in each of the lists.

    `loss_mask` is 1 where the policy wrote the token, `logprobs` is vLLM's logprob there and `versions` counts the
    updates behind the weights that it was sampled from; both are 0 elsewhere. `routes`: the experts that vLLM chose for
    the first tokens, [tokens, layers, k], where it tells them.
    """

    token_ids: list[int]
    loss_mask: list[int]
    logprobs: list[float]
    versions: list[int] = field(default_factory=list, kw_only=True)
    routes: np.ndarray | None = field(default=None, kw_only=True)

    def extend(
        self, token_ids: Sequence[int], mask: int, logprobs: Sequence[float] = (), versions: Sequence[int] = ()
    ) -> None:
        """Append tokens that all have the same `mask`; those that the policy did not write have nothing else."""
        self.token_ids.extend(token_ids)
        self.loss_mask.extend([mask] * len(token_ids))
        self.logprobs.extend(logprobs or [0.0] * len(token_ids))
        self.versions.extend(versions or [0] * len(token_ids))

    def add_routes(self, routes: np.ndarray | None) -> None:
        """The experts of a completion's tokens and of all before it: each token keeps those it had first."""
        if routes is not None and self.routes is not None:
            routes = np.concatenate([self.routes, routes[len(self.routes) :]])
        self.routes = routes


@dataclass(slots=True)
class Rollout(Trace):
    """One sampled trajectory: prompt, completion and, with several rounds, feedback and further completions.

    `executions` has what the environment made of each completion. `writing_s` seconds passed until the completions were
    there, beside all that the engine decoded with them. `branches` are an agent's further conversations, which share
    the reward. `result` is there once the whole group has ended.
    """

    completions: list[str]
    executions: list[Any] = field(default_factory=list)
    truncated: bool = False
    writing_s: float = 0.0
    result: Result = UNENDED
    branches: list[Trace] = field(default_factory=list)

    @property
    def traces(self) -> list[Trace]:
        """The rollout's sequences, each of which is trained."""
        return [self, *self.branches]

    @property
    def written(self) -> int:
        """Tokens that the policy wrote."""
        return sum(sum(trace.loss_mask) for trace in self.traces)

    @property
    def reward(self) -> Reward | None:
        """The rollout's reward; None where a failure of the environment, not of the policy, ended it."""
        return self.result.reward


@dataclass(slots=True)
class Group:
    """The rollouts of one problem: the baseline of GRPO's advantage (DeepSeekMath, arXiv 2402.03300, eq. 3).

    `prompt` is the text or the conversation that the policy read.
    """

    problem: Any
    prompt: str | list[dict[str, str]]
    rollouts: list[Rollout]


@dataclass(slots=True, eq=False)
class Sample:
    """What the optimizer sees of one sequence: `Rollout`'s three lists and one advantage for all its loss tokens.

    token_ids: int32, loss_mask: bool, logprobs: float32; made from any sequences. As arrays, because ranks exchange
    all samples of a step. routes: `Trace`'s, an entry for each token, -1 where vLLM told none; None where it tells none
    at all.
    """

    token_ids: np.ndarray
    loss_mask: np.ndarray
    logprobs: np.ndarray
    advantage: float = 1.0
    routes: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.token_ids = np.asarray(self.token_ids, np.int32)
        self.loss_mask = np.asarray(self.loss_mask, np.bool_)
        self.logprobs = np.asarray(self.logprobs, np.float32)
        if self.routes is not None and (missing := len(self.token_ids) - len(self.routes)):
            self.routes = np.pad(self.routes, [(0, missing), (0, 0), (0, 0)], constant_values=-1)

    @classmethod
    def empty(cls) -> Self:
        """A sequence that moves nothing, but is one of those that a mean over sequences divides by."""
        return cls(np.empty(0), np.empty(0), np.empty(0), 0.0)

    @property
    def loss_tokens(self) -> int:
        """Tokens that enter the loss: the first token of a sequence has no prediction and never counts."""
        return int(np.count_nonzero(self.loss_mask[1:]))


@dataclass(slots=True)
class Runs:
    """Which keys each token of a packed row of T tokens may see: its own run's up to itself, and its run's prompt.

    A run is a whole sequence, a prompt that several sequences share, or what one of those continues it with.
    cu_queries_S: int32, S+1 boundaries of the runs; max_queries: tokens of the longest. Where prompts are shared,
    key_index_U holds the positions of every run's keys, run by run (a continuation's: the prompt's, then its own), and
    cu_keys_S and max_keys are its boundaries; else key_index_U is None and keys are as queries.
    """

    cu_queries_S: torch.Tensor
    max_queries: int
    cu_keys_S: torch.Tensor
    max_keys: int
    key_index_U: torch.Tensor | None = None
    fp8_cache: bool = False


@dataclass(slots=True)
class RoutingReplay:
    """Experts that the T tokens of a packed row are to have in each of L mixtures, [T, L, K]; -1 where not known.

    counts_2: int64; what the policy's passes over it have counted: pairs of a token and a layer with known experts, and
    those of them for which the policy's own choice would be another.
    """

    experts_TLK: torch.Tensor
    counts_2: torch.Tensor


@dataclass(slots=True)
class Batch:
    """Sequences packed without padding into one row of T tokens, of which N are predicted in the loss.

    input_ids_T, position_ids_T: int64. loss_index_N: positions whose hidden state predicts a loss token (the last of a
    shared prompt predicts several); targets_N: that token; sequence_N: index of the token's sequence in the whole step;
    the rest are fp32 [N]: advantage, normaliser weight, and logprobs under the sampling policy (vLLM), the old policy
    (trainer) and the reference. replay: the experts that vLLM chose, None where each layer chooses for itself.
    """

    input_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    runs: Runs
    loss_index_N: torch.Tensor
    targets_N: torch.Tensor
    sequence_N: torch.Tensor
    advantages_N: torch.Tensor
    weights_N: torch.Tensor
    sampled_logprobs_N: torch.Tensor
    old_logprobs_N: torch.Tensor | None = None
    ref_logprobs_N: torch.Tensor | None = None
    replay: RoutingReplay | None = field(default=None, kw_only=True)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn, and the deadlines in seconds."""

    max_new_tokens: int
    max_model_len: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = all
    min_p: float = 0.0
    stop: tuple[str, ...] = ()  # each text ends a completion
    rounds: int = 1
    max_turns: int = 64  # completions of an agent's rollout
    deadline_s: float = 1800.0  # the wait for one completion
    execute_s: float = 600.0  # one answer of the environment
    straggler_s: float = 0.0  # what still executes after the batch's last completion; 0 = no bound of its own
    routes: bool = False  # keep the experts that vLLM tells, hundreds of bytes a token

    @classmethod
    def of(cls, config: Config) -> Sampling:
        """How the policy's completions are drawn in training."""
        return cls(
            max_new_tokens=config.grpo.max_new_tokens,
            max_model_len=config.engine.max_model_len,
            temperature=config.grpo.temperature,
            top_p=config.grpo.top_p,
            top_k=config.grpo.top_k,
            min_p=config.grpo.min_p,
            stop=config.grpo.stops,
            rounds=config.grpo.rounds,
            max_turns=config.grpo.max_turns,
            deadline_s=config.engine.completion_timeout_s,
            execute_s=config.grpo.execute_s,
            straggler_s=config.grpo.straggler_s,
            routes=config.grpo.routing_replay,
        )

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the longest prompt that leaves room for a completion."""
        return self.max_model_len - self.max_new_tokens


class EvalRow(msgspec.Struct, frozen=True, kw_only=True):
    """One sampled completion of one held-out problem, with the environment's metrics of it.

    A number that is not finite is null in a file and counts in no mean. `difficulty` in [0, 1] and `dataset` are the
    problem's, where it has them; `workflow` is the code that ran, else the last completion.
    """

    stage: str
    problem_id: str
    status: str
    reward: float | None
    metrics: dict[str, float | None]
    difficulty: float | None = None
    dataset: str = ""
    workflow: str = ""

    def plain(self) -> dict[str, Any]:
        """The fields, and the metrics beside them."""
        return self.metrics | msgspec.structs.asdict(self)
