"""Which personas are one customer, as arithmetic on links: roots, who moves, and the versions that follow."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True)
class Member:
    """A persona as its row stands; ``root`` is the customer it belongs to now (itself, or the one it is merged into)."""

    user_id: str
    created_at: datetime
    version: int
    root: str


@dataclass(frozen=True)
class Regrouping:
    """What has to change so that the rows say what the links say.

    Attributes:
        moves: persona → (root it had, root it gets).
        versions: new version of every root, old or new, whose customer became another one.
        merged: customers that are no longer one of their own, in id order; none that was only just created.
        roots: all roots afterwards, in id order.
    """

    moves: Mapping[str, tuple[str, str]]
    versions: Mapping[str, int]
    merged: tuple[str, ...]
    roots: tuple[str, ...]


def roots(members: Iterable[Member], links: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Returns the root of every persona: in its component the one created first, ties by the smaller id."""
    order = {member.user_id: (member.created_at, member.user_id) for member in members}
    parent = {user_id: user_id for user_id in order}

    def find(user_id: str) -> str:
        while parent[user_id] != user_id:
            parent[user_id] = parent[parent[user_id]]  # halving keeps a chain of any length flat
            user_id = parent[user_id]
        return user_id

    for left, right in links:
        older, younger = sorted((find(left), find(right)), key=order.__getitem__)
        parent[younger] = older
    return {user_id: find(user_id) for user_id in order}


def regroup(
    members: Collection[Member], links: Iterable[tuple[str, str]], *, fresh: Collection[str] = (), events: int | None = None
) -> Regrouping:
    """Plans the way from the roots that stand to those the links ask for.

    A merge adds the versions of its customers up, plus one for each that is merged away: above every version given out, and
    the same in whatever order they merge. Customers that were one before count each other's events already: there the highest
    version plus one is enough, and adding would double with every round of linking and unlinking. A split leaves all sides one
    above the version they had together. So a version is never below the number of events.

    Args:
        members: every persona of the components concerned.
        links: the links between them from now on.
        fresh: personas that this transaction has created: nobody has seen them, so they change no version.
        events: how many events the personas have, given when the customers to be merged were one before.
    """
    after = roots(members, links)
    version = {member.user_id: member.version for member in members}
    sources: dict[str, set[str]] = {}
    targets: dict[str, set[str]] = {}
    for member in members:
        if member.user_id not in fresh:
            sources.setdefault(after[member.user_id], set()).add(member.root)
            targets.setdefault(member.root, set()).add(after[member.user_id])
    versions = {}
    for root, olds in sources.items():
        known = [version[old] for old in olds]
        if root not in olds or any(len(targets[old]) > 1 for old in olds):
            versions[root] = max(version[root], *known) + 1
        elif len(olds) > 1:
            versions[root] = sum(known) + len(known) - 1 if events is None else max(*known, events) + 1
    # One version more for those merged away: a replica still writing the last state of one must not overtake its marker.
    merged = sorted(targets.keys() - sources.keys())
    versions |= {old: version[old] + 1 for old in merged}
    moves = {member.user_id: (member.root, after[member.user_id]) for member in members if member.root != after[member.user_id]}
    return Regrouping(moves, versions, tuple(merged), tuple(sorted(set(after.values()))))
