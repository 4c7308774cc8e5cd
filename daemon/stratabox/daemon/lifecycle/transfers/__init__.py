"""Snapshots and images that go to another store, or come from one.

| module | duty |
|---|---|
| `exports` | what an archive is to hold, opened at one instant; its bytes, as they are asked for |
| `imports` | an archive that comes in: judged, received aside, and made part of the store at once |
| `arriving` | a snapshot on its way in, and what it stands on |
| `portable` | records as they stand in an archive, and back. Pure |
| `contents` | finds layers by what they hold |
| `feed` | drives the parsers of ``storage.files.transfer`` over bytes that come in pieces |
"""
