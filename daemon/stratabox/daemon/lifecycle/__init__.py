"""The use cases and their state machines.

`world` is what they all share: the configuration, the catalog behind its worker thread, the store,
the launcher, the event bus. `policy` decides, purely; `admission` says whether there is room.

| where | what |
|---|---|
| `sandboxes`, `changing`, `clones`, `reverts` | sandboxes made, changed, copied, put back, ended |
| `snapshots`, `capture`, `saving` | snapshots kept and deleted; one taken, step by step |
| `images` | images built, imported, deleted |
| `running` | one sandbox's running side: `guest` is the only writer of its state |
| `memory` | saved memory in use: ready to be mapped, spares, merging |
| `upkeep` | what nobody asks for: recovery at start, expiry, checks, the host's clock |
| `common` | events, threads, idempotent calls, made-up names |

Nothing here knows gRPC, and nothing imports a launcher.
"""
