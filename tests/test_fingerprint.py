"""Changed code is noticed: exactly the stages that depend on it are done again, and a comment changes
nothing."""
import dataclasses
import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import diwa
from conftest import TINY, command, copy_run, main
from support import evaluate, fingerprint, runs

ALL = set(runs.PIPELINE)
LEARNT = {"wm", "bc", "reward", "finetune", "eval", "online"}
CHANGES = [  # file, line of it, what it becomes, stages whose own code that changes
    ("diwa.py", "trace = delta + gamma * lam * trace", "trace = delta + lam * trace",
     {"finetune", "online"}),
    ("diwa.py", "angle = position * 2 ** (k + 2)", "angle = position * 2 ** (k + 1)", LEARNT),
    ("diwa.py", "similarity = z @ z.T / tau", "similarity = z @ z.T * tau", {"reward"}),
    ("calvin_sim.py", "self.command = 1.0 if action[6] >= 0 else -1.0",
     "self.command = 1.0 if action[6] > 0 else -1.0", {"play", "demos", "eval", "online"}),
    ("data.py", "POSE_SCALE = torch.tensor([0.1,", "POSE_SCALE = torch.tensor([0.2,", LEARNT),
    ("support/expert.py", "self.pace = min(", "self.pace = max(", {"play", "demos"}),
    ("support/online.py", "(self.age >= self.horizon)", "(self.age > self.horizon)", {"online"}),
    ("support/evaluate.py", "if not solved[i] and", "if solved[i] and", {"eval"}),
    ("support/runs.py", 'for name in ("avx512_bf16", "amx_bf16")', 'for name in ("amx_bf16",)', LEARNT),
    ("support/runs.py", "bool(cfg.wm_bf16 and cfg.device == device)", "bool(cfg.wm_bf16)", LEARNT),
    ("support/runs.py", "layer.to(torch.bfloat16)", "layer.to(torch.float16)", {"finetune"}),
    ("diwa.py", "delta = reward[t] + gamma", "# what was not expected\n        delta = (reward[t]) + gamma",
     set()),
    ("diwa.py", '"""Generalised advantage estimation', '"""Generalized advantage estimation', set()),
    ("diwa.py", "wm_kl: float = 0.3 ", "wm_kl: float = 0.31", set()),
    ("support/runs.py", "if now - self.shown <", "if now - self.shown <=", set()),
    ("support/calvin_real.py", "self.pristine = self.env.p.saveState()", "self.pristine = None", set()),
]


def tree(folder):
    """A copy of the program."""
    for path in [*ROOT.glob("*.py"), *(ROOT / "support").glob("*.py")]:
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return folder


def edit(folder, file, old, new):
    text = (folder / file).read_text()
    assert old in text, f"{file} has changed: this test looks for {old!r}"
    (folder / file).write_text(text.replace(old, new))
    forget()


def forget():
    """A program reads its code once."""
    fingerprint.definitions.cache_clear()
    fingerprint.code_of.cache_clear()


CODES = """
import sys
import json
from support import evaluate, fingerprint, runs
import diwa
from pathlib import Path
cfg = diwa.Config(run='r')
out = {}
for name in json.loads(sys.argv[1]):
    fingerprint.ROOT = Path(name)
    fingerprint.definitions.cache_clear()
    fingerprint.code_of.cache_clear()
    out[name] = {s: runs.code(cfg, s) for s in runs.STAGES}
print(json.dumps(out))
"""


def test_exactly_the_stages_that_reach_a_line_see_it_change(tmp_path):
    folders = [tree(tmp_path / str(i)) for i in range(len(CHANGES) + 1)]
    for folder, (file, old, new, _) in zip(folders, CHANGES):
        edit(folder, file, old, new)
    command = [sys.executable, "-c", CODES, json.dumps(list(map(str, folders)))]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    codes = json.loads(result.stdout)
    plain = codes[str(folders[-1])]
    assert all(len(names) > 20 for names in plain.values())
    for folder, (file, old, _, stages) in zip(folders, CHANGES):
        assert {s for s in runs.STAGES if codes[str(folder)][s] != plain[s]} == stages, (file, old)


@pytest.fixture
def program(done, tmp_path, monkeypatch):
    """A copy of the program and of the finished run -> its folder, its command line.

    The command line runs in this process, but with checksums of the copy's code."""
    folder = copy_run(done, tree(tmp_path))

    with monkeypatch.context() as patch:
        forget()
        patch.setattr(fingerprint, "ROOT", folder)
        patch.setattr(evaluate, "in_processes", lambda cfg, function, jobs, name: map(function, jobs))
        yield folder, functools.partial(main, folder)
    forget()


def test_a_changed_line_is_done_again_and_a_comment_is_not(program, no_pictures, capsys):
    folder, call = program
    edit(folder, "diwa.py",
         "trace = delta + gamma * lam * trace", "trace = delta + 1.0 * gamma * lam * trace")
    assert call("--stage", "eval") == 2
    refused = capsys.readouterr().err
    assert "diwa.gae" in refused and "--keep finetune" in refused
    assert call("--keep", "finetune") == 0
    assert capsys.readouterr().out.count("skipped") == len(ALL)
    words = command(*TINY, "--runs", folder, "--stage", "finetune")[2:]
    again = subprocess.run([sys.executable, folder / "diwa.py", *words], capture_output=True, text=True)
    assert again.returncode == 0 and "last time" in again.stdout, "the changed program itself"
    assert "finetune: the code of diwa.gae has changed; it is done again" in again.stdout
    assert call() == 0
    after = capsys.readouterr().out
    assert after.count("skipped") == len(ALL) - 1
    assert "eval: finetune has been made anew" in after
    edit(folder, "diwa.py",
         "        trace = delta + 1.0 *", "        # as before\n        trace = delta + 1.0 *")
    assert call() == 0
    assert capsys.readouterr().out.count("skipped") == len(ALL)


def test_a_result_without_a_new_flag_or_without_code_still_loads(done, tmp_path):
    """Of an earlier version: it lacks a setting, or knows nothing of its code."""
    folder = copy_run(done, tmp_path)
    path = folder / "smoke" / "wm.pt"
    content = torch.load(path, weights_only=True)
    del content["stamp"]["wm_free"]
    for key in ("code", "made_from"):
        del content[key]
    torch.save(content, path)
    flags = ["--run", "smoke", "--runs", str(folder), "--device", "cpu", "--task", "close_drawer"]
    cfg = runs.check_config(runs.parse(flags, diwa.Config, diwa.PRESETS, "", ""))
    assert runs.load(cfg, "wm")["model"]
    with pytest.raises(runs.InputError, match="wm_free=0.0.*wm_free=1.0"):
        runs.load(dataclasses.replace(cfg, wm_free=1.0), "wm")


def test_a_checksum_is_the_same_in_every_python():
    """Newer Pythons add empty fields to a syntax tree (type_params in 3.12): what is empty does not count."""
    import ast
    from support.fingerprint import plain
    node = ast.parse("def f(a, b=0):\n    return [] if a else None").body[0]
    text = repr(plain(node))
    assert "()" not in text and "decorator_list" not in text and "('value', 0)" in text
    before = text
    node.type_params = []
    assert repr(plain(node)) == before
    node.type_comment = "int"
    assert repr(plain(node)) != before


def test_keep_names_stages(tmp_path, capsys):
    assert diwa.main(["--preset", "smoke", "--runs", str(tmp_path), "--keep", "finetun"]) == 2
    assert "did you mean finetune" in capsys.readouterr().err
