"""The environment every test runs in. Set on import: pytest reads this file before any test imports ray or mlflow."""

import contextlib
import os
import tempfile

import psutil
import pytest
from hypothesis import settings

# The first comparison of tensors imports a second's worth of torch, whichever test makes it.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# Removed when the session ends; nothing of the user's own cache is read or written.
_cache = tempfile.TemporaryDirectory(prefix="sddit-test-cache-", ignore_cleanup_errors=True)

os.environ.update(
    SDDIT_CACHE=_cache.name,
    # Ray asks for a token file and for cluster support on macOS; reports usage; draws its own tables.
    RAY_AUTH_MODE="disabled",
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_AIR_NEW_OUTPUT="0",
    TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
    MLFLOW_DISABLE_TELEMETRY="true",
    # The networks are tiny: threads would cost more than they bring, and sums stay in one order.
    OMP_NUM_THREADS="1",
)

# A test must not write to the tracking server or the cluster of whoever runs it.
for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
    os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def no_command_is_left():
    """Of a test that failed in its middle: it would slow those that follow."""
    from commands import Running

    yield
    while Running.started:
        running = Running.started.pop()
        if running.process.poll() is None:
            family = running.family()
            running.kill()
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
