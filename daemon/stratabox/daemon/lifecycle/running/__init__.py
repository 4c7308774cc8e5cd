"""One sandbox's running side: its domain, its agent, what it is told, how it pauses."""
