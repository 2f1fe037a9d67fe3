"""What Feast's registry says, read from its tables: what serving needs to know of views and services, at the price of one statement.

The registry is Feast's (``registry_type: sql``), kept by ``feast apply`` in tables beside the shop's own; Feast's client reads the
same rows through SQLAlchemy, with pandas behind it.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psycopg
from psycopg import Connection
from psycopg.rows import TupleRow

from features.bundle import FeatureContract, FeatureRef
from features.feast_wire import FeatureService, FeatureView, Project
from features.layout import ViewLayout, dtype_of, layouts_of
from features.settings import Settings

# Feast makes its tables when it is first asked; before that nothing is registered.
_TABLES = "SELECT to_regclass('feature_services') IS NOT NULL AND to_regclass('projects') IS NOT NULL"
_ROWS = """
SELECT 'view', feature_view_proto FROM feature_views WHERE project_id = %(project)s
UNION ALL SELECT 'on_demand', convert_to(feature_view_name, 'UTF8') FROM on_demand_feature_views WHERE project_id = %(project)s
UNION ALL SELECT 'service', feature_service_proto FROM feature_services WHERE project_id = %(project)s
UNION ALL SELECT 'project', project_proto FROM projects WHERE project_id = %(project)s
"""

APPLIED = "concord_applied"
"""Tag of the project that names what was applied last; plain ``feast apply`` takes it away."""


@dataclass(frozen=True)
class Registry:
    """A project as it is registered now.

    Attributes:
        layouts: where each view that is served online stands in Redis, by name.
        on_demand: names of the views computed at request time.
        services: contract of each feature service, by name.
        tags: those of the project.
    """

    layouts: Mapping[str, ViewLayout]
    on_demand: frozenset[str]
    services: Mapping[str, FeatureContract]
    tags: Mapping[str, str]


def read_registry(connection: Connection[TupleRow], project: str) -> Registry:
    """Returns what is registered of ``project``: empty before the repository was applied.

    Raises:
        LayoutError: two features of one entity share a 32-bit hash field, or a view cannot be laid out.
    """
    found: dict[str, list[bytes]] = {"view": [], "on_demand": [], "service": [], "project": []}
    row = connection.execute(_TABLES).fetchone()
    if row is not None and row[0]:
        for kind, data in connection.execute(_ROWS, {"project": project}).fetchall():
            found[kind].append(bytes(data))
    services = [_contract(data) for data in found["service"]]
    return Registry(
        layouts=layouts_of(FeatureView.FromString(data) for data in found["view"]),
        on_demand=frozenset(data.decode() for data in found["on_demand"]),
        services={service.name: service for service in services},
        tags={name: value for data in found["project"] for name, value in Project.FromString(data).spec.tags.items()},
    )


def fingerprint(registry: Registry) -> str:
    """Returns what ``APPLIED`` is when the repository of this release is applied and nothing was changed in the registry since."""
    digest = hashlib.sha256(version("feast").encode())
    for name in ("definitions.py", "feature_store.yaml"):
        digest.update((Path(__file__).parent / name).read_bytes())
    parts = (sorted(registry.layouts.items()), sorted(registry.on_demand), sorted(registry.services.items()))
    digest.update(repr(parts).encode())
    return digest.hexdigest()


def is_applied(registry: Registry) -> bool:
    """True when applying the repository of this release would change nothing."""
    return registry.tags.get(APPLIED) == fingerprint(registry)


def load_registry(settings: Settings) -> Registry:
    """Returns what is registered of the shop, over a connection of its own; raises as ``read_registry``."""
    with psycopg.connect(settings.postgres_dsn) as connection:
        return read_registry(connection, settings.project)


def unmet(contract: FeatureContract, registry: Registry) -> list[str]:
    """Returns what the registry no longer offers of a contract, empty when it is met; extra features do not matter."""
    service = registry.services.get(contract.name)
    offered = {feature.ref: feature.dtype for feature in service.features} if service else {}
    return [f"{f.ref} ({f.dtype}, offered: {offered.get(f.ref, 'nothing')})" for f in contract.features if offered.get(f.ref) != f.dtype]


def _contract(data: bytes) -> FeatureContract:
    spec = FeatureService.FromString(data).spec
    refs = []
    for projection in spec.features:
        view = projection.feature_view_name_alias or projection.feature_view_name
        if projection.HasField("version_tag"):
            view = f"{view}@v{projection.version_tag}"
        refs += [FeatureRef(ref=f"{view}:{column.name}", dtype=dtype_of(column.value_type)) for column in projection.feature_columns]
    return FeatureContract(name=spec.name, features=tuple(refs))
