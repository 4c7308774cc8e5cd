"""Records as messages, with what other tables say of them."""

from __future__ import annotations

from collections.abc import Sequence

from stratabox.daemon.tenki import convert
from stratabox.daemon.tenki.parts import Parts
from stratabox.storage.catalog import tenki_sessions
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.model.ids import SandboxId
from stratabox.storage.model.records import Sandbox
from stratabox.tenki.v1 import records_pb2


def of_sessions(
    tx: Transaction, parts: Parts, records: Sequence[Sandbox]
) -> list[records_pb2.SandboxSession]:
    """Sessions' messages, in their order. Inside the transaction that the records were read in."""
    ids = [record.id for record in records]
    known = tenki_sessions.of_all(tx, ids)
    counts = tenki_sessions.snapshots_of_all(tx, ids)
    return [
        convert.session(
            record,
            known[record.id],
            pausing=record.id in parts.pausing,
            snapshots=counts[record.id].number,
            snapshot_bytes=counts[record.id].bytes,
        )
        for record in records
    ]


async def of_session(parts: Parts, record: Sandbox) -> records_pb2.SandboxSession:
    """One session's message."""
    return (await parts.world.read(lambda tx: of_sessions(tx, parts, [record])))[0]


async def of_session_now(parts: Parts, session: SandboxId) -> records_pb2.SandboxSession:
    """The message of a session as it is now. :raise NotFoundError: SANDBOX_NOT_FOUND."""
    _, record = await parts.guests.find(session)
    return await of_session(parts, record)
