"""Adapters -> pictures and grids."""
