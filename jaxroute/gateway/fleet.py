"""The fleet file: which servers there are, how they are chosen from, and what the gateway allows.

Every option of the file is a field of these classes; docs/gateway.md lists them. `read_fleet` checks all that can be
checked without the policy, `check_policy` the rest.
"""

from __future__ import annotations

import ipaddress
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints
from urllib.parse import urlsplit

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError, safe_load

from jaxroute.errors import UserError, closest
from jaxroute.workloads.limits import Limits

AUTO = "auto"
"""The model's name that leaves the choice to the policy."""


@dataclass
class ExpertEntry:
    """One server."""

    url: str = MISSING
    """Where its API is, with /v1 at the end."""
    model: str = MISSING
    """The name by which it serves its LLM."""
    metrics: str | None = None
    """Where its metrics are, if they are to be read: vLLM's names."""
    health: str | None = None
    """What is asked to see whether it serves; by default /health next to /v1, and if there is none, /v1/models."""
    key_env: str | None = None
    """The environment variable that holds its API key."""
    quality: float = 0.5
    """Quality of its answers, from 0 to 1, of requests for which nothing else predicts it."""
    output_tokens: float = 200.0
    """Tokens of its answers, the median, of such requests."""
    log_length_error: float = 0.7
    """Standard deviation of log(output tokens) around that, if the policy is a rule."""


@dataclass
class CloudEntry:
    """An endpoint elsewhere, to which requests go that are sent away."""

    url: str = MISSING
    """As of an expert."""
    model: str = MISSING
    """Likewise."""
    key_env: str | None = None
    """Likewise."""
    price_per_request: float = 0.05
    """In QoS."""
    price_per_1k_tokens: float = 0.1
    """Of prompt and answer, in QoS."""
    ttft: float = 0.5
    """Median time to first token, s, network included."""
    tpot: float = 0.0125
    """Median time per further token, s."""
    quality: float = 0.8
    """As of an expert."""
    output_tokens: float = 200.0
    """Likewise."""
    log_length_error: float = 0.7
    """Likewise."""
    max_in_flight: int = 64
    """Most requests that it has at once."""


@dataclass
class ServiceClass:
    """What a class of service demands; a limit that is null does not hold."""

    ttft: float | None = None
    """Most time to first token, s."""
    tpot: float | None = None
    """Most time per further token, s."""
    e2e: float | None = None
    """Most time to the last token, s."""
    normalised: float | None = None
    """Most E2E per output token, s."""
    decline: bool = True
    """false: the policy never turns it away."""
    local_only: bool = False
    """true: it never goes to the cloud."""

    @property
    def limits(self) -> Limits:
        """Return what it demands; None where it demands nothing."""
        return Limits(self.ttft, self.tpot, self.e2e, self.normalised)


@dataclass
class GuardOptions:
    """When the fallback decides instead of the policy."""

    decision_ms: float = 5.0
    """Most time for a decision, ms."""
    trained_range: bool = True
    """Whether the fallback decides on what is outside of what the policy was trained on."""


@dataclass
class BoundOptions:
    """What the gateway allows."""

    in_flight: int = 2000
    """Most requests at once."""
    body_bytes: int = 4_000_000
    """Most bytes of a request."""
    connect_s: float = 2.0
    """Most time to reach a server, s."""
    first_byte_s: float = 120.0
    """Most time until an answer begins, s."""
    idle_s: float = 60.0
    """Most time between two parts of an answer, s."""
    body_s: float = 30.0
    """Most time for a client to send its request, s."""
    tries: int = 3
    """How often a request is sent, if servers fail before its answer has begun."""
    drain_s: float = 30.0
    """Most time to end what is in flight once the gateway is told to stop, s."""


@dataclass
class HealthOptions:
    """How servers are watched."""

    interval_s: float = 2.0
    """Time between two probes of a server, s."""
    timeout_s: float = 2.0
    """Most time for a probe, s."""
    failures: int = 3
    """Consecutive failures, of probes and requests, after which a server counts as down."""
    metrics_s: float = 2.0
    """Time between two looks at a server's metrics, s."""


@dataclass
class LogOptions:
    """The decision log."""

    path: str | None = "decisions.jsonl"
    """Where it is written, from the folder of the fleet file; null writes none."""
    prompts: bool = False
    """Whether prompts are written into it."""
    rotate_bytes: int = 100_000_000
    """Size at which another file is begun, bytes."""
    keep: int = 5
    """How many full files are kept."""


@dataclass
class Fleet:
    """A fleet file."""

    experts: list[ExpertEntry] = field(default_factory=list)
    """The servers, in the order of the policy's site."""
    listen: str = "127.0.0.1:8080"
    """Address and port."""
    policy: str = "impact_greedy+rate_price"
    """Folder of an exported router, a run, the name of a pretrained router, or a rule."""
    fallback: str = "impact_greedy"
    """The rule that decides where the policy cannot."""
    shadow: list[str] = field(default_factory=list)
    """Rules whose choices are logged beside the policy's."""
    site: str | None = None
    """With a rule or a pretrained router: a site of configs/site, or a file like those; it has the servers' speed."""
    rate: float | None = None
    """Requests per second to expect at first; by default the export's, or 1 per second."""
    speed: float = 1.0
    """How many times as quickly time passes at the servers: for emulated ones, as their --speed."""
    classes: dict[str, ServiceClass] = field(default_factory=dict)
    """Classes of service, by name; by default one, standard, of 80 ms per output token."""
    default_class: str | None = None
    """The class of a request that names none; by default the first."""
    cloud: CloudEntry | None = None
    """Where requests go that are sent away; null declines them."""
    keys: list[str] = field(default_factory=list)
    """SHA-256 of each API key, in hexadecimal; none lets everybody in."""
    guard: GuardOptions = field(default_factory=GuardOptions)
    limits: BoundOptions = field(default_factory=BoundOptions)
    health: HealthOptions = field(default_factory=HealthOptions)
    log: LogOptions = field(default_factory=LogOptions)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port to listen on."""
        return address_of("listen", self.listen)

    @property
    def is_public(self) -> bool:
        """Whether other machines can reach it."""
        try:
            return not ipaddress.ip_address(self.address[0]).is_loopback
        except ValueError:
            return self.address[0] != "localhost"

    @property
    def usual_class(self) -> str:
        """The class of a request that names none."""
        return self.default_class or next(iter(self.classes))


def address_of(name: str, text: str) -> tuple[str, int]:
    """Return the host and port of an option.

    Raises:
        UserError: it is no address and port.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise UserError(f"{name}={text} must be an address and a port, such as 127.0.0.1:8080")
    return host.strip("[]") or "127.0.0.1", int(port)


def read_fleet(path: Path) -> Fleet:
    """Read and check a fleet file.

    Raises:
        UserError: it cannot be read, has an unknown key or a value that is missing, of the wrong type, or out of
            range.
    """
    try:
        given = safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"{path} cannot be read ({reason}); name a fleet file, see docs/gateway.md") from None
    except YAMLError as error:
        mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: {getattr(error, 'problem', None) or 'no YAML'}") from None
    if not isinstance(given, dict):
        raise UserError(f"{path} is no fleet file: it lists no experts; see docs/gateway.md")
    _check_names(path, given, Fleet, "")
    fleet: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Fleet), given))
    # Not as a default of the field, to which the file's classes would be added.
    fleet.classes = fleet.classes or {"standard": ServiceClass(normalised=0.08)}
    _check(path, fleet)
    return fleet


def _check_names(path: Path, given: Any, schema: type, prefix: str) -> None:
    """Check that all keys are known, and that those that are needed are there; and that values have their types."""
    hints = get_type_hints(schema)
    for key in given:
        if key not in hints:
            near = closest(key, hints)
            hint = f" (did you mean {prefix}{near}?)" if near else f"; choose from {', '.join(hints)}"
            raise UserError(f"{path}: unknown option {prefix}{key}{hint}")
    for entry in fields(schema):
        if entry.default is MISSING and given.get(entry.name) is None:
            raise UserError(f"{path}: {prefix}{entry.name} is missing; give it a value")
    for key, value in given.items():
        parts = list(_parts(hints[key], value, f"{prefix}{key}"))
        if not parts:
            try:
                OmegaConf.merge(OmegaConf.structured(schema), {key: value})
            except OmegaConfBaseException as error:
                raise UserError(f"{path}: {prefix}{key}: {str(error).splitlines()[0]}") from None
        for where, part, kind in parts:
            if not isinstance(part, dict):
                raise UserError(f"{path}: {where} is {part!r}; give it as name: value")
            _check_names(path, part, kind, f"{where}.")


def _parts(hint: Any, value: Any, name: str) -> Iterator[tuple[str, Any, type]]:
    """Yield the parts of a value that have options of their own: where each is, the part, its class."""
    kinds = [kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)]
    if not kinds or value is None:
        return
    (kind,) = kinds
    if isinstance(value, list):
        yield from ((f"{name}.{number}", part, kind) for number, part in enumerate(value))  # type: ignore[misc]
    elif getattr(hint, "__origin__", None) is dict and isinstance(value, dict):
        yield from ((f"{name}.{key}", part, kind) for key, part in value.items())  # type: ignore[misc]
    else:
        yield name, value, kind  # type: ignore[misc]


def _check(path: Path, fleet: Fleet) -> None:
    def fail(what: str) -> None:
        raise UserError(f"{path}: {what}")

    if not fleet.experts:
        fail("experts is empty; list at least one server")
    seen: dict[str, int] = {}
    for number, expert in enumerate(fleet.experts):
        where = f"experts.{number}"
        _check_url(path, f"{where}.url", expert.url)
        for name in ("metrics", "health"):
            if getattr(expert, name) is not None:
                _check_url(path, f"{where}.{name}", getattr(expert, name))
        url = expert.url.rstrip("/")
        if url in seen:
            fail(f"{where}.url is that of experts.{seen[url]} too, {url}; give every server one entry")
        seen[url] = number
        if expert.model == AUTO:
            fail(f"{where}.model is {AUTO}, which leaves the choice to the policy; give the LLM's own name")
        _check_numbers(path, where, expert)
        _check_key(path, where, expert.key_env)
    if fleet.cloud is not None:
        _check_url(path, "cloud.url", fleet.cloud.url)
        _check_numbers(path, "cloud", fleet.cloud)
        _check_key(path, "cloud", fleet.cloud.key_env)
    try:
        address_of("listen", fleet.listen)
    except UserError as error:
        fail(str(error))
    for name, service in fleet.classes.items():
        limits = {key: limit for key, limit in service.limits._asdict().items() if limit is not None}
        if not limits:
            fail(f"classes.{name} limits nothing; give one of {', '.join(Limits._fields)}, in s")
        for key, limit in limits.items():
            if not 0 < limit < math.inf:
                fail(f"classes.{name}.{key}={limit} must be above 0 s, and finite")
    if fleet.default_class is not None and fleet.default_class not in fleet.classes:
        near = closest(fleet.default_class, fleet.classes)
        hint = f" (did you mean {near}?)" if near else f"; choose from {', '.join(fleet.classes)}"
        fail(f"default_class={fleet.default_class} is no class{hint}")
    for number, digest in enumerate(fleet.keys):
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            fail(f"keys.{number} is no SHA-256; make one with: printf %s YOUR-KEY | sha256sum")
    for part in ("guard", "limits", "health", "log"):
        for entry in fields(getattr(fleet, part)):
            value = getattr(getattr(fleet, part), entry.name)
            if isinstance(value, int | float) and not isinstance(value, bool) and not 0 < value < math.inf:
                fail(f"{part}.{entry.name}={value} must be above 0, and finite")
    for name in ("rate", "speed"):
        value = getattr(fleet, name)
        if value is not None and not 0 < value < math.inf:
            fail(f"{name}={value} must be above 0, and finite")


def _check_url(path: Path, where: str, url: str) -> None:
    parts = urlsplit(url)
    try:
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fine = False
    if not fine:
        raise UserError(f"{path}: {where}={url} is no address; write for instance http://10.0.0.1:8000/v1")


def _check_numbers(path: Path, where: str, entry: ExpertEntry | CloudEntry) -> None:
    for name in [entry.name for entry in fields(entry)]:
        value = getattr(entry, name)
        if not isinstance(value, int | float):
            continue
        may_be_zero = name in ("quality", "price_per_request", "price_per_1k_tokens", "log_length_error")
        if not (0 <= value < math.inf) or (value == 0 and not may_be_zero) or (name == "quality" and value > 1):
            wanted = "from 0 to 1" if name == "quality" else "finite, and not negative" if may_be_zero else "above 0"
            raise UserError(f"{path}: {where}.{name}={value} must be {wanted}")


def _check_key(path: Path, where: str, variable: str | None) -> None:
    if variable is not None and not os.environ.get(variable):
        raise UserError(f"{path}: {where}.key_env: the environment variable {variable} is not set; set it to the key")


def check_experts(path: Path, fleet: Fleet, labels: Sequence[str], of: str) -> None:
    """Check that a fleet has as many servers as its policy's site has experts.

    Raises:
        UserError: it has more or fewer.
    """
    if len(fleet.experts) != len(labels):
        raise UserError(
            f"{path}: experts lists {len(fleet.experts)} servers, and {of} has {len(labels)}: {', '.join(labels)}; "
            "list one server for each, in this order"
        )
