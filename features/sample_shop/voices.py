"""What customers of the sample shop say in their own words: how they like what they bought, and what they are into.

It follows their taste and nothing else: who writes does not know yet what they buy next.
"""

from features.sample_shop.catalogue import ShelfItem
from features.sample_shop.customers import Taste
from features.sample_shop.dice import Dice
from features.sample_shop.vocabulary import INTERESTS, REVIEWS, WISHES

# Stars from 1 to 5: of what the customer likes by a brand they like, of what they like by another, and of anything else.
_STARS = ((0.02, 0.03, 0.10, 0.35, 0.50), (0.06, 0.12, 0.27, 0.35, 0.20), (0.15, 0.22, 0.28, 0.22, 0.13))
_OFF_TOPIC = 0.2  # people also ask for others, and out of a whim


def stars(dice: Dice, taste: Taste, entry: ShelfItem) -> int:
    """Returns how somebody with this taste rates an item, 1 to 5: better when it suits them, but not always."""
    liked = dict(zip(taste.shelves, taste.brands, strict=True)).get(entry.shelf)
    chances = _STARS[2] if liked is None else _STARS[entry.brand != liked]
    return 1 + dice.weighted(chances)


def review(dice: Dice, taste: Taste, rating: int, language: str) -> str:
    """Returns a verdict of so many stars, and more often than not what the writer is into."""
    verdict = dice.pick(REVIEWS[language][rating - 1])
    if dice.chance(0.4):
        return verdict
    into = "平时喜欢{}。" if language == "zh" else " I am into {}."
    return verdict + into.format(_interest(dice, taste, language))


def wish(dice: Dice, taste: Taste, language: str) -> str:
    """Returns what somebody with this taste asks a shop for without having anything in mind yet."""
    level = int(dice.between(0, 3)) if dice.chance(_OFF_TOPIC) else taste.brands[0]
    return dice.pick(WISHES[language][level]).format(_interest(dice, taste, language))


def _interest(dice: Dice, taste: Taste, language: str) -> str:
    """Returns a liked sub-category in a customer's words, now and then another one."""
    liked = taste.shelves[dice.weighted(taste.weights)]
    shelf = int(dice.between(0, len(INTERESTS))) if dice.chance(_OFF_TOPIC) else liked
    words = dice.pick(INTERESTS[shelf])
    return words.zh if language == "zh" else words.en
