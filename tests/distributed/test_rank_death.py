"""Two gloo processes of which one dies, raises, is told to end or meets a NaN: the other doesn't wait for ever."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hfkd.record import checkpoints

pytestmark = pytest.mark.dist
SCRIPT = Path(__file__).parent / "die_once.py"
TORCHRUN = ["torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
ACCELERATE += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]


class Launched:
    """Two processes under a launcher."""

    def __init__(self, folder: Path, case: str, launcher: list[str], steps: int = 5000) -> None:
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", *launcher, str(SCRIPT), str(folder), case, str(steps)]
        self.folder = folder
        with (folder / "out.txt").open("w") as out, (folder / "err.txt").open("w") as err:
            self.launcher = subprocess.Popen(command, env=environment, stdout=out, stderr=err)

    def told(self, process: int) -> tuple[int, int]:
        """Its process id and the step that it is in, or zeros."""
        file = self.folder / f"process-{process}.txt"
        words = file.read_text().split() if file.exists() else []
        return (int(words[0]), int(words[1])) if len(words) == 2 else (0, 0)

    def wait_for_step(self, step: int) -> None:
        """Until both are there."""
        deadline = time.monotonic() + 200
        while min(self.told(process)[1] for process in (0, 1)) < step:
            assert self.launcher.poll() is None and time.monotonic() < deadline, self.error()
            time.sleep(0.05)

    def end(self, seconds: float) -> int:
        """Wait for the launcher; nothing of it may be left."""
        pids = [self.told(process)[0] for process in (0, 1)]
        try:
            code = self.launcher.wait(seconds)
            for pid in pids:
                with pytest.raises(ProcessLookupError):
                    os.kill(pid, 0)
            return code
        finally:
            if self.launcher.poll() is None:
                for pid in (self.launcher.pid, *pids):
                    os.kill(pid, signal.SIGKILL)

    def error(self) -> str:
        """What was written to stderr."""
        return (self.folder / "err.txt").read_text()


def test_a_killed_process_ends_the_other_and_is_named(tmp_path):
    """A job that hangs over night because one process is gone costs the night, and a cluster."""
    job = Launched(tmp_path, "killed", ACCELERATE)
    job.wait_for_step(5)
    os.kill(job.told(1)[0], signal.SIGKILL)
    assert job.end(60) != 0
    cause = job.error().split("Root Cause")[-1] + job.error().split("Failures:")[-1]
    assert re.search(r"rank +: 1 .*\n +exitcode +: -9", cause), cause
    assert {"checkpoint-4"} <= {path.name for path in checkpoints(tmp_path / "run")}


def test_a_process_that_raises_is_heard(tmp_path):
    """What is seen otherwise is the other one's complaint about a closed connection."""
    job = Launched(tmp_path, "raises", TORCHRUN)
    job.wait_for_step(4)
    assert job.end(60) != 0
    summary = job.error().split("Failures:")[-1]
    assert "the data of this process are broken" in summary and re.search(r"rank +: 1 ", summary)


def test_what_one_process_meets_stops_both_in_the_same_step(tmp_path):
    """The other process would wait for the gradients of the one that stopped, until a timeout without a reason. The
    same two processes train twice: one is told to end in the last step, then one meets an infinite loss.
    """
    job = Launched(tmp_path, "non_finite", TORCHRUN)
    job.wait_for_step(4)
    assert job.end(60) != 0
    message = job.error()
    for process in (0, 1):
        assert f"process {process} left with 75, checkpoint-3" in message
    assert "The loss of step 5 is inf on process 1; terms that aren't finite: ['forward_kl']" in message
    assert "The loss of step 5 isn't finite on process 1, so all processes stop." in message
    assert f"The last good checkpoint is {tmp_path / 'run' / 'checkpoint-4'}" in message
    for process, broken in ((0, False), (1, True)):
        report = tmp_path / "run" / "_nonfinite-step-5" / f"process-{process}" / "report.json"
        assert isinstance(json.loads(report.read_text())["losses"][0]["sum"], str) == broken


@pytest.mark.parametrize("who", ["one process", "all, and the launcher"])
def test_a_signal_to_one_ends_both_after_the_same_step(tmp_path, who):
    """Processes that stop at different steps save no checkpoint: one waits in a step that the other never does."""
    job = Launched(tmp_path, "told", TORCHRUN)
    job.wait_for_step(5)
    told = [job.told(1)[0]] if who == "one process" else [job.launcher.pid, job.told(0)[0], job.told(1)[0]]
    for pid in told:
        os.kill(pid, signal.SIGTERM)
    assert job.end(60) != 0
    found = re.search(r"Stopped by .* after step (\d+) of 5000; saved (\S+)\.", job.error())
    assert found and checkpoints(tmp_path / "run")[-1] == Path(found[2])
    assert {job.told(process)[1] for process in (0, 1)} == {int(found[1]) - 1}
    if who == "one process":
        assert len(re.findall(r"exitcode +: 75", job.error())) >= 1
