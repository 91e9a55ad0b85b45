"""The real simulator behind RealCalvin.  Most of it runs only where the environment says what to run it on:

    CALVIN_ENV_ROOT   a clone of github.com/mees/calvin_env, with its packages installed (see
                      support/calvin_real.py)
    CALVIN_SAMPLE     a CALVIN split to import, predict and replay: frames, index and language annotations
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))
import calvin_sim as cs  # noqa: E402
import data  # noqa: E402
import fidelity  # noqa: E402
from support import calvin_import, expert  # noqa: E402
from support.calvin_real import RealCalvin  # noqa: E402

CLONE = os.environ.get("CALVIN_ENV_ROOT")
SAMPLE = os.environ.get("CALVIN_SAMPLE")
needs_clone = pytest.mark.skipif(not CLONE, reason="CALVIN_ENV_ROOT is not set")
needs_sample = pytest.mark.skipif(not SAMPLE, reason="CALVIN_SAMPLE is not set")
STILL = np.array([0, 0, 0, 0, 0, 0, 1.0])


@pytest.fixture(scope="module")
def blind():
    """One a process: the tests that need pictures open their own when this one is closed, at the end of the
    file."""
    sim = RealCalvin(render=False, root=CLONE)
    yield sim
    sim.close()


def start(task="open_drawer", seed=0):
    return cs.sample_start(task, np.random.default_rng(seed))


# ------------------------------------------------------------------------------------------------------------
# without calvin_env

def test_a_missing_clone_is_one_sentence(tmp_path):
    said = "no clone of calvin_env .*git clone https://github.com/mees/calvin_env"
    with pytest.raises(data.InputError, match=said) as caught:
        RealCalvin(root=tmp_path)
    assert "\n" not in str(caught.value) and "--calvin-root" in str(caught.value)


def test_a_missing_package_is_one_sentence_with_the_pip_line(tmp_path, monkeypatch):
    files = "calvin_env/envs/play_table_env.py", "conf/config_data_collection.yaml", "data/calvin_table_D/x"
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setitem(sys.modules, "hydra", None)
    path = list(sys.path)
    before = sys.modules.get("git")
    with pytest.raises(data.InputError, match="hydra.*pip install hydra-core") as caught:
        RealCalvin(root=tmp_path)
    assert "\n" not in str(caught.value) and sys.path == path and sys.modules.get("git") is before


def test_the_command_line_says_it_and_exits_with_2(tmp_path):
    check = ["calvin_sim.py", "check", "--sim", "calvin"]
    train = ["diwa.py", "--sim", "calvin", "--runs", str(tmp_path)]
    for program, *flags in (check, train):
        command = [sys.executable, str(ROOT / program), *flags, "--calvin-root", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and "git clone" in done.stderr and "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------------------------
# the sample: bar 1

@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    out = tmp_path_factory.mktemp("sample") / "packed"
    calvin_import.import_calvin(SAMPLE, out, 64, workers=1)
    return data.Dataset(out)


@needs_sample
def test_the_sample_imports_and_the_predicates_agree_with_its_labels(sample):
    print(f"\n{len(sample)} frames, {len(sample.episodes)} episodes, {len(sample.segments)} segments")
    assert (len(sample), len(sample.episodes), len(sample.segments)) == (392, 6, 9)
    assert {task for task, _, _ in sample.segments} == set(cs.TASKS)
    for task, first, last in sample.segments:
        agree = cs.success(task, sample["scene_obs"][first], sample["scene_obs"][last])
        print(f"{task:20s} frames {first:3d} to {last:3d}: predicate {'holds' if agree else 'FAILS'}")
        assert agree


@needs_sample
@needs_clone
def test_the_samples_actions_replayed_fulfil_its_labels(sample, blind):
    """An annotation ends on the very step of success, and the arm lags its command by a few: it is given
    three more to arrive."""
    for task, first, last in sample.segments:
        scene = blind.reset(sample["robot_obs"][first], sample["scene_obs"][first])["scene_obs"]
        actions = sample["rel_actions"][first:last]
        arrive = np.repeat(actions[-1:] * STILL, 3, 0)
        done = []
        for t, action in enumerate([*actions, *arrive]):
            now = blind.step(action)["scene_obs"]
            if cs.success(task, scene, now):
                done.append(t + 1)
        print(f"{task:20s} {len(actions):3d} actions: fulfilled after {done[0] if done else 'NEVER'}")
        assert done


# ------------------------------------------------------------------------------------------------------------
# the adapter

@needs_clone
def test_reset_restores_a_recorded_state(blind):
    episode, solved = expert.demo_episode(blind, "move_slider_left", 0)
    assert solved
    last = len(episode["rel_actions"]) - 1
    for t, contact in ((0, False), (20, False), (last, True)):
        obs = blind.reset(episode["robot_obs"][t], episode["scene_obs"][t])
        robot = obs["robot_obs"]
        recorded = episode["robot_obs"][t]
        # at the end the hand leans against the door, which pushes it back in the reset's own physics step
        assert np.allclose(robot[7:], recorded[7:], atol=1e-3 if contact else 1e-5), "joints, gripper command"
        assert np.allclose(robot[:7], recorded[:7], atol=3e-3), "a moving tcp is recorded 1/240 s late"
        assert np.allclose(obs["scene_obs"][:6], episode["scene_obs"][t][:6], atol=1e-3)
        blocks = np.abs(obs["scene_obs"][6:] - episode["scene_obs"][t][6:]).reshape(3, 6)
        assert blocks[:, :3].max() < 2e-3 and blocks[:, 3:].max() < 0.05, (
            "its reset runs one physics step, in which blocks tilt a little")


@needs_clone
def test_an_episode_depends_on_its_start_and_actions_only(blind):
    first, _ = expert.demo_episode(blind, "open_drawer", 3)
    expert.play_episode(blind, 1, 100)
    again, _ = expert.demo_episode(blind, "open_drawer", 3)
    assert all(np.array_equal(first[key], again[key]) for key in first)


@needs_clone
@pytest.mark.parametrize("bad", [[np.nan] + [0] * 6, [np.inf] + [0] * 6, [1.5] + [0] * 6, [0] * 6])
def test_bad_action_is_refused(blind, bad):
    blind.reset(seed=0)
    with pytest.raises(ValueError, match="7 finite numbers"):
        blind.step(bad)
    assert np.isfinite(blind.step(STILL)["robot_obs"]).all()
    with pytest.raises(ValueError, match="finite robot_obs"):
        blind.reset(np.full(15, np.nan), np.zeros(24))


@needs_clone
def test_any_gripper_number_and_a_list_will_do(blind):
    blind.reset(*map(list, start()))
    for number, command in ((0.3, 1), (-0.2, -1), (0.0, 1)):
        assert blind.step([0, 0, 0, 0, 0, 0, number])["robot_obs"][14] == command


@needs_clone
@pytest.mark.parametrize("switch, bulb, button, led", [
    (0.08, 0, 0, 0), (0.0, 1, 0, 0), (0, 0, 0.018, 0), (0, 0, 0.018, 1), (0.08, 0.9, 0, 0.2),
])
def test_an_inconsistent_start_is_no_success(blind, switch, bulb, button, led):
    robot, scene = start()
    scene[[cs.SWITCH, cs.BULB, cs.BUTTON, cs.LED]] = switch, bulb, button, led
    first = blind.reset(robot, scene)["scene_obs"]
    for _ in range(20):
        now = blind.step(STILL)["scene_obs"]
    assert not any(cs.success(task, first, now) for task in cs.TASKS)


@needs_clone
def test_command_does_not_wind_up(blind):
    blind.reset(*start())
    for _ in range(40):
        before = blind.tcp.copy()
        blind.step([1, 0, 0, 0, 0, 1, 1])
        lead = (blind.target - before + np.pi) % (2 * np.pi) - np.pi
        assert (np.abs(lead) <= np.array([cs.WINDUP_POS] * 3 + [cs.WINDUP_ORN] * 3) + 1e-9).all()
    assert np.allclose(blind.env.robot.target_pos, blind.target[:3])


@needs_clone
def test_a_second_simulator_in_the_process_is_refused(blind):
    with pytest.raises(data.InputError, match="another simulator is open"):
        RealCalvin(render=False, root=CLONE)


@needs_clone
@pytest.mark.parametrize("task", ["close_drawer", "turn_on_lightbulb"])
def test_expert_solves(blind, task):
    assert expert.demo_episode(blind, task, 0)[1]


@needs_clone
def test_two_simulators_tell_the_same_story(blind):
    tabletop = cs.Tabletop(render=False)
    for seed in (1, 7, 12):                              # the whole of it: python tests/fidelity.py
        name, tcp, joints, same = fidelity.compare(blind, tabletop, seed)
        assert max(tcp, *joints) < fidelity.CLOSE and same, name
    tabletop.close()


def alone(code):
    """Run code in a process of its own, which may open another simulator.  -> what it printed"""
    code = f"import sys; sys.path.insert(0, sys.argv[1]); {code}"
    command = [sys.executable, "-c", code, str(ROOT / "tests")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@needs_clone
def test_not_looking_changes_no_state():
    alone("import test_real; test_real.look_or_not()")


def look_or_not():
    """The same actions, looking at each picture, at every third, at (almost) none, and without cameras."""

    def roll(sim, stride):
        rng = np.random.default_rng(0)
        story = [sim.reset(*start("turn_on_led", 1))]
        for t in range(40):
            story.append(sim.step(rng.uniform(-1, 1, 7), look=t % stride == 0))
        return story

    sim = RealCalvin(root=CLONE)
    always, *others = [roll(sim, stride) for stride in (1, 3, 1000)]
    sim.close()
    for t, obs in enumerate(others[0][1:]):
        assert ("rgb_static" in obs) == ("rgb_gripper" in obs) == (t % 3 == 0)
    sim = RealCalvin(render=False, root=CLONE)
    others.append(roll(sim, 1))
    sim.close()
    for other in others:
        for one, two in zip(always, other):
            assert all(np.array_equal(one[key], two[key]) for key in ("robot_obs", "scene_obs"))


@needs_clone
def test_pictures_are_calvin_envs_own():
    """All tasks, and more play: python tests/fidelity.py pictures"""
    said = alone("import json, fidelity; tasks = 'turn_on_led', 'move_slider_right'; "
                 "print(json.dumps(fidelity.compare_pictures(tasks=tasks, plays=1, length=60)))")
    print("\n" + said)
    pixels = json.loads(said.splitlines()[-1])
    assert len(pixels["static"]) == len(pixels["gripper"]) > 150
    assert max(pixels["gripper"]) == 0 and max(pixels["static"]) <= fidelity.FEW


ALONE = """
import os, sys
for name in ("gym", "git", "cv2"):
    sys.modules[name] = None                             # importing it raises ImportError
os.environ["PATH"] = "/nowhere"                          # no git
sys.path.insert(0, sys.argv[1])
from support.calvin_real import RealCalvin
from calvin_sim import Tabletop
import numpy as np
sim = RealCalvin(32, root=sys.argv[2])
old, obs = sim.env, sim.step(np.zeros(7))
sim.close()
sim.close()
sim = RealCalvin(32, root=sys.argv[2])
del old                                                  # its __del__ must leave the new one alone
again = sim.step(np.zeros(7))
sim.close()
table = Tabletop(32)
want = table.step(np.zeros(7))
for key, value in want.items():
    assert (obs[key].shape, obs[key].dtype) == (value.shape, value.dtype), key
    assert np.array_equal(obs[key], again[key]), key
    if obs[key].ndim == 3:
        print(key, np.abs(obs[key].astype(float) - value).mean())
assert set(obs) == set(want)
"""


@needs_clone
def test_pictures_without_git_gym_or_cv2_and_closing_twice(tmp_path):
    """In a process of its own, on a copy without a .git folder."""
    for name in ("calvin_env", "conf", "data"):
        (tmp_path / name).symlink_to(Path(CLONE).absolute() / name)
    command = [sys.executable, "-c", ALONE, str(ROOT), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [words[0] for words in lines] == ["rgb_static", "rgb_gripper"], "and nothing else is printed"
    assert all(float(words[1]) < 60 for words in lines), "both simulators look at the same scene"
    assert "Exception ignored" not in done.stderr
