curl -X POST https://api.akiralabs.ai/v1/sandboxes/{sandbox_id}/clone \
  -H "x-api-key: YOUR_API_KEY" \
  -H "Content-Type: application/json" \
  -d '{
    "name": "my-cloned-sandbox",
    "snapshot_name": "clone-backup-1",
    "resources": {
      "cpus": 2,
      "memory": 1024
    }
  }'
