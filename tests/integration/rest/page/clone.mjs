const result = await client.sandboxes.clone(sandbox.id, {
  name: 'sandbox-clone',
});
 
console.log(`Clone ID: ${result.sandbox.id}`);
console.log(`Clone name: ${result.sandbox.name}`);
console.log(`Intermediate snapshot: ${result.snapshot.id}`);
