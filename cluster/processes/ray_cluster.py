"""Starts, inspects and ends processes through Ray. Only this file imports ray; no token passes through it.

`RayCluster` is the connection of this process to Ray, and `HostActor` is the actor that Ray runs, one in each
process. ray is imported inside functions, because at import it reads the variables that keep a local Ray on
loopback.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import importlib
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import compress
from pathlib import Path
from typing import Any, NoReturn, Self, TypeVar

import psutil

from cluster.control.placement import Node
from cluster.control.process_report import CANNOT_START, PROCESS_DIED, ProcessReport
from cluster.processes.host import ProcessHost
from cluster.processes.node_facts import PATIENCE, NodeFacts, check_versions, explain_head_loss, own_facts
from cluster.processes.process_plan import PlannedProcess
from cluster.processes.ray_errors import RayTimeoutError, explain_silence, join_error, last_line, start_error
from cluster.processes.ray_head import HeadWatch
from cluster.processes.search_path import own_search_path
from cluster.processes.server_folder import ServerFolder, places
from cluster.processes.servers import ProcessContext, make_server
from cluster.processes.specs import ProcessSpec, set_threads
from moesaic import telemetry
from moesaic.addresses import split_address
from moesaic.errors import FailedPrecondition, InvalidArgument, Unavailable
from moesaic.settings import Settings
from moesaic.stop_signals import take_signals_back

log = logging.getLogger(__name__)

_R = TypeVar("_R")

NAMESPACE = "moesaic"
# Where a local Ray, and nobody else, has its node.
LOOPBACK = "127.0.0.1"
# The object store is not used; this is the smallest one that Ray accepts.
OBJECT_STORE_BYTES = 75 << 20
CONNECT_TIMEOUT_S = 5.0
# How long an answer may take beyond the time for which the process may hold the question.
ANSWER_TIMEOUT_S = 5.0
EXPLAIN_TIMEOUT_S = 2.0
QUESTION_THREADS = 4
HEAD_AWAY = "its process does not answer, and neither does Ray: without its head nothing is started again"
# How long the nodes may take to start a process that says which versions they have.
FACTS_TIMEOUT_S = 15.0
# How old Ray's account of what is free may be.
SETTLE_S = 1.0
# How often a local Ray is started that its own limit of 30 s has ended, as on a busy machine.
START_ATTEMPTS = 4
END_TIMEOUT_S = 10.0
KILL_PERIOD_S = 0.05
LOSS_PERIOD_S = 1.0
# How long a head may take until it answers.
HEAD_TIMEOUT_S = 10.0
HEAD_PERIOD_S = 0.05
# What Ray calls its head.
_HEAD = "gcs_server"

# By default Ray would try to connect for a quarter of an hour.
_JOIN_ENVIRONMENT = {"RAY_NUM_REDIS_GET_RETRIES": "1", "RAY_py_gcs_connect_timeout_s": "10"}
# The log lines of our processes are JSON: Ray must not colour, prefix or deduplicate them.
_LOG_ENVIRONMENT = {"RAY_DISABLE_WORKER_LOG_PREFIX": "1", "RAY_COLOR_PREFIX": "0", "RAY_DEDUP_LOGS": "0"}
# Ray accepts loopback as its own address only if it believes that no cluster is possible on this system.
_LOOPBACK_ENVIRONMENT = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
_STORAGE_PATH = "RAY_gcs_storage_path"
_LOCAL_ENVIRONMENT = {
    # By default Ray's workers yield to everything else on the machine, but here they are the service.
    "RAY_worker_niceness": "0",
    # Nothing leaves the machine.
    "RAY_USAGE_STATS_ENABLED": "0",
    # By default everything would end a minute after the head. A week is as good as for ever.
    PATIENCE: str(7 * 24 * 3600),
    # Its state outlives the head, so that another one can go on in its place.
    "RAY_gcs_storage": "rocksdb",
}


@dataclass(frozen=True, slots=True)
class Logging:
    """The settings of logs and traces that all processes share."""

    level: str
    otlp_endpoint: str | None
    # Whether the lines end up on a terminal, rather than in a file as JSON.
    for_people: bool


class HostActor:
    """The actor of one process. `__init__` starts the server, because Ray calls it again after a death."""

    def __init__(self, spec: ProcessSpec, logs: Logging) -> None:
        os.dup2(2, 1)  # nothing is printed to stdout on purpose: what a library prints goes to the log
        set_threads(spec, os.environ)
        telemetry.configure(
            spec.name, otlp_endpoint=logs.otlp_endpoint, log_level=logs.level, for_people=logs.for_people
        )
        context = ProcessContext(node=_own_address(), restarts=_own_restarts(), peers=RayPeers())
        self._host = ProcessHost(
            spec.name, partial(make_server, spec, context), node=context.node, restarts=context.restarts
        )
        self._running = asyncio.create_task(self._host.run())

    async def report(self, seen: int, hold_s: float) -> ProcessReport:
        return await self._host.report(seen, hold_s)

    async def stop(self, drain_s: float) -> None:
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)
        await self._host.stop(drain_s)
        telemetry.flush()


class _LocalHead:
    """The head of the Ray that this process has started. Ray's own tests start heads again in this way; nothing
    public does."""

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        # The head dies with the thread that starts it.
        self._thread = thread

    def is_alive(self) -> bool:
        return any(kind == _HEAD for kind, _ in _own_node().live_processes())

    async def start(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, _start_head)


def _titled(name: str) -> type[HostActor]:
    """The actor's class under the name by which Ray shows the process in `ps`."""
    return type(f"moesaic-{name}", (HostActor,), {})


class RayPeers:
    """Reaches the processes through Ray by name. A handle is looked up again after its actor has died."""

    def __init__(self) -> None:
        self._handles: dict[str, Any] = {}
        # Why Ray gave up the processes that failed before their server was made. It knows them by name no more.
        self._given_up: dict[str, str] = {}
        # The processes that were READY and have not died since.
        self._ready: set[str] = set()
        # Without its head Ray keeps questions waiting: they may not take the threads of anything else.
        self._threads = ThreadPoolExecutor(QUESTION_THREADS, thread_name_prefix="ask-ray")

    async def report(self, name: str, seen: int, hold_s: float) -> ProcessReport:
        handle = await self.handle(name)
        report: ProcessReport = await self._call(
            name, handle.report.remote(seen, hold_s), hold_s + ANSWER_TIMEOUT_S
        )
        if report.ready:
            self._ready.add(name)
        return report

    async def address(self, name: str) -> str:
        report = await self.report(name, seen=0, hold_s=0.0)
        if not report.address:
            raise Unavailable(f"{name} does not listen yet")
        return report.address

    async def stop(self, name: str, drain_s: float) -> None:
        """Drains the process, which then stays until it is killed. Raises Unavailable."""
        handle = await self.handle(name)
        await self._call(name, handle.stop.remote(drain_s), drain_s + ANSWER_TIMEOUT_S)

    async def handle(self, name: str) -> Any:
        """Ray's handle of a process. Raises Unavailable when Ray knows no process of that name."""
        import ray

        if name not in self._handles:
            try:
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    self._handles[name] = await self._ask(ray.get_actor, name, NAMESPACE)
            except ValueError as error:
                if name in self._given_up:
                    raise Unavailable(self._given_up[name], reason=CANNOT_START) from error
                raise Unavailable(f"{name} is not there", reason=PROCESS_DIED) from error
            except TimeoutError as error:
                raise Unavailable(f"Ray does not say where {name} is") from error
        return self._handles[name]

    def remember(self, name: str, handle: Any) -> None:
        """Keeps a handle, so that `handle` need not look it up."""
        self._handles[name] = handle
        self._given_up.pop(name, None)

    async def _call(self, name: str, reference: Any, timeout_s: float) -> Any:
        from ray.exceptions import ActorDiedError, RayError

        try:
            async with asyncio.timeout(timeout_s):
                return await reference
        except ActorDiedError as error:
            self._ready.discard(name)
            handle = self._handles.pop(name, None)
            if error.actor_init_failed:
                self._given_up[name] = await self._in_time(_why_given_up, handle, error)
                raise Unavailable(self._given_up[name], reason=CANNOT_START) from error
            raise Unavailable(f"its process died: {last_line(error)}", reason=PROCESS_DIED) from error
        except RayError as error:
            self._ready.discard(name)
            raise Unavailable("its process is being restarted") from error
        except TimeoutError as error:
            why = await self._in_time(_why_silent, self._handles.get(name), name in self._ready)
            raise Unavailable(why) from error

    async def _in_time(self, explain: Callable[..., str], *arguments: Any) -> str:
        """What `explain` finds out from Ray, which itself may be what does not answer."""
        try:
            async with asyncio.timeout(EXPLAIN_TIMEOUT_S):
                return await self._ask(explain, *arguments)
        except TimeoutError:
            return HEAD_AWAY

    async def _ask(self, question: Callable[..., _R], *arguments: Any) -> _R:
        return await asyncio.get_running_loop().run_in_executor(self._threads, question, *arguments)


class RayCluster:
    """The connection of this process to Ray, and the processes that it starts there."""

    def __init__(self, logs: Logging, force: asyncio.Event, *, folder: ServerFolder | None) -> None:
        self._logs = logs
        self._force = force
        self._folder = folder
        # Ray's start and end block for seconds, in which the main thread answers signals. The thread lives
        # as long as the connection, because what Ray starts dies with the thread that started it.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ray")
        self.peers = RayPeers()

    @classmethod
    async def connect(cls, settings: Settings, *, num_processes: int, force: asyncio.Event) -> Self:
        """Joins the Ray cluster at `cluster.address`, or starts a local one if there is no address.

        Where it is cancelled it first waits for Ray, which cannot be interrupted. `force` ends the whole
        process while Ray keeps it waiting.
        """
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # gRPC's core would log every connection that ends
        logs = Logging(
            telemetry.choose_log_level(settings.log_level), settings.otlp_endpoint, sys.stderr.isatty()
        )
        if settings.cluster.address is not None:
            return await cls._join(settings.cluster.address, logs, force)
        start = partial(cls._start_local, logs, force, places(os.environ), num_processes)
        for _ in range(START_ATTEMPTS - 1):
            try:
                return await start()
            except RayTimeoutError:
                log.warning("Ray did not start within 30 s: starting it again")
        return await start()

    @classmethod
    async def _start_local(
        cls, logs: Logging, force: asyncio.Event, places: Iterable[Path], num_processes: int
    ) -> Self:
        """Starts a local Ray, on loopback and with a token, for about `num_processes` processes."""
        folder = ServerFolder.create(places)
        os.environ["TMPDIR"] = str(folder.path)  # temporary files of libraries are removed with the folder
        os.environ.update({**_LOG_ENVIRONMENT, **_LOOPBACK_ENVIRONMENT, **_LOCAL_ENVIRONMENT})
        os.environ.update({_STORAGE_PATH: str(folder.head)})
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ.pop("RAY_AUTH_MODE", None)  # without it, Ray requires the token
        if os.environ.get("PYTHONOPTIMIZE"):
            os.environ["PYTHONOPTIMIZE"] = "1"  # Ray cannot do without its docstrings
        cluster = cls(logs, force, folder=folder)
        try:
            await cluster._connect(
                address="local",
                num_cpus=num_processes,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                _node_ip_address=LOOPBACK,
                _temp_dir=str(folder.ray),
            )
            if any(node.address != LOOPBACK for node in cluster.nodes()):
                raise FailedPrecondition("Ray did not stay on loopback")
        except BaseException as error:
            await cluster.close()
            if isinstance(error, Exception):
                raise start_error(error, os.getloadavg()[0]) from error
            raise
        return cluster

    @classmethod
    async def _join(cls, address: str, logs: Logging, force: asyncio.Event) -> Self:
        """Connects to a Ray that runs already. Raises Unavailable with field `address` when there is none."""
        host = await asyncio.to_thread(_probe, address)
        os.environ.update({**_LOG_ENVIRONMENT, **_JOIN_ENVIRONMENT})
        if host in ("localhost", LOOPBACK):
            os.environ.update(_LOOPBACK_ENVIRONMENT)
        cluster = cls(logs, force, folder=None)
        try:
            await cluster._connect(address=address)
        except BaseException as error:
            await cluster.close()
            if isinstance(error, Exception):
                raise join_error(error, address) from error
            raise
        return cluster

    @property
    def home(self) -> str:
        """Id of the node that this process runs on."""
        import ray

        node_id: str = ray.get_runtime_context().get_node_id()
        return node_id

    def nodes(self) -> tuple[Node, ...]:
        """All nodes that are alive and answer, this process's own first."""
        entries = [entry for entry in _entries() if entry["Alive"]]
        if not self._local and any(_is_in_use(entry, _available()) for entry in entries):
            time.sleep(SETTLE_S)  # what was stopped a moment ago may still seem to be there
        available = _available()
        with ThreadPoolExecutor(max_workers=len(entries)) as pool:
            answers = list(pool.map(_answers, entries))
        for entry, answers_now in zip(entries, answers, strict=True):
            if not answers_now:
                log.warning("node %s is left out: its Ray does not answer", entry["NodeManagerAddress"])
        nodes = [_node(entry, available, local=self._local) for entry in compress(entries, answers)]
        return tuple(sorted(nodes, key=lambda node: (node.id != self.home, node.address, node.id)))

    def examine(self, nodes: Iterable[Node]) -> tuple[str, ...]:
        """What people should know of a joined Ray before anything starts there. Takes seconds.

        Raises FailedPrecondition where Moesaic is missing on a node that may get a process, or is another one.
        """
        if self._local:
            return ()
        facts = self._ask_facts(
            [node for node in nodes if node.num_cpus or node.num_gpus or node.id == self.home]
        )
        head_loss = explain_head_loss(_storage(), facts)
        return (*check_versions(own_facts(), facts), *([head_loss] if head_loss else ()))

    def _ask_facts(self, nodes: Iterable[Node]) -> Mapping[str, NodeFacts]:
        """The facts of the nodes by address, without those that are late with them."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        asked = {
            ray.remote(own_facts)
            .options(
                num_cpus=0,
                max_retries=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
            )
            .remote(): node.address
            for node in nodes
        }
        answered, late = ray.wait(list(asked), num_returns=len(asked), timeout=FACTS_TIMEOUT_S)
        for reference in late:
            log.warning("node %s does not say which versions it has", asked[reference])
        return {asked[reference]: _facts_of(asked[reference], reference) for reference in answered}

    def names(self) -> tuple[str, ...]:
        """The processes of Moesaic that this Ray knows."""
        import ray

        actors = ray.util.list_named_actors(all_namespaces=True)
        return tuple(sorted(actor["name"] for actor in actors if actor["namespace"] == NAMESPACE))

    def start(self, process: PlannedProcess) -> None:
        """Asks Ray to start a process, and returns at once. Ray restarts the process whenever it dies."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        node_id = process.seat.node.id
        name = process.spec.name
        handle = (
            ray.remote(_titled(name))
            .options(
                name=name,
                namespace=NAMESPACE,
                lifetime="detached",
                max_restarts=-1,
                max_task_retries=0,
                # Nothing else runs on a local Ray, so its cores need not be reserved.
                num_cpus=0 if self._local else process.num_cpus,
                num_gpus=process.seat.num_gpus,
                scheduling_strategy=NodeAffinitySchedulingStrategy(
                    node_id, soft=not process.pinned, _spill_on_unavailable=not process.pinned
                ),
            )
            .remote(process.spec, self._logs)
        )
        self.peers.remember(name, handle)

    async def kill(self, names: Iterable[str]) -> None:
        """Ends processes for good; a joined Ray has then removed them, a local one does so at its end."""
        if self._local:
            return
        await asyncio.gather(*(self._kill(name) for name in names))

    async def watch(self) -> None:
        """Starts the head of the local Ray again whenever it dies, and returns when its node has died. Never returns
        for a joined Ray, which others look after."""
        # Where Ray was started a second time, the dead raylet of the first time may be a child still.
        raylets = [
            child for child in psutil.Process().children() if _is_alive(child) and child.name() == "raylet"
        ]
        head = HeadWatch(_LocalHead(self._thread), time.monotonic)
        while not self._local or any(map(_is_alive, raylets)):
            if self._local:
                await head.look()
            await asyncio.sleep(LOSS_PERIOD_S)

    async def close(self) -> None:
        """Disconnects from Ray. A local Ray ends, with everything that it started."""
        import ray

        run = asyncio.get_running_loop().run_in_executor
        if self._folder is None:
            await run(self._thread, ray.shutdown)
        else:
            has_head = await self._has_head()
            own = psutil.Process().children(recursive=True)
            if has_head:
                await run(self._thread, ray.shutdown)
            else:
                atexit.unregister(ray.shutdown)
            await run(self._thread, _end, own)
            self._folder.remove()
        self._thread.shutdown()

    async def _has_head(self) -> bool:
        """Whether the head of the local Ray is alive, if need be again: without one ray.shutdown would never end."""
        import ray

        if not ray.is_initialized():
            return _has_head(psutil.Process().children(recursive=True))
        head = _LocalHead(self._thread)
        try:
            if not head.is_alive():
                await head.start()
        except OSError as error:
            log.warning("Ray's head cannot be started: %s", error)
        return head.is_alive()

    @property
    def _local(self) -> bool:
        return self._folder is not None

    async def _connect(self, **options: Any) -> None:
        starting = asyncio.get_running_loop().run_in_executor(self._thread, partial(_init, **options))
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            await self._await_start(starting)
            raise
        finally:
            take_signals_back()

    async def _await_start(self, starting: asyncio.Future[Any]) -> None:
        """Returns when Ray's start has ended in one way or the other. `force` ends this process before that."""
        forced = asyncio.create_task(self._force.wait())
        await asyncio.wait({starting, forced}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            self._leave()
        forced.cancel()

    def _leave(self) -> NoReturn:
        """Ends this process while a thread of it is inside Ray, and everything that it has started."""
        if self._folder is not None:
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self._folder.remove()
        print("stopped", file=sys.stderr, flush=True)
        os._exit(0)

    async def _kill(self, name: str) -> None:
        import ray

        with contextlib.suppress(Unavailable):  # it is gone
            ray.kill(await self.peers.handle(name), no_restart=True)
            for _ in range(int(END_TIMEOUT_S / KILL_PERIOD_S)):
                await self.peers.report(name, seen=0, hold_s=0.0)
                await asyncio.sleep(KILL_PERIOD_S)
            log.error("%s is still alive after it was killed", name)


@cache
def _adapt_ray() -> None:
    """Changes in this process what Ray has no setting for; once, however often Ray is started."""
    _log_what_ray_reports()
    _poll_with_patience()


def _log_what_ray_reports() -> None:
    """Takes Ray's messages about its processes off the terminal: what they mean is said by Moesaic itself. The log
    lines of the processes go on as they come."""
    from ray._private import worker

    print_lines = worker.print_to_stdstream

    def report(data: Any, ignore_prefix: bool = True) -> None:
        if data.get("pid") == "raylet":
            log.info("Ray reports", extra={"fields": {"lines": data["lines"]}})
        else:
            print_lines(data, ignore_prefix)

    worker.print_to_stdstream = report


def _poll_with_patience() -> None:
    """Ray asks its head for errors and log lines, and where there is none it asks again at once: for as long as the head
    is away that would take a whole core."""
    raylet: Any = importlib.import_module("ray._raylet")

    def patient(subscriber: Any) -> type:
        def poll(self: Any, *arguments: Any, **options: Any) -> Any:
            message = subscriber.poll(self, *arguments, **options)
            match message:
                case None | (_, None) | {"lines": []}:  # no answer
                    time.sleep(HEAD_PERIOD_S)
            return message

        return type(f"Patient{subscriber.__name__}", (subscriber,), {"poll": poll})

    raylet.GcsErrorSubscriber = patient(raylet.GcsErrorSubscriber)
    raylet.GcsLogSubscriber = patient(raylet.GcsLogSubscriber)


def _init(**options: Any) -> None:
    import ray
    from ray.job_config import JobConfig

    class JobWithoutWorkingDirectory(JobConfig):
        """Ray would put the working directory of this process on the path of every process that it starts."""

        def _runtime_env_has_working_dir(self) -> bool:
            return True

    _adapt_ray()
    logging.getLogger("ray").setLevel(logging.ERROR)
    ray.init(
        namespace=NAMESPACE,
        log_to_driver=True,
        logging_level=logging.ERROR,
        job_config=JobWithoutWorkingDirectory(_py_driver_sys_path=own_search_path()),
        **options,
    )


def _own_node() -> Any:
    """The node that `ray.init` has started in this process."""
    from ray._private import worker

    return worker._global_node


def _start_head() -> None:
    """Starts another head, with the port and the stored state of the dead one, and waits until it answers.

    Raises OSError where it does not.
    """
    node = _own_node()
    node.kill_gcs_server(check_alive=False)  # Ray forgets the dead one
    node.start_gcs_server()
    deadline_s = time.monotonic() + HEAD_TIMEOUT_S
    while not _subscribe_again():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"it does not answer within {HEAD_TIMEOUT_S:.0f} s")
        time.sleep(HEAD_PERIOD_S)


def _subscribe_again() -> bool:
    """Tells a new head that this process wants errors and the log lines of the processes; whether it answered."""
    from ray._private import worker
    from ray.exceptions import RpcError

    connection: Any = worker.global_worker
    try:
        connection.gcs_error_subscriber.subscribe()
        connection.gcs_log_subscriber.subscribe()
    except RpcError:
        return False
    return True


def _own_address() -> str:
    import ray

    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address


def _entries() -> list[dict[str, Any]]:
    import ray

    entries: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return entries


def _facts_of(address: str, reference: Any) -> NodeFacts:
    """What a node answered. Raises FailedPrecondition where it could not run Moesaic."""
    import ray
    from ray.exceptions import RayError

    try:
        facts: NodeFacts = ray.get(reference)
    except RayError as error:
        raise FailedPrecondition(f"address: {_no_start(address, error)}", field="address") from error
    return facts


def _storage() -> str | None:
    """Where Ray's head has its state, in its own words. Nothing public says so; it is among what Ray counts."""
    from ray.experimental import internal_kv

    storage = internal_kv._internal_kv_get(b"extra_usage_tag_gcs_storage", namespace="usage_stats")
    return storage.decode() if storage else None


def _why_given_up(handle: Any, error: Exception) -> str:
    """Why Ray could not even make the actor, and on which node."""
    return _no_start(_placed(handle)[1], error)


def _no_start(address: str, error: Exception) -> str:
    """Why nothing of ours can run on a node. The usual reason is one without Moesaic."""
    where = f"cannot start on node {address}" if address else "cannot start"
    cause = next((line for line in reversed(str(error).splitlines()) if "Error: " in line), last_line(error))
    missing = "ModuleNotFoundError" in cause
    hint = "; is Moesaic installed there, in the Python that runs Ray, as it is here?" if missing else ""
    return f"{where}: {cause.strip()}{hint}"


def _why_silent(handle: Any, was_ready: bool) -> str:
    """Whether a process that does not answer runs at all, as Ray knows it."""
    return explain_silence(*_placed(handle), was_ready=was_ready, room=_room)


def _placed(handle: Any) -> tuple[str, str]:
    """The state of an actor in Ray's words, and the address of its node; both empty where Ray does not know."""
    from ray._private import state  # no public function gives this without the dashboard

    entry = {} if handle is None else state.actors(handle._actor_id.hex())
    return entry.get("State", ""), entry.get("Address", {}).get("IPAddress", "")


def _room() -> str:
    """The CPUs that are free on each node, for a person; empty for a local Ray, which reserves none."""
    nodes = [_node(entry, _available(), local=False) for entry in _entries() if entry["Alive"]]
    if all(node.address == LOOPBACK for node in nodes):
        return ""
    return ", CPUs free: " + ", ".join(
        f"{node.free_cpus} of {node.num_cpus} on {node.address}" for node in nodes
    )


def _available() -> Mapping[str, Mapping[str, float]]:
    """What no actor has reserved of the resources of each node, by its id."""
    from ray._private import state  # no public function gives this without the dashboard

    free: Mapping[str, Mapping[str, float]] = state.available_resources_per_node()  # type: ignore[no-untyped-call]
    return free


def _own_restarts() -> int:
    """How often Ray has restarted this actor."""
    import ray
    from ray._private import state  # no public function gives this number without the dashboard

    entry = state.actors(ray.get_runtime_context().get_actor_id())
    return int(entry.get("NumRestarts", 0))


def _node(entry: Mapping[str, Any], available: Mapping[str, Mapping[str, float]], *, local: bool) -> Node:
    # Ray leaves out a resource of which a node has none, or none that is free.
    resources, free = entry["Resources"], available.get(entry["NodeID"], entry["Resources"])
    # The "CPUs" of a local Ray are its number of processes, so that each of them fits; the cores are this
    # machine's.
    num_cpus = len(os.sched_getaffinity(0)) if local else int(resources.get("CPU", 0))
    return Node(
        id=entry["NodeID"],
        address=entry["NodeManagerAddress"],
        num_cpus=num_cpus,
        num_gpus=int(resources.get("GPU", 0)),
        free_cpus=None if local else int(free.get("CPU", 0)),
    )


def _is_in_use(entry: Mapping[str, Any], available: Mapping[str, Mapping[str, float]]) -> bool:
    node = _node(entry, available, local=False)
    return node.free_cpus is not None and node.free_cpus < node.num_cpus


def _answers(entry: Mapping[str, Any]) -> bool:
    """Whether a node's Ray accepts connections. For a minute Ray itself counts a dead node as alive."""
    try:
        address = (entry["NodeManagerAddress"], entry["NodeManagerPort"])
        socket.create_connection(address, CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def _probe(address: str) -> str:
    """The host of an address at which something listens. Ray itself would take long to find that out."""
    if "://" in address:
        raise InvalidArgument(
            "address: the Ray Client protocol is not supported: name HOST:PORT of the head, or auto",
            field="address",
        )
    if address == "auto":
        return ""
    host, port = split_address(address)
    try:
        socket.create_connection((host, port), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise Unavailable(f"address: no Ray answers at {address}", field="address") from error
    return host


def _has_head(processes: Iterable[psutil.Process]) -> bool:
    """Whether Ray's head is alive: without it ray.shutdown would block this process for minutes."""
    return any(_is_alive(process) and process.name() == _HEAD for process in processes)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _end(processes: Iterable[psutil.Process]) -> None:
    """Ends processes, including those that a failed start left behind."""
    alive = [process for process in processes if _is_alive(process)]
    for ask in (psutil.Process.terminate, psutil.Process.kill):
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                ask(process)
        _, alive = psutil.wait_procs(alive, timeout=END_TIMEOUT_S / 2)
