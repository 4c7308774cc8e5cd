-- Chains that are kept short, snapshots that are taken and kept by the clock, volumes.

-- What a file's header names as its backing file; `parent`, which rules, may become another one.
ALTER TABLE layers ADD COLUMN backing TEXT;
UPDATE layers SET backing = parent;
ALTER TABLE layers ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0;       -- on the disk, once sealed
ALTER TABLE layers ADD COLUMN compressed INTEGER NOT NULL DEFAULT 0;
ALTER TABLE layers ADD COLUMN sha256 TEXT;                            -- of the file, once asked for
-- Once it was exported or imported: of the clusters that it holds, however its file stores them;
-- and of all that is read through it, which stays the same whatever is merged below.
ALTER TABLE layers ADD COLUMN content TEXT;
ALTER TABLE layers ADD COLUMN reads_as TEXT;
CREATE INDEX layers_by_reads_as ON layers (reads_as) WHERE reads_as IS NOT NULL;

CREATE TABLE jobs (
    id          TEXT PRIMARY KEY,
    kind        TEXT NOT NULL,
    state       TEXT NOT NULL,
    layer       TEXT NOT NULL,              -- the top of what is written anew; no foreign key: it goes
    base        TEXT,                       -- the layer that the new one stands on
    target      TEXT NOT NULL,              -- id of the new layer
    done_bytes  INTEGER NOT NULL,
    total_bytes INTEGER NOT NULL,
    reason      TEXT NOT NULL,
    created_at  TEXT NOT NULL,
    started_at  TEXT,
    ended_at    TEXT
) STRICT;
CREATE INDEX jobs_by_state ON jobs (state, created_at);

ALTER TABLE sandboxes ADD COLUMN keep_last INTEGER NOT NULL DEFAULT 0;
ALTER TABLE sandboxes ADD COLUMN schedule_every INTEGER;              -- seconds
ALTER TABLE sandboxes ADD COLUMN schedule_level TEXT;
ALTER TABLE sandboxes ADD COLUMN schedule_next_at TEXT;
ALTER TABLE sandboxes ADD COLUMN left_behind TEXT NOT NULL DEFAULT '[]';
CREATE INDEX sandboxes_by_schedule ON sandboxes (schedule_next_at)
    WHERE schedule_next_at IS NOT NULL;
ALTER TABLE snapshots ADD COLUMN volumes TEXT NOT NULL DEFAULT '[]';

CREATE TABLE volumes (
    id         TEXT PRIMARY KEY,
    name       TEXT NOT NULL UNIQUE,
    state      TEXT NOT NULL,
    reason     TEXT NOT NULL,
    size       INTEGER NOT NULL,
    layer      TEXT UNIQUE REFERENCES layers (id),   -- its active layer, once there is one
    filesystem INTEGER NOT NULL,                     -- size that the file system has been grown to
    clean      INTEGER NOT NULL,                     -- it needs no recovery
    source     TEXT,                                 -- the volume or volume snapshot it was made from
    metadata   TEXT NOT NULL,
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL,
    generation INTEGER NOT NULL
) STRICT;
CREATE INDEX volumes_by_age ON volumes (created_at, id);

CREATE TABLE attachments (
    volume    TEXT NOT NULL REFERENCES volumes (id),
    sandbox   TEXT NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
    path      TEXT NOT NULL,
    read_only INTEGER NOT NULL,
    slot      INTEGER NOT NULL,             -- where it is on the sandbox's bus
    state     TEXT NOT NULL,
    PRIMARY KEY (volume, sandbox),
    UNIQUE (sandbox, slot),
    UNIQUE (sandbox, path)
) STRICT;
CREATE INDEX attachments_by_sandbox ON attachments (sandbox);
-- One writer, or any number of readers.
CREATE UNIQUE INDEX attachments_one_writer ON attachments (volume) WHERE read_only = 0;

CREATE TABLE volume_snapshots (
    id          TEXT PRIMARY KEY,
    name        TEXT NOT NULL,
    volume      TEXT NOT NULL,              -- no foreign key: it outlives its volume
    volume_name TEXT NOT NULL,
    layer       TEXT NOT NULL REFERENCES layers (id),
    size        INTEGER NOT NULL,
    filesystem  INTEGER NOT NULL,
    consistency TEXT NOT NULL,
    created_at  TEXT NOT NULL,
    generation  INTEGER NOT NULL
) STRICT;
CREATE INDEX volume_snapshots_by_age ON volume_snapshots (created_at, id);
CREATE INDEX volume_snapshots_by_layer ON volume_snapshots (layer);

-- Space: what sealed layers and saved memory take is summed up as they come and go.
ALTER TABLE rams ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0;         -- of its files, on the disk
ALTER TABLE store ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0;        -- of layers and rams together
ALTER TABLE store ADD COLUMN chains INTEGER NOT NULL DEFAULT 0;       -- changes of sealed layers
CREATE TRIGGER layers_chain_changed AFTER UPDATE OF parent, bytes ON layers
    WHEN OLD.state = 'sealed' AND (NEW.parent IS NOT OLD.parent OR NEW.bytes != OLD.bytes)
    BEGIN UPDATE store SET chains = chains + 1; END;
CREATE TRIGGER layers_bytes_new AFTER INSERT ON layers WHEN NEW.bytes != 0
    BEGIN UPDATE store SET bytes = bytes + NEW.bytes; END;
CREATE TRIGGER layers_bytes_changed AFTER UPDATE OF bytes ON layers WHEN NEW.bytes != OLD.bytes
    BEGIN UPDATE store SET bytes = bytes + NEW.bytes - OLD.bytes; END;
CREATE TRIGGER layers_bytes_gone AFTER DELETE ON layers WHEN OLD.bytes != 0
    BEGIN UPDATE store SET bytes = bytes - OLD.bytes; END;
CREATE TRIGGER rams_bytes_new AFTER INSERT ON rams WHEN NEW.bytes != 0
    BEGIN UPDATE store SET bytes = bytes + NEW.bytes; END;
CREATE TRIGGER rams_bytes_changed AFTER UPDATE OF bytes ON rams WHEN NEW.bytes != OLD.bytes
    BEGIN UPDATE store SET bytes = bytes + NEW.bytes - OLD.bytes; END;
CREATE TRIGGER rams_bytes_gone AFTER DELETE ON rams WHEN OLD.bytes != 0
    BEGIN UPDATE store SET bytes = bytes - OLD.bytes; END;

-- Layers that are new, or have lost a user, a child or a job: only these can be garbage, so a sweep
-- looks at nothing else, however many layers there are.
CREATE TABLE suspects (layer TEXT PRIMARY KEY) WITHOUT ROWID, STRICT;
CREATE TRIGGER suspect_new AFTER INSERT ON layers
    BEGIN INSERT OR IGNORE INTO suspects VALUES (NEW.id); END;
CREATE TRIGGER suspect_of_disk AFTER DELETE ON disks
    BEGIN INSERT OR IGNORE INTO suspects VALUES (OLD.layer); END;
CREATE TRIGGER suspect_of_changed_disk AFTER UPDATE OF layer ON disks
    BEGIN INSERT OR IGNORE INTO suspects VALUES (OLD.layer); END;
CREATE TRIGGER suspect_of_snapshot AFTER DELETE ON snapshot_disks
    BEGIN INSERT OR IGNORE INTO suspects VALUES (OLD.layer); END;
CREATE TRIGGER suspect_of_changed_snapshot AFTER UPDATE OF layer ON snapshot_disks
    BEGIN INSERT OR IGNORE INTO suspects VALUES (OLD.layer); END;
CREATE TRIGGER suspect_of_image AFTER DELETE ON images WHEN OLD.layer IS NOT NULL
    BEGIN INSERT OR IGNORE INTO suspects VALUES (OLD.layer); END;
CREATE TRIGGER suspect_of_changed_image AFTER UPDATE OF layer ON images
    WHEN OLD.layer IS NOT NULL AND OLD.layer IS NOT NEW.layer
    BEGIN INSERT OR IGNORE INTO suspects VALUES (OLD.layer); END;
CREATE TRIGGER suspect_of_volume AFTER DELETE ON volumes WHEN OLD.layer IS NOT NULL
    BEGIN INSERT OR IGNORE INTO suspects VALUES (OLD.layer); END;
CREATE TRIGGER suspect_of_changed_volume AFTER UPDATE OF layer ON volumes
    WHEN OLD.layer IS NOT NULL AND OLD.layer IS NOT NEW.layer
    BEGIN INSERT OR IGNORE INTO suspects VALUES (OLD.layer); END;
CREATE TRIGGER suspect_of_volume_snapshot AFTER DELETE ON volume_snapshots
    BEGIN INSERT OR IGNORE INTO suspects VALUES (OLD.layer); END;
CREATE TRIGGER suspect_of_changed_volume_snapshot AFTER UPDATE OF layer ON volume_snapshots
    BEGIN INSERT OR IGNORE INTO suspects VALUES (OLD.layer); END;
CREATE TRIGGER suspect_of_parent AFTER UPDATE OF parent ON layers
    WHEN OLD.parent IS NOT NULL AND OLD.parent IS NOT NEW.parent
    BEGIN INSERT OR IGNORE INTO suspects VALUES (OLD.parent); END;
CREATE TRIGGER suspect_of_child AFTER DELETE ON layers WHEN OLD.parent IS NOT NULL
    BEGIN INSERT OR IGNORE INTO suspects VALUES (OLD.parent); END;
CREATE TRIGGER suspect_of_job AFTER UPDATE OF state ON jobs
    BEGIN
        INSERT OR IGNORE INTO suspects VALUES (OLD.layer), (OLD.target), (coalesce(OLD.base, ''));
    END;
CREATE TRIGGER suspect_of_job_gone AFTER DELETE ON jobs
    BEGIN
        INSERT OR IGNORE INTO suspects VALUES (OLD.layer), (OLD.target), (coalesce(OLD.base, ''));
    END;
CREATE INDEX layers_by_state ON layers (state) WHERE state != 'sealed';
CREATE INDEX images_by_layer ON images (layer);

-- Saved memory whose snapshot is gone or never was: all that a sweep or a merge looks at.
ALTER TABLE rams ADD COLUMN ownerless INTEGER NOT NULL DEFAULT 0;
UPDATE rams SET ownerless = 1 WHERE id NOT IN (SELECT id FROM snapshots);
CREATE TRIGGER ownerless_new AFTER INSERT ON rams
    WHEN NOT EXISTS (SELECT 1 FROM snapshots WHERE id = NEW.id)
    BEGIN UPDATE rams SET ownerless = 1 WHERE id = NEW.id; END;
CREATE TRIGGER ownerless_now AFTER DELETE ON snapshots
    BEGIN UPDATE rams SET ownerless = 1 WHERE id = OLD.id; END;
CREATE INDEX rams_ownerless ON rams (id) WHERE ownerless;
CREATE INDEX sandboxes_by_ram_origin ON sandboxes (ram_origin) WHERE ram_origin IS NOT NULL;
CREATE INDEX sandboxes_by_ram_since ON sandboxes (ram_since) WHERE ram_since IS NOT NULL;
CREATE INDEX sandboxes_by_ram_parked ON sandboxes (ram_parked) WHERE ram_parked IS NOT NULL;

-- What is asked for again and again, among very many.
DROP INDEX snapshots_by_name;
DROP INDEX snapshots_by_source;
CREATE INDEX snapshots_by_name ON snapshots (name, created_at, id);
CREATE INDEX snapshots_by_source ON snapshots (source_sandbox, created_at, id);
CREATE INDEX snapshots_by_image ON snapshots (image);
CREATE INDEX snapshots_by_expiry ON snapshots (expires_at) WHERE expires_at IS NOT NULL;
CREATE INDEX snapshots_by_parent ON snapshots (parent) WHERE parent IS NOT NULL;
CREATE INDEX idempotency_by_age ON idempotency (created_at);

-- Layers around which chains may have become too long, or hold what nothing needs: all that the
-- planner of jobs looks at, however many layers there are.
CREATE TABLE chain_hints (layer TEXT PRIMARY KEY) STRICT;
INSERT INTO chain_hints SELECT id FROM layers;
CREATE TRIGGER chain_hint_of_child AFTER INSERT ON layers WHEN NEW.parent IS NOT NULL
    BEGIN INSERT OR IGNORE INTO chain_hints VALUES (NEW.parent); END;
CREATE TRIGGER chain_hint_of_seal AFTER UPDATE OF state ON layers
    WHEN NEW.state = 'sealed' AND OLD.state != 'sealed'
    BEGIN INSERT OR IGNORE INTO chain_hints VALUES (NEW.id); END;
CREATE TRIGGER chain_hint_of_parent AFTER UPDATE OF parent ON layers WHEN OLD.parent IS NOT NULL
    BEGIN INSERT OR IGNORE INTO chain_hints VALUES (OLD.parent); END;
CREATE TRIGGER chain_hint_of_gone_child AFTER DELETE ON layers WHEN OLD.parent IS NOT NULL
    BEGIN INSERT OR IGNORE INTO chain_hints VALUES (OLD.parent); END;
CREATE TRIGGER chain_hint_of_disk AFTER DELETE ON disks
    BEGIN INSERT OR IGNORE INTO chain_hints VALUES (OLD.layer); END;
CREATE TRIGGER chain_hint_of_snapshot AFTER DELETE ON snapshot_disks
    BEGIN INSERT OR IGNORE INTO chain_hints VALUES (OLD.layer); END;
CREATE TRIGGER chain_hint_of_image AFTER DELETE ON images WHEN OLD.layer IS NOT NULL
    BEGIN INSERT OR IGNORE INTO chain_hints VALUES (OLD.layer); END;
CREATE TRIGGER chain_hint_of_volume AFTER DELETE ON volumes WHEN OLD.layer IS NOT NULL
    BEGIN INSERT OR IGNORE INTO chain_hints VALUES (OLD.layer); END;
CREATE TRIGGER chain_hint_of_volume_snapshot AFTER DELETE ON volume_snapshots
    BEGIN INSERT OR IGNORE INTO chain_hints VALUES (OLD.layer); END;
