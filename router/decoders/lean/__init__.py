"""Our own decoder, for the families that it supports."""
