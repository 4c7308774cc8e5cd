// Base experiment setup
const experiment = await client.sandboxes.create({
  image: 'akiralabs/akira-default-sandbox',
});
 
await client.sandboxes.execute(experiment.id, {
  command: 'pip install torch numpy pandas',
});
 
// Snapshot base state
const baseState = await client.sandboxes.snapshot(experiment.id, {
  name: 'experiment-base',
});
 
// Branch A: Try approach 1
const branchA = await client.snapshots.restore(baseState.id, {
  name: 'experiment-branch-a',
});
await client.sandboxes.execute(branchA.id, {
  command: 'python train_v1.py',
});
 
// Branch B: Try approach 2
const branchB = await client.snapshots.restore(baseState.id, {
  name: 'experiment-branch-b',
});
await client.sandboxes.execute(branchB.id, {
  command: 'python train_v2.py',
});
