"""What customers write to a shop beside reviews: from it a sentiment classifier learns that a question is neither praise nor blame."""

from dataclasses import dataclass
from datetime import UTC, datetime

from features.language import Language
from features.sample_shop import generate

_ASKING = frozenset(
    {
        "track_order",
        "cancel_order",
        "change_shipping_address",
        "check_stock",
        "check_price",
        "find_item",
        "delivery_period",
        "contact_human_agent",
    }
)
_COMPLAINING = frozenset({"complaint"})
_SEED, _END = 7, datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Message:
    """A message to a shop, and whether it complains; else it asks for something."""

    text: str
    complains: bool


def messages(language: Language) -> tuple[Message, ...]:
    """Returns messages to the sample shop, always the same ones: some 300 that ask, and 40 that complain.

    Those of intents that may be both (a refund, a return, a payment that fails) are left out.
    """
    said = generate(_SEED, end=_END, users=0, language=language).utterances
    return tuple(Message(one.text, one.intent in _COMPLAINING) for one in said if one.intent in _ASKING | _COMPLAINING)
