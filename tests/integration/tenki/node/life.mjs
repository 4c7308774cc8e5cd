// The whole life of sandboxes with Tenki's own package. Run by test_sdks, as a process of its own.
//
//   node life.mjs PARTS...      (none: all)

import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import * as http from 'node:http';
import * as net from 'node:net';

import * as tenki from '@tenkicloud/sandbox';

const client = new tenki.TenkiSandbox();
const MIB = 1024 * 1024;
const text = (bytes) => new TextDecoder().decode(bytes);
const bytes = (words) => new TextEncoder().encode(words);

async function sh(box, line) {
  const done = await box.exec('sh', { args: ['-c', line] });
  assert.equal(done.exitCode, 0, `${line}: ${text(done.stderr)}`);
  return text(done.stdout).trim();
}

async function fails(kind, call, words = '') {
  await assert.rejects(call, (error) => {
    assert.equal(error.constructor, kind, error.stack);
    assert.ok(error.message.includes(words), error.message);
    return true;
  });
}

async function whole(stream) {
  const pieces = [];
  for await (const piece of stream) pieces.push(Buffer.from(piece));
  return Buffer.concat(pieces);
}

function streamOf(data) {
  return new ReadableStream({
    start(controller) {
      for (let at = 0; at < data.length; at += MIB) controller.enqueue(data.subarray(at, at + MIB));
      controller.close();
    },
  });
}

const box = await client.create({
  name: 'life-ts', cpuCores: 1, memoryMb: 256, diskSizeGb: 5, maxDurationMs: 3600_000,
  env: { GREETING: 'hello' }, metadata: { purpose: 'test' }, tags: ['ts'],
});

async function records() {
  assert.equal(box.state, 'RUNNING');
  assert.deepEqual([box.cpuCores, box.memoryMb, box.diskSizeGb], [1, 256, 5]);
  assert.deepEqual([box.metadata, box.tags], [{ purpose: 'test' }, ['ts']]);
  assert.ok(box.timeoutAt.getTime() > Date.now());
  const before = box.timeoutAt.getTime();
  await box.extend(600_000);
  assert.equal(box.timeoutAt.getTime() - before, 600_000);
  await box.update({ name: 'renamed-ts', tags: ['kept-ts'] });
  assert.equal(box.name, 'renamed-ts');
  assert.deepEqual((await client.list({ tags: ['kept-ts'] })).map((each) => each.id), [box.id]);
  assert.equal((await client.get(box.id)).name, 'renamed-ts');
  assert.ok((await client.whoAmI()).workspaces.length >= 1);
  assert.ok((await client.getUsage()).length >= 1);
}

async function commands() {
  const done = await box.exec('sh', { args: ['-c', 'echo out; echo err >&2; exit 3'] });
  assert.deepEqual([done.exitCode, text(done.stdout), text(done.stderr)], [3, 'out\n', 'err\n']);
  assert.equal(done.status, 'FAILED');
  assert.equal(await sh(box, 'pwd; echo $GREETING'), '/home/tenki\nhello');

  const process = box.run(['sh', '-c', 'read line; echo got $line; cat; exit 4'], { env: { A: 'b' } });
  assert.ok((await process.pid) > 0);
  const stdin = process.stdin.getWriter();
  await stdin.write(bytes('a word\n'));
  await stdin.write(bytes('more'));
  await stdin.close();
  const ended = await process;
  assert.deepEqual([ended.exitCode, text(ended.stdout)], [4, 'got a word\nmore']);

  const trapped = box.run(['sh', '-c', "trap 'exit 5' TERM; echo ready; while :; do sleep 0.1; done"]);
  const reader = trapped.stdout.getReader();
  assert.equal(text((await reader.read()).value), 'ready\n');
  await trapped.signal('SIGTERM');
  assert.equal((await trapped).exitCode, 5);
  const killed = box.run(['sleep', '1000']);
  await killed.pid;
  await killed.kill();
  assert.equal((await killed).signal, 'killed');
}

async function files() {
  await box.writeFile('notes.txt', 'älter\n');
  assert.equal(text(await box.readFile('/home/tenki/notes.txt')), 'älter\n');
  const stat = await box.fs.stat('notes.txt');
  assert.deepEqual([stat.size, stat.isDir], [7n, false]);
  await box.fs.mkdir('folder/deeper');
  assert.deepEqual((await box.fs.list('folder')).map((each) => each.isDir), [true]);
  await box.fs.remove('folder');
  await fails(tenki.FileNotFoundError, () => box.fs.list('folder'));
  await fails(tenki.FileNotFoundError, () => box.readFile('folder'));
  const data = Buffer.alloc(2 * MIB, 'stratabox');
  await box.fs.writeStream('big', streamOf(data));
  assert.ok(data.equals(await whole(await box.fs.readStream('big'))));
}

async function snapshots() {
  const pid = await sh(box, 'sleep 100000 >/dev/null 2>&1 </dev/null & echo $!');
  await box.writeFile('state', 'before');
  // As on Tenki's page.
  const session = box;
  const sandbox = client;
  const snapshot = await sandbox.createSnapshotAndWait(session.id, {
    name: "after-setup",
  });
  assert.deepEqual([snapshot.state, snapshot.name, snapshot.type], ['READY', 'after-setup', 'USER']);
  assert.ok(snapshot.memoryBytes > 0 && snapshot.sizeBytes > 0);
  await box.writeFile('state', 'after');

  // Restore as a new session
  const restored = await sandbox.createAndWait({
    snapshotId: snapshot.id,
  });
  assert.equal(await sh(restored, `kill -0 ${pid} && cat state`), 'before');
  assert.equal(restored.sourceSnapshotId, snapshot.id);
  await restored.close();

  const later = await client.createSnapshotAsync(box.id, { name: 'later' });
  assert.equal((await client.waitSnapshotReady(later.id)).state, 'READY');
  const ids = (found) => found.map((each) => each.id);
  assert.deepEqual(ids(await client.listSessionSnapshots(box.id)).sort(), [later.id, snapshot.id].sort());
  assert.ok(ids(await client.listSnapshots()).includes(later.id));
  assert.equal((await client.updateSnapshot(later.id, { name: 'renamed' })).name, 'renamed');
  assert.ok((await client.getSnapshotDownloadURL(later.id)).url.startsWith('http://'));
  for (const each of [later, snapshot]) {
    await client.deleteSnapshot(each.id);
    await fails(tenki.SnapshotNotFoundError, () => client.getSnapshot(each.id), each.id);
  }
}

async function pausing() {
  const pid = await sh(box, 'sleep 100000 >/dev/null 2>&1 </dev/null & echo $!');
  await box.pause();
  assert.equal(box.state, 'PAUSED');
  await fails(tenki.InvalidStateError, () => box.readFile('state'), 'state = PAUSED');
  await box.resume();
  await box.waitResumed();
  assert.equal(box.state, 'RUNNING');
  await sh(box, `kill ${pid}`);
}

async function volumes() {
  const volume = await client.createVolume({ name: 'cache-ts', sizeBytes: 16 * MIB });
  await client.waitVolumeReady(volume.id);
  await box.attachVolume(volume.id, '/workspace/cache');
  await sh(box, 'echo kept >/workspace/cache/file && sync');
  await fails(tenki.VolumeInUseError, () => client.deleteVolume(volume.id));
  await box.detachVolume(volume.id);
  assert.equal((await client.resizeVolume(volume.id, 32 * MIB)).sizeBytes, 32 * MIB);
  assert.equal((await client.updateVolume(volume.id, { name: 'renamed-ts' })).name, 'renamed-ts');
  assert.ok((await client.listVolumes()).some((each) => each.id === volume.id));
  await client.deleteVolume(volume.id);
  await fails(tenki.VolumeNotFoundError, () => client.getVolume(volume.id), volume.id);
}

function page(url) {
  // What a browser gets, for which every name below localhost is this host.
  const { host, port } = new URL(url);
  return new Promise((resolve, reject) => {
    const asked = http.get({ host: '127.0.0.1', port, headers: { host } }, async (response) => {
      resolve([response.statusCode, text(await whole(response))]);
    });
    asked.on('error', reject);
  });
}

async function ports() {
  await sh(box, 'mkdir -p www && echo page >www/index.html && busybox httpd -p 127.0.0.1:3000 -h www');
  const exposed = await box.exposePort(3000, { ttlMs: 3600_000, slug: 'my-preview' });
  assert.deepEqual(await page(exposed.previewUrl), [200, 'page\n']);
  assert.deepEqual((await box.listExposedPorts()).map((each) => each.slug), ['my-preview']);
  const preview = await client.previewUrls.create('demo-ts', { sessionId: box.id, port: 3000 });
  assert.deepEqual(await page(preview.previewUrl), [200, 'page\n']);
  await box.unexposePort(3000);
  assert.equal((await page(exposed.previewUrl))[0], 404);
  assert.equal((await client.previewUrls.bind(preview.id, box.id, 3000)).port, 3000);
  assert.equal((await client.previewUrls.unbind(preview.id)).port, undefined);
  await client.previewUrls.delete(preview.id);
}

async function connections() {
  const server = net.createServer((connection) => {
    connection.on('data', (data) => connection.end(`from the host: ${data}`));
  });
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
  const tunnel = await box.hostPortTunnel('127.0.0.1', server.address().port);
  assert.equal(await sh(box, `echo hi | busybox nc 127.0.0.1 ${tunnel.sandboxPort}`), 'from the host: hi');
  await tunnel.close();
  server.close();
  await box.updateSshAuthorizedKeys([
    'ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPZhBLjVkM4yM5bWkB5rXuCyGPLRzXSzJcSuOEq0dNkI test',
  ]);
  await fails(tenki.GitOperationFailedError, () => box.git.clone('/there/is/none'));
}

async function errors() {
  const nobody = randomUUID();
  await fails(tenki.SessionNotFoundError, () => client.get(nobody));
  await fails(tenki.SnapshotNotFoundError, () => client.getSnapshot(nobody), nobody);
  await fails(tenki.VolumeNotFoundError, () => client.getVolume(nobody), nobody);
  await fails(tenki.SnapshotNotFoundError, () => client.create({ snapshotId: nobody }), nobody);
  const stranger = new tenki.TenkiSandbox({ authToken: 'tk_nobody-has-this' });
  await fails(tenki.UnauthorizedError, () => stranger.list());
  stranger.close();
  await fails(tenki.SandboxError, () => client.listTemplates(), 'does not serve');
}

async function ends() {
  await box.close();
  assert.equal(box.state, 'TERMINATED');
  assert.ok(!(await client.list()).some((each) => each.id === box.id));
  await fails(tenki.SessionTerminatedError, () => box.extend(1000));
}

const parts = { records, commands, files, snapshots, pausing, volumes, ports, connections, errors, ends };
const chosen = process.argv.slice(2);
for (const name of chosen.length ? chosen : Object.keys(parts)) {
  await parts[name]();
  console.log(name);
}
client.close();
