"""The shipped configuration, YAML only."""
