tenki sandbox create --name debugbox
tenki sandbox exec --session <session-id> bash -lc 'apt-get update && apt-get install -y strace'
tenki sandbox snapshot create --session <session-id> --name with-strace --wait-timeout 10m
tenki sandbox terminate --session <session-id>

# Later, restore the prepared environment
tenki sandbox snapshot restore <snapshot-id> --name debugbox-restored
