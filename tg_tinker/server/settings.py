"""How a server process is set up: values, checked. Reading them from a command line is left to others."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path

import attrs

from tg_tinker import home
from tg_tinker.errors import InvalidRequestError
from tg_tinker.types import checks

LOCAL_TENANT = "local"

_MIB = 1 << 20
_GB = 1_000_000_000


@attrs.frozen(kw_only=True)
class Settings:
    """Everything that can be chosen about a server; times in seconds, sizes in bytes.

    ``keys`` maps API keys to tenants, beside the keys that the database of ``home`` knows. Until there was a key, and
    unless ``require_key`` asks for one, a loopback server serves everyone on this machine as one tenant; other
    addresses are refused (``check_address``). ``allowed_hosts`` are names beside "localhost" by which a loopback server
    may be called, and pages of which may call any server. A server that other machines can reach, by its address or by
    such a name, loads local models from below ``model_folders`` alone.

    ``versions_kept`` newest versions of a run stay in memory, and ``aside_bytes`` of those that its names have moved on
    from stay on disk. ``quota_bytes`` bounds what a tenant may store; None does not. ``idle`` is how long a base model
    that nothing uses stays in memory, unless another one is loaded.
    """

    home: Path = attrs.field(factory=home.folder, converter=Path)
    host: str = "127.0.0.1"
    port: int = attrs.field(default=0, validator=checks.integer(0, 65535))
    keys: Mapping[str, str] = attrs.field(factory=dict, repr=False)
    require_key: bool = False
    allowed_hosts: tuple[str, ...] = ()
    model_folders: tuple[Path, ...] = ()
    device: str = "auto"
    threads: int | None = attrs.field(default=None, validator=checks.optional(checks.integer(1)))
    slots: int = attrs.field(default=64, validator=checks.integer(1))
    parent: int | None = None
    max_body_bytes: int = attrs.field(default=512 * _MIB, validator=checks.integer(1))
    queue_limit: int = attrs.field(default=4096, validator=checks.integer(1))
    requests_per_minute: int | None = attrs.field(default=None, validator=checks.optional(checks.integer(1)))
    hold: float = attrs.field(default=30.0, validator=checks.number(0.0))
    results_kept: float = attrs.field(default=3600.0, validator=checks.number(0.0))
    result_bytes_kept: int = attrs.field(default=256 * _MIB, validator=checks.integer(0))
    versions_kept: int = attrs.field(default=8, validator=checks.integer(1))
    aside_bytes: int = attrs.field(default=4 * _GB, validator=checks.integer(0))
    quota_bytes: int | None = attrs.field(default=None, validator=checks.optional(checks.integer(1)))
    idle: float = attrs.field(default=1800.0, validator=checks.number(0.0))

    @property
    def loopback(self) -> bool:
        """Whether nobody but this machine can reach the address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def may_load(self, ref: str) -> bool:
        """Whether a model reference may be loaded here: a path on this machine is not for others to choose."""
        path = Path(ref).expanduser()
        own = self.loopback and not self.allowed_hosts  # a name of its own may be a proxy's, with others behind it
        if own or not (path.is_absolute() or ref.startswith((".", "~")) or path.exists()):
            return True
        return any(path.resolve().is_relative_to(folder.resolve()) for folder in self.model_folders)

    def check_address(self, *, has_keys: bool) -> None:
        """Refuse to serve other machines without keys: ``InvalidRequestError`` that says how to make one."""
        if not (self.loopback or has_keys):
            message = (
                f"host: {self.host} can be reached from other machines, and there is no usable API key; make one with "
                "`tg-tinker keys create TENANT`, or serve 127.0.0.1"
            )
            raise InvalidRequestError(message, field="host", constraint="a loopback address, or at least one API key")
