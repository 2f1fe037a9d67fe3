"""Reviews made of words that praise and words that blame, for trainings of seconds."""

import random
from pathlib import Path

import pandas as pd

_PRAISE = {
    "en": ["lovely", "great", "perfect", "soft", "flattering", "sturdy", "quick"],
    "zh": ["很好", "喜欢", "满意", "漂亮", "舒服", "不错"],
}
_BLAME = {"en": ["awful", "cheap", "broken", "itchy", "slow", "terrible", "faded"], "zh": ["太差", "失望", "难看", "破损", "退货", "垃圾"]}
_NEITHER = {
    "en": ["the", "dress", "came", "on", "monday", "and", "my", "sister", "wore", "it", "with", "a", "coat", "in", "the", "garden"],
    "zh": ["我", "昨天", "买", "了", "这个", "给", "妈妈", "用", "的", "东西"],
}


def texts(language: str, count: int, *, seed: int = 5) -> list[tuple[str, int]]:
    """Returns reviews and their stars, 1 to 5: the more of its telling words praise, the more stars."""
    dice, space = random.Random(seed), " " if language == "en" else ""
    made = []
    for _ in range(count):
        stars = dice.choice((1, 2, 3, 4, 5, 5))
        telling = [dice.choice((_PRAISE if k < stars - 1 else _BLAME)[language]) for k in range(4)]
        words = telling + dice.choices(_NEITHER[language], k=dice.randint(3, 9))
        dice.shuffle(words)
        made.append((space.join(words), stars))
    return made


def write(folder: Path, language: str, count: int, *, rated: bool) -> Path:
    """Writes them as a CSV file with ratings, or with labels."""
    rows = texts(language, count)
    frame = pd.DataFrame({"text": [text for text, _ in rows], "group": ["odd" if k % 2 else "even" for k in range(count)]})
    stars = pd.Series([stars for _, stars in rows])
    path = folder / f"{language}.csv"
    (frame.assign(rating=stars) if rated else frame[stars != 3].assign(label=(stars[stars != 3] > 3).astype(int))).to_csv(path, index=False)
    return path
