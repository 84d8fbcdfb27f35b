"""What both ends of a connection between router and worker agree on."""
