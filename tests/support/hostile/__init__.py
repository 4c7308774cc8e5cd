"""Programs for tiny guests that are not what they should be."""

from __future__ import annotations

import contextlib
from pathlib import Path

from stratabox.client import AgentUnavailableError, Sandbox

_LIAR = Path(__file__).with_name("liar")

LIES = (
    "silent", "deaf", "noise", "lines", "marks", "endless", "nested", "crowded", "wrong", "strange",
    "others", "slow",
)  # fmt: skip
"""What `lie` knows: how the agent's place is taken; see the script."""


CHANNEL_LIES = ("channel-silent", "channel-noise", "channel-banner", "channel-banners")
"""The same of the channel's sshd."""


def teach(sandbox: Sandbox) -> None:
    """Give a guest what it needs to lie."""
    sandbox.execute(
        ["sh", "-c", "cat >/liar <<'E'\n" + _LIAR.read_text() + "E\nchmod 755 /liar"]
    ).check()


def lie(sandbox: Sandbox, how: str) -> None:
    """Have a guest that was taught put itself in its agent's place, in a moment."""
    with contextlib.suppress(AgentUnavailableError):  # it may be gone before it tells the end
        sandbox.execute(
            f"setsid sh -c 'sleep 0.3; exec /liar {how}' >/dev/null 2>&1 </dev/null &"
        ).check()
