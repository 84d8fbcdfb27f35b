"""The replicas of the newest routing table and the links to them."""
