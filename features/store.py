"""The door to Feast: a FeatureStore on this shop's settings, applying the repository, and the contracts of its services."""

import contextlib
import io
import os
import sys
import warnings
from pathlib import Path

from feast import FeatureStore
from feast.repo_config import load_repo_config
from feast.repo_operations import apply_total

from features.bundle import FeatureContract, FeatureRef
from features.registry import APPLIED, fingerprint, load_registry
from features.settings import Settings

REPOSITORY = Path(__file__).parent


def feature_store(settings: Settings) -> FeatureStore:
    """Returns a Feast store on the shop's PostgreSQL and Redis."""
    os.environ.update(settings.feast_environment())
    return FeatureStore(repo_path=str(REPOSITORY))


def joining_store(store: FeatureStore, schema: str) -> FeatureStore:
    """Returns a store for point-in-time joins whose entity rows are a query over tables in ``schema``.

    Feast then neither uploads rows, which its SDK does one by one, nor makes a table of them; ``schema`` comes before ``public`` on
    its search path.
    """
    config = store.config.model_copy()
    config.offline_config = config.offline_config | {"db_schema": schema, "entity_select_mode": "embed_query"}
    config._offline_store = None  # Feast keeps here what it made of the configuration
    return FeatureStore(config=config)


def apply_repository(settings: Settings) -> None:
    """Registers entities, views and services, exactly as ``feast -c features apply`` does, and tags the project with what it did.

    Running it twice changes nothing.
    """
    os.environ.update(settings.feast_environment())
    # Feast imports definitions.py from the path, changes the working directory and prints its plan: none of it may leak.
    sys.path.append(str(REPOSITORY))
    try:
        _apply()
    finally:
        sys.path.remove(str(REPOSITORY))
    store = feature_store(settings)
    project = store.get_project(settings.project)
    project.tags = {**project.tags, APPLIED: fingerprint(load_registry(settings))}  # last: a crash before it has it done again
    store.registry.apply_project(project)


def _apply() -> None:
    with contextlib.chdir(REPOSITORY), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on-demand views are called experimental on every apply
        config = load_repo_config(REPOSITORY, REPOSITORY / "feature_store.yaml")
        apply_total(config, REPOSITORY, skip_source_validation=True)


def contract_of(store: FeatureStore, service: str) -> FeatureContract:
    """Returns names and types of a feature service's features as the registry has them now.

    Raises:
        feast.errors.FeatureServiceNotFoundException: the registry has no such service.
    """
    projections = store.get_feature_service(service).feature_view_projections
    refs = [FeatureRef(ref=f"{p.name_to_use()}:{f.name}", dtype=str(f.dtype)) for p in projections for f in p.features]
    return FeatureContract(name=service, features=tuple(refs))
