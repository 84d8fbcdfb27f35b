from google.rpc import status_pb2 as _status_pb2
from moesaic.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Combine(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COMBINE_UNSPECIFIED: _ClassVar[Combine]
    COMBINE_ROWS: _ClassVar[Combine]
    COMBINE_SUM: _ClassVar[Combine]
COMBINE_UNSPECIFIED: Combine
COMBINE_ROWS: Combine
COMBINE_SUM: Combine

class LoadRequest(_message.Message):
    __slots__ = ("bundle", "experts", "control_address", "folder")
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    CONTROL_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    FOLDER_FIELD_NUMBER: _ClassVar[int]
    bundle: bytes
    experts: _containers.RepeatedCompositeFieldContainer[_common_pb2.ExpertVersion]
    control_address: str
    folder: str
    def __init__(self, bundle: _Optional[bytes] = ..., experts: _Optional[_Iterable[_Union[_common_pb2.ExpertVersion, _Mapping]]] = ..., control_address: _Optional[str] = ..., folder: _Optional[str] = ...) -> None: ...

class LoadResponse(_message.Message):
    __slots__ = ("expert", "loaded_bytes", "total_bytes")
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    LOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    expert: _common_pb2.ExpertVersion
    loaded_bytes: int
    total_bytes: int
    def __init__(self, expert: _Optional[_Union[_common_pb2.ExpertVersion, _Mapping]] = ..., loaded_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ...) -> None: ...

class UnloadRequest(_message.Message):
    __slots__ = ("experts",)
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    experts: _containers.RepeatedCompositeFieldContainer[_common_pb2.ExpertVersion]
    def __init__(self, experts: _Optional[_Iterable[_Union[_common_pb2.ExpertVersion, _Mapping]]] = ...) -> None: ...

class UnloadResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ProbeRequest(_message.Message):
    __slots__ = ("bundle", "experts", "control_address", "folder")
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    CONTROL_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    FOLDER_FIELD_NUMBER: _ClassVar[int]
    bundle: bytes
    experts: _containers.RepeatedCompositeFieldContainer[_common_pb2.ExpertVersion]
    control_address: str
    folder: str
    def __init__(self, bundle: _Optional[bytes] = ..., experts: _Optional[_Iterable[_Union[_common_pb2.ExpertVersion, _Mapping]]] = ..., control_address: _Optional[str] = ..., folder: _Optional[str] = ...) -> None: ...

class ProbeResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[ProbeResult]
    def __init__(self, results: _Optional[_Iterable[_Union[ProbeResult, _Mapping]]] = ...) -> None: ...

class ProbeResult(_message.Message):
    __slots__ = ("expert", "ok", "max_difference", "max_expected")
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    OK_FIELD_NUMBER: _ClassVar[int]
    MAX_DIFFERENCE_FIELD_NUMBER: _ClassVar[int]
    MAX_EXPECTED_FIELD_NUMBER: _ClassVar[int]
    expert: _common_pb2.ExpertVersion
    ok: bool
    max_difference: float
    max_expected: float
    def __init__(self, expert: _Optional[_Union[_common_pb2.ExpertVersion, _Mapping]] = ..., ok: _Optional[bool] = ..., max_difference: _Optional[float] = ..., max_expected: _Optional[float] = ...) -> None: ...

class ExpertRows(_message.Message):
    __slots__ = ("slot", "version", "rows", "weights")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    slot: int
    version: bytes
    rows: _containers.RepeatedScalarFieldContainer[int]
    weights: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, slot: _Optional[int] = ..., version: _Optional[bytes] = ..., rows: _Optional[_Iterable[int]] = ..., weights: _Optional[_Iterable[float]] = ...) -> None: ...

class ComputeRequest(_message.Message):
    __slots__ = ("call_id", "epoch", "layer", "hidden", "experts", "combine", "timeout_ms", "traceparent")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    COMBINE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    epoch: str
    layer: int
    hidden: _common_pb2.Tensor
    experts: _containers.RepeatedCompositeFieldContainer[ExpertRows]
    combine: Combine
    timeout_ms: int
    traceparent: str
    def __init__(self, call_id: _Optional[int] = ..., epoch: _Optional[str] = ..., layer: _Optional[int] = ..., hidden: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ..., experts: _Optional[_Iterable[_Union[ExpertRows, _Mapping]]] = ..., combine: _Optional[_Union[Combine, str]] = ..., timeout_ms: _Optional[int] = ..., traceparent: _Optional[str] = ...) -> None: ...

class ComputeTiming(_message.Message):
    __slots__ = ("decode_us", "queue_us", "compute_us", "encode_us")
    DECODE_US_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    ENCODE_US_FIELD_NUMBER: _ClassVar[int]
    decode_us: int
    queue_us: int
    compute_us: int
    encode_us: int
    def __init__(self, decode_us: _Optional[int] = ..., queue_us: _Optional[int] = ..., compute_us: _Optional[int] = ..., encode_us: _Optional[int] = ...) -> None: ...

class ComputeResponse(_message.Message):
    __slots__ = ("call_id", "error", "epoch", "versions", "output", "timing")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    error: _status_pb2.Status
    epoch: str
    versions: _containers.RepeatedScalarFieldContainer[bytes]
    output: _common_pb2.Tensor
    timing: ComputeTiming
    def __init__(self, call_id: _Optional[int] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., epoch: _Optional[str] = ..., versions: _Optional[_Iterable[bytes]] = ..., output: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ..., timing: _Optional[_Union[ComputeTiming, _Mapping]] = ...) -> None: ...

class OpenTransportsRequest(_message.Message):
    __slots__ = ("host_id", "shared_memory_version")
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_VERSION_FIELD_NUMBER: _ClassVar[int]
    host_id: str
    shared_memory_version: int
    def __init__(self, host_id: _Optional[str] = ..., shared_memory_version: _Optional[int] = ...) -> None: ...

class OpenTransportsResponse(_message.Message):
    __slots__ = ("socket_path", "incarnation", "direct_port")
    SOCKET_PATH_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    DIRECT_PORT_FIELD_NUMBER: _ClassVar[int]
    socket_path: str
    incarnation: str
    direct_port: int
    def __init__(self, socket_path: _Optional[str] = ..., incarnation: _Optional[str] = ..., direct_port: _Optional[int] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("worker", "incarnation", "model", "hidden_size", "experts", "dtypes", "weight_bytes", "device", "contents_revision", "available_bytes")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    DTYPES_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    CONTENTS_REVISION_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    worker: str
    incarnation: str
    model: str
    hidden_size: int
    experts: _containers.RepeatedCompositeFieldContainer[_common_pb2.ExpertVersion]
    dtypes: _containers.RepeatedScalarFieldContainer[_common_pb2.Dtype]
    weight_bytes: int
    device: str
    contents_revision: int
    available_bytes: int
    def __init__(self, worker: _Optional[str] = ..., incarnation: _Optional[str] = ..., model: _Optional[str] = ..., hidden_size: _Optional[int] = ..., experts: _Optional[_Iterable[_Union[_common_pb2.ExpertVersion, _Mapping]]] = ..., dtypes: _Optional[_Iterable[_Union[_common_pb2.Dtype, str]]] = ..., weight_bytes: _Optional[int] = ..., device: _Optional[str] = ..., contents_revision: _Optional[int] = ..., available_bytes: _Optional[int] = ...) -> None: ...

class GetWorkerStatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetWorkerStatsResponse(_message.Message):
    __slots__ = ("calls", "rows", "refused_calls", "passes", "busy_s", "uptime_s", "resident_bytes", "shared_memory_calls", "direct_calls")
    CALLS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_CALLS_FIELD_NUMBER: _ClassVar[int]
    PASSES_FIELD_NUMBER: _ClassVar[int]
    BUSY_S_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_CALLS_FIELD_NUMBER: _ClassVar[int]
    DIRECT_CALLS_FIELD_NUMBER: _ClassVar[int]
    calls: int
    rows: int
    refused_calls: int
    passes: int
    busy_s: float
    uptime_s: float
    resident_bytes: int
    shared_memory_calls: int
    direct_calls: int
    def __init__(self, calls: _Optional[int] = ..., rows: _Optional[int] = ..., refused_calls: _Optional[int] = ..., passes: _Optional[int] = ..., busy_s: _Optional[float] = ..., uptime_s: _Optional[float] = ..., resident_bytes: _Optional[int] = ..., shared_memory_calls: _Optional[int] = ..., direct_calls: _Optional[int] = ...) -> None: ...
