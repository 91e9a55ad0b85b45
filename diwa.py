"""DiWA in one file: a diffusion policy that improves by practising inside a learned world model.

    python diwa.py --stage all                     everything, 17-20 minutes on two CPUs: runs/cpu/report.md
    python diwa.py --stage all --preset smoke      the same loop in a minute, to see that it installs
    python diwa.py --stage all --task turn_on_led  another of the eight tasks; play and world model stay
    python diwa.py --help                          every setting, its default and the paper's value

Read it top to bottom; each section is one idea.  What no paper mentions is in support/.
    1 Config          every setting, once                      5 Dream     a world model is an environment
    2 World model     pixels + actions -> imagined futures     6 PPO       credit for every denoising step
    3 Actor           a policy that denoises action chunks     7 Agent     what a robot would run
    4 Reward          a classifier that recognises success     8 Stages    the pipeline, one function each

Symbols
    B batch (dreams)    T time steps    H chunk length    A = 7 numbers of an action
    S side of an image    K denoising steps, K' of them fine-tuned    N any number of rows
    W windows of a recording, P moments out of all of them, M frames to start from
    h deterministic and z stochastic latent (z is drawn, the rest follows)    E size of an embedding
    D size of the feature [h, z, c], 256 + 48 + 7 on the tabletop    target: the pose that the arm has been
    told to reach, in m and rad    command c: the same in a network's units, and the last gripper command
    action, 30 a second: dx dy dz (20 mm a unit), droll dpitch dyaw (.05 rad), gripper (-1 close, +1 open)

Where this file departs from the papers, on purpose: dreams start amid attempts, too; practice is short, at
ten times the learning rate, and ends before PPO exploits the model's errors; what acts is a moving average of
its weights (tabletop); rewards are not scaled; a step of the model spans two control steps, its transition is
told the commanded pose, its features tell pose and scene; inputs are noisy; dreams misplace the arm by
millimetres; a reward needs two verdicts in a row; linear codes; Gaussian latents (tabletop); the prior also
learns open loop, as a dream uses it; the classifier compares with the first feature, as CALVIN's rules do.
Sources: DiWA arXiv 2508.03645; DPPO 2409.00588; DreamerV2 2010.02193; PPO 1707.06347; LUMOS 2503.10370.
"""
import copy
import math
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from calvin_sim import advance_target, success as task_rule
from data import (STATE_SCALE, Recording, action_chunks, decode_pose, encode_command, encode_proprio,
                  window_starts)
from support import evaluate, online, parallel, report
from support.files import InputError
from support.linear import LinearCodec, likeness
from support.presets import PRESETS
from support.record import stage_demos, stage_play
from support.runs import (RunSettings, Snapshots, Updates, cast_once, check_config, command_line, cosine_lr,
                          fill, half_precision, heldout_recording, load, output, parse, policy_weights,
                          restore, save_result, seed_everything)

ACTION = 7                          # numbers of an action, and of a command
POSE = 6                            # position and Euler angles of the tool
PROPRIO = 15                        # CALVIN's robot_obs: pose, gripper width, joints, last gripper command
FIXTURES = 6                        # what moves or shines: slider, drawer, button, switch, bulb, LED
TIME = 16                           # size of a denoising step's embedding

# 1  Config ==================================================================================================
#    Every setting; turn the first eight first.  A field's prefix names its stage, which is done again when a
#    field of it, or of a stage it reads from, changes.  A preset changes several at once: support/presets.py.

@dataclass
class Config(RunSettings):          # which adds the bookkeeping: --run, --preset, --sim, --data ...
    # eight worth turning first
    task: str = "move_slider_right" # one of CALVIN's eight tasks, see the end of --help; or all
    seed: int = 0                   # every random number of the run follows from it
    play_frames: int = 180_000      # recorded frames of play (paper: 500,000)
    demo_count: int = 50            # demonstrations of the task (paper: 50)
    wm_updates: int = 2000          # gradient steps of the world model (paper: up to 2 M)
    reward_labels: str = "unlabelled"  # play fails; demos: no play (paper); predicate, strict, state: README
    ft_iterations: int = 36         # rollout + update (paper: about 770, at a tenth of the learning rate)
    ft_bc: float = 0.05             # alpha_BC, the leash to the cloned policy (paper: .05; ten demos: .01)
    # play: task-agnostic interaction, the world model's only food
    play_episode: int = 250         # frames of one episode
    play_tasks: str = "all"         # what play tries, comma-separated (preset class: one fixture's two)
    play_replay: int = 20           # held-out demonstrations of each task, which only judge
    # wm: the world model, section 2
    wm_stride: int = 2              # control steps that one step of the model spans (paper: 1)
    wm_encoder: str = "linear"      # conv (paper), or linear: principal components of the frames
    wm_codes: int = 256             # linear encoder: components of the static camera, half for the gripper's
    wm_depth: int = 48              # conv encoder: channels of the first layer (paper: 48)
    wm_latent: str = "gaussian"     # gaussian, or categorical: --wm_z 32 (paper), or 16 and --wm_classes 16
    wm_z: int = 48                  # latents: Gaussian dimensions or categorical variables (paper: 32)
    wm_classes: int = 32            # classes of a categorical latent (paper: 32)
    wm_h: int = 256                 # size of the deterministic state (paper: 1024)
    wm_hidden: int = 256            # width of the prior's and posterior's hidden layer (paper: 1000)
    wm_embed: int = 256             # width of an embedding's image part; proprioception adds 15
    wm_octaves: int = 3             # sines of the commanded position, finest wavelength 4 cm (paper: 0)
    wm_batch: int = 128             # sequences per batch (paper: 50)
    wm_length: int = 20             # steps per sequence, wm_stride frames apart (paper: 50)
    wm_lr: float = 3e-3             # AdamW's learning rate (paper: 3e-4)
    wm_lr_end: float = 0.1          # its end, as a share of it, along a cosine (paper: 1, constant)
    wm_bf16: int = 1                # bfloat16 where a device has it: learning, dreams (CUDA: convolutions)
    wm_decay: float = 0.05          # weight decay (paper: 0.05)
    wm_clip: float = 100.0          # global gradient norm (paper: 100)
    wm_kl: float = 0.3              # weight of the KL term (paper: 0.3; 16 x 16 categoricals: .1)
    wm_balance: float = 0.8         # share of the KL that trains the prior (paper: 0.8)
    wm_free: float = 0.0            # free nats per step, DreamerV3 (paper: 0)
    wm_unimix: float = 0.01         # uniform share mixed into categoricals, DreamerV3 (paper: 0)
    wm_noise: float = 0.05          # noise std on whitened codes and commands, 3 x on actions (paper: 0)
    wm_open: float = 1.0            # weight of the open-loop prediction loss (paper: 0)
    wm_context: int = 5             # open loop starts after 1..wm_context watched steps
    wm_gripper: float = 0.25        # weight of the gripper camera, which has 3/4 of the variance (paper: 1)
    wm_proprio: float = 100.0       # weight of the proprioception loss (0: no such head; paper: 0)
    wm_state: float = 100.0         # weight of telling the scene's state, paper's hybrid (0: no such head)
    wm_inverse: float = 0.0         # weight of guessing the action between two embeddings (WAM; paper: 0)
    wm_heads: int = 0               # more priors, for ft_doubt: no dream follows them
    wm_decode: float = 0.25         # share of the frames that are decoded for the loss (paper: 1)
    # bc: the diffusion policy, section 3
    bc_actor: str = "diffusion"     # diffusion or gaussian
    bc_net: str = "mlp"             # denoiser: mlp or unet
    bc_hidden: int = 256            # width of the mlp (paper: 512)
    bc_chunk: int = 4               # H, actions predicted at once, executed in turn (paper: 4)
    bc_steps: int = 20              # K, denoising steps (paper: 20)
    bc_updates: int = 4000          # gradient steps (paper: 5000 epochs)
    bc_batch: int = 256             # chunks per batch (paper: 256)
    bc_lr: float = 5e-4             # AdamW, warm-up, cosine to a tenth (paper: 1e-4)
    bc_ema: float = 0.995           # moving average of the weights, which is what acts (paper: 0.995)
    # reward: the success classifier, section 4
    reward_hidden: int = 256        # width (paper: 512)
    reward_updates: int = 1500      # gradient steps
    reward_lr: float = 3e-4         # Adam (paper: 1e-6)
    reward_tau: float = 0.5         # NT-Xent temperature (paper: 0.5)
    reward_ce: float = 0.5          # weight of the cross-entropy beside NT-Xent (paper: 0.5)
    reward_play: float = 0.5        # weight of play's unlabelled (strict: solved) pairs in cross-entropy
    # ft: PPO in the dream, sections 5 and 6
    ft_dreams: int = 128            # parallel dreams (paper: 50)
    ft_chunks: int = 18             # chunks per dream and iteration, ft_horizon or more (paper: 36)
    ft_horizon: int = 18            # chunks until a dream is cut (paper: 18 = 72 steps)
    ft_starts: float = 0.75         # dreams start in this first part of a demonstration (0: first frame)
    ft_play: float = 0.06           # and in this share of play, most like one: by default two dreams of three
    ft_shift: float = 0.006         # each dream misplaces the arm: std (m) in each of x, y, z (paper: 0)
    ft_twice: int = 0               # 1: success must show in a second draw of the dream's latents, too
    ft_doubt: float = 0.0           # what a std of 1 among the wm_heads takes from each chunk's reward
    ft_steps: int = 10              # K', the last denoising steps, which are fine-tuned (paper: 10)
    ft_epochs: int = 5              # passes over each rollout (paper: 10)
    ft_minibatches: int = 5         # per pass (paper: 1)
    ft_actor_lr: float = 1e-4       # AdamW, torch's decay of .01 (paper: 1e-5)
    ft_critic_lr: float = 1e-3      # the same (paper: 1e-3)
    ft_warmup: int = 2              # iterations that train the critic only
    ft_gamma: float = 0.98          # discount per chunk: haste pays, for there is a time limit (paper: .999)
    ft_lambda: float = 0.95         # GAE (paper: .95)
    ft_gamma_denoise: float = 0.99  # discount per denoising step (paper: .99)
    ft_clip: float = 0.03           # clip range at the last denoising step (paper: .01)
    ft_clip_first: float = 0.003    # clip range at the noisiest fine-tuned step (paper: .001)
    ft_std: float = 0.1             # floor of the sampling std and of the log-prob std (paper: .1)
    ft_value: float = 0.5           # weight of the value loss, a mean square (paper: .5, another half inside)
    ft_ema: float = 0.9             # moving average of the weights over iterations, which acts (paper: 0)
    ft_snapshot: int = 9            # keep the weights every so many iterations, for the learning curve
    online_steps: int = 500_000     # simulator steps after which the rival of --stage online gives up
    # eval
    eval_episodes: int = 100        # paired start states, before and after (paper: 29-48)
    eval_curve: int = 40            # start states, others, for the learning curve
    eval_official: int = 100        # start states of CALVIN's own protocol, a second column (--sim calvin)
    eval_steps: int = 72            # time limit (paper: 72)

# 2  World model =============================================================================================
#    A recurrent state-space model (DreamerV2, eq. 1): it watches both cameras and the robot's own pose, keeps
#    a deterministic memory h and a stochastic guess z, and learns to foresee z without seeing the frame.
#
#        h_t  = GRU(h_{t-1}, [z_{t-1}, a_{t-1}, c_t])  what has happened
#        z^_t ~ prior(h_t)                             what the frame should look like    <- dreams use this
#        z_t  ~ posterior(h_t, embedding of frame t)   what it does look like             <- robots use this
#        frame_t ~ decoder(h_t, z_t, c_t)              and robot_obs [15] ~ pose_head(h_t, z_t, c_t)
#
#    The command c_t is the pose that the arm has been told to reach once a_{t-1} was added to it: the action
#    says how it moves, the command where to.  A step of the model is wm_stride control steps, with all their
#    actions and commands (feature and decoder take the last command).  Alignment: step t consumes what was
#    executed BEFORE frame t.  Training sequences start from the zero state, as dreams and robots do.

def descend(loss, *optimizers, clip=None):
    """One gradient step of each optimizer -> the gradient's norm, where it is clipped (the first's only)."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(optimizers[0].param_groups[0]["params"], clip) if clip else None
    for optimizer in optimizers:
        optimizer.step()
    return norm

def mlp(sizes, activation=nn.ELU, norm=True):
    """Linear (LayerNorm) activation ... Linear; LUMOS normalises the pre-activations with eps 1e-3."""
    layers = []
    for a, b in zip(sizes[:-2], sizes[1:-1]):
        layers += [nn.Linear(a, b)] + ([nn.LayerNorm(b, eps=1e-3)] if norm else []) + [activation()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))

class NormGRU(nn.Module):
    """A GRU cell with LayerNorm on its gates and an update bias of -1: at first it remembers (DreamerV2)."""
    def __init__(self, inputs, size):
        super().__init__()
        self.linear = nn.Linear(inputs + size, 3 * size, bias=False)
        self.norm = nn.LayerNorm(3 * size, eps=1e-3)

    def forward(self, x, h):
        reset, candidate, update = self.norm(self.linear(torch.cat([x, h], -1))).chunk(3, -1)
        update = torch.sigmoid(update - 1)
        return update * torch.tanh(torch.sigmoid(reset) * candidate) + (1 - update) * h

class ConvEncoder(nn.Module):
    """One convolutional network a camera, 64 -> 31 -> 14 -> 6 -> 2 pixels (DreamerV2).  By default
    LinearCodec stands in its place: principal components, support/linear.py."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, d = cfg, cfg.wm_depth
        def camera():
            layers = []
            for a, b in ((3, d), (d, 2 * d), (2 * d, 4 * d), (4 * d, 8 * d)):
                layers += [nn.Conv2d(a, b, 4, 2), nn.ELU(inplace=True)]     # in place: large maps
            return nn.Sequential(*layers, nn.Flatten())
        self.static, self.gripper = camera(), camera()
        self.size = 2 * 8 * d * 4
        self.to(memory_format=torch.channels_last)

    def forward(self, static, gripper):
        """u8 [..., 64, 64, 3] twice -> [..., size]"""
        parts = []
        for net, x in ((self.static, static), (self.gripper, gripper)):
            x = x.flatten(0, -4).permute(0, 3, 1, 2)                                      # [N, 3, 64, 64]
            x = (x.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
            with half_precision(self.cfg, "cuda"):
                parts.append(net(x).float())                                              # [N, 8 d * 2 * 2]
        return torch.cat(parts, -1).unflatten(0, static.shape[:-3])

class ConvDecoder(nn.Module):
    """Feature -> both mean images; transposed convolutions with kernels 5 (of one pixel: Linear), 5, 6, 6."""
    def __init__(self, cfg, inputs):
        super().__init__()
        self.cfg, d = cfg, cfg.wm_depth
        def camera():
            return nn.Sequential(
                nn.Linear(inputs, 32 * d), nn.Linear(32 * d, 4 * d * 25),
                nn.ELU(inplace=True), nn.Unflatten(-1, (4 * d, 5, 5)),
                nn.ConvTranspose2d(4 * d, 2 * d, 5, 2), nn.ELU(inplace=True),
                nn.ConvTranspose2d(2 * d, d, 6, 2), nn.ELU(inplace=True),
                nn.ConvTranspose2d(d, 3, 6, 2))
        self.static, self.gripper = camera(), camera()
        self.to(memory_format=torch.channels_last)

    def forward(self, feature):
        """[..., D] -> [static, gripper], each [..., 64, 64, 3] in -1..1"""
        flat = feature.flatten(0, -2)
        with half_precision(self.cfg, "cuda"):
            images = [net(flat).float() for net in (self.static, self.gripper)]      # [N, 3, 64, 64] each
        return [image.permute(0, 2, 3, 1).unflatten(0, feature.shape[:-1]) for image in images]

# --- the stochastic latent: categorical (the paper) or Gaussian; stats: its parameters [..., stats_size] --

def latent_size(cfg):
    return cfg.wm_z * cfg.wm_classes if cfg.wm_latent == "categorical" else cfg.wm_z

def stats_size(cfg):
    return cfg.wm_z * cfg.wm_classes if cfg.wm_latent == "categorical" else 2 * cfg.wm_z

def probs(stats, cfg):
    """Logits [..., Z * C] -> probabilities [..., Z, C], a little uniform mixed in (DreamerV3)."""
    p = stats.float().unflatten(-1, (-1, cfg.wm_classes)).softmax(-1)
    return (1 - cfg.wm_unimix) * p + cfg.wm_unimix / cfg.wm_classes

def log_probs(stats, cfg):
    if cfg.wm_unimix:
        return probs(stats, cfg).log()
    return stats.float().unflatten(-1, (-1, cfg.wm_classes)).log_softmax(-1)              # [..., Z, C]

def mean_std(stats):
    """Gaussian head [..., 2 Z] -> mean, std [..., Z]."""
    mean, raw = stats.float().chunk(2, -1)
    return mean, F.softplus(raw) + 0.1

def sample_latent(stats, cfg):
    """stats -> z [..., latent size], differentiable: reparametrised, or straight-through, z + p - stop(p)."""
    if cfg.wm_latent == "gaussian":
        mean, std = mean_std(stats)
        return mean + std * torch.randn_like(std)
    p = probs(stats, cfg)                                               # [..., Z latents, C classes]
    below = p.detach().cumsum(-1) <= torch.rand_like(p[..., :1])        # inverse CDF: one number a latent
    drawn = below.sum(-1, keepdim=True).clamp(max=cfg.wm_classes - 1)   # sums of floats may end below 1
    one_hot = torch.zeros_like(p).scatter_(-1, drawn, 1.0)              # drawn: [..., Z, 1]
    return (one_hot + p - p.detach()).flatten(-2)

def kl_divergence(p, q, cfg):
    """KL(p || q) summed over the latents: [...]"""
    if cfg.wm_latent == "gaussian":
        (m1, s1), (m2, s2) = mean_std(p), mean_std(q)
        return (torch.log(s2 / s1) + (s1 ** 2 + (m1 - m2) ** 2) / (2 * s2 ** 2) - 0.5).sum(-1)
    a, b = log_probs(p, cfg), log_probs(q, cfg)
    return (a.exp() * (a - b)).sum((-1, -2))

def balanced_kl(post, prior, cfg):
    """DreamerV2, algorithm 2: the prior moves towards the posterior faster than the other way round."""
    trains_prior = kl_divergence(post.detach(), prior, cfg).clamp(min=cfg.wm_free)
    trains_post = kl_divergence(post, prior.detach(), cfg).clamp(min=cfg.wm_free)
    return cfg.wm_balance * trains_prior + (1 - cfg.wm_balance) * trains_post

class WorldModel(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        z = latent_size(cfg)
        e = cfg.wm_embed
        self.feature_size = cfg.wm_h + z + ACTION
        self.codec = LinearCodec(cfg) if cfg.wm_encoder == "linear" else None
        self.conv = ConvEncoder(cfg) if cfg.wm_encoder == "conv" else None
        seen = self.codec.size if self.codec else self.conv.size
        hidden = [2 * e] if self.codec else []              # the convolutions are deep enough
        self.fuse = mlp([seen] + hidden + [e, e])           # the image part of an embedding
        self.embed_size = e + PROPRIO
        self.from_z = nn.Linear(z, cfg.wm_hidden)           # with from_action one layer, in two parts
        waves = 2 * 3 * cfg.wm_octaves                      # sine and cosine of x, y, z
        self.from_action = nn.Linear(cfg.wm_stride * (2 * ACTION + waves), cfg.wm_hidden, bias=False)
        self.norm = nn.Sequential(nn.LayerNorm(cfg.wm_hidden, eps=1e-3), nn.ELU())
        self.gru = NormGRU(cfg.wm_hidden, cfg.wm_h)
        self.prior = mlp([cfg.wm_h, cfg.wm_hidden, stats_size(cfg)])
        self.post_h = nn.Linear(cfg.wm_h, cfg.wm_hidden)
        self.post_e = nn.Linear(self.embed_size, cfg.wm_hidden, bias=False)
        self.post_out = nn.Sequential(nn.LayerNorm(cfg.wm_hidden, eps=1e-3), nn.ELU(),
                                      nn.Linear(cfg.wm_hidden, stats_size(cfg)))
        if self.conv:
            self.decoder = ConvDecoder(cfg, self.feature_size)
        else:
            self.decoder = mlp([self.feature_size, 2 * e, 2 * e, self.codec.size])
        self.pose_head = mlp([self.feature_size, e, PROPRIO]) if cfg.wm_proprio else None
        self.state_head = mlp([self.feature_size, e, FIXTURES]) if cfg.wm_state else None
        self.inverse_head = mlp([2 * e, e, cfg.wm_stride * ACTION]) if cfg.wm_inverse else None
        self.more_priors = nn.ModuleList(mlp([cfg.wm_h, cfg.wm_hidden, stats_size(cfg)])
                                         for _ in range(cfg.wm_heads))
        # Set by the recording's source: an action adds to the old target (1), or to where the arm is (0)
        self.register_buffer("keeps_target", torch.ones(()))

    def embed(self, obs):
        """obs: proprio [..., 15], and codes [..., k] or both frames u8 [..., S, S, 3] -> [..., E]"""
        if self.codec:
            seen = self.add_noise(self.codec.whiten(self.codec.codes_of(obs)))
        else:
            seen = self.conv(obs["rgb_static"], obs["rgb_gripper"])
        return torch.cat([self.fuse(seen), obs["proprio"]], -1)

    def add_noise(self, x, scale=1):
        """Noise while learning, or the model overfits: it passes over the same play again and again."""
        if not (self.training and self.cfg.wm_noise):
            return x
        return x + scale * self.cfg.wm_noise * torch.randn_like(x)

    def initial(self, batch, device):
        """The zero state -> h [B, h], z [B, z]"""
        h = torch.zeros(batch, self.cfg.wm_h, device=device)
        return h, torch.zeros(batch, latent_size(self.cfg), device=device)

    def step(self, h, z, action, command):
        """The memory [B, h] after actions [B, stride * 7], and the commands [B, stride * 7] they led to."""
        return self.transition(h, z, self.moved(action, command))

    def moved(self, action, command):
        """What the arm was told [..., wm_hidden]; contact is sharp in position, so sines help (NeRF)."""
        position = command.unflatten(-1, (-1, ACTION))[..., :3].flatten(-2)         # [..., stride * 3]
        inputs = [action, command]
        for k in range(self.cfg.wm_octaves):
            angle = position * 2 ** (k + 2)
            inputs += [angle.sin(), angle.cos()]
        return self.from_action(torch.cat(inputs, -1))

    def transition(self, h, z, moved):
        return self.gru(self.norm(self.from_z(z) + moved), h)                             # [B, h]

    def posterior(self, h, embedding):
        return self.post_out(self.post_h(h) + self.post_e(embedding))

    def rollout(self, embedding, action, command, context=None):
        """Watch a sequence and, beside it, dream it.
        embedding [B, T, E]; action, command [B, T, stride * 7] (what led to the frame); context [B]: steps
        that the dreaming stream may watch before it uses the prior alone, or None for no such stream.
        -> posterior features, (posteriors, priors) [B, T, stats_size], dreamed features [B, T, D] or None"""
        streams = 1 if context is None else 2
        h, z = self.initial(streams * len(action), action.device)
        moved = self.moved(self.add_noise(action, 3), self.add_noise(command)).repeat(streams, 1, 1)
        from_e = self.post_e(embedding)                     # what needs no recurrence, for all T at once
        steps = []
        # unbind, for the gradient of each [:, t] would be a zero tensor for all T, to be added up; so chunk
        for t, (moved_t, from_e_t) in enumerate(zip(moved.unbind(1), from_e.unbind(1))):
            h = self.transition(h, z, moved_t)
            parts = h.chunk(streams)                                    # watched[, dreamed]: [B, h] each
            post = self.post_out(self.post_h(parts[0]) + from_e_t)
            z = sample_latent(post, self.cfg)
            if streams == 2:
                watching = (t < context)[:, None]                                         # [B, 1]
                dreamed = sample_latent(self.prior(parts[1]), self.cfg)
                z = torch.cat([z, torch.where(watching, z, dreamed)])       # so h is the same until then
            steps.append((h, z, post))
        hs, zs, posts = (torch.stack(x, 1) for x in zip(*steps))
        feature = torch.cat([hs, zs, command[..., -ACTION:].repeat(streams, 1, 1)], -1)  # [streams * B, T, D]
        parts = feature.chunk(streams)                                    # watched[, dreamed]: [B, T, D] each
        return parts[0], (posts, self.prior(hs.chunk(streams)[0])), parts[1] if streams == 2 else None

    def proprio(self, feature):
        """What the model believes of the robot's state [..., 15], if wm_proprio; its pose lags behind c."""
        command = feature[..., -ACTION:]
        return self.pose_head(feature) + F.pad(command[..., :POSE], (0, PROPRIO - POSE))

    def tcp(self, feature):
        """The pose [..., 6] (m, rad) of the tool centre point (TCP) that the model believes in."""
        return decode_pose(self.proprio(feature)[..., :POSE])

    def image_error(self, feature, batch):
        """Half the squared error summed over pixels (-1..1): minus a Gaussian log-likelihood.  [B, T]"""
        if self.codec:
            parts = (self.decoder(feature) - batch["codes"]).square().split(self.codec.sizes, -1)
            static, gripper = [part.sum(-1) for part in parts]
        else:
            images = zip(self.decoder(feature), ("rgb_static", "rgb_gripper"))
            static, gripper = [(image - (batch[key].float() / 127.5 - 1)).square().sum((-1, -2, -3))
                               for image, key in images]
        return 0.5 * (static + self.cfg.wm_gripper * gripper)

    def images(self, feature):
        """Decoded frames, u8 [..., S, S, 3] of both cameras."""
        images = self.codec.decode(self.decoder(feature)) if self.codec else self.decoder(feature)
        return [((i + 1) * 127.5).clamp(0, 255).to(torch.uint8) for i in images]

    @torch.no_grad()
    def watch_and_dream(self, recording, starts, length, last=None):
        """Windows as the posterior sees them and as the prior dreams them from their first frame alone.
        starts [W]; length in frames, of which every wm_stride-th is looked at; last [W]: each window's last
        frame, which repeats from then on.  -> posterior, dreamed [W, T, D], frame numbers [W, T]"""
        stride = self.cfg.wm_stride
        frames = starts[:, None] + np.arange(0, length, stride)
        if last is not None:
            frames = np.minimum(frames, (last - (last - starts) % stride)[:, None])
        watched, dreamed = [], []
        for block in np.array_split(frames, max(1, len(frames) // 128)):
            batch = recording.batch(block)
            context = torch.ones(len(block), device=self.cfg.device)
            feature, _, dream = self.rollout(self.embed(batch), batch["action"], batch["command"], context)
            rows = np.arange(len(block))[:, None]
            times = (block - block[:, :1]) // stride        # past the end: the last step's feature again
            watched.append(feature[rows, times])
            dreamed.append(dream[rows, times])
        return torch.cat(watched), torch.cat(dreamed), frames

def world_model_loss(wm, batch, cfg):
    """DreamerV2's loss without reward and discount heads, but with pose (and state), watched and dreamed."""
    (B, T), device = batch["action"].shape[:2], batch["action"].device
    context = None
    if cfg.wm_open:
        context = torch.randint(1, min(cfg.wm_context, T - 1) + 1, (B,), device=device)
    embedding = wm.embed(batch)
    feature, (post, prior), dreamed = wm.rollout(embedding, batch["action"], batch["command"], context)
    times = torch.randperm(T, device=device)[:max(1, round(T * cfg.wm_decode))]           # decode only some
    truth = {k: v[:, times] for k, v in batch.items() if k in ("codes", "rgb_static", "rgb_gripper")}
    metrics = dict(kl=balanced_kl(post, prior, cfg).mean())
    def reconstruction(f, mask, prefix=""):
        """What features f tell of each frame, against the truth: mean over the frames of the mask [B, T]"""
        parts = [("image", 1.0, wm.image_error(f[:, times], truth), mask[:, times])]
        if cfg.wm_proprio:
            parts += [("pose", cfg.wm_proprio, (wm.proprio(f) - batch["proprio"]).square().sum(-1) / 2, mask)]
        if cfg.wm_state:
            parts += [("state", cfg.wm_state, (wm.state_head(f) - batch["state"]).square().sum(-1) / 2, mask)]
        for name, _, error, counts in parts:
            metrics[prefix + name] = (error * counts).sum() / counts.sum().clamp(min=1)
        return sum(weight * metrics[prefix + name] for name, weight, *_ in parts)
    loss = reconstruction(feature, torch.ones_like(feature[..., 0])) + cfg.wm_kl * metrics["kl"]
    if cfg.wm_open:
        blind = torch.arange(T, device=device) >= context[:, None]                        # [B, T]
        loss = loss + cfg.wm_open * reconstruction(dreamed, blind, "open_")
    if cfg.wm_inverse:                                      # image parts alone: proprioception gives it away
        pixels = embedding[..., :-PROPRIO]
        guess = wm.inverse_head(torch.cat([pixels[:, :-1], pixels[:, 1:]], -1))
        metrics["inverse"] = (guess - batch["action"][:, 1:]).abs().mean()                # L1, as WAM
        loss = loss + cfg.wm_inverse * metrics["inverse"]
    for head in wm.more_priors:                             # nothing but they themselves learns from it
        guess = head(feature[..., :cfg.wm_h].detach())
        loss = loss + cfg.wm_kl * kl_divergence(post.detach(), guess, cfg).mean()
    return loss, metrics

# 3  Actor ===================================================================================================
#    A diffusion policy turns noise into a chunk of H actions in K denoising steps (DDPM, eq. 7), conditioned
#    on the world model's feature.  Cloning trains the denoiser to predict the noise that was added to a
#    demonstrated chunk.  For PPO (section 6) each of the last K' steps is a Gaussian whose log-density we can
#    write down; that is the whole trick of DPPO.  The paper counts steps k = K..1, the code t = k - 1:
#
#        paper's k     code's t      turns           into          net    std, exploring        std, acting
#        K ... K'+1    K-1 ... K'    noise           chain[0]      base   max(sigma, ft_std)    sigma
#        K' ... 2      K'-1 ... 1    chain[K'-1-t]   chain[K'-t]   net    max(sigma, ft_std)    sigma
#        1             0             chain[K'-1]     chain[K']     net    ft_std                0
#
#    The log-probability uses the exploring std, for sigma at t = 0 is 1e-10 (elsewhere .076 or more): without
#    the floor the last step would explore nothing.  base is the clone, frozen; net its copy, that PPO trains.

class TimeEmbedding(nn.Sequential):
    """A denoising step t [...], as sinusoids and through two layers -> [..., TIME]"""
    def __init__(self):
        super().__init__(nn.Linear(TIME, 2 * TIME), nn.Mish(), nn.Linear(2 * TIME, TIME))

    def forward(self, t):
        half = torch.arange(TIME // 2, device=t.device)
        angle = t.float()[..., None] * torch.exp(half * (-math.log(10000) / (TIME // 2 - 1)))
        return super().forward(torch.cat([angle.sin(), angle.cos()], -1))

class MLPDenoiser(nn.Module):
    """[chunk, time, feature] -> Linear -> one pre-activation residual block -> noise (DPPO's network)."""
    def __init__(self, cfg, feature_size):
        super().__init__()
        n = cfg.bc_hidden
        self.time = TimeEmbedding()
        self.first = nn.Linear(cfg.bc_chunk * ACTION + TIME, n)     # one layer, in two parts: x and t,
        self.from_feature = nn.Linear(feature_size, n, bias=False)      # and what is the same in all K steps
        self.l1 = nn.Linear(n, n)
        self.l2 = nn.Linear(n, n)
        self.last = nn.Linear(n, cfg.bc_chunk * ACTION)

    def see(self, feature):
        """feature [..., D] -> what all K steps share: its part of the first layer [..., n]; and l2 and last
        in one, as no nonlinearity is between: weight [H * A, n], thinner than l2's [n, n], bias [H * A]"""
        return self.from_feature(feature), self.last.weight @ self.l2.weight, self.last(self.l2.bias)

    def forward(self, x, t, seen):
        """x [..., H, A], t [...], see(feature), whose leading dimensions broadcast -> noise [..., H, A]"""
        from_feature, thin, bias = seen
        time = self.time(t).expand(*x.shape[:-2], -1)
        y = self.first(torch.cat([x.flatten(-2), time], -1)) + from_feature
        inner = F.mish(self.l1(F.mish(y)))                  # now last(y + l2(inner)), multiplied out
        return (F.linear(y, self.last.weight) + F.linear(inner, thin, bias)).view_as(x)

class FiLMBlock(nn.Module):
    """Two convolutions over the chunk, the channels between them scaled and shifted by film [N, 2 b]."""
    def __init__(self, a, b):
        super().__init__()
        def conv(i, o):
            return nn.Sequential(nn.Conv1d(i, o, 5, padding=2), nn.GroupNorm(8, o), nn.Mish())
        self.c1 = conv(a, b)
        self.c2 = conv(b, b)
        self.skip = nn.Conv1d(a, b, 1) if a != b else nn.Identity()

    def forward(self, x, film):
        scale, shift = film[..., None].chunk(2, 1)                                        # [N, b, 1] each
        return self.c2(self.c1(x) * (1 + scale) + shift) + self.skip(x)

class UNetDenoiser(nn.Module):
    """A 1-D convolutional UNet over the chunk's time axis, channels 64, 128, 256 (Diffusion Policy)."""
    def __init__(self, cfg, feature_size):
        super().__init__()
        n = (64, 128, 256)
        self.films = [2 * b for b in (*n, n[1], n[0])]    # of film = time + seen, each block's part
        self.time = nn.Sequential(TimeEmbedding(), nn.Mish(), nn.Linear(TIME, sum(self.films)))
        self.see = nn.Sequential(nn.Mish(), nn.Linear(feature_size, sum(self.films), bias=False))
        self.down = nn.ModuleList([FiLMBlock(a, b) for a, b in ((ACTION, n[0]), n[:2], n[1:])])
        self.halve = nn.ModuleList([nn.Conv1d(n[0], n[0], 3, 2, 1), nn.Conv1d(n[1], n[1], 3, 2, 1)])
        self.up = nn.ModuleList([FiLMBlock(2 * n[1], n[1]), FiLMBlock(2 * n[0], n[0])])
        self.widen = nn.ModuleList([nn.ConvTranspose1d(n[2], n[1], 4, 2, 1),
                                    nn.ConvTranspose1d(n[1], n[0], 4, 2, 1)])
        self.last = nn.Conv1d(n[0], ACTION, 1)

    def forward(self, x, t, seen):
        rows = x.shape[:-2]
        film = (self.time(t) + seen).expand(*rows, -1).flatten(0, -2).split(self.films, 1)    # [N, 2 b] each
        x = x.flatten(0, -3).transpose(1, 2)                                              # [N, A, H]
        a = self.down[0](x, film[0])                                                      # [N, 64, H]
        b = self.down[1](self.halve[0](a), film[1])                                       # [N, 128, H/2]
        x = self.down[2](self.halve[1](b), film[2])                                       # [N, 256, H/4]
        x = self.up[0](torch.cat([self.widen[0](x), b], 1), film[3])
        x = self.up[1](torch.cat([self.widen[1](x), a], 1), film[4])
        return self.last(x).transpose(1, 2).unflatten(0, rows)                            # [..., H, A]

def gaussian_logprob(x, mean, std):
    """Element-wise log-density, clamped to [-5, 2] as in DPPO, so that no outlier dominates a ratio."""
    return (-0.5 * ((x - mean) / std) ** 2 - torch.log(std) - 0.5 * math.log(2 * math.pi)).clamp(-5, 2)

class DiffusionActor(nn.Module):
    """net: the trainable denoiser.  base: while cloning, the moving average of net; then a frozen copy, which
    makes the first K - K' steps and anchors fine-tuning."""
    def __init__(self, cfg, feature_size):
        super().__init__()
        self.cfg = cfg
        self.K = cfg.bc_steps
        self.ft_steps = cfg.ft_steps                           # the K' Gaussian steps of a chain
        build = MLPDenoiser if cfg.bc_net == "mlp" else UNetDenoiser
        self.net = build(cfg, feature_size)
        self.base = copy.deepcopy(self.net).requires_grad_(False)
        i = torch.arange(self.K + 1, dtype=torch.float64) / self.K
        f = torch.cos((i + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = (1 - f[1:] / f[:-1]).clamp(0, 0.999)         # cosine schedule (2102.09672), in float64
        bar = torch.cumprod(1 - beta, 0)                    # alpha-bar at t, `before` at t - 1 (DDPM)
        before = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
        variance = beta * (1 - before) / (1 - bar)
        schedule = dict(signal=bar.sqrt(), noise=(1 - bar).sqrt(), std=variance.clamp(min=1e-20).sqrt(),
                        coef_x0=beta * before.sqrt() / (1 - bar),
                        coef_xt=(1 - before) * (1 - beta).sqrt() / (1 - bar))
        for name, value in schedule.items():
            self.register_buffer(name, value.float(), persistent=False)

    def bc_loss(self, feature, chunk):
        """DDPM, eq. 14: predict the noise.  feature [N, D], chunk [N, H, A] -> scalar"""
        t = torch.randint(0, self.K, (len(chunk),), device=chunk.device)
        noise = torch.randn_like(chunk)
        x = self.signal[t, None, None] * chunk + self.noise[t, None, None] * noise
        return F.mse_loss(self.net(x, t, self.net.see(feature)), noise)

    def mean(self, net, x, t, seen):
        """DDPM, eq. 7, the clean chunk's guess clipped: mean of the chunk one step cleaner [..., H, A]."""
        step = torch.full((1,), t, device=x.device) if isinstance(t, int) else t        # one for all rows
        clean = (x - self.noise[step, None, None] * net(x, step, seen)) / self.signal[step, None, None]
        return self.coef_x0[step, None, None] * clean.clamp(-1, 1) + self.coef_xt[step, None, None] * x

    @torch.no_grad()
    def sample_chain(self, feature, explore=True, frozen=False):
        """feature [B, D] -> chain [B, K'+1, H, A]: the first fine-tuned step's input, then each output.
        Noise stays within 3 std.  explore: std ft_std or more, for PPO; else DDPM's.  frozen: base alone."""
        x = torch.randn(len(feature), self.cfg.bc_chunk, ACTION, device=feature.device)
        chain = [x] if self.ft_steps == self.K else []
        seen, seen_by_base = self.net.see(feature), self.base.see(feature)                # once a chain
        for t in reversed(range(self.K)):
            fixed = frozen or t >= self.ft_steps
            mean = self.mean(self.base, x, t, seen_by_base) if fixed else self.mean(self.net, x, t, seen)
            std = self.std[t].clamp(min=self.cfg.ft_std) if explore else self.std[t] * (t > 0)
            x = mean + std * torch.randn_like(x).clamp(-3, 3)
            if t <= self.ft_steps:
                chain.append(x)
        return torch.stack(chain, 1)                                                      # [B, K'+1, H, A]

    def chain_logprob(self, feature, chain):
        """Log-probability of every recorded step, AVERAGED over the chunk's H * A numbers, as in DPPO: ratios
        are geometric means (those of sums leave the clip range 28 times as soon).  feature [B, D],
        chain [B, K'+1, H, A] -> [B, K']; step j turns chain[j] into chain[j + 1], and t = K'-1-j."""
        t = torch.arange(self.ft_steps - 1, -1, -1, device=chain.device)                     # [K']
        mean = self.mean(self.net, chain[:, :-1], t, self.net.see(feature[:, None]))      # [B, K', H, A]
        std = self.std[t].clamp(min=self.cfg.ft_std)[:, None, None]         # also at t = 0, as in sampling
        return gaussian_logprob(chain[:, 1:], mean, std).mean((-1, -2))                   # [B, K']

    def act(self, feature):
        """feature [B, D] -> the chunk to execute [B, H, A]: DDPM's own noise, none at the last step."""
        return self.sample_chain(feature, explore=False)[:, -1]

class GaussianActor(nn.Module):
    """The plain alternative behind the same interface: one Gaussian a chunk, a chain with one link."""
    def __init__(self, cfg, feature_size):
        super().__init__()
        self.cfg = cfg
        self.ft_steps = 1
        n = cfg.bc_hidden
        self.net = mlp([feature_size, n, n, cfg.bc_chunk * ACTION], nn.Mish, norm=False)
        self.base = copy.deepcopy(self.net).requires_grad_(False)

    def mean(self, net, feature):
        return torch.tanh(net(feature)).unflatten(-1, (self.cfg.bc_chunk, ACTION))        # [B, H, A]

    def bc_loss(self, feature, chunk):
        return F.mse_loss(self.mean(self.net, feature), chunk)

    @torch.no_grad()
    def sample_chain(self, feature, explore=True, frozen=False):
        mean = self.mean(self.base if frozen else self.net, feature)
        noise = self.cfg.ft_std * torch.randn_like(mean).clamp(-3, 3)
        return torch.stack([torch.zeros_like(mean), mean + explore * noise], 1)           # [B, 2, H, A]

    def chain_logprob(self, feature, chain):
        mean = self.mean(self.net, feature)
        std = torch.full_like(mean, self.cfg.ft_std)
        return gaussian_logprob(chain[:, 1], mean, std).mean((-1, -2))[:, None]           # [B, 1]

    act = DiffusionActor.act

def build_actor(cfg, feature_size):
    kind = DiffusionActor if cfg.bc_actor == "diffusion" else GaussianActor
    return kind(cfg, feature_size).to(cfg.device)

@torch.no_grad()
def ema_update(average, net, decay, step):
    """Moving average of the weights; its decay rises, or short training would return its first weights."""
    decay = min(decay, (1 + step) / (10 + step))
    for a, b in zip(average.parameters(), net.parameters()):
        a.lerp_(b, 1 - decay)

def demonstration_features(cfg, wm, recording, offsets=7, draws=2):
    """The moments of every demonstration until just after its success (another task's beginning follows),
    in windows that start every `offsets` frames, an odd number, so that even and odd moments take turns.
    Each is run watched and dreamed: the robot's policy sees the former, PPO's the latter, so both are learnt.
    -> feature, first feature of the same window [P, D], frame numbers [P], start frames [P]"""
    spans = []                                              # first frame, and the last that counts
    for _, a, b in recording.ds.segments:
        done = np.flatnonzero(recording.success(cfg.task, a, np.arange(a, b + 1)))
        last = min(b, a + done[0] + 4) if len(done) else b  # success shows in it and in four more frames
        spans += [(start, last) for start in range(a, last - 3, offsets)]   # at least five frames
    spans = np.array(spans)
    length = int((spans[:, 1] - spans[:, 0]).max()) + 1
    moments = spans[:, :1] + np.arange(0, length, cfg.wm_stride)                          # [W, T]
    inside = moments <= spans[:, 1:]
    parts = []
    for _ in range(draws):
        watched, dreamed, frames = wm.watch_and_dream(recording, spans[:, 0], length, spans[:, 1])
        begin = np.broadcast_to(spans[:, :1], frames.shape)
        for f in (watched, dreamed):
            rows = torch.from_numpy(inside).to(f.device)
            parts.append((f[rows], f[:, :1].expand_as(f)[rows], frames[inside], begin[inside]))
    feature, first, frame, start = zip(*parts)
    return torch.cat(feature), torch.cat(first), np.concatenate(frame), np.concatenate(start)

# 4  Reward ==================================================================================================
#    Nobody measures success inside a dream, so a classifier must recognise it.  CALVIN's rules compare now
#    with the start ("the drawer has been closed by 12 cm"), so ours sees the first feature and the change
#    since.  Demonstrations say what success looks like; play, unlabelled, says what everything else looks
#    like: PPO will try all of it.  With strict labels what succeeds in play is a third class, and not paid: a
#    dreamed door may follow an arm that slipped off, and that looks like no demonstration.

class Classifier(nn.Module):
    def __init__(self, cfg, feature_size):
        super().__init__()
        n = cfg.reward_hidden
        self.embedding = mlp([2 * feature_size, n, n, 64], nn.ELU)
        self.head = nn.Linear(64, 3 if cfg.reward_labels == "strict" else 2)

    def forward(self, first, feature):
        """first, feature [..., D] -> embedding [..., 64], logits of failure, success (and elsewhere)"""
        e = self.embedding(torch.cat([first, feature - first], -1))
        return e, self.head(F.elu(e))

    def success(self, first, feature):
        """The verdict: 1.0 where class 1 wins, else 0.0: [...]"""
        return (self(first, feature)[1].argmax(-1) == 1).float()

class DecodedRule(Classifier):
    """No weights: the task's own rule, on the scene that the world model decodes (in the paper, too)."""
    def __init__(self, cfg, wm):
        nn.Module.__init__(self)                            # and the lambda keeps wm's weights out of it
        self.scene = lambda feature: (wm.state_head(feature).cpu() * STATE_SCALE).numpy()
        self.task = cfg.task

    def forward(self, first, feature):
        done = torch.from_numpy(task_rule(self.task, self.scene(first), self.scene(feature)))
        return None, 20.0 * F.one_hot(done.long().to(feature.device), 2)                  # softmax: 0 or 1

def build_classifier(cfg, wm):
    model = DecodedRule(cfg, wm) if cfg.reward_labels == "state" else Classifier(cfg, wm.feature_size)
    return model.to(cfg.device)

def nt_xent(embedding, label, tau):
    """The paper's NT-Xent, with labels (SupCon, 2004.11362, eq. 2): pull the embeddings of a class together.
    embedding [N, 64], label [N] -> scalar"""
    z = F.normalize(embedding, dim=-1)
    similarity = z @ z.T / tau                                                            # [N, N]
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logp = similarity - torch.logsumexp(similarity.masked_fill(own, -torch.inf), 1, keepdim=True)
    positive = (label[:, None] == label[None]) & ~own
    return -((logp * positive).sum(1) / (positive.sum(1) + 1e-10)).mean()

def classifier_loss(model, first, feature, label, weight, cfg):
    embedding, logits = model(first, feature)
    entropy = (F.cross_entropy(logits, label, reduction="none") * weight).sum() / weight.sum()
    contrast = nt_xent(embedding, label, cfg.reward_tau)
    return contrast + cfg.reward_ce * entropy, dict(contrast=contrast, entropy=entropy)

# 5  Dream ===================================================================================================
#    A world model is an environment: reset() returns features, step() takes chunks.  No simulator here, and
#    section 6 cannot tell which of the two it learns in.  A finished dream restarts from a recorded frame.

class DreamEnv:
    """B imagined arms.  reset() -> feature [B, D]
    step(chunk [B, H, A]) -> feature, reward, terminated, truncated, final; `feature` belongs to the restarted
    dream where one ended, `final` is the next feature before any restart, to bootstrap from."""
    simulator_steps = 0                                     # a dream takes none; SimEnv counts its own
    def __init__(self, cfg, wm, classifier, embedding, command, target):
        """embedding [M, E], command [M, 7], target [M, 6]: recorded frames that a dream may start from.
        The zero state, one frame, the posterior: always the same for a frame, so done here, as are casts."""
        self.cfg = cfg
        self.classifier = classifier
        commands = command.repeat(1, cfg.wm_stride)         # [M, stride * 7]: as if it had stood still
        with torch.no_grad():
            h = wm.step(*wm.initial(len(command), command.device), torch.zeros_like(commands), commands)
            self.bank = (h, wm.posterior(h, embedding), command, target)
        self.wm = cast_once(cfg, "cpu", wm, ("from_z", "from_action", "gru", "prior"))

    def draw(self, n):
        """Fresh starts: one recorded frame each, and a guess from its posterior."""
        index = torch.randint(0, len(self.bank[0]), (n,), device=self.bank[0].device)
        h, post, command, target = (x[index] for x in self.bank)
        state = dict(h=h, z=sample_latent(post, self.cfg), command=command, target=target)
        if self.cfg.ft_twice:
            state.update(h2=h, z2=sample_latent(post, self.cfg))
        # In units of the command, 0.1 m.  Only the transition hears it: in the feature's c the policy would
        # see it and correct it.  None where each target begins at the arm: there it would add up every step
        shift = self.wm.keeps_target * self.cfg.ft_shift / 0.1 * torch.randn(n, 3, device=h.device)
        shift = F.pad(shift, (0, ACTION - 3))                                             # [n, 7]
        return dict(state, first=feature_of(state), age=torch.zeros_like(h[:, 0]), shift=shift)

    @torch.no_grad()
    def reset(self):
        self.state = self.draw(self.cfg.ft_dreams)
        return self.state["first"]

    @torch.no_grad()
    def step(self, chunk):
        first, shift = self.state["first"], self.state["shift"]
        cfg, age = self.cfg, self.state["age"] + 1
        now, reward = dream_chunk(self.wm, self.classifier, self.state, first, executed(chunk), shift)
        if cfg.ft_twice:                               # other latents since the start; both succeed
            other = dict(self.state, h=self.state["h2"], z=self.state["z2"])
            other, again = dream_chunk(self.wm, self.classifier, other, first, executed(chunk), shift)
            now.update(h2=other["h"], z2=other["z"])
            reward = reward * again
        final = feature_of(now)                                                           # [B, D]
        terminated = reward > 0
        if cfg.ft_doubt:                               # how far apart are the heads' means of a latent?
            stats = torch.stack([head(now["h"]) for head in self.wm.more_priors])     # [heads, B, stats_size]
            mean = probs(stats, cfg) if cfg.wm_latent == "categorical" else mean_std(stats)[0][..., None]
            reward = reward - cfg.ft_doubt * mean.var(0).sum(-1).sqrt().mean(-1)
        truncated = (age >= cfg.ft_horizon) & ~terminated
        done = terminated | truncated
        new = self.draw(len(chunk))
        self.state = {key: torch.where(done[:, None] if value.dim() > 1 else done, new[key], value)
                      for key, value in dict(now, first=first, age=age, shift=shift).items()}
        return feature_of(self.state), reward, terminated, truncated, final

def feature_of(state):
    return torch.cat([state["h"], state["z"], state["command"]], -1)                      # [B, D]

def dream_step(wm, state, action, shift=0.0):
    """One imagined step: commands as the simulator integrates them, then memory, then a guess from the prior.
    action [B, stride, 7] -> state.  shift [B, 7]: what the world model hears and the policy does not see"""
    target, keep, commands = state["target"], wm.keeps_target, []
    tcp = wm.tcp(feature_of(state)) if wm.cfg.wm_proprio else target
    for a in action.unbind(1):
        target = advance_target(target, a, tcp, keep)
        keep = 1                                            # tcp is guessed once a step: add to the target
        command = encode_command(target, a[:, 6:])
        commands.append(command + shift)
    with half_precision(wm.cfg, "cpu"):                       # nothing is lost by it
        h = wm.step(state["h"], state["z"], action.flatten(1), torch.cat(commands, -1))
        return dict(h=h, z=sample_latent(wm.prior(h), wm.cfg), command=command, target=target)

def dream_chunk(wm, classifier, state, first, chunk, shift=0.0):
    """Imagine a chunk of executed actions [B, H, 7] -> state, reward [B]: 1.0 where the last two steps look
    like success.  One verdict is noisy, for z is sampled: PPO would wait for chance positives."""
    for action in chunk.split(wm.cfg.wm_stride, 1):
        before = state
        state = dream_step(wm, state, action, shift)
    return state, classifier.success(first, feature_of(before)) * classifier.success(first, feature_of(state))

def executed(action):
    """A policy's numbers [..., 7] -> what the arm receives: within [-1, 1], the gripper open or closed."""
    grip = torch.where(action[..., 6:] >= 0, 1.0, -1.0)
    return torch.cat([action[..., :6].clamp(-1, 1), grip], -1)

# 6  PPO through the chain (DPPO) ============================================================================
#    Two nested decision processes.  The outer one's step is a chunk (T counts chunks here): rewards, values
#    and GAE live on features.  The inner one's step is a denoising step: state (feature, chain[j]), action
#    chain[j + 1], its log-probability by chain_logprob, and as advantage the chunk's, discounted by how many
#    steps are left to clean it, for later steps decide more of what the arm does.  Four things to get right:
#    average a chunk's log-probs, give noisy steps a tighter clip (DPPO: steadier learning), bootstrap a cut
#    dream from its own last feature, and stay close to what was cloned.

def gae(reward, value, next_value, terminated, truncated, gamma, lam):
    """Generalised advantage estimation over chunks (1506.02438, eq. 16), all [T, B] -> advantage, return
    next_value is `final`'s: a truncated dream bootstraps from its own end.  The trace is cut at every end."""
    advantage = torch.zeros_like(reward)
    trace = torch.zeros_like(reward[0])
    for t in reversed(range(len(reward))):
        delta = reward[t] + gamma * next_value[t] * ~terminated[t] - value[t]
        trace = delta + gamma * lam * trace * ~(terminated[t] | truncated[t])
        advantage[t] = trace
    return advantage, advantage + value

def clip_schedule(cfg, steps, device):
    """epsilon [K'], growing exponentially from ft_clip_first at the noisiest step to ft_clip at the last."""
    x = torch.arange(steps, device=device) / (steps - 1) if steps > 1 else torch.ones(1, device=device)
    return cfg.ft_clip_first + (cfg.ft_clip - cfg.ft_clip_first) * (torch.exp(3 * x) - 1) / (math.exp(3) - 1)

@torch.no_grad()
def collect_rollout(cfg, env, actor, critic):
    """ft_chunks steps of every dream, from its start -> tensors [T, B, ...]"""
    feature = env.reset()
    rows = []
    for _ in range(cfg.ft_chunks):
        chain = actor.sample_chain(feature)
        following, reward, terminated, truncated, final = env.step(chain[:, -1])
        rows.append(dict(feature=feature, chain=chain, logprob=actor.chain_logprob(feature, chain),
                         reward=reward, terminated=terminated, truncated=truncated,
                         value=critic(feature)[:, 0], next_value=critic(final)[:, 0]))
        feature = following
    return {k: torch.stack([row[k] for row in rows]) for k in rows[0]}

def ppo_loss(cfg, actor, critic, b):
    """DPPO, eq. 11.  b: a minibatch with feature [N, D], chain [N, K'+1, H, A], logprob [N, K'], advantage,
    returns [N], anchor (chains of the cloned policy, likewise, to be kept likely).  -> loss, diagnostics"""
    left = torch.arange(actor.ft_steps - 1, -1, -1, device=b["feature"].device)    # steps that follow
    advantage = b["advantage"][:, None] * cfg.ft_gamma_denoise ** left                    # [N, K']
    log_ratio = actor.chain_logprob(b["feature"], b["chain"]) - b["logprob"]
    ratio = log_ratio.exp()
    clip = clip_schedule(cfg, len(left), left.device)
    policy = -torch.min(advantage * ratio, advantage * torch.clamp(ratio, 1 - clip, 1 + clip)).mean()
    value = F.mse_loss(critic(b["feature"])[:, 0], b["returns"])
    anchor = torch.zeros_like(policy)
    if cfg.ft_bc:                                           # a quarter of the shuffled rows is anchor enough
        some = slice(0, -(-len(b["feature"]) // 4))
        anchor = -actor.chain_logprob(b["feature"][some], b["anchor"][some]).mean()
    metrics = dict(policy=policy, value=value, anchor=anchor, kl=(ratio - 1 - log_ratio).mean(),
                   clipped=((ratio - 1).abs() > clip).float().mean())
    return policy + cfg.ft_value * value + cfg.ft_bc * anchor, metrics

def ppo_iteration(cfg, env, actor, critic, *optimizers):
    """Practise from fresh starts (no dream is saved), then learn.  optimizers: critic[, actor] -> metrics"""
    roll = collect_rollout(cfg, env, actor, critic)
    over = roll["terminated"] | roll["truncated"]
    advantage, returns = gae(roll["reward"], roll["value"], roll["next_value"], roll["terminated"],
                             roll["truncated"], cfg.ft_gamma, cfg.ft_lambda)
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    data = {k: v.flatten(0, 1) for k, v in dict(roll, advantage=advantage, returns=returns).items()}
    if cfg.ft_bc:
        data["anchor"] = actor.sample_chain(data["feature"], frozen=True)
    history = []
    for _ in range(cfg.ft_epochs):
        for index in torch.randperm(over.numel(), device=over.device).chunk(cfg.ft_minibatches):
            loss, metrics = ppo_loss(cfg, actor, critic, {k: v[index] for k, v in data.items()})
            descend(loss, *optimizers)
            history.append(metrics)
    out = {k: torch.stack([m[k].detach() for m in history]).mean() for k in history[0]}
    out["explained"] = 1 - (returns - roll["value"]).var() / (returns.var() + 1e-8)
    first_end = over & (over.cumsum(0) == 1)                # a later attempt may have no time to fail
    out["dream_success"] = (roll["terminated"] & first_end).sum() / over.shape[1]
    return out

# 7  Agent ===================================================================================================
#    World model and actor as one object, which a robot or an evaluation runs: it takes in every wm_stride-th
#    frame with the actions that led to it, and every H steps asks the actor for a new chunk.

class Agent:
    """B robots in lock step.  reset(B); act(obs) -> actions [B, 7] with obs a dict of stacked observations.
    With a classifier it also has opinions: verdict() on what it sees, dream() on what would come."""
    def __init__(self, cfg, wm, actor, classifier=None):
        self.cfg = cfg
        self.wm = wm
        self.actor = actor
        self.classifier = classifier

    def reset(self, batch):
        self.h, self.z = self.wm.initial(batch, self.cfg.device)
        self.action = torch.zeros(batch, ACTION, device=self.cfg.device)
        self.target = None                                  # where the arm has been told to be
        self.queue = []                                     # actions of the chunk that are still to come
        self.begin = None                                   # state of the first frame

    @torch.no_grad()
    def observe(self, obs):
        """Take in one control step's robot_obs [B, 15] and, at every wm_stride-th, rgb_static and rgb_gripper
        [B, S, S, 3] u8 -> feature [B, D] of the last frame that was taken in"""
        def tensor(key):
            return torch.as_tensor(np.stack(obs[key])).to(self.cfg.device)
        robot = tensor("robot_obs").float()
        tcp, gripper = robot[:, :6], robot[:, 14:]
        if self.target is None:
            self.target = tcp
            command = encode_command(tcp, gripper)
            self.pending = [(self.action, command)] * self.cfg.wm_stride
        else:
            self.target = advance_target(self.target, self.action, self.tcp, self.wm.keeps_target)
            command = encode_command(self.target, self.action[:, 6:])
            self.pending.append((self.action, command))
        self.tcp = tcp
        if len(self.pending) == self.cfg.wm_stride:
            frame = {key: tensor(key) for key in ("rgb_static", "rgb_gripper")}
            frame["proprio"] = encode_proprio(robot)
            self.h = self.wm.step(self.h, self.z, *(torch.cat(x, -1) for x in zip(*self.pending)))
            self.z = sample_latent(self.wm.posterior(self.h, self.wm.embed(frame)), self.cfg)
            self.state = dict(h=self.h, z=self.z, command=command, target=self.target)
            self.pending = []
            self.begin = self.begin or self.state
        return feature_of(self.state)

    def act(self, obs):
        feature = self.observe(obs)
        if not self.queue:
            self.queue = list(self.actor.act(feature).unbind(1))                          # H actions [B, 7]
        return self.execute(self.queue.pop(0))

    def execute(self, action):
        """A policy's numbers [B, 7] -> what the arms receive; the agent remembers it for the next frame."""
        self.action = executed(action)
        return self.action.cpu().numpy()

    @torch.no_grad()
    def verdict(self):
        """Does the classifier see success in the last frame?  -> bool [B]"""
        return (self.classifier.success(feature_of(self.begin), feature_of(self.state)) > 0).cpu().numpy()

    @torch.no_grad()
    def dream(self, actions=None):
        """Dream from the first frame, with executed actions [B, T, 7] or with the policy's own.
        -> the classifier's verdict after each chunk, bool [B, T / H]"""
        state, first, H = self.begin, feature_of(self.begin), self.cfg.bc_chunk
        steps = self.cfg.eval_steps if actions is None else actions.shape[1]
        verdicts = []
        for t in range(0, steps - H + 1, H):
            chunk = executed(self.actor.act(feature_of(state))) if actions is None else actions[:, t:t + H]
            state, reward = dream_chunk(self.wm, self.classifier, state, first, chunk)
            verdicts.append(reward > 0)
        return torch.stack(verdicts, 1).cpu().numpy()

# 8  Stages ==================================================================================================
#    Each reads earlier results, writes its own, and can be run alone.

def load_world_model(cfg):
    wm = WorldModel(cfg).to(cfg.device)
    fill(wm, load(cfg, "wm")["model"], "wm")
    return wm.eval().requires_grad_(False)

def stage_wm(cfg):
    """Train the world model on play, then judge it on held-out play and held-out demonstrations."""
    dataset = load(cfg, "play")
    seed_everything(cfg.seed, "wm", "init")
    wm = WorldModel(cfg).to(cfg.device)
    optimizer = torch.optim.AdamW(wm.parameters(), cfg.wm_lr, eps=1e-5, weight_decay=cfg.wm_decay, fused=True)
    state = dict(model=wm, optimizer=optimizer)
    if wm.codec and not restore(cfg, "wm", state):          # a second PCA may flip signs
        wm.codec.fit(dataset, cfg.seed)
    recording = Recording(cfg, dataset, wm)
    wm.keeps_target.fill_(recording.keeps_target)
    window = np.arange(cfg.wm_length) * cfg.wm_stride
    starts = window_starts(dataset.split()[0], window[-1] + 1)
    loss_of = parallel.in_step(wm, world_model_loss)        # torchrun starts several processes, else one
    updates = Updates(cfg, "wm", cfg.wm_updates, state)
    for i, rng in updates:                                  # draws of update i; a killed run goes on there
        cosine_lr(optimizer, cfg.wm_lr, i, cfg.wm_updates, floor=cfg.wm_lr_end)
        first = parallel.share(rng.choice(starts, cfg.wm_batch))
        with half_precision(cfg, "cpu"):
            loss, metrics = loss_of(recording.batch(first[:, None] + window))
        metrics["norm"] = descend(loss, optimizer, clip=cfg.wm_clip)
        updates.log(metrics)
    wm.eval().requires_grad_(False)
    judged = report.judge_world_model(recording, heldout_recording(cfg, wm), wm.watch_and_dream,
                                      seed_everything(cfg.seed, "judge"))
    save_result(cfg, "wm", model=wm.state_dict(), judged=judged)

def stage_bc(cfg):
    """Clone the demonstrations."""
    wm = load_world_model(cfg)
    dataset = load(cfg, "demos")
    recording = Recording(cfg, dataset, wm)
    seed_everything(cfg.seed, "bc", cfg.task, "init")
    feature, _, frame, _ = demonstration_features(cfg, wm, recording)
    chunks = action_chunks(np.array(dataset["rel_actions"]), dataset.episodes, cfg.bc_chunk)[frame]
    chunks = torch.from_numpy(chunks).to(cfg.device)                                      # [P, H, A]
    actor = build_actor(cfg, wm.feature_size)
    optimizer = torch.optim.AdamW(actor.net.parameters(), lr=cfg.bc_lr, weight_decay=1e-6)
    updates = Updates(cfg, "bc", cfg.bc_updates, dict(actor=actor, optimizer=optimizer), every=50)
    for i, _ in updates:
        cosine_lr(optimizer, cfg.bc_lr, i, cfg.bc_updates)
        index = torch.randint(0, len(feature), (cfg.bc_batch,), device=cfg.device)
        loss = actor.bc_loss(feature[index], chunks[index])
        descend(loss, optimizer)
        ema_update(actor.base, actor.net, cfg.bc_ema, i)
        updates.log(dict(loss=loss))
    # The moving average acts, and fine-tuning starts there: net learns on, base stays frozen
    actor.net.load_state_dict(actor.base.state_dict())
    save_result(cfg, "bc", actor=actor.state_dict())

# Kinds of a pair: unlabelled play is taken for a failure; elsewhere is success in play, if labels are strict
FAILURE, SUCCESS, UNLABELLED, ELSEWHERE = range(4)

def reward_pairs(cfg, wm, recording, play, rng):
    """What the classifier learns from: moments of demonstrations and of play, each beside the first one of
    its window, or of any window where a rule labels play.  -> first, feature [P, D], kind [P]"""
    feature, first, frame, start = demonstration_features(cfg, wm, recording)
    success = torch.from_numpy(recording.success(cfg.task, start, frame)).to(cfg.device)
    if not success.any():
        raise InputError(f"no demonstration of {cfg.task} fulfils the task's rule, so nothing shows what "
                         f"success is: are the segments and scene_obs of {output(cfg, 'demos')} right?")
    pairs = [(first, feature, success.long())]
    solved = dict(predicate=SUCCESS, strict=ELSEWHERE).get(cfg.reward_labels)   # kind, if a rule labels play
    if cfg.reward_labels != "demos":
        length = play.ds.window_length()
        begin = rng.choice(window_starts(play.ds.split()[0], length), min(1500, 50 * cfg.demo_count))
        watched, dreamed, frames = wm.watch_and_dream(play, begin, length)
        moments = rng.integers(1, frames.shape[1], (len(frames), 12))                     # [W, 12]
        own = np.arange(len(frames))[:, None].repeat(12, 1)                               # [W, 12] windows
        for f in (watched, dreamed):
            # Where a rule can label any pair, compare with any window's start: a lamp is off wherever the arm
            # is, not only beside the lever.  Else with the start of its own window
            other = rng.integers(0, len(frames), moments.shape) if solved else own
            first = f[torch.from_numpy(other), 0].flatten(0, 1)                           # [W * 12, D]
            feature = f[torch.from_numpy(own), torch.from_numpy(moments)].flatten(0, 1)
            kind = torch.full((len(feature),), UNLABELLED, device=cfg.device)
            if solved:
                success = play.success(cfg.task, frames[other, 0], frames[own, moments]).ravel()
                kind = torch.from_numpy(np.where(success, solved, FAILURE)).to(cfg.device)
            pairs.append((first, feature, kind))
    return [torch.cat(parts) for parts in zip(*pairs)]

def learn_reward(cfg, wm, play):
    """The success classifier, from pairs out of the demonstrations, and out of play as reward_labels says."""
    recording = Recording(cfg, load(cfg, "demos"), wm)
    rng = seed_everything(cfg.seed, "reward", cfg.task, "init")
    first, feature, kind = reward_pairs(cfg, wm, recording, play, rng)
    pools = [torch.nonzero(kind == one)[:, 0] for one in kind.unique()]
    label = torch.tensor([0, 1, 0, 2], device=cfg.device)[kind]
    weight = torch.tensor([1, 1, cfg.reward_play, cfg.reward_play], device=cfg.device)[kind]
    model = build_classifier(cfg, wm)
    optimizer = torch.optim.Adam(model.parameters(), lr=cfg.reward_lr)
    updates = Updates(cfg, "reward", cfg.reward_updates, dict(model=model, optimizer=optimizer), every=50)
    for i, _ in updates:                                    # as many of each kind, however rare
        index = torch.cat([pool[torch.randint(0, len(pool), (128,), device=cfg.device)] for pool in pools])
        loss, metrics = classifier_loss(model, first[index], feature[index], label[index], weight[index], cfg)
        descend(loss, optimizer)
        updates.log(metrics)
    return model

def stage_reward(cfg):
    """Learn what success looks like, or take it from the decoded scene; then judge that on held-out data."""
    wm = load_world_model(cfg)
    play = Recording(cfg, load(cfg, "play"))                # few frames are used: no codes in advance
    model = build_classifier(cfg, wm) if cfg.reward_labels == "state" else learn_reward(cfg, wm, play)
    judged = report.trust(cfg.task, model.success, play, heldout_recording(cfg, wm),
                          wm.watch_and_dream, seed_everything(cfg.seed, "judge"))
    save_result(cfg, "reward", model=model.state_dict(), trust=judged)

def stage_finetune(cfg):
    """DiWA: PPO in the dream.  Reads recordings and checkpoints, steps no simulator."""
    seed_everything(cfg.seed, "finetune", cfg.task, "init")
    agent = load_agent(cfg, "bc")
    env = DreamEnv(cfg, agent.wm, agent.classifier, *dream_starts(cfg, agent.wm))
    finetune(cfg, env, agent.actor)

@torch.no_grad()
def dream_starts(cfg, wm):
    """Recorded frames to dream from: the first part of each demonstration, and the play frames most like one
    (ridge regression on embeddings: no label, no scene state).  The clone hardly fails where demonstrations
    begin; play adds other scenes and arms that missed.  -> embedding [M, E], command [M, 7], target [M, 6]"""
    demos, play = (Recording(cfg, load(cfg, stage)) for stage in ("demos", "play"))
    begin = [np.arange(a, a + 1 + int(cfg.ft_starts * (b - a))) for _, a, b in demos.ds.segments]
    def rows(recording, frames):                            # [n, E], [n, 7], [n, 6]
        parts = []
        for some in np.array_split(frames, len(frames) // 2000 + 1):
            batch = recording.batch(some[:, None])
            target = recording.target[torch.from_numpy(some)].to(cfg.device)
            parts.append((wm.embed(batch)[:, 0], batch["command"][:, 0, -ACTION:], target))
        return [torch.cat(x) for x in zip(*parts)]
    near = rows(demos, np.concatenate(begin))
    if not cfg.ft_play:
        return near
    # Neighbours look alike, so every wm_stride-th frame, and none of the held-out episodes, which only judge
    frames = np.concatenate([np.arange(a, b + 1, cfg.wm_stride) for a, b in play.ds.split()[0]])
    every = rows(play, frames)
    alike = likeness(near[0], every[0]).topk(max(1, int(cfg.ft_play * len(every[0])))).indices
    return [torch.cat([a, b[alike]]) for a, b in zip(near, every)]

def stage_online(cfg):
    """DPPO, the rival: the same PPO in simulators, from the same cloned policy, until it is as good."""
    seed_everything(cfg.seed, "online", cfg.task, "init")
    agent = load_agent(cfg, "bc")
    env = online.SimEnv(cfg, agent, online.simulators(cfg))
    finetune(cfg, env, agent.actor, "online", online.Rival(cfg, env))

def finetune(cfg, env, actor, stage="finetune", rival=None):
    """PPO in a DreamEnv (DiWA), or in a SimEnv until it matches DiWA (DPPO, support/online.py)."""
    critic = mlp([env.wm.feature_size, 256, 256, 256, 1], nn.Mish, norm=False).to(cfg.device)
    actor_optimizer = torch.optim.AdamW(actor.net.parameters(), lr=cfg.ft_actor_lr)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=cfg.ft_critic_lr)
    acting = actor if rival else copy.deepcopy(actor)       # the average; it lags, so a rival acts as it is
    snapshots = Snapshots()
    state = dict(actor=actor, acting=acting, critic=critic, snapshots=snapshots, env=env,
                 actor_optimizer=actor_optimizer, critic_optimizer=critic_optimizer)
    updates = Updates(cfg, stage, rival.iterations if rival else cfg.ft_iterations, state, every=1)
    for i, _ in updates:
        learning = [critic_optimizer] if i < cfg.ft_warmup else [critic_optimizer, actor_optimizer]
        metrics = ppo_iteration(cfg, env, actor, critic, *learning)
        ema_update(acting.net, actor.net, cfg.ft_ema, 9 * i)    # decay i / (i + 1), a mean, until ft_ema
        if rival and rival.reached(actor, metrics):
            updates.total = i + 1
        updates.log(metrics)
        if (i + 1) % cfg.ft_snapshot == 0 or i + 1 == updates.total:
            snapshots[str(i + 1)] = {k: v.clone() for k, v in acting.net.state_dict().items()}
    save_result(cfg, stage, actor=acting.state_dict(), snapshots=dict(snapshots),
                simulator_steps=env.simulator_steps, **(rival.judged(actor) if rival else {}))

def load_agent(cfg, policy):
    """World model, actor and classifier; policy: "bc", "tuned", "online" or the iteration of a snapshot."""
    wm = load_world_model(cfg)
    actor = build_actor(cfg, wm.feature_size)
    fill(actor, policy_weights(cfg, policy), policy)
    classifier = build_classifier(cfg, wm)
    fill(classifier, load(cfg, "reward")["model"], "reward")
    return Agent(cfg, wm, actor.eval(), classifier.eval())

def deploy(*flags):
    """The tuned agent of a finished run, for a robot: deploy("--run", "tea", "--task", "pour_tea")."""
    return load_agent(check_config(parse(flags, Config, PRESETS, "", "")), "tuned")

def stage_eval(cfg):
    """Before and after from the same start states: here the tuned policy first meets a simulator."""
    (evaluate.one_policy if cfg.policy else evaluate.before_and_after)(cfg, load_agent)

def stage_report(cfg):
    evaluate.write_report(cfg, load_agent)                  # tables and pictures

STAGE_WORK = dict(play=stage_play, demos=stage_demos, wm=stage_wm, bc=stage_bc, reward=stage_reward,
                  finetune=stage_finetune, eval=stage_eval, report=stage_report, online=stage_online)

def main(argv=None):
    """Run a command line -> the exit code: 0, 2 when something given cannot be used, 130 when interrupted."""
    return command_line(argv, Config, PRESETS, STAGE_WORK, __doc__.split("\n\n")[0])

if __name__ == "__main__":
    sys.exit(main())
