curl https://api.akiralabs.ai/v1/snapshots/list \
  -H "x-api-key: YOUR_API_KEY"
