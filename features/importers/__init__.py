"""Importers: a shop's files into the catalogue, the knowledge graph, the identities and the events."""

from features.importers.articles import import_articles
from features.importers.events import import_events
from features.importers.folder import import_folder
from features.importers.items import import_items
from features.importers.links import import_identities, import_relations
from features.importers.mapping import Mapping, MappingError, load_mapping, ready_mappings
from features.importers.report import ImportReport, Progress

__all__ = [
    "ImportReport",
    "Mapping",
    "MappingError",
    "Progress",
    "import_articles",
    "import_events",
    "import_folder",
    "import_identities",
    "import_items",
    "import_relations",
    "load_mapping",
    "ready_mappings",
]
