"""``python -m entropy_fork``: the command where its script is not on the PATH."""

from entropy_fork.cli import app

if __name__ == "__main__":
    app(prog_name="entropy-fork")  # also the name that --install-completion completes
