"""Aspects of what is talked about (size, price, delivery, ...): a small lexicon, and the clause in which each is named."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from features.language import CHINESE, ENGLISH, Language

# What a text names at the most that is told apart: each costs a run of the classifier.
MOST_MENTIONS = 16

# English stems are matched at the start of words, and whole words where a "." ends them; Chinese terms anywhere.
_TERMS = {
    ENGLISH: {
        "size": "size. sizes. sizing fit. fits. fitted fitting snug too#tight tight. loose. baggy oversized petite. length. sleeve "
        "waist. true#to#size runs#small runs#large runs#big",
        "quality": "quality material fabric. fabrics. cotton linen wool. polyester leather stitch seam. seams. threads durab sturdy "
        "flimsy well#made broke. broken. defect faulty scratch fell#apart falling#apart wore#out",
        "colour": "color colour shade. shades. faded fading dye.",
        "appearance": "look. looks. looked. style. styles. stylish design. designs. designed pattern. print. prints. cute. beautiful. "
        "gorgeous ugly. flatter",
        "comfort": "comfort uncomfort soft. softer softness itchy itches scratchy cozy cosy",
        "price": "price. prices. priced pricey cost. costs. expensive cheap. cheaper bargain. value. worth. money. overpriced on#sale",
        "delivery": "deliver shipping. shipped shipment courier arrived. arrives. dispatch postage",
        "service": "service. staff. support. seller customer#care refund. refunds. refunded helpful rude. representative agent.",
        "packaging": "packag boxed. box. wrapped. wrapping",
        "taste": "taste. tastes. tasty tasted flavor flavour delicious fresh. freshness bland. stale.",
        "function": "work. works. worked. working. battery screen. speed. slow. fast. noise. noisy performance software install setup",
    },
    CHINESE: {
        "size": "尺码 尺寸 大小 偏大 偏小 合身 合适 码数 太大 太小 宽松 紧 长度",
        "quality": "质量 质感 品质 材质 面料 布料 做工 起球 掉色 线头 结实 耐用 坏了 破损 瑕疵 正品 假货",
        "colour": "颜色 色差 色泽",
        "appearance": "外观 外形 款式 样式 样子 好看 难看 漂亮 设计",
        "comfort": "舒服 舒适 柔软 刺痒 透气 床",
        "price": "价格 价钱 性价比 便宜 太贵 很贵 贵了 划算 实惠 降价 优惠",
        "delivery": "快递 物流 发货 送货 到货 配送 送达 收货",
        "service": "服务 客服 态度 售后 前台 店家 卖家 退货 退款 换货 安装",
        "packaging": "包装 盒子 箱子 外包装",
        "taste": "味道 口感 口味 好吃 难吃 新鲜 甜 酸 不熟 烂了 香味",
        "function": "屏幕 电池 速度 运行 反应 系统 噪音 散热 功能 信号 卡顿 加热 死机 网速",
    },
}
ASPECTS = tuple(_TERMS[ENGLISH])


def _english(terms: str) -> str:
    """Returns a pattern of stems; ``#`` stands for a space, and a final ``.`` for the end of the word."""
    words = sorted(terms.split(), key=len, reverse=True)
    return "|".join(re.escape(word.rstrip(".")).replace(r"\#", r"\s+") + (r"\b" if word.endswith(".") else r"\w*") for word in words)


def _chinese(terms: str) -> str:
    return "|".join(sorted(terms.split(), key=len, reverse=True))


_NAMED = {
    ENGLISH: re.compile(r"\b(?:" + "|".join(f"(?P<{name}>{_english(terms)})" for name, terms in _TERMS[ENGLISH].items()) + ")", re.I),
    CHINESE: re.compile("|".join(f"(?P<{name}>{_chinese(terms)})" for name, terms in _TERMS[CHINESE].items())),
}
# Where one thing said ends and another begins: marks, and words that turn the sense. A point within a number ends nothing.
_ENDS = {
    ENGLISH: re.compile(r"[!?;,:\n]+|\.(?!\d)|\b(?:but|however|although|though|yet|except|unfortunately)\b", re.I),
    CHINESE: re.compile(r"[!?;,:\n。！？；，、：…~～\s]+|\.(?!\d)|但是|但|不过|可是|然而|只是|就是"),
}


@dataclass(frozen=True)
class Mention:
    """An aspect that a text names.

    Attributes:
        aspect: one of ``ASPECTS``.
        term: the words that name it.
        start, end: characters (code points) of the text's clause that says something of it, the end excluded.
    """

    aspect: str
    term: str
    start: int
    end: int


def mentions(text: str, language: Language) -> list[Mention]:
    """Returns what a text names, in its order: each aspect once a clause, the first ``MOST_MENTIONS`` of all."""
    found: list[Mention] = []
    for start, end in _clauses(text, language):
        named: set[str] = set()
        for match in _NAMED[language].finditer(text, start, end):
            aspect = match.lastgroup or ""
            if aspect not in named:
                found.append(Mention(aspect, match.group(), start, end))
                named.add(aspect)
        if len(found) >= MOST_MENTIONS:
            break
    return found[:MOST_MENTIONS]


def _clauses(text: str, language: Language) -> Iterator[tuple[int, int]]:
    """Yields the clauses of a text from end to end, without the space around them."""
    start = 0
    for match in _ENDS[language].finditer(text):
        yield from _stripped(text, start, match.start())
        # A word that turns the sense belongs to what follows; a mark belongs to neither.
        start = match.start() if match.group()[0].isalpha() else match.end()
    yield from _stripped(text, start, len(text))


def _stripped(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    part = text[start:end]
    if bare := part.strip():
        first = start + len(part) - len(part.lstrip())
        yield first, first + len(bare)
