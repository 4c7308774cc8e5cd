"""The edge: message in, one call of a use case, message out.

The only place that knows gRPC and status codes. ``errors`` has the one map from our errors to
codes, ``convert`` turns records into messages and back, and there is one thin servicer for each
service.
"""
