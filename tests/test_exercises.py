"""The exercises: an empty one says so, a solution is right, and typical mistakes are told apart by their
hints."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import conftest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "exercises"
sys.path.insert(0, str(FOLDER))
import lab
import verdict
from checks import CHECKS

EXPERIMENTS = [path.stem for path in sorted(FOLDER.glob("[0-9]*.py")) if "PREDICTION" in path.read_text()]


def test_twelve_exercises_each_with_a_check_or_an_experiment_and_a_solution():
    named = sorted(path.stem for path in FOLDER.glob("[0-9]*.py"))
    assert [name[:2] for name in named] == [f"{i:02d}" for i in range(1, 13)]
    assert named == sorted([*CHECKS, *EXPERIMENTS])
    assert named == sorted(path.stem for path in (FOLDER / "solutions").glob("*.py"))


@pytest.mark.parametrize("name", CHECKS)
def test_an_empty_exercise_says_so_and_its_solution_is_right(name, capsys):
    assert verdict.judge(FOLDER / f"{name}.py", []) == 1
    assert "nothing is there yet" in capsys.readouterr().out
    assert verdict.judge(FOLDER / f"{name}.py", ["--solution"]) == 0
    out = capsys.readouterr().out
    assert "right" in out and "NOT YET" not in out and CHECKS[name].lesson in out


@pytest.mark.parametrize("name", CHECKS)
def test_typical_mistakes_are_told_apart(name):
    check = CHECKS[name]
    assert len(check.mistakes) >= 5
    for hint, mistaken in check.mistakes:
        right, lines = verdict.verdict(check, mistaken)
        assert not right and lines[-1] == f"  Hint: {hint}"
        assert any("NOT YET" in line for line in lines)


@pytest.mark.parametrize("name", CHECKS)
def test_another_wrong_answer_gets_the_hint_of_the_property_that_fails(name):
    """A mistake that nobody thought of; errors, shapes, types and NaNs are answered in a sentence."""
    check = CHECKS[name]

    def judged(function):
        right, lines = verdict.verdict(check, function)
        assert not right
        return "\n".join(lines)

    text = judged(lambda *a: 3 * check.right(*a) + 1)
    assert "Hint: " in text and "should be" in text and "numbers differ" in text
    assert "should have" in judged(lambda *a: check.right(*a)[None])
    assert "nan" in judged(lambda *a: check.right(*a) * torch.nan)
    broken = judged(lambda *a: torch.ones(2) @ torch.ones(3))
    assert "RuntimeError" in broken and "test_exercises.py, line" in broken and "Hint" not in broken
    assert "NoneType" in judged(lambda *a: None)


def test_what_a_student_got_past_the_checks():
    """Wrong answers that were once taken for right, and near relatives of known mistakes."""
    def told(name, function):
        right, lines = verdict.verdict(CHECKS[name], function)
        assert not right
        return lines[-1]

    def bar_before_one_too_long(x, noise, t, beta):
        bar = torch.cumprod(1 - beta, 0)
        before = bar[t - 1] if t > 1 else torch.ones(())
        clean = ((x - (1 - bar[t]).sqrt() * noise) / bar[t].sqrt()).clamp(-1, 1)
        mean = beta[t] * before.sqrt() * clean + (1 - before) * (1 - beta[t]).sqrt() * x
        return mean / (1 - bar[t])

    def only_from_below(mean, std, chain, floor):
        s = std.clamp(min=floor)[:, None, None]
        return torch.distributions.Normal(mean, s).log_prob(chain[:, 1:]).clamp(min=-5).mean((-1, -2))

    def detached(*arguments):
        return CHECKS["05_chain_logprob"].right(*arguments).detach()

    def floor_by_heart(mean, std, chain, floor):
        return CHECKS["05_chain_logprob"].right(mean, std, chain, 0.1)

    def backwards(first, last, steps):
        x = torch.linspace(1, 0, steps)
        return first + (last - first) * (torch.exp(3 * x) - 1) / (torch.tensor(3.0).exp() - 1)

    assert "bar[0]" in told("03_posterior_mean", bar_before_one_too_long)
    assert "[-5, 2]" in told("05_chain_logprob", only_from_below)
    assert "detached" in told("05_chain_logprob", detached)
    assert "floor" in told("05_chain_logprob", floor_by_heart)
    assert "backwards" in told("11_clip_schedule", backwards)


def test_what_holds_in_a_middle_row_holds_in_the_last():
    """Right but for one row: a promise after a success that comes last, a guess unclipped at t = 0."""
    gae, mean = CHECKS["10_gae"], CHECKS["03_posterior_mean"]

    def promised(reward, value, next_value, terminated, truncated, gamma, lam):
        last = torch.zeros_like(terminated)
        last[-1] = terminated[-1]
        return gae.right(reward, value, next_value, terminated & ~last, truncated | last, gamma, lam)

    def unclipped(x, noise, t, beta):
        clean = (x - beta[0].sqrt() * noise) / (1 - beta[0]).sqrt()
        return mean.right(x, noise, t, beta) if t else clean

    for check, function in ((gae, promised), (mean, unclipped)):
        right, lines = verdict.verdict(check, function)
        assert not right and sum("NOT YET" in line for line in lines) == 1


def test_the_lecture_says_what_the_code_is(tmp_path):
    """Its tables are those that the code prints, and its figures can be drawn."""
    import lecture
    page = (ROOT / "docs" / "LECTURE.md").read_text()
    assert all(line in page for line in lecture.tables())
    drawn = []
    for draw in (lecture.draw_times, lecture.draw_model):
        drawn.append(tmp_path / f"{draw.__name__}.png")
        draw(lecture.diwa.Config(device="cpu"), drawn[-1])
    assert all(path.stat().st_size > 5000 for path in drawn)


def test_an_exercise_runs_from_anywhere(tmp_path):
    path = FOLDER / "10_gae.py"
    done = subprocess.run([sys.executable, path], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "nothing is there yet" in done.stdout and not done.stderr


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_asks_for_predictions_and_compares_them(name, done, tmp_path, capsys):
    """On a tiny run, whose numbers mean nothing: without predictions it asks for them; with the solution's it
    trains its variants beside the run, which stays as it was, and shows each number beside ours."""
    folder = conftest.copy_run(done, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (folder / "smoke").rglob("*")}
    flags = ["--runs", str(folder), "--run", "smoke", "--starts", "2"]
    flags += ["--ft_iterations", "2", "--eval_steps", "8"]
    assert lab.judge(FOLDER / f"{name}.py", [*flags, "--solution"]) == 0
    out = capsys.readouterr().out
    solution = verdict.load(FOLDER / "solutions" / f"{name}.py")
    assert all(f"| {key}: " in out for key in solution.SEEN) and solution.__doc__.strip() in out
    for key, said in solution.PREDICTION.items():
        assert any(f"| {key}: " in line and f" | {said}" in line for line in out.splitlines())
    assert {path: path.stat().st_mtime_ns for path in (folder / "smoke").rglob("*")} == before
    assert lab.judge(FOLDER / f"{name}.py", flags) == 1
    assert "write down first what you expect" in capsys.readouterr().out


def test_a_variant_is_of_the_run_as_it_is(done, tmp_path, monkeypatch):
    """Begun again it goes on; after the run cloned anew, it begins anew."""
    folder = conftest.copy_run(done, tmp_path)
    monkeypatch.setattr(lab.diwa, "main", lambda words: 0)
    bench = lab.Lab(folder, "smoke", 2)
    mark = folder / "smoke_other" / "mark"

    def begun():
        bench.variant("other", stages=["finetune"])
        stays = mark.exists()
        mark.touch()
        return stays

    assert [begun(), begun()] == [False, True]
    (folder / "smoke_other" / "finetune_close_drawer.pt").touch()                         # its own work
    assert begun()
    path = folder / "smoke" / "bc_close_drawer.pt"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    assert not begun()


def test_an_experiment_says_what_is_wrong(tmp_path, capsys):
    flags = ["--runs", str(tmp_path), "--run", "class"]
    assert lab.judge(FOLDER / "04_noise_schedule.py", [*flags, "--solution"]) == 2
    assert "--preset class', or" in capsys.readouterr().out
    exercise = verdict.load(FOLDER / "04_noise_schedule.py")
    solution = verdict.load(FOLDER / "solutions" / "04_noise_schedule.py")
    exercise.PREDICTION = dict(solution.PREDICTION)
    assert lab.missing(exercise) is None
    for wrong in ("70 %", 101, -1, float("nan"), True, 0.7):
        exercise.PREDICTION["linear"] = wrong
        assert "a number from 1 to 100" in lab.missing(exercise)
    bug = verdict.load(FOLDER / "12_planted_bug.py")
    bug.PREDICTION = dict(bug.PREDICTION, A="sick")
    assert "'sick': choose one of 'healthy'" in lab.missing(bug)


def test_predictions_are_compared_with_what_was_seen():
    exercise = verdict.load(FOLDER / "04_noise_schedule.py")
    solution = verdict.load(FOLDER / "solutions" / "04_noise_schedule.py")
    solution.SEEN = dict(cosine=[50, 60, 70], stretched=[50, 60, 70], linear=[10, 14, 20])
    exercise.PREDICTION = dict(cosine=62, stretched=20, linear=100)
    lines = lab.compare(exercise, solution, dict(cosine=55.0, stretched=65.0, linear=90.0))
    assert lines[3].endswith("| 62 % | 55 % | 50, 60, 70 % | near |")
    assert lines[4].endswith("| off by 45 |")
    assert "off by 10; and here is unlike ours" in lines[5] or "near; and here is unlike ours" in lines[5]
