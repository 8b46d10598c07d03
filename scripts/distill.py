"""For `accelerate launch scripts/distill.py RECIPE [key=value ...] [--resume | --overwrite]`: one run."""

import typer
from torch.distributed.elastic.multiprocessing.errors import record

from hfkd.cli.train import train

if __name__ == "__main__":
    record(typer.run)(train)  # so that the launcher shows the traceback of the process that failed first
