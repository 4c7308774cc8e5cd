"""qcow2 files: `header` reads what a file claims to be, `qemu_img` makes and changes files.

A file from outside is judged by `header` alone before any other program opens it.
"""
