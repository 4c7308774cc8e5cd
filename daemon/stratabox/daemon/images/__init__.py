"""Making disk images: from Debian's packages, or from a file that somebody brings.

`debian` and `tiny` build guests with mmdebstrap (`bootstrap`), mke2fs and qemu-img; both boot by a
kernel (`kernel`) and a small initramfs (`initramfs`) that QEMU loads. `importer` takes a disk that
boots by itself. `cache` keeps what was built. The files that go into guests lie under ``guest/``.

Builders know tools and files; they know no catalog and no gRPC. Each gets a fresh folder to work
in, which the caller removes.
"""
