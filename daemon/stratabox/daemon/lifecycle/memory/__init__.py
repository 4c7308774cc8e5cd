"""Saved memory in use: ready to be mapped, waiting in spares, merged when it is needed less."""
