"""Test-time search over the engine's verbs."""
