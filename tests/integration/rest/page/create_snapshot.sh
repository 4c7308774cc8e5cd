curl -X POST https://api.akiralabs.ai/v1/sandboxes/{sandbox_id}/snapshot \
  -H "x-api-key: YOUR_API_KEY" \
  -H "Content-Type: application/json" \
  -d '{
    "name": "my-backup"
  }'
