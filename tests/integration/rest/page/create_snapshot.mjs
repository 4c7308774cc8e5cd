import SandboxSDK from '@akiralabs/sandbox-sdk';
 
const client = new SandboxSDK({
  apiKey: process.env['AKIRA_API_KEY'],
});
 
// Create a snapshot of a running sandbox
const snapshot = await client.sandboxes.snapshot(sandbox.id, {
  name: 'pre-deployment-backup',
  quick: true,  // Optional: crash-consistent (faster) vs application-consistent
});
 
console.log(`Snapshot ID: ${snapshot.id}`);
console.log(`Created at: ${snapshot.created_at}`);
