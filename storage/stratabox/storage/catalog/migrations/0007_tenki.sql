-- What Tenki's API knows of our things that no other part needs.
CREATE TABLE tenki_sessions (
    sandbox           TEXT PRIMARY KEY REFERENCES sandboxes (id) ON DELETE CASCADE,
    owner             TEXT NOT NULL,        -- id of the key that made it; '': the Unix socket
    inbound           INTEGER NOT NULL,
    sticky            INTEGER NOT NULL,
    timeout_at        TEXT,                 -- while it runs; NULL: it has no end of its own
    pause_retention   REAL,                 -- seconds; NULL: as long as anybody likes
    paused_at         TEXT,
    last_resume_error TEXT NOT NULL
) STRICT;

CREATE TABLE tenki_snapshot_tags (
    snapshot TEXT PRIMARY KEY REFERENCES snapshots (id) ON DELETE CASCADE,
    tags     TEXT NOT NULL                  -- JSON
) STRICT;

CREATE TABLE tenki_volume_tags (
    volume TEXT PRIMARY KEY REFERENCES volumes (id) ON DELETE CASCADE,
    tags   TEXT NOT NULL
) STRICT;

-- What the daemon signs with, by what it is for.
CREATE TABLE secrets (
    name  TEXT PRIMARY KEY,
    value BLOB NOT NULL
) STRICT;

-- Previews: names under which browsers find ports of guests.
CREATE TABLE previews (
    id          TEXT PRIMARY KEY,
    workspace   TEXT NOT NULL,
    slug        TEXT NOT NULL,
    token       TEXT NOT NULL UNIQUE,       -- what nobody can guess
    exposed     INTEGER NOT NULL,           -- 1: gone when it is not bound any more
    sandbox     TEXT REFERENCES sandboxes (id) ON DELETE SET NULL,
    port        INTEGER,
    expires_at  TEXT,
    created_at  TEXT NOT NULL,
    updated_at  TEXT NOT NULL,
    accessed_at TEXT,
    UNIQUE (workspace, slug)
) STRICT;
CREATE INDEX previews_by_sandbox ON previews (sandbox, port);
CREATE INDEX previews_by_age ON previews (workspace, created_at, id);
