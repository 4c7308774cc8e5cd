"""The HTTP door of previews and downloads: strangers' browsers on one side, guests on the other.

```
 browser ─▶ door (sockets, TLS) ─▶ exchange (one connection, h11) ─▶ Visits ─▶ the guest's port
                                          └─▶ downloads, where the host is no preview's
```

It has a port, and so origins, of its own; imported only where an address is set for it.
"""
