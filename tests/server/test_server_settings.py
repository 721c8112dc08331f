from __future__ import annotations

from pathlib import Path

import pytest

from tg_tinker.errors import InvalidRequestError
from tg_tinker.server.settings import Settings


def test_a_server_for_others_loads_folders_only_where_it_may(tmp_path: Path):
    """On loopback any folder loads; elsewhere, or behind a proxy, hub ids and what is below the operator's folders."""
    (tmp_path / "models").mkdir()
    inside, outside = str(tmp_path / "models" / "m"), str(tmp_path / "secret")
    own = Settings(home=tmp_path)
    assert own.may_load(outside)
    refs = ("org/model", inside, outside, f"{inside}/../../secret", "~/x", "./x")
    for reached in ({"host": "0.0.0.0"}, {"allowed_hosts": ("proxy",)}):
        public = Settings(home=tmp_path, model_folders=(tmp_path / "models",), **reached)
        assert [public.may_load(ref) for ref in refs] == [True, True, False, False, False, False]


@pytest.mark.parametrize(
    ("host", "loopback"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box", False)]
)
def test_what_counts_as_this_machine(host, loopback):
    """Loopback addresses and localhost; any other name could be reached from elsewhere."""
    settings = Settings(host=host)
    assert settings.loopback is loopback
    settings.check_address(has_keys=True)
    if not loopback:
        with pytest.raises(InvalidRequestError, match="keys create"):
            settings.check_address(has_keys=False)
