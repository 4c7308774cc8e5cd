"""Seeds: disks by which cloud-init sets a cloud image's guest up at its first boot."""
