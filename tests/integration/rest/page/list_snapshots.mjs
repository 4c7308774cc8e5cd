const snapshots = await client.snapshots.list();
 
for (const snap of snapshots) {
  console.log(`${snap.id}: ${snap.name} (${snap.created_at})`);
}
