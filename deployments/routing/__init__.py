"""What a router believes of the replicas, and the tunables of its decisions. See ``deployments.placement``."""
