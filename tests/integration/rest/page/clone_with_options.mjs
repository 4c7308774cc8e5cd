const result = await client.sandboxes.clone(sandbox.id, {
  // Name for the cloned sandbox (auto-generated if not provided)
  name: 'my-cloned-sandbox',
 
  // Custom name for the intermediate snapshot
  snapshot_name: 'clone-backup-1',
 
  // Override resources (storage is inherited from source)
  resources: {
    cpus: 4,      // 1-32 CPUs
    memory: 8192, // 128-32768 MiB
  },
 
  // Override the Docker image
  image: 'akiralabs/akira-default-sandbox',
 
  // Wait for sandbox to be ready before returning
  wait_for_ready: true,
});
