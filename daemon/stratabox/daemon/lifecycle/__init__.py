"""The use cases and their state machines.

``world`` is what they all share: the configuration, the catalog behind its worker thread, the
store, the launcher, the event bus. ``guest`` owns one sandbox's running side and is the only
writer of its state; ``guests`` keeps them all. On those stand the use cases: ``power``,
``sandboxes``, ``capture`` and ``snapshots``, ``clones``, ``reverts``, ``images``; ``reconcile``
makes catalog, files and running domains agree when the daemon starts, and ``expiry`` deletes what
is over. ``policy`` decides, purely. Nothing here knows gRPC, and nothing imports a launcher.
"""
