"""Tenki's published SDKs, from their registries, each in a place and in processes of its own.

Their messages have the names of ours, so that they are never imported here; and their users run
them so. What was installed once is kept beside the built images.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from support.daemon import CACHE
from support.tenki import Tenki

SCRIPTS = Path(__file__).parents[1] / "integration" / "tenki"
_SECONDS = 500


def run_python(tenki: Tenki, script: str, *words: str, **environment: str) -> str:
    """Run a script with the PyPI package `tenki`; returns what it prints. It must end well."""
    python = _python() / "bin" / "python"
    return _run(tenki, [str(python), str(SCRIPTS / "python" / script), *words], environment)


def run_node(tenki: Tenki, script: str, *words: str, **environment: str) -> str:
    """Run a script with the npm package `@tenkicloud/sandbox`, as `run_python`."""
    kept = _node()
    with tempfile.TemporaryDirectory() as folder:
        # Node looks for packages beside the script that wants them.
        (Path(folder) / "node_modules").symlink_to(kept / "node_modules")
        (Path(folder) / script).write_text((SCRIPTS / "node" / script).read_text("utf-8"))
        return _run(tenki, ["node", str(Path(folder) / script), *words], environment)


def _run(tenki: Tenki, command: list[str], environment: dict[str, str]) -> str:
    # What users set, and nothing else.
    ours = {"TENKI_API_ENDPOINT": tenki.url, "TENKI_API_KEY": tenki.api_key}
    kept = {key: value for key, value in os.environ.items() if "TENKI" not in key}
    done = subprocess.run(
        command,
        env=kept | ours | environment,
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{tenki.process.log.read_text()}"
    return done.stdout


def _python() -> Path:
    requirements = SCRIPTS / "python" / "requirements.txt"

    def install(folder: Path) -> None:
        _quietly([sys.executable, "-m", "venv", str(folder)])
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-deps"]
        _quietly([*pip, "--requirement", str(requirements)])

    return _kept("tenki-python", [requirements.read_bytes(), sys.version.encode()], install)


def _node() -> Path:
    package, lock = (SCRIPTS / "node" / name for name in ("package.json", "package-lock.json"))

    def install(folder: Path) -> None:
        folder.mkdir()
        for each in (package, lock):
            shutil.copy(each, folder)
        _quietly(["npm", "ci", "--prefix", str(folder), "--ignore-scripts", "--no-audit"])

    return _kept("tenki-node", [package.read_bytes(), lock.read_bytes()], install)


def _kept(name: str, made_of: list[bytes], install: Callable[[Path], None]) -> Path:
    """A folder that `install` has filled, once for all runs of this host."""
    digest = hashlib.sha256(b"\0".join(made_of)).hexdigest()[:24]
    kept = CACHE / f"{name}-{digest}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}-{digest}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            making = kept.with_suffix(".part")
            shutil.rmtree(making, ignore_errors=True)
            install(making)
            making.rename(kept)
    return kept


def _quietly(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
