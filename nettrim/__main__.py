"""``python -m nettrim`` is the ``nettrim`` command."""

from nettrim.cli import main

if __name__ == "__main__":
    main(prog_name="nettrim")
