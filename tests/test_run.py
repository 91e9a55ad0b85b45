"""The program as a user meets it: one end-to-end run, skipping, resuming after kill -9, errors with exit code
2, and no simulator offline."""
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import calvin_sim
import data
import diwa
from conftest import HASTY, TINY, command, config, copy_run, made_once, main, shell
from support import evaluate, interactions, online, record, report, runs

def test_everything_is_there(done):
    """What the README promises to find afterwards."""
    names = {p.name for p in (done / "smoke").iterdir()}
    task = "close_drawer"
    pictures = {f"curves_{task}.png", f"dream_{task}.gif", f"rollout_before_{task}.gif",
                f"rollout_after_{task}.gif"}
    assert {"config.json", "log.csv", "report.md", *pictures} <= names
    config = json.loads((done / "smoke" / "config.json").read_text())
    assert {"torch", "renderer", "commit", "device"} <= set(config["versions"])
    assert config["settings"]["seed"] == 0
    text = (done / "smoke" / "report.md").read_text()
    for part in ("behaviour cloning", "difference, paired", "Replay share", "precision", "the papers' row"):
        assert part in text
    evaluation = json.loads((done / "smoke" / f"eval_{task}.json").read_text())
    seeds = [[r["seed"] for r in evaluation["results"][p]] for p in ("bc", "tuned")]
    assert seeds[0] == seeds[1] and len(set(seeds[0])) == 4, "before and after start from the same states"


def test_second_run_skips_everything(done, capsys, no_pictures):
    assert main(done, "--stage", "all") == 0
    assert capsys.readouterr().out.count("skipped") == len(runs.PIPELINE)


def test_run_remembers_its_settings(done, no_pictures):
    """Without --preset the run's own config.json counts, so a later command does not silently change the
    settings."""
    flags = ["--run", "smoke", "--runs", str(done), "--device", "cpu", "--task", "close_drawer"]
    assert diwa.main([*flags, "--stage", "report"]) == 0


@pytest.mark.parametrize("labels", ["predicate", "strict"])
def test_labelled_play_is_compared_with_any_start(done, tmp_path, monkeypatch, labels):
    """Every pair is labelled by the task's rule, and play's moments are compared with other windows' starts,
    too.  Strict labels have a class of its own for what succeeds in play, and weigh it as unlabelled play."""
    folder = copy_run(done, tmp_path, "reward_*")
    pairs = []
    loss = diwa.classifier_loss
    views = diwa.WorldModel.watch_and_dream
    scenes = [runs.Dataset(folder / "smoke" / name)["scene_obs"] for name in ("demos_close_drawer", "play")]

    def numbered(wm, recording, *args):            # features that say which frame of which recording they are
        seen, dreamed, frames = views(wm, recording, *args)
        of_play = len(recording.scene) == len(scenes[1])
        number = torch.from_numpy(frames + 1_000_000 * of_play)[..., None].float()
        return number.expand_as(seen), number.expand_as(dreamed), frames

    def watched(model, first, feature, label, weight, cfg):
        of_play = first[:, 0] >= 1_000_000
        strict = of_play & (label > 0) if labels == "strict" else torch.zeros_like(of_play)
        assert torch.equal(weight, torch.where(strict, cfg.reward_play, 1.0))
        assert torch.equal(label == 2, strict) and model.head.out_features == 2 + (labels == "strict")
        pairs.extend(zip(first[:, 0].long().tolist(), feature[:, 0].long().tolist(), label.tolist()))
        return loss(model, first, feature, label, weight, cfg)

    monkeypatch.setattr(diwa.WorldModel, "watch_and_dream", numbered)
    monkeypatch.setattr(diwa, "classifier_loss", watched)
    assert main(folder, "--stage", "reward", "--reward_updates", "9", "--reward_labels", labels) == 0
    apart = []
    for first, frame, label in pairs:
        assert first // 1_000_000 == frame // 1_000_000
        scene = scenes[first // 1_000_000]
        a = first % 1_000_000
        b = frame % 1_000_000
        assert bool(calvin_sim.success("close_drawer", scene[a], scene[b])) == bool(label)
        apart.append((first >= 1_000_000) and not 0 <= b - a < 73)
    assert 0 < sum(label > 0 for _, _, label in pairs) < len(pairs)
    assert sum(apart) > 0.5 * sum(f >= 1_000_000 for f, _, _ in pairs)


@pytest.mark.parametrize("labels", ["unlabelled", "demos"])
def test_play_without_labels(done, tmp_path, monkeypatch, labels):
    """Unlabelled, all of play is taken for failures, and weighs reward_play; `demos` leaves it out."""
    folder = copy_run(done, tmp_path, "reward_*")
    batches = []
    loss = diwa.classifier_loss
    views = diwa.WorldModel.watch_and_dream

    def numbered(wm, recording, *args):                     # features that say which recording they are of
        seen, dreamed, frames = views(wm, recording, *args)
        of_play = float(len(recording.scene) == 1000)
        return torch.full_like(seen, of_play), torch.full_like(dreamed, of_play), frames

    def watched(model, first, feature, label, weight, cfg):
        of_play = first[:, 0] == 1
        assert of_play.any() == (labels == "unlabelled") and not label[of_play].any() and label.max() == 1
        assert torch.equal(weight, torch.where(of_play, cfg.reward_play, 1.0))
        batches.append(len(label))
        return loss(model, first, feature, label, weight, cfg)

    monkeypatch.setattr(diwa.WorldModel, "watch_and_dream", numbered)
    monkeypatch.setattr(diwa, "classifier_loss", watched)
    assert main(folder, "--stage", "reward", "--reward_updates", "3", "--reward_labels", labels) == 0
    assert batches == [128 * (3 if labels == "unlabelled" else 2)] * 3


def test_a_rule_learns_nothing(done, tmp_path, monkeypatch):
    """reward_labels state: nothing is trained, and practice runs without a classifier."""
    folder = copy_run(done, tmp_path, "reward_*", "finetune_*")
    monkeypatch.setattr(diwa, "classifier_loss", None)
    for stage in ("reward", "finetune"):
        assert main(folder, "--reward_labels", "state", "--stage", stage) == 0
    assert not torch.load(folder / "smoke" / "reward_close_drawer.pt", weights_only=True)["model"]


def test_the_world_model_is_trained_as_its_flags_say(done, tmp_path, monkeypatch):
    """wm_lr_end ends its learning rate, and every update is in half precision where there is one."""
    folder = copy_run(done, tmp_path, "wm.pt")
    ends = []
    asked = []
    rate = diwa.cosine_lr
    half = diwa.half_precision

    def noted_rate(*args, floor=0.1):
        ends.append(floor)
        return rate(*args, floor=floor)

    def noted_half(cfg, kind):
        asked.append(kind)
        return half(cfg, kind)

    monkeypatch.setattr(diwa, "cosine_lr", noted_rate)
    monkeypatch.setattr(diwa, "half_precision", noted_half)
    assert main(folder, "--stage", "wm", "--wm_lr_end", "0.7", "--wm_updates", "4") == 0
    assert ends == [0.7] * 4 and asked == ["cpu"] * 4


def test_changed_setting_is_named(done, capsys):
    """A stage refuses an input of other settings, and says which setting differs and what to type."""
    assert main(done, "--stage", "finetune", "--wm_h", "32") == 2
    message = capsys.readouterr().err
    assert "wm_h=64" in message and "wm_h=32" in message and "--stage wm" in message


def test_what_is_done_again_says_why(done, tmp_path, capsys):
    """A stage whose own settings have changed is done again, and says which were which."""
    folder = copy_run(done, tmp_path)
    before = config(folder).bc_updates
    assert main(folder, "--stage", "bc", "--bc_updates", "3") == 0
    assert f"bc: bc_updates was {before}, is 3; it is done again, which took" in capsys.readouterr().out
    changed = dict(bc_updates=2, bc_batch=8, bc_lr=1e-3, bc_ema=0.9, bc_hidden=8, bc_steps=10, bc_chunk=2)
    assert main(folder, "--stage", "bc", *[str(x) for k, v in changed.items() for x in (f"--{k}", v)]) == 0
    said = next(line for line in capsys.readouterr().out.splitlines() if "done again" in line)
    assert said.count(" was ") == 6 and " ...; it is done again" in said


@pytest.mark.parametrize("stage, what, next_stage", [("wm", "model", "bc"), ("bc", "actor", "finetune"),
                                                     ("reward", "model", "finetune")])
def test_kept_weights_of_another_network(done, tmp_path, capsys, stage, what, next_stage):
    """--keep uses what older code has left; where its layers have other names, that is one clear sentence."""
    folder = copy_run(done, tmp_path)
    path = runs.output(config(folder), stage)
    content = torch.load(path, weights_only=True)
    weights = content[what]
    name = next(name for name in weights if name.endswith(".weight"))
    weights["an_older_name"] = weights.pop(name)
    torch.save(content, path)
    other = ["--bc_updates", "3"] if next_stage == "bc" else ["--ft_epochs", "1"]
    assert main(folder, "--stage", next_stage, "--keep", stage, *other) == 2
    said = capsys.readouterr().err
    assert f"the weights of {stage} are of another network" in said and "without --keep" in said


def test_a_report_made_again_is_the_same(done, tmp_path):
    """Nothing in it depends on what was done before it, not even the dream in its film."""
    folder = copy_run(done, tmp_path) / "smoke"
    names = [f"dream_{config(tmp_path).task}.gif", "report.md"]
    before = [(folder / name).read_bytes() for name in names]
    (folder / names[0]).unlink()
    assert main(tmp_path, "--stage", "report") == 0
    assert [(folder / name).read_bytes() for name in names] == before


def test_offline_stages_step_no_simulator(done, tmp_path, monkeypatch):
    """From the recorded data to the fine-tuned policy nothing may touch a simulator."""
    folder = copy_run(done, tmp_path, "wm.pt", "bc_*", "reward_*", "finetune_*")

    def forbidden(*a, **k):
        raise AssertionError("an offline stage built a simulator")

    monkeypatch.setattr(calvin_sim, "Tabletop", forbidden)
    for module in (runs, evaluate, record):
        monkeypatch.setattr(module, "in_processes", forbidden)
    for stage in ("wm", "bc", "reward", "finetune"):
        assert main(folder, "--stage", stage) == 0
    assert (folder / "smoke" / "finetune_close_drawer.pt").exists()


KILLED = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import diwa
from support import record, runs

save = runs.save
in_processes = runs.in_processes

def save_and_die(path, content):
    save(path, content)
    if path.name.endswith(".partial.pt"):
        os.kill(os.getpid(), signal.SIGKILL)

def two_results_and_die(*args):
    for i, result in enumerate(in_processes(*args)):
        if i == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        yield result

runs.save = save_and_die
record.in_processes = two_results_and_die
runs.SAVE_EVERY = 0
diwa.main(sys.argv[1:])
"""


@pytest.mark.parametrize("stage", ["wm", "finetune"])
def test_killed_run_ends_as_if_nothing_had_happened(done, tmp_path, monkeypatch, capsys, stage):
    """kill -9 in the middle, the same command again: bit-identical weights."""
    name = "wm.pt" if stage == "wm" else "finetune_close_drawer.pt"
    folder = copy_run(done, tmp_path, name)
    partial = folder / "smoke" / name.replace(".pt", ".partial.pt")
    killed = shell(*TINY, "--runs", folder, "--stage", stage, code=KILLED)
    assert killed.returncode == -signal.SIGKILL
    assert partial.exists() and not (folder / "smoke" / name).exists(), "killed in the middle"
    # components fitted anew may have other signs: it must keep those it has
    monkeypatch.setattr(diwa.LinearCodec, "fit", None)
    assert main(folder, "--stage", stage) == 0
    assert "resumes at" in capsys.readouterr().out
    key = "model" if stage == "wm" else "actor"
    a, b = (torch.load(f / "smoke" / name, weights_only=True)[key] for f in (done, folder))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not partial.exists()


def test_time_left_is_reckoned_from_what_this_run_did(monkeypatch, capsys):
    """60 of 100 episodes were there already and pass at once: 10 more in 20 s leave 30 for a minute."""
    clock = [1000.0]
    monkeypatch.setattr(runs.time, "time", lambda: clock[0])
    progress = runs.Progress("episodes", 100, 60)
    for done in range(1, 61):
        progress(done)
    assert capsys.readouterr().out == ""
    clock[0] += 20
    progress(70)
    assert capsys.readouterr().out.split() == ["episodes", "70/100", "0.5/s", "1:00", "left"]


def test_killed_recording_resumes(done, tmp_path):
    """Episodes that were recorded before the kill are kept, and the dataset is the same."""
    killed = shell(*TINY, "--runs", tmp_path, "--stage", "demos", code=KILLED)
    assert killed.returncode == -signal.SIGKILL
    parts = tmp_path / "smoke" / "demos_close_drawer.parts"
    kept = [path.name for path in parts.glob("[!.]*.npz")]
    assert len(kept) >= 2
    for part in kept:                                       # frames that only a resumed run can have
        frames = dict(np.load(parts / part))
        frames["robot_obs"][0, 0] += 1
        data.save_part(parts / part, frames)
    watch = tmp_path / "smoke" / "demos_close_drawer.minutes.json"
    watch.write_text(json.dumps(dict(json.loads(watch.read_text()), minutes=7.0)))
    assert main(tmp_path, "--stage", "demos") == 0
    (minutes,) = [row[4] for row in runs.log_rows(tmp_path / "smoke" / "log.csv") if row[3] == "minutes"]
    assert 7 < float(minutes) < 8 and not watch.exists()
    a, b = (runs.Dataset(f / "smoke" / "demos_close_drawer") for f in (done, tmp_path))
    assert all((a[k] == b[k]).all() for k in ("rgb_static", "rgb_gripper", "scene_obs", "rel_actions"))
    assert ((a["robot_obs"] != b["robot_obs"]).sum() == len(kept))


def test_nan_names_stage_step_and_term(done, tmp_path, capsys):
    folder = copy_run(done, tmp_path, "wm.pt")
    assert main(folder, "--stage", "wm", "--wm_lr", "1e30") == 2
    message = capsys.readouterr().err
    assert "stage wm" in message and "steps 1 and 20" in message and "the term '" in message
    assert "give a smaller --wm_lr, and" in message
    assert not (folder / "smoke" / "wm.pt").exists()


def test_the_stage_that_is_behind_is_named(done, tmp_path, no_pictures, capsys):
    """Fine-tuned anew, evaluated not: the advice is to evaluate, although the setting is fine-tuning's."""
    folder = copy_run(done, tmp_path)
    flags = ["--ft_gamma", "0.9"]
    assert main(folder, *flags, "--stage", "report") == 2
    assert "run --stage finetune again" in capsys.readouterr().err
    assert main(folder, *flags, "--stage", "finetune") == 0
    assert main(folder, *flags, "--stage", "report") == 2
    assert "run --stage eval again" in capsys.readouterr().err
    assert main(folder, *flags, "--stage", "eval") == main(folder, *flags, "--stage", "report") == 0


def test_truncated_checkpoint(done, tmp_path, capsys):
    folder = copy_run(done, tmp_path)
    path = folder / "smoke" / "wm.pt"
    path.write_bytes(path.read_bytes()[:1000])
    assert main(folder, "--stage", "bc", "--bc_updates", "7") == 2
    assert "wm.pt is damaged" in capsys.readouterr().err


def test_checkpoint_with_code_inside_is_refused(done, tmp_path, capsys):
    """weights_only: a crafted checkpoint may not run anything."""
    import pickle
    folder = copy_run(done, tmp_path)
    witness = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {witness}",)

    (folder / "smoke" / "wm.pt").write_bytes(pickle.dumps(Evil()))
    assert main(folder, "--stage", "bc", "--bc_updates", "7") == 2
    assert not witness.exists()


@pytest.mark.parametrize("flags, words", [
    (["--task", "open_drawr"], ["open_drawr", "did you mean open_drawer"]),
    (["--wm_updats", "3"], ["--wm_updats", "did you mean --wm_updates"]),
    (["--preset", "huge"], ["huge", "cpu, gpu, paper, class, smoke"]),
    (["--stage", "dream"], ["dream", "finetune"]),
    (["--wm_updates", "many"], ["wm_updates", "many"]),
    (["--wm_length", "1"], ["--wm_length 1", "give 2"]),
    (["--ft_steps", "21", "--stage", "bc"], ["ft_steps"]),
    (["--bc_net", "u"], ["--bc_net u", "mlp", "unet"]),
    (["--bc_actor", "normal"], ["--bc_actor normal", "diffusion", "gaussian"]),
    (["--reward_labels", "rule"], ["--reward_labels rule", "unlabelled", "strict"]),
    (["--ft_twice", "2"], ["ft_twice", "2"]),
    (["--wm_bf16", "2"], ["wm_bf16", "2"]),
    (["--ft_ema", "1.5"], ["ft_ema", "1.5"]),
    (["--wm_lr_end", "-1"], ["wm_lr_end", "-1"]),
    (["--stage", "online", "--sim", "none"], ["--sim"]),
    (["--ft_iterations", "1"], ["ft_iterations", "ft_warmup"]),
    (["--stage", "eval", "--task", "turn_on_led"], ["missing", "--stage"]),
    (["--reward_labels", "state", "--wm_state", "0"], ["--wm_state 100"]),
    (["--ft_doubt", "1"], ["--wm_heads 5"]),
    (["--wm_heads", "1"], ["--wm_heads 5"]),
    (["--bc_actor", "gaussian", "--bc_net", "unet"], ["--bc_net mlp"]),
    (["--ft_horizon", "7"], ["--ft_chunks 6", "give --ft_horizon 6"]),
    (["--preset", "class", "--task", "open_drawer"], ["--play_tasks move_slider_left,move_slider_right,"]),
    (["--play_tasks", "open_drawer,close"], ["--play_tasks close", "close_drawer"]),
])
def test_bad_input_is_one_sentence(done, capsys, flags, words):
    assert diwa.main([*TINY, "--runs", str(done), *flags]) == 2
    message = capsys.readouterr().err
    assert all(w in message for w in words) and "Traceback" not in message
    assert len(message.strip().splitlines()) == 1


def test_interrupt_keeps_the_work(done, tmp_path):
    """Ctrl-C: a sentence and exit code 130."""
    folder = copy_run(done, tmp_path, "wm.pt")
    words = command(*TINY, "--runs", folder, "--stage", "wm", "--wm_updates", "100000")

    def listen():                                           # a test that runs in the background is deaf to it
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(words, preexec_fn=listen, **pipes)
    for line in process.stdout:
        if "100,000" in line:
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "same command" in err


def test_all_tasks_share_play_and_world_model(done, tmp_path, monkeypatch, capsys):
    """--task all goes through the stages task by task and ends with one table."""
    asked = []

    def stage(cfg, name, work):
        assert work is getattr(diwa, f"stage_{name}")
        asked.append((cfg.task, name))

    def written(cfg):
        row = json.loads((done / "smoke" / "result_close_drawer.json").read_text())
        (tmp_path / "smoke").mkdir(exist_ok=True)
        (tmp_path / "smoke" / f"result_{cfg.task}.json").write_text(json.dumps(dict(row, task=cfg.task)))

    monkeypatch.setattr(runs, "run_stage", stage)
    monkeypatch.setitem(diwa.STAGE_WORK, "report", written)
    assert diwa.main([*TINY, "--runs", str(tmp_path), "--task", "all"]) == 0
    assert asked == [(task, name) for task in calvin_sim.TASKS for name in runs.PIPELINE]
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table][2:-1] == list(report.PAPER)


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        diwa.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(diwa.Config):
        assert f"--{field.name}" in text
    text = " ".join(text.split())                            # wrapped lines joined
    for name, value in runs.BY_SIMULATOR["calvin"].items():
        assert f"[{getattr(diwa.Config, name)}; calvin: {value}]" in text, name


def test_online_rival_runs(done):
    """SimEnv has DreamEnv's interface, so DPPO online is the same code."""
    cfg = config(done, "--ft_dreams", "2")
    agent = diwa.load_agent(cfg, "bc")
    actor = agent.actor
    arms = online.Arms(cfg, [calvin_sim.Tabletop(64) for _ in range(2)])
    env = online.SimEnv(cfg, agent, [arms])
    feature = env.reset()
    env.age[:] = env.horizon - 1
    following, reward, terminated, truncated, final = env.step(actor.sample_chain(feature)[:, -1])
    assert following.shape == final.shape == feature.shape and reward.shape == (2,)
    assert (terminated | truncated).all()
    assert not torch.equal(following, final), "a finished episode restarts; its last feature is still there"
    assert np.all(env.age == 0)


def test_an_arm_that_succeeds_in_its_last_chunk_was_not_cut(done, monkeypatch):
    """Nor does it bootstrap; and each new episode begins elsewhere, with no memory of the one before."""
    cfg = config(done, "--ft_dreams", "2")
    agent = diwa.load_agent(cfg, "bc")
    arms = online.Arms(cfg, [calvin_sim.Tabletop(64) for _ in range(2)])
    env = online.SimEnv(cfg, agent, [arms])
    torch.manual_seed(1)
    env.reset()
    poses = [seen["robot_obs"].copy() for seen in arms.seen]
    env.age[:] = env.horizon - 1
    monkeypatch.setattr(calvin_sim, "success", lambda *a: True)
    _, _, terminated, truncated, _ = env.step(torch.zeros(2, 4, 7))
    assert terminated.all() and not truncated.any() and env.simulator_steps == 2
    fresh = diwa.Agent(cfg, agent.wm, agent.actor)
    fresh.reset(2)
    fresh.observe(online.stacked(arms.seen))
    torch.testing.assert_close(env.filter.h, fresh.h)
    torch.manual_seed(2)
    env.reset()
    assert not np.array_equal(poses[0], arms.seen[0]["robot_obs"])
    for sim in arms.sims:
        sim.close()


def test_steps_end_with_success_and_a_match_is_as_good(monkeypatch):
    """An arm that has succeeded takes no more steps; the rule compares now with the first scene."""
    class Sim:
        def reset(self, *start):
            return dict(scene_obs="closed")

        def step(self, action, look):
            return dict(scene_obs="open", robot_obs=0)

    monkeypatch.setattr(calvin_sim, "success", lambda task, first, now: (first, now) == ("closed", "open"))
    arms = online.Arms(SimpleNamespace(task="open_drawer", wm_stride=2), [Sim()])
    arms.begin({0: ()})
    assert arms.chunk({0: np.zeros((4, 7))})[0][1:] == (True, 1)
    assert interactions.matches(0.95, 0.95) and not interactions.matches(0.925, 0.95)


def test_the_rival_is_asked_on_other_starts_than_are_reported(done, monkeypatch):
    """Whether it has matched is asked on the learning curve's starts; its row is of the reported ones."""
    cfg = config(done)
    asked = []

    def successes(actor, seeds):
        asked.append(list(seeds))
        return torch.arange(len(seeds)) % 2 == 0

    rival = online.Rival(cfg, SimpleNamespace(simulator_steps=0, successes=successes))
    rival.reached(None, {})
    reported, others = evaluate.start_seeds(cfg)
    rows = []
    monkeypatch.setattr(interactions, "write_row", lambda *a: rows.append(a[-2:]))
    rival.env.simulator_steps = 1_234_567
    rival.judged(None)
    assert asked == [list(others), list(reported)] and not set(others) & set(reported)
    ((taken, success),) = rows
    assert taken == 1_234_567 and success["online"] == [True, False, True, False]
    results = json.loads((done / "smoke" / "eval_close_drawer.json").read_text())["results"]
    for policy in ("bc", "tuned"):
        assert success[policy] == [episode["success"] for episode in results[policy]]
    # 500,000 steps, of 16 arms x 6 chunks x 4 actions an iteration
    assert rival.iterations == 1303


def test_the_rival_begins_with_the_cloned_policy(done, monkeypatch):
    """In as many processes as there are workers, and no more than there are arms."""
    asked = []
    monkeypatch.setattr(diwa, "load_agent", lambda cfg, policy: asked.append(policy) or SimpleNamespace(
        wm=None, actor=None))
    monkeypatch.setattr(diwa, "finetune", lambda *a: None)
    monkeypatch.setattr(online, "ArmsElsewhere", lambda cfg, arms: arms)
    diwa.stage_online(config(done))
    assert asked == ["bc"]
    assert online.simulators(config(done, "--workers", "3")) == [6, 6, 6]
    assert online.simulators(config(done, "--workers", "9", "--ft_dreams", "2")) == [1, 1]


def test_a_killed_rival_ends_as_if_nothing_had_happened(done, tmp_path, capsys):
    """kill -9 in the middle, the same command again: the same weights, and no step is forgotten."""
    results = []
    for kind in ("whole", "killed"):
        folder = copy_run(done, tmp_path / kind)
        path = folder / "smoke" / "eval_close_drawer.json"
        path.write_text(json.dumps(dict(json.loads(path.read_text()), curve={"0": 0.0, "2": 1.1})))
        flags = ["--stage", "online", "--online_steps", "700"]
        if kind == "killed":
            assert shell(*TINY, "--runs", folder, *flags, code=KILLED).returncode == -signal.SIGKILL
        assert main(folder, *flags) == 0
        results.append(torch.load(folder / "smoke" / "online_close_drawer.pt", weights_only=True))
        row = json.loads((folder / "smoke" / "online_close_drawer.json").read_text())
        assert len(row["steps"]) == 3 and row["steps"][-1] == results[-1]["simulator_steps"]
    assert "resumes at" in capsys.readouterr().out
    whole, killed = results
    assert whole["simulator_steps"] == killed["simulator_steps"] > 500
    assert all(torch.equal(whole["actor"][k], killed["actor"][k]) for k in whole["actor"])


def test_arms_may_be_grouped_in_any_way(done):
    """Starts and noise are drawn in one place, so two groups, or processes, do what one does."""
    cfg = config(done, "--ft_dreams", "3")
    agent = diwa.load_agent(cfg, "bc")
    sims = [calvin_sim.Tabletop(64) for _ in range(3)]
    elsewhere = [online.ArmsElsewhere(cfg, 2), online.ArmsElsewhere(cfg, 1)]
    ways = [[online.Arms(cfg, sims)], [online.Arms(cfg, sims[:2]), online.Arms(cfg, sims[2:])], elsewhere]
    results = []
    for groups in ways:
        runs.seed_everything("test", 0)
        env = online.SimEnv(cfg, agent, groups)
        env.horizon = 2                                     # so that they begin anew, too
        rows = [[env.reset()]]
        for _ in range(3):
            rows.append(env.step(agent.actor.sample_chain(rows[-1][0])[:, -1]))
        judged = SimpleNamespace(act=agent.actor.act)       # acting only: what judges does not explore
        rows.append([env.successes(judged, [7000, 7001, 7002, 7003])])
        assert len(rows[-1][0]) == 4, "more seeds than arms"
        results.append([value for row in rows for value in row])
        assert env.simulator_steps == 3 * 3 * 4 and env.horizon == 2, "what judges is not counted"
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    for sim in sims:
        sim.close()
    for group in elsewhere:
        group.pool.shutdown()


def test_the_online_rival_counts_its_steps(done, tmp_path, monkeypatch, capsys):
    """--stage online: it stops when it is as good as the policy tuned in the dream, or at its budget."""
    folder = copy_run(done, tmp_path)
    rate = iter([0.1, 0.4, 0.6, 0.9])
    monkeypatch.setattr(online.Rival, "reached", watched(online.Rival.reached, rate))
    evaluation = folder / "smoke" / "eval_close_drawer.json"
    content = json.loads(evaluation.read_text())
    evaluation.write_text(json.dumps(dict(content, curve={"0": 0.1, "2": 0.5})))
    flags = ["--stage", "online", "--ft_dreams", "4", "--online_steps", "100000"]
    assert main(folder, *flags) == 2
    assert "ft_dreams" in capsys.readouterr().err, "it practises as the dream did, and is compared with that"
    flags = ["--stage", "online", "--online_steps", "100000"]
    assert main(folder, *flags) == 0
    row = json.loads((folder / "smoke" / "online_close_drawer.json").read_text())
    assert row["matched"] and row["target"] == 0.5 and row["curve"] == pytest.approx([0.1, 0.1, 0.4, 0.6])
    assert row["steps"][0] == 0 and 0 < row["steps"][1] <= 16 * 6 * 4 and len(row["steps"]) == 4
    assert [len(x) for x in row["success"].values()] == [4, 4, 4]
    assert row["recorded"]["play"] == 1000
    out = capsys.readouterr().out
    assert f"| {row['steps'][-1]:,} | 345,600 | 1,000;" in out
    page = (folder / "smoke" / "online_close_drawer.md").read_text()
    assert "Practice in the simulator" in page and interactions.table([row])[-1] in page
    assert "| close_drawer `--preset smoke --play_frames 1000 " in out, "a run may change, and the row stays"
    assert torch.load(folder / "smoke" / "online_close_drawer.pt", weights_only=True)["simulator_steps"] \
        == row["steps"][-1]
    assert main(folder, *flags) == 0 and "skipped" in capsys.readouterr().out
    monkeypatch.setattr(online.Rival, "reached", watched(REACHED, iter([0.1] * 9)))
    assert main(folder, "--stage", "online", "--online_steps", "700") == 0
    assert "not in" in capsys.readouterr().out
    picture = tmp_path / "figure.png"
    path = str(folder / "smoke" / "online_close_drawer.json")
    assert interactions.main([path, "--out", str(picture)]) == 0 and picture.stat().st_size > 1000
    assert main(folder, "--stage", "eval", "--policy", "online", "--online_steps", "700") == 0
    assert interactions.main([str(tmp_path / "none.json")]) == 2
    assert main(folder, "--stage", "online", "--eval_curve", "0") == 2
    assert "--eval_curve 40" in capsys.readouterr().err


REACHED = online.Rival.reached


def watched(reached, rates):
    """Rival.reached, in whose simulators policies succeed as often as said."""
    def told(rival, actor, metrics):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rival.env, "successes", lambda *a: torch.tensor([next(rates)]))
            return reached(rival, actor, metrics)

    return told


def test_practice_in_a_simulator_is_reported_as_that(done, tmp_path, no_pictures):
    """finetune(SimEnv): its steps are counted, resumed, and named by report and row; a dream's are none."""
    folder = copy_run(done, tmp_path, "finetune_*", "eval_*", "result_*")
    flags = ["--ft_chunks", "2", "--ft_horizon", "2", "--ft_dreams", "2", "--ft_minibatches", "2"]
    cfg = config(folder, *flags)
    agent = diwa.load_agent(cfg, "bc")
    sims = [calvin_sim.Tabletop(64) for _ in range(2)]
    env = online.SimEnv(cfg, agent, [online.Arms(cfg, sims)])
    env.load_state_dict(dict(simulator_steps=1000))         # as if it had been killed after 1,000
    diwa.finetune(cfg, env, agent.actor.train())
    for sim in sims:
        sim.close()
    steps = env.simulator_steps
    assert 1000 + 2 * 2 * 2 < steps <= 1000 + 2 * 2 * 2 * 4, ("iterations x chunks x arms x steps, but for "
                                                              "early ends")
    assert main(folder, *flags, "--stage", "eval") == 0
    assert main(folder, *flags, "--stage", "report") == 0
    text = (folder / "smoke" / "report.md").read_text()
    assert f"fine-tuned in the simulator, {steps:,} steps" in text and "No simulator step" not in text
    row = json.loads((folder / "smoke" / "result_close_drawer.json").read_text())
    assert row["simulator_steps"] == steps and f"{steps:,} steps" in report.table([row])[2]


def test_a_row_says_what_its_run_changed(done):
    """What --preset smoke alone would not do; not how often the policies were tried."""
    changed = json.loads((done / "smoke" / "result_close_drawer.json").read_text())["changed"]
    flags = dict(zip(TINY[::2], TINY[1::2]))
    aside = {"--preset", "--device", "--task", "--eval_episodes", "--eval_curve"}
    assert {f"--{name}": str(value) for name, value in changed.items()} == {
        flag: value for flag, value in flags.items() if flag not in aside}


def test_a_finished_policy_is_deployed_by_its_run(done):
    """diwa.deploy: what a robot runs, by the run's name alone; its net is the tuned one."""
    agent = diwa.deploy("--run", "smoke", "--runs", str(done), "--task", "close_drawer", "--device", "cpu")
    tuned = torch.load(done / "smoke" / "finetune_close_drawer.pt", weights_only=True)["actor"]
    assert all(torch.equal(value, tuned[name]) for name, value in agent.actor.state_dict().items())
    play = runs.Dataset(done / "smoke" / "play")
    agent.reset(1)
    for t in range(3):
        action, = agent.act({key: [play[key][t]] for key in ("rgb_static", "rgb_gripper", "robot_obs")})
        assert action.shape == (7,) and np.abs(action).max() <= 1 and action[6] in (-1, 1)
    agent.reset(1)                                          # a robot's own numbers are Python's, of 64 bits
    seen = {key: [play[key][0]] for key in ("rgb_static", "rgb_gripper")}
    action, = agent.act(dict(seen, robot_obs=[play["robot_obs"][0].astype(float)]))
    assert action.shape == (7,)


def test_a_simulator_brings_its_own_settings(tmp_path):
    """--sim calvin has strict labels, categoricals and more updates; a recording alone (--sim none) knows no
    scene state; unless the preset, the command or the run says otherwise."""
    def settings(*flags):
        cfg = runs.parse(["--runs", str(tmp_path), *flags], diwa.Config, diwa.PRESETS, "", "")
        return cfg.wm_state, cfg.reward_labels

    assert settings() == (100, "unlabelled") and settings("--sim", "calvin") == (100, "strict")
    assert settings("--sim", "none") == (0, "unlabelled")
    cfg = runs.parse(["--runs", str(tmp_path), "--sim", "calvin"], diwa.Config, diwa.PRESETS, "", "")
    assert (cfg.wm_updates, cfg.wm_bf16, cfg.wm_latent, cfg.wm_z) == (18_000, 1, "categorical", 32)
    assert settings("--sim", "calvin", "--preset", "smoke") == (100, "strict")
    assert settings("--sim", "calvin", "--preset", "paper") == (0, "demos")
    assert settings("--sim", "calvin", "--reward_labels", "demos", "--wm_state", "0") == (0, "demos")
    (tmp_path / "old").mkdir()
    saved = dict(settings=dict(sim="calvin", preset="cpu", reward_labels="unlabelled", wm_state=0.0))
    (tmp_path / "old" / "config.json").write_text(json.dumps(saved))
    assert settings("--run", "old", "--sim", "calvin") == (0, "unlabelled")


def test_the_log_of_a_stage_is_of_its_last_work(tmp_path):
    """Other work cuts the rows of the earlier one, also where it logs none itself (--reward_labels state);
    the same work, killed, goes on after the last row that it had saved."""
    cfg = diwa.Config(runs=str(tmp_path), run="r")
    (tmp_path / "r").mkdir()
    for stage in ("play", "wm"):
        for step in (20, 40):
            runs.Log(cfg, stage)(step, dict(loss=1.0))
    runs.save(runs.partial_path(cfg, "play"), dict(origin=runs.origin(cfg, "play"), done=20, state={}))
    runs.run_stage(cfg, "play", lambda cfg: None)
    assert runs.read_log(cfg, "play", "loss") == ([20], [1.0])
    assert len(runs.read_log(cfg, "play", "minutes")[1]) == 1
    cfg.play_frames += 250                                  # what was saved is of another recording
    runs.run_stage(cfg, "play", lambda cfg: None)
    assert runs.read_log(cfg, "play", "loss") == ([], [])
    assert runs.read_log(cfg, "wm", "loss") == ([20, 40], [1.0, 1.0])


def test_a_run_stays_with_its_simulator(tmp_path):
    """The default's run is runs/cpu in both, and CALVIN would get the tabletop's settings without a word."""
    def parsed(*flags):
        return runs.parse(["--runs", str(tmp_path), *flags], diwa.Config, diwa.PRESETS, "", "")

    (tmp_path / "cpu").mkdir()
    settings = dict(sim="tabletop", preset="smoke", reward_labels="unlabelled")
    (tmp_path / "cpu" / "config.json").write_text(json.dumps(dict(settings=settings)))
    with pytest.raises(runs.InputError, match="cpu is a run of the other simulator.*--run"):
        parsed("--sim", "calvin")
    assert parsed("--sim", "calvin", "--run", "there").reward_labels == "strict"
    assert parsed("--sim", "calvin", "--preset", "cpu").reward_labels == "strict"
    cfg = parsed()
    assert (cfg.run, cfg.preset) == ("cpu", "smoke"), "what it reads it writes, whatever preset it had"


def test_held_out_demonstrations_go_with_their_play(tmp_path, monkeypatch):
    """--play_replay 0 after 20: the old ones would judge the new play's model."""
    cfg = diwa.Config(run="x", runs=str(tmp_path), play_replay=0)
    (tmp_path / "x" / "replay").mkdir(parents=True)
    (tmp_path / "x" / "play.parts").mkdir()
    monkeypatch.setattr(record, "record", lambda cfg, parts, wanted: {"play": []})
    monkeypatch.setattr(record, "pack_recorded", lambda *given: None)
    record.stage_play(cfg)
    assert not (tmp_path / "x" / "replay").exists()


def test_what_judges_is_cloned_only_for_want_of_others():
    """Episode 100..199 is held out: what lies in it judges, and what only reaches into it does neither."""
    play = SimpleNamespace(split=lambda: (np.array([[0, 99], [200, 299]]), np.array([[100, 199]])))
    inside, across, outside = ("pour_tea", 120, 150), ("pour_tea", 80, 110), ("pour_tea", 210, 240)
    tiny = ("pour_tea", 130, 137)
    others = [("close_lid", 20, 40), tiny]
    every = [inside, across, outside, *others]
    assert record.divided("pour_tea", every, play) == ([outside], [inside], False)
    assert record.divided("pour_tea", [inside, *others], play) == ([inside], [inside], True)
    assert record.divided("pour_tea", [outside, across], play) == ([outside], [outside, across], True)
    assert record.divided("wash_up", [inside], play) == ([], [], True)


def test_a_simulator_that_dies_is_one_sentence():
    """Whether it is noticed when asked or when it should answer."""
    def broken(given):
        raise BrokenProcessPool("gone")

    later = Future()
    later.set_exception(BrokenProcessPool("gone"))
    cfg = SimpleNamespace(ft_horizon=1)
    for begin in (broken, lambda given: later):
        env = online.SimEnv(cfg, SimpleNamespace(wm=None), [SimpleNamespace(begin=begin)])
        with pytest.raises(runs.InputError, match="a simulator process died.*--workers"):
            env.ask("begin", {0: None})


def test_a_gpu_gets_the_same_preset(monkeypatch, tmp_path):
    """Convolutions (`--preset gpu`) cost more and are no better, so whoever has CUDA must ask."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    words = ["--runs", str(tmp_path)]
    cfg = runs.check_config(runs.parse(words, diwa.Config, diwa.PRESETS, "", ""))
    assert (cfg.device, cfg.preset, cfg.run, cfg.wm_encoder) == ("cuda", "cpu", "cpu", "linear")
    assert runs.parse([*words, "--preset", "gpu"], diwa.Config, diwa.PRESETS, "", "").wm_encoder == "conv"


def test_a_run_says_what_it_will_take(monkeypatch):
    """Minutes and GB at the start, scaled from measured ones by the settings they grow with; nothing where
    nothing was measured."""
    def line(*flags):
        cfg = runs.check_config(runs.parse(["--run", "none yet", *flags], diwa.Config, diwa.PRESETS, "", ""))
        return runs.expectation(cfg, 8)

    words = "--device", "cpu", "--preset", "cpu"
    monkeypatch.setattr(runs, "has_bfloat16", lambda device: False)
    assert "play 4.7, wm 10.1; for each of 8 tasks demos 0.1" in line(*words)
    assert "play 2.4, wm 20.2;" in line(*words, "--play_frames", "90000", "--wm_updates", "4000")
    assert "wm 5.2;" in line(*words, "--wm_batch", "32") and "wm 5.0;" in line(*words, "--wm_length", "10")
    assert "eval 0.3;" in line(*words, "--eval_episodes", "50")
    assert "wm 19.2;" in line(*words, "--wm_latent", "categorical", "--wm_z", "32")
    small = "--wm_latent", "categorical", "--wm_z", "16", "--wm_classes", "16"
    assert "wm 12.3;" in line(*words, *small)
    assert line(*words, "--wm_encoder", "conv") == ""
    assert "together 1.2," in line(*words, "--preset", "smoke")
    monkeypatch.setattr(runs, "has_bfloat16", lambda device: True)
    assert "wm 8.4;" in line(*words) and "wm 10.1;" in line(*words, "--wm_bf16", "0")


class Staring:
    """A simulator that looks at every step, whether it is asked to or not."""

    def __init__(self, sim):
        self.reset = sim.reset
        self.step = lambda action, look=True: sim.step(action)


def test_unseen_frames_are_not_missed(done):
    """Pictures that no filter takes in are not drawn: nothing else of evaluation and online rival changes."""
    cfg = config(done, "--ft_dreams", "3")
    agent = diwa.load_agent(cfg, "bc")
    sims = [calvin_sim.Tabletop(64) for _ in range(3)]
    results = []
    for used in (sims, [Staring(sim) for sim in sims]):
        runs.seed_everything("test", 0)
        episodes = evaluate.run_episodes(cfg, agent, used, [7000, 7001, 7002])
        arms = online.Arms(cfg, used)
        env = online.SimEnv(cfg, agent, [arms])
        rows = []
        feature = env.reset()
        for k in range(6):
            chunk = agent.actor.sample_chain(feature)[:, -1]
            if k == 3:                                      # one arm is done in the middle of a chunk
                arms.first[1] = np.where(np.arange(24) == calvin_sim.DRAWER, 1.0, arms.first[1])
            feature, reward, terminated, truncated, final = env.step(chunk)
            rows.append([feature, reward, terminated, truncated, final * ~terminated[:, None]])
        assert rows[3][2].tolist() == [False, True, False]
        results.append((episodes, rows))
    (seen, rollout), (stared, other) = results
    assert seen == stared
    assert all(torch.equal(a, b) for row, same in zip(rollout, other) for a, b in zip(row, same))
    for sim in sims:
        sim.close()


def test_the_tuned_policy_is_the_last_snapshot(done):
    """What is evaluated is what PPO ended with, and the learning curve ends with it."""
    cfg = config(done)
    tuned = runs.load(cfg, "finetune")
    assert sorted(map(int, tuned["snapshots"]))[-1] == cfg.ft_iterations
    for name, weight in tuned["snapshots"][str(cfg.ft_iterations)].items():
        assert torch.equal(weight, tuned["actor"]["net." + name])
    assert list(runs.load(cfg, "eval")["curve"])[-1] == str(cfg.ft_iterations)


def test_evaluation_does_not_depend_on_the_number_of_processes(monkeypatch):
    """A group shares its noise: whoever runs it, the groups are the same."""
    def here(cfg, function, jobs, name):
        for job in jobs:
            policy = job["policy"]
            yield [dict(seed=seed, policy=policy, mates=group) for group in job["groups"] for seed in group]

    monkeypatch.setattr(evaluate, "in_processes", here)
    seeds = range(7000, 7042)
    results = [evaluate.evaluate(diwa.Config(workers=n), diwa.load_agent, ["bc", "tuned"], seeds)
               for n in (1, 2, 3, 9)]
    assert all(r == results[0] for r in results)
    assert [episode["seed"] for episode in results[0]["tuned"]] == list(seeds)
    assert {e["policy"] for e in results[0]["bc"]} == {"bc"}


@pytest.fixture(scope="session")
def recording(done, tmp_path_factory):
    """What a user with a recording of their own has: play in a few long episodes, some spans of which carry
    a task's name."""
    def make(folder):
        play = data.Dataset(done / "smoke" / "play")
        demos = data.Dataset(done / "smoke" / "demos_close_drawer")
        parts = [folder / f"{i}.npz" for i in range(4)]
        spans = []
        for i, part in enumerate(parts):
            frames = {}
            for key in data.FIELDS:
                shown = [demos[key][a:b + 1] for _, a, b in demos.segments[i::4]]
                frames[key] = np.concatenate([play[key][250 * i:250 * i + 250], *shown])
            data.save_part(part, frames)
            spans.append(("close_drawer", 250, 250 + demos.segments[i][2] - demos.segments[i][1]))
        about = dict(source="a robot", renderer="a camera", keeps_target=False)
        data.pack(parts, folder / "packed", about, spans)

    return made_once(tmp_path_factory, "recording", make) / "packed"


def test_pieces_know_what_the_arm_had_been_told(recording, tmp_path):
    """Play and demonstrations that are cut out of long episodes: their targets are those of the episodes, and
    do not begin anew where the arm happens to be at the cut."""
    shutil.copytree(recording, tmp_path / "given")
    meta = json.loads((recording / "meta.json").read_text())
    (tmp_path / "given" / "meta.json").write_text(json.dumps(dict(meta, keeps_target=True)))
    for stage in ("play", "demos"):
        flags = ["--data", str(tmp_path / "given"), "--sim", "none", "--wm_state", "0", "--play_replay", "2"]
        assert main(tmp_path, *HASTY, *flags, "--stage", stage) == 0
    names = "given", "smoke/play", "smoke/demos_close_drawer", "smoke/replay"
    cfg = diwa.Config(device="cpu")
    given, play, demos, replay = (data.Recording(cfg, data.Dataset(tmp_path / name)) for name in names)
    torch.testing.assert_close(play.target, given.target)
    lead = given.target - torch.from_numpy(np.array(given.ds["robot_obs"])[:, :6])
    assert len(play.ds.episodes) > len(given.ds.episodes) and lead[play.ds.episodes[:, 0]].abs().max() > 0.005
    for cut in (demos, replay):
        for _, a, b in cut.ds.segments:
            robot = cut.ds["robot_obs"][a:b + 1]
            whole = given.ds["robot_obs"]
            at, = [i for _, i, _ in given.ds.segments if np.array_equal(whole[i:i + b - a + 1], robot)]
            torch.testing.assert_close(cut.target[a:b + 1], given.target[at:at + b - a + 1])


def test_a_recording_alone_is_enough(recording, tmp_path, capsys, no_pictures):
    """--sim none: every stage but the simulator's, ending in dream success; and then, on the same results, an
    evaluation in a simulator."""
    flags = [*HASTY, "--data", str(recording), "--play_replay", "2", "--wm_state", "0"]
    assert main(tmp_path, *flags, "--sim", "none") == 0
    folder = tmp_path / "smoke"
    text = (folder / "report.md").read_text()
    evaluation = json.loads((folder / "eval_close_drawer.json").read_text())
    assert "dream (no simulator was given)" in text and "precision" not in text and "rollout" not in text
    assert "nan" not in text.split("## The world model")[0]
    judges = [s for s in runs.Dataset(folder / "replay").segments if s[0] == "close_drawer"]
    dreams = [len(evaluation["results"][policy]) for policy in ("bc", "tuned")]
    assert dreams == [len(judges)] * 2 == [2, 2], ("one dream from each recorded first frame, though four "
                                                   "were asked for")
    assert "2 recorded first frames, of demonstrations that the policy was cloned from" in text
    assert "which nobody has checked" in text and "some of which were trained on" in text
    assert 0 <= evaluation["dream_success"] <= 1
    play = runs.Dataset(folder / "play")
    demos = runs.Dataset(folder / "demos_close_drawer")
    pictures = list((folder / "play").glob("rgb_*"))
    assert not pictures and len(play) == len(runs.Dataset(recording)), "the frames are not copied"
    first, last = play.episodes.T
    assert (last - first).max() < 200 and first[1:].tolist() == (last[:-1] + 1).tolist()
    assert len(demos.segments) == 4 and demos.meta["renderer"] == "a camera"
    parts = play, demos, runs.Dataset(folder / "replay")
    assert [part.meta["keeps_target"] for part in parts] == [False] * 3, "what the robot's owner said of it"
    capsys.readouterr()
    assert main(tmp_path, *flags, "--sim", "tabletop", "--eval_curve", "0") == 0
    out = capsys.readouterr().out
    assert out.count("skipped") == len(runs.PIPELINE) - 1, "only the evaluation depends on the simulator"
    assert "warning" in out and "a camera" in out, "other pictures than those it was trained on"


@pytest.mark.parametrize("flags, words", [
    (["--sim", "none"], "--data"),
    (["--sim", "none", "--data", "/nowhere"], "meta.json"),
    (["--sim", "calvn"], "calvin"),
    (["--sim", "none", "--data", "RECORDING", "--image-size", "32"], "--image_size 64"),
    (["--sim", "none", "--data", "RECORDING", "--task", "open_drawer", "--stage", "demos"],
     "no segments of open_drawer"),
])
def test_wrong_data_is_one_sentence(recording, tmp_path, capsys, flags, words):
    flags = [str(recording) if flag == "RECORDING" else flag for flag in flags]
    assert diwa.main([*TINY, "--runs", str(tmp_path), *flags]) == 2
    error = capsys.readouterr().err
    assert words in error and error.strip().count("\n") == 0


def test_dreams_start_in_no_held_out_frame(done, monkeypatch):
    """The trust table calls held-out play unseen: fine-tuning may not begin its dreams there."""
    cfg = config(done)
    used = []
    batch = diwa.Recording.batch

    def watched(recording, frames):
        used.append((recording.ds.path.name, np.asarray(frames).ravel()))
        return batch(recording, frames)

    monkeypatch.setattr(diwa.Recording, "batch", watched)
    embedding, _, _ = diwa.dream_starts(cfg, diwa.load_world_model(cfg))
    frames = np.concatenate([f for name, f in used if name == "play"])
    train, held_out = runs.load(cfg, "play").split()
    assert all(any(a <= f <= b for a, b in train) for f in frames)
    assert not any(a <= f <= b for f in frames for a, b in held_out)
    assert len(embedding) > 100 and len(frames) > 400


def test_one_policy_alone(done, tmp_path, capsys):
    """--policy evaluates one policy from the reported starts and leaves the reported result alone."""
    folder = copy_run(done, tmp_path)
    before = (folder / "smoke" / "eval_close_drawer.json").read_bytes()
    config = json.loads((folder / "smoke" / "config.json").read_text())["settings"]
    for policy in ("bc", "2"):
        assert main(folder, "--stage", "eval", "--policy", policy, "--eval_curve", "3") == 0
        result = folder / "smoke" / f"eval_close_drawer_{policy}.json"
        rows = json.loads(result.read_text())["results"][policy]
        reported = json.loads(before)["results"]["bc" if policy == "bc" else "tuned"]
        assert [r["success"] for r in rows] == [r["success"] for r in reported] and len(rows) == 4
    assert (folder / "smoke" / "eval_close_drawer.json").read_bytes() == before
    assert "in the dream" in capsys.readouterr().out
    settings = json.loads((folder / "smoke" / "config.json").read_text())["settings"]
    assert settings == config, "a trial changes nothing that the run remembers"
    refused = [
        (["--policy", "bc"], "--stage eval"),
        (["--stage", "eval", "--policy", "best"], "bc, tuned"),
        (["--stage", "eval", "--policy", "7"], "no snapshot 7"),
    ]
    for flags, words in refused:
        assert main(folder, *flags) == 2
        error = capsys.readouterr().err
        assert words in error and len(error.strip().splitlines()) == 1
