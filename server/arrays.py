"""Arrays as PostgreSQL reads them. psycopg finds out the type of each element of each list anew, which takes twice the time."""

from collections.abc import Iterable


def text_array(values: Iterable[str | None]) -> str:
    """Returns a text[]; every element is quoted, so that none is taken for NULL or two."""
    quoted = ["NULL" if value is None else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"' for value in values]
    return "{" + ",".join(quoted) + "}"


def number_array(values: Iterable[float | None]) -> str:
    """Returns an array of numbers or truth values."""
    return "{" + ",".join(["NULL" if value is None else str(value) for value in values]) + "}"
