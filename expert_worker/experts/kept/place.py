"""Where a worker keeps its weights, if it does."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from moesaic.compute.tensor_bytes import probe_layout
from moesaic.kept_folder import KeptFolder
from moesaic.settings import WorkerSettings

log = logging.getLogger(__name__)


def open_kept_folder(settings: WorkerSettings, device: torch.device) -> KeptFolder | None:
    """The folder of this process; None where weights are not kept: on a GPU, which loses its memory with the process,
    without the place, and where the setting says so."""
    place = Path(settings.keep_weights_in)
    if settings.keep_weights == "off" or device.type != "cpu" or not place.is_dir() or probe_layout() is None:
        return None
    limit = settings.keep_weights_mib
    try:
        return KeptFolder.open(place, None if limit is None else limit << 20)
    except OSError as error:
        log.warning("weights are not kept beyond this process", extra={"fields": {"why": str(error)}})
        return None
