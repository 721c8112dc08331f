"""Settings: arguments before TG_TINKER_* before TS_*, and a key without a URL is an error."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from tg_tinker import home, settings
from tg_tinker.errors import InvalidRequestError
from tg_tinker.settings import Settings, resolve


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the machine's own settings counts here."""
    for name in {
        name for names in (settings.NAMES, settings.LOOPS_NAMES) for group in names.values() for name in group
    }:
        monkeypatch.delenv(name, raising=False)


def test_nothing_given_means_a_server_on_this_machine() -> None:
    """Without arguments and environment there is no URL and no key."""
    found = resolve()
    assert (found.base_url, found.api_key, found.tenant_id) == (None, None, None)
    assert (found.timeout, found.retry_count, found.verify_ssl) == (300.0, 3, True)


def test_arguments_go_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given is taken; TG_TINKER_* fills in before TS_*."""
    monkeypatch.setenv("TS_BASE_URL", "http://ts:1")
    monkeypatch.setenv("TS_API_KEY", "ts-key")
    monkeypatch.setenv("TS_TIMEOUT", "7")
    monkeypatch.setenv("TS_RETRY_COUNT", "9")
    found = resolve()
    assert (found.base_url, found.api_key, found.timeout, found.retry_count) == ("http://ts:1", "ts-key", 7.0, 9)
    monkeypatch.setenv("TG_TINKER_BASE_URL", "http://tg:1/")
    assert resolve().base_url == "http://tg:1"
    assert resolve(base_url="http://given:1", timeout=300.0).timeout == 300.0
    assert resolve("my-key", "http://given:1").base_url == "http://given:1"
    assert resolve("my-key").api_key == "my-key"


def test_a_first_argument_that_is_a_url_is_the_url() -> None:
    """Key and URL are told apart whichever way round they come."""
    assert resolve("http://host:1").base_url == "http://host:1"
    assert resolve("HTTP://host:1").api_key is None
    swapped = resolve("http://host:1", "the-key")
    assert (swapped.base_url, swapped.api_key) == ("http://host:1", "the-key")
    with pytest.raises(InvalidRequestError, match="not two"):
        resolve("http://host:1", "http://host:2")


@pytest.mark.parametrize("field", ["api_key", "tenant_id"])
def test_a_key_or_tenant_without_a_url_names_the_choice(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that would go nowhere is refused, given or set; the error says what the two ways out are."""
    with pytest.raises(InvalidRequestError, match="run a server on this machine") as caught:
        resolve(**{field: "value"})
    assert caught.value.field == "base_url"
    monkeypatch.setenv(f"TS_{field.upper()}", "secret-value")
    with pytest.raises(InvalidRequestError) as caught:
        resolve()
    assert "secret-value" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"base_url": "host:1"}, "base_url"),
        ({"base_url": "ftp://host"}, "base_url"),
        ({"base_url": "http://"}, "base_url"),
        ({"base_url": "http://host?x=1"}, "base_url"),
        ({"base_url": 3}, "base_url"),
        ({"api_key": ""}, "api_key"),
        ({"api_key": "one\ntwo", "base_url": "http://host"}, "api_key"),
        ({"tenant_id": "one\ud800", "base_url": "http://host"}, "tenant_id"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": "soon"}, "timeout"),
        ({"timeout": None}, "timeout"),
        ({"retry_count": -1}, "retry_count"),
        ({"retry_count": 1.5}, "retry_count"),
        ({"ready_timeout": -1.0}, "ready_timeout"),
        ({"verify_ssl": "no"}, "verify_ssl"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused_by_field(arguments: dict[str, Any], field: str) -> None:
    """Each setting is checked and named."""
    with pytest.raises(InvalidRequestError) as caught:
        resolve(**arguments)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("name", "field"),
    [("TG_TINKER_TIMEOUT", "timeout"), ("TS_RETRY_COUNT", "retry_count"), ("TS_VERIFY_SSL", "verify_ssl")],
)
def test_a_wrong_variable_is_named(name: str, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that cannot be read is an error that names it, never a silent default."""
    monkeypatch.setenv(name, "perhaps")
    with pytest.raises(InvalidRequestError, match=name) as caught:
        resolve()
    assert caught.value.field == field


def test_loops_names_count_in_loops_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """LOOPS_BASE_URL and BASETEN_API_KEY mean something on the Loops surface only, and come first there."""
    monkeypatch.setenv("LOOPS_BASE_URL", "http://loops:1")
    monkeypatch.setenv("BASETEN_API_KEY", "b-key")
    assert resolve().base_url is None
    found = resolve(names=settings.LOOPS_NAMES)
    assert (found.base_url, found.api_key) == ("http://loops:1", "b-key")


def test_the_key_is_never_shown() -> None:
    """Neither the repr nor an error shows a key."""
    assert "sesame" not in repr(Settings(api_key="sesame", base_url="http://h:1"))
    with pytest.raises(InvalidRequestError) as caught:
        resolve(api_key=b"sesame")  # type: ignore[arg-type]
    assert "sesame" not in str(caught.value)


def test_the_documented_defaults_show() -> None:
    """A signature built on the defaults reads as documented: 300.0 and 3."""
    parameters = inspect.signature(resolve).parameters
    assert (str(parameters["timeout"]), str(parameters["retry_count"])) == (
        "timeout: 'float' = 300.0",
        "retry_count: 'int' = 3",
    )


def test_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The argument goes before TG_TINKER_HOME, which goes before the platform's folder; nothing is created."""
    monkeypatch.delenv(home.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert home.folder().name == "tg-tinker"
    monkeypatch.setenv(home.VARIABLE, str(tmp_path / "set"))
    assert home.folder() == (tmp_path / "set").resolve()
    assert home.folder(tmp_path / "given") == (tmp_path / "given").resolve()
    assert not list(tmp_path.iterdir())
