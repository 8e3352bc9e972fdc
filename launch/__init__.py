"""Where users meet the project: configuration, builders, commands, launchers."""
