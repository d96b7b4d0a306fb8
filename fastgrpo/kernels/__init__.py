"""The loss head: fused linear layer, softmax, logprob, entropy and policy loss (`head.py` is the dispatcher)."""

from fastgrpo.kernels.head import LossOutput, LossStatistics, linear_grpo_loss, linear_logprob

__all__ = ["LossOutput", "LossStatistics", "linear_grpo_loss", "linear_logprob"]
