"""What each process of a cluster runs, and the Ray actors that host them."""
