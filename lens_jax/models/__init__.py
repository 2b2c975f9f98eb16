"""What the networks compute. Nothing here knows of sharding rules, optimisers or data."""
