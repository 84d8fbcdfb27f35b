"""One settings model for every process: flags > environment > YAML > defaults. An unknown key is an error.

The environment is read here and nowhere else: `MOESAIC_ENGINE__MAX_BATCH_TOKENS=1024` sets `engine.max_batch_tokens`,
and the standard OTEL_* variables are the exporter's own. Part of the `serve` extra.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from moesaic.errors import InvalidArgument
from moesaic.families.model import DenseLayers

Device = Literal["auto", "cpu", "cuda"]
# auto: bfloat16 on CUDA when the checkpoint is bfloat16, else float32.
DType = Literal["auto", "float32", "bfloat16"]
# How an expert's weights are held. auto: the compute type; int8 and int4 lose some precision (docs/performance.md).
ExpertDType = Literal["auto", "fp32", "bf16", "int8", "int4"]
# Rows on the wire. auto: the compute type, so nothing is lost; int8 carries a scale per row and loses some precision.
WireDType = Literal["auto", "float32", "bfloat16", "int8"]
# lean: our own decoder, for the models that it supports. hf: the modules of transformers. auto: lean where possible.
Decoder = Literal["auto", "lean", "hf"]


def _yaml_word(value: Any) -> Any:
    """YAML reads an unquoted on or off as a boolean."""
    return ("on" if value else "off") if isinstance(value, bool) else value


Switch = Annotated[Literal["auto", "off"], BeforeValidator(_yaml_word)]
OnOff = Annotated[Literal["on", "off"], BeforeValidator(_yaml_word)]
# off: every token gets its experts. model: those families that have a capacity drop what full slots cannot take; which
# tokens those are depends on what else is in the batch.
CapacityLimit = Literal["off", "model"]


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EngineSettings(_Group):
    """Bounds of one router."""

    # Tokens that one step runs: the running sequences' next tokens first, then chunks of prompts.
    max_batch_tokens: int = Field(512, ge=1)
    max_running_sequences: int = Field(64, ge=1)
    # Sequences that wait for a place; one more is refused with RESOURCE_EXHAUSTED.
    max_waiting_sequences: int = Field(256, ge=1)
    kv_block_tokens: int = Field(16, ge=1)
    # Memory for keys and values; the number of blocks follows from the model's shape.
    # Absent: one sequence of full length, within reason.
    kv_cache_mib: int | None = Field(None, ge=1)
    # Absent: the checkpoint's own limit.
    max_model_len: int | None = Field(None, ge=2)
    # A request without a deadline gets this one.
    request_timeout_s: float = Field(600.0, gt=0)
    # The longest a layer waits for one answer of a worker before it tries the next replica.
    call_timeout_s: float = Field(30.0, gt=0)
    threads: int | None = Field(None, ge=1)
    decoder: Decoder = "auto"
    prefix_cache: bool = True
    # How much longer than an undisturbed one a decode step may take because prompts are read beside it.
    max_stall: float = Field(1.8, gt=1.0)
    # Two micro-batches in flight, so that the router computes one while the workers compute the other.
    overlap: OnOff = "off"
    wire_dtype: WireDType = "auto"
    # rows: bit-exact under any placement; sum: workers add up, fewer bytes, the last bits depend on placement.
    combine: Literal["rows", "sum"] = "rows"
    # Shared memory with a worker on the same host, where both ends agree: the first transport of every call.
    shared_memory: Switch = "auto"
    # gRPC that the engine's thread and the worker's compute thread speak themselves: the second, up to 256 KiB of rows.
    direct_stream: Switch = "auto"
    # A sequence's tokens do not depend on its batch mates. Slower; router and workers must agree.
    batch_invariant: bool = False
    # Whether experts have the capacity that their family was trained with (Switch, ST-MoE, NLLB-MoE).
    capacity: CapacityLimit = "off"


class WorkerSettings(_Group):
    """Bounds of one expert worker."""

    # Calls that wait for the compute thread; one more is refused with RESOURCE_EXHAUSTED.
    max_queued_calls: int = Field(64, ge=1)
    # Rows of `hidden` that one call may carry.
    max_call_rows: int = Field(16384, ge=1)
    threads: int | None = Field(None, ge=1)
    expert_dtype: ExpertDType = "auto"
    # Whether the worker offers shared memory to routers on its host.
    shared_memory: Switch = "auto"
    # Whether the worker opens a second port for gRPC that its compute thread speaks itself.
    direct_stream: Switch = "auto"
    batch_invariant: bool = False


class GatewaySettings(_Group):
    """Bounds of the HTTP gateway."""

    max_body_mib: int = Field(8, ge=1)
    request_timeout_s: float = Field(600.0, gt=0)
    # Names that clients may call this server by, beside the local ones. On loopback no other is answered, so that a
    # page of another site cannot reach it; elsewhere every name is, unless some are listed.
    allowed_hosts: tuple[str, ...] = ()


class ClusterSettings(_Group):
    """Who runs where."""

    # Absent: one a node and GPU.
    workers: int | None = Field(None, ge=1, le=64)
    # Routers behind the gateway, sharing the workers.
    routers: int = Field(1, ge=1, le=64)
    # Copies of every expert.
    replicas: int = Field(1, ge=1)
    # Ray address to join. Absent: a local Ray on loopback.
    address: str | None = None
    # The longest that loading and the first token may take.
    start_timeout_s: float = Field(600.0, gt=0)
    # The longest that running requests may take to end after a stop was asked for.
    drain_timeout_s: float = Field(10.0, ge=0)


class Settings(_Group):
    """Everything that can be set."""

    # A folder of a model, or hf://ORG/NAME. Absent: the demo model inside the package.
    model: str | None = None
    # The name in the API. Absent: the folder's name.
    served_model_name: str | None = None
    device: Device = "auto"
    dtype: DType = "auto"
    # Who computes the layers that have no gate. auto: workers where the model has no other experts, else the router.
    dense_layers: DenseLayers = "auto"
    host: str = "127.0.0.1"
    http_port: int = Field(8000, ge=0, le=65535)
    grpc_port: int = Field(50051, ge=0, le=65535)
    # Absent: WARNING where a person watches (stderr is a terminal), else INFO.
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] | None = None
    otlp_endpoint: str | None = Field(
        None, validation_alias=AliasChoices("otlp_endpoint", "OTEL_EXPORTER_OTLP_ENDPOINT")
    )
    engine: EngineSettings = EngineSettings()
    worker: WorkerSettings = WorkerSettings()
    gateway: GatewaySettings = GatewaySettings()
    cluster: ClusterSettings = ClusterSettings()


class _Sources(Settings, BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="MOESAIC_", env_nested_delimiter="__", extra="forbid", frozen=True
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
    """Reads all sources. `flags` that are None were not given; groups are nested dicts.

    Raises InvalidArgument that names the key.
    """
    if config is not None and not config.is_file():
        raise InvalidArgument("config: no such file", field="config")

    class FromFile(_Sources):
        model_config = SettingsConfigDict(yaml_file=config)

    try:
        # A plain Settings travels between processes; the class above lives in this call alone.
        return Settings.model_validate(FromFile(**_given(flags)).model_dump())
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InvalidArgument(f"{key}: {first['msg']}", field=key) from error


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    given = {
        key: _given(value) if isinstance(value, dict) else value
        for key, value in flags.items()
        if value is not None
    }
    return {key: value for key, value in given.items() if value != {}}
