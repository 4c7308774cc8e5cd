tenki sandbox snapshot restore <snapshot-id> \
  --name restored-copy \
  # Re-attach with the underlying create call:
  # (use `tenki sandbox create --snapshot ... --volume ...` directly)
