tenki sandbox snapshot create --session <session-id> --name baseline
