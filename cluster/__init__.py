"""Who runs where: placement, the controller, the Ray seam, and the command line."""
