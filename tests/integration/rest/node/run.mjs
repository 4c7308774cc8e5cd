// Runs the page's code as it is printed: each block is a module of its own that finds the names it
// goes on from before its first line. What does not need another's work runs side by side. Leaves
// each block's calls in calls.json.
//
//   node run.mjs FOLDER_OF_BLOCKS SANDBOX_ID

import { readFile, writeFile } from 'node:fs/promises';
import SandboxSDK from '@akiralabs/sandbox-sdk';

const [folder, id] = process.argv.slice(2);
const told = {};
globalThis.before = {};
globalThis.after = {};

async function run(name, before, gives = []) {
  const client = new SandboxSDK({ apiKey: process.env['AKIRA_API_KEY'] });
  globalThis.before[name] = { client, ...before };
  const code = await readFile(`${folder}/${name}.mjs`, 'utf8');
  const names = gives.includes('client') ? Object.keys(before) : ['client', ...Object.keys(before)];
  await writeFile(
    `block_${name}.mjs`,
    `const { ${names.join(', ')} } = globalThis.before.${name};\n${code}\n` +
      `globalThis.after.${name} = { ${gives.join(', ')} };\n`,
  );
  if (prepared.has(name)) prepare(client);
  await import(`./block_${name}.mjs`);
  const after = globalThis.after[name];
  told[name] = (after.client ?? client).calls;
  return after;
}

// The guests of this test have no pip, npm, apt or Python: something in their place says what it was
// asked for, and ends well.
const STAND_INS = ['apt-get', 'npm', 'pip', 'python']
  .map((name) => `printf '#!/bin/sh\\necho "${name} $*" | tee -a /root/asked\\n' >/usr/bin/${name}`)
  .concat('chmod +x /usr/bin/apt-get /usr/bin/npm /usr/bin/pip /usr/bin/python')
  .join(' && ');
const prepared = new Set(['environment_templates', 'experiment_branching', 'parallel_clones']);

function prepare(client) {
  const create = client.sandboxes.create;
  client.sandboxes.create = async (body) => {
    const box = await create(body);
    await client.sandboxes.execute(box.id, { command: STAND_INS });
    return box;
  };
}

const sandbox = { id };
const { client, snapshot } = await run('create_snapshot', { sandbox }, ['client', 'snapshot']);

async function snapshotsAndClones() {
  const end = (made) => client.sandboxes.delete(made.id);
  await run('list_snapshots', {});
  await end((await run('restore', { snapshot }, ['restoredSandbox'])).restoredSandbox);
  await end((await run('restore_with_options', { snapshot }, ['restoredSandbox'])).restoredSandbox);
  await end((await run('clone', { sandbox }, ['result'])).result.sandbox);
  await end((await run('clone_with_options', { sandbox }, ['result'])).result.sandbox);
  await run('delete_snapshot', { snapshot });
  await run('pre_deployment_backup', { sandbox });
  await end(told['pre_deployment_backup'].at(-1).reply);
}

await Promise.all([
  snapshotsAndClones(),
  run('environment_templates', {}),
  run('experiment_branching', {}),
  run('parallel_clones', {}),
]);
await writeFile('calls.json', JSON.stringify(told));
