-- Times are ISO 8601 in UTC with microseconds; ids are UUIDs; JSON columns are objects or arrays.

CREATE TABLE store (
    id         TEXT NOT NULL,               -- tells this store's domains from others on the host
    boot_id    TEXT NOT NULL,               -- the host's boot during which the daemon last ran
    generation INTEGER NOT NULL             -- the last generation given to any record
) STRICT;

CREATE TABLE layers (
    id         TEXT PRIMARY KEY,
    parent     TEXT REFERENCES layers (id),
    state      TEXT NOT NULL CHECK (state IN ('active', 'sealed', 'garbage')),
    size       INTEGER NOT NULL,
    created_at TEXT NOT NULL,
    sealed_at  TEXT
) STRICT;
CREATE INDEX layers_by_parent ON layers (parent);

CREATE TABLE images (
    id           TEXT PRIMARY KEY,
    name         TEXT NOT NULL UNIQUE,
    state        TEXT NOT NULL,
    origin       TEXT NOT NULL,
    layer        TEXT REFERENCES layers (id),
    size         INTEGER NOT NULL,
    kernel       TEXT,
    initrd       TEXT,
    command_line TEXT,
    created_at   TEXT NOT NULL,
    generation   INTEGER NOT NULL
) STRICT;

CREATE TABLE sandboxes (
    id              TEXT PRIMARY KEY,
    name            TEXT NOT NULL,
    state           TEXT NOT NULL,
    state_reason    TEXT NOT NULL,
    ready           INTEGER NOT NULL,
    clean_shutdown  INTEGER NOT NULL,
    image           TEXT NOT NULL,          -- no foreign key: a terminated record outlives its image
    image_name      TEXT NOT NULL,
    source_snapshot TEXT,                   -- likewise
    cpus            INTEGER NOT NULL,
    memory          INTEGER NOT NULL,
    storage         INTEGER NOT NULL,
    machine         TEXT NOT NULL,
    env             TEXT NOT NULL,
    metadata        TEXT NOT NULL,
    tags            TEXT NOT NULL,
    uid             INTEGER UNIQUE,         -- given back when terminated
    vmgenid         TEXT NOT NULL,
    created_at      TEXT NOT NULL,
    updated_at      TEXT NOT NULL,
    started_at      TEXT,
    ready_at        TEXT,
    terminated_at   TEXT,
    generation      INTEGER NOT NULL
) STRICT;
CREATE INDEX sandboxes_by_name ON sandboxes (name);
CREATE INDEX sandboxes_by_age ON sandboxes (created_at, id);

CREATE TABLE disks (
    sandbox TEXT NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
    idx     INTEGER NOT NULL,
    layer   TEXT NOT NULL UNIQUE REFERENCES layers (id),  -- one writer for each active layer
    size    INTEGER NOT NULL,
    serial  TEXT NOT NULL,
    PRIMARY KEY (sandbox, idx)
) STRICT;

CREATE TABLE snapshots (
    id                  TEXT PRIMARY KEY,
    name                TEXT NOT NULL,
    state               TEXT NOT NULL,
    requested_level     TEXT,
    consistency         TEXT,
    source_sandbox      TEXT NOT NULL,      -- no foreign key: a snapshot outlives its sandbox
    source_sandbox_name TEXT NOT NULL,
    image               TEXT NOT NULL,
    image_name          TEXT NOT NULL,
    cpus                INTEGER NOT NULL,
    memory              INTEGER NOT NULL,
    storage             INTEGER NOT NULL,
    machine             TEXT NOT NULL,
    env                 TEXT NOT NULL,
    metadata            TEXT NOT NULL,
    created_at          TEXT NOT NULL,
    ready_at            TEXT,
    expires_at          TEXT,
    failure_reason      TEXT NOT NULL,
    frozen              INTEGER NOT NULL,
    stall_us            INTEGER,
    layer_bytes         INTEGER NOT NULL,
    parent              TEXT,
    generation          INTEGER NOT NULL
) STRICT;
CREATE INDEX snapshots_by_name ON snapshots (name);
CREATE INDEX snapshots_by_age ON snapshots (created_at, id);
CREATE INDEX snapshots_by_source ON snapshots (source_sandbox);

CREATE TABLE snapshot_disks (
    snapshot TEXT NOT NULL REFERENCES snapshots (id) ON DELETE CASCADE,
    idx      INTEGER NOT NULL,
    layer    TEXT NOT NULL REFERENCES layers (id),
    size     INTEGER NOT NULL,
    serial   TEXT NOT NULL,
    PRIMARY KEY (snapshot, idx)
) STRICT;
CREATE INDEX snapshot_disks_by_layer ON snapshot_disks (layer);

-- What is under way, written before the first side effect, removed with the last: what a daemon
-- that was killed finds here at its next start, it finishes or undoes.
CREATE TABLE operations (
    id         TEXT PRIMARY KEY,
    kind       TEXT NOT NULL,
    sandbox    TEXT,
    snapshot   TEXT,
    payload    TEXT NOT NULL,
    created_at TEXT NOT NULL
) STRICT;

CREATE TABLE idempotency (
    key        TEXT PRIMARY KEY,
    method     TEXT NOT NULL,
    request    TEXT NOT NULL,               -- SHA-256 of the request without its key
    outcome    TEXT NOT NULL,               -- ids of what it made, as JSON
    created_at TEXT NOT NULL
) STRICT;
