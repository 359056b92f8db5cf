"""`python -m sdlora`."""

from sdlora.cli.main import main
from sdlora.cli.processes import end_at_once, is_one_of_several

if __name__ == "__main__":
    if is_one_of_several():
        end_at_once(main)
    else:
        main()
