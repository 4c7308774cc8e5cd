"""`make test-kvm`: the memory engine's tests on KVM, also on a host that has none.

QEMU's emulation (TCG) of an AMD CPU has SVM; so a guest of it, the *outer* one, has a /dev/kvm that
works, and in it the tests start their guests with accel=kvm. This shows function, not speed.

- `image` builds the outer guest's disk, and keeps it;
- `payload` makes the disk with this source tree, the tests and the tiny image;
- `outer` runs the guest and passes on what it says;
- ``guest/`` is what runs in it besides Python; ``inside/`` are tests for in there alone.
"""
