"""The daemon: API, use cases, hypervisor, image builders, configuration, doctor."""
