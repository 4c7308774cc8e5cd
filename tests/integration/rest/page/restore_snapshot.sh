curl -X POST https://api.akiralabs.ai/v1/snapshots/{snapshot_id}/restore \
  -H "x-api-key: YOUR_API_KEY" \
  -H "Content-Type: application/json" \
  -d '{"name": "restored-sandbox"}'
