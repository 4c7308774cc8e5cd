"""qcow2 files: `header` reads what a file claims to be, `empty` makes an overlay, `qemu_img`
does all else.

A file from outside is judged by `header` alone before any other program opens it.
"""
