-- Workspaces: whose each thing is. What there is belongs to the one that there always is.

-- Volumes' names are each workspace's own. The table is made anew, so what refers to it stands aside.
CREATE TEMPORARY TABLE kept_attachments AS SELECT * FROM attachments;
CREATE TEMPORARY TABLE kept_tags AS SELECT * FROM tenki_volume_tags;
DELETE FROM attachments;
DELETE FROM tenki_volume_tags;
CREATE TABLE new_volumes (
    id         TEXT PRIMARY KEY,
    workspace  TEXT NOT NULL,
    name       TEXT NOT NULL,
    state      TEXT NOT NULL,
    reason     TEXT NOT NULL,
    size       INTEGER NOT NULL,
    layer      TEXT UNIQUE REFERENCES layers (id),
    filesystem INTEGER NOT NULL,
    clean      INTEGER NOT NULL,
    source     TEXT,
    metadata   TEXT NOT NULL,
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL,
    generation INTEGER NOT NULL,
    UNIQUE (workspace, name)
) STRICT;
INSERT INTO new_volumes
    SELECT id, 'default', name, state, reason, size, layer, filesystem, clean, source, metadata,
           created_at, updated_at, generation
      FROM volumes;
DROP TABLE volumes;
ALTER TABLE new_volumes RENAME TO volumes;
CREATE INDEX volumes_by_age ON volumes (created_at, id);
CREATE INDEX volumes_by_workspace ON volumes (workspace, created_at, id);
CREATE TRIGGER suspect_of_volume AFTER DELETE ON volumes WHEN OLD.layer IS NOT NULL
    BEGIN INSERT OR IGNORE INTO suspects VALUES (OLD.layer); END;
CREATE TRIGGER suspect_of_changed_volume AFTER UPDATE OF layer ON volumes
    WHEN OLD.layer IS NOT NULL AND OLD.layer IS NOT NEW.layer
    BEGIN INSERT OR IGNORE INTO suspects VALUES (OLD.layer); END;
CREATE TRIGGER chain_hint_of_volume AFTER DELETE ON volumes WHEN OLD.layer IS NOT NULL
    BEGIN INSERT OR IGNORE INTO chain_hints VALUES (OLD.layer); END;
INSERT INTO attachments SELECT * FROM kept_attachments;
INSERT INTO tenki_volume_tags SELECT * FROM kept_tags;
DROP TABLE kept_attachments;
DROP TABLE kept_tags;

-- Idempotency keys are their callers', too.
CREATE TABLE new_idempotency (
    workspace  TEXT NOT NULL,
    key        TEXT NOT NULL,
    method     TEXT NOT NULL,
    request    TEXT NOT NULL,               -- SHA-256 of the request without its key
    outcome    TEXT NOT NULL,               -- ids of what it made, as JSON
    created_at TEXT NOT NULL,
    PRIMARY KEY (workspace, key)
) STRICT;
INSERT INTO new_idempotency SELECT 'default', key, method, request, outcome, created_at FROM idempotency;
DROP TABLE idempotency;
ALTER TABLE new_idempotency RENAME TO idempotency;
CREATE INDEX idempotency_by_age ON idempotency (created_at);

CREATE TABLE workspaces (
    name       TEXT PRIMARY KEY,
    created_at TEXT NOT NULL,
    sandboxes  INTEGER,                     -- the most that it may have; NULL: as much as there is
    cpus       INTEGER,
    memory     INTEGER,                     -- MiB
    disk       INTEGER,                     -- bytes
    snapshots  INTEGER
) STRICT;
INSERT INTO workspaces (name, created_at) VALUES ('default', '1970-01-01T00:00:00.000000+00:00');

ALTER TABLE sandboxes ADD COLUMN workspace TEXT NOT NULL DEFAULT 'default';
ALTER TABLE snapshots ADD COLUMN workspace TEXT NOT NULL DEFAULT 'default';
ALTER TABLE volume_snapshots ADD COLUMN workspace TEXT NOT NULL DEFAULT 'default';
ALTER TABLE jobs ADD COLUMN workspace TEXT NOT NULL DEFAULT 'default';     -- '': nobody's
-- Bytes that one which is being taken will keep, as far as that is known.
ALTER TABLE snapshots ADD COLUMN reserved INTEGER NOT NULL DEFAULT 0;

DROP INDEX sandboxes_by_name;
CREATE INDEX sandboxes_by_name ON sandboxes (name, workspace);
CREATE INDEX sandboxes_by_workspace ON sandboxes (workspace, created_at, id);
CREATE INDEX sandboxes_alive ON sandboxes (workspace, cpus, memory) WHERE state != 'terminated';
DROP INDEX snapshots_by_name;
CREATE INDEX snapshots_by_name ON snapshots (name, workspace, created_at, id);
CREATE INDEX snapshots_by_workspace ON snapshots (workspace, created_at, id);
CREATE INDEX volume_snapshots_by_workspace ON volume_snapshots (workspace, created_at, id);
