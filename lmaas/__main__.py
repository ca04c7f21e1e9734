"""`python -m lmaas` is the `lmaas` command."""

from lmaas.cli import main

if __name__ == "__main__":
    main()
