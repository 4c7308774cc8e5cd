"""What the checks start from: see the drawing in `installed`; each has a host of its own."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from installed import container, outer
from installed.container import Container
from installed.host import Host
from installed.outer import Outer
from installed.package import Package
from installed.stages import SEED, Root, Stage
from stratabox.client import Client, SnapshotLevel
from support import counting
from support.daemon import daemon


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
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """The daemon whose sandboxes are the outer hosts."""
    settings = {"STRATABOX_READY_TIMEOUT": "15m"}
    with daemon(tmp_path_factory.mktemp("here"), settings) as process, process.start() as client:
        yield client


@pytest.fixture(scope="session")
def fresh_stage(
    here: Client,
    folder: Path,
    package: Package,
    tell: Callable[[str], None],
) -> Stage:
    """The package has been installed in an outer host a moment ago; nobody has called."""
    host = outer.boot(here, folder, tell, name="outer")
    tell("the package is installed")
    host.sh(f"apt-get install --yes {host.put(package.file)}")
    snapshot = host.box.snapshot(name="fresh", level=SnapshotLevel.MEMORY)
    host.box.delete()
    return Stage(client=here, snapshot=snapshot, folder=folder)


@pytest.fixture
def fresh(fresh_stage: Stage) -> Iterator[Outer]:
    """An outer host on which the package has just been installed."""
    with fresh_stage.host() as host:
        yield host


@pytest.fixture(scope="session")
def seed(here: Client, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of a small guest's memory, in which a process counts (`support.counting`)."""
    file = tmp_path_factory.mktemp("seed") / "seed.sbx"
    here.images.build_tiny()
    box = here.sandboxes.create(image="tiny", memory=128)
    counting.start(box)
    snapshot = box.snapshot(name=SEED, level=SnapshotLevel.MEMORY)
    here.snapshots.export(snapshot.id, file, memory=True)
    box.delete()
    here.snapshots.delete(snapshot.id)
    return file


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory, tell: Callable[[str], None]) -> Root:
    """A host without the package, with all that it depends on."""
    tell("a container's root folder")
    root = tmp_path_factory.mktemp("bare") / "root"
    container.build_root(root)
    return Root((root,))


@pytest.fixture(scope="session")
def stocked(
    bare: Root,
    package: Package,
    seed: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tell: Callable[[str], None],
) -> Root:
    """The package is installed, and has a snapshot, `SEED`."""
    tell("the package is installed in a container")
    folder = tmp_path_factory.mktemp("stocked") / "host"
    with bare.host(folder) as host:
        host.sh(f"apt-get install --yes {host.put(package.file)}")
        with host.client() as client:
            client.snapshots.import_file(seed, trust=True)
        host.power_off()
    return bare.on_top(host.written)


@pytest.fixture
def lab(stocked: Root, tmp_path: Path) -> Iterator[Container]:
    """A container with the package and a snapshot; guests run in it."""
    with stocked.host(tmp_path / "lab") as host:
        yield host


@pytest.fixture
def bare_lab(bare: Root, tmp_path: Path) -> Iterator[Container]:
    """A container without the package."""
    with bare.host(tmp_path / "lab") as host:
        yield host


@pytest.fixture
def wired_lab(stocked: Root, tmp_path: Path) -> Iterator[Container]:
    """As `lab`, with this host's network."""
    with stocked.host(tmp_path / "lab", network=True) as host:
        yield host


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and report.when == "call":
        for made in getattr(item, "funcargs", {}).values():
            if isinstance(made, Host):
                report.sections.append(("the host's journal", made.journal()))
    return report
