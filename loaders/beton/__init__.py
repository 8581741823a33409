"""Packed .beton files: read, written, checked, and made from other data."""
