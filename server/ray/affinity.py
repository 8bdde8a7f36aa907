"""A request router that sends prompts with the same beginning to the same replica, which has it cached.

Rendezvous hashing with bounded loads: each beginning has an order of the replicas, and goes to the first of
them that is not much busier than the least busy. Nothing is stored, so that all routers agree, and the end of
a replica moves only the beginnings that it had.
"""

import hashlib
import random

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from server.ray.exchange import Forwarded


class PrefixAffinityRouter(RequestRouter):
    """Ray Serve constructs it where a deployment's ``request_router_config`` names it."""

    def initialize_state(self, characters: int = 256, shortest: int = 64, slack: int = 4) -> None:
        """Its ``request_router_kwargs``.

        Args:
            characters: of a prompt, that are its beginning.
            shortest: characters of a prompt below which nothing is worth caching: any replica serves it.
            slack: requests that a replica may have more than the least busy one.
        """
        self._characters, self._shortest, self._slack = characters, shortest, slack

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replicas to try, in groups: the least busy one of the first group with room is chosen."""
        beginning = _beginning(pending_request, self._characters)
        if len(candidate_replicas) < 2 or len(beginning) < self._shortest:
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
        names = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        lengths = {name: self._length(replica) for name, replica in names.items()}
        first, *others = ranked(beginning, lengths, self._slack)
        return [[names[first]], [names[name] for name in others]]

    def _length(self, replica: RunningReplica) -> int:
        return self.replica_queue_len_cache.get(replica.replica_id) or 0


def ranked(beginning: str, lengths: dict[str, int], slack: int) -> list[str]:
    """The replicas' names in the order in which a beginning prefers them, busy ones last.

    Args:
        lengths: requests that each of the replicas has.
        slack: how many more than the least busy one are not too many.
    """
    most = min(lengths.values()) + slack
    return sorted(lengths, key=lambda name: (lengths[name] > most, _weight(beginning, name)))


def _weight(beginning: str, name: str) -> bytes:
    return hashlib.blake2b(f"{name}\0{beginning}".encode(errors="replace"), digest_size=8).digest()


def _beginning(pending: PendingRequest | None, characters: int) -> str:
    first = pending.args[0] if pending is not None and pending.args else None
    return first.prompt[:characters] if isinstance(first, Forwarded) else ""
