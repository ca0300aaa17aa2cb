"""What operators do with adapters while the server runs: declare, look up, pin, prefetch, unload."""
