"""`python -m sdlora`."""

from sdlora.cli.main import main

if __name__ == "__main__":
    main()
