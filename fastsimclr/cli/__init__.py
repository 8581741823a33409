"""The command line: `main` runs one command, one file per family of commands."""
