"""Finding, inspecting and converting model folders."""
