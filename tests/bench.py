"""How fast is it?  python tests/bench.py prints one table: simulator, world model, dream and PPO, on one core
and this machine's matmul rate.
With a GPU: python tests/bench.py --device cuda --preset gpu (any flag of diwa.py works here).
Real pictures: python tests/bench.py --sim calvin --calvin-root PATH compares RealCalvin with calvin_env.

FLOPs are counted by torch's own counter over one update; "share" is FLOPs a second over what a 512 x 512
float32 matmul reaches on the same thread count in the same minute."""
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import calvin_sim
import diwa
import data
from support import expert
from support.calvin_real import RealCalvin
from support.runs import check_config, half_precision, parse


def rate(call, seconds=4.0):
    """Calls a second: the median over repeats, after one warm-up call."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    call()
    wait()
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        t = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - t)
    return 1 / float(np.median(times))


def flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def bench_simulator():
    """Replays three recorded attempts of the expert, contacts and resets included; the expert's own thinking
    is not timed."""
    sim = calvin_sim.Tabletop(64)
    episodes = []
    for task in ("open_drawer", "move_slider_left", "turn_on_led"):
        start = calvin_sim.sample_start(task, np.random.default_rng(0))
        obs = sim.reset(*start)
        driver = expert.Expert(task, np.random.default_rng(0))
        actions = []
        for _ in range(60):
            actions.append(driver.act(obs["robot_obs"], obs["scene_obs"]))
            obs = sim.step(actions[-1])
        episodes.append((start, actions))

    def replay():
        for start, actions in episodes:
            sim.reset(*start)
            for action in actions:
                sim.step(action)

    return 3 * 60 * rate(replay, 8)


def bench_calvin(root, rounds=3):
    """The same episodes in calvin_env as it is, which draws both pictures at each step, and in RealCalvin,
    which draws them at each step (as for a recording) or at every second (as for an evaluation).

    The three take turns.  Prints steps/s, and the median ratio of their times in a turn."""
    sim = RealCalvin(root=root)
    own = list(sim.cameras.values())
    baseline = "calvin_env's own step"
    ways = {baseline: 0, "recording: each picture": 1, "evaluation: every second picture": 2}
    times = {way: [] for way in ways}
    for task in ("open_drawer", "move_slider_left", "turn_on_led"):
        episode = expert.demo_episode(sim, task, 0)[0]
        start = episode["robot_obs"][0], episode["scene_obs"][0]
        actions = episode["rel_actions"][:60]
        for _ in range(rounds):
            for way, stride in ways.items():
                sim.reset(*start)
                sim.env.cameras = own if way == baseline else []
                t = time.perf_counter()
                for step, action in enumerate(actions):
                    sim.step(action, look=way != baseline and (step + 1) % stride == 0)
                times[way].append((time.perf_counter() - t) / len(actions))
                sim.env.cameras = []
    sim.close()
    print(f"{'calvin_env, 200 and 84 pixels, one core':<40}{'steps/s':>12}{'against its own':>28}")
    for way, seconds in times.items():
        ratio = np.median(np.array(times[baseline]) / seconds)
        print(f"{way:<40}{1 / np.median(seconds):>12.1f}{ratio:>28.2f}")


def world_model_update(cfg, wm):
    B, T = cfg.wm_batch, cfg.wm_length
    sizes = dict(action=7 * cfg.wm_stride, command=7 * cfg.wm_stride, proprio=15, state=diwa.FIXTURES)
    batch = {k: torch.randn(B, T, n) for k, n in sizes.items()}
    if wm.codec:
        batch["codes"] = torch.randn(B, T, wm.codec.size)
    else:
        for k in ("rgb_static", "rgb_gripper"):
            batch[k] = torch.randint(0, 255, (B, T, 64, 64, 3), dtype=torch.uint8)
    batch = {k: v.to(cfg.device) for k, v in batch.items()}
    optimizer = torch.optim.AdamW(wm.parameters(), lr=1e-4, fused=True)

    def update():
        with half_precision(cfg, "cpu"):
            loss = diwa.world_model_loss(wm, batch, cfg)[0]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return update


def dream(cfg, wm):
    classifier = diwa.Classifier(cfg, wm.feature_size).to(cfg.device)
    target = data.HOME_POSE + 0.01 * torch.randn(50, 6)
    embedding = torch.randn(50, wm.embed_size)
    command = data.encode_command(target, torch.ones(50, 1))
    starts = [x.to(cfg.device) for x in (embedding, command, target)]
    env = diwa.DreamEnv(cfg, wm, classifier, *starts)
    env.reset()
    return env


def ppo_update(cfg, wm):
    actor = diwa.build_actor(cfg, wm.feature_size)
    critic = diwa.mlp([wm.feature_size, 256, 256, 256, 1], torch.nn.Mish, norm=False).to(cfg.device)
    samples = cfg.ft_dreams * cfg.ft_chunks // cfg.ft_minibatches
    feature = torch.randn(samples, wm.feature_size, device=cfg.device)
    chain = actor.sample_chain(feature)
    logprob = actor.chain_logprob(feature, chain).detach()
    advantage = torch.randn_like(feature[:, 0])
    batch = dict(feature=feature, chain=chain, anchor=chain, logprob=logprob, advantage=advantage)
    batch["returns"] = torch.randn_like(feature[:, 0])

    def update():
        loss, _ = diwa.ppo_loss(cfg, actor, critic, batch)
        loss.backward()

    return update, len(feature) * actor.ft_steps


def main(argv):
    torch.set_num_threads(1)
    flags = argv or ["--device", "cpu", "--preset", "cpu"]
    what = " ".join(__doc__.splitlines()[:2])
    cfg = check_config(parse(flags, diwa.Config, diwa.PRESETS, what, ""))
    if cfg.sim == "calvin":
        return bench_calvin(cfg.calvin_root)
    if cfg.device == "cuda":
        torch.cuda.init()
    device = torch.cuda.get_device_name() if cfg.device == "cuda" else "one core"
    print(f"{device}, preset {cfg.preset}; torch {torch.__version__}")
    rows = [("simulator steps/s, two 64x64 cameras", bench_simulator(), None)]
    a, b = torch.randn(2, 512, 512, device=cfg.device)
    peak = 2 * 512 ** 3 * rate(lambda: a @ b, 2)
    wm = diwa.WorldModel(cfg).to(cfg.device)
    update = world_model_update(cfg, wm)
    speed = rate(update)
    frames = speed * cfg.wm_batch * cfg.wm_length
    rows.append(("world model training, frames/s", frames, speed * flops(update) / peak))
    env = dream(cfg, wm)
    chunk = torch.randn(cfg.ft_dreams, cfg.bc_chunk, 7, device=cfg.device)
    steps = rate(lambda: env.step(chunk)) * cfg.ft_dreams * cfg.bc_chunk
    rows.append(("imagined control steps/s", steps, None))
    update, samples = ppo_update(cfg, wm)
    speed = rate(update)
    rows.append(("PPO chain samples/s", speed * samples, speed * flops(update) / peak))
    print(f"matmul 512x512 float32: {peak / 1e9:.0f} GFLOP/s\n")
    print(f"{'what':<40}{'rate':>12}{'share of the matmul rate':>28}")
    for name, value, share in rows:
        print(f"{name:<40}{value:>12,.0f}{'' if share is None else f'{100 * share:.0f} %':>28}")


if __name__ == "__main__":
    main(sys.argv[1:])
