"""How routers hear what replicas hold and how busy they are: from a replica through the hub to every router."""
