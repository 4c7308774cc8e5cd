"""Images are built by the system's daemon, where an administrator lets it."""

from __future__ import annotations

import pytest

from installed.container import Container
from stratabox.client import StrataboxError

_EXAMPLE = "/usr/share/doc/stratabox/examples/build.conf"


def test_a_tiny_image_is_built_within_the_walls(wired_lab: Container) -> None:
    with wired_lab.client() as client:
        image = client.images.build_tiny(name="built")
        box = client.sandboxes.create(image=image.name, memory=128)
        assert box.execute("true", timeout=60).exit_code == 0


def test_a_debian_image_is_built_with_the_drop_in_alone(wired_lab: Container) -> None:
    with wired_lab.client() as client:
        with pytest.raises(StrataboxError) as refused:
            client.images.build_debian(name="built")
        print(f"{type(refused.value).__name__}: {refused.value}")
        wired_lab.sh(
            f"install -D -m 0644 {_EXAMPLE} /etc/systemd/system/strataboxd.service.d/build.conf"
            " && systemctl daemon-reload && systemctl restart strataboxd"
        )
        image = client.images.build_debian(name="built")
        box = client.sandboxes.create(image=image.name, memory=512)
        assert box.execute("systemctl is-system-running --wait", timeout=300).stdout == b"running\n"
        assert wired_lab.sh("ls -A /var/lib/stratabox/work") == ""
