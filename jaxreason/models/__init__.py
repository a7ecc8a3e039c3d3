"""Decoders as pure functions over a parameter pytree."""
