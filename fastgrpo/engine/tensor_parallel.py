"""One vLLM over several ranks: each has a scheduler of its own, so all must submit the same requests and step together.

The first rank of a replica leads. It alone runs rollouts, and tells the others before each step of the engine which
requests came in; they do the same with their part of the engine until its rollouts are over.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from torch import distributed

from fastgrpo.ranks.collectives import STAGE_WAIT_S, STEP_WAIT_S, awaiting, leads_replica, replica_leader


class Lockstep:
    """What the ranks of one replica have in common: one that leads and tells, `ranks` - 1 that hear and follow.

    Made on all ranks at once. With one rank there is nobody to tell. A leader's `begin` goes with the others' `hear`s
    until None, which its `end` tells; a rank that does not come in time is named by a RankError.
    """

    def __init__(self, ranks: int) -> None:
        self.leads = leads_replica(ranks)
        self.ranks, self._begun, self._group = ranks, False, None
        self._first = replica_leader(ranks)
        if ranks > 1:
            timeout = timedelta(seconds=STAGE_WAIT_S)
            with awaiting("the other ranks' rollouts to begin", STAGE_WAIT_S):
                self._group, _ = distributed.new_subgroups(ranks, backend="gloo", timeout=timeout)

    def begin(self) -> None:
        """The leader's rollouts begin; the others listen from now on."""
        self._begun = self.leads

    def tell(self, work: Any | None) -> None:
        """Let the others do the `work` and step, as the leader is about to; a follower tells nobody."""
        if self.leads and self.ranks > 1:
            with awaiting("the ranks that share this rank's vLLM", STEP_WAIT_S):
                distributed.broadcast_object_list([work], self._first, self._group)

    def end(self) -> None:
        """The leader's rollouts are over, if they had begun."""
        if self._begun:
            self._begun = False
            self.tell(None)

    def hear(self) -> Any | None:
        """What the leader does before its next step; None where its rollouts are over."""
        heard: list[Any] = [None]
        with awaiting(f"the rollouts of rank {self._first}", STAGE_WAIT_S):
            distributed.broadcast_object_list(heard, self._first, self._group)
        return heard[0]
