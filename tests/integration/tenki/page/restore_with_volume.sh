tenki sandbox create --snapshot <snapshot-id> --volume <volume-id>:/workspace/cache
