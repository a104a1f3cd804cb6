"""The papers' experiments as named recipes: claim, settings with their sources, tolerance, runs, verdict."""
