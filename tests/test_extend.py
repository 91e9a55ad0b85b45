"""docs/EXTEND.md: its changes fit today's code, and the program runs with all of them at once."""
import ast
import re
import shutil
import subprocess
import sys

import pytest
from conftest import HASTY, ROOT, TINY, without_pictures

TEXT = (ROOT / "docs" / "EXTEND.md").read_text()
BLOCKS = re.findall(r"```(diff|python)\n(.*?)```", TEXT, re.DOTALL)


def apply(folder, change):
    """A change to the file that its first line names: its ' ' and '-' lines stand there once, one after the
    other, and give way to its ' ' and '+' lines."""
    name, *lines = change.splitlines()
    path = folder / name.removeprefix("# ")
    old, new = ("".join(f"{line[1:]}\n" for line in lines if line[:1] in (" ", sign)) for sign in "-+")
    text = path.read_text()
    assert text.count(old) == 1, f"{name}: {old}"
    path.write_text(text.replace(old, new))


def test_the_recipes_run_together(tmp_path):
    """The ninth task, paid for its effort, judged by the other critic, in the simulator without physics."""
    folder = tmp_path / "program"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns("runs", ".*", "docs", "tests", "__pycache__"))
    for kind, text in BLOCKS:
        if kind == "diff":
            apply(folder, text)
        elif text.startswith("# "):
            name, text = text.split("\n", 1)
            (folder / name.removeprefix("# ")).write_text(text)
    flags = [*TINY, *HASTY, "--sim", "point", "--task", "led_while_open",
             "--ft_effort", "0.5", "--play_tasks", "turn_off_led,led_while_open", "--play_episode", "50",
             "--demo_count", "2", "--eval_episodes", "2", "--eval_curve", "0", "--workers", "1"]
    words = [sys.executable, "-c", without_pictures(folder), *flags]
    run = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "success in the simulator" in run.stdout
    assert all(len(line) <= 110 for path in folder.glob("*.py") for line in path.read_text().splitlines())
    code = ("import torch, diwa, calvin_sim\n"
            "seen = diwa.critic_sees(torch.zeros(2, 3), torch.zeros(2, 11, 4, 7))\n"
            "print(calvin_sim.TASKS['led_while_open'].holds, seen.shape)")
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert run.stdout == "(1,) torch.Size([2, 31])\n", run.stderr


def test_the_other_critic_makes_no_earlier_stage_anew(tmp_path):
    """A name that is a local variable elsewhere would: the fingerprint of the code looks at names."""
    ignored = shutil.ignore_patterns("runs", ".*", "docs", "tests", "exercises", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "program", ignore=ignored)
    critic = re.compile("^# diwa.py\n.*(critic_sees|critic = mlp)", re.DOTALL)
    changes = [text for _, text in BLOCKS if critic.search(text)]
    for text in changes:
        apply(tmp_path / "program", text)
    code = ("from support.fingerprint import code_of\n"
            "print([code_of(stage) for stage in ('wm', 'bc', 'reward', 'finetune')])")
    before, after = (subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
                     for folder in (ROOT, tmp_path / "program"))
    before, after = (ast.literal_eval(run.stdout) for run in (before, after))
    assert len(changes) == 3 and before[:3] == after[:3] and "diwa.critic_sees" in after[3]


def test_the_policy_of_a_finished_run_is_deployed(done):
    code = next(text for kind, text in BLOCKS if "diwa.deploy" in text)
    for old, new in (('"--run", "cpu"', f'"--runs", {str(done)!r}, "--run", "smoke"'),
                     ("runs/cpu", f"{done}/smoke"), ("move_slider_right", "close_drawer"),
                     ("range(40)", "range(6)")):
        assert old in code
        code = code.replace(old, new)
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) >= 6


def test_a_recipe_that_no_longer_fits_is_noticed(tmp_path):
    (tmp_path / "diwa.py").write_text("a = 1\nb = 2\n")
    apply(tmp_path, "# diwa.py\n a = 1\n-b = 2\n+b = 3\n")
    assert (tmp_path / "diwa.py").read_text() == "a = 1\nb = 3\n"
    with pytest.raises(AssertionError):
        apply(tmp_path, "# diwa.py\n-b = 2\n+b = 3\n")
