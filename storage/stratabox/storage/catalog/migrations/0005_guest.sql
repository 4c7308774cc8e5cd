-- The guest as a place to work: network, ports, probes.

-- Cloud images, and the seeds that they are set up by: blobs that machines name.
ALTER TABLE images ADD COLUMN cloud_init INTEGER NOT NULL DEFAULT 0;
CREATE INDEX sandboxes_by_seed ON sandboxes (json_extract(machine, '$.seed'))
    WHERE json_extract(machine, '$.seed') IS NOT NULL;
CREATE INDEX snapshots_by_seed ON snapshots (json_extract(machine, '$.seed'))
    WHERE json_extract(machine, '$.seed') IS NOT NULL;

-- Ports that are forwarded into guests and out of them; who may log in by a session of sshd.
CREATE TABLE ports (
    id         TEXT PRIMARY KEY,
    sandbox    TEXT NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
    direction  TEXT NOT NULL,
    host       TEXT NOT NULL,               -- JSON: address and port, or path
    guest      TEXT NOT NULL,
    mode       INTEGER NOT NULL,            -- of the Unix socket that listens
    created_at TEXT NOT NULL
) STRICT;
CREATE INDEX ports_by_sandbox ON ports (sandbox, created_at, id);

CREATE TABLE authorized_keys (
    sandbox  TEXT NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
    user     TEXT NOT NULL,
    position INTEGER NOT NULL,
    key      TEXT NOT NULL,
    PRIMARY KEY (sandbox, user, position)
) STRICT;

-- What must pass before a sandbox counts as ready; JSON.
ALTER TABLE sandboxes ADD COLUMN probe TEXT;
ALTER TABLE snapshots ADD COLUMN probe TEXT;

-- What sandboxes may reach; JSON. NULL: nothing for a sandbox, unknown for a snapshot.
ALTER TABLE sandboxes ADD COLUMN network TEXT;
ALTER TABLE snapshots ADD COLUMN network TEXT;

-- When something last changed around a layer that chain_hints names, by store.generation: a job that
-- failed or was cancelled before that is planned again.
CREATE TABLE chain_changes (layer TEXT PRIMARY KEY, generation INTEGER NOT NULL) STRICT;
INSERT INTO chain_changes SELECT layer, (SELECT generation FROM store) FROM chain_hints;
-- BEFORE: also where the hint is there already, and is not inserted.
CREATE TRIGGER chain_change_noted BEFORE INSERT ON chain_hints BEGIN
    DELETE FROM chain_changes WHERE layer = NEW.layer;
    INSERT INTO chain_changes SELECT NEW.layer, generation FROM store;
END;
CREATE TRIGGER chain_change_seen AFTER DELETE ON chain_hints
    BEGIN DELETE FROM chain_changes WHERE layer = OLD.layer; END;
ALTER TABLE jobs ADD COLUMN ended_generation INTEGER NOT NULL DEFAULT 0;
