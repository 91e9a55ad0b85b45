"""DiWA in one file: a diffusion policy that improves by practising inside a learned world model.

    python diwa.py --stage all                     # everything, in 21 minutes on two CPU cores, ends with runs/cpu/report.md (with CUDA: runs/gpu)
    python diwa.py --stage all --preset smoke      # the same loop in less than a minute, to see that it installs (the numbers mean nothing)
    python diwa.py --stage all --task turn_on_led  # another of the eight tasks; play and world model are reused
    python diwa.py --help                          # every setting, its default and the paper's value

Read it top to bottom; each section is one idea (what every program needs and no paper mentions is in support/):

    1 Config          every setting, once                      5 Dream     a world model is an environment
    2 World model     pixels + actions -> imagined futures     6 PPO       credit for every denoising step
    3 Actor           a policy that denoises action chunks     7 Agent     what a robot would run
    4 Reward          a classifier that recognises success     8 Stages    the pipeline, one function each; 9 the command line

Symbols: B batch (dreams), T time steps, H chunk length, A = 7 action numbers, K denoising steps (K' of them fine-tuned),
    h deterministic and z stochastic latent, F = size of the feature [h, z, c], E = size of an embedding, S = side of an image.
    W windows of a recording, P moments in them, M frames to start from.
    target: the pose that the arm has been told to reach, in m and rad; command c: the same in a network's units, and the gripper.

One action = dx dy dz (20 mm a unit), droll dpitch dyaw (0.05 rad a unit), gripper (-1 close, +1 open), 30 a second.

Where this file departs from the papers, on purpose (each is a flag or a comment at its line):
    - dreams start from *recorded* frames, also from the middle of attempts; the official code resets the simulator for each first frame;
    - practice is short, at ten times the learning rate: a fixed number of iterations, because dreams cannot tell when practice begins to exploit them;
    - one step of the world model spans two control steps: half as many guesses for the same future, and cheaper dreams;
    - the transition is told the commanded pose c, because CALVIN's arm chases a target to which each action adds, and sines of that pose;
    - each dream misplaces the arm by a few millimetres, so that the policy keeps a margin, and success must show in two steps of the model running;
    - the preset `cpu` learns on linear codes of the frames and Gaussian latents; `gpu` and `paper` use convolutions and categoricals;
    - the prior is also trained open loop, because that is how it is used in a dream, and with noisy inputs, or it learns the play by heart;
    - the classifier compares the current feature with the first one, because CALVIN's task rules do.
Sources: DiWA arXiv 2508.03645; DPPO arXiv 2409.00588; DreamerV2 arXiv 2010.02193; PPO arXiv 1707.06347; LUMOS arXiv 2503.10370.
"""
import copy
import math
import shutil
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from calvin_sim import TASKS, advance_target
from data import Recording, action_chunks, decode_pose, encode_command, encode_proprio, window_starts
from support import evaluate, report
from support.files import InputError
from support.runs import (Snapshots, command_line, cosine_lr, load, load_judges, origin, output, pack_recorded, record, restore,
                          save, seed_everything, train, use_given_demos, use_given_play)

# ======================================================================================================================
# 1  Config.  Every setting of the program, once.  A field's prefix says which stage it belongs to, and a stage is redone
#    when one of its own fields, or one of the stages it reads from, has changed.  Presets are differences to the defaults.
# ======================================================================================================================

@dataclass
class Config:
    stage: str = "all"              # play, demos, wm, bc, reward, finetune, eval, report, or all of them in this order
    preset: str = "auto"            # cpu, gpu, paper or smoke; auto = gpu where CUDA is, else cpu
    task: str = "move_slider_right" # one of CALVIN's eight articulated-object tasks, see --help; or all of them
    run: str = ""                   # name of the run folder; default: the preset's name
    runs: str = "runs"              # where run folders are kept
    device: str = "auto"            # cpu, cuda or auto
    workers: int = 2                # simulator processes
    keep: str = ""                  # stages, separated by commas, whose results are used as they are although their code has changed
    # common to all stages
    seed: int = 0                   # every random number of the run follows from it
    sim: str = "tabletop"           # the simulator that records and evaluates: tabletop, calvin (needs --calvin_root) or none (needs --data)
    calvin_root: str = "calvin_env"  # folder of the cloned calvin_env
    data: str = ""                  # a recorded dataset, see data.py: its frames are the play, its task segments the demonstrations
    image_size: int = 64            # pixels a side of both cameras (paper: 64)
    # play: task-agnostic interaction, the world model's only food
    play_frames: int = 180_000      # recorded frames (paper: 500,000)
    play_episode: int = 250         # frames of one episode
    play_replay: int = 20           # expert demonstrations a task, all eight tasks, that only judge: the world model, and what the classifier believes of it
    # demos: what the policy is cloned from
    demo_count: int = 50            # demonstrations of the task (paper: 50)
    # wm: the world model, section 2
    wm_stride: int = 2              # control steps that one step of the model spans (paper: 1)
    wm_encoder: str = "linear"      # conv (paper) or linear: the frames' principal components, a closed-form linear autoencoder
    wm_codes: int = 256             # linear encoder: components of the static camera; the gripper camera gets half
    wm_depth: int = 48              # conv encoder: channels of the first layer (paper: 48)
    wm_latent: str = "gaussian"     # categorical (paper) or gaussian
    wm_z: int = 48                  # number of latents: Gaussian dimensions or categorical variables (paper: 32)
    wm_classes: int = 32            # classes of a categorical latent (paper: 32)
    wm_h: int = 256                 # size of the deterministic state (paper: 1024)
    wm_hidden: int = 256            # width of the prior's and posterior's hidden layer (paper: 1000)
    wm_embed: int = 256             # width of the fused embedding of one observation
    wm_octaves: int = 3             # the transition also sees sines of the commanded position, finest wavelength 4 cm (paper: 0)
    wm_updates: int = 9000          # gradient steps (paper: up to 2 M)
    wm_batch: int = 32              # sequences a batch (paper: 50)
    wm_length: int = 20             # steps a sequence, wm_stride frames apart (paper: 50)
    wm_lr: float = 1e-3             # AdamW, cosine to a tenth (paper: 3e-4, constant)
    wm_decay: float = 0.05          # weight decay (paper: 0.05)
    wm_clip: float = 100.0          # global gradient norm (paper: 100)
    wm_kl: float = 0.3              # weight of the KL term (paper: 0.3)
    wm_balance: float = 0.8         # share of the KL that trains the prior (paper: 0.8)
    wm_free: float = 0.0            # free nats a step, DreamerV3 (paper: 0)
    wm_unimix: float = 0.01         # uniform share mixed into categoricals, DreamerV3 (paper: 0)
    wm_noise: float = 0.05          # noise while it learns, std: on whitened linear codes and on commands (5 mm, .015 rad), three times that on actions (paper: 0)
    wm_open: float = 1.0            # weight of the open-loop prediction loss (paper: 0)
    wm_context: int = 5             # open loop starts after 1..wm_context watched steps
    wm_gripper: float = 0.25        # weight of the gripper camera in the image loss: it has three quarters of the variance (paper: 1)
    wm_proprio: float = 100.0       # weight of the proprioception loss; 0 = input only (paper: 0)
    wm_decode: float = 0.25         # share of the frames that are decoded for the loss (paper: 1)
    # bc: the diffusion policy, section 3
    bc_actor: str = "diffusion"     # diffusion or gaussian
    bc_net: str = "mlp"             # denoiser: mlp or unet
    bc_hidden: int = 256            # width of the mlp (paper: 512)
    bc_chunk: int = 4               # H, actions predicted and executed at once (paper: 4)
    bc_steps: int = 20              # K, denoising steps (paper: 20)
    bc_updates: int = 4000          # gradient steps (paper: 5000 epochs)
    bc_batch: int = 256             # chunks a batch (paper: 256)
    bc_lr: float = 5e-4             # AdamW, warm-up, cosine to a tenth (paper: 1e-4)
    bc_ema: float = 0.995           # moving average of the weights, which is what acts (paper: 0.995)
    # reward: the success classifier, section 4
    reward_labels: str = "unlabelled"  # play as unlabelled negatives; "demos" = no play (paper); "predicate" = label play by the task rule
    reward_hidden: int = 256        # width (paper: 512)
    reward_updates: int = 1500      # gradient steps
    reward_lr: float = 3e-4         # Adam (paper: 1e-6)
    reward_tau: float = 0.5         # NT-Xent temperature (paper: 0.5)
    reward_ce: float = 0.5          # weight of the cross-entropy beside NT-Xent (paper: 0.5)
    reward_play: float = 0.5        # weight of an unlabelled play pair in the cross-entropy
    reward_rounds: int = 0          # times that unlabelled play changes sides: what follows a recognised success is one, too (ten demonstrations: 2, with 900 updates)
    # ft: PPO in the dream, sections 5 and 6
    ft_iterations: int = 36         # rollout + update (paper: about 770, at a tenth of the learning rate)
    ft_dreams: int = 128            # parallel dreams (paper: 50)
    ft_chunks: int = 18             # chunks a dream and iteration (paper: 36)
    ft_horizon: int = 18            # chunks until a dream is cut (paper: 18 = 72 steps)
    ft_starts: float = 0.75         # dreams start in this first part of a demonstration, up to success or so (0 = first frames only) ...
    ft_play: float = 0.06           # ... or in this share of play's frames, those that look most like a demonstration, also after misses; three dreams of four then do (0 = none)
    ft_shift: float = 0.006         # each dream misplaces the arm by so much (m, std; the command that the policy sees does not show it): what succeeds by a hair does not pay (paper: 0)
    ft_steps: int = 10              # K', the last denoising steps, which are fine-tuned (paper: 10)
    ft_epochs: int = 5              # passes over each rollout (paper: 10)
    ft_minibatches: int = 5         # a pass (paper: 1)
    ft_actor_lr: float = 1e-4       # AdamW (paper: 1e-5)
    ft_critic_lr: float = 1e-3      # AdamW (paper: 1e-3)
    ft_warmup: int = 2              # iterations that train the critic only
    ft_gamma: float = 0.98          # discount a chunk: impatience, or the policy meets the time limit (paper: .999)
    ft_lambda: float = 0.95         # GAE (paper: .95)
    ft_gamma_denoise: float = 0.99  # discount a denoising step (paper: .99)
    ft_clip: float = 0.03           # clip range at the last denoising step (paper: .01)
    ft_clip_first: float = 0.003    # clip range at the noisiest fine-tuned step (paper: .001)
    ft_std: float = 0.1             # floor of the sampling std and of the log-prob std (paper: .1)
    ft_value: float = 0.5           # weight of the value loss, a plain mean square (paper: .5, on a loss with another half inside)
    ft_bc: float = 0.05             # alpha_BC, pull towards the frozen policy's chains (paper: .05; ten demonstrations and labelled play: .01)
    ft_snapshot: int = 9            # keep the weights every so many iterations, for the learning curve
    # eval
    eval_episodes: int = 100        # paired start states, before and after (paper: 29-48)
    eval_curve: int = 40            # start states, others, for the learning curve
    eval_steps: int = 72            # time limit (paper: 72)

PRESETS = {
    "cpu": {},
    "gpu": dict(wm_encoder="conv", wm_depth=32, wm_latent="categorical", wm_z=32, wm_h=512, wm_hidden=512, wm_embed=512, wm_updates=5000, wm_lr=6e-4, bc_hidden=512, ft_dreams=256),
    "paper": dict(wm_encoder="conv", wm_latent="categorical", wm_z=32, wm_h=1024, wm_hidden=1000, wm_embed=1024, wm_updates=2_000_000,
                  wm_batch=50, wm_stride=1, wm_length=50, wm_lr=3e-4, wm_open=0.0, wm_proprio=0.0, wm_gripper=1.0, wm_decode=1.0, wm_unimix=0.0, wm_noise=0.0, wm_octaves=0, play_frames=500_000,
                  bc_hidden=512, bc_updates=50_000, bc_lr=1e-4, reward_labels="demos", reward_hidden=512, reward_lr=1e-6, reward_updates=20_000,
                  ft_iterations=770, ft_dreams=50, ft_chunks=36, ft_starts=0.0, ft_play=0.0, ft_shift=0.0, ft_epochs=10, ft_minibatches=1, ft_actor_lr=1e-5,
                  ft_gamma=0.999, ft_clip=0.01, ft_clip_first=0.001, ft_snapshot=70),
    "smoke": dict(play_frames=2000, play_episode=200, play_replay=2, demo_count=8, wm_codes=64, wm_h=64, wm_hidden=64, wm_embed=64, wm_z=16,
                  wm_updates=60, wm_batch=16, wm_length=20, bc_hidden=64, bc_updates=150, reward_hidden=64, reward_updates=60, ft_iterations=3,
                  ft_dreams=16, ft_epochs=2, ft_warmup=1, ft_snapshot=2, eval_episodes=8, eval_curve=4),
}


# ======================================================================================================================
# 2  World model.  A recurrent state-space model (DreamerV2, eq. 1): it watches both cameras and the robot's own pose, keeps a
#    deterministic memory h and a stochastic guess z, and learns to foresee z before it sees the frame.
#
#        h_t  = GRU(h_{t-1}, [z_{t-1}, a_{t-1}, c_t])       what has happened
#        z^_t ~ prior(h_t)                                   what the frame should look like         <- dreams use this one
#        z_t  ~ posterior(h_t, embedding of frame t)         what it does look like                  <- the robot uses this one
#        frame_t ~ decoder(h_t, z_t, c_t)
#
#    The command c_t is the pose that the arm has been told to reach once a_{t-1} was added to it: the action says how it moves, the command where to.
#    One step of the model is wm_stride control steps: a_{t-1} and c_t are all the actions between two frames and the commands that they led to
#    (the feature and the decoder take the last command).  Alignment matters: step t consumes what was executed BEFORE frame t.  Every training
#    sequence starts from the zero state, because that is how each dream and each deployment starts.
# ======================================================================================================================

def mlp(sizes, activation=nn.ELU, norm=True):
    """Linear (LayerNorm) activation ... Linear; LUMOS normalises the pre-activations with eps 1e-3."""
    layers = []
    for a, b in zip(sizes[:-2], sizes[1:-1]):
        layers += [nn.Linear(a, b)] + ([nn.LayerNorm(b, eps=1e-3)] if norm else []) + [activation()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))

class NormGRU(nn.Module):
    """A GRU cell with LayerNorm on the gates' pre-activations and an update bias of -1, so that memory is kept by default (DreamerV2)."""

    def __init__(self, inputs, size):
        super().__init__()
        self.linear, self.norm = nn.Linear(inputs + size, 3 * size, bias=False), nn.LayerNorm(3 * size, eps=1e-3)

    def forward(self, x, h):
        reset, candidate, update = self.norm(self.linear(torch.cat([x, h], -1))).chunk(3, -1)
        update = torch.sigmoid(update - 1)
        return update * torch.tanh(torch.sigmoid(reset) * candidate) + (1 - update) * h

class LinearCodec(nn.Module):
    """The closed-form linear autoencoder: principal components of the frames.  Distances between codes are distances between
    images, so a squared error on codes is the image loss, at a fraction of the price of convolutions on a CPU."""

    def __init__(self, cfg):
        super().__init__()
        self.pixels, sizes = 3 * cfg.image_size ** 2, {"static": cfg.wm_codes, "gripper": cfg.wm_codes // 2}
        for name, k in sizes.items():
            self.register_buffer(f"{name}_mean", torch.zeros(self.pixels))
            self.register_buffer(f"{name}_basis", torch.zeros(self.pixels, k))
            self.register_buffer(f"{name}_std", torch.ones(k))
        self.sizes, self.size = list(sizes.values()), sum(sizes.values())

    def fit(self, name, frames):
        """frames [N, S, S, 3] u8, a sample of the recording."""
        x = frames.flatten(1).float() / 127.5 - 1                                                     # [N, D]
        mean, k = x.mean(0), getattr(self, f"{name}_std").numel()
        _, s, v = torch.svd_lowrank(x - mean, q=min(k + 16, len(x)), niter=3)
        for key, value in (("mean", mean), ("basis", v[:, :k]), ("std", s[:k] / math.sqrt(len(x)))):
            getattr(self, f"{name}_{key}").copy_(value)

    def encode(self, static, gripper):
        """u8 frames [..., S, S, 3] of both cameras -> codes [..., size], in units of the pixels (-1..1)."""
        codes = [((x.flatten(-3).float() / 127.5 - 1) - getattr(self, f"{n}_mean")) @ getattr(self, f"{n}_basis")
                 for n, x in (("static", static), ("gripper", gripper))]
        return torch.cat(codes, -1)                                                                   # [..., size]

    def whiten(self, codes):
        """Codes for a network's input: square-root whitening lifts small things (a lamp) without shouting noise; the largest component gets a std of 3."""
        std = torch.cat([self.static_std, self.gripper_std])
        return codes / (std * std.max()).sqrt().clamp(min=1e-6) * 3                                   # a camera that shows nothing has std 0

    def decode(self, codes):
        """codes -> two images [..., S, S, 3] in -1..1."""
        side = int(math.sqrt(self.pixels // 3))
        parts = codes.split(self.sizes, -1)
        return [(p @ getattr(self, f"{n}_basis").T + getattr(self, f"{n}_mean")).unflatten(-1, (side, side, 3))
                for n, p in zip(("static", "gripper"), parts)]

def half_precision(x):
    """Convolutions in bfloat16 where the GPU has it (2020 and later): most of the conv presets' time is theirs."""
    return torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 8)

class ConvEncoder(nn.Module):
    """One convolutional network a camera, 64 -> 31 -> 14 -> 6 -> 2 pixels (DreamerV2)."""

    def __init__(self, cfg):
        super().__init__()
        d = cfg.wm_depth
        def camera():
            return nn.Sequential(*[m for a, b in ((3, d), (d, 2 * d), (2 * d, 4 * d), (4 * d, 8 * d))
                                   for m in (nn.Conv2d(a, b, 4, 2), nn.ELU())], nn.Flatten())
        self.static, self.gripper = camera(), camera()
        self.size = 2 * 8 * d * 4
        self.to(memory_format=torch.channels_last)

    def forward(self, static, gripper):
        """u8 [..., 64, 64, 3] twice -> [..., size]"""
        lead = static.shape[:-3]
        parts = []
        for net, x in ((self.static, static), (self.gripper, gripper)):
            x = x.flatten(0, -4).permute(0, 3, 1, 2)                                                  # [N, 3, 64, 64]
            x = (x.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
            with half_precision(x):
                parts.append(net(x).float())                                                          # [N, 8 d * 2 * 2]
        return torch.cat(parts, -1).unflatten(0, lead)

class ConvDecoder(nn.Module):
    """Feature -> both mean images; transposed convolutions with kernels 5, 5, 6, 6 (DreamerV2)."""

    def __init__(self, cfg, inputs):
        super().__init__()
        d = cfg.wm_depth
        def camera():
            return nn.Sequential(nn.Linear(inputs, 32 * d), nn.Unflatten(-1, (32 * d, 1, 1)),
                                 nn.ConvTranspose2d(32 * d, 4 * d, 5, 2), nn.ELU(), nn.ConvTranspose2d(4 * d, 2 * d, 5, 2), nn.ELU(),
                                 nn.ConvTranspose2d(2 * d, d, 6, 2), nn.ELU(), nn.ConvTranspose2d(d, 3, 6, 2))
        self.static, self.gripper = camera(), camera()
        self.to(memory_format=torch.channels_last)

    def forward(self, feature):
        """[..., F] -> [static, gripper], each [..., 64, 64, 3] in -1..1"""
        flat = feature.flatten(0, -2)
        with half_precision(flat):
            return [net(flat).float().permute(0, 2, 3, 1).unflatten(0, feature.shape[:-1]) for net in (self.static, self.gripper)]

# --- the stochastic latent: categorical (the paper) or Gaussian --------------------------------------------------------

def latent_size(cfg):
    return cfg.wm_z * cfg.wm_classes if cfg.wm_latent == "categorical" else cfg.wm_z

def stats_size(cfg):
    return cfg.wm_z * cfg.wm_classes if cfg.wm_latent == "categorical" else 2 * cfg.wm_z

def log_probs(stats, cfg):
    """Categorical logits [..., Z * C] -> normalised log-probabilities [..., Z, C], with a little uniform mixed in (DreamerV3)."""
    logits = stats.float().unflatten(-1, (-1, cfg.wm_classes)).log_softmax(-1)
    return torch.log((1 - cfg.wm_unimix) * logits.exp() + cfg.wm_unimix / cfg.wm_classes) if cfg.wm_unimix else logits

def mean_std(stats):
    """Gaussian head [..., 2 Z] -> mean, std [..., Z]."""
    mean, raw = stats.float().chunk(2, -1)
    return mean, F.softplus(raw) + 0.1

def sample_latent(stats, cfg):
    """stats -> z [..., latent size], differentiable: reparametrised, or straight-through: sample + p - stop(p)."""
    if cfg.wm_latent == "gaussian":
        mean, std = mean_std(stats)
        return mean + std * torch.randn_like(std)
    logits = log_probs(stats, cfg)
    gumbel = -torch.log(-torch.log(torch.rand_like(logits).clamp(1e-10, 1 - 1e-7)))
    one_hot = torch.zeros_like(logits).scatter_(-1, (logits + gumbel).argmax(-1, keepdim=True), 1.0)  # [..., Z, C]
    probs = logits.exp()
    return (one_hot + probs - probs.detach()).flatten(-2)

def kl_divergence(p, q, cfg):
    """KL(p || q) summed over the latents: [...]"""
    if cfg.wm_latent == "gaussian":
        (m1, s1), (m2, s2) = mean_std(p), mean_std(q)
        return (torch.log(s2 / s1) + (s1 ** 2 + (m1 - m2) ** 2) / (2 * s2 ** 2) - 0.5).sum(-1)
    a, b = log_probs(p, cfg), log_probs(q, cfg)
    return (a.exp() * (a - b)).sum((-1, -2))

def balanced_kl(post, prior, cfg):
    """DreamerV2, algorithm 2: move the prior towards the posterior faster than the posterior towards the prior."""
    to_prior, to_post = kl_divergence(post.detach(), prior, cfg), kl_divergence(post, prior.detach(), cfg)
    return cfg.wm_balance * to_prior.clamp(min=cfg.wm_free) + (1 - cfg.wm_balance) * to_post.clamp(min=cfg.wm_free)

class WorldModel(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg, z, e = cfg, latent_size(cfg), cfg.wm_embed
        self.feature_size = cfg.wm_h + z + 7
        self.codec = LinearCodec(cfg) if cfg.wm_encoder == "linear" else None
        self.conv = ConvEncoder(cfg) if cfg.wm_encoder == "conv" else None
        seen = self.codec.size if self.codec else self.conv.size
        hidden = [2 * e] if self.codec else []              # the convolutions are deep enough
        self.fuse = mlp([seen] + hidden + [e, e])           # image part of the embedding; proprioception is appended to it
        self.embed_size = e + 15
        self.from_z, self.from_action = nn.Linear(z, cfg.wm_hidden), nn.Linear(cfg.wm_stride * (14 + 6 * cfg.wm_octaves), cfg.wm_hidden, bias=False)
        self.norm = nn.Sequential(nn.LayerNorm(cfg.wm_hidden, eps=1e-3), nn.ELU())
        self.gru = NormGRU(cfg.wm_hidden, cfg.wm_h)
        self.prior = mlp([cfg.wm_h, cfg.wm_hidden, stats_size(cfg)])
        self.post_h, self.post_e = nn.Linear(cfg.wm_h, cfg.wm_hidden), nn.Linear(self.embed_size, cfg.wm_hidden, bias=False)
        self.post_out = nn.Sequential(nn.LayerNorm(cfg.wm_hidden, eps=1e-3), nn.ELU(), nn.Linear(cfg.wm_hidden, stats_size(cfg)))
        self.decoder = ConvDecoder(cfg, self.feature_size) if self.conv else mlp([self.feature_size, 2 * e, 2 * e, self.codec.size])
        self.pose_head = mlp([self.feature_size, e, 15])
        self.register_buffer("lead", torch.ones(()))        # found in the recording: an action is added to the old target (1), or to where the arm is by then (0).  Dream and agent integrate commands by it

    def embed(self, obs):
        """obs: proprio [..., 15] (pose, gripper width, joints, gripper command) and codes [..., k] or both frames u8 [..., S, S, 3] -> embedding [..., E]; its last 15 numbers are the proprioception."""
        if self.codec:
            codes = obs["codes"] if "codes" in obs else self.codec.encode(obs["rgb_static"], obs["rgb_gripper"])
            seen = self.blur(self.codec.whiten(codes))
        else:
            seen = self.conv(obs["rgb_static"], obs["rgb_gripper"])
        return torch.cat([self.fuse(seen), obs["proprio"]], -1)

    def blur(self, x, scale=1):
        """Noise while learning: pass after pass over the same play would teach its sequences by heart, and contact only where it was recorded."""
        return x + scale * self.cfg.wm_noise * torch.randn_like(x) if self.training and self.cfg.wm_noise else x

    def initial(self, batch, device):
        return torch.zeros(batch, self.cfg.wm_h, device=device), torch.zeros(batch, latent_size(self.cfg), device=device)

    def step(self, h, z, action, command):
        """One transition: memory after the actions [B, stride * 7] were given and the arm's target went through the commands [B, stride * 7]."""
        return self.transition(h, z, self.moved(action, command))

    def moved(self, action, command):
        """What the arm was told [..., wm_hidden].  Contact is a sharp function of position, which networks learn late; sines of it help (NeRF's trick)."""
        position = command.unflatten(-1, (-1, 7))[..., :3].flatten(-2)                                # [..., stride * 3], in units of 0.1 m
        angles = [position * 2 ** (k + 2) for k in range(self.cfg.wm_octaves)]
        return self.from_action(torch.cat([action, command, *[wave for x in angles for wave in (x.sin(), x.cos())]], -1))

    def transition(self, h, z, moved):
        return self.gru(self.norm(self.from_z(z) + moved), h)                                         # [B, h]

    def posterior(self, h, embedding):
        return self.post_out(self.post_h(h) + self.post_e(embedding))

    def rollout(self, embedding, action, command, context=None):
        """Watch a sequence and, beside it, dream it.

        embedding [B, T, E], action and command [B, T, stride * 7] (what led to the frame); context: [B] number of frames that the
        dreaming stream may watch before it closes its eyes, or None for no such stream.
        Returns posterior features [B, T, F], (posteriors, priors) [B, T, stats_size], dreamed features [B, T, F] or None."""
        B, T = action.shape[:2]
        streams = 1 if context is None else 2
        h, z = self.initial(streams * B, action.device)
        moved = self.moved(self.blur(action, 3), self.blur(command)).repeat(streams, 1, 1)                # both streams in one batch
        seen = self.post_e(embedding)                       # everything that needs no recurrence is done for all T at once
        hs, zs, posts, priors = [], [], [], []
        for t in range(T):
            h = self.transition(h, z, moved[:, t])
            prior = self.prior(h)
            post = self.post_out(self.post_h(h[:B]) + seen[:, t])
            z = sample_latent(post, self.cfg)
            if streams == 2:
                watching = (t < context)[:, None]                                                     # [B, 1]
                dreamed = sample_latent(prior[B:], self.cfg)
                h = torch.cat([h[:B], torch.where(watching, h[:B], h[B:])])
                z = torch.cat([z, torch.where(watching, z, dreamed)])
            hs.append(h), zs.append(z), posts.append(post), priors.append(prior[:B])
        feature = torch.cat([torch.stack(hs, 1), torch.stack(zs, 1), command[..., -7:].repeat(streams, 1, 1)], -1)   # [streams * B, T, F]
        return feature[:B], (torch.stack(posts, 1), torch.stack(priors, 1)), feature[B:] if streams == 2 else None

    def proprio(self, feature):
        """What the model believes of the robot's own state [..., 15]; its pose is predicted as a lag behind the command."""
        return self.pose_head(feature) + F.pad(feature[..., -7:-1], (0, 9))

    def tcp(self, feature):
        """The TCP pose [..., 6] (m, rad) that the model believes in."""
        return decode_pose(self.proprio(feature)[..., :6])

    def image_error(self, feature, batch):
        """Half the squared error summed over cameras, channels and pixels (-1..1), as a Gaussian likelihood has it: [B, T]."""
        if self.codec:
            parts = (self.decoder(feature) - batch["codes"]).square().split(self.codec.sizes, -1)
            errors = [part.sum(-1) for part in parts]
        else:
            errors = [(image - (batch[k].float() / 127.5 - 1)).square().sum((-1, -2, -3))
                      for image, k in zip(self.decoder(feature), ("rgb_static", "rgb_gripper"))]
        return 0.5 * (errors[0] + self.cfg.wm_gripper * errors[1])

    def images(self, feature):
        """Decoded frames, u8 [..., S, S, 3] of both cameras."""
        images = self.codec.decode(self.decoder(feature)) if self.codec else self.decoder(feature)
        return [((i + 1) * 127.5).clamp(0, 255).to(torch.uint8) for i in images]

def world_model_loss(wm, batch, cfg):
    """DreamerV2's negative evidence bound, plus the same likelihood for frames that were dreamed instead of watched."""
    B, T = batch["action"].shape[:2]
    device = batch["action"].device
    context = torch.randint(1, min(cfg.wm_context, T - 1) + 1, (B,), device=device) if cfg.wm_open else None
    feature, (post, prior), dreamed = wm.rollout(wm.embed(batch), batch["action"], batch["command"], context)
    kl = balanced_kl(post, prior, cfg).mean()
    keep = max(1, round(T * cfg.wm_decode))                 # decode a random subset of the time steps
    times = torch.randperm(T, device=device)[:keep]
    seen = {k: v[:, times] for k, v in batch.items() if k in ("codes", "rgb_static", "rgb_gripper")}
    def likelihood(f):
        image = wm.image_error(f[:, times], seen)                                                     # [B, keep]
        pose = 0.5 * (wm.proprio(f) - batch["proprio"]).square().sum(-1)                     # [B, T]
        return image, pose
    image, pose = likelihood(feature)
    loss = image.mean() + cfg.wm_kl * kl + cfg.wm_proprio * pose.mean()
    metrics = dict(image=image.mean(), pose=pose.mean(), kl=kl)
    if cfg.wm_open:
        blind = torch.arange(T, device=device) >= context[:, None]                                    # [B, T]
        dreamed_image, dreamed_pose = likelihood(dreamed)
        now = blind[:, times]                                                                         # [B, keep]
        dreamed_image = (dreamed_image * now).sum() / now.sum().clamp(min=1)
        dreamed_pose = (dreamed_pose * blind).sum() / blind.sum()
        loss = loss + cfg.wm_open * (dreamed_image + cfg.wm_proprio * dreamed_pose)
        metrics.update(open_image=dreamed_image, open_pose=dreamed_pose)
    return loss, metrics

@torch.no_grad()
def views(wm, recording, starts, length, last=None):
    """Windows as the posterior sees them and as the prior dreams them from their first frame alone.

    starts [W]; length in frames, of which every wm_stride-th is looked at; last [W] final frame of each window's episode (past it, frames and features repeat).
    -> posterior, dreamed [W, T, F], frames [W, T]"""
    stride = wm.cfg.wm_stride
    frames = starts[:, None] + np.arange(0, length, stride)
    if last is not None:
        frames = np.minimum(frames, (last - (last - starts) % stride)[:, None])
    seen, dreamed = [], []
    for block in np.array_split(frames, max(1, len(frames) // 128)):
        batch = recording.batch(block)
        context = torch.ones(len(block), device=wm.cfg.device)
        feature, _, dream = wm.rollout(wm.embed(batch), batch["action"], batch["command"], context)
        rows, times = np.arange(len(block))[:, None], (block - block[:, :1]) // stride
        seen.append(feature[rows, times]), dreamed.append(dream[rows, times])
    return torch.cat(seen), torch.cat(dreamed), frames


# ======================================================================================================================
# 3  Actor.  A diffusion policy turns noise into a chunk of H actions in K denoising steps (DDPM, eq. 11), conditioned on the
#    world model's feature.  Cloning trains the denoiser to predict the noise that was added to a demonstrated chunk.  For
#    PPO (section 6) each of the last K' steps is a Gaussian whose log-density we can write down; that is the whole trick of DPPO.
#
#        chunk_K ~ N(0, 1) -> ... -> chunk_K' -> ... -> chunk_1 -> chunk_0 = what is executed
#                     frozen base net        fine-tuned net, which first meets chunk_K'; chain[0..K'] is recorded
# ======================================================================================================================

def time_embedding(t, size=16):
    """Sinusoids of the denoising step t [...] -> [..., size]."""
    frequency = torch.exp(torch.arange(size // 2, device=t.device) * (-math.log(10000) / (size // 2 - 1)))
    angle = t.float()[..., None] * frequency
    return torch.cat([angle.sin(), angle.cos()], -1)

class TimeEmbedding(nn.Sequential):
    def __init__(self, size=16):
        super().__init__(nn.Linear(size, 2 * size), nn.Mish(), nn.Linear(2 * size, size))

    def forward(self, t):
        return super().forward(time_embedding(t))

class MLPDenoiser(nn.Module):
    """[chunk, time, feature] -> Linear -> one pre-activation residual block -> noise (DPPO's network)."""

    def __init__(self, cfg, feature_size):
        super().__init__()
        flat, n = cfg.bc_chunk * 7, cfg.bc_hidden
        self.time = TimeEmbedding()
        self.first, self.see = nn.Linear(flat + 16, n), nn.Linear(feature_size, n, bias=False)       # one layer in two parts: the feature
        self.l1, self.l2, self.last = nn.Linear(n, n), nn.Linear(n, n), nn.Linear(n, flat)           # is the same for all K' steps

    def forward(self, x, t, feature):
        """x [..., H, A], t [...], feature [..., F]; t's and feature's leading dimensions broadcast to x's -> predicted noise [..., H, A]"""
        time = self.time(t).expand(*x.shape[:-2], -1)
        y = self.first(torch.cat([x.flatten(-2), time], -1)) + self.see(feature)
        y = y + self.l2(F.mish(self.l1(F.mish(y))))
        return self.last(y).view_as(x)

class FiLMBlock(nn.Module):
    """Two convolutions over the chunk; time and feature scale and shift the channels between them."""

    def __init__(self, a, b, condition):
        super().__init__()
        def conv(i, o):
            return nn.Sequential(nn.Conv1d(i, o, 5, padding=2), nn.GroupNorm(8, o), nn.Mish())
        self.c1, self.c2, self.film = conv(a, b), conv(b, b), nn.Sequential(nn.Mish(), nn.Linear(condition, 2 * b))
        self.skip = nn.Conv1d(a, b, 1) if a != b else nn.Identity()

    def forward(self, x, condition):
        scale, shift = self.film(condition)[..., None].chunk(2, 1)                                    # [N, b, 1] each
        return self.c2(self.c1(x) * (1 + scale) + shift) + self.skip(x)

class UNetDenoiser(nn.Module):
    """A 1-D convolutional UNet over the chunk's time axis, channels 64, 128, 256 (Diffusion Policy)."""

    def __init__(self, cfg, feature_size):
        super().__init__()
        c, n = 16 + feature_size, (64, 128, 256)
        self.time = TimeEmbedding()
        self.down = nn.ModuleList([FiLMBlock(7, n[0], c), FiLMBlock(n[0], n[1], c), FiLMBlock(n[1], n[2], c)])
        self.halve = nn.ModuleList([nn.Conv1d(n[0], n[0], 3, 2, 1), nn.Conv1d(n[1], n[1], 3, 2, 1)])
        self.up = nn.ModuleList([FiLMBlock(2 * n[1], n[1], c), FiLMBlock(2 * n[0], n[0], c)])
        self.widen = nn.ModuleList([nn.ConvTranspose1d(n[2], n[1], 4, 2, 1), nn.ConvTranspose1d(n[1], n[0], 4, 2, 1)])
        self.last = nn.Conv1d(n[0], 7, 1)

    def forward(self, x, t, feature):
        lead = x.shape[:-2]
        condition = torch.cat([self.time(t).expand(*lead, -1), feature.expand(*lead, -1)], -1).flatten(0, -2)   # [N, 16 + F]
        x = x.flatten(0, -3).transpose(1, 2)                                                          # [N, A, H]
        a = self.down[0](x, condition)                                                                # [N, 64, H]
        b = self.down[1](self.halve[0](a), condition)                                                 # [N, 128, H/2]
        x = self.down[2](self.halve[1](b), condition)                                                 # [N, 256, H/4]
        x = self.up[0](torch.cat([self.widen[0](x), b], 1), condition)
        x = self.up[1](torch.cat([self.widen[1](x), a], 1), condition)
        return self.last(x).transpose(1, 2).unflatten(0, lead)                                        # [..., H, A]

def gaussian_logprob(x, mean, std):
    """Element-wise log-density, clamped to [-5, 2] as in DPPO, so that one outlier cannot own a ratio."""
    return (-0.5 * ((x - mean) / std) ** 2 - torch.log(std) - 0.5 * math.log(2 * math.pi)).clamp(-5, 2)

class DiffusionActor(nn.Module):
    """net: the trainable denoiser.  base: while cloning its moving average, then its frozen copy, which makes the first K - K' steps and anchors fine-tuning."""

    def __init__(self, cfg, feature_size):
        super().__init__()
        self.cfg, self.K, self.links = cfg, cfg.bc_steps, cfg.ft_steps                                 # links: the K' Gaussian steps of a chain
        build = MLPDenoiser if cfg.bc_net == "mlp" else UNetDenoiser
        self.net = build(cfg, feature_size)
        self.base = copy.deepcopy(self.net).requires_grad_(False)
        i = torch.arange(self.K + 1, dtype=torch.float64) / self.K
        f = torch.cos((i + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = (1 - f[1:] / f[:-1]).clamp(0, 0.999)         # cosine schedule, in float64; t = 0 is the last, cleanest step
        bar = torch.cumprod(1 - beta, 0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
        schedule = dict(signal=bar.sqrt(), noise=(1 - bar).sqrt(), coef_x0=beta * before.sqrt() / (1 - bar),
                        coef_xt=(1 - before) * (1 - beta).sqrt() / (1 - bar), std=(beta * (1 - before) / (1 - bar)).clamp(min=1e-20).sqrt())
        for name, value in schedule.items():
            self.register_buffer(name, value.float(), persistent=False)

    def bc_loss(self, feature, chunk):
        """DDPM, eq. 14: predict the noise.  feature [N, F], chunk [N, H, A] -> scalar"""
        t = torch.randint(0, self.K, (len(chunk),), device=chunk.device)
        noise = torch.randn_like(chunk)
        x = self.signal[t, None, None] * chunk + self.noise[t, None, None] * noise
        return F.mse_loss(self.net(x, t, feature), noise)

    def mean(self, net, x, t, feature):
        """DDPM, eq. 7: mean of the chunk one step cleaner, with the guess of the clean chunk clipped to the action range.  x [..., H, A]"""
        step = torch.full(x.shape[:-2], t, device=x.device) if isinstance(t, int) else t
        clean = (x - self.noise[step, None, None] * net(x, step, feature)) / self.signal[step, None, None]
        return self.coef_x0[step, None, None] * clean.clamp(-1, 1) + self.coef_xt[step, None, None] * x

    @torch.no_grad()
    def sample_chain(self, feature, explore=True, frozen=False):
        """feature [B, F] -> chain [B, K'+1, H, A]: what goes into the first fine-tuned step, then each step's output; [:, -1] is executed.

        explore: std max(sigma, .1) and noise clipped to 3 std; otherwise 0 at t = 0, else max(sigma, 1e-3).  frozen: the base net all along."""
        x = torch.randn(len(feature), self.cfg.bc_chunk, 7, device=feature.device)
        chain = [x] if self.links == self.K else []
        for t in reversed(range(self.K)):
            mean = self.mean(self.base if frozen or t >= self.links else self.net, x, t, feature)
            std = self.std[t].clamp(min=self.cfg.ft_std) if explore else self.std[t].clamp(min=1e-3) * (t > 0)
            x = mean + std * torch.randn_like(x).clamp(-3, 3)
            if t <= self.links:
                chain.append(x)
        return torch.stack(chain, 1)                                                                  # [B, K'+1, H, A]

    def chain_logprob(self, feature, chain):
        """Log-probability of every recorded step, AVERAGED over the chunk's numbers (summed, the clip range would be 28 times too tight).

        feature [B, F], chain [B, K'+1, H, A] -> [B, K'].  Step j turns chain[j] into chain[j + 1] and is denoising step t = K' - 1 - j."""
        t = torch.arange(self.links - 1, -1, -1, device=chain.device)                                 # [K']
        mean = self.mean(self.net, chain[:, :-1], t, feature[:, None])                                # [B, K', H, A]
        std = self.std[t].clamp(min=self.cfg.ft_std)[:, None, None]                                   # floored as in sampling, also at t = 0
        return gaussian_logprob(chain[:, 1:], mean, std).mean((-1, -2))                               # [B, K']

    def act(self, feature):
        """feature [B, F] -> the chunk to execute [B, H, A]: DDPM's own noise without exploration's floor, none at the last step."""
        return self.sample_chain(feature, explore=False)[:, -1]

    @torch.no_grad()
    def act_ddim(self, feature, steps=5):
        """DDIM with eta = 0: the same nets in fewer, deterministic steps [B, H, A].  It has no density, so PPO cannot use it.

        The steps are spread from the first to the last, 19 14 10 5 0 of 20; DPPO's are 16 12 8 4 0."""
        x = torch.randn(len(feature), self.cfg.bc_chunk, 7, device=feature.device)
        times = torch.linspace(self.K - 1, 0, steps).round().int().tolist()
        for t, following in zip(times, times[1:] + [-1]):
            net = self.base if t >= self.links else self.net
            noise = net(x, torch.full((len(x),), t, device=x.device), feature)
            clean = ((x - self.noise[t] * noise) / self.signal[t]).clamp(-1, 1)
            noise = (x - self.signal[t] * clean) / self.noise[t]
            x = clean if following < 0 else self.signal[following] * clean + self.noise[following] * noise
        return x

class GaussianActor(nn.Module):
    """The plain alternative behind the same interface: one Gaussian a chunk, a chain with one link."""

    def __init__(self, cfg, feature_size):
        super().__init__()
        self.cfg, self.links, n = cfg, 1, cfg.bc_hidden
        self.net = mlp([feature_size, n, n, cfg.bc_chunk * 7], nn.Mish, norm=False)
        self.base = copy.deepcopy(self.net).requires_grad_(False)

    def mean(self, net, feature):
        return torch.tanh(net(feature)).unflatten(-1, (self.cfg.bc_chunk, 7))                         # [B, H, A]

    def bc_loss(self, feature, chunk):
        return F.mse_loss(self.mean(self.net, feature), chunk)

    @torch.no_grad()
    def sample_chain(self, feature, explore=True, frozen=False):
        mean = self.mean(self.base if frozen else self.net, feature)
        return torch.stack([torch.zeros_like(mean), mean + explore * self.cfg.ft_std * torch.randn_like(mean).clamp(-3, 3)], 1)

    def chain_logprob(self, feature, chain):
        mean = self.mean(self.net, feature)
        return gaussian_logprob(chain[:, 1], mean, torch.full_like(mean, self.cfg.ft_std)).mean((-1, -2))[:, None]   # [B, 1]

    act = DiffusionActor.act

def build_actor(cfg, feature_size):
    return (DiffusionActor if cfg.bc_actor == "diffusion" else GaussianActor)(cfg, feature_size).to(cfg.device)

@torch.no_grad()
def ema_update(average, net, decay, step):
    """Moving average of the weights; the decay rises with the step, or a short training would return near-initial weights."""
    decay = min(decay, (1 + step) / (10 + step))
    for a, b in zip(average.parameters(), net.parameters()):
        a.lerp_(b, 1 - decay)

def demonstration_views(cfg, wm, recording, offsets=7, draws=2):
    """The moments of every demonstration until just after its success, seen from starts every `offsets` frames (odd, so that with a stride of 2 windows take
    turns with even and odd moments).  Each window is run twice: watched (the posterior sees every frame) and dreamed (the first frame, then the prior
    and the recorded actions).  The robot's policy sees the former, PPO's the latter, so cloning and the classifier train on both, in one heap.

    What follows success is another task's beginning: counted as success, it teaches the classifier where arms go afterwards.
    Returns feature, first feature of the same window [P, F], frame numbers [P], start frames [P]."""
    segments = [(a, b) for _, a, b in recording.ds.segments]
    for i, (a, b) in enumerate(segments):
        done = np.flatnonzero(recording.success(cfg.task, a, np.arange(a, b + 1)))
        segments[i] = (a, min(b, a + done[0] + 4) if len(done) else b)                               # success shows in it and in four more frames
    starts = np.array([(s, b) for a, b in segments for s in range(a, b - 3, offsets)])               # at least five frames a view
    length = int((starts[:, 1] - starts[:, 0]).max()) + 1
    feature, first, frame, start = [], [], [], []
    for _ in range(draws):
        seen, dreamed, frames = views(wm, recording, starts[:, 0], length, starts[:, 1])
        inside = torch.from_numpy(starts[:, :1] + np.arange(0, length, cfg.wm_stride) <= starts[:, 1:])   # [W, T]
        for f in (seen, dreamed):
            feature.append(f[inside.to(f.device)])
            first.append(f[:, :1].expand_as(f)[inside.to(f.device)])
            frame.append(frames[inside.numpy()])
            start.append(np.broadcast_to(starts[:, :1], frames.shape)[inside.numpy()])
    return torch.cat(feature), torch.cat(first), np.concatenate(frame), np.concatenate(start)


# ======================================================================================================================
# 4  Reward.  Nobody measures success inside a dream, so a classifier must recognise it.  CALVIN's rules compare now with the
#    start ("the drawer has been closed by 12 cm"), so ours sees the first feature and the change since.  Demonstrations say what
#    success looks like; play, unlabelled, says what everything else looks like, and that is what PPO will try to sell as success.
#    Play has successes, too: with reward_rounds, windows in which the classifier sees one, watched and dreamed, change sides.
# ======================================================================================================================

class Classifier(nn.Module):
    def __init__(self, cfg, feature_size):
        super().__init__()
        n = cfg.reward_hidden
        self.embedding = mlp([2 * feature_size, n, n, 64], nn.ELU)
        self.head = nn.Linear(64, 2)

    def forward(self, first, feature):
        """first, feature [..., F] -> embedding [..., 64], logits [..., 2]"""
        e = self.embedding(torch.cat([first, feature - first], -1))
        return e, self.head(F.elu(e))

    def success(self, first, feature):
        """The reward: 1.0 where class 1 wins, else 0.0: [...]"""
        return self(first, feature)[1].argmax(-1).float()

def lasting(model, feature):
    """Where success shows, and did one step before; the first feature is the start.  [W, T, F] -> bool [W, T]"""
    fires = model.success(feature[:, :1].expand_as(feature), feature) > 0
    return fires & F.pad(fires[:, :-1], (1, 0))

def after_success(model, seen, dreamed):
    """From where a window shows success both ways, watched and dreamed: a lit lamp stays lit for seconds.  [W, T, F] twice -> bool [W, T]"""
    return (lasting(model, seen) & lasting(model, dreamed)).cumsum(1) > 0

def nt_xent(embedding, label, tau):
    """Supervised contrastive loss (Khosla et al. 2020, eq. 2): pull same-class embeddings together.  embedding [N, D], label [N] -> scalar"""
    z = F.normalize(embedding, dim=-1)
    similarity = z @ z.T / tau                                                                        # [N, N]
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logp = similarity - torch.logsumexp(similarity.masked_fill(own, -torch.inf), 1, keepdim=True)
    positive = (label[:, None] == label[None]) & ~own
    return -((logp * positive).sum(1) / (positive.sum(1) + 1e-10)).mean()

def classifier_loss(model, first, feature, label, weight, cfg):
    embedding, logits = model(first, feature)
    entropy = (F.cross_entropy(logits, label, reduction="none") * weight).sum() / weight.sum()
    contrast = nt_xent(embedding, label, cfg.reward_tau)
    return contrast + cfg.reward_ce * entropy, dict(contrast=contrast, entropy=entropy)


# ======================================================================================================================
# 5  Dream.  A world model is an environment: reset() returns features, step() takes chunks.  Nothing here, or in the next
#    section, touches a simulator.  Finished dreams start again at once from another recorded frame.
# ======================================================================================================================

class DreamEnv:
    """B imagined arms.  reset() -> feature [B, F]; step(chunk [B, H, A]) -> feature, reward, terminated, truncated, final.

    `feature` belongs to the restarted dream where one ended; `final` is always the true next feature, for the bootstrap."""

    def __init__(self, cfg, wm, classifier, embedding, command, target, dreams, horizon):
        """embedding [M, E], command [M, 7], target [M, 6]: recorded frames that a dream may start from, on the device."""
        self.cfg, self.wm, self.classifier, self.B, self.horizon = cfg, wm, classifier, dreams, horizon
        self.bank = (embedding, command, target)

    def draw(self, n):
        """Fresh starts: the zero state, one recorded frame, the posterior."""
        index = torch.randint(0, len(self.bank[0]), (n,), device=self.bank[0].device)
        embedding, command, target = (x[index] for x in self.bank)
        h, z = self.wm.initial(n, embedding.device)
        told = command.repeat(1, self.cfg.wm_stride)                                                  # [n, stride * 7]: it has stood still so far
        h = self.wm.step(h, z, torch.zeros_like(told), told)
        z = sample_latent(self.wm.posterior(h, embedding), self.cfg)
        state = dict(h=h, z=z, command=command, target=target)
        # The policy does not see that the world has moved, or it would correct for it.  In units of the command, 0.1 m
        shift = F.pad(self.cfg.ft_shift / 0.1 * torch.randn(n, 3, device=h.device), (0, 4))           # [n, 7]
        return dict(state, first=feature_of(state), age=torch.zeros_like(h[:, 0]), shift=shift)

    @torch.no_grad()
    def reset(self):
        self.state = self.draw(self.B)
        return self.state["first"]

    @torch.no_grad()
    def step(self, chunk):
        first, age, shift = self.state["first"], self.state["age"] + 1, self.state["shift"]
        now, reward = dream_chunk(self.wm, self.classifier, self.state, first, executed(chunk), shift)
        final = feature_of(now)                                                                       # [B, F]
        terminated = reward > 0
        truncated = (age >= self.horizon) & ~terminated
        new, now, done = self.draw(len(chunk)), dict(now, first=first, age=age, shift=shift), terminated | truncated
        self.state = {k: torch.where(done[:, None] if v.dim() > 1 else done, new[k], v) for k, v in now.items()}
        return feature_of(self.state), reward, terminated, truncated, final

def feature_of(state):
    return torch.cat([state["h"], state["z"], state["command"]], -1)                                  # [B, F]

def dream_step(wm, state, action, shift=0.0):
    """One imagined step: integrate the commands as the simulator does, then memory, then a guess from the prior.  action [B, stride, 7] -> state

    shift [B, 7] is added to the commands that the world model hears, not to the one that the policy sees."""
    target, lead, told = state["target"], wm.lead, []
    tcp = wm.tcp(feature_of(state)) if wm.cfg.wm_proprio else target
    for a in action.unbind(1):
        target, lead = advance_target(target, a, tcp, lead), 1              # wm.lead is for a step's first action; the later ones always add to the target, as tcp is not predicted anew in between
        command = encode_command(target, a[:, 6:])
        told.append(command + shift)
    h = wm.step(state["h"], state["z"], action.flatten(1), torch.cat(told, -1))
    return dict(h=h, z=sample_latent(wm.prior(h), wm.cfg), command=command, target=target)

def dream_chunk(wm, classifier, state, first, chunk, shift=0.0):
    """Imagine a chunk of executed actions [B, H, 7] -> state, reward [B]: 1.0 where the last two steps of the model both look like success.

    One would do for a robot; in a dream the sampled latent makes things flicker, and a policy learns to wait for the flicker."""
    for action in chunk.split(wm.cfg.wm_stride, 1):
        before, state = state, dream_step(wm, state, action, shift)
    return state, classifier.success(first, feature_of(before)) * classifier.success(first, feature_of(state))

def executed(action):
    """What the arm receives for a policy's numbers [..., 7]: clipped to [-1, 1], the gripper binary, in dreams as on the robot."""
    grip = torch.where(action[..., 6:] >= 0, 1.0, -1.0)
    return torch.cat([action[..., :6].clamp(-1, 1), grip], -1)

@torch.no_grad()
def dream_on(cfg, wm, actor, classifier, state, first):
    """The policy itself in the dream, from the agent's first state: does the dream believe in its success?  [B]"""
    solved = torch.zeros(len(first), dtype=torch.bool, device=first.device)
    for _ in range(cfg.eval_steps // cfg.bc_chunk):
        state, verdict = dream_chunk(wm, classifier, state, first, executed(actor.act(feature_of(state))))
        solved |= verdict > 0
    return solved.cpu().numpy()


# ======================================================================================================================
# 6  PPO through the chain (DPPO).  One decision of the dream, a chunk, is K' small decisions, the denoising steps; each gets
#    the chunk's advantage, discounted by how many steps are left to clean it.  Four things to get right: average a chunk's log-probs (chain_logprob does),
#    give noisy steps a tighter clip, bootstrap a cut dream from its own last feature, and stay close to what was cloned.
# ======================================================================================================================

def gae(reward, value, next_value, terminated, truncated, gamma, lam):
    """Generalised advantage estimation over chunks (arXiv 1506.02438, eq. 16), everything [T, B]; next_value belongs to the true next
    feature, so a truncated dream bootstraps from its own end, and the trace is cut at every end.  -> advantage, return [T, B]

    DPPO's code lets the trace run on through a truncation; there the next state is another episode's."""
    advantage, trace = torch.zeros_like(reward), torch.zeros_like(reward[0])
    for t in reversed(range(len(reward))):
        delta = reward[t] + gamma * next_value[t] * ~terminated[t] - value[t]
        trace = delta + gamma * lam * trace * ~(terminated[t] | truncated[t])
        advantage[t] = trace
    return advantage, advantage + value

def clip_schedule(cfg, links, device):
    """epsilon for each of the K' steps [K'], from ft_clip_first at the noisiest to ft_clip at the last, exponentially."""
    x = torch.arange(links, device=device) / max(links - 1, 1) if links > 1 else torch.ones(1, device=device)
    return cfg.ft_clip_first + (cfg.ft_clip - cfg.ft_clip_first) * (torch.exp(3 * x) - 1) / (math.exp(3) - 1)

class RewardScaler(nn.Module):
    """Divides rewards by the running std of the discounted return, clipped to +-10; state lives in buffers, so it is saved and resumed.

    The statistics take in a whole rollout before it is scaled; DPPO's take in one time step after the other."""

    def __init__(self):
        super().__init__()
        for name, value in dict(mean=torch.zeros(()), var=torch.ones(()), count=torch.tensor(1e-4)).items():
            self.register_buffer(name, value)

    def forward(self, reward, over, gamma):
        """reward [T, B] of dreams from their start; over [T, B]: the dream ended there and began anew -> scaled reward [T, B]"""
        returns, so_far = [], torch.zeros_like(reward[0])
        for r, end in zip(reward, over):
            returns.append(so_far + r)
            so_far = gamma * returns[-1] * ~end
        x = torch.stack(returns)
        delta, n = x.mean() - self.mean, x.numel()
        total = self.count + n
        spread = self.var * self.count + x.var(correction=0) * n + delta ** 2 * self.count * n / total
        self.mean, self.var, self.count = self.mean + delta * n / total, spread / total, total
        return (reward / (self.var + 1e-8).sqrt()).clamp(-10, 10)

@torch.no_grad()
def dream_rollout(cfg, env, actor, critic):
    """ft_chunks steps of every dream, from its start -> tensors [T, B, ...]"""
    feature, rows = env.reset(), []
    for _ in range(cfg.ft_chunks):
        chain = actor.sample_chain(feature)
        following, reward, terminated, truncated, final = env.step(chain[:, -1])
        rows.append(dict(feature=feature, chain=chain, reward=reward, terminated=terminated, truncated=truncated,
                         logprob=actor.chain_logprob(feature, chain), value=critic(feature)[:, 0], next_value=critic(final)[:, 0]))
        feature = following
    return {k: torch.stack([row[k] for row in rows]) for k in rows[0]}

def ppo_loss(cfg, actor, critic, b):
    """DPPO, eq. 11.  b: a minibatch with feature [N, F], chain [N, K'+1, H, A], logprob [N, K'], advantage, return [N], anchor (chains of the
    frozen policy).  -> loss, diagnostics"""
    links = actor.links
    left = torch.arange(links - 1, -1, -1, device=b["feature"].device)                                # steps left to clean: K'-1 .. 0
    advantage = b["advantage"][:, None] * cfg.ft_gamma_denoise ** left                                # [N, K']
    log_ratio = actor.chain_logprob(b["feature"], b["chain"]) - b["logprob"]
    ratio, clip = log_ratio.exp(), clip_schedule(cfg, links, left.device)
    policy = -torch.min(advantage * ratio, advantage * torch.clamp(ratio, 1 - clip, 1 + clip)).mean()
    value = F.mse_loss(critic(b["feature"])[:, 0], b["return"])
    some = slice(0, -(-len(b["feature"]) // 4))             # a quarter of the shuffled rows is anchor enough, and costs a quarter
    anchor = -actor.chain_logprob(b["feature"][some], b["anchor"][some]).mean() if cfg.ft_bc else torch.zeros_like(policy)
    metrics = dict(policy=policy, value=value, anchor=anchor, kl=(ratio - 1 - log_ratio).mean(),
                   clipped=((ratio - 1).abs() > clip).float().mean())
    return policy + cfg.ft_value * value + cfg.ft_bc * anchor, metrics

def ppo_iteration(cfg, env, actor, critic, scaler, optimizers, train_actor):
    """Dream, then learn from it.  -> diagnostics

    All dreams start anew, so that an iteration depends on nothing that a resumed run would not have."""
    roll = dream_rollout(cfg, env, actor, critic)
    over = roll["terminated"] | roll["truncated"]
    reward = scaler(roll["reward"], over, cfg.ft_gamma)
    advantage, returns = gae(reward, roll["value"], roll["next_value"], roll["terminated"], roll["truncated"], cfg.ft_gamma, cfg.ft_lambda)
    data = dict(feature=roll["feature"], chain=roll["chain"], logprob=roll["logprob"], advantage=(advantage - advantage.mean()) / (advantage.std() + 1e-8))
    data["return"] = returns
    data = {k: v.flatten(0, 1) for k, v in data.items()}                                              # [T * B, ...]
    if cfg.ft_bc:
        data["anchor"] = actor.sample_chain(data["feature"], frozen=True)
    n, history = len(data["feature"]), []
    for _ in range(cfg.ft_epochs):
        for index in torch.randperm(n, device=data["feature"].device).chunk(cfg.ft_minibatches):
            loss, metrics = ppo_loss(cfg, actor, critic, {k: v[index] for k, v in data.items()})
            for optimizer in optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizers["critic"].step()
            if train_actor:
                optimizers["actor"].step()
            history.append(metrics)
    out = {k: torch.stack([m[k].detach() for m in history]).mean() for k in history[0]}
    out["explained"] = 1 - (returns - roll["value"]).var() / (returns.var() + 1e-8)
    ends = over & (over.cumsum(0) == 1)                     # each dream's first end: one that began anew may have had no time to fail
    out["dream_success"] = (roll["terminated"] & ends).sum() / over.shape[1]                          # one that has not ended has not succeeded
    return out


# ======================================================================================================================
# 7  Agent.  World model and actor as one object, the one a robot would run: it filters every wm_stride-th frame with the actions that led to
#    it, and every H steps asks the actor for a new chunk.  Evaluation (support/evaluate.py) runs this object and nothing else.
# ======================================================================================================================

class Agent:
    """B robots in lock step.  reset(B); act(obs) -> actions [B, 7] with obs a dict of stacked observations.

    With a classifier it also has opinions: verdict(), dreamed_success(), dreamed_verdicts(actions)."""

    def __init__(self, cfg, wm, actor, classifier=None):
        self.cfg, self.wm, self.actor, self.classifier = cfg, wm, actor, classifier

    def reset(self, batch):
        self.h, self.z = self.wm.initial(batch, self.cfg.device)
        self.action, self.target, self.queue = torch.zeros(batch, 7, device=self.cfg.device), None, []
        self.begin = None                                   # state of the first frame

    @torch.no_grad()
    def observe(self, obs):
        """Take in one control step's frame: robot_obs [B, 15] and, at every wm_stride-th, rgb_static and rgb_gripper [B, S, S, 3] u8.
        -> feature [B, F] of the last frame that was filtered"""
        def tensor(key):
            return torch.as_tensor(np.stack(obs[key])).to(self.cfg.device)
        robot = tensor("robot_obs")
        tcp, gripper = robot[:, :6], robot[:, 14:]
        if self.target is None:
            self.target, command = tcp, encode_command(tcp, gripper)
            self.told = [(self.action, command)] * self.cfg.wm_stride
        else:
            self.target = advance_target(self.target, self.action, self.tcp, self.wm.lead)
            command = encode_command(self.target, self.action[:, 6:])
            self.told.append((self.action, command))
        self.tcp = tcp
        if len(self.told) == self.cfg.wm_stride:
            seen = dict(rgb_static=tensor("rgb_static"), rgb_gripper=tensor("rgb_gripper"), proprio=encode_proprio(robot))
            self.h = self.wm.step(self.h, self.z, *(torch.cat(x, -1) for x in zip(*self.told)))
            self.z = sample_latent(self.wm.posterior(self.h, self.wm.embed(seen)), self.cfg)
            self.state, self.told = dict(h=self.h, z=self.z, command=command, target=self.target), []
            self.begin = self.begin or self.state
        return feature_of(self.state)

    def act(self, obs):
        feature = self.observe(obs)
        if not self.queue:
            self.queue = list(self.actor.act(feature).unbind(1))                                      # H actions [B, 7]
        return self.execute(self.queue.pop(0))

    def execute(self, action):
        """A policy's numbers [B, 7] -> what the arms receive, as numpy; the agent remembers it for the next frame."""
        self.action = executed(action)
        return self.action.cpu().numpy()

    @torch.no_grad()
    def verdict(self):
        """Does the classifier see success in the last frame?  -> bool [B]"""
        return (self.classifier.success(feature_of(self.begin), feature_of(self.state)) > 0).cpu().numpy()

    def dreamed_success(self):
        """The same policy dreams on from its first frame: does it succeed there?  -> bool [B]"""
        return dream_on(self.cfg, self.wm, self.actor, self.classifier, self.begin, feature_of(self.begin))

    @torch.no_grad()
    def dreamed_verdicts(self, actions):
        """Executed actions [B, T, 7], dreamed again from the first frame -> the classifier's verdict after each chunk, bool [B, T / H]"""
        state, first, H, verdicts = self.begin, feature_of(self.begin), self.cfg.bc_chunk, []
        for chunk in actions[:, :actions.shape[1] // H * H].split(H, 1):
            state, verdict = dream_chunk(self.wm, self.classifier, state, first, chunk)
            verdicts.append(verdict > 0)
        return torch.stack(verdicts, 1).cpu().numpy()


# ======================================================================================================================
# 8  Stages.  Each reads earlier results, writes its own, and can be run alone.
# ======================================================================================================================

def stage_play(cfg):
    """Task-agnostic play for the world model, and demonstrations of all eight tasks that only ever judge."""
    if cfg.data:
        return use_given_play(cfg, output(cfg, "play"))
    folder, base = output(cfg, "play"), 1_000_000 * (cfg.seed + 1)   # play, demonstrations, judges and evaluation never share a seed
    parts = folder.with_name("play.parts")
    judges = {task: (base + 500_000 + 1000 * i, cfg.play_replay, 0) for i, task in enumerate(TASKS)}
    good = record(cfg, parts, {"play": (base, max(10, cfg.play_frames // cfg.play_episode), cfg.play_episode), **judges})
    if cfg.play_replay:
        pack_recorded(cfg, "play", folder.with_name("replay"), {task: good[task] for task in TASKS})
    pack_recorded(cfg, "play", folder, {"play": good["play"]})
    shutil.rmtree(parts)

def stage_demos(cfg):
    """Demonstrations of the task by the scripted expert."""
    folder = output(cfg, "demos")
    if cfg.data:
        return use_given_demos(cfg, folder)
    parts = folder.with_name(folder.name + ".parts")
    good = record(cfg, parts, {cfg.task: (1_000_000 * (cfg.seed + 1) + 700_000 + 10_000 * list(TASKS).index(cfg.task), cfg.demo_count, 0)})
    pack_recorded(cfg, "demos", folder, good)
    shutil.rmtree(parts)

def load_world_model(cfg, content=None):
    wm = WorldModel(cfg).to(cfg.device)
    wm.load_state_dict((content or load(cfg, "wm"))["model"])
    return wm.eval().requires_grad_(False)

def stage_wm(cfg):
    """Train the world model on play, then judge it on held-out play and on the demonstrations of all tasks."""
    dataset = load(cfg, "play")
    seed_everything(cfg.seed, "wm", "init")
    wm = WorldModel(cfg).to(cfg.device)
    optimizer = torch.optim.AdamW(wm.parameters(), lr=cfg.wm_lr, eps=1e-5, weight_decay=cfg.wm_decay, fused=True)
    state = dict(model=wm, optimizer=optimizer)
    if wm.codec and not restore(cfg, "wm", state):          # a second fit may turn the signs of components round (other threads, other sums)
        pick = np.sort(np.random.default_rng(cfg.seed).choice(len(dataset), min(5000, len(dataset)), replace=False))
        for name in ("static", "gripper"):
            wm.codec.fit(name, torch.from_numpy(dataset[f"rgb_{name}"][pick]).to(cfg.device))
    recording = Recording(cfg, dataset, wm)
    wm.lead.fill_(recording.lead)
    episodes, _ = dataset.split()
    window = np.arange(cfg.wm_length) * cfg.wm_stride
    starts, length = window_starts(episodes, window[-1] + 1), dataset.judging_length(73)

    def update(i, rng):
        cosine_lr(optimizer, cfg.wm_lr, i, cfg.wm_updates)
        first = rng.choice(starts, cfg.wm_batch)
        loss, metrics = world_model_loss(wm, recording.batch(first[:, None] + window), cfg)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        metrics["norm"] = nn.utils.clip_grad_norm_(wm.parameters(), cfg.wm_clip)
        optimizer.step()
        return metrics

    partial = train(cfg, "wm", cfg.wm_updates, state, update)
    wm.eval().requires_grad_(False)
    judges = load_judges(cfg)
    judges = judges and Recording(cfg, judges, wm)
    judged = report.judge_world_model(recording, judges, lambda *windows: views(wm, *windows), length, seed_everything(cfg.seed, "judge"))
    print("  replay share " + "  ".join(f"{t} {s:.2f}" for t, s in judged["replay_share"].items()))
    save(output(cfg, "wm"), dict(origin(cfg, "wm"), model=wm.state_dict(), judged=judged))
    partial.unlink(missing_ok=True)

def stage_bc(cfg):
    """Clone the demonstrations."""
    wm, dataset = load_world_model(cfg), load(cfg, "demos")
    recording = Recording(cfg, dataset, wm)
    seed_everything(cfg.seed, "bc", cfg.task, "init")
    feature, _, frame, _ = demonstration_views(cfg, wm, recording)
    chunks = torch.from_numpy(action_chunks(np.array(dataset["rel_actions"]), dataset.episodes, cfg.bc_chunk)).to(cfg.device)
    frame = torch.from_numpy(frame).to(cfg.device)
    actor = build_actor(cfg, wm.feature_size)
    optimizer = torch.optim.AdamW(actor.net.parameters(), lr=cfg.bc_lr, weight_decay=1e-6)

    def update(i, rng):
        cosine_lr(optimizer, cfg.bc_lr, i, cfg.bc_updates)
        index = torch.randint(0, len(feature), (cfg.bc_batch,), device=cfg.device)
        loss = actor.bc_loss(feature[index], chunks[frame[index]])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        ema_update(actor.base, actor.net, cfg.bc_ema, i)
        return dict(loss=loss)

    partial = train(cfg, "bc", cfg.bc_updates, dict(actor=actor, optimizer=optimizer), update, every=50)
    actor.net.load_state_dict(actor.base.state_dict())      # the moving average is what acts and where fine-tuning starts: there net learns on, base stays frozen
    save(output(cfg, "bc"), dict(origin(cfg, "bc"), actor=actor.state_dict()))
    partial.unlink(missing_ok=True)

def stage_reward(cfg):
    """Train the success classifier on pairs from the demonstrations, and from play as reward_labels says."""
    wm, demos = load_world_model(cfg), load(cfg, "demos")
    recording = Recording(cfg, demos, wm)
    play = Recording(cfg, load(cfg, "play"))                # little of it is looked at: no codes in advance
    length = play.ds.judging_length(73)                     # frames: an evaluation's 72 control steps, as in stage_wm
    rng = seed_everything(cfg.seed, "reward", cfg.task, "init")
    feature, first, frame, start = demonstration_views(cfg, wm, recording)
    label = torch.from_numpy(recording.success(cfg.task, start, frame)).to(cfg.device)
    if not label.any():
        raise InputError(f"no demonstration of {cfg.task} fulfils the task's rule, so nothing shows what success is: "
                         f"are the segments and scene_obs of {output(cfg, 'demos')} right?")
    # The kinds of a pair: 1 a success and 0 not one, by label; 2 unlabelled play, taken for 0, and 3 taken for 1 since a round.  The class is kind % 2
    groups = [(first[label], feature[label], 1), (first[~label], feature[~label], 0)]
    if cfg.reward_labels != "demos":
        seen, dreamed, frames = views(wm, play, rng.choice(window_starts(play.ds.split()[0], length), min(1500, 50 * cfg.demo_count)), length)
        pick = rng.integers(1, frames.shape[1], (len(frames), 12))                                    # 12 moments a window
        rows = np.arange(len(frames))[:, None]
        for f in (seen, dreamed):
            # Where a rule can label any pair, compare with any window's start: a lamp is off wherever the arm is, not only beside the lever.  Else with its own
            start = rng.integers(0, len(frames), pick.shape) if cfg.reward_labels == "predicate" else rows.repeat(12, 1)   # [W, 12] windows
            then, now = f[torch.from_numpy(start), 0].flatten(0, 1), f[torch.from_numpy(rows), torch.from_numpy(pick)].flatten(0, 1)   # [W * 12, F]
            if cfg.reward_labels == "predicate":
                happened = torch.from_numpy(play.success(cfg.task, frames[start, 0], frames[rows, pick]).ravel()).to(cfg.device)
                groups += [(then[happened], now[happened], 1), (then[~happened], now[~happened], 0)]
            else:
                groups.append((then, now, 2))               # unlabelled
    first, feature = torch.cat([g[0] for g in groups]), torch.cat([g[1] for g in groups])
    model, sides = Classifier(cfg, wm.feature_size).to(cfg.device), nn.Module()
    sides.register_buffer("kind", torch.cat([torch.full((len(g[0]),), g[2], device=cfg.device) for g in groups]))
    rounds = [cfg.reward_updates * (k + 1) // (cfg.reward_rounds + 1) for k in range(cfg.reward_rounds)]
    optimizer = torch.optim.Adam(model.parameters(), lr=cfg.reward_lr)

    def update(i, rng):
        if i in rounds:
            with torch.no_grad():
                done = after_success(model, seen, dreamed).gather(1, torch.from_numpy(pick).to(cfg.device))   # [W, 12]
            # play is the last of the groups: all moments as watched, then the same moments as dreamed
            sides.kind[-2 * done.numel():] = torch.where(done, 3, 2).flatten().repeat(2)
        pools = (torch.nonzero(sides.kind == k)[:, 0] for k in range(4))
        index = torch.cat([p[torch.randint(0, len(p), (128,), device=cfg.device)] for p in pools if len(p)])
        k = sides.kind[index]
        weight = torch.where(k >= 2, cfg.reward_play, 1.0)
        loss, metrics = classifier_loss(model, first[index], feature[index], k % 2, weight, cfg)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return metrics

    partial = train(cfg, "reward", cfg.reward_updates, dict(model=model, optimizer=optimizer, sides=sides), update, every=50)
    def verdict(feature):                                   # [W, T, F]: does it fire in any two steps running?  dream_chunk looks at a chunk's last two
        with torch.no_grad():
            return lasting(model, feature).any(1).cpu().numpy()
    judges = load_judges(cfg)
    judges = judges and Recording(cfg, judges, wm)
    judged = report.trust(cfg.task, verdict, play, judges, lambda *windows: views(wm, *windows), length, seed_everything(cfg.seed, "judge"))
    save(output(cfg, "reward"), dict(origin(cfg, "reward"), model=model.state_dict(), trust=judged))
    partial.unlink(missing_ok=True)

def stage_finetune(cfg):
    """DiWA: PPO in the dream.  Reads recordings and checkpoints, steps no simulator."""
    seed_everything(cfg.seed, "finetune", cfg.task, "init")
    agent = load_agent(cfg, "bc")
    env = DreamEnv(cfg, agent.wm, agent.classifier, *dream_starts(cfg, agent.wm), cfg.ft_dreams, cfg.ft_horizon)
    finetune(cfg, env, agent.actor.train())

@torch.no_grad()
def dream_starts(cfg, wm):
    """Recorded frames to dream from: the first part of each demonstration, and the play frames that look most like one.

    The policy was cloned on those very demonstrations and hardly fails there; play shows the same situations anew, and also what demonstrations
    never show: an arm that has just missed.  A dream glosses over a miss, but not when it starts after one.  Likeness is a ridge
    regression on embeddings, demonstration against play: no label, no scene state.  -> embedding [M, E], command [M, 7], target [M, 6]"""
    demos, play = Recording(cfg, load(cfg, "demos")), Recording(cfg, load(cfg, "play"))
    begin = np.concatenate([np.arange(a, a + 1 + int(cfg.ft_starts * (b - a))) for _, a, b in demos.ds.segments])
    def rows(recording, frames):                            # [n, E], [n, 7], [n, 6]
        batches = (recording.batch(part[:, None]) for part in np.array_split(frames, len(frames) // 2000 + 1))
        embedding, command = zip(*[(wm.embed(b)[:, 0], b["command"][:, 0, -7:]) for b in batches])
        return torch.cat(embedding), torch.cat(command), recording.target[torch.from_numpy(frames)].to(cfg.device)
    near = rows(demos, begin)
    if not cfg.ft_play:
        return near
    every = rows(play, np.arange(0, len(play.ds), cfg.wm_stride))          # neighbours look alike
    x = F.pad(torch.cat([near[0], every[0]]), (0, 1), value=1.0).double()
    y = torch.arange(len(x), device=x.device) < len(begin)
    weight = torch.where(y, len(every[0]) / len(begin), 1.0).double()[:, None]                        # both sides count the same
    ridge = 1e-3 * len(x) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    likeness = x @ torch.linalg.solve((x * weight).T @ x + ridge, (x * weight).T @ y.double())
    best = likeness[len(begin):].topk(max(1, int(cfg.ft_play * len(every[0])))).indices
    return [torch.cat([a, b[best]]) for a, b in zip(near, every)]

def finetune(cfg, env, actor):
    """The same PPO for a DreamEnv (DiWA) and a SimEnv (DPPO, see support/evaluate.py)."""
    critic = mlp([env.wm.feature_size, 256, 256, 256, 1], nn.Mish, norm=False).to(cfg.device)
    scaler = RewardScaler().to(cfg.device)
    optimizers = dict(actor=torch.optim.AdamW(actor.net.parameters(), lr=cfg.ft_actor_lr), critic=torch.optim.AdamW(critic.parameters(), lr=cfg.ft_critic_lr))
    snapshots = Snapshots()

    def update(i, rng):
        metrics = ppo_iteration(cfg, env, actor, critic, scaler, optimizers, i >= cfg.ft_warmup)
        if (i + 1) % cfg.ft_snapshot == 0 or i + 1 == cfg.ft_iterations:
            snapshots[str(i + 1)] = {k: v.clone() for k, v in actor.net.state_dict().items()}
        return metrics

    partial = train(cfg, "finetune", cfg.ft_iterations, dict(actor=actor, critic=critic, scaler=scaler, snapshots=snapshots,
                    actor_optimizer=optimizers["actor"], critic_optimizer=optimizers["critic"]), update, every=1)
    save(output(cfg, "finetune"), dict(origin(cfg, "finetune"), actor=actor.state_dict(), snapshots=dict(snapshots)))
    partial.unlink(missing_ok=True)

def load_agent(cfg, policy):
    """The agent with a policy: "bc", "tuned" or the iteration of a snapshot."""
    wm = load_world_model(cfg)
    actor, classifier = build_actor(cfg, wm.feature_size), Classifier(cfg, wm.feature_size).to(cfg.device)
    classifier.load_state_dict(load(cfg, "reward")["model"])
    if policy == "bc":
        actor.load_state_dict(load(cfg, "bc")["actor"])
    else:
        tuned = load(cfg, "finetune")
        actor.load_state_dict(tuned["actor"])
        if policy != "tuned":
            actor.net.load_state_dict(tuned["snapshots"][policy])
    return Agent(cfg, wm, actor.eval(), classifier.eval())

def stage_eval(cfg):
    """Before and after from the same start states: only here does the tuned policy meet a simulator."""
    evaluate.before_and_after(cfg, load_agent)

def stage_report(cfg):
    """Tables and pictures from what the other stages left behind."""
    evaluate.write_report(cfg, load_agent, views)


# ======================================================================================================================
# 9  Command line
# ======================================================================================================================

STAGE_WORK = dict(play=stage_play, demos=stage_demos, wm=stage_wm, bc=stage_bc, reward=stage_reward, finetune=stage_finetune,
                  eval=stage_eval, report=stage_report)

def main(argv=None):
    """Run a command line -> the exit code: 0, 2 when something given cannot be used, 130 when interrupted."""
    return command_line(argv, Config, PRESETS, STAGE_WORK, __doc__.split("\n\n")[0])

if __name__ == "__main__":
    sys.exit(main())
