"""Models of the hub and of object storage in caches of nodes, fetched once before anything loads them; none is loaded here."""
