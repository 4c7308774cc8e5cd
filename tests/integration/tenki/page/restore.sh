tenki sandbox snapshot restore <snapshot-id> --name restored-copy
