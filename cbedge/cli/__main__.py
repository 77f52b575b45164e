"""``python -m`` of the command line."""

from cbedge.cli.main import main

if __name__ == "__main__":
    main()
