// Snapshot current state
const backup = await client.sandboxes.snapshot(sandbox.id, {
  name: `pre-deploy-${Date.now()}`,
});
 
try {
  // Deploy changes
  await client.sandboxes.execute(sandbox.id, {
    command: './deploy.sh',
  });
} catch (error) {
  // Rollback on failure
  console.log('Deployment failed, restoring backup...');
  const restored = await client.snapshots.restore(backup.id, {
    name: 'restored-from-backup',
  });
  console.log(`Restored to: ${restored.id}`);
}
