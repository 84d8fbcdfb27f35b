from moesaic.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

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

class Epoch(_message.Message):
    __slots__ = ("id", "model", "experts")
    ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    id: str
    model: str
    experts: _containers.RepeatedCompositeFieldContainer[_common_pb2.ExpertVersion]
    def __init__(self, id: _Optional[str] = ..., model: _Optional[str] = ..., experts: _Optional[_Iterable[_Union[_common_pb2.ExpertVersion, _Mapping]]] = ...) -> None: ...

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
    __slots__ = ("epoch", "routing_table")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROUTING_TABLE_FIELD_NUMBER: _ClassVar[int]
    epoch: Epoch
    routing_table: RoutingTable
    def __init__(self, epoch: _Optional[_Union[Epoch, _Mapping]] = ..., routing_table: _Optional[_Union[RoutingTable, _Mapping]] = ...) -> None: ...

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
