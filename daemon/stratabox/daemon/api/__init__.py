"""The edge: message in, one call of a use case, message out.

Our own API's words; ``daemon.tenki`` has Tenki's, and ``daemon.rpc`` what both share. ``convert``
turns records into messages and back, and there is one thin servicer for each service.
"""
