"""The memory engine's figures, each beside a floor that is measured in the same run.

| module | duty |
|---|---|
| `figures` | one figure, the table, the JSON |
| `bench` | what every measurement is given |
| `rounds` | A B A B …: medians of runs that alternate |
| `product` | a daemon of its own, on a folder of its own, and its client |
| `scene` | what a floor's guest is started with, taken from the daemon's catalog |
| `wire` | QEMU's monitor and the guest's agent, spoken to by hand |
| `load` | guests that write known amounts of memory |
| `floor` | what raw QEMU can do here with no daemon in the way |
| `libvirtd` | a libvirtd of its own; the tests have theirs from here, too |
| `libvirt` | one guest of ours as a domain of another libvirt user's |
| `restores`, `pauses`, `clones`, `chains`, `virsh`, `launchers` | the figures |

Run by ``make bench``; ``python -m bench --help`` says how to choose.
"""
