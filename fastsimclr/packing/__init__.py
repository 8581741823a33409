"""Packed files from the command line: made from any data set, looked at, and checked."""
