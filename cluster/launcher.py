"""From a checked model to a cluster that answers, and back to nothing.

Everything is started at once and then watched through the controller, the same way `moesaic status` looks at it. What
was started is ended again whatever happens in between.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import grpc

from cluster.blueprint import PlannedProcess
from cluster.processes import CONTROLLER, GATEWAY, ROUTER, Peers
from moesaic import rpc
from moesaic.errors import FailedPrecondition, MoesaicError, Unavailable
from moesaic.settings import ClusterSettings, Settings
from moesaic.v1 import control_pb2, control_pb2_grpc

POLL_S = 0.15
ASK_TIMEOUT_S = 5.0
# A process that died this often before the cluster was ready will not make it.
MAX_START_RESTARTS = 3
