"""Every setting of the service, in one class: `IRONCLIP_*` variables over a TOML file over the defaults.

`IRONCLIP_CONFIG` names the file. Of the service's modules only this one and `service.environment` read the
environment.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)
from redis.asyncio import ConnectionPool
from redis.exceptions import RedisError

from ironclip.errors import IronclipError
from service.image_addresses import read_rule

PREFIX = "IRONCLIP_"
CONFIG_VARIABLE = "IRONCLIP_CONFIG"
# Of the client, which may run in the same shell; nothing to the service.
CLIENT_VARIABLES = ("IRONCLIP_URL", "IRONCLIP_API_KEY")
NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
DEFAULT_ALIAS = "default"
# A Kubernetes Service called "ironclip" puts these into every pod beside it; they are not ours.
_SERVICE_LINK = re.compile(r"^IRONCLIP_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP)(_\w+)?)$")

MIB = 1024 * 1024
# Pillow refuses beyond this by itself (half of its error bound), so a higher limit could not be kept.
MOST_PIXELS = 89_000_000
# Of the secret that signs what is kept in Redis, where there are tenants to be kept apart.
MAC_KEY_CHARS = 32


class SettingsInvalid(IronclipError):
    """The environment or the settings file cannot be used; the text has one line for each fault."""

    code = "settings-invalid"
    title = "The settings cannot be used"


class Settings(BaseSettings):
    """The service's settings; each field is the variable `IRONCLIP_<NAME>` and the key `<name>` in the file."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True, validate_default=True)

    host: str = Field(default="127.0.0.1", description="Address to listen on; `0.0.0.0` for every interface.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    shared_port: int = Field(
        default=0,
        ge=0,
        le=65535,
        description="A port that several processes of this host, of one user, listen on together, each while it is "
        "ready; 0: none. `python -m service fleet` sets it.",
    )
    encoders: Annotated[dict[str, str], NoDecode] = Field(
        default={"demo": "demo", "demo-robust": "demo-robust", "demo-vit": "demo-vit"},
        description="Encoders to serve, `name=spec` with commas between, or a JSON object. A spec is `demo`, "
        "`demo-robust`, `demo-vit`, an artifact folder, an open_clip `MODEL/PRETRAINED_TAG`, or an `hf-hub:` or "
        "`local-dir:` name.",
    )
    default_encoder: str = Field(
        default="", description="The encoder that `default` means; the first one in `encoders` if empty."
    )
    defences: Annotated[dict[str, Any], NoDecode] = Field(
        default={},
        description="The defence of classifications that name none, by encoder: `encoder=defence` with commas between, "
        "or a JSON object whose values are defences as in a request. Encoders not named have `none`.",
    )
    models_dir: Path | None = Field(
        default=None,
        description="Folder of artifacts: each subfolder is served under its name, and loaded, swapped and unloaded as "
        "it comes, changes and goes; `NAME@canary=0.05` is tried on that share of NAME's requests. Encoders in "
        "`encoders` stay as they are.",
    )
    models_poll_seconds: float = Field(
        default=5.0,
        ge=0.05,
        le=3600,
        description="Seconds between two looks into `models_dir`; what has changed is taken when two looks in a row "
        "see the same.",
    )
    model_specs: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="What `PUT /models/{name}` may load beside the demo encoders and artifacts below `models_dir`: "
        "specs and absolute folders with commas between, `*` stands for anything (`ViT-B-32/*, hf-hub:acme/*, "
        "/srv/clip/*`).",
    )
    device: str = Field(default="auto", description="`auto`, `cpu`, `cuda` or `cuda:N`.")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = Field(
        default="auto",
        description="Compute type; `auto` measures at start and checks the drift against float32. What is fastest may "
        "come out differently on each replica: pin it where several are to give the same scores and share a cache. "
        "`int8`, for CPUs, makes the linear layers of the image tower of 8-bit products; `auto` never takes it.",
    )
    compile: Literal["auto", "off", "graphs", "compile"] = Field(
        default="auto",
        description="The image tower's forward: `graphs` replays a CUDA graph for each warmed batch size, `compile` is "
        "torch.compile (minutes at start), `off` the plain one. `auto`: graphs on a GPU, if they are measured faster "
        "and come to the same; else off.",
    )
    threads: int = Field(
        default=0,
        ge=0,
        le=1024,
        description="CPU threads for the model; 0: torch's number, or the container's CPU quota if less.",
    )
    max_batch: int = Field(default=32, ge=1, le=4096, description="Items in one forward pass at most.")
    max_queue: int = Field(
        default=512,
        ge=1,
        le=1_000_000,
        description="Items waiting for a tower, or pictures for decoding, with which no further request is let in "
        "(429), whether it brings one or many. Batch work does not count against interactive requests.",
    )
    max_queue_ms: float = Field(
        default=2000.0,
        ge=1,
        le=3_600_000,
        description="Milliseconds of work, at the pace of the last batches, that may be ahead of a request at a tower, "
        "and of decoding; if more is, it is answered 429. What the request brings itself does not count. Never less "
        "than one full batch.",
    )
    worker_timeout_seconds: float = Field(
        default=60.0,
        ge=0.1,
        le=3600,
        description="A model worker that has work and has not moved for so long is replaced, what it had in hand is "
        "answered 503; never less than ten times what its batch should take. Threads that decode pictures are not "
        "replaced: when all of them are stuck for so long, the process ends with status 4.",
    )
    worker_restarts: int = Field(
        default=5,
        ge=0,
        le=1000,
        description="Starts of a model worker in a row, with growing pauses, after which the process ends with status "
        "4, for whatever started it to start it again.",
    )
    idle_wait_ms: float = Field(
        default=5.0,
        ge=0,
        le=1000,
        description="How long an idle model waits for the next item while images are being decoded, before it "
        "starts a batch that is not full; ten times that in all.",
    )
    decode_workers: int = Field(
        default=0,
        ge=0,
        le=256,
        description="Threads that decode images; 0: one a core, within the "
        "quota, as far as the largest pictures of all of them fit into a quarter of the memory that there is.",
    )
    max_views: int = Field(
        default=16,
        ge=1,
        le=1024,
        description="What a defence may cost for one picture at most, in forwards of the image tower (COLA: views).",
    )
    probes: bool = Field(default=True, description="Whether `/attack-probe` is there.")
    max_probes: int = Field(
        default=64, ge=1, le=100_000, description="Probes that run and wait at most; more are answered 429."
    )
    probe_max_seconds: float = Field(
        default=60.0, gt=0, le=86_400, description="Wall clock that one probe may ask for, in seconds."
    )
    probe_max_gradients: int = Field(
        default=200_000,
        ge=1,
        le=1_000_000_000,
        description="Work that one probe may take, in gradient steps without a defence (three forwards of the tower "
        "each); one through a defence of N views counts about N, a query without a gradient a third of one.",
    )
    probe_quantum_ms: float = Field(
        default=0.0,
        ge=0,
        le=60_000,
        description="How long a piece of a probe's work may keep a classification waiting; 0: one and a half times "
        "a full batch of classifications, measured at start.",
    )
    probe_ttl_seconds: int = Field(
        default=600, ge=1, le=86_400, description="How long an ended probe can still be asked for."
    )
    request_timeout_ms: int = Field(
        default=30_000,
        ge=10,
        le=3_600_000,
        description="Longest time for one request; a caller may ask for less with `X-Request-Timeout-Ms`.",
    )
    drain_seconds: float = Field(
        default=30.0, ge=0, le=600, description="How long requests in flight may run on after a stop signal."
    )
    drain_delay_seconds: float = Field(
        default=0.0,
        ge=0,
        le=120,
        description="How long `/readyz` says 503 before the port closes, for balancers to notice.",
    )

    keys_file: Path | None = Field(
        default=None,
        description="TOML file of API keys, see `python -m service keys --help`; read again when it changes. Without "
        "it the service is open to whoever reaches it.",
    )
    metrics_port: int = Field(
        default=0,
        ge=0,
        le=65535,
        description="A port of its own for `/metrics`, open and with nothing else on it; 0 leaves it on `port`, where "
        "an API key needs the scope `metrics` or `admin`.",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Web pages that may ask from a browser, as origins `https://host[:port]` with commas between; `*` "
        "for all of them, without API keys only. Cookies are never read.",
    )

    redis_url: SecretStr | None = Field(
        default=None,
        description="`redis://`, `rediss://` or `unix://` address of a Redis shared by the replicas, for caches "
        "and label sets; without it both stay in this process and in `state_dir`.",
    )
    redis_timeout_ms: int = Field(default=50, ge=1, le=10_000, description="Longest wait for one answer of Redis.")
    redis_prefix: str = Field(
        default="ironclip", pattern=r"^[A-Za-z0-9._-]{1,64}$", description="Front part of every key in Redis."
    )
    redis_mac_key: SecretStr = Field(
        default=SecretStr(""),
        description="Secret that signs what is kept in Redis (cached values, label sets, probes), the same on all "
        "replicas, so that another writer to Redis cannot plant any. With API keys and Redis it is needed.",
    )
    cache_bytes: int = Field(
        default=64 * MIB, ge=0, description="Memory for cached answers, scores and vectors; 0 turns caching off."
    )
    cache_ttl_seconds: int = Field(
        default=3600, ge=1, le=31_536_000, description="Age at which a cached value is dropped."
    )
    text_cache_bytes: int = Field(
        default=256 * MIB,
        ge=0,
        description="Memory for the text banks of label sets and what defences make of them, kept between requests; "
        "the newest is kept even where it is larger (COLA with 1,000 labels of 50 texts, ViT-B/32: 150 MiB).",
    )
    state_dir: Path = Field(
        default=Path("state"), description="Folder for registered label sets when there is no Redis."
    )

    image_url_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Hosts that pictures may be fetched from where a request has a URL in a picture's place: `host` or "
        "`.suffix` (every host below it), either with `:port`, with commas between. None: no URL is fetched.",
    )
    image_url_networks: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Networks such as `10.0.0.0/8` in which those hosts may lie; without it every address of a host "
        "has to be a public one.",
    )
    image_url_http: bool = Field(
        default=False, description="Whether `http://` is fetched too; for private networks, where nobody listens."
    )
    image_url_timeout_ms: int = Field(
        default=5000, ge=10, le=600_000, description="Longest time for fetching one picture, redirects included."
    )
    image_url_fetches: int = Field(
        default=16, ge=1, le=1024, description="Pictures fetched at once at most, a quarter of them for one request."
    )

    max_body_bytes: int = Field(default=64 * MIB, ge=1024, description="Bytes of one request at most.")
    max_held_bytes: int = Field(
        default=1024 * MIB,
        ge=1024,
        description="Bytes of all requests under way at most; more are answered 429.",
    )
    max_image_bytes: int = Field(default=16 * MIB, ge=1024, description="Bytes of one encoded image at most.")
    max_pixels: int = Field(default=25_000_000, ge=1, le=MOST_PIXELS, description="Pixels of one image at most.")
    max_side: int = Field(default=16_384, ge=1, le=65_535, description="Pixels along one side of an image at most.")
    max_images: int = Field(default=64, ge=1, le=4096, description="Images in one request at most.")
    max_texts: int = Field(default=1024, ge=1, le=65_536, description="Texts in one embedding request at most.")
    max_labels: int = Field(default=1000, ge=1, description="Labels sent with one request at most.")
    max_label_sets: int = Field(
        default=1000, ge=1, le=1_000_000, description="Label sets registered at most, of each tenant."
    )
    max_label_set_bytes: int = Field(
        default=64 * MIB,
        ge=1024,
        description="Bytes of all registered label sets at most, of each tenant; older versions are kept as long as "
        "half of it suffices.",
    )
    max_registered_labels: int = Field(default=20_000, ge=1, description="Labels of one registered set at most.")
    max_prompts: int = Field(
        default=160_000, ge=1, description="Prompts at most that labels, templates and descriptions make together."
    )
    max_text_chars: int = Field(default=1000, ge=1, le=100_000, description="Characters of one label, prompt or text.")

    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="Least level logged.")
    log_format: Literal["auto", "json", "console"] = Field(
        default="auto", description="`auto`: coloured lines on a terminal, JSON elsewhere."
    )
    slow_request_ms: int = Field(
        default=5000,
        ge=0,
        le=3_600_000,
        description="Requests that take longer are logged as warnings, with the time of each stage; 0: none are. "
        "Probes never are.",
    )

    @field_validator("encoders", mode="before")
    @classmethod
    def _read_encoders(cls, value: object) -> object:
        return parse_encoders(value) if isinstance(value, str) else value

    @field_validator("encoders")
    @classmethod
    def _check_encoders(cls, value: dict[str, str]) -> dict[str, str]:
        if not value:
            raise ValueError("name at least one encoder")
        for name, spec in value.items():
            if not re.fullmatch(NAME_PATTERN, name) or name == DEFAULT_ALIAS:
                raise ValueError(f"{name!r} cannot name an encoder: {NAME_PATTERN}, and not 'default'")
            if not spec.strip():
                raise ValueError(f"encoder {name!r} has no spec")
        return value

    @field_validator("defences", mode="before")
    @classmethod
    def _read_defences(cls, value: object) -> object:
        return parse_encoders(value, plain=False) if isinstance(value, str) else value

    @field_validator("cors_origins", "model_specs", "image_url_hosts", "image_url_networks", mode="before")
    @classmethod
    def _read_list(cls, value: object) -> object:
        return tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin != "*" and not re.fullmatch(r"https?://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\])(:\d{1,5})?", origin):
                raise ValueError(
                    f"{origin!r} is not an origin: https://host[:port], without a path or a slash at its end"
                )
        return value

    @field_validator("image_url_hosts")
    @classmethod
    def _check_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            read_rule(entry)
        return value

    @field_validator("image_url_networks")
    @classmethod
    def _check_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            ip_network(entry)
        return value

    @field_validator("models_dir")
    @classmethod
    def _check_models_dir(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_dir():
            raise ValueError(f"there is no folder {str(value)!r}; make it, it may be empty")
        return value

    @field_validator("redis_url")
    @classmethod
    def _check_redis_url(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None or not value.get_secret_value():
            return None
        if not value.get_secret_value().startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("must begin with redis://, rediss:// or unix://")
        try:
            ConnectionPool.from_url(value.get_secret_value()).make_connection()  # type: ignore[no-untyped-call]
        except (ValueError, TypeError, RedisError):  # whose text may quote the password
            raise ValueError(
                "must be redis://[user:password@]host[:port][/number], with %XX for a password's special characters, "
                "and only options that redis-py knows"
            ) from None
        return value

    @model_validator(mode="after")
    def _check_default(self) -> Settings:
        if self.models_dir is not None:
            return self  # which encoders there are is found out at start
        if self.default_encoder and self.default_encoder not in self.encoders:
            raise ValueError(
                f"default_encoder {self.default_encoder!r} is not among the encoders: {', '.join(self.encoders)}"
            )
        unknown = sorted(set(self.defences) - set(self.encoders))
        if unknown:
            raise ValueError(
                f"defences names {unknown[0]!r}, which is not among the encoders: {', '.join(self.encoders)}"
            )
        return self

    @model_validator(mode="after")
    def _check_keys(self) -> Settings:
        if self.keys_file is None:
            return self
        if "*" in self.cors_origins:
            raise ValueError("cors_origins: `*` lets any web page use the API keys it gets hold of; name the origins")
        if self.redis_url is not None and len(self.redis_mac_key.get_secret_value()) < MAC_KEY_CHARS:
            raise ValueError(
                "redis_mac_key: with keys_file and redis_url set, what is kept in Redis has to be signed: set "
                f"IRONCLIP_REDIS_MAC_KEY to at least {MAC_KEY_CHARS} characters, the same on all replicas (for "
                "instance from `openssl rand -hex 32`)"
            )
        return self

    @model_validator(mode="after")
    def _check_ports(self) -> Settings:
        if self.metrics_port and self.metrics_port == self.port:
            raise ValueError("metrics_port: is the same as port; 0 leaves /metrics there, with the other routes")
        if self.shared_port and self.shared_port in (self.port, self.metrics_port):
            raise ValueError("shared_port: is the same as port or metrics_port; each process has those for itself")
        return self

    @property
    def default_name(self) -> str:
        """Name of the encoder that `default` stands for."""
        return self.default_encoder or next(iter(self.encoders))

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Put explicit arguments over the environment over the TOML file."""
        config = os.environ.get(CONFIG_VARIABLE)
        file = TomlConfigSettingsSource(settings_cls, toml_file=config or None)
        return init_settings, env_settings, file


def parse_encoders(text: str, *, plain: bool = True) -> dict[str, Any]:
    """Read `name=spec,name=spec`, bare specs (named after themselves), or a JSON object of names to specs.

    Without ``plain`` the object's values stay as they are, and every name must be given.
    """
    if text.lstrip().startswith("{"):
        parsed = json.loads(text)
        return {str(name): str(spec) if plain else spec for name, spec in parsed.items()}
    encoders: dict[str, str] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, equals, spec = entry.partition("=")
        if not equals and not plain:
            raise ValueError(f"write encoder=defence, not {entry!r}")
        if not equals:
            name, spec = re.sub(r"[^a-z0-9._-]+", "-", entry.lower()).strip("-._")[:64], entry
        if name in encoders:
            raise ValueError(f"encoder {name!r} is named twice")
        encoders[name] = spec
    return encoders


def load_settings(**overrides: Any) -> Settings:
    """Read the settings; `overrides` (from the command line) win over the environment.

    Raises:
        SettingsInvalid: a variable or key is unknown or has a bad value, or the file cannot be read.
    """
    faults = _unknown_variables(os.environ)
    config = os.environ.get(CONFIG_VARIABLE)
    if config and not Path(config).is_file():
        faults.append(f"{CONFIG_VARIABLE}: there is no file {config!r}")
    if faults:
        raise SettingsInvalid("\n".join(faults))
    try:
        return Settings(**overrides)
    except ValidationError as error:
        raise SettingsInvalid("\n".join(_fault(item) for item in error.errors(include_input=False))) from None
    except (SettingsError, ValueError) as error:
        raise SettingsInvalid(str(error)) from None


def _unknown_variables(environ: Mapping[str, str]) -> list[str]:
    known = {PREFIX + name.upper() for name in Settings.model_fields} | {CONFIG_VARIABLE, *CLIENT_VARIABLES}
    faults = []
    for variable in sorted(environ):
        upper = variable.upper()
        if upper.startswith(PREFIX) and upper not in known and not _SERVICE_LINK.match(upper):
            near = difflib.get_close_matches(upper, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; `python -m service settings` lists them all"
            faults.append(f"{variable}: there is no such setting{hint}")
    if environ.get("IRONCLIP_PORT", "").startswith("tcp://"):
        faults.append(
            "IRONCLIP_PORT: was set by Kubernetes for a Service called 'ironclip'; put "
            "`enableServiceLinks: false` into the pod's spec"
        )
    return faults


def _fault(item: Mapping[str, Any]) -> str:
    location = [str(part) for part in item["loc"]]
    name = PREFIX + location[0].upper() if location else "settings"
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[0], list(Settings.model_fields), n=1)
        message = "there is no such setting" + (f"; did you mean {near[0]!r}?" if near else "")
        return f"{location[0]}: {message}"
    return f"{name}: {message}"
