"""Puts Tenki's services together: each topic's calls."""

from __future__ import annotations

from stratabox.daemon.lifecycle.inside.accounts import Accounts
from stratabox.daemon.tenki.account import AccountCalls
from stratabox.daemon.tenki.data_plane import DataPlaneCalls
from stratabox.daemon.tenki.data_plane_dial import Dials
from stratabox.daemon.tenki.data_plane_files import SessionFiles
from stratabox.daemon.tenki.data_plane_run import Runs
from stratabox.daemon.tenki.data_plane_tunnel import Tunnels
from stratabox.daemon.tenki.git import Git
from stratabox.daemon.tenki.guest_calls import GuestCalls
from stratabox.daemon.tenki.guest_paths import HOME, USER
from stratabox.daemon.tenki.life import LifeCalls
from stratabox.daemon.tenki.lists import ListCalls
from stratabox.daemon.tenki.parts import Parts
from stratabox.daemon.tenki.previews import PreviewCalls
from stratabox.daemon.tenki.services import TenkiServices
from stratabox.daemon.tenki.sessions import SessionCalls
from stratabox.daemon.tenki.snapshots import SnapshotCalls
from stratabox.daemon.tenki.ssh_keys import SshKeys
from stratabox.daemon.tenki.volumes import VolumeCalls


def tenki_services(parts: Parts) -> TenkiServices:
    """All that is served of Tenki's."""
    accounts = Accounts(parts.guests, USER, HOME)
    runs = Runs(commands=parts.commands, accounts=accounts)
    keys = SshKeys(callers=parts.callers, files=parts.files, accounts=accounts)
    return TenkiServices(
        control=[
            SessionCalls(parts=parts, keys=keys, accounts=accounts),
            PreviewCalls(parts=parts),
            LifeCalls(parts=parts),
            ListCalls(parts=parts),
            SnapshotCalls(parts=parts),
            VolumeCalls(parts=parts, accounts=accounts),
            AccountCalls(parts=parts),
            GuestCalls(
                parts=parts,
                git=Git(runs=runs),
                keys=keys,
            ),
        ],
        data_plane=[
            DataPlaneCalls(
                parts=parts,
                runs=runs,
                files=SessionFiles(files=parts.files, accounts=accounts),
                dials=Dials(callers=parts.callers),
                tunnels=Tunnels(callers=parts.callers),
            ),
        ],
    )
