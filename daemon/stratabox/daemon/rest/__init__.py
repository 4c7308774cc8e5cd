"""The API in REST's words, as Akira's users know it: HTTP in, one call, JSON out.

The only place that knows HTTP, as ``daemon.api`` is for gRPC; neither knows the other. Only a
daemon whose configuration names an address in ``rest`` imports any of it.

```
server   sockets, TLS, the ASGI server's start and end
guard    in front of every request: who is it, how large, how long, is it still there
app      routes, and what a path or a method that is not there gets
sandboxes, snapshots    the calls; document: what OpenAPI says of them
models, convert, output, errors    words, records → words, commands' output, errors → statuses
```
"""
