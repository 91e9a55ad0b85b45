"""The peers beside us, at the paper's sizes, on one thread:

    git clone https://github.com/nematoli/lumos && git clone https://github.com/irom-princeton/dppo
    pip install hydra-core einops
    python tests/peers.py lumos dppo

LUMOS' world model (DreamerV2: convolutions, 32 categoricals) is trained for a step in float32 and under
bfloat16 autocast; its cell and DPPO's sampler make up a dream, in both as well, and in float32 beside ours in
bfloat16, as each comes; DPPO's loss is taken with its gradient.  Each pair takes turns; the ratio is the
median over the turns.  The peers run as they are, with stand-ins for the loggers that they import and that a
step does not need.  CPU time is counted: other work disturbs it less."""
import dataclasses
import sys
import time
import types
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import bench
import diwa
from support.runs import check_config, parse

BATCH, LENGTH, DREAMS, CHUNK, CHUNKS = 8, 16, 50, 4, 180
FEATURE = 2048                                              # LUMOS': 1024 of memory, 32 * 32 of latents


def stand_in(name, **attributes):
    module = types.ModuleType(name)
    module.__dict__.update(attributes)
    sys.modules[name] = module
    return module


def race(name, units, theirs, ours, turns=7):
    times = []
    theirs()
    ours()
    for _ in range(turns):
        turn = []
        for call in (theirs, ours):
            start = time.process_time()
            call()
            turn.append(time.process_time() - start)
        times.append(turn)
    peer, us = units / np.median(times, 0)
    ratio = np.median([a / b for a, b in times])
    print(f"{name:<52}{peer:>10,.0f}{us:>10,.0f}{ratio:>8.2f}", flush=True)


def lumos_world_model():
    """LUMOS' network with its own forward and loss -> module"""
    utilities = stand_in("pytorch_lightning.utilities", rank_zero_only=lambda function: function)
    stand_in("pytorch_lightning", LightningModule=nn.Module, utilities=utilities)
    stand_in("wandb")
    from lumos.world_models.decoders.cnn_decoder import CnnDecoder
    from lumos.world_models.dreamer_v2 import DreamerV2
    from lumos.world_models.encoders.cnn_encoder import CnnEncoder
    from lumos.world_models.rssm.core import RSSMCore
    from omegaconf import OmegaConf

    class World(nn.Module):
        with_proprio, gripper_control = True, False
        kl_balance, kl_weight, image_weight = 0.8, 0.3, 1.0
        forward = DreamerV2.forward
        loss = DreamerV2.loss

        def __init__(self):
            super().__init__()
            self.encoder = CnnEncoder(48, [4] * 4, 2, "elu")
            self.decoder = CnnDecoder(FEATURE, 48, [5, 5, 6, 6], 2, True, "elu", 0)
            gru = dict(_target_="lumos.world_models.rssm.gru.GRUCellStack", input_size=1000, hidden_size=1024,
                       n_layers=1)
            cell = dict(_target_="lumos.world_models.rssm.cell.RSSMCell", _recursive_=False,
                        embed_dim=48 * 32 + 15, action_dim=7, deter_dim=1024, stoch_dim=32, stoch_rank=32,
                        hidden_dim=1000, layer_norm=True, gru=gru)
            self.rssm_core = RSSMCore(OmegaConf.create(cell))

    return World()


def lumos_update(world, autocast):
    optimizer = torch.optim.AdamW(world.parameters(), lr=1e-4)
    static, gripper = torch.rand(2, LENGTH, BATCH, 3, 64, 64) * 2 - 1
    proprio = torch.randn(LENGTH, BATCH, 15)
    action = torch.randn(LENGTH, BATCH, 7)
    reset = torch.zeros(LENGTH, BATCH, 1, dtype=torch.bool)
    batch = dict(vis=dict(rgb_obs=dict(rgb_static=static, rgb_gripper=gripper)))

    def update():
        with torch.autocast("cpu", torch.bfloat16, autocast):
            start = world.rssm_core.init_state(BATCH)
            out = world(static, gripper, proprio, action, proprio, reset, start)
            loss = world.loss(batch, out)["loss_total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return update


def dppo_model():
    from model.common.critic import CriticObs
    from model.diffusion.diffusion_ppo import PPODiffusion
    from model.diffusion.mlp_diffusion import DiffusionMLP
    return PPODiffusion(
        gamma_denoising=0.99, clip_ploss_coef=0.01, clip_ploss_coef_base=0.001,
        actor=DiffusionMLP(7, CHUNK, FEATURE, 16, [512] * 3, residual_style=True),
        critic=CriticObs(FEATURE, [256] * 3, residual_style=True),
        ft_denoising_steps=10, denoising_steps=20, network_path=None, horizon_steps=CHUNK, obs_dim=FEATURE,
        action_dim=7, device="cpu", randn_clip_value=3)


def their_dream(world, ppo, autocast):
    """DPPO's chain, four steps of LUMOS' cell, and a network that judges the last; autocast: in bfloat16"""
    judge = diwa.mlp([FEATURE, 512, 512, 64])
    state = world.rssm_core.init_state(DREAMS)

    @torch.no_grad()
    def dream():
        nonlocal state
        with torch.autocast("cpu", torch.bfloat16, autocast):
            feature = torch.cat(state, -1)
            out = ppo(cond=dict(state=feature[:, None]), deterministic=False, return_chain=True)
            for action in out.trajectories.unbind(1):
                _, state = world.rssm_core.cell.forward(action, state)
            judge(torch.cat(state, -1))

    return dream


def our_dream(cfg):
    wm = diwa.WorldModel(cfg).eval().requires_grad_(False)
    actor = diwa.build_actor(cfg, wm.feature_size)
    env = bench.dream(cfg, wm)
    feature = env.reset()

    @torch.no_grad()
    def dream():
        nonlocal feature
        feature = env.step(actor.sample_chain(feature)[:, -1])[0]

    return dream


def their_loss(ppo):
    """CHUNKS chunks of ten denoising steps each, which DPPO takes as so many rows"""
    feature = torch.randn(CHUNKS, 1, FEATURE)
    with torch.no_grad():
        chain = ppo(cond=dict(state=feature), deterministic=False, return_chain=True).chains
        before = ppo.get_logprobs(dict(state=feature), chain)
    steps = chain.shape[1] - 1
    rows = dict(state=feature.repeat_interleave(steps, 0))
    noisy, cleaner = chain[:, :-1].flatten(0, 1), chain[:, 1:].flatten(0, 1)
    which = torch.arange(steps).repeat(CHUNKS)
    returns, values, advantage = torch.randn(3, CHUNKS).repeat_interleave(steps, 1)

    def loss():
        out = ppo.loss(rows, noisy, cleaner, which, returns, values, advantage, before, reward_horizon=CHUNK)
        policy, value = out[0], out[2]
        (policy + 0.5 * value).backward()

    return loss


def main(folders):
    if len(folders) != 2 or not all(Path(folder).is_dir() for folder in folders):
        sys.exit("peers.py: give two folders, clones of LUMOS and of DPPO (see the top of the file)")
    sys.path[:0] = [str(Path(folder).resolve()) for folder in folders]
    torch.set_num_threads(1)
    flags = ["--device", "cpu", "--preset", "paper"]
    paper = check_config(parse(flags, diwa.Config, diwa.PRESETS, "", ""))
    cfg = dataclasses.replace(paper, wm_batch=BATCH, wm_length=LENGTH, ft_dreams=DREAMS, ft_chunks=18,
                              ft_minibatches=5, ft_bc=0.0)    # 180 chunks
    world, ppo = lumos_world_model(), dppo_model()
    print(f"{'a CPU second':<52}{'peer':>10}{'ours':>10}{'ratio':>8}")
    precisions = ("float32", "bfloat16")
    for bf16, name in enumerate(precisions):
        ours = dataclasses.replace(cfg, wm_bf16=bf16)
        race(f"world model, frames trained, {name}", BATCH * LENGTH, lumos_update(world, bool(bf16)),
             bench.world_model_update(ours, diwa.WorldModel(ours)))
    world.eval()
    for theirs, ours in ((0, 0), (1, 1), (0, 1)):
        name = f"dreamed steps, {DREAMS} at once, {precisions[theirs]}" + ", ours bfloat16" * (ours > theirs)
        race(name, DREAMS * CHUNK, their_dream(world, ppo, bool(theirs)),
             our_dream(dataclasses.replace(cfg, wm_bf16=ours)))
    ours, samples = bench.ppo_update(cfg, diwa.WorldModel(cfg))
    race("PPO loss and gradient, chain samples", samples, their_loss(ppo), ours)


if __name__ == "__main__":
    main(sys.argv[1:])
