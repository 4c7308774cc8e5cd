"""The figures: calls and snapshots are counted as they end, records when somebody asks.

Each label has few values: methods of the API, reasons of errors, states, levels. Never a name, an
id, or anything that a caller can choose.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.process_collector import ProcessCollector

from stratabox.daemon.access.gate import Call, Gate
from stratabox.daemon.lifecycle.common.events import Bus, Event, Happening
from stratabox.daemon.lifecycle.common.threads import in_thread
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import tally
from stratabox.storage.catalog.tally import Tally
from stratabox.storage.files import usage
from stratabox.storage.model.errors import ConflictError, UnavailableError
from stratabox.storage.model.records import Sandbox, Snapshot
from stratabox.storage.model.states import SnapshotState

_SHORT = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_LONG = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 180, 600)
_FRESH = 1.0
"""Seconds that what was looked at is good for: who asks more often gets the same."""


@dataclass(frozen=True, kw_only=True)
class _Facts:
    tally: Tally
    counted: int
    disk: usage.FileSystem
    at: float


class Figures:
    """One for a daemon. Of the event loop's thread."""

    def __init__(self, world: World, gate: Gate) -> None:
        self._world = world
        self._gate = gate
        self._facts: _Facts | None = None
        self._looking = asyncio.Lock()
        self._registry = registry = CollectorRegistry()
        self._calls = Counter(
            "stratabox_calls", "Calls that have ended", ("method", "result"), registry=registry
        )
        self._call_seconds = Histogram(
            "stratabox_call_seconds", "How long calls took, streams left out", ("method",),
            buckets=_LONG, registry=registry,
        )  # fmt: skip
        self._failures = Counter(
            "stratabox_failures", "Calls that were answered with an error", ("method", "reason"),
            registry=registry,
        )  # fmt: skip
        self._refused = Counter(
            "stratabox_refused", "Calls that were not let in", ("reason",), registry=registry
        )
        self._snapshots = Counter(
            "stratabox_snapshots_taken", "Snapshots, as they became ready or failed",
            ("level", "result"), registry=registry,
        )  # fmt: skip
        self._snapshot_bytes = Counter(
            "stratabox_snapshot_bytes", "Bytes on the disk that snapshots have sealed", ("kind",),
            registry=registry,
        )  # fmt: skip
        self._stall = Histogram(
            "stratabox_snapshot_stall_seconds", "How long a snapshot stalled its guest's writes",
            ("level",), buckets=_SHORT, registry=registry,
        )  # fmt: skip
        self._pause = Histogram(
            "stratabox_snapshot_pause_seconds", "How long a memory snapshot's guest stood still",
            buckets=_SHORT, registry=registry,
        )  # fmt: skip
        self._ready = Histogram(
            "stratabox_ready_seconds", "From a guest's start until it was ready", ("start",),
            buckets=_LONG, registry=registry,
        )  # fmt: skip
        built = Gauge(
            "stratabox_build_info", "What runs here", ("version", "qemu", "accelerator"),
            registry=registry,
        )  # fmt: skip
        built.labels(
            version("stratabox"), world.qemu.version_text, str(world.accelerator.name)
        ).set(1)
        ProcessCollector(registry=registry)
        registry.register(self)
        gate.on_end.append(self._call_ended)
        gate.on_refused.append(lambda reason: self._refused.labels(reason).inc())

    async def text(self) -> bytes:
        """All of them, in Prometheus's text format.

        :raise StrataboxError: when the catalog cannot be read.
        """
        async with self._looking:
            if self._facts is None or self._facts.at + _FRESH < time.monotonic():
                self._facts = await in_thread(self._look)
        return generate_latest(self._registry)

    async def follow(self, bus: Bus) -> None:
        """Count what happens to snapshots and sandboxes, until the daemon ends."""
        seen = _Seen()
        while True:
            with bus.subscribe() as subscription:
                try:
                    async for event in subscription.events():
                        self._happened(event, seen)
                except UnavailableError:
                    return
                except ConflictError:
                    continue  # fell behind: what was missed is missing from counts, never double

    def collect(self) -> list[GaugeMetricFamily]:
        """What is there, as it was looked at last: called by prometheus_client."""
        calls = GaugeMetricFamily("stratabox_calls_open", "Calls under way", self._gate.open_calls)
        if self._facts is None:
            return [calls]
        found, disk = self._facts.tally, self._facts.disk
        depths = found.depths
        return [
            calls,
            _states("stratabox_sandboxes", "Sandboxes", found.sandboxes),
            _states("stratabox_snapshots", "Snapshots", found.snapshots),
            _states("stratabox_volumes", "Volumes", found.volumes),
            _states("stratabox_jobs", "Background jobs; of those over, a day's", found.jobs),
            GaugeMetricFamily("stratabox_images", "Images", found.images),
            GaugeMetricFamily(
                "stratabox_guest_memory_bytes",
                "RAM of all guests with a process, each counted whole",
                found.memory << 20,
            ),
            GaugeMetricFamily(
                "stratabox_chain_layers_max",
                "Layers of the longest backing chain of a sandbox",
                max(depths, default=0),
            ),
            GaugeMetricFamily(
                "stratabox_chain_layers_mean",
                "Layers of sandboxes' backing chains, on average",
                sum(depths) / len(depths) if depths else 0,
            ),
            GaugeMetricFamily(
                "stratabox_layer_bytes", "Bytes on the disk in sealed layers", found.layer_bytes
            ),
            GaugeMetricFamily(
                "stratabox_saved_memory_bytes", "Bytes on the disk in saved RAM", found.memory_bytes
            ),
            GaugeMetricFamily(
                "stratabox_store_bytes",
                "Bytes on the disk that count against store.budget",
                self._facts.counted,
            ),
            GaugeMetricFamily(
                "stratabox_disk_bytes", "Size of the state folder's file system", disk.bytes
            ),
            GaugeMetricFamily(
                "stratabox_disk_free_bytes", "Bytes that are free in it", disk.free
            ),
        ]  # fmt: skip

    def _look(self) -> _Facts:
        layout = self._world.store.layout
        with self._world.catalog.looking() as tx:
            found, counted = tally.count(tx), usage.counted(tx, layout)
        return _Facts(
            tally=found, counted=counted, disk=usage.file_system(layout), at=time.monotonic()
        )

    def _call_ended(self, call: Call, seconds: float) -> None:
        self._calls.labels(call.method, call.result).inc()
        if not call.long:
            self._call_seconds.labels(call.method).observe(seconds)
        if call.reason:
            self._failures.labels(call.method, call.reason).inc()

    def _happened(self, event: Event, seen: _Seen) -> None:
        record = event.record
        if isinstance(record, Snapshot):
            if seen.ended(event, record):
                self._snapshot_ended(record)
        elif isinstance(record, Sandbox) and seen.became_ready(event, record):
            assert record.ready_at is not None
            assert record.started_at is not None
            took = (record.ready_at - record.started_at).total_seconds()
            self._ready.labels("memory" if record.ram_origin else "boot").observe(max(0.0, took))

    def _snapshot_ended(self, record: Snapshot) -> None:
        level = str(record.consistency or record.requested_level or "none")
        self._snapshots.labels(level, str(record.state)).inc()
        if record.state is not SnapshotState.READY:
            return
        self._snapshot_bytes.labels("layers").inc(record.layer_bytes)
        if record.stall is not None:
            self._stall.labels(level).observe(record.stall.total_seconds())
        if record.ram is not None:
            self._snapshot_bytes.labels("memory").inc(record.ram.own_bytes)
            self._pause.observe(record.ram.pause.total_seconds())


class _Seen:
    """What was told already: a record is published with every change of it."""

    def __init__(self) -> None:
        self._creating: set[str] = set()
        self._starting: dict[str, bool] = {}

    def ended(self, event: Event, record: Snapshot) -> bool:
        """Whether this is a snapshot's end, which comes once."""
        if record.state is SnapshotState.CREATING and event.happening is not Happening.DELETED:
            self._creating.add(record.id)
            return False
        was = record.id in self._creating
        self._creating.discard(record.id)
        return was and event.happening is not Happening.DELETED

    def became_ready(self, event: Event, record: Sandbox) -> bool:
        """Whether a sandbox has become ready since its start."""
        if event.happening is Happening.DELETED or record.state.is_over:
            self._starting.pop(record.id, None)
            return False
        was, self._starting[record.id] = self._starting.get(record.id, True), record.ready
        times = record.ready_at is not None and record.started_at is not None
        return record.ready and not was and times


def _states(name: str, what: str, numbers: Mapping[str, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, f"{what} by state", labels=("state",))
    for state, number in numbers.items():
        family.add_metric((state,), number)
    return family
