"""What all gRPC services share, whoever's words they speak.

``errors`` has the one map from our errors to gRPC's codes; ``services`` says what a server takes
on.
"""
