"""The installed command `transxssm`. If the libraries that it needs are missing, one line says what to install."""

import sys

from transxssm_cli.places import require_extra


def main() -> None:
    """Runs the command line if its libraries are installed, and ends the process."""
    try:
        require_extra("train")
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    from transxssm_cli import app

    app.main()


if __name__ == "__main__":
    main()
