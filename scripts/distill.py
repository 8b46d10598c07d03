"""For `accelerate launch scripts/distill.py RECIPE [key=value ...] [--resume | --overwrite]`: one run."""

import typer

from hfkd.cli.train import train

if __name__ == "__main__":
    typer.run(train)
