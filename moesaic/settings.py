"""The settings of every process. Flags win over the environment, that over YAML, and YAML over defaults.

A setting is declared here and nowhere else: its type, bounds and default, and the description that `--help`
and docs/settings.md show. An unknown key is an error. The environment is read in this module alone:
`MOESAIC_ENGINE__MAX_BATCH_TOKENS=1024` sets `engine.max_batch_tokens`; the standard OTEL_* variables are read
by the exporter itself. Part of moesaic-server.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
)
from pydantic_core import CoreSchema, ErrorDetails, core_schema
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

from moesaic.errors import InvalidArgument
from moesaic.expert_policy import OnMissing
from moesaic.families.model import DenseLayers


@dataclass(frozen=True, slots=True)
class Synonyms:
    """Other names for the values of a Literal, which validation replaces with the Literal's own."""

    values: Mapping[str, str]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        accepted = core_schema.literal_schema([*get_args(source), *self.values])
        return core_schema.no_info_after_validator_function(self._canonical, accepted)

    def _canonical(self, value: str) -> str:
        return self.values.get(value, value)


@dataclass(frozen=True, slots=True)
class Unset:
    """What a setting that is None stands for, in words."""

    words: str


def _undo_yaml_boolean(value: object) -> object:
    """YAML reads the plain words `on` and `off` as booleans."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


_YamlWord = BeforeValidator(_undo_yaml_boolean)
_LONG_NAMES = Synonyms({"float32": "fp32", "bfloat16": "bf16"})
_SHORT_NAMES = Synonyms({"fp32": "float32", "bf16": "bfloat16"})

Device = Literal["auto", "cpu", "cuda"]
DType = Annotated[Literal["auto", "float32", "bfloat16"], _SHORT_NAMES]
ExpertDType = Annotated[Literal["auto", "fp32", "bf16", "int8", "int4"], _LONG_NAMES]
WireDType = Annotated[Literal["auto", "float32", "bfloat16", "int8"], _SHORT_NAMES]
Decoder = Literal["auto", "lean", "hf"]
Availability = Annotated[Literal["auto", "off"], _YamlWord]
Switch = Annotated[Literal["on", "off"], _YamlWord]
GenerationConfig = Literal["auto", "none"]
CapacityLimit = Annotated[Literal["off", "model"], _YamlWord]


def _origin(value: str) -> str:
    """An origin as browsers send it, which is compared letter by letter."""
    if not _ORIGIN.fullmatch(value):
        raise ValueError(
            "must be an origin such as http://localhost:3000: no path, no wildcard, small letters"
        )
    return value


_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@*A-Z]+", re.ASCII)
Origin = Annotated[str, AfterValidator(_origin)]


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EngineSettings(_Group):
    """Bounds of one router."""

    max_batch_tokens: int = Field(
        512,
        ge=1,
        description="Tokens of one step: the next token of every running sequence first, then chunks of "
        "prompts.",
    )
    max_running_sequences: int = Field(64, ge=1, description="Sequences that are computed at the same time.")
    max_waiting_sequences: int = Field(
        256,
        ge=1,
        description="Sequences that wait to run; one more is refused with 429 / RESOURCE_EXHAUSTED.",
    )
    kv_block_tokens: int = Field(16, ge=1, description="Tokens of one block of the KV cache.")
    kv_cache_mib: Annotated[
        int | None, Unset("one sequence of full length, at least 256, at most a quarter of the free memory")
    ] = Field(
        None,
        ge=1,
        description="Memory for keys and values, in MiB; the number of blocks follows from the model.",
    )
    max_model_len: Annotated[int | None, Unset("the checkpoint's")] = Field(
        None, ge=2, description="The longest sequence in tokens; never more than the KV cache holds."
    )
    request_timeout_s: float = Field(600.0, gt=0, description="The deadline of a request that brings none.")
    call_timeout_s: float = Field(
        30.0,
        gt=0,
        description="The longest that a layer waits for one worker. Another replica is asked much sooner.",
    )
    on_missing: OnMissing = Field(
        "wait",
        description="Where no replica of an expert is left: with wait the sequence is held until one is back, with fail it "
        "ends at once; with substitute the next-ranked expert takes its place, with renormalise the others' weights grow, "
        "and the answer is labelled as degraded. Requests may say otherwise.",
    )
    missing_wait_s: float = Field(
        30.0,
        gt=0,
        description="The longest that a sequence is held because no replica of an expert is left; its own deadline may end "
        "that sooner.",
    )
    threads: Annotated[int | None, Unset("torch's choice; in a cluster the node's cores shared out")] = Field(
        None, ge=1, description="CPU threads of a router."
    )
    decoder: Decoder = Field(
        "auto",
        description="lean is Moesaic's own decoder, refused by name for a model that it does not support; hf "
        "runs the modules of transformers; auto is lean where it supports the model, else hf.",
    )
    prefix_cache: bool = Field(
        True, description="Keys and values of finished blocks are reused, within one epoch and one tenant."
    )
    max_stall: float = Field(
        1.8,
        gt=1.0,
        description="How many times as long as an undisturbed one a decode step may take because prompts are "
        "read in the same step.",
    )
    overlap: Switch = Field(
        "off",
        description="Two micro-batches in flight, so that the router computes one while the workers compute "
        "the other; meant for routers and workers on different machines.",
    )
    wire_dtype: WireDType = Field(
        "auto",
        description="Number type of rows on the wire; auto is the compute type, so nothing is lost; int8 "
        "carries a scale a row and loses some precision.",
    )
    combine: Literal["rows", "sum"] = Field(
        "rows",
        description="rows is bit-exact under any placement; with sum workers add up: fewer bytes, and the "
        "last bits depend on the placement.",
    )
    shared_memory: Availability = Field(
        "auto",
        description="Shared memory between router and worker, where both ends run on one host and agree: "
        "the first transport of every call.",
    )
    direct_stream: Availability = Field(
        "auto",
        description="gRPC that the engine's thread and the worker's compute thread speak themselves, over a "
        "second port of the worker, for up to 256 KiB of rows; larger calls, and all calls where that port "
        "cannot be reached, take the worker's main port.",
    )
    generation_config: GenerationConfig = Field(
        "auto",
        description="Where a request is silent: with auto the sampling of the model's generation_config.json "
        "(temperature, top_p, top_k, min_p, repetition_penalty, do_sample) is its default; with none the whole "
        "distribution is sampled at temperature 1.",
    )
    batch_invariant: bool = Field(
        False,
        description="The tokens of a sequence do not depend on what else is in the batch. Slower; routers "
        "and workers must agree.",
    )
    capacity: CapacityLimit = Field(
        "off",
        description="With off every token gets its experts. With model the families that were trained with a "
        "capacity (Switch, ST-MoE, NLLB-MoE) drop what full slots cannot take; which tokens those are "
        "depends on the other requests.",
    )


class WorkerSettings(_Group):
    """Bounds of one expert worker."""

    max_queued_calls: int = Field(
        64,
        ge=1,
        description="Calls that wait for the compute thread; one more is refused with RESOURCE_EXHAUSTED.",
    )
    max_call_rows: int = Field(16384, ge=1, description="Rows of hidden states that one call may carry.")
    threads: Annotated[int | None, Unset("torch's choice; in a cluster the node's cores shared out")] = Field(
        None, ge=1, description="CPU threads of an expert worker."
    )
    expert_dtype: ExpertDType = Field(
        "auto",
        description="Number type of the experts' weights; auto is the compute type, into which float8 and "
        "MXFP4 are decoded exactly; int8 and int4 lose some precision.",
    )
    shared_memory: Availability = Field(
        "auto", description="Whether the worker offers shared memory to routers on its host."
    )
    direct_stream: Availability = Field(
        "auto",
        description="Whether the worker opens a second port for gRPC that its compute thread speaks itself.",
    )
    spare_experts: int = Field(
        1,
        ge=0,
        description="On CUDA, room per layer for versions that are loaded later, so that one kernel computes them "
        "together with the others; without room they take a kernel of their own.",
    )
    batch_invariant: bool = Field(
        False, description="The result of a row does not depend on the rows computed with it. Slower."
    )
    keep_weights: Availability = Field(
        "auto",
        description="On CPUs of Linux the experts lie in shared memory that outlives the worker: a restarted one maps "
        "them again instead of reading them, and workers of one host that hold the same ones hold them once.",
    )
    keep_weights_in: str = Field(
        "/dev/shm", description="Where: a folder in memory, in which this user gets one of its own."
    )
    keep_weights_mib: Annotated[int | None, Unset("half of what that place can hold")] = Field(
        None, ge=1, description="The most that is kept there, in MiB; what is beyond it dies with its worker."
    )


class GatewaySettings(_Group):
    """Bounds of the HTTP gateway."""

    max_body_mib: int = Field(8, ge=1, description="The largest body of a request, in MiB.")
    request_timeout_s: float = Field(
        600.0, gt=0, description="The deadline of a generation that came by HTTP."
    )
    allowed_hosts: tuple[str, ...] = Field(
        (),
        description="Names by which clients may call the server, beside the local ones. On loopback no other "
        "name is answered, so that a page of another site cannot reach the server; elsewhere every name is, "
        "unless some are listed.",
    )
    allowed_origins: tuple[Origin, ...] = Field(
        (),
        description="Origins, such as http://localhost:3000, whose pages may use the server from a browser (CORS); "
        "without any, only the pages of the server itself may.",
    )


class ClusterSettings(_Group):
    """Which processes run, how many, and where."""

    workers: Annotated[int | None, Unset("one per node and GPU")] = Field(
        None, ge=1, le=64, description="Expert workers, 1 to 64."
    )
    routers: int = Field(
        1,
        ge=1,
        le=64,
        description="Routers behind the gateway, sharing the workers; each has a KV cache of its own.",
    )
    replicas: int = Field(1, ge=1, description="Copies of every expert, each on another worker.")
    address: Annotated[str | None, Unset("a local Ray")] = Field(
        None, description="The Ray cluster to join: HOST:PORT or auto."
    )
    start_timeout_s: float = Field(
        600.0, gt=0, description="The longest that loading and the first token may take."
    )
    drain_timeout_s: float = Field(
        10.0,
        ge=0,
        description="The longest that running requests may take to end after a stop was requested.",
    )
    state: Annotated[str | None, Unset("a temporary one, so that changes end with the cluster")] = Field(
        None,
        description="The folder in which the controller keeps bundles, epochs and their history; a cluster that is "
        "started with it again goes on in the last committed epoch.",
    )
    signers: tuple[str, ...] = Field(
        (),
        description="Public ed25519 keys, in base64 or as files in PEM, whose bundles alone are accepted; without any, "
        "bundles need no signature.",
    )


class RolloutSettings(_Group):
    """How experts change while the model serves, and what ends a canary."""

    drain_s: float = Field(
        60.0,
        gt=0,
        description="How long sequences may still run in an epoch that is no longer in use; those that run longer end "
        "with ABORTED, reason epoch_retired.",
    )
    load_timeout_s: float = Field(
        600.0, gt=0, description="The longest that loading and probing the experts of a change may take."
    )
    max_bundle_mib: int = Field(
        16384, ge=1, description="The largest weights of a bundle that is uploaded, in MiB."
    )
    min_canary_requests: int = Field(
        20,
        ge=1,
        description="Requests that must have ended on either side before errors and latency are compared.",
    )
    max_more_errors: float = Field(
        0.02,
        ge=0,
        le=1,
        description="A canary is rolled back when its error rate is higher by more than this.",
    )
    max_latency_ratio: float = Field(
        2.0,
        gt=1,
        description="A canary is rolled back when its p99 between tokens or p50 to the first token exceeds that of the "
        "current epoch so many times.",
    )
    min_shadow_cosine: float = Field(
        -1.0,
        ge=-1,
        le=1,
        description="A canary is rolled back when the answers of its experts to shadowed rows have a smaller mean "
        "cosine with those in use. Off by default, with -1, because a swap changes an expert on purpose: what was trained anew "
        "has cosines around 0, on either side.",
    )
    golden_prompts: Annotated[str | None, Unset("none")] = Field(
        None,
        description="A file with a prompt on each line, whose log probabilities are compared between a canary and the "
        "current epoch.",
    )
    max_golden_drift: float = Field(
        0.5,
        gt=0,
        description="A canary is rolled back when the log probabilities of the golden prompts' tokens differ by more "
        "than this on average, in nats.",
    )


class Settings(_Group):
    """All settings."""

    model: Annotated[str | None, Unset("the demo model")] = Field(
        None, description="A local folder of any family that is served, or hf://ORG/NAME."
    )
    served_model_name: Annotated[str | None, Unset("the folder's name")] = Field(
        None, description="The model's name in the API."
    )
    device: Device = Field("auto", description="The device that computes.")
    dtype: DType = Field(
        "auto",
        description="The number type that the model computes in; auto is bfloat16 on CUDA when the "
        "checkpoint is bfloat16, else float32.",
    )
    dense_layers: DenseLayers = Field(
        "auto",
        description="Where dense layers are computed; auto is experts where all layers are dense, else "
        "router.",
    )
    host: str = Field("127.0.0.1", description="The address that the servers listen on.")
    http_port: int = Field(
        8000, ge=0, le=65535, description="The port of the OpenAI API; 0 takes a free one."
    )
    grpc_port: int = Field(
        50051, ge=0, le=65535, description="The gRPC port of the first router; 0 takes a free one."
    )
    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR"] | None,
        Unset("WARNING where stderr is a terminal, else INFO"),
    ] = Field(
        None,
        description="The least severe level of the lines on stderr, which are JSON unless stderr is a terminal.",
    )
    otlp_endpoint: Annotated[str | None, Unset("no traces")] = Field(
        None,
        validation_alias=AliasChoices("otlp_endpoint", "OTEL_EXPORTER_OTLP_ENDPOINT"),
        description="Where traces are sent, as OTLP over HTTP. OTEL_EXPORTER_OTLP_ENDPOINT sets it, too.",
    )
    engine: EngineSettings = EngineSettings()
    worker: WorkerSettings = WorkerSettings()
    gateway: GatewaySettings = GatewaySettings()
    cluster: ClusterSettings = ClusterSettings()
    rollout: RolloutSettings = RolloutSettings()


_PREFIX, _DELIMITER = "MOESAIC_", "__"


class _Sources(Settings, BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix=_PREFIX, env_nested_delimiter=_DELIMITER, extra="forbid", frozen=True
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
        return init_settings, env_settings, YamlConfigSettingsSource(settings_cls)


def load_settings(config: Path | None = None, **flags: Any) -> Settings:
    """Reads all sources. A flag that is None was not given; groups are nested dicts.

    Raises InvalidArgument that names the key.
    """
    if config is not None:
        _read_file(config)

    class FromFile(_Sources):
        model_config = SettingsConfigDict(yaml_file=config)

    try:
        # A plain Settings can be sent to other processes; the class above exists in this call alone.
        return Settings.model_validate(FromFile(**_given(flags)).model_dump())
    except ValidationError as error:
        first = error.errors()[0]
        path = [part for part in first["loc"] if isinstance(part, str)]
        key = ".".join(path)
        raise InvalidArgument(f"{key}: {_problem(first, path)}", field=key) from error
    except SettingsError as error:
        raise InvalidArgument(
            f"environment: must hold JSON for a group: {error}", field="environment"
        ) from error


def find_written(key: str, config: Path | None) -> str | None:
    """Where the environment or the file sets a key, or the group that it is in, and to what; None if neither."""
    variables = {name.upper(): name for name in os.environ}
    for part in (key, key.rpartition(".")[0]):
        wanted = f"{_PREFIX}{part.replace('.', _DELIMITER)}".upper()
        if part and wanted in variables:
            return f"{variables[wanted]}={os.environ[variables[wanted]]}"
    value = {} if config is None or not config.is_file() else _read_file(config)
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    assert config is not None
    return f"{config.name}: {key}" if isinstance(value, (Mapping, list)) else f"{config.name}: {key} {value}"


def _read_file(config: Path) -> Any:
    """The content of a file of settings. Raises InvalidArgument unless it maps keys to values."""
    try:
        with config.open(encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except FileNotFoundError as error:
        raise InvalidArgument("config: no such file", field="config") from error
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InvalidArgument(f"config: cannot be read: {why}", field="config") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise InvalidArgument(f"config: is not YAML{where}: {problem}", field="config") from error
    if content is not None and not isinstance(content, Mapping):
        raise InvalidArgument("config: must hold keys and values", field="config")
    return content or {}


def _problem(error: ErrorDetails, path: Sequence[str]) -> str:
    """What is wrong with a value, and what it may be."""
    bounds = error.get("ctx", {})
    match error["type"]:
        case "greater_than_equal":
            return f"must be at least {bounds['ge']:g}"
        case "greater_than":
            return f"must be above {bounds['gt']:g}"
        case "less_than_equal":
            return f"must be at most {bounds['le']:g}"
        case "literal_error":
            return f"must be one of {bounds['expected'].replace(' or ', ', ')}".replace("'", "")
        case "int_type" | "int_parsing" | "int_from_float":
            return "must be a whole number"
        case "float_type" | "float_parsing":
            return "must be a number"
        case "bool_type" | "bool_parsing":
            return "must be true or false"
        case "extra_forbidden":
            return f"there is no such setting{_suggestion(path)}"
        case _:
            return error["msg"]


def _suggestion(path: Sequence[str]) -> str:
    group: type[BaseModel] = Settings
    for part in path[:-1]:
        annotation = group.model_fields[part].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        group = annotation
    similar = difflib.get_close_matches(path[-1], group.model_fields, n=1)
    return f"; did you mean {similar[0]}?" if similar else ""


def _given(flags: Mapping[str, Any]) -> dict[str, Any]:
    given = {
        key: _given(value) if isinstance(value, Mapping) else value
        for key, value in flags.items()
        if value is not None
    }
    return {key: value for key, value in given.items() if value != {}}
