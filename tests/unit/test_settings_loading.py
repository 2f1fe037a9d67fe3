"""What the shared settings turn into for Feast, SQLAlchemy and the folder of bundles."""

from pathlib import Path
from urllib.parse import quote

import pytest
import redis
from feast.infra.online_stores.redis import RedisOnlineStore
from hypothesis import given
from hypothesis import strategies as st
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from redis.connection import parse_url
from sqlalchemy import create_engine
from sqlalchemy.engine import make_url

from features.settings import Settings, SettingsError, feast_redis_string, load_settings, sqlalchemy_url

_SECRETS = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters=",="), min_size=1, max_size=20)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No concord.toml and no address of the person who runs the tests."""
    monkeypatch.chdir(tmp_path)
    for name in ("CONCORD_POSTGRES_DSN", "CONCORD_REDIS_URL", "CONCORD_TEST_DATA"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://127.0.0.1:6379/0", "127.0.0.1:6379,db=0"),
        ("redis://cache", "cache:6379,db=0"),
        ("redis://cache:1/3", "cache:1,db=3"),
        ("redis://cache:1?db=4", "cache:1,db=4"),
        ("rediss://me:secret@cache/2", "cache:6379,db=2,username=me,password=secret,ssl=true"),
    ],
)
def test_feast_finds_the_same_redis(url: str, expected: str) -> None:
    assert feast_redis_string(url) == expected


@given(_SECRETS)
def test_feast_is_given_the_password_that_redis_gets(password: str) -> None:
    """A URL holds a password percent-encoded; Feast's string does not."""
    url = f"redis://:{quote(password, safe='')}@cache:1/2"
    assert parse_url(url)["password"] == password
    assert f",password={password}" in feast_redis_string(url)


def test_feast_itself_reads_the_string() -> None:
    nodes, options = RedisOnlineStore._parse_connection_string(feast_redis_string("rediss://:p%40ss@cache:7/5"))
    assert nodes == [{"host": "cache", "port": "7"}]
    assert options == {"db": 5, "password": "p@ss", "ssl": True}
    assert redis.Redis(host="cache", port=7, **options).get_connection_kwargs()["db"] == 5


@given(_SECRETS, st.sampled_from(["db.example", "/var/run/postgresql", "10.0.0.1"]))
def test_sqlalchemy_connects_where_psycopg_does(password: str, host: str) -> None:
    dsn = make_conninfo(host=host, port=5433, dbname="shop", user="me", password=password, sslmode="disable")
    url = make_url(sqlalchemy_url(dsn))
    engine = create_engine(url)
    _, arguments = engine.dialect.create_connect_args(url)
    seen = {("dbname" if name == "database" else "user" if name == "username" else name): str(v) for name, v in arguments.items()}
    wanted = {name: str(value) for name, value in conninfo_to_dict(dsn).items()}
    assert {name: seen[name] for name in wanted} == wanted


def test_feast_environment_is_whole_and_has_libpqs_defaults() -> None:
    bare = Settings(postgres_dsn="dbname=shop", redis_url="redis://cache:1/2", project="ours").feast_environment()
    assert bare["CONCORD_FEAST_PROJECT"] == "ours"
    assert (bare["CONCORD_FEAST_PG_HOST"], bare["CONCORD_FEAST_PG_PORT"], bare["CONCORD_FEAST_PG_USER"]) == (
        "127.0.0.1",
        "5432",
        "postgres",
    )
    assert (bare["CONCORD_FEAST_PG_PASSWORD"], bare["CONCORD_FEAST_PG_SSLMODE"]) == ("", "prefer")
    full = Settings(postgres_dsn="postgresql://me:p%40ss@db:6/shop?sslmode=require").feast_environment()
    assert (full["CONCORD_FEAST_PG_PASSWORD"], full["CONCORD_FEAST_PG_SSLMODE"]) == ("p@ss", "require")
    yaml = (Path(__file__).parents[2] / "features" / "feature_store.yaml").read_text()
    assert [name for name in bare if name.startswith("CONCORD") and f"${{{name}}}" not in yaml] == []
    assert yaml.count("${CONCORD_FEAST_") == len(bare) - 1


def test_bundles_have_an_absolute_address_whatever_the_working_directory(tmp_path: Path) -> None:
    def base(**given: str) -> str:
        return Settings(**given).models_base  # type: ignore[arg-type]

    assert base() == f"file://{tmp_path}/.data/models"
    assert base(data_dir="/srv/shop") == "file:///srv/shop/models"
    for url in ("file:bundles", "file://bundles", "bundles", "./bundles"):
        assert base(models_url=url) == f"file://{tmp_path}/bundles", url
    for url in ("file:///srv/bundles", "file:/srv/bundles", "/srv/bundles"):
        assert base(models_url=url) == "file:///srv/bundles", url
    for url in ("s3://shop/bundles", "memory://bundles", "simplecache::s3://shop/bundles"):
        assert base(models_url=url) == url


def test_names_come_from_one_comma_separated_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONCORD_CHANNELS", " web, kiosk ,,app")
    assert load_settings(Settings).channels == ("web", "kiosk", "app")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CONCORD_CHANNELS", ""),
        ("CONCORD_CHANNELS", "web,web"),
        ("CONCORD_SURFACES", "Home"),
        ("CONCORD_SURFACES", "home,9lives"),
        ("CONCORD_SURFACES", "a" * 33),
        ("CONCORD_PROJECT", "my shop"),
        ("CONCORD_PROJECT", "Shop"),
    ],
)
def test_names_that_cannot_be_keys_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=name):
        load_settings(Settings)


def test_all_wrong_settings_are_named_at_once_and_no_secret_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONCORD_PROJECT", "my shop")
    monkeypatch.setenv("CONCORD_REDIS_URL", "http://:hunter2@cache")
    with pytest.raises(SettingsError, match=r"CONCORD_REDIS_URL.*CONCORD_PROJECT") as caught:
        load_settings(Settings)
    assert "hunter2" not in str(caught.value)


def test_a_printed_settings_object_shows_no_password() -> None:
    assert "hunter2" not in repr(Settings(redis_url="redis://:hunter2@cache", postgres_dsn="password=hunter2"))
