"""The one configuration: every key once, with its type, default, bounds and help line.

Defaults suit a language model of billions of parameters on a GPU; `demo.toml` beside this file has those of the
embedded policy, which runs where no model is named.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

Dtype = Literal["auto", "float32", "bfloat16"]
LossName = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo"]
Ratio = Literal["token", "sequence", "cispo"]
Normaliser = Literal["token", "sequence", "constant"]
Advantage = Literal["grpo", "dr_grpo", "rloo"]
KlEstimator = Literal["k1", "k2", "k3", "unbiased", "k1_reward"]
RewardScale = Literal["advantage", "group", "batch", "none", "terms"]
ImportanceCorrection = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
# Eleven days: in milliseconds the system's waits count it, with what is added to it, in 32 bits.
LONGEST_S = 10**6
# As the jails' own limits have it: a solution that was slow once is tried with six times wall_s.
LONGEST_JAIL_S = 14400
# Beyond any use: steps and what else is counted one after the other; what is there at once; tokens of one text.
MOST, MOST_AT_ONCE, LONGEST_TEXT = 10**9, 2**16, 2**24
Count = Annotated[int, Meta(ge=0, le=MOST)]
Positive = Annotated[float, Meta(gt=0)]
EfficiencyBy = Literal["tokens", "calls", "dollars", "seconds"]

PRESET_KEYS = ("ratio", "normaliser", "advantage", "clip_low", "clip_high", "importance_correction")

# What each name in the literature means in our two orthogonal choices (ratio x normaliser), its advantage and clips.
LOSS_PRESETS: dict[str, dict[str, Any]] = {
    name: dict(zip(PRESET_KEYS, values, strict=True))
    for name, values in {
        # DeepSeekMath, arXiv 2402.03300, eq. 3: mean over each answer's tokens, then over answers.
        "grpo": ("token", "sequence", "grpo", 0.2, 0.2, "token_truncate"),
        # Dr. GRPO, arXiv 2503.20783: no division by the group's deviation, nor by the answer's length.
        "dr_grpo": ("token", "constant", "dr_grpo", 0.2, 0.2, "token_truncate"),
        # DAPO, arXiv 2503.14476: mean over all tokens, clip-higher.
        "dapo": ("token", "token", "grpo", 0.2, 0.28, "token_truncate"),
        # GSPO, arXiv 2507.18071: length-normalised sequence ratio, so clips are far tighter.
        "gspo": ("sequence", "sequence", "grpo", 3e-4, 4e-4, "sequence_truncate"),
        # CISPO, arXiv 2506.13585: the ratio is clipped as a constant weight; clip_low 1.0 = no lower bound.
        "cispo": ("cispo", "token", "grpo", 1.0, 4.0, "token_truncate"),
    }.items()
}


class Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the configuration file."""


class Data(Section, frozen=True):
    """Problems."""

    dataset: Annotated[
        str | tuple[str, ...],
        Meta(description="humaneval, the path of a file of problems or a name on the hub; several: a list"),
    ] = "humaneval"
    eval_dataset: Annotated[
        str | tuple[str, ...],
        Meta(description="sets for evaluation alone, in the place of data.held_out; empty = none"),
    ] = ""
    weights: Annotated[
        Positive | tuple[Positive, ...],
        Meta(description="how often a problem of each set is drawn, beside one of another set"),
    ] = 1.0
    reward: Annotated[
        str,
        Meta(description="reward functions in TRL's form, module:function, with commas; empty = the task's own"),
    ] = ""
    environment: Annotated[
        str, Meta(description="verifiers:NAME trains on that environment; empty = the task's own")
    ] = ""
    environment_args: Annotated[
        str, Meta(description='the table [env] of verifiers as JSON, e.g. {"agent": {"max_turns": 4}}')
    ] = ""
    seed: Annotated[
        int,
        Meta(
            ge=0, lt=2**32, description="seed of the draw of used and held-out problems, alike for all runs' own seeds"
        ),
    ] = 0
    problems: Annotated[Count, Meta(description="problems of each set that are used, drawn by data.seed; 0 = all")] = 0
    instruction: Annotated[
        Literal["full", "short"], Meta(description="full explains the operators; short is for a policy that knows them")
    ] = "full"
    held_out: Annotated[
        Count | tuple[Count, ...],
        Meta(description="problems of each set kept for evaluation, never trained on, drawn by data.seed"),
    ] = 44
    keep_unsolved: Annotated[
        bool, Meta(description="keep problems whose own solution fails their tests; else they are left out")
    ] = False
    deadline_factor: Annotated[
        float,
        Meta(
            ge=0,
            description="deadline over the own solution's seconds, at least 1 s, at most sandbox.wall_s; 0 = wall_s",
        ),
    ] = 20.0


class Model(Section, frozen=True):
    """The policy."""

    path: Annotated[
        str,
        Meta(description="causal LM or adapter: a folder or a name on the hub; or a GGUF file; empty = the tiny one"),
    ] = ""
    source: Annotated[
        str, Meta(description="recorded, not to be set: what path named before a folder was made from it")
    ] = ""
    revision: Annotated[
        str, Meta(description="the hub's commit, tag or branch of the model, recorded as the commit; empty = main")
    ] = ""
    system_prompt: Annotated[str, Meta(description="opens every conversation; empty = the chat template's own")] = ""
    chat_template: Annotated[
        bool, Meta(description="false: prompts are read as plain text, as by a base model, without the chat template")
    ] = True
    chat_template_kwargs: Annotated[
        str, Meta(description='arguments of the chat template as JSON, e.g. {"enable_thinking": false}')
    ] = ""
    recompute_mlp: Annotated[
        bool, Meta(description="recompute MLPs in backward: a third of the activations for a tenth more time")
    ] = False
    gradient_checkpointing: Annotated[
        bool,
        Meta(description="recompute layers in backward: a seventh of the activations, a quarter more time"),
    ] = False
    compile: Annotated[
        bool, Meta(description="torch.compile of each decoder layer, in place of this package's kernels: a minute")
    ] = False
    offload_optimizer: Annotated[
        bool, Meta(description="master weights and Adam moments live in the host's memory: less on the GPU")
    ] = False
    lora_rank: Annotated[
        int,
        Meta(ge=0, le=MOST_AT_ONCE, description="rank of LoRA adapters, which alone are trained; 0 = all weights are"),
    ] = 0
    lora_alpha: Annotated[float, Meta(gt=0, description="adapters are scaled by this / lora_rank")] = 32.0


class Engine(Section, frozen=True):
    """vLLM, on the trainer's own device and weights."""

    dtype: Annotated[Dtype, Meta(description="weights in vLLM and in the trainer; auto = bfloat16 on a GPU")] = "auto"
    max_model_len: Annotated[
        int,
        Meta(
            ge=16,
            le=LONGEST_TEXT,
            description="most tokens of a prompt with its completions; problems without room for one are left out",
        ),
    ] = 4096
    max_num_seqs: Annotated[int, Meta(ge=1, le=2**16, description="sequences decoded together")] = 256
    gpu_memory_utilization: Annotated[
        float, Meta(gt=0, le=1, description="share of the GPU's memory that the run's plan may fill")
    ] = 0.9
    kv_cache_gib: Annotated[float, Meta(gt=0, le=2**20, description="KV cache without a GPU, GiB")] = 1.0
    kv_cache_dtype: Annotated[
        Literal["auto", "fp8"],
        Meta(description="fp8 halves the KV cache; parity grows, which grpo.importance_correction weighs"),
    ] = "auto"
    enforce_eager: Annotated[bool, Meta(description="no CUDA graphs: a faster start, slower decoding")] = False
    parity_threshold: Annotated[
        float,
        Meta(gt=0, description="stop above this mean |logprob difference| vLLM - trainer, nats; 4 times it with fp8"),
    ] = 0.15
    step_timeout_s: Annotated[
        float,
        Meta(
            gt=0, le=LONGEST_S, description="stop, for vLLM hangs, when a decoding step takes longer than this, seconds"
        ),
    ] = 40.0
    completion_timeout_s: Annotated[
        float,
        Meta(
            gt=0,
            le=LONGEST_S,
            description="stop where a completion, its wait for others included, takes longer, seconds",
        ),
    ] = 1800.0
    process: Annotated[
        Literal["auto", "own", "shared"],
        Meta(description="vLLM decodes in a process of its own, or in the trainer's; auto = own on a GPU"),
    ] = "auto"
    tensor_parallel: Annotated[
        int,
        Meta(
            ge=1,
            le=MOST_AT_ONCE,
            description="ranks that hold one vLLM together; above 1 training is sharded over all ranks",
        ),
    ] = 1


class Workers(Section, frozen=True):
    """Who answers the operators; a table [workers.others.NAME] adds a worker that differs in the keys it sets."""

    kind: Annotated[Literal["simulated", "openai"], Meta(description="simulated needs no network")] = "simulated"
    name: Annotated[
        str, Meta(pattern=r"^\w{1,64}$", description="what workflows call the endpoint's worker, beside others")
    ] = "worker"
    base_url: Annotated[str, Meta(description="OpenAI-compatible endpoint, e.g. http://localhost:8000/v1")] = ""
    model: Annotated[str, Meta(description="model name at the endpoint")] = ""
    api_key_env: Annotated[str, Meta(description="environment variable that holds the endpoint's key")] = (
        "OPENAI_API_KEY"
    )
    concurrency: Annotated[int, Meta(ge=1, le=MOST_AT_ONCE, description="requests in flight at once")] = 64
    timeout_s: Annotated[float, Meta(gt=0, le=LONGEST_S, description="deadline of one request, seconds")] = 60.0
    retries: Annotated[int, Meta(ge=0, le=MOST_AT_ONCE, description="further attempts after a failed request")] = 4
    temperature: Annotated[float, Meta(ge=0, description="sampling temperature of the workers")] = 0.7
    max_tokens: Annotated[int, Meta(ge=1, le=LONGEST_TEXT, description="longest answer of a worker, tokens")] = 2048
    prompt_price: Annotated[float, Meta(ge=0, description="US dollars for a million prompt tokens")] = 0.0
    completion_price: Annotated[float, Meta(ge=0, description="US dollars for a million completion tokens")] = 0.0
    cache_dir: Annotated[str, Meta(description="folder of cached answers; empty = no cache")] = ""
    drop: Annotated[
        str,
        Meta(description="parameters that the endpoint refuses, of max_tokens, temperature and seed; comma-separated"),
    ] = ""
    extra_body: Annotated[str, Meta(description="JSON object that is added to every request")] = ""
    latency_scale: Annotated[
        float, Meta(ge=0, description="factor of the seconds that simulated workers take; 0 = they answer at once")
    ] = 0.0
    others: dict[str, dict[str, Any]] = {}

    def by_name(self) -> dict[str, Workers]:
        """Every worker's settings, this section's own first: the others take from it what they do not set."""
        own = msgspec.structs.replace(self, others={})
        return {self.name: own} | {
            name: msgspec.structs.replace(own, **differs) for name, differs in self.others.items()
        }

    @property
    def dropped(self) -> tuple[str, ...]:
        """The names in `drop`."""
        return tuple(filter(None, re.split(r"[\s,]+", self.drop)))


class Sandbox(Section, frozen=True):
    """Jails that run untrusted code."""

    hosts: Annotated[
        str | tuple[str, ...],
        Meta(description="servers that run solutions, as http://HOST:PORT, several: a list; or ray; empty = none"),
    ] = ""
    cells: Annotated[int, Meta(ge=0, le=MOST_AT_ONCE, description="jails at once; 0 = chosen from the CPU count")] = 0
    workflows: Annotated[
        int, Meta(ge=1, le=MOST_AT_ONCE, description="workflows running at once, each in a jail of its own")
    ] = 1024
    workflow_s: Annotated[
        float, Meta(gt=0, le=LONGEST_JAIL_S, description="deadline of one workflow with its worker calls, seconds")
    ] = 60.0
    wall_s: Annotated[
        float,
        Meta(
            gt=0,
            le=LONGEST_JAIL_S,
            description="deadline of one execution of a solution, seconds; waits for a processor left out",
        ),
    ] = 10.0
    cpu_s: Annotated[float, Meta(gt=0, le=LONGEST_JAIL_S, description="CPU seconds of one execution")] = 10.0
    memory_mb: Annotated[int, Meta(ge=32, le=2**20, description="memory of one jail, MiB")] = 512
    processes: Annotated[int, Meta(ge=1, le=256, description="processes and threads of one jail")] = 32
    output_bytes: Annotated[
        int, Meta(ge=1024, le=2**22, description="stdout + stderr kept before the jail is stopped")
    ] = 65536

    @property
    def servers(self) -> tuple[str, ...]:
        """The names in `hosts`."""
        return tuple(filter(None, (self.hosts,) if isinstance(self.hosts, str) else self.hosts))


class RewardWeights(Section, frozen=True):
    """Weights of the reward's terms: performance - complexity - efficiency + diversity - format."""

    performance: Annotated[float, Meta(ge=0, description="share of hidden tests passed")] = 1.0
    judge: Annotated[
        str, Meta(description="worker whose score of a solution takes the place of hidden tests; empty = the tests")
    ] = ""
    complexity: Annotated[float, Meta(ge=0, description="structure of the workflow, by its code and its calls")] = 0.2
    efficiency: Annotated[float, Meta(ge=0, description="what it spent at run time beyond one call")] = 0.1
    efficiency_by: Annotated[EfficiencyBy, Meta(description="what is counted as spent")] = "tokens"
    warmup_steps: Annotated[
        int,
        Meta(
            ge=0,
            le=MOST,
            description="complexity and efficiency grow from 0 to their weights over so many training steps",
        ),
    ] = 0
    diversity: Annotated[float, Meta(ge=0, description="distinctness within the group")] = 0.05
    format: Annotated[float, Meta(ge=0, description="penalty of a completion without a valid workflow")] = 0.5


class Sft(Section, frozen=True):
    """Stage 1: distillation of a teacher, then supervised fine-tuning."""

    teacher: Annotated[Literal["scripted", "openai"], Meta(description="openai = the workers' endpoint")] = "scripted"
    teacher_samples: Annotated[int, Meta(ge=1, le=MOST_AT_ONCE, description="trajectories for each problem")] = 8
    rounds: Annotated[
        int, Meta(ge=1, le=MOST_AT_ONCE, description="workflows a trajectory: each sees the last one's feedback")
    ] = 3
    keep: Annotated[
        Literal["best", "all"], Meta(description="best = each problem's trajectory of the highest reward alone")
    ] = "best"
    min_pass_rate: Annotated[
        float,
        Meta(ge=0, le=1, description="share of the hidden tests that a trajectory's solution must pass to be learned"),
    ] = 0.5
    epochs: Annotated[int, Meta(ge=0, le=MOST, description="passes over the trajectories; 0 = no warm start")] = 3
    lr: Annotated[float, Meta(gt=0, description="peak learning rate")] = 1e-5
    batch_tokens: Annotated[int, Meta(ge=16, le=MOST, description="tokens of one optimizer step")] = 65536


class Grpo(Section, frozen=True):
    """Stage 2: reinforcement learning."""

    steps: Annotated[int, Meta(ge=0, le=MOST, description="training steps in all, each on fresh rollouts")] = 200
    prompts_per_step: Annotated[int, Meta(ge=1, le=MOST, description="problems (groups) a step")] = 64
    group_size: Annotated[int, Meta(ge=2, le=MOST_AT_ONCE, description="rollouts of each problem")] = 8
    refill: Annotated[
        int,
        Meta(
            ge=0,
            le=MOST_AT_ONCE,
            description="at most so many further batches replace a step's groups without variance; 0 = none",
        ),
    ] = 0
    curriculum: Annotated[
        float, Meta(ge=0, le=1, description="share of a step's problems drawn by p (1 - p) of the pass rate p so far")
    ] = 0.0
    rounds: Annotated[
        int, Meta(ge=1, le=MOST_AT_ONCE, description="completions a rollout: each sees the feedback on the last one")
    ] = 1
    max_turns: Annotated[
        int,
        Meta(
            ge=1,
            le=MOST_AT_ONCE,
            description="completions of an agent's rollout, at most: further requests are refused",
        ),
    ] = 64
    max_new_tokens: Annotated[int, Meta(ge=1, le=LONGEST_TEXT, description="longest completion, tokens")] = 2048
    execute_s: Annotated[
        float,
        Meta(
            gt=0,
            le=LONGEST_S,
            description="deadline of the environment for one completion, seconds; beyond it there is no reward",
        ),
    ] = 600.0
    straggler_s: Annotated[
        float,
        Meta(
            ge=0,
            le=LONGEST_S,
            description="seconds for what still executes after a step's last completion; 0 = execute_s",
        ),
    ] = 0.0
    max_infrastructure: Annotated[
        float, Meta(ge=0, le=1, description="stop where a larger share of a step's rollouts fail in the environment")
    ] = 0.5
    # vLLM's own bounds: it would sample at 0.01 where the trainer divides by less, and refuse more than 2.
    temperature: Annotated[float, Meta(ge=0.01, le=2, description="sampling temperature")] = 1.0
    top_p: Annotated[
        float, Meta(gt=0, le=1, description="sample the likeliest tokens that have this mass; 1 = all")
    ] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=MOST, description="sample this many likeliest tokens; 0 = all")] = 0
    min_p: Annotated[
        float, Meta(ge=0, le=1, description="sample tokens at least this times as likely as the likeliest; 0 = all")
    ] = 0.0
    stop: Annotated[
        str | tuple[str, ...],
        Meta(
            description="text that ends a completion, and stays in it, beside end tokens; several: a list; empty = none"
        ),
    ] = ""
    lr: Annotated[float, Meta(gt=0, description="learning rate of AdamW")] = 1e-6
    warmup_steps: Annotated[int, Meta(ge=0, le=MOST, description="steps over which the learning rate rises to lr")] = 4
    decay_steps: Annotated[
        int,
        Meta(
            ge=0, le=MOST, description="steps, from the first, over which lr falls to lr x min_lr_ratio; 0 = constant"
        ),
    ] = 0
    decay: Annotated[Literal["linear", "cosine"], Meta(description="how lr falls over decay_steps")] = "linear"
    min_lr_ratio: Annotated[
        float, Meta(ge=0, le=1, description="share of lr to which it falls over decay_steps, and where it stays")
    ] = 0.0
    beta1: Annotated[float, Meta(ge=0, lt=1, description="AdamW's decay of the mean")] = 0.9
    beta2: Annotated[float, Meta(ge=0, lt=1, description="AdamW's decay of the variance")] = 0.95
    weight_decay: Annotated[float, Meta(ge=0, description="decoupled weight decay")] = 0.0
    skip_grad_norm: Annotated[float, Meta(gt=0, description="a step with a larger gradient norm is skipped")] = 1e3
    max_skipped: Annotated[int, Meta(ge=1, le=MOST, description="stop after this many skipped steps in a row")] = 5
    max_grad_norm: Annotated[float, Meta(gt=0, description="clip the gradient's global norm")] = 1.0
    loss: Annotated[LossName, Meta(description="sets the next six where they are not set themselves")] = "dapo"
    ratio: Annotated[Ratio, Meta(description="importance ratio: of a token, a sequence, or CISPO's weight")] = "token"
    normaliser: Annotated[
        Normaliser, Meta(description="mean over all tokens, over each sequence's, or over max_new_tokens for each")
    ] = "token"
    advantage: Annotated[
        Advantage,
        Meta(description="reward less the group's mean, over its deviation (grpo) or not; rloo: less the others' mean"),
    ] = "grpo"
    clip_low: Annotated[float, Meta(ge=0, le=1, description="ratio is clipped below 1 - this")] = 0.2
    clip_high: Annotated[float, Meta(ge=0, description="ratio is clipped above 1 + this")] = 0.28
    clip_dual: Annotated[
        float, Meta(ge=0, description="ratio is clipped above this where the advantage is negative; 0 = not")
    ] = 0.0
    importance_correction: Annotated[
        ImportanceCorrection,
        Meta(description="unit of the weight trainer / vLLM, which above tis_cap is the cap (truncate) or 0 (mask)"),
    ] = "token_truncate"
    reward_scale: Annotated[
        RewardScale,
        Meta(
            description="what divides advantages: the rewards' deviation in group or batch, or each function's; "
            "advantage = as it says"
        ),
    ] = "advantage"
    loss_function: Annotated[
        str, Meta(description="module:function of a loss by token, in place of ratio, clips and importance weight")
    ] = ""
    kl_weight: Annotated[
        float, Meta(ge=0, description="weight of the KL to the policy at the start; 0 = no reference")
    ] = 0.0
    kl_estimator: Annotated[
        KlEstimator,
        Meta(
            description="how the loss estimates that KL: k2 and unbiased have its gradient; k1_reward: k1 in the reward"
        ),
    ] = "k3"
    entropy_weight: Annotated[float, Meta(ge=0, description="weight of the entropy bonus, by token; 0 = none")] = 0.0
    overlong_filter: Annotated[
        bool, Meta(description="truncated completions leave the loss, but not their group's baseline")
    ] = False
    overlong_penalty_tokens: Annotated[
        int,
        Meta(
            ge=0,
            le=LONGEST_TEXT,
            description="the reward falls by up to 1 over the last tokens before max_new_tokens; 0 = off",
        ),
    ] = 0
    tis_cap: Annotated[
        float, Meta(ge=0, description="cap of the importance weight trainer / vLLM; 0 = no correction")
    ] = 2.0
    routing_replay: Annotated[
        bool,
        Meta(description="a mixture's tokens are trained with the experts that vLLM chose as it sampled them (R3)"),
    ] = False
    micro_batch_tokens: Annotated[int, Meta(ge=16, le=2**22, description="tokens of one forward and backward")] = 16384
    mini_batches: Annotated[
        int, Meta(ge=1, le=MOST, description="parts of a step's rollouts, each for an optimizer step of its own")
    ] = 1
    epochs_per_batch: Annotated[int, Meta(ge=1, le=MOST, description="passes over the same rollouts")] = 1
    max_lag: Annotated[
        int,
        Meta(
            ge=0,
            le=MOST_AT_ONCE,
            description="updates by which a step's rollouts begin early, beside the training; 0 = none",
        ),
    ] = 0
    in_flight: Annotated[
        bool, Meta(description="weights change between two decoding steps, under rollouts that go on; needs max_lag")
    ] = False

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts in `stop`."""
        return tuple(filter(None, (self.stop,) if isinstance(self.stop, str) else self.stop))

    @property
    def truncates(self) -> bool:
        """Whether some tokens of the vocabulary are never sampled."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


class Eval(Section, frozen=True):
    """Evaluation on the held-out problems."""

    every: Annotated[
        int, Meta(ge=0, le=MOST, description="steps between evaluations while it trains; 0 = before and after it alone")
    ] = 0
    samples: Annotated[int, Meta(ge=1, le=MOST_AT_ONCE, description="rollouts of each problem")] = 4
    temperature: Annotated[float, Meta(ge=0, le=2, description="sampling temperature; 0 = greedy")] = 1.0
    drafts: Annotated[int, Meta(ge=2, le=8, description="drafts of the fixed workflows that draw several")] = 4


class Checkpoint(Section, frozen=True):
    """Resumable checkpoints in Hugging Face format."""

    every: Annotated[int, Meta(ge=1, le=MOST, description="steps between checkpoints")] = 10
    keep: Annotated[int, Meta(ge=1, le=MOST, description="latest checkpoints kept, besides the best")] = 2


class Record(Section, frozen=True):
    """What a run leaves to read."""

    tracker: Annotated[
        Literal["none", "wandb", "trackio"], Meta(description="where curves and samples go beside TensorBoard")
    ] = "none"
    samples_mib: Annotated[
        int,
        Meta(ge=0, le=MOST, description="MiB of samples.jsonl with its older parts, the oldest are dropped; 0 = any"),
    ] = 1024


class Config(Section, frozen=True):
    """Everything a run depends on."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][\w.-]*$", description="the run's folder under `runs`")] = "demo"
    runs: Annotated[str, Meta(description="folder of all runs")] = "runs"
    task: Annotated[
        Literal["flow", "code"],
        Meta(description="flow: the policy writes workflows (FlowReasoner); code: programs themselves"),
    ] = "flow"
    seed: Annotated[int, Meta(ge=0, lt=2**32, description="seed of everything random")] = 0
    data: Data = Data()
    model: Model = Model()
    engine: Engine = Engine()
    workers: Workers = Workers()
    sandbox: Sandbox = Sandbox()
    reward: RewardWeights = RewardWeights()
    sft: Sft = Sft()
    grpo: Grpo = Grpo()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    record: Record = Record()

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(os.path.expanduser(self.runs)) / self.name
