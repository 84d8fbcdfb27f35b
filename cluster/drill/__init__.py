"""`moesaic drill`: faults against a cluster under load, and every token compared with a reference."""
