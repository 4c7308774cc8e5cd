tenki sandbox create --snapshot <snapshot-id>
