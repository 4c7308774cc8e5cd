"""Volumes: making and keeping them, and giving them to sandboxes."""
