"""What the integration tests stand on: real daemons with real guests."""
