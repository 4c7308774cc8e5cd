const restoredSandbox = await client.snapshots.restore(snapshot.id, {
  name: 'restored-sandbox',
});
 
console.log(`Restored sandbox: ${restoredSandbox.id}`);
