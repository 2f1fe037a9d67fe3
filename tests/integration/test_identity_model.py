"""Any history of links, unlinks, events, erasures and losses of Redis against a model in a few lines, read through two replicas.

More than the usual 25 histories: ``IDENTITY_HISTORIES=1000 pytest tests/integration/test_identity_model.py``.
"""

import asyncio
import contextlib
import os
import uuid
from dataclasses import dataclass, field

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from server.domain import Stored, Subject, Token
from server.errors import InvalidRequestError, NotFoundError, PreconditionError
from server.settings import ServerSettings
from tests.integration.fixtures import NewShop
from tests.integration.replicas import Replica, assert_whole, replica

PEOPLE = st.integers(0, 4)
EVENTS = st.sampled_from("abcdef")
EITHER = st.integers(0, 1)


@dataclass
class Model:
    """Personas are numbers in order of creation, identities are numbers too; everything else follows from the links."""

    home: dict[int, int] = field(default_factory=dict)
    own: dict[int, set[str]] = field(default_factory=dict)
    links: set[frozenset[int]] = field(default_factory=set)
    family: dict[int, int] = field(default_factory=dict)
    forgotten: set[int] = field(default_factory=set)

    def meet(self, person: int) -> int:
        if person not in self.home:
            persona = len(self.own)
            self.home[person], self.own[persona], self.family[persona] = persona, set(), persona
        return self.home[person]

    def component(self, persona: int) -> set[int]:
        reached, new = {persona}, {persona}
        while new:
            new = {other for link in self.links if link & new for other in link} - reached
            reached |= new
        return reached

    def root(self, person: int) -> int:
        return min(self.component(self.home[person]))

    def seen(self, person: int) -> list[str]:
        return sorted(set().union(*(self.own[persona] for persona in self.component(self.home[person]))))

    def join(self, left: int, right: int) -> None:
        if left != right:
            self.links.add(frozenset({left, right}))
        new, old = self.family[left], self.family[right]
        self.family = {persona: new if family == old else family for persona, family in self.family.items()}

    def forget(self, person: int) -> None:
        gone = self.component(self.home[person])
        self.links = {link for link in self.links if not link & gone}
        self.forgotten |= {known for known, persona in self.home.items() if persona in gone}
        self.home = {known: persona for known, persona in self.home.items() if persona not in gone}
        self.family = {persona: family for persona, family in self.family.items() if persona not in gone}


class Histories(RuleBasedStateMachine):
    """One runner, two replicas and one shop for all histories; each has people of its own."""

    runner: asyncio.Runner
    replicas: tuple[Replica, Replica]
    shop: ServerSettings

    @initialize()
    def begin(self) -> None:
        self.model = Model()
        self.prefix = uuid.uuid4().hex
        self.tokens: list[tuple[int, Token]] = []
        self.newest: dict[int, int] = {}
        self.ids: dict[int, str] = {}

    def who(self, person: int) -> Subject:
        return Subject(channel=("web", "app")[person % 2], channel_user_id=f"{self.prefix}-{person}")

    def given(self, person: int, token: Token) -> None:
        """A token that an answer about a person carried."""
        root = self.model.root(person)
        assert self.ids.setdefault(root, token.user_id) == token.user_id
        assert token.version >= self.newest.get(person, 0)
        self.tokens.append((root, token))

    @rule(person=PEOPLE, name=EVENTS, one=EITHER)
    def record(self, person: int, name: str, one: int) -> None:
        (outcome,) = self.runner.run(self.replicas[one].write(self.who(person), name)).outcomes
        if person in self.model.forgotten:
            assert (outcome.status, outcome.reason) == (Stored.REJECTED, "SUBJECT_FORGOTTEN")
            return
        persona = self.model.meet(person)
        assert outcome.status is (Stored.DUPLICATE if name in self.model.seen(person) else Stored.STORED)
        if outcome.status is Stored.STORED:
            self.model.own[persona].add(name)
        known = self.runner.run(self.replicas[one].identities.resolve(self.who(person)))
        self.given(person, Token(known.user_id, known.user_version))

    @rule(person=PEOPLE, one=EITHER)
    def resolve(self, person: int, one: int) -> None:
        work = self.replicas[one].identities.resolve(self.who(person), create=True)
        if person in self.model.forgotten:
            with pytest.raises(PreconditionError):
                self.runner.run(work)
            return
        resolved = self.runner.run(work)
        assert resolved.created == (person not in self.model.home)
        self.model.meet(person)
        self.given(person, Token(resolved.user_id, resolved.user_version))

    @rule(left=PEOPLE, right=PEOPLE, one=EITHER)
    def link(self, left: int, right: int, one: int) -> None:
        work = self.replicas[one].graph.link(self.who(left), self.who(right))
        if left == right or {left, right} & self.model.forgotten:
            with pytest.raises((InvalidRequestError, PreconditionError)):
                self.runner.run(work)
            return
        # Two new identities are created in order of (channel, id).
        for person in sorted((left, right), key=lambda person: (self.who(person).channel, person)):
            self.model.meet(person)
        linked = self.runner.run(work)
        self.model.join(self.model.home[left], self.model.home[right])
        self.given(left, linked.token)

    @rule(left=PEOPLE, right=st.none() | PEOPLE, one=EITHER)
    def unlink(self, left: int, right: int | None, one: int) -> None:
        work = self.replicas[one].graph.unlink(self.who(left), None if right is None else self.who(right))
        if left == right or left not in self.model.home or (right is not None and right not in self.model.home):
            with pytest.raises((InvalidRequestError, NotFoundError)):
                self.runner.run(work)
            return
        unlinked = self.runner.run(work)
        home, other = self.model.home[left], None if right is None else self.model.home[right]
        gone = {link for link in self.model.links if home in link and (other is None or other in link)}
        self.model.links -= gone
        assert unlinked.removed_links == len(gone)
        assert unlinked.still_linked == (right is not None and self.model.root(left) == self.model.root(right))
        self.given(left, unlinked.token)

    @rule(person=PEOPLE, one=EITHER, dice=st.integers(0, 4))
    def forget(self, person: int, one: int, dice: int) -> None:
        if dice:  # now and then
            return
        work = self.replicas[one].erasure.forget(self.who(person))
        if person not in self.model.home and person not in self.model.forgotten:
            with pytest.raises(NotFoundError):
                self.runner.run(work)
            return
        assert self.runner.run(work).online_erased
        if person in self.model.home:
            self.model.forget(person)

    @precondition(lambda self: self.tokens)
    @rule(person=PEOPLE, one=EITHER, data=st.data())
    def read_with_a_token(self, person: int, one: int, data: st.DataObject) -> None:
        persona, token = data.draw(st.sampled_from(self.tokens))
        work = self.replicas[one].read(self.who(person), token)
        home = self.model.home.get(person)
        if home is None or self.model.family.get(persona) != self.model.family[home]:
            with pytest.raises(InvalidRequestError) as refused:
                self.runner.run(work)
            assert refused.value.reason == "TOKEN_OF_OTHER_USER"
            return
        user_id, version, seen = self.runner.run(work)
        assert seen == self.model.seen(person)
        assert version >= token.version or token.user_id != user_id

    @rule()
    def lose_redis(self) -> None:
        redis.Redis.from_url(self.shop.redis_url).flushdb()

    @invariant()
    def everybody_reads_what_the_links_say(self) -> None:
        for person in range(5):
            for one in self.replicas:
                user_id, version, seen = self.runner.run(one.read(self.who(person)))
                if person not in self.model.home:
                    assert (user_id, seen) == ("", [])
                    continue
                assert seen == self.model.seen(person)
                assert user_id == self.ids.setdefault(self.model.root(person), user_id)
                assert version >= self.newest.get(person, 0)  # monotonic for whoever reads by this identity
                self.newest[person] = version
        assert len(set(self.ids.values())) == len(self.ids)


def test_every_history_ends_as_the_model_says(new_shop: NewShop) -> None:
    shop = new_shop().model_copy(update={"postgres_pool_size": 4})
    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()

        async def opened() -> tuple[Replica, Replica]:
            return await stack.enter_async_context(replica(shop)), await stack.enter_async_context(replica(shop))

        class OverStores(Histories):
            pass

        OverStores.runner, OverStores.replicas, OverStores.shop = runner, runner.run(opened()), shop
        count = int(os.environ.get("IDENTITY_HISTORIES", "25"))
        try:
            run_state_machine_as_test(
                OverStores,
                settings=settings(
                    max_examples=count,
                    stateful_step_count=25,
                    deadline=None,
                    derandomize=count == 25,
                    database=None,
                    suppress_health_check=list(HealthCheck),
                ),
            )
        finally:
            runner.run(stack.aclose())
    assert_whole(shop)
