"""An image exported, and its disk's file packed by zstd: as many bytes a second?"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from bench.bench import Bench
from bench.figures import Figure
from bench.product import Product
from bench.rounds import Stopwatch, alternate, medians

SHARE = 0.7
"""Of zstd's bytes a second that an export must have."""


def export(bench: Bench) -> Iterator[Figure]:
    """Debian's image through the SDK into nothing, against ``zstd -T0`` of its layer."""
    with bench.new_product() as made:
        image = made.client.images.build_debian()
        layer = _layer_of(made, image.layer_bytes)
        made.client.images.delete("tiny")
        samples = alternate(
            bench.rounds,
            {"ours": lambda: _export(made, image.id), "zstd": lambda: _zstd(layer)},
        )
    median = medians(samples)
    ours = median["ours.ms_each_mb"]
    zstd = median["zstd.ms_each_mb"]
    yield Figure(
        name="export of an image, over zstd -T0",
        unit="ms/MB",
        bound=f"≥ {SHARE:.0%} of its bytes a second",
        measured=ours,
        floor=zstd,
        limit=zstd / SHARE,
        note=f"{1000 / ours:.0f} against {1000 / zstd:.0f} MB/s of content, into nothing; kernel"
        f" and initrd are in the archive too, which has {median['ours.archive'] / 1e6:.0f} MB"
        f" (zstd's {median['zstd.archive'] / 1e6:.0f})",
        samples=samples,
    )


def _layer_of(made: Product, size: int) -> Path:
    """The file of the image's layer."""
    files = sorted((made.state / "layers").iterdir(), key=lambda path: path.stat().st_blocks)
    assert files[-1].stat().st_blocks * 512 == size
    return files[-1]


def _export(made: Product, image: str) -> Mapping[str, float]:
    watch = Stopwatch()
    with Path("/dev/null").open("wb") as nothing:
        result = made.client.images.export(image, nothing)
    done = watch.ms
    return {
        "ms_each_mb": done / (result.content_bytes / 1e6),
        "archive": result.archive_bytes,
    }


def _zstd(layer: Path) -> Mapping[str, float]:
    watch = Stopwatch()
    with subprocess.Popen(["zstd", "-T0", "-q", "-c", layer], stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        size = 0
        while piece := running.stdout.read(1 << 20):
            size += len(piece)
    if running.returncode:
        raise RuntimeError("zstd failed")
    return {"ms_each_mb": watch.ms / (layer.stat().st_size / 1e6), "archive": size}
