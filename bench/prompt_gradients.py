"""Does a policy's choice of workflow hang on the query? How alike the gradients of that choice are for two data sets.

    python bench/prompt_gradients.py runs/NAME/traces.jsonl MODEL [--prompts 24] [--seed 0]

For prompts of the two largest data sets of the traces (by the problem's id up to its number): g = the gradient of
log p(A | prompt) - log p(B | prompt) by all parameters, A and B the commonest texts of the two structures that most
traces have. Where g is the same for both sets, a step that was learned from one moves the other as far. Prints the mean
cosine of two prompts within each set and between them, the cosine of the sets' mean gradients, and A's odds over B.
"""

from __future__ import annotations

import argparse
import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from fastgrpo.errors import UserError
from fastgrpo.flow.adaptivity import structure
from fastgrpo.flow.distill import TeacherTrace, read_traces
from fastgrpo.policy.folder import load_tokenizer
from fastgrpo.program import run_program


def contrasted(traces: Sequence[TeacherTrace]) -> tuple[str, str]:
    """A and B."""
    texts = defaultdict[str, Counter[str]](Counter)
    for trace in traces:
        texts[structure(trace.workflow)][trace.text] += 1
    first, second = sorted(texts.values(), key=Counter.total, reverse=True)[:2]
    return first.most_common(1)[0][0], second.most_common(1)[0][0]


def prompts_by_set(traces: Sequence[TeacherTrace], count: int, seed: int) -> dict[str, list[str]]:
    """`count` prompts of each of the two sets with the most problems. Raises UserError for traces of one set."""
    found = defaultdict[str, dict[str, str]](dict)
    for trace in traces:
        found[re.sub(r"\W*\d+$", "", trace.problem_id)][trace.problem_id] = trace.prompt
    largest = sorted(found, key=lambda name: -len(found[name]))[:2]
    if len(largest) < 2:
        raise UserError("the traces are of one data set, and two are compared: name traces of two kinds of query")
    draw = random.Random(seed)
    return {name: draw.sample(list(found[name].values()), min(count, len(found[name]))) for name in largest}


def log_probability(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, text: str) -> Tensor:
    """log p(text | prompt), a scalar."""
    before, after = (tokenizer(part, add_special_tokens=False).input_ids for part in (prompt, text))
    logits_TV = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
    return logits_TV.log_softmax(-1).gather(1, torch.tensor(after)[:, None]).sum()


def gradient(model: PreTrainedModel, difference: Tensor) -> Tensor:
    """The gradient of `difference` by all parameters, fp32 [parameters]."""
    model.zero_grad()
    difference.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone()


def mean_cosine(left_NP: Tensor, right_NP: Tensor) -> float:
    """Of all pairs of different rows."""
    cosines = torch.nn.functional.normalize(left_NP) @ torch.nn.functional.normalize(right_NP).T
    if left_NP is right_NP:
        cosines = cosines[~torch.eye(len(cosines), dtype=torch.bool)]
    return float(cosines.mean())


def main() -> None:
    """Print the figures of one policy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path)
    parser.add_argument("model", help="a Hugging Face folder")
    parser.add_argument("--prompts", type=int, default=24, help="of each set (24)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    traces = read_traces(options.traces)
    tokenizer = load_tokenizer(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model).float().eval()
    texts, rows = contrasted(traces), {}
    for name, prompts in prompts_by_set(traces, options.prompts, options.seed).items():
        odds, gradients = [], []
        for prompt in prompts:
            first, second = (log_probability(model, tokenizer, prompt, text) for text in texts)
            odds.append(float(first - second))
            gradients.append(gradient(model, first - second))
        rows[name] = torch.stack(gradients)
        print(f"{name}: {len(prompts)} prompts, log odds {sum(odds) / len(odds):+.2f}")
    (left, left_NP), (right, right_NP) = rows.items()
    print(f"cosine within {left} {mean_cosine(left_NP, left_NP):.3f}")
    print(f"within {right} {mean_cosine(right_NP, right_NP):.3f}")
    print(f"between them {mean_cosine(left_NP, right_NP):.3f}")
    print(f"of their means {float(torch.cosine_similarity(left_NP.mean(0), right_NP.mean(0), dim=0)):.3f}")


if __name__ == "__main__":
    run_program(main)
