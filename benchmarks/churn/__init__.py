"""More adapters than slots."""
