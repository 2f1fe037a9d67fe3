"""Import of a whole shop: a folder with items, relations, identities and events."""

from collections.abc import Sequence
from pathlib import Path

from features.importers.events import import_events
from features.importers.items import import_items
from features.importers.links import import_identities, import_relations
from features.importers.mapping import Mapping, MappingError
from features.importers.report import ImportReport, Progress
from features.settings import DEFAULT_CHANNELS

_SUFFIXES = (".parquet", ".csv", ".jsonl")


def import_folder(
    dsn: str,
    folder: Path,
    mapping: Mapping,
    *,
    rejects: Path,
    channels: Sequence[str] = DEFAULT_CHANNELS,
    progress: Progress | None = None,
) -> dict[str, ImportReport]:
    """Imports ``items``, ``relations``, ``identities`` and ``events`` (.parquet, .csv or .jsonl), those that ``folder`` has.

    Args:
        dsn: the migrated database.
        folder: where the files lie.
        mapping: with a section for each file there is.
        rejects: folder for one rejects file each, ``<name>.rejects.jsonl``.
        channels: registered channel names.
        progress: called as each file is read.

    Returns:
        The report of each file imported, by name, in the order imported.

    Raises:
        MappingError: the folder has none of the files, or a file's section is missing or does not fit.
    """
    reports: dict[str, ImportReport] = {}
    for name in ("items", "relations", "identities", "events"):
        source = next((path for suffix in _SUFFIXES if (path := folder / f"{name}{suffix}").exists()), None)
        if source is None:
            continue
        out = rejects / f"{name}.rejects.jsonl"
        if name == "relations":
            reports[name] = import_relations(dsn, source, mapping, rejects=out, progress=progress)
        else:
            run = {"items": import_items, "identities": import_identities, "events": import_events}[name]
            reports[name] = run(dsn, source, mapping, rejects=out, channels=channels, progress=progress)
    if not reports:
        raise MappingError(f"{folder} has no items, relations, identities or events ({', '.join(_SUFFIXES)})")
    return reports
