-- Memory snapshots: one RAM file and one file of device state each, under the snapshot's id. A row
-- outlives its snapshot for as long as another RAM file, or a running process, stands on it.

CREATE TABLE rams (
    id           TEXT PRIMARY KEY,
    parent       TEXT REFERENCES rams (id),
    own_bytes    INTEGER NOT NULL,
    state_sha256 TEXT NOT NULL,
    tracking     TEXT NOT NULL,
    pause_us     INTEGER NOT NULL,
    cpu_features TEXT NOT NULL
) STRICT;
CREATE INDEX rams_by_parent ON rams (parent);

ALTER TABLE sandboxes ADD COLUMN ram_origin TEXT;
ALTER TABLE sandboxes ADD COLUMN ram_since TEXT;
