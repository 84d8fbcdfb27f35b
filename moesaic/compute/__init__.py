"""How a product is computed, and where: what router and workers must do alike."""
