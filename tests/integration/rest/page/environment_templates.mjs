// Set up a fully configured dev environment
const devSandbox = await client.sandboxes.create({
  image: 'akiralabs/akira-default-sandbox',
});
 
// Install dependencies, configure tools
await client.sandboxes.execute(devSandbox.id, {
  command: 'apt-get update && apt-get install -y vim git nodejs',
});
 
await client.sandboxes.execute(devSandbox.id, {
  command: 'npm install -g typescript eslint prettier',
});
 
// Snapshot as template
const template = await client.sandboxes.snapshot(devSandbox.id, {
  name: 'dev-environment-template',
});
 
// Create new environments from template
const newDev = await client.snapshots.restore(template.id, {
  name: 'new-dev-environment',
});
