"""torchrun: several processes train one world model."""
import os
import socket

import pytest
import torch
from conftest import TINY, copy_run, main

import diwa
from support import parallel, runs

FLAGS = ["--stage", "wm", "--wm_noise", "0", "--wm_decode", "1", "--wm_context", "1", "--wm_updates", "3",
         "--wm_bf16", "0"]


def halves(x):
    """A draw of a class that takes the one in the middle."""
    return torch.full_like(x, 0.5)


def process(job):
    """One of torchrun's processes, without the dice: no noise and the same context in every row, so that a
    batch may be cut in two.  stop: interrupted at that update -> the exit code"""
    os.environ.update(job["environment"])
    torch.randn_like = torch.zeros_like
    torch.rand_like = halves
    if job["stop"] is not None:
        right, runs.SAVE_EVERY = diwa.cosine_lr, -1

        def interrupted(optimizer, peak, step, *args, **kwargs):
            if step == job["stop"]:
                raise KeyboardInterrupt
            return right(optimizer, peak, step, *args, **kwargs)
        diwa.cosine_lr = interrupted
        runs.Updates.__init__.__defaults__ = (1,)           # look, and save, at every update
    code = diwa.main([*TINY, *FLAGS, "--runs", job["runs"]])
    os._exit(code)                                          # an interrupted process waits for no other


def launch(folder, stop=None):
    """Two of them -> exit codes"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        environment = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                           MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test")
        job = dict(environment=environment, runs=str(folder), stop=stop)
        children.append(runs.worker_context().Process(target=process, args=(job,)))
        children[-1].start()
    for child in children:
        child.join(120)
    return [child.exitcode for child in children]


def weights(folder):
    return torch.load(folder / "smoke" / "wm.pt", weights_only=True)["model"]


def test_two_processes_take_the_steps_that_one_takes(done, tmp_path, monkeypatch):
    """The same global batch, float32: weights to 1e-5; cut off after two updates and resumed, the same; the
    log is the first process's alone."""
    folders = [copy_run(done, tmp_path / name, "wm.pt", "log.csv") for name in ("one", "two")]
    assert launch(folders[1], stop=2) == [130, 130]
    assert (folders[1] / "smoke" / "wm.partial.pt").exists() and not (folders[1] / "smoke" / "wm.pt").exists()
    assert launch(folders[1]) == [0, 0]
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    monkeypatch.setattr(torch, "rand_like", halves)
    assert main(folders[0], *FLAGS) == 0
    one, two = map(weights, folders)
    start = torch.load(done / "smoke" / "wm.pt", weights_only=True)["model"]
    assert max((one[k] - start[k]).abs().max() for k in one) > 1e-3, "something was learnt"
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5, msg=name)
    rows = [line.split(",")[2:4] for line in (folders[1] / "smoke" / "log.csv").read_text().splitlines()]
    assert len(rows) == len(set(map(tuple, rows))) > 6, "each row once"


def test_each_takes_its_share(monkeypatch):
    batch = torch.arange(8)
    assert parallel.share(batch).tolist() == list(range(8)) and parallel.size() == 1
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert parallel.share(batch).tolist() == [3, 7]


@pytest.mark.parametrize("flags", [["--stage", "bc"], ["--stage", "all"],
                                   ["--stage", "wm", "--wm_batch", "15"]])
def test_what_cannot_be_shared_is_refused(flags, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(tmp_path, *flags) == 2
    error = capsys.readouterr().err
    assert "give --stage wm" in error and len(error.strip().splitlines()) == 1
