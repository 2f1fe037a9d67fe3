"""The language of a text, by its letters: which script wins, and texts that are nobody's."""

import pytest

from features.language import language_of


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Lovely dress", "en"),
        ("naïve café", "en"),
        ("ｇｏｏｄ", "en"),
        ("质量很好", "zh"),
        ("這個尺寸太小了", "zh"),
        ("这个iPhone很好用", "zh"),
        ("很好 good product, I like it", "en"),
        ("bad 坏", "zh"),  # three letters a character: a draw goes to Chinese
        ("Отлично, very nice", "en"),
        ("очень хорошо, nice", None),
        ("これはいいです", None),
        ("東京はいい", None),  # kana makes Han characters Japanese
        ("좋아요", None),
        ("مقاس جيد", None),
        ("מידה טובה", None),
        ("", None),
        ("   \t\n", None),
        ("\x01\x02\x7f", None),
        ("\u202e\u200b\u202c", None),
        ("12.50 !!! --", None),
        ("😍👍🏽👨‍👩‍👧", None),
        ('<b onclick="x()">很好</b>', "en"),
        ("'; DROP TABLE users; --", "en"),
    ],
)
def test_the_heavier_script_wins(text: str, language: str | None) -> None:
    assert language_of(text) == language


def test_the_first_thousand_characters_decide() -> None:
    assert language_of("a" * 1_000 + "好" * 9_000) == "en"
    assert language_of("." * 1_000 + "好" * 9_000) is None
