"""Tenki's sandbox service in its own words, for its published clients.

Message in, one call, message out, as in ``daemon.api`` for our own words; neither knows the other.
A session is a sandbox and has its id; a snapshot and a volume are ours, too.

```
services   which methods there are, who answers each, and what is not served;  serving: all of it
parts      what the calls are made of; finding: ids → records, in the states that a call takes
errors     our errors → Tenki's codes and texts, from which its clients make their exceptions
convert    records → messages;  reading: messages → arguments
sessions, …   the calls, a class for each topic
```
"""
