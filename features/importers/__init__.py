"""Importers: a shop's files into the catalogue, the knowledge graph, the identities and the events."""

from features.importers.events import import_events
from features.importers.mapping import Mapping, MappingError, load_mapping, ready_mappings
from features.importers.report import ImportReport

__all__ = ["ImportReport", "Mapping", "MappingError", "import_events", "load_mapping", "ready_mappings"]
