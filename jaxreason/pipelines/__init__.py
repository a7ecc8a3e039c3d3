"""Runs of several stages, as lists of stages."""
