"""The `moesaic` command and its verbs."""
