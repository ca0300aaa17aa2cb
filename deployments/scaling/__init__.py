"""How many replicas there should be, and with which adapters a new one starts."""
