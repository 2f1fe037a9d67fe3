"""What a message asks for, by its words: small English and Chinese patterns with bounded repeats, so that no text is slow."""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Flag, auto

from features.lexical import words

_HAN = re.compile(r"[\u3400-\u9fff]")
_LETTER = re.compile(r"[^\W_]")


class Ask(Flag):
    """What a message may ask for; several can hold."""

    NOTHING = 0
    PERSON = auto()
    COMPLAINT = auto()
    COURTESY = auto()
    PRICE = auto()
    STOCK = auto()
    ORDERS = auto()
    RETURNS = auto()
    SUGGESTIONS = auto()
    # Not what, but how: "how do I", "can I", "what if": the shop's rules rather than a fact of today.
    RULE = auto()
    # Where something is, or when it comes: the shop's data has orders, but nothing of their way.
    DELIVERY = auto()
    # What was bought, rather than what can be done about it.
    HISTORY = auto()


_PATTERNS: dict[Ask, tuple[str, ...]] = {
    Ask.PERSON: (
        r"\b(?:speak|talk|chat|connect|transfer|put me through|escalate|hand me over)\b.{0,30}\b(?:human|person|agent|someone|somebody)\b",
        r"\b(?:speak|talk|connect|transfer|escalate)\b.{0,30}\b(?:representative|operator|advis[eo]r|manager|supervisor|employee|staff)\b",
        r"\b(?:real|live|actual) (?:human|person|agent)\b",
        r"^(?:human|agent|operator|representative|a person)\b.{0,10}$",
        r"人工|真人|转接|找客服",
    ),
    Ask.COMPLAINT: (
        r"\bcomplain(?:t|ts|ing)?\b|\bunacceptable\b|\bridiculous\b|\bdisgusting\b|\bfurious\b|\bmy lawyer\b",
        r"\b(?:terrible|horrible|awful|worst) (?:service|shop|store|company|experience)\b",
        r"\bscam(?:med|mers?)?\b|\brip.?off\b",
        r"投诉|骗子|骗人|太差|差劲|气死",
    ),
    Ask.COURTESY: (
        r"^(?:hi|hello|hey|hiya|good (?:morning|afternoon|evening|day))(?: there)?\W{0,5}$",
        r"^(?:thanks?(?: you)?(?: (?:very|so) much)?|thx|cheers|bye|goodbye|ok(?:ay)?)\W{0,5}$",
        r"^(?:你好|您好|谢谢|多谢|再见|早上好|晚上好|好的)\W{0,5}$",
    ),
    Ask.PRICE: (r"\bhow much\b|\bprices?\b|\bpriced\b|\bcosts?\b", r"多少钱|价格|价钱|什么价|几块"),
    Ask.STOCK: (
        r"\b(?:in|out of) stock\b|\bavailab(?:le|ility)\b|\bsold out\b",
        r"\b(?:any|some|still) (?:left|have|got|there)\b|\bhave any\b|\bdo you (?:still )?(?:have|carry|sell)\b",
        r"有货|库存|还有吗|有没有|缺货|卖完",
    ),
    Ask.ORDERS: (
        r"\bmy (?:very )?(?:last|latest|recent|previous|past|current)? ?(?:order|purchase|parcel|package|delivery)s?\b",
        r"\bwhat (?:did|have|had) i (?:just |last )?(?:buy|bought|order|ordered|purchased?)\b",
        r"\b(?:order|purchase) history\b|\beverything i (?:have )?(?:bought|ordered|purchased)\b",
        r"我的订单|我的包裹|我买[了过]|我最近买|查.{0,4}订单|订单.{0,4}(?:在哪|状态|到哪)",
    ),
    Ask.RETURNS: (
        r"\bmy (?:last|latest|recent|previous|past|current)? ?returns?\b",
        r"\bwhat (?:did|have) i (?:return|returned|sen[dt] back)\b",
        r"我的退货|我退[了过]",
    ),
    Ask.SUGGESTIONS: (
        r"\brecommend\b|\brecommendations?\b|\bsuggest(?:ions?)?\b|\bsimilar\b|\balternatives?\b|\bgift ideas?\b|\bmore like\b",
        r"\b(?:something|anything) (?:like|similar|else|for|under|below|cheaper|nice)\b|\blooking for\b",
        r"推荐|类似|差不多的|有什么好|想买",
    ),
    Ask.RULE: (
        r"^\W{0,5}(?:and |so |hi,? |hello,? |please,? )?how (?:do|can|could|would|should|long|many|soon|often)\b",
        r"^\W{0,5}(?:and |so |hi,? |hello,? |please,? )?(?:(?:can|could|may) (?:i|we)|am i|is it possible|why)\b",
        r"^\W{0,5}(?:and |so |hi,? |hello,? |please,? )?do you (?:offer|accept|take|ship|deliver|match|provide|charge)\b",
        r"^\W{0,5}(?:and |so |hi,? |hello,? |please,? )?what (?:if|happens|should|is (?:the|your)|are (?:the|your))\b",
        r"^\W{0,5}(?:and |so |hi,? |hello,? |please,? )?(?:where (?:can|do|should)|when (?:do|can|will)) (?:i|we)\b",
        r"怎么|如何|可以.{0,12}吗|能不能|能.{0,12}吗|多久|几天",
    ),
    Ask.HISTORY: (
        r"\bhistory\b|\bwhat (?:did|have|had) i\b|\beverything i\b|\b(?:show|list|see|check|look up)\b.{0,20}\bmy\b|我买|我退|查",
    ),
    Ask.DELIVERY: (
        r"\bwhere\b|\bwhen\b|\btrack(?:ing)?\b|\bstatus\b|\barriv(?:e|es|ed|ing)\b|\bdeliver(?:y|ed)\b|\bshipped\b",
        r"到哪|在哪|物流|什么时候|状态",
    ),
}
_COMPILED = {ask: re.compile("|".join(patterns), re.IGNORECASE) for ask, patterns in _PATTERNS.items()}
_REFERENCE = re.compile(
    r"\b(?:it|its|it's|that one|this one|that|this|them|those|these|the same)\b|它|这个|那个|这款|那款|这件|那件|这些|那些", re.IGNORECASE
)
_ORDINAL = re.compile(
    r"\b(?:the )?(first|second|third|fourth|fifth|last|1st|2nd|3rd|4th|5th)(?: one| item)\b"
    r"|第([一二三四五1-5])[个件款]|(最后)一[个件款]",
    re.IGNORECASE,
)
_PLACES = {"first": 0, "1st": 0, "一": 0, "1": 0, "second": 1, "2nd": 1, "二": 1, "2": 1, "third": 2, "3rd": 2, "三": 2, "3": 2}
_PLACES |= {"fourth": 3, "4th": 3, "四": 3, "4": 3, "fifth": 4, "5th": 4, "五": 4, "5": 4, "last": -1, "最后": -1}
_CHEAPER = re.compile(r"\bcheaper\b|\bless expensive\b|便宜[一点些]|更便宜", re.IGNORECASE)
_ELLIPSIS = re.compile(r"^\W{0,5}(?:and|what about|how about|or|but|also)\b|^\W{0,5}(?:那|那么|还有)|呢\W{0,3}$", re.IGNORECASE)
# Written as `words` cuts them: to cut Chinese here would load its dictionary, 32 MB, in every shop.
# Words of a wish that do not describe what is wished for.
_WISH = frozenset(
    """recommend recommendation recommendations suggest suggestion suggestions something anything similar like alternative alternatives
        looking look for gift idea ideas more cheaper nice need buy good best present 推荐 类似 差不多 不多 便宜 想 买 好 一点""".split()  # noqa: SIM905 - one in a line would be a hundred lines
)
# Words of a follow-up that say nothing of the thing meant: "and in blue?" is about blue.
_FILLERS = frozenset(
    """and or but also what about how in the a an one ones is are there do does you have with for of it that this them those these
        please same
        much cost costs price stock available can get i want would like any some still left to by from me show
        那 那么 呢 吗 有 的 这个 那个 这 它 还有 要""".split()  # noqa: SIM905
)


_BOUNDS = frozenset("under below less than most over above at up within 以下 以内 不 超过 元 块".split())  # noqa: SIM905


@dataclass(frozen=True)
class Reading:
    """A message by its words.

    Attributes:
        text: as it is read: compatibility forms, without control characters, on one line.
        language: ``zh`` where Chinese characters stand in it, else ``en``.
        readable: whether there is any letter or digit.
        asks: what it asks for.
        refers: whether it means something named before ("it", "this one").
        place: which of several things named before it means, -1 the last; None where it does not say.
        elliptic: whether it goes on from what was asked before ("and in blue?").
        cheaper: whether it asks for a lower price than was told before.
        content: its words that may describe a thing.
    """

    text: str
    language: str
    readable: bool
    asks: Ask
    refers: bool
    place: int | None
    elliptic: bool
    cheaper: bool
    content: tuple[str, ...]

    def topic(self, spans: Iterable[tuple[int, int]]) -> list[str]:
        """Returns the words that describe what is wished for, without what stands at ``spans`` of ``text``."""
        rest = self.text
        for start, end in spans:
            rest = rest[:start] + " " * (end - start) + rest[end:]
        return [word for word in words(rest) if word not in _FILLERS and word not in _WISH and not word.isdigit() and word not in _BOUNDS]


def read(message: str) -> Reading:
    """Reads a message of any content."""
    shown = unicodedata.normalize("NFKC", "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in message))
    text = " ".join(shown.split())
    asks = Ask.NOTHING
    for ask, pattern in _COMPILED.items():
        if pattern.search(text):
            asks |= ask
    return Reading(
        text=text,
        language="zh" if _HAN.search(text) else "en",
        readable=bool(_LETTER.search(text)),
        asks=asks,
        refers=bool(_REFERENCE.search(text)),
        place=_place(text),
        cheaper=bool(_CHEAPER.search(text)),
        elliptic=bool(_ELLIPSIS.search(text)),
        content=tuple(word for word in dict.fromkeys(words(text)) if word not in _FILLERS),
    )


def _place(text: str) -> int | None:
    found = _ORDINAL.search(text)
    if found is None:
        return None
    return _PLACES[next(group for group in found.groups() if group).lower()]
