"""What the daemon and a helper say to each other, one JSON object in each packet of a socket.

```
{"do": "attach", "rules": [...]}  and QEMU's socket  ─▶  {"pid": 1, "counters": {...}}
{"do": "change", "rules": [...]}                     ─▶  the same
{"do": "look"}                                       ─▶  the same
                                                         {"error": "..."}
```
"""

from __future__ import annotations

import socket

KIND = socket.SOCK_SEQPACKET
MAX_BYTES = 192 << 10
"""More than the longest policy takes, and less than a socket takes at once."""
CONTROL = "uplink.sock"
LINK = "net.sock"
LOG = "network.log"
