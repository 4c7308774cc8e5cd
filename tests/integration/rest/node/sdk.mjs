// As much of Akira's SDK as its page shows, over fetch: names of methods on one side, HTTP on the
// other. A command that fails is an exception, as the page's "Pre-Deployment Backup" takes it to be.
// Each client keeps its calls for the test to look at.

export default class SandboxSDK {
  constructor({ apiKey }) {
    this.calls = [];
    const request = async (method, path, body) => {
      const response = await fetch(process.env['AKIRA_BASE_URL'] + path, {
        method,
        headers: { 'x-api-key': apiKey, 'Content-Type': 'application/json' },
        body: body === undefined ? undefined : JSON.stringify(body),
      });
      const reply = await response.json();
      this.calls.push({ method, path, body, status: response.status, reply });
      if (!response.ok) throw new Error(`${response.status} ${JSON.stringify(reply)}`);
      return reply;
    };
    const sandbox = (id) => `/v1/sandboxes/${encodeURIComponent(id)}`;
    const snapshot = (id) => `/v1/snapshots/${encodeURIComponent(id)}`;
    this.sandboxes = {
      create: (body) => request('POST', '/v1/sandboxes', body),
      snapshot: (id, body) => request('POST', `${sandbox(id)}/snapshot`, body),
      clone: (id, body) => request('POST', `${sandbox(id)}/clone`, body),
      delete: (id) => request('DELETE', sandbox(id)),
      execute: async (id, body) => {
        const result = await request('POST', `${sandbox(id)}/execute`, body);
        if (result.exit_code !== 0) throw new Error(`exit code ${result.exit_code}`);
        return result;
      },
    };
    this.snapshots = {
      list: () => request('GET', '/v1/snapshots/list'),
      restore: (id, body) => request('POST', `${snapshot(id)}/restore`, body),
      delete: (id) => request('DELETE', snapshot(id)),
    };
  }
}
