"""The command `fastsimclr`, or python -m fastsimclr: checks the installed versions, then runs the command line."""

import sys

from fastsimclr.runtime.versions import version_problems


def main() -> int:
    """Run one command; returns the exit code. Imports torch only where the installed versions work together."""
    if problems := version_problems():
        print(*(f"error: {problem}" for problem in problems), sep="\n", file=sys.stderr)
        return 1
    from fastsimclr.cli.main import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
