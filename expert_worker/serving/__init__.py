"""How calls reach a worker and answers leave it."""
