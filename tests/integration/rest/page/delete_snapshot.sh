curl -X DELETE https://api.akiralabs.ai/v1/snapshots/{snapshot_id} \
  -H "x-api-key: YOUR_API_KEY"
