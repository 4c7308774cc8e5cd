"""Asks the kernel whether an address is this host's own.

The kernel's routing decides it, at the moment that it is asked: all addresses of all interfaces of
this network namespace, those that were added since the start, local routes, broadcast addresses.
"""

from __future__ import annotations

import errno
import socket
import struct

_RTM_GETROUTE = 26
_RTM_NEWROUTE = 24
_NLM_F_REQUEST = 1
_RTA_DST = 1
_NLMSG = struct.Struct("=LHHLL")
_RTMSG = struct.Struct("=BBBBBBBBL")
_RTN_UNICAST = 1
_SIZE = 8192


class Routes:
    """Questions to the kernel; a context manager."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._socket.settimeout(1)
        self._number = 0

    def __enter__(self) -> Routes:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def is_host(self, address: int) -> bool:
        """Tell whether packets for an address stay on this host.

        An address to which there is no route is nobody's, so not the host's either. What the kernel
        does not say clearly counts as the host's.
        """
        self._number += 1
        attribute = struct.pack("=HH", 8, _RTA_DST) + address.to_bytes(4, "big")
        body = _RTMSG.pack(socket.AF_INET, 32, 0, 0, 0, 0, 0, 0, 0) + attribute
        head = _NLMSG.pack(16 + len(body), _RTM_GETROUTE, _NLM_F_REQUEST, self._number, 0)
        self._socket.send(head + body)
        while True:
            try:
                reply = self._socket.recv(_SIZE)
            except TimeoutError:
                return True
            _, kind, _, number, _ = _NLMSG.unpack_from(reply)
            if number == self._number:
                break
        if kind != _RTM_NEWROUTE:
            code = -int.from_bytes(reply[16:20], "little", signed=True)
            return code not in (errno.ENETUNREACH, errno.EHOSTUNREACH)
        return bool(_RTMSG.unpack_from(reply, 16)[7] != _RTN_UNICAST)
