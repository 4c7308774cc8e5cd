"""What goes on inside a guest, through its agent.

| module | duty |
|---|---|
| `agent_channel`, `agent` | the wire to the guest's agent; what it is asked |
| `exec`, `wake` | commands in the guest; the program that they begin by (wake.c) |
| `identity` | what a guest that goes on, or is a copy, is told: the time, who it is |
"""
