"""Chains are kept short: layers are written anew in the background, as *jobs*."""
