from moesaic.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ChangeKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CHANGE_KIND_UNSPECIFIED: _ClassVar[ChangeKind]
    CHANGE_KIND_SWAP: _ClassVar[ChangeKind]
    CHANGE_KIND_ADD: _ClassVar[ChangeKind]
    CHANGE_KIND_REMOVE: _ClassVar[ChangeKind]
    CHANGE_KIND_PROMOTE: _ClassVar[ChangeKind]
    CHANGE_KIND_ROLLBACK: _ClassVar[ChangeKind]

class ChangeStage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CHANGE_STAGE_UNSPECIFIED: _ClassVar[ChangeStage]
    CHANGE_STAGE_VERIFY: _ClassVar[ChangeStage]
    CHANGE_STAGE_LOAD: _ClassVar[ChangeStage]
    CHANGE_STAGE_PROBE: _ClassVar[ChangeStage]
    CHANGE_STAGE_PUBLISH: _ClassVar[ChangeStage]
    CHANGE_STAGE_COMMIT: _ClassVar[ChangeStage]
    CHANGE_STAGE_SPREAD: _ClassVar[ChangeStage]
    CHANGE_STAGE_DRAIN: _ClassVar[ChangeStage]
    CHANGE_STAGE_UNLOAD: _ClassVar[ChangeStage]
    CHANGE_STAGE_DONE: _ClassVar[ChangeStage]

class ProcessState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PROCESS_STATE_UNSPECIFIED: _ClassVar[ProcessState]
    PROCESS_STATE_PENDING: _ClassVar[ProcessState]
    PROCESS_STATE_LOADING: _ClassVar[ProcessState]
    PROCESS_STATE_READY: _ClassVar[ProcessState]
    PROCESS_STATE_DRAINING: _ClassVar[ProcessState]
    PROCESS_STATE_STOPPED: _ClassVar[ProcessState]
    PROCESS_STATE_FAILED: _ClassVar[ProcessState]

class ProcessRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PROCESS_ROLE_UNSPECIFIED: _ClassVar[ProcessRole]
    PROCESS_ROLE_CONTROLLER: _ClassVar[ProcessRole]
    PROCESS_ROLE_ROUTER: _ClassVar[ProcessRole]
    PROCESS_ROLE_EXPERT_WORKER: _ClassVar[ProcessRole]
    PROCESS_ROLE_GATEWAY: _ClassVar[ProcessRole]
CHANGE_KIND_UNSPECIFIED: ChangeKind
CHANGE_KIND_SWAP: ChangeKind
CHANGE_KIND_ADD: ChangeKind
CHANGE_KIND_REMOVE: ChangeKind
CHANGE_KIND_PROMOTE: ChangeKind
CHANGE_KIND_ROLLBACK: ChangeKind
CHANGE_STAGE_UNSPECIFIED: ChangeStage
CHANGE_STAGE_VERIFY: ChangeStage
CHANGE_STAGE_LOAD: ChangeStage
CHANGE_STAGE_PROBE: ChangeStage
CHANGE_STAGE_PUBLISH: ChangeStage
CHANGE_STAGE_COMMIT: ChangeStage
CHANGE_STAGE_SPREAD: ChangeStage
CHANGE_STAGE_DRAIN: ChangeStage
CHANGE_STAGE_UNLOAD: ChangeStage
CHANGE_STAGE_DONE: ChangeStage
PROCESS_STATE_UNSPECIFIED: ProcessState
PROCESS_STATE_PENDING: ProcessState
PROCESS_STATE_LOADING: ProcessState
PROCESS_STATE_READY: ProcessState
PROCESS_STATE_DRAINING: ProcessState
PROCESS_STATE_STOPPED: ProcessState
PROCESS_STATE_FAILED: ProcessState
PROCESS_ROLE_UNSPECIFIED: ProcessRole
PROCESS_ROLE_CONTROLLER: ProcessRole
PROCESS_ROLE_ROUTER: ProcessRole
PROCESS_ROLE_EXPERT_WORKER: ProcessRole
PROCESS_ROLE_GATEWAY: ProcessRole

class UploadBundleRequest(_message.Message):
    __slots__ = ("manifest", "weights", "signature")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    manifest: bytes
    weights: bytes
    signature: bytes
    def __init__(self, manifest: _Optional[bytes] = ..., weights: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class UploadBundleResponse(_message.Message):
    __slots__ = ("name", "digest", "known")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: bytes
    known: bool
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[bytes] = ..., known: _Optional[bool] = ...) -> None: ...

class FetchBundleRequest(_message.Message):
    __slots__ = ("digest", "offset")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    offset: int
    def __init__(self, digest: _Optional[bytes] = ..., offset: _Optional[int] = ...) -> None: ...

class FetchBundleResponse(_message.Message):
    __slots__ = ("manifest", "weights")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    manifest: bytes
    weights: bytes
    def __init__(self, manifest: _Optional[bytes] = ..., weights: _Optional[bytes] = ...) -> None: ...

class ListBundlesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListBundlesResponse(_message.Message):
    __slots__ = ("bundles",)
    BUNDLES_FIELD_NUMBER: _ClassVar[int]
    bundles: _containers.RepeatedCompositeFieldContainer[StoredBundle]
    def __init__(self, bundles: _Optional[_Iterable[_Union[StoredBundle, _Mapping]]] = ...) -> None: ...

class StoredBundle(_message.Message):
    __slots__ = ("name", "digest", "tags", "num_bytes", "manifest", "experts", "canary_experts", "needed_by")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    CANARY_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    NEEDED_BY_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: bytes
    tags: _containers.RepeatedScalarFieldContainer[str]
    num_bytes: int
    manifest: bytes
    experts: _containers.RepeatedCompositeFieldContainer[_common_pb2.ExpertAddress]
    canary_experts: _containers.RepeatedCompositeFieldContainer[_common_pb2.ExpertAddress]
    needed_by: str
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[bytes] = ..., tags: _Optional[_Iterable[str]] = ..., num_bytes: _Optional[int] = ..., manifest: _Optional[bytes] = ..., experts: _Optional[_Iterable[_Union[_common_pb2.ExpertAddress, _Mapping]]] = ..., canary_experts: _Optional[_Iterable[_Union[_common_pb2.ExpertAddress, _Mapping]]] = ..., needed_by: _Optional[str] = ...) -> None: ...

class ForgetBundleRequest(_message.Message):
    __slots__ = ("digest", "operator")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OPERATOR_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    operator: str
    def __init__(self, digest: _Optional[bytes] = ..., operator: _Optional[str] = ...) -> None: ...

class ForgetBundleResponse(_message.Message):
    __slots__ = ("name", "num_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    num_bytes: int
    def __init__(self, name: _Optional[str] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class ChangeRequest(_message.Message):
    __slots__ = ("kind", "bundle", "name", "expected_epoch", "canary", "share", "shadow_share", "gate_rows", "epoch", "operator")
    KIND_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_EPOCH_FIELD_NUMBER: _ClassVar[int]
    CANARY_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    SHADOW_SHARE_FIELD_NUMBER: _ClassVar[int]
    GATE_ROWS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    OPERATOR_FIELD_NUMBER: _ClassVar[int]
    kind: ChangeKind
    bundle: bytes
    name: str
    expected_epoch: str
    canary: bool
    share: float
    shadow_share: float
    gate_rows: _containers.RepeatedCompositeFieldContainer[_common_pb2.GateRow]
    epoch: str
    operator: str
    def __init__(self, kind: _Optional[_Union[ChangeKind, str]] = ..., bundle: _Optional[bytes] = ..., name: _Optional[str] = ..., expected_epoch: _Optional[str] = ..., canary: _Optional[bool] = ..., share: _Optional[float] = ..., shadow_share: _Optional[float] = ..., gate_rows: _Optional[_Iterable[_Union[_common_pb2.GateRow, _Mapping]]] = ..., epoch: _Optional[str] = ..., operator: _Optional[str] = ...) -> None: ...

class ChangeResponse(_message.Message):
    __slots__ = ("stage", "detail", "done", "total", "epoch", "previous_epoch")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_EPOCH_FIELD_NUMBER: _ClassVar[int]
    stage: ChangeStage
    detail: str
    done: int
    total: int
    epoch: str
    previous_epoch: str
    def __init__(self, stage: _Optional[_Union[ChangeStage, str]] = ..., detail: _Optional[str] = ..., done: _Optional[int] = ..., total: _Optional[int] = ..., epoch: _Optional[str] = ..., previous_epoch: _Optional[str] = ...) -> None: ...

class GetHistoryRequest(_message.Message):
    __slots__ = ("limit",)
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    limit: int
    def __init__(self, limit: _Optional[int] = ...) -> None: ...

class HistoryEntry(_message.Message):
    __slots__ = ("time", "what", "epoch", "previous_epoch", "bundle", "operator", "detail")
    TIME_FIELD_NUMBER: _ClassVar[int]
    WHAT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_EPOCH_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    OPERATOR_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    time: float
    what: str
    epoch: str
    previous_epoch: str
    bundle: str
    operator: str
    detail: str
    def __init__(self, time: _Optional[float] = ..., what: _Optional[str] = ..., epoch: _Optional[str] = ..., previous_epoch: _Optional[str] = ..., bundle: _Optional[str] = ..., operator: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class GetHistoryResponse(_message.Message):
    __slots__ = ("epoch", "canary", "entries", "canary_figures")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CANARY_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    CANARY_FIGURES_FIELD_NUMBER: _ClassVar[int]
    epoch: str
    canary: str
    entries: _containers.RepeatedCompositeFieldContainer[HistoryEntry]
    canary_figures: str
    def __init__(self, epoch: _Optional[str] = ..., canary: _Optional[str] = ..., entries: _Optional[_Iterable[_Union[HistoryEntry, _Mapping]]] = ..., canary_figures: _Optional[str] = ...) -> None: ...

class EpochStats(_message.Message):
    __slots__ = ("epoch", "open_sequences", "finished", "failed", "not_finite", "token_p50_s", "token_p99_s", "first_token_p50_s", "shadow_rows", "shadow_min_cosine", "shadow_mean_cosine", "shadow_max_difference")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    OPEN_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    NOT_FINITE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_P50_S_FIELD_NUMBER: _ClassVar[int]
    TOKEN_P99_S_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_P50_S_FIELD_NUMBER: _ClassVar[int]
    SHADOW_ROWS_FIELD_NUMBER: _ClassVar[int]
    SHADOW_MIN_COSINE_FIELD_NUMBER: _ClassVar[int]
    SHADOW_MEAN_COSINE_FIELD_NUMBER: _ClassVar[int]
    SHADOW_MAX_DIFFERENCE_FIELD_NUMBER: _ClassVar[int]
    epoch: str
    open_sequences: int
    finished: int
    failed: int
    not_finite: int
    token_p50_s: float
    token_p99_s: float
    first_token_p50_s: float
    shadow_rows: int
    shadow_min_cosine: float
    shadow_mean_cosine: float
    shadow_max_difference: float
    def __init__(self, epoch: _Optional[str] = ..., open_sequences: _Optional[int] = ..., finished: _Optional[int] = ..., failed: _Optional[int] = ..., not_finite: _Optional[int] = ..., token_p50_s: _Optional[float] = ..., token_p99_s: _Optional[float] = ..., first_token_p50_s: _Optional[float] = ..., shadow_rows: _Optional[int] = ..., shadow_min_cosine: _Optional[float] = ..., shadow_mean_cosine: _Optional[float] = ..., shadow_max_difference: _Optional[float] = ...) -> None: ...

class ReportEpochsRequest(_message.Message):
    __slots__ = ("router", "incarnation", "address", "epoch", "canary", "routing_table_revision", "epochs")
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CANARY_FIELD_NUMBER: _ClassVar[int]
    ROUTING_TABLE_REVISION_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    router: str
    incarnation: str
    address: str
    epoch: str
    canary: str
    routing_table_revision: int
    epochs: _containers.RepeatedCompositeFieldContainer[EpochStats]
    def __init__(self, router: _Optional[str] = ..., incarnation: _Optional[str] = ..., address: _Optional[str] = ..., epoch: _Optional[str] = ..., canary: _Optional[str] = ..., routing_table_revision: _Optional[int] = ..., epochs: _Optional[_Iterable[_Union[EpochStats, _Mapping]]] = ...) -> None: ...

class ReportEpochsResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Epoch(_message.Message):
    __slots__ = ("id", "model", "experts", "gate_rows", "bundles", "base")
    ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    GATE_ROWS_FIELD_NUMBER: _ClassVar[int]
    BUNDLES_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    id: str
    model: str
    experts: _containers.RepeatedCompositeFieldContainer[_common_pb2.ExpertVersion]
    gate_rows: _containers.RepeatedCompositeFieldContainer[_common_pb2.GateRow]
    bundles: _containers.RepeatedCompositeFieldContainer[EpochBundle]
    base: bytes
    def __init__(self, id: _Optional[str] = ..., model: _Optional[str] = ..., experts: _Optional[_Iterable[_Union[_common_pb2.ExpertVersion, _Mapping]]] = ..., gate_rows: _Optional[_Iterable[_Union[_common_pb2.GateRow, _Mapping]]] = ..., bundles: _Optional[_Iterable[_Union[EpochBundle, _Mapping]]] = ..., base: _Optional[bytes] = ...) -> None: ...

class EpochBundle(_message.Message):
    __slots__ = ("name", "digest", "tags", "experts")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: bytes
    tags: _containers.RepeatedScalarFieldContainer[str]
    experts: _containers.RepeatedCompositeFieldContainer[_common_pb2.ExpertAddress]
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[bytes] = ..., tags: _Optional[_Iterable[str]] = ..., experts: _Optional[_Iterable[_Union[_common_pb2.ExpertAddress, _Mapping]]] = ...) -> None: ...

class Replica(_message.Message):
    __slots__ = ("worker", "address", "incarnation", "experts")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    worker: str
    address: str
    incarnation: str
    experts: _containers.RepeatedCompositeFieldContainer[_common_pb2.ExpertVersion]
    def __init__(self, worker: _Optional[str] = ..., address: _Optional[str] = ..., incarnation: _Optional[str] = ..., experts: _Optional[_Iterable[_Union[_common_pb2.ExpertVersion, _Mapping]]] = ...) -> None: ...

class RoutingTable(_message.Message):
    __slots__ = ("revision", "replicas")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    revision: int
    replicas: _containers.RepeatedCompositeFieldContainer[Replica]
    def __init__(self, revision: _Optional[int] = ..., replicas: _Optional[_Iterable[_Union[Replica, _Mapping]]] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchResponse(_message.Message):
    __slots__ = ("epoch", "routing_table", "canary", "drain_s")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROUTING_TABLE_FIELD_NUMBER: _ClassVar[int]
    CANARY_FIELD_NUMBER: _ClassVar[int]
    DRAIN_S_FIELD_NUMBER: _ClassVar[int]
    epoch: Epoch
    routing_table: RoutingTable
    canary: Canary
    drain_s: float
    def __init__(self, epoch: _Optional[_Union[Epoch, _Mapping]] = ..., routing_table: _Optional[_Union[RoutingTable, _Mapping]] = ..., canary: _Optional[_Union[Canary, _Mapping]] = ..., drain_s: _Optional[float] = ...) -> None: ...

class Canary(_message.Message):
    __slots__ = ("epoch", "share", "shadow_share")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    SHADOW_SHARE_FIELD_NUMBER: _ClassVar[int]
    epoch: Epoch
    share: float
    shadow_share: float
    def __init__(self, epoch: _Optional[_Union[Epoch, _Mapping]] = ..., share: _Optional[float] = ..., shadow_share: _Optional[float] = ...) -> None: ...

class Process(_message.Message):
    __slots__ = ("name", "role", "state", "address", "node", "pid", "restarts", "experts", "loaded_bytes", "total_bytes", "device", "detail")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    LOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    name: str
    role: ProcessRole
    state: ProcessState
    address: str
    node: str
    pid: int
    restarts: int
    experts: _containers.RepeatedCompositeFieldContainer[_common_pb2.ExpertAddress]
    loaded_bytes: int
    total_bytes: int
    device: str
    detail: str
    def __init__(self, name: _Optional[str] = ..., role: _Optional[_Union[ProcessRole, str]] = ..., state: _Optional[_Union[ProcessState, str]] = ..., address: _Optional[str] = ..., node: _Optional[str] = ..., pid: _Optional[int] = ..., restarts: _Optional[int] = ..., experts: _Optional[_Iterable[_Union[_common_pb2.ExpertAddress, _Mapping]]] = ..., loaded_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., device: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class GetTopologyRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetTopologyResponse(_message.Message):
    __slots__ = ("model", "epoch", "revision", "processes")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    PROCESSES_FIELD_NUMBER: _ClassVar[int]
    model: str
    epoch: str
    revision: int
    processes: _containers.RepeatedCompositeFieldContainer[Process]
    def __init__(self, model: _Optional[str] = ..., epoch: _Optional[str] = ..., revision: _Optional[int] = ..., processes: _Optional[_Iterable[_Union[Process, _Mapping]]] = ...) -> None: ...
