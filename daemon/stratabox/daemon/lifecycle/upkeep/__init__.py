"""What goes on without anybody asking: recovery at start, expiry, checks, the host's clock."""
