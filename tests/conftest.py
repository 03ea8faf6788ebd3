"""What every test runs under: warnings are errors, one thread, nothing sent anywhere, no seed left to chance."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile

# Before anything imports them: the tracker must neither ask for a login nor print, and plots need no display.
# Assigned, not defaulted: a developer's own settings must not turn a test into an upload.
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["MPLBACKEND"] = "Agg"
# Kernels are compiled for this run of the tests, once for all its processes: those of xdist inherit the folder.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["LEARNED_OPT_CACHE"] = tempfile.mkdtemp(prefix="learned_opt_tests_")
# A shell's background jobs ignore Ctrl-C, and so would every process that a test starts in order to interrupt it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
for _name in ("LEARNED_OPT_NATIVE", "CXX"):
    os.environ.pop(_name, None)

import pytest  # noqa: E402
import torch  # noqa: E402

# Tests run many small programs: one thread is as fast as two, leaves a core to the processes that tests start,
# and fixes the order of every sum.
torch.set_num_threads(1)

_ALLOWED_WARNINGS: tuple[str, ...] = ()
"""Filters in pytest's syntax for warnings of other libraries that we cannot avoid; each with the reason above it."""


def pytest_configure(config: pytest.Config) -> None:
    """Add the exceptions to pyproject's `filterwarnings = ["error"]`."""
    for line in _ALLOWED_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


def pytest_unconfigure() -> None:
    """Remove the compiled kernels; processes of xdist leave that to the one that started them."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["LEARNED_OPT_CACHE"], ignore_errors=True)


_LONG = ("test_train_optimizer", "test_scale", "test_distributed", "test_recipes", "test_fused", "test_meta_training")
"""Starts of the names of files of few tests that take long."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: processes that share the files out would otherwise end with one of them, and wait for it."""
    items.sort(key=lambda item: not item.path.name.startswith(_LONG))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test that builds an `nn.Module` draws from torch's global generator: always from the same state of it."""
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator with a fixed seed."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(params=["0", "1"], ids=["plain", "native"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that asks for this runs without compiled kernels and with them, where there is a compiler."""
    monkeypatch.setenv("LEARNED_OPT_NATIVE", request.param)
