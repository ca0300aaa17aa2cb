"""The page at ``/console``: what the fleet does, and a playground."""
