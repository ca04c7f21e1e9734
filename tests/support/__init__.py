"""Helpers that tests of more than one tier use. Nothing here imports a tier."""
