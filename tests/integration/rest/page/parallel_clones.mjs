// Set up a configured sandbox
const baseSandbox = await client.sandboxes.create({
  image: 'akiralabs/akira-default-sandbox',
});
 
await client.sandboxes.execute(baseSandbox.id, {
  command: 'pip install torch numpy pandas scikit-learn',
});
 
// Create multiple clones for parallel processing
const tasks = ['data1.csv', 'data2.csv', 'data3.csv', 'data4.csv'];
 
const clones = await Promise.all(
  tasks.map(async (dataFile, i) => {
    const result = await client.sandboxes.clone(baseSandbox.id, {
      name: `worker-${i}`,
      wait_for_ready: true,
    });
    return result.sandbox;
  })
);
 
// Run parallel processing on each clone
await Promise.all(
  clones.map((clone, i) =>
    client.sandboxes.execute(clone.id, {
      command: `python process.py ${tasks[i]}`,
    })
  )
);
 
// Clean up
await Promise.all(clones.map((clone) => client.sandboxes.delete(clone.id)));
await client.sandboxes.delete(baseSandbox.id);
