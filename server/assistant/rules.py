"""When the assistant hands over: part of the rules that replicas of one fleet must share."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AssistantRules:
    """What decides between answering and handing over; see ServerSettings for each.

    Attributes:
        min_confidence: an article is quoted from this probability on.
        scope_confidence: below it, and with nothing else to go by, a message counts as not about the shop.
    """

    min_confidence: float = 0.5
    scope_confidence: float = 0.1
