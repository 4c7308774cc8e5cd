await client.snapshots.delete(snapshot.id);
