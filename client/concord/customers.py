"""Who a call is about, and how new that customer's state must be: what the client remembers between calls."""

from collections import OrderedDict
from typing import TypeVar

from concord.v1.common_pb2 import ChannelIdentity, Subject

K = TypeVar("K")
V = TypeVar("V")

# A customer is named by the id this client's channel knows them by (a plain string), or by a Subject for any other way.
Customer = str | Subject


def user(user_id: str) -> Subject:
    """Returns the customer with Concord's own ``user_id``, for calls that do not go by the channel's id."""
    return Subject(user_id=user_id)


def subject_of(customer: Customer, channel: str) -> Subject:
    """Returns ``customer`` as a Subject; a plain string is an id in ``channel``."""
    if isinstance(customer, Subject):
        return customer
    return Subject(identity=ChannelIdentity(channel=channel, channel_user_id=customer))


class TokenMemory:
    """The newest consistency token of each customer this client wrote or read about, bounded: the least recently used go first.

    Tokens belong to user ids, while callers name customers by channel identities, so it also remembers which identity (or
    merged user id) turned out to be which user. Forgetting a token costs the promises (read your writes, never go back),
    not correctness: a read without one sees whatever state is newest online.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._users: OrderedDict[bytes, str] = OrderedDict()
        self._tokens: OrderedDict[str, tuple[int, str]] = OrderedDict()

    def identify(self, subject: Subject, user_id: str) -> None:
        """Remembers that ``subject`` is ``user_id``."""
        self._put(self._users, _key(subject), user_id)

    def remember(self, user_id: str, version: int, token: str) -> None:
        """Remembers ``token`` unless a newer version of that customer is known: answers may arrive out of order."""
        known = self._tokens.get(user_id)
        if token and (known is None or known[0] <= version):
            self._put(self._tokens, user_id, (version, token))

    def learn(self, subject: Subject, user_id: str, version: int, token: str) -> None:
        """Remembers what an answer about ``subject`` said: who it is, and how new."""
        if user_id and token:
            self.identify(subject, user_id)
            self.remember(user_id, version, token)

    def token_for(self, subject: Subject) -> str:
        """Returns the newest token of ``subject``, or an empty string."""
        user_id = self._user_id(subject)
        if user_id not in self._tokens:
            return ""
        self._tokens.move_to_end(user_id)
        if (key := _key(subject)) in self._users:
            self._users.move_to_end(key)
        return self._tokens[user_id][1]

    def drop(self, subject: Subject) -> None:
        """Forgets ``subject`` and the token of whoever that is."""
        self._tokens.pop(self._user_id(subject), None)
        self._users.pop(_key(subject), None)

    def _user_id(self, subject: Subject) -> str:
        user_id = subject.user_id or self._users.get(_key(subject), "")
        while (survivor := self._users.get(_key(user(user_id)), user_id)) != user_id:
            user_id = survivor
        return user_id

    def _put(self, entries: OrderedDict[K, V], key: K, value: V) -> None:
        entries[key] = value
        entries.move_to_end(key)
        if len(entries) > self._capacity:
            entries.popitem(last=False)


def _key(subject: Subject) -> bytes:
    return subject.SerializeToString(deterministic=True)
