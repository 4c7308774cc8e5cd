"""`make test-systemd`: the units and the Debian package, run for real under an init of their own.

There are two kinds of hosts. A sandbox of Stratabox's own is an *outer host*: a whole machine, with
a kernel and all its controllers, in which guests would take minutes. What stands before a check
comes from a memory snapshot of it. A *container* of systemd-nspawn has this host's kernel, and
guests in it are as quick as here. What stands before a check is the lower layer of its root folder.

```
an outer host boots ─▶ fresh: the package is installed ─▶ each check, in a copy of its own
a root folder       ─▶ stocked: … and has a snapshot   ─▶ each check, in a layer of its own
```

- `package` builds the package, and others of other versions;
- `host` is what all hosts can be asked; `outer` and `container` are the two kinds, `stages` what
  checks start from;
- `guests` finds guests in a host; `load` has clients at work on one;
- ``checks/`` are the checks, named so that only `make test-systemd` finds them.
"""
