"""The language a text is judged in, chosen by its letters."""

import re
import unicodedata
from typing import Literal

Language = Literal["en", "zh"]
ENGLISH: Language = "en"
CHINESE: Language = "zh"
LANGUAGES = (ENGLISH, CHINESE)

_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_KANA = re.compile("[\u3041-\u30ff\u31f0-\u31ff]")
# A Han character is a word or half of one, an English word has four letters and more.
_LATIN_LETTERS_A_HAN = 3
# Characters that are looked at: more than any classifier here reads, and 0.5 ms.
_LOOKED_AT = 1_000


def language_of(text: str) -> Language | None:
    """Returns ``zh``, ``en`` or, for a text in neither, None.

    Latin letters count as English, for letters cannot tell it from French; Han characters as Chinese, unless there is kana beside
    them, which makes them Japanese. Each Han character weighs as much as three Latin letters, and the heavier script wins, if it
    weighs more than all other letters together. Digits, emoji and marks are nobody's. The first 1,000 characters decide.
    """
    # Full-width Latin letters, which Chinese keyboards make, become plain ones.
    letters = [letter for letter in unicodedata.normalize("NFKC", text[:_LOOKED_AT]) if letter.isalpha()]
    han = 0 if any(map(_KANA.match, letters)) else sum(map(bool, map(_HAN.match, letters)))
    latin = sum(map(_is_latin, letters))
    others = len(letters) - han - latin
    weight, language = max((han * _LATIN_LETTERS_A_HAN, CHINESE), (latin, ENGLISH))
    return language if weight > others else None


def _is_latin(letter: str) -> bool:
    return letter.isascii() or unicodedata.name(letter, "").startswith("LATIN ")
