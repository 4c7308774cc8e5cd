-- Pausing to disk, limits of time, and what a guest that goes on from saved memory must be told.

ALTER TABLE sandboxes ADD COLUMN ram_parked TEXT;
ALTER TABLE sandboxes ADD COLUMN identity_due TEXT;
ALTER TABLE sandboxes ADD COLUMN expires_at TEXT;
ALTER TABLE sandboxes ADD COLUMN on_timeout TEXT NOT NULL DEFAULT 'terminate';
CREATE INDEX sandboxes_by_expiry ON sandboxes (expires_at) WHERE expires_at IS NOT NULL;
