"""A DSN as a user writes it, and as each driver takes it.

- Both drivers do the same with it: the same hosts, user and database, the same settings. What
  libpq alone can do is refused, unless libpq was chosen.
- What is no parameter of a connection is a setting of the server.
- It may hold a password, so no error shows it.
- The environment, which is what libpq's is, is read anew for each connection.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from configparser import ConfigParser
from getpass import getuser
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlencode

from attrs import field, frozen

_URL = re.compile(
    r"postgres(?:ql)?(?:\+\w+)?://"  # with a driver's name, as SQLAlchemy writes it
    r"(?:(?P<user>[^:@/?#]*)(?::(?P<password>[^/?#]*))?@)?(?P<hosts>[^@/?#]*)"
    r"(?:/(?P<dbname>[^?#]*))?(?:\?(?P<query>[^#]*))?"
)
_HOST = re.compile(r"(?P<host>\[[^\]]+\]|[^:\[\]]*)(?::(?P<port>\d*))?")
_SETTING = re.compile(r"[A-Za-z_][A-Za-z0-9_$]*(\.[A-Za-z_][A-Za-z0-9_$]*)*")
_NUMBER = re.compile(r"-?\d+")
_PARAMETER = re.compile(
    r"user|password|dbname|passfile|service|sslmode|sslcert|sslkey|sslrootcert|"
    r"sslnegotiation|sslcrl|sslpassword|ssl_min_protocol_version|ssl_max_protocol_version|"
    r"target_session_attrs|krbsrvname|gsslib"
)
_OF_LIBPQ = re.compile(
    r"hostaddr|channel_binding|fallback_application_name|keepalives|keepalives_idle|"
    r"keepalives_interval|keepalives_count|tcp_user_timeout|sslcompression|sslcertmode|"
    r"sslcrldir|sslsni|requirepeer|require_auth|min_protocol_version|"
    r"max_protocol_version|gssencmode|gssdelegation|replication|load_balance_hosts|"
    r"scram_client_key|scram_server_key|oauth_issuer|oauth_client_id|oauth_client_secret|"
    r"oauth_scope|sslkeylogfile"
)
# Where asyncpg looks, if it is not told where.
_PLACES = ("/run/postgresql", "/var/run/postgresql", "/tmp", "/private/tmp", "localhost")  # noqa: S108
_PATIENCE = 60.0
_SSL = {"true": "require", "false": "disable"}


@frozen
class Dsn:
    """What a DSN says: where to connect and how, and what to set there."""

    hosts: Sequence[tuple[str, str]]  # a host and its port, or none
    port: str
    settings: Mapping[str, str]
    _connect_timeout: str
    _parameters: Mapping[str, str] = field(repr=False)

    @property
    def patience(self) -> float:
        """Seconds that making a connection may take."""
        asked = self._connect_timeout or os.environ.get("PGCONNECT_TIMEOUT", "")
        return float(asked) if _NUMBER.fullmatch(asked) and int(asked) > 0 else _PATIENCE

    def check_for_asyncpg(self) -> None:
        """Raise `ValueError` if there is something in it that libpq alone can do."""
        if only := [name for name in self._parameters if _OF_LIBPQ.fullmatch(name)]:
            raise ValueError(_only_libpq(", ".join(only)))
        if self._parameters.get("sslrootcert") == "system":
            raise ValueError(_only_libpq("sslrootcert=system"))

    def for_asyncpg(self) -> tuple[str, Mapping[str, str]]:
        """A DSN for asyncpg, and the `server_settings`."""
        given = dict(self._parameters)
        if service := given.get("service") or os.environ.get("PGSERVICE"):
            given["service"] = service
            _check_service(service)
        if self.hosts:
            given["host"] = ",".join(f"[{host}]" if ":" in host else host for host, _ in self.hosts)
        if ports := self._ports():
            given["port"] = ",".join(ports)
        return f"postgresql://?{urlencode(given)}" if given else "postgresql://", self._set()

    def for_libpq(self) -> dict[str, str]:
        """The parameters of a connection for libpq; `port` has one for each of `host`."""
        given = {**self._parameters, "client_encoding": "UTF8"}
        hosts = [host for host, _ in self.hosts]
        if not ("service" in given or os.environ.get("PGSERVICE")):
            given.setdefault("user", os.environ.get("PGUSER") or getuser())
            if not (hosts or "hostaddr" in given):
                hosts = list(filter(None, os.environ.get("PGHOST", "").split(","))) or [*_PLACES]
        ports = self._ports() or list(filter(None, os.environ.get("PGPORT", "").split(",")))
        if hosts:
            given["host"] = ",".join(hosts)
            ports = ports or ["5432"]
            if len(ports) == 1:
                ports *= len(hosts)
        if ports:
            given["port"] = ",".join(ports)
        settings = dict(self._set())
        options = [settings.pop("options", "")]
        if "application_name" in settings:
            given["application_name"] = settings.pop("application_name")
        for name, setting in settings.items():
            escaped = re.sub(r"([\s\\])", r"\\\1", setting)
            options.append(f"-c {name}={escaped}")
        given["options"] = " ".join(filter(None, options))
        return given

    def _ports(self) -> list[str]:
        """Empty, if none is named; otherwise one for each host, or for them all."""
        default = self.port or (os.environ.get("PGPORT") or "5432")
        if any(port for _, port in self.hosts):
            if "," in default:
                default = "5432"
            return [port or default for _, port in self.hosts]
        return self.port.split(",") if self.port else []

    def _set(self) -> Mapping[str, str]:
        settings = dict(self.settings)
        for name, variable in (("options", "PGOPTIONS"), ("application_name", "PGAPPNAME")):
            if name not in settings and (told := os.environ.get(variable)):
                settings[name] = told
        return settings


def parse_dsn(dsn: str) -> Dsn:
    """What it says, or a `ValueError`."""
    found = _URL.fullmatch(dsn)
    if found is None:
        raise ValueError(
            "the DSN cannot be read: postgresql://user:password@host:port/database?setting=value\n"
            "  What is special in a URL is percent-encoded, such as %2F for / in a password."
        )
    given: dict[str, str] = {}
    query = found["query"]
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError:
        raise ValueError(
            "the DSN cannot be read: after ? come pairs, name=value&name=value"
        ) from None
    for name, value in pairs:
        given["dbname" if name == "database" else name] = value
    for name in ("user", "password", "dbname"):
        if found[name]:
            given[name] = unquote(found[name])
    if encryption := given.pop("ssl", ""):
        given.setdefault("sslmode", _SSL.get(encryption.lower(), encryption))
    port = given.pop("port", "")
    listed = given.pop("host", "")
    hosts = _hosts(found["hosts"], encoded=True)
    if len(hosts) == 1 and not hosts[0][0]:
        port = hosts[0][1] or port
        hosts = _hosts(listed, encoded=False)
    if len(hosts) == 1 and not hosts[0][0]:
        hosts = []
    ports = port.split(",") if port else []
    if any(not host for host, _ in hosts) or not all(one.isdecimal() for one in ports):
        raise ValueError("the DSN cannot be read: a host is missing, or a port is not a number")
    if len(ports) > 1:
        if len(ports) != len(hosts):
            raise ValueError(f"the DSN has {len(hosts)} hosts and {len(ports)} ports")
        hosts = [(host, own or other) for (host, own), other in zip(hosts, ports, strict=True)]
        port = ""
    timeout = given.pop("connect_timeout", "")
    if timeout and not _NUMBER.fullmatch(timeout):
        raise ValueError(f"connect_timeout in the DSN is a number of seconds, not {timeout!r}")
    parameters = {
        name: given.pop(name)
        for name in list(given)
        if _PARAMETER.fullmatch(name) or _OF_LIBPQ.fullmatch(name)
    }
    parameters = {name: value for name, value in parameters.items() if value}
    settings = given
    settings.pop("client_encoding", None)  # which each driver knows for itself
    for name in settings:
        if not _SETTING.fullmatch(name):
            raise ValueError(f"{name!r} in the DSN is not the name of a setting")
    return Dsn(tuple(hosts), port, settings, timeout, parameters)


def _hosts(listed: str, *, encoded: bool) -> list[tuple[str, str]]:
    hosts: list[tuple[str, str]] = []
    for one in listed.split(","):
        if one.startswith("/") and not encoded:  # a directory may have a colon in its name
            hosts.append((one, ""))
        elif found := _HOST.fullmatch(one):
            host, port = found["host"].strip("[]"), found["port"] or ""
            hosts.append((unquote(host) if encoded else host, port))
        else:
            raise ValueError("the DSN cannot be read: a host is host:port, or [IPv6 address]:port")
    return hosts


def _check_service(name: str) -> None:
    services = ConfigParser(interpolation=None)
    services.read(os.environ.get("PGSERVICEFILE") or Path("~/.pg_service.conf").expanduser())
    if not services.has_section(name):  # asyncpg would connect to wherever
        raise ValueError(f"definition of service {name!r} not found")


def _only_libpq(what: str) -> str:
    return (
        f"the DSN has {what}, which is libpq's and asyncpg does not know.\n"
        "  Leave it out, or have PostgreSQLEventStore(driver='psycopg'), on asyncio and Trio. "
        "Transactions with\n  SQL in them need asyncpg."
    )
