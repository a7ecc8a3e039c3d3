"""Batching and loading."""
