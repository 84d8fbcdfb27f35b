"""What a client install lacks must not be needed: the client library imports without the serving stack."""

from __future__ import annotations

import subprocess
import sys

import pytest

# The dependencies of moesaic/pyproject.toml are enough for the first; the gateway is a server without a model.
CLIENT_LACKS = (
    "torch",
    "ray",
    "transformers",
    "numpy",
    "pydantic",
    "fastapi",
    "uvicorn",
    "typer",
    "grpc_health",
    "h2",
)
GATEWAY_LACKS = ("torch", "ray", "transformers", "router", "expert_worker", "cluster")

SCRIPT = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None  # the import machinery raises ImportError for it
import {module}
"""


@pytest.mark.parametrize(
    ("module", "blocked"),
    [("moesaic", CLIENT_LACKS), ("moesaic.client.client", CLIENT_LACKS), ("gateway.server", GATEWAY_LACKS)],
)
def test_a_module_imports_without_what_its_install_lacks(module: str, blocked: tuple[str, ...]) -> None:
    script = SCRIPT.format(blocked=blocked, module=module)
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr


def test_all_names_what_the_package_offers_and_is_sorted() -> None:
    import moesaic

    assert moesaic.__all__ == sorted(moesaic.__all__)
    assert set(moesaic.__all__) == {
        "Allow",
        "Client",
        "Completion",
        "Deny",
        "ExpertPolicy",
        "ModelInfo",
        "Require",
        "RouterStats",
        "SyncClient",
        "Token",
        "Tokenization",
        "__version__",
        "errors",
    }
    assert all(hasattr(moesaic, name) for name in moesaic.__all__)


def test_dir_shows_only_what_is_public() -> None:
    import moesaic

    assert dir(moesaic) == moesaic.__all__
