"""Figures for Prometheus, where an address is set for them; imported only then.

``figures`` counts what happens and looks at what is there, ``serving`` answers at `/metrics`. What
single sandboxes use is MetricsService's: their number has no bound, so they are no labels here.
"""
