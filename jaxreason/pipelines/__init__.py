"""A run, from config to trained policy: what it is built of, its folder, its course."""
