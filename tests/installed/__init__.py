"""`make test-systemd`: the units and the Debian package, run for real under an init of their own.

A sandbox of Stratabox's own is the *outer host*: Debian with systemd and what the package depends
on. The package is installed in it. What stands before a check comes from a memory snapshot of the
outer host, so each check has a host for itself, on which nothing else has happened.

```
an outer host boots ─▶ fresh: the package is installed ─▶ each check, in a copy of its own
```

- `package` builds the package;
- `outer` makes outer hosts, and runs commands and API calls in them; `stages` are their instants;
- ``checks/`` are the checks, named so that only `make test-systemd` finds them.
"""
