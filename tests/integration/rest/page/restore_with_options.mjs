const restoredSandbox = await client.snapshots.restore(snapshot.id, {
  name: 'restored-sandbox',
  resources: { cpus: 2, memory: 4096 },  // Optional overrides
  wait_for_ready: true,
});
