"""The helper's process: one guest's way out. Started by `uplink`, ends when its QEMU does.

One thread and one loop, over libslirp's sockets, QEMU's, the daemon's and those that ask for names.
What it knows of the daemon comes over an inherited listening socket; see `wire`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

from stratabox.daemon.hypervisor.network import wire
from stratabox.daemon.hypervisor.network.confine import confine
from stratabox.daemon.hypervisor.network.link import Link, LinkClosedError
from stratabox.daemon.hypervisor.network.names import RESOLV_CONF, Names
from stratabox.daemon.hypervisor.network.policy import Policy
from stratabox.daemon.hypervisor.network.routes import Routes
from stratabox.daemon.hypervisor.network.slirp import Slirp
from stratabox.daemon.hypervisor.network.walls import Walls
from stratabox.storage.model.errors import StrataboxError
from stratabox.storage.model.network import Rule

UNATTACHED_SECONDS = 120.0
"""How long it waits for its QEMU: the daemon that started it may be gone."""
MAX_CLIENTS = 4


class Helper:
    """The helper of one sandbox.

    :param control: listens for the daemon.
    """

    def __init__(self, control: socket.socket, routes: Routes) -> None:
        control.setblocking(False)
        self._control = control
        self._clients: dict[int, socket.socket] = {}
        self._link: Link | None = None
        self._unattached_until = time.monotonic() + UNATTACHED_SECONDS
        self._slirp = Slirp(self._from_slirp)
        self._walls = Walls(
            Policy(()),
            is_host=routes.is_host,
            clock=time.monotonic,
            to_slirp=self._slirp.input,
            to_guest=self._to_guest,
            ask=self._ask,
        )
        self._names = Names(self._walls, routes.is_host)

    def run(self) -> None:
        """Work until QEMU is gone."""
        with contextlib.suppress(LinkClosedError):
            while self._link is not None or time.monotonic() < self._unattached_until:
                self._turn()

    def _turn(self) -> None:
        slirps, limit = self._slirp.fill()
        watched = dict(slirps)
        watched.update(self._names.descriptors())
        watched.update(dict.fromkeys((self._control.fileno(), *self._clients), select.POLLIN))
        link = self._link
        if link is not None:
            watched[link.fileno()] = select.POLLIN | (select.POLLOUT if link.waits else 0)
        poller = select.poll()
        for descriptor, events in watched.items():
            poller.register(descriptor, events)
        waits = [each for each in (limit, _ms(self._names.wait())) if each is not None]
        if link is None:
            waits.append(1000)
        ready = dict(poller.poll(min(waits, default=None)))
        self._slirp.poll(ready)
        self._names.poll(ready)
        if link is not None and ready.get(link.fileno(), 0) & ~select.POLLOUT:
            for frame in link.frames():
                self._walls.from_guest(frame)
        for descriptor in ready.keys() & self._clients.keys():
            self._serve(self._clients[descriptor])
        if self._control.fileno() in ready:
            self._accept()
        if self._link is not None:
            self._link.flush()

    def _from_slirp(self, frame: bytes) -> None:
        self._walls.from_slirp(frame)

    def _to_guest(self, frame: bytes) -> None:
        if self._link is not None and not self._link.send(frame):
            self._walls.counters.dropped += 1

    def _ask(self, packet: Any) -> None:
        self._names.ask(packet)

    # The daemon

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            client, _ = self._control.accept()
            if len(self._clients) >= MAX_CLIENTS:  # the oldest's daemon is gone
                self._drop(next(iter(self._clients.values())))
            client.setblocking(False)
            self._clients[client.fileno()] = client

    def _drop(self, client: socket.socket) -> None:
        del self._clients[client.fileno()]
        client.close()

    def _serve(self, client: socket.socket) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(client, wire.MAX_BYTES, 1)
        except BlockingIOError:
            return
        except OSError:
            data, descriptors = b"", []
        if not data:
            self._drop(client)
            return
        try:
            reply = self._do(json.loads(data), descriptors)
        except (ValueError, KeyError, TypeError, StrataboxError) as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        try:
            client.send(json.dumps(reply).encode())
        except OSError:
            self._drop(client)

    def _do(self, order: Mapping[str, Any], descriptors: list[int]) -> dict[str, object]:
        what = order["do"]
        if what in ("attach", "change"):
            self._walls.change(Policy([Rule.parse(text) for text in order["rules"]]))
        if what == "attach":
            if self._link is not None:
                self._link.close()
            self._link = Link(socket.socket(fileno=descriptors.pop()))
        for descriptor in descriptors:
            os.close(descriptor)
        return {"pid": os.getpid(), "counters": dataclasses.asdict(self._walls.counters)}


def _ms(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds * 1000) + 1


def main() -> None:
    """Be a helper. Its words go to the log that it was given as standard error."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", required=True)  # by which it is found again
    parser.add_argument("--control", type=int, required=True)
    parser.add_argument("--uid", type=int)
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Routes() as routes, socket.socket(fileno=arguments.control) as control:
        helper = Helper(control, routes)
        gc.freeze()
        confine(arguments.uid, RESOLV_CONF)
        helper.run()


if __name__ == "__main__":
    try:
        main()
    except (OSError, MemoryError) as error:
        sys.exit(f"the network's helper ends: {error!r}")
