"""The ladder that the checks climb: booted → fresh; each gets a host of its own."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from installed import outer
from installed.outer import Outer
from installed.package import Package
from installed.stages import Stage
from stratabox.client import SnapshotLevel
from support.daemon import DaemonProcess, daemon


@pytest.fixture(scope="session")
def tell(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Says what the checks are waiting for."""
    begun = time.monotonic()
    terminal = request.config.pluginmanager.get_plugin("terminalreporter")
    assert terminal is not None

    def say(step: str) -> None:
        terminal.write_line(f"[{time.monotonic() - begun:5.0f} s] {step}")
        terminal.flush()

    terminal.write_line("")
    return say


@pytest.fixture(scope="session")
def package() -> Package:
    """The package of this tree."""
    file, version = os.environ["STRATABOX_INSTALLED"].split(":")
    return Package(file=Path(file), version=version)


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    """A folder with a short path, for sockets."""
    with tempfile.TemporaryDirectory(prefix="sbx-") as name:
        yield Path(name)


@pytest.fixture(scope="session")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """The daemon whose sandboxes are the outer hosts."""
    with daemon(tmp_path_factory.mktemp("here"), {"STRATABOX_READY_TIMEOUT": "15m"}) as process:
        yield process


@pytest.fixture(scope="session")
def fresh_stage(
    here: DaemonProcess,
    folder: Path,
    package: Package,
    tell: Callable[[str], None],
) -> Iterator[Stage]:
    """The package has been installed a moment ago; nobody has called."""
    with here.start() as client:
        host = outer.boot(client, folder, tell)
        tell("the package is installed")
        host.sh(f"apt-get install --yes {host.put(package.file)}")
        snapshot = host.box.snapshot(name="fresh", level=SnapshotLevel.MEMORY)
        host.box.delete()
        yield Stage(client=client, snapshot=snapshot, folder=folder)


@pytest.fixture
def fresh(fresh_stage: Stage) -> Iterator[Outer]:
    """A host on which the package has just been installed."""
    with fresh_stage.host() as host:
        yield host


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and report.when == "call":
        for made in getattr(item, "funcargs", {}).values():
            if isinstance(made, Outer):
                report.sections.append(("the outer host's journal", made.journal()))
    return report
