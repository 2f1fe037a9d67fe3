"""Settings shared by every room: where the data lives and which channels and surfaces the shop has.

Each setting is read from the environment as ``CONCORD_<NAME>`` or from the file named by ``CONCORD_CONFIG_FILE`` (TOML,
default ``concord.toml`` in the working directory). The environment wins.
"""

import os
import re
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict
from pydantic import Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

T = TypeVar("T", bound="Settings")
_PREFIX = "CONCORD_"
_NAME = re.compile(r"^[a-z][a-z0-9_]{0,31}$")

DEFAULT_CHANNELS = ("web", "app", "mini_program", "social", "messaging", "call_centre", "store")
DEFAULT_SURFACES = ("home", "category", "product", "cart", "checkout", "search", "chat", "email")


class SettingsError(Exception):
    """A setting is unknown or invalid; the message names it."""


class Settings(BaseSettings):
    """What features/, server/ and training/ all need to know."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, extra="forbid", frozen=True, hide_input_in_errors=True)

    postgres_dsn: str = Field(
        "postgresql://postgres@127.0.0.1:5432/concord",
        description="PostgreSQL 15+ connection string (URL or key=value), the system of record.",
        repr=False,
    )
    redis_url: str = Field(
        "redis://127.0.0.1:6379/0",
        description="Redis 6.2+ URL, the online store. One Redis database per shop.",
        repr=False,
    )
    project: str = Field("shop", description="Feast project, one per shop: lower-case letters, digits and underscores.")
    channels: Annotated[tuple[str, ...], NoDecode] = Field(
        DEFAULT_CHANNELS,
        description="Registered channel names, comma-separated. An unknown channel in a request is INVALID_ARGUMENT.",
    )
    surfaces: Annotated[tuple[str, ...], NoDecode] = Field(
        DEFAULT_SURFACES, description="Registered surface names (where a slate is shown), comma-separated."
    )
    models_url: str = Field("", description="Folder of published bundles, any fsspec URL; empty: models/ in the data folder.")
    data_dir: Path = Field(
        Path(".data"),
        description="Local folder for embedded servers, runs and fetched bundles; safe to delete when nothing runs.",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, then environment, then the TOML file."""
        return init_settings, env_settings, _File(settings_cls, Path(os.environ.get("CONCORD_CONFIG_FILE", "concord.toml")))

    @field_validator("channels", "surfaces", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("channels", "surfaces")
    @classmethod
    def _names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not _NAME.match(name):
                raise ValueError(f"{name!r} is not a lower_snake_case name of at most 32 characters")
        if not value or len(set(value)) != len(value):
            raise ValueError("must name at least one, each once")
        return value

    @field_validator("project")
    @classmethod
    def _project(cls, value: str) -> str:
        if not _NAME.match(value):
            raise ValueError("must be lower_snake_case, at most 32 characters")
        return value

    @field_validator("postgres_dsn")
    @classmethod
    def _dsn(cls, value: str) -> str:
        try:
            conninfo_to_dict(value)
        except ProgrammingError:
            raise ValueError("is no PostgreSQL connection string") from None  # libpq's own words quote it, password included
        return value

    @field_validator("redis_url")
    @classmethod
    def _redis(cls, value: str) -> str:
        if urlsplit(value).scheme not in {"redis", "rediss", "unix"}:
            raise ValueError("must start with redis://, rediss:// or unix://")
        return value

    @cached_property
    def models_base(self) -> str:
        """Where bundles are published, as an absolute URL: processes with other working directories must agree."""
        if not self.models_url:
            return f"file://{(self.data_dir / 'models').resolve()}"
        if "://" in self.models_url and not self.models_url.startswith("file:"):
            return self.models_url
        return f"file://{Path(self.models_url.removeprefix('file:').removeprefix('//')).resolve()}"  # a bare path is one too

    @property
    def classifiers_dir(self) -> Path:
        """Where trainings of text classifiers leave their folders, ``<name>/<time>``, and an export looks for the newest."""
        return self.data_dir / "classifiers"

    def feast_environment(self) -> dict[str, str]:
        """Returns the variables that ``features/feature_store.yaml`` expands, so that plain ``feast`` commands work."""
        pg = conninfo_to_dict(self.postgres_dsn)
        return {
            "CONCORD_FEAST_PROJECT": self.project,
            "CONCORD_FEAST_PG_HOST": str(pg.get("host") or "127.0.0.1"),
            "CONCORD_FEAST_PG_PORT": str(pg.get("port") or 5432),
            "CONCORD_FEAST_PG_DATABASE": str(pg.get("dbname") or "postgres"),
            "CONCORD_FEAST_PG_USER": str(pg.get("user") or "postgres"),
            "CONCORD_FEAST_PG_PASSWORD": str(pg.get("password") or ""),
            # Feast's own default is "require", which a server on the same machine or network often cannot meet; libpq's is this.
            "CONCORD_FEAST_PG_SSLMODE": str(pg.get("sslmode") or "prefer"),
            "CONCORD_FEAST_REGISTRY": sqlalchemy_url(self.postgres_dsn),
            "CONCORD_FEAST_REDIS": feast_redis_string(self.redis_url),
            "FEAST_USAGE": "False",
        }


class _File(TomlConfigSettingsSource):
    """The TOML file, without what only other kinds of settings know: one file serves every command."""

    def __call__(self) -> dict[str, Any]:
        others = {name for kind in _all_kinds(Settings) for name in kind.model_fields} - set(self.settings_cls.model_fields)
        return {name: value for name, value in super().__call__().items() if name not in others}


def load_settings(kind: type[T]) -> T:
    """Reads settings of ``kind`` from environment and file.

    Raises:
        SettingsError: a ``CONCORD_*`` variable or a key of the file is unknown or invalid; the message names each.
    """
    known = {f"{_PREFIX}{name}".upper() for sub in _all_kinds(Settings) for name in sub.model_fields}
    reserved = {"CONCORD_CONFIG_FILE", "CONCORD_TEST_DATA"}
    unknown = [k for k in os.environ if k.startswith(_PREFIX) and not k.startswith("CONCORD_FEAST_") and k not in known | reserved]
    if unknown:
        raise SettingsError(f"unknown setting {', '.join(sorted(unknown))}; see `concord settings` for the ones there are")
    try:
        return kind()
    except ValidationError as error:
        problems = [": ".join([*(f"{_PREFIX}{str(name).upper()}" for name in e["loc"][:1]), e["msg"]]) for e in error.errors()]
        raise SettingsError("invalid setting " + "; ".join(problems)) from None


def _all_kinds(kind: type[Settings]) -> list[type[Settings]]:
    return [kind, *(deeper for sub in kind.__subclasses__() for deeper in _all_kinds(sub))]


def sqlalchemy_url(dsn: str) -> str:
    """Returns ``dsn`` as an SQLAlchemy URL for the psycopg 3 driver (socket directories included)."""
    from sqlalchemy.engine import URL

    pg = {k: str(v) for k, v in conninfo_to_dict(dsn).items() if v is not None}
    query = {k: v for k, v in pg.items() if k not in {"host", "port", "dbname", "user", "password"}}
    return URL.create(
        "postgresql+psycopg",
        username=pg.get("user"),
        password=pg.get("password"),
        host=None,
        database=pg.get("dbname"),
        query={"host": pg.get("host", "127.0.0.1"), "port": pg.get("port", "5432"), **query},
    ).render_as_string(hide_password=False)


def feast_redis_string(url: str) -> str:
    """Returns a Redis URL in the ``host:port,db=0,...`` form of Feast's Redis store."""
    from redis.connection import parse_url

    parts = parse_url(url)  # type: ignore[no-untyped-call]  # the client's own reading of it: percent-encoded passwords, ``?db=1``
    options = [f"db={parts.get('db', 0)}", *(f"{name}={parts[name]}" for name in ("username", "password") if name in parts)]
    if urlsplit(url).scheme == "rediss":
        options.append("ssl=true")
    return ",".join([f"{parts.get('host', '127.0.0.1')}:{parts.get('port', 6379)}", *options])
