"""What the daemon and systemd say to each other, where systemd started it; else nothing is said.

``notifying`` tells that it is ready and alive, ``activation`` takes the API's socket that is open
already, ``scopes`` has guests put into control groups of their own.
"""
