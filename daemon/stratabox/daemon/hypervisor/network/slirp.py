"""libslirp, by ctypes: a TCP/IP stack that turns a guest's connections into this process's sockets.

QEMU's own user network is this very library, so it is there wherever QEMU can do that. What is used
is in libslirp since 4.7 (Debian 12, Ubuntu 24.04) and stable; fields of a later version are never
set. It is not thread-safe: one instance, one thread.
"""

from __future__ import annotations

import ctypes
import ipaddress
import select
import sys
import time
from collections.abc import Callable, Mapping

from stratabox.daemon.hypervisor.network import addresses
from stratabox.storage.model.network import OWN_NETWORK

LIBRARY = "libslirp.so.0"
CONFIG_VERSION = 3
"""The one that brought `disable_dns`: libslirp 4.3 and later."""

_IN, _OUT, _PRI, _ERR, _HUP = 1, 2, 4, 8, 16
_TO_POLL = (
    (_IN, select.POLLIN),
    (_OUT, select.POLLOUT),
    (_PRI, select.POLLPRI),
    (_ERR, select.POLLERR),
    (_HUP, select.POLLHUP),
)
_FOREVER = 0xFFFFFFFF

_In = ctypes.c_uint32
_In6 = ctypes.c_uint8 * 16
_Write = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_Error = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_void_p)
_Clock = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)
_TimerNew = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
_TimerFree = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
_TimerMod = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
_PollFd = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p)
_Notify = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_AddPoll = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
_Revents = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p)


class _Callbacks(ctypes.Structure):
    _fields_ = (
        ("send_packet", _Write),
        ("guest_error", _Error),
        ("clock_get_ns", _Clock),
        ("timer_new", _TimerNew),
        ("timer_free", _TimerFree),
        ("timer_mod", _TimerMod),
        ("register_poll_fd", _PollFd),
        ("unregister_poll_fd", _PollFd),
        ("notify", _Notify),
        # Of version 4, which is not asked for; there so that nothing is read beyond the end.
        ("init_completed", ctypes.c_void_p),
        ("timer_new_opaque", ctypes.c_void_p),
    )


class _Config(ctypes.Structure):
    _fields_ = (
        ("version", ctypes.c_uint32),
        ("restricted", ctypes.c_int),
        ("in_enabled", ctypes.c_bool),
        ("vnetwork", _In),
        ("vnetmask", _In),
        ("vhost", _In),
        ("in6_enabled", ctypes.c_bool),
        ("vprefix_addr6", _In6),
        ("vprefix_len", ctypes.c_uint8),
        ("vhost6", _In6),
        ("vhostname", ctypes.c_char_p),
        ("tftp_server_name", ctypes.c_char_p),
        ("tftp_path", ctypes.c_char_p),
        ("bootfile", ctypes.c_char_p),
        ("vdhcp_start", _In),
        ("vnameserver", _In),
        ("vnameserver6", _In6),
        ("vdnssearch", ctypes.c_void_p),
        ("vdomainname", ctypes.c_char_p),
        ("if_mtu", ctypes.c_size_t),
        ("if_mru", ctypes.c_size_t),
        ("disable_host_loopback", ctypes.c_bool),
        ("enable_emu", ctypes.c_bool),
        ("outbound_addr", ctypes.c_void_p),
        ("outbound_addr6", ctypes.c_void_p),
        ("disable_dns", ctypes.c_bool),
        ("disable_dhcp", ctypes.c_bool),
    )


def load() -> ctypes.CDLL:
    """The library. :raise OSError: when it is not on this host."""
    library = ctypes.CDLL(LIBRARY)
    library.slirp_new.restype = ctypes.c_void_p
    library.slirp_new.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    library.slirp_cleanup.restype = None
    library.slirp_cleanup.argtypes = [ctypes.c_void_p]
    library.slirp_input.restype = None
    library.slirp_input.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int]
    library.slirp_pollfds_fill.restype = None
    library.slirp_pollfds_fill.argtypes = [
        ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint32), _AddPoll, ctypes.c_void_p,
    ]  # fmt: skip
    library.slirp_pollfds_poll.restype = None
    library.slirp_pollfds_poll.argtypes = [
        ctypes.c_void_p, ctypes.c_int, _Revents, ctypes.c_void_p,
    ]  # fmt: skip
    return library


class Slirp:
    """One network 10.0.2.0/24 with a gateway, DHCP, and neither names nor the host's loopback.

    :param send: takes each frame for the guest.
    :raise OSError: when there is no libslirp, or it refuses.
    """

    def __init__(self, send: Callable[[bytes], None]) -> None:
        self._library = load()
        self._watched: dict[int, int] = {}
        self._indexes: list[int] = []
        self._ready: Mapping[int, int] = {}

        def send_packet(buffer: int, length: int, _: int) -> int:
            send(ctypes.string_at(buffer, length))
            return length

        def add_poll(fd: int, events: int, _: int) -> int:
            self._watched[fd] = self._watched.get(fd, 0) | _masked(events, to_poll=True)
            self._indexes.append(fd)
            return len(self._indexes) - 1

        def revents(index: int, _: int) -> int:
            return _masked(self._ready.get(self._indexes[index], 0), to_poll=False)

        self._add_poll = _AddPoll(add_poll)
        self._revents = _Revents(revents)
        # Kept here: the library only has their addresses.
        self._callbacks = _Callbacks(
            send_packet=_Write(send_packet),
            guest_error=_Error(lambda message, _: None),  # said by the guest, for nobody to read
            clock_get_ns=_Clock(lambda _: time.monotonic_ns()),
            # Only IPv6, which is off, has timers.
            timer_new=_TimerNew(lambda callback, its, _: None),
            timer_free=_TimerFree(lambda timer, _: None),
            timer_mod=_TimerMod(lambda timer, expire, _: None),
            register_poll_fd=_PollFd(lambda fd, _: None),
            unregister_poll_fd=_PollFd(lambda fd, _: None),
            notify=_Notify(lambda _: None),
        )
        config = _Config(
            version=CONFIG_VERSION,
            in_enabled=True,
            vnetwork=_in(int(OWN_NETWORK.network_address)),
            vnetmask=_in(int(OWN_NETWORK.netmask)),
            vhost=_in(addresses.GATEWAY),
            vdhcp_start=_in(addresses.FIRST_GUEST),
            vnameserver=_in(addresses.NAME_SERVER),
            disable_host_loopback=True,
            disable_dns=True,
        )
        self._slirp = self._library.slirp_new(
            ctypes.byref(config), ctypes.byref(self._callbacks), None
        )
        if not self._slirp:
            raise OSError(f"{LIBRARY} is too old: 4.7 or later is needed")

    def input(self, frame: bytes) -> None:
        """Take a frame of the guest's."""
        self._library.slirp_input(self._slirp, frame, len(frame))

    def fill(self) -> tuple[Mapping[int, int], int | None]:
        """What to poll for, descriptor → events of `select`, and for how many ms at most."""
        self._watched.clear()
        self._indexes.clear()
        timeout = ctypes.c_uint32(_FOREVER)
        self._library.slirp_pollfds_fill(self._slirp, ctypes.byref(timeout), self._add_poll, None)
        return self._watched, None if timeout.value == _FOREVER else timeout.value

    def poll(self, ready: Mapping[int, int]) -> None:
        """Do what there is to do, after each `fill`.

        :param ready: what `select` has told of the descriptors.
        """
        self._ready = ready
        self._library.slirp_pollfds_poll(self._slirp, 0, self._revents, None)


def _masked(events: int, *, to_poll: bool) -> int:
    mask = 0
    for ours, theirs in _TO_POLL:
        source, target = (ours, theirs) if to_poll else (theirs, ours)
        if events & source:
            mask |= target
    return mask


def _in(address: int) -> int:
    """An address in the byte order of `struct in_addr`."""
    return int.from_bytes(ipaddress.IPv4Address(address).packed, sys.byteorder)
