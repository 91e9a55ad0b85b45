"""The method against closed forms: every formula of diwa.py that a reader would check on paper is checked
here.

    python -m pytest tests/test_method.py          # under a minute on one core, no recordings, no simulator
"""
import dataclasses
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributions import Categorical, Normal, kl_divergence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench
import calvin_sim
import data
import diwa
from data import InputError
from support import linear, runs

FEATURE = 11                                                # size of the made-up features


def tiny(**changes):
    """A configuration that is small enough for a unit test."""
    small = dict(
        device="cpu", image_size=64, wm_stride=1, wm_codes=8, wm_depth=2, wm_z=4, wm_classes=5, wm_h=16,
        wm_hidden=16, wm_embed=16, bc_hidden=32, reward_hidden=16, ft_dreams=6, ft_chunks=5, ft_horizon=3,
        ft_epochs=2, ft_minibatches=2, ft_clip=0.01, ft_clip_first=0.001, ft_shift=0.0, wm_bf16=0,
    )
    return diwa.Config(**{**small, **changes})


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def no_noise(monkeypatch):
    """Latents are their means, so that a rollout can be recomputed by hand."""
    monkeypatch.setattr(diwa, "sample_latent", lambda stats, cfg: diwa.mean_std(stats)[0])


def world(cfg):
    return diwa.WorldModel(cfg).to(cfg.device).eval().requires_grad_(False)


def sequence(cfg, wm, B=3, T=6, device="cpu"):
    """Made-up embeddings, actions and commands [B, T, ...]."""
    told = 7 * cfg.wm_stride
    return [torch.randn(B, T, n, device=device) for n in (wm.embed_size, told, told)]


def made_up_starts(cfg, wm):
    """Embeddings [9, E], and commands [9, 7] for targets [9, 6] near the home pose."""
    target = data.HOME_POSE + 0.01 * torch.randn(9, 6)
    target = target.to(cfg.device)
    command = data.encode_command(target, torch.ones(9, 1, device=cfg.device))
    return torch.randn(9, wm.embed_size, device=cfg.device), command, target


def dream(cfg, wm, classifier=None, horizon=None, starts=None):
    """A DreamEnv whose starts are made up."""
    classifier = classifier or diwa.Classifier(cfg, wm.feature_size).to(cfg.device)
    cfg = dataclasses.replace(cfg, ft_horizon=horizon or cfg.ft_horizon)
    return diwa.DreamEnv(cfg, wm, classifier, *(starts or made_up_starts(cfg, wm)))


def optimizers_for(actor, critic):
    return [torch.optim.AdamW(net.parameters(), lr=1e-3) for net in (critic, actor.net)]


def weights(module):
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


class Fixed(nn.Module):
    """A denoiser that ignores its input."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.as_tensor(value, dtype=torch.float32))
        self.see = nn.Identity()

    def forward(self, x, t, feature):
        return self.value.expand_as(x)


class Perfect(nn.Module):
    """The denoiser that knows the clean chunk, so its noise prediction is right at every t."""

    def __init__(self, actor, clean):
        super().__init__()
        self.signal = actor.signal
        self.noise = actor.noise
        self.clean = clean
        self.see = nn.Identity()

    def forward(self, x, t, feature):
        return (x - self.signal[t][:, None, None] * self.clean) / self.noise[t][:, None, None]


def schedule(K):
    """beta, alpha, alpha-bar and the alpha-bar before, from the definition, float64."""
    f = [math.cos((i / K + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(K + 1)]
    beta = np.array([min(max(1 - f[t + 1] / f[t], 0), 0.999) for t in range(K)])
    bar = np.cumprod(1 - beta)
    return beta, 1 - beta, bar, np.append(1, bar[:-1])


# ------------------------------------------------------------------------------------------------------------
# 4  Actor: the schedule and one denoising step

@pytest.mark.parametrize("K", [1, 10, 20, 100])
def test_cosine_schedule(K):
    """Signal and noise levels are those of the cosine schedule, and t = 0 is the cleanest step."""
    actor = diwa.DiffusionActor(tiny(bc_steps=K, ft_steps=1), FEATURE)
    _, _, bar, _ = schedule(K)
    np.testing.assert_allclose(actor.signal, np.sqrt(bar), atol=1e-6)
    np.testing.assert_allclose(actor.noise, np.sqrt(1 - bar), atol=1e-6)
    assert (actor.signal.diff() < 0).all()


@pytest.mark.parametrize("K", [10, 20, 100])
def test_posterior_is_bayes_rule(K):
    """q(x_{t-1} | x_t, x_0) = N(x_{t-1}; sqrt(bar_{t-1}) x_0, 1 - bar_{t-1}) * N(x_t; sqrt(alpha) x_{t-1},
    beta), normalised."""
    actor = diwa.DiffusionActor(tiny(bc_steps=K, ft_steps=1), FEATURE)
    beta, alpha, _, before = schedule(K)
    a = alpha[1:]
    b = beta[1:]
    p = before[1:]
    q = 1 - before[1:]
    precision = 1 / q + a / b
    np.testing.assert_allclose(actor.coef_x0[1:], np.sqrt(p) / q / precision, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(actor.coef_xt[1:], np.sqrt(a) / b / precision, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(actor.std[1:], precision ** -0.5, rtol=1e-4)
    # the last step is the guess itself
    assert actor.coef_x0[0] == pytest.approx(1, abs=1e-6) and actor.coef_xt[0] == 0 and actor.std[0] < 1e-9


def test_mean_recovers_the_clean_chunk():
    """With the true noise, the mean of step t is Bayes' mean for the true clean chunk, also for a tensor of
    mixed t."""
    actor = diwa.DiffusionActor(tiny(), FEATURE)
    clean = torch.rand(20, 4, 7) * 1.8 - 0.9
    noise = torch.randn(20, 4, 7)
    t = torch.arange(20)
    x = actor.signal[:, None, None] * clean + actor.noise[:, None, None] * noise
    got = actor.mean(lambda x, t, f: noise, x, t, None)
    want = actor.coef_x0[:, None, None] * clean + actor.coef_xt[:, None, None] * x
    torch.testing.assert_close(got, want, atol=1e-3, rtol=0)                     # 1 / signal is 400 at t = 19
    one = actor.mean(lambda x, t, f: noise[7:8], x[7:8], 7, None)
    torch.testing.assert_close(one, got[7:8])


def test_clean_guess_is_clipped():
    """A guess of the clean chunk beyond the action range counts as +-1."""
    actor = diwa.DiffusionActor(tiny(), FEATURE)
    x = torch.zeros(1, 4, 7)
    got = actor.mean(Fixed(-50.0), x, 5, None)
    torch.testing.assert_close(got, torch.full_like(x, actor.coef_x0[5].item()))


def test_time_embedding():
    """Eight sines and eight cosines, wavelengths from 2 pi to 2 pi 10^4."""
    module = diwa.TimeEmbedding()
    for layer in range(3):
        module[layer] = nn.Identity()
    e = module(torch.tensor([0, 3]))
    want = [3 * 10_000 ** (-i / 7) for i in range(8)]
    np.testing.assert_allclose(e[0], [0] * 8 + [1] * 8, atol=1e-7)
    np.testing.assert_allclose(e[1], np.sin(want).tolist() + np.cos(want).tolist(), atol=1e-5)


def test_bc_loss_predicts_the_added_noise(monkeypatch):
    """The training pair is x = signal * chunk + noise-level * noise at a t in 0..K-1, the target is the
    noise."""
    actor = diwa.DiffusionActor(tiny(), FEATURE)
    chunk = torch.rand(500, 4, 7) - 0.5
    seen = []
    perfect = Perfect(actor, chunk)
    actor.net = perfect
    assert actor.bc_loss(torch.zeros(500, FEATURE), chunk) < 1e-6

    def note(x, t, f):
        seen.append(t)
        return x

    perfect.forward = note
    actor.bc_loss(torch.zeros(500, FEATURE), chunk)
    assert set(seen[0].tolist()) == set(range(20))


@pytest.mark.parametrize("net, H", [("mlp", 4), ("mlp", 8), ("unet", 4), ("unet", 8)])
def test_denoiser_shapes(net, H):
    """Both denoisers keep the chunk's shape and listen to chunk, time and feature."""
    cfg = tiny(bc_net=net, bc_chunk=H)
    actor = diwa.build_actor(cfg, FEATURE)
    x = torch.randn(3, H, 7)
    t = torch.tensor([0, 5, 19])
    f = torch.randn(3, FEATURE)

    def noise(x, t, f):
        return actor.net(x, t, actor.net.see(f))

    y = noise(x, t, f)
    assert y.shape == (3, H, 7)
    for other in (noise(x + 1, t, f), noise(x, t + 1, f), noise(x, t, f + 1)):
        assert (other - y).abs().flatten(1).amax(1).min() > 1e-4
    # rows do not mix
    torch.testing.assert_close(noise(x[1:2], t[1:2], f[1:2]), y[1:2], atol=1e-5, rtol=1e-4)
    assert actor.sample_chain(f).shape == (3, 11, H, 7)


def test_the_mlp_denoiser_is_one_residual_block():
    """l2 and last are one thin layer; values and every parameter's gradient are those of the two."""
    net = diwa.MLPDenoiser(tiny(), FEATURE)
    x, feature = torch.randn(3, 5, 4, 7), torch.randn(3, FEATURE)
    t = torch.tensor([4, 3, 2, 1, 0])

    def by_hand():
        time = net.time(t).expand(3, 5, -1)
        y = net.first(torch.cat([x.flatten(-2), time], -1)) + net.from_feature(feature)[:, None]
        return net.last(y + net.l2(F.mish(net.l1(F.mish(y))))).view_as(x)

    results = []
    for noise in (by_hand(), net(x, t, net.see(feature[:, None]))):
        net.zero_grad()
        noise.square().sum().backward()
        results.append([noise] + [p.grad for p in net.parameters()])
    for want, got in zip(*results):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


def test_film_scales_and_shifts_each_block():
    """A block's channels become y (1 + scale) + shift; the UNet cuts what time and feature say into its five
    blocks' parts, the first half of each the scales."""
    block = diwa.FiLMBlock(7, 16)
    x, scale, shift = torch.randn(3, 7, 4), torch.randn(3, 16), torch.randn(3, 16)
    by_hand = block.c2(block.c1(x) * (1 + scale[..., None]) + shift[..., None]) + block.skip(x)
    torch.testing.assert_close(block(x, torch.cat([scale, shift], 1)), by_hand)
    net = diwa.UNetDenoiser(tiny(), FEATURE)
    given = {}
    for name, block in net.named_modules():
        if isinstance(block, diwa.FiLMBlock):
            block.register_forward_pre_hook(lambda _, args, name=name: given.update({name: args[1]}))
    t, feature = torch.tensor([0, 5, 19]), torch.randn(3, FEATURE)
    net(torch.randn(3, 4, 7), t, net.see(feature))
    widths = {name: film.shape[1] for name, film in given.items()}
    assert widths == {"down.0": 128, "down.1": 256, "down.2": 512, "up.0": 256, "up.1": 128}
    torch.testing.assert_close(torch.cat(list(given.values()), 1), net.time(t) + net.see(feature))


def test_the_unet_hands_each_scale_across():
    """What a block upwards reads ends with what the block downwards of the same scale gave."""
    net = diwa.UNetDenoiser(tiny(), FEATURE)
    gave = {}
    read = {}
    for i in (0, 1):
        net.down[i].register_forward_hook(lambda _, inputs, output, i=i: gave.update({i: output}))
        net.up[i].register_forward_pre_hook(lambda _, inputs, i=i: read.update({1 - i: inputs[0]}))
    net(torch.randn(3, 4, 7), torch.tensor([0, 5, 19]), net.see(torch.randn(3, FEATURE)))
    for i, channels in ((0, 64), (1, 128)):
        assert gave[i].shape[1] == channels and torch.equal(read[i][:, -channels:], gave[i])


def test_unet_refuses_odd_chunks():
    """The UNet halves the chunk twice; a chunk of 6 must be refused in words."""
    with pytest.raises(InputError, match="bc_chunk"):
        runs.check_config(tiny(bc_net="unet", bc_chunk=6))


# ------------------------------------------------------------------------------------------------------------
# 4  Actor: the chain

@pytest.mark.parametrize("K, tuned", [(20, 10), (20, 1), (20, 20), (5, 3), (1, 1)])
@pytest.mark.parametrize("explore", [True, False])
def test_chain_by_hand(K, tuned, explore):
    """sample_chain is K steps with the frozen net while t >= K' and the tuned one after; it records chain[0]
    = output of the last frozen step
    (the first noise when K' = K), and step j is t = K' - 1 - j."""
    cfg = tiny(bc_steps=K, ft_steps=tuned)
    actor = diwa.DiffusionActor(cfg, FEATURE)
    feature = torch.randn(4, FEATURE)
    actor.base.load_state_dict(diwa.DiffusionActor(cfg, FEATURE).net.state_dict())       # base and net differ
    torch.manual_seed(5)
    chain = actor.sample_chain(feature, explore)
    torch.manual_seed(5)
    x = torch.randn(4, 4, 7)
    want = []
    if tuned == K:
        want.append(x)
    for t in range(K - 1, -1, -1):
        net = actor.base if t >= tuned else actor.net
        sigma = actor.std[t].item()
        std = max(sigma, 0.1) if explore else 0 if t == 0 else max(sigma, 1e-3)
        with torch.no_grad():
            x = actor.mean(net, x, t, net.see(feature)) + std * torch.randn(4, 4, 7).clamp(-3, 3)
        if t <= tuned:
            want.append(x)
    assert chain.shape == (4, tuned + 1, 4, 7)
    torch.testing.assert_close(chain, torch.stack(want, 1))


def test_exploration_noise_is_clipped(monkeypatch):
    """Noise beyond three standard deviations is cut, so that a chunk cannot jump out of the data."""
    actor = diwa.DiffusionActor(tiny(), FEATURE)
    feature = torch.zeros(2, FEATURE)
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.full_like(x, 10.0))
    chain = actor.sample_chain(feature)
    last = actor.mean(actor.net, chain[:, -2], 0, actor.net.see(feature))
    torch.testing.assert_close(chain[:, -1], last + 3 * 0.1)


def test_acting_adds_no_noise_at_the_last_step():
    """What is executed outside of exploration is the mean of step t = 0, and agrees with chain[:, -1]."""
    actor = diwa.DiffusionActor(tiny(), FEATURE)
    feature = torch.randn(5, FEATURE)
    chain = actor.sample_chain(feature, explore=False)
    last = actor.mean(actor.net, chain[:, -2], 0, actor.net.see(feature))
    torch.testing.assert_close(chain[:, -1], last, rtol=0, atol=0)
    torch.manual_seed(1)
    chain = actor.sample_chain(feature, explore=False)
    torch.manual_seed(1)
    assert torch.equal(actor.act(feature), chain[:, -1])


@pytest.mark.parametrize("tuned", [1, 3, 10, 20])
def test_chain_logprob_by_hand(tuned):
    """Step j has t = K' - 1 - j, the std max(sigma_t, floor) also at t = 0, and its element log-densities
    are averaged, not summed."""
    actor = diwa.DiffusionActor(tiny(ft_steps=tuned), FEATURE)
    feature = torch.randn(4, FEATURE)
    chain = actor.sample_chain(feature)
    got = actor.chain_logprob(feature, chain)
    assert got.shape == (4, tuned)
    for j in range(tuned):
        t = tuned - 1 - j
        mean = actor.mean(actor.net, chain[:, j], t, actor.net.see(feature))
        want = Normal(mean, max(actor.std[t].item(), 0.1)).log_prob(chain[:, j + 1]).clamp(-5, 2).mean((1, 2))
        torch.testing.assert_close(got[:, j], want, atol=1e-4, rtol=1e-4)


def test_logprob_is_clamped():
    """Element log-densities stay in [-5, 2]: no outlier owns a ratio, and a tiny std cannot blow it up."""
    actor = diwa.DiffusionActor(tiny(), FEATURE)
    feature = torch.randn(2, FEATURE)
    chain = actor.sample_chain(feature)
    chain[:, 1:] += 100 * torch.arange(1, 11)[:, None, None]
    assert (actor.chain_logprob(feature, chain) == -5).all()
    x = torch.zeros(3)
    assert (diwa.gaussian_logprob(x, x, torch.tensor(1e-3)) == 2).all()


def test_logprob_floor_follows_the_flag():
    """A wider --ft_std widens the density at every step whose own sigma is smaller, t = 0 included."""
    feature = torch.randn(2, FEATURE)
    density = []
    for floor in (0.1, 0.2):
        torch.manual_seed(0)
        actor = diwa.DiffusionActor(tiny(ft_steps=1, ft_std=floor), FEATURE)
        chain = actor.sample_chain(feature, explore=False)
        density.append(actor.chain_logprob(feature, chain).mean().item())
    # the executed chunk is the mean itself
    want = [-math.log(s) - 0.5 * math.log(2 * math.pi) for s in (0.1, 0.2)]
    assert density == pytest.approx(want, abs=1e-4)


def test_frozen_steps_ignore_the_tuned_net():
    """Wrecking the tuned net leaves the frozen part of the chain, chain[0], and everything with frozen=True
    as it was."""
    actor = diwa.DiffusionActor(tiny(), FEATURE)
    feature = torch.randn(3, FEATURE)
    def sample(frozen):
        torch.manual_seed(3)
        return actor.sample_chain(feature, frozen=frozen)
    free = sample(False)
    frozen = sample(True)
    torch.testing.assert_close(free, frozen)                             # before any update both nets are one
    with torch.no_grad():
        for p in actor.net.parameters():
            p.add_(0.5)
    assert torch.equal(sample(False)[:, 0], free[:, 0]) and torch.equal(sample(True), frozen)
    assert (sample(False)[:, 1] - free[:, 1]).abs().max() > 1e-3


def test_base_gets_no_gradient():
    """Neither cloning nor PPO with its anchor may move the frozen net."""
    cfg = tiny()
    actor = diwa.DiffusionActor(cfg, FEATURE)
    critic = diwa.mlp([FEATURE, 8, 1], nn.Mish, norm=False)
    before = weights(actor.base)
    optimizer = torch.optim.AdamW([p for p in actor.parameters() if p.requires_grad], lr=0.1)
    b = minibatch(actor, 6)

    def cloning():
        return actor.bc_loss(b["feature"], b["chain"][:, -1])

    def practice():
        return diwa.ppo_loss(cfg, actor, critic, b)[0]

    for loss in (cloning, practice):
        optimizer.zero_grad()
        loss().backward()
        assert all(p.grad is None for p in actor.base.parameters())
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in actor.net.parameters())
        optimizer.step()
    assert torch.equal(weights(actor.base), before)


@pytest.mark.parametrize("tuned", [0, -1, 21])
def test_bad_fine_tuned_steps(tuned):
    """K' outside 1..K is refused with a sentence that names the flag."""
    with pytest.raises(InputError, match="ft_steps"):
        runs.check_config(tiny(ft_steps=tuned))


def test_ema_warms_up():
    """Early the average follows closely, late it has the configured memory: (1 + step) / (10 + step), at
    most the decay."""
    a = nn.Linear(1, 1, bias=False)
    b = nn.Linear(1, 1, bias=False)
    for step, keep in ((0, 0.1), (90, 0.91), (10 ** 6, 0.995)):
        a.weight.data.fill_(0)
        b.weight.data.fill_(1)
        diwa.ema_update(a, b, 0.995, step)
        assert a.weight.item() == pytest.approx(1 - keep, abs=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.6])
@pytest.mark.parametrize("with_rival", [False, True])
def test_what_acts_is_an_average_of_what_ppo_learns(monkeypatch, decay, with_rival):
    """finetune: the snapshots and the result are the moving average of the weights after each iteration, at
    first their plain mean; PPO itself goes on from its own weights, and with a rival these act."""
    cfg = tiny(ft_ema=decay, ft_iterations=6, ft_snapshot=2, ft_warmup=1)
    actor = diwa.DiffusionActor(cfg, FEATURE)
    result = {}

    def learn(cfg, env, actor, *others):
        for p in actor.net.parameters():
            p.data.add_(1)
        return {}

    class Loop:
        def __init__(self, cfg, stage, total, state, every):
            self.total = total
            self.log = lambda metrics: None

        def __iter__(self):
            return ((i, None) for i in range(self.total))

    monkeypatch.setattr(diwa, "ppo_iteration", learn)
    monkeypatch.setattr(diwa, "Updates", Loop)
    monkeypatch.setattr(diwa, "save_result", lambda cfg, stage, **content: result.update(content))
    rival = SimpleNamespace(iterations=6, reached=lambda actor, metrics: False, judged=lambda actor: {})
    env = SimpleNamespace(wm=SimpleNamespace(feature_size=FEATURE), simulator_steps=0)
    before = actor.net.last.bias.detach().clone()
    diwa.finetune(cfg, env, actor, rival=rival if with_rival else None)
    torch.testing.assert_close(actor.net.last.bias, before + 6)
    average, want = 0.0, {}
    for i in range(6):
        keep = min(decay, (1 + 9 * i) / (10 + 9 * i))       # 1/10, then about i / (i + 1), until it is decay
        average = keep * average + (1 - keep) * (i + 1)
        want[str(i + 1)] = float(i + 1) if with_rival else average
    assert set(result["snapshots"]) == {"2", "4", "6"}
    for name, weights in result["snapshots"].items():
        torch.testing.assert_close(weights["last.bias"], before + want[name])
    torch.testing.assert_close(result["actor"]["net.last.bias"], before + want["6"])
    torch.testing.assert_close(result["actor"]["base.last.bias"], before)


# ------------------------------------------------------------------------------------------------------------
# 7  PPO

def minibatch(actor, n):
    """What ppo_loss eats, made of the actor's own chains; ratios are 1."""
    feature = torch.randn(n, FEATURE)
    with torch.no_grad():
        chain = actor.sample_chain(feature)
        content = dict(feature=feature, chain=chain, logprob=actor.chain_logprob(feature, chain))
        content["advantage"] = torch.randn(n)
        content["anchor"] = actor.sample_chain(feature, frozen=True)
        content["returns"] = torch.randn(n)
        return content


def zero_critic():
    return diwa.mlp([FEATURE, 8, 1], nn.Mish, norm=False)


def test_clip_schedule():
    """epsilon grows exponentially from ft_clip_first at the noisiest step to ft_clip at the last; one link
    gets ft_clip, not NaN."""
    cfg = tiny()
    for links in (2, 3, 10, 20):
        clip = diwa.clip_schedule(cfg, links, "cpu")
        assert clip.shape == (links,) and (clip.diff() > 0).all()
        assert clip[0].item() == pytest.approx(0.001) and clip[-1].item() == pytest.approx(0.01)
    middle = 0.001 + 0.009 * (math.exp(1.5) - 1) / (math.exp(3) - 1)
    assert diwa.clip_schedule(cfg, 3, "cpu")[1].item() == pytest.approx(middle)
    assert diwa.clip_schedule(cfg, 1, "cpu").tolist() == pytest.approx([0.01])


@pytest.mark.parametrize("kind", [
    dict(ft_steps=1),
    dict(ft_steps=10),
    dict(ft_steps=20),
    dict(bc_steps=1, ft_steps=1),
    dict(bc_actor="gaussian"),
    dict(bc_net="unet"),
])
def test_ratio_is_one_before_any_update(kind):
    """The stored log-probs are those of the same net: ratio 1 to the last bit, nothing clipped, kl 0, and
    all gradients finite."""
    cfg = tiny(**kind)
    actor = diwa.build_actor(cfg, FEATURE)
    critic = zero_critic()
    b = minibatch(actor, 6)
    loss, metrics = diwa.ppo_loss(cfg, actor, critic, b)
    left = torch.arange(actor.ft_steps - 1, -1, -1)
    want = -(b["advantage"][:, None] * 0.99 ** left).mean()
    assert b["logprob"].shape == (6, actor.ft_steps)
    assert metrics["kl"] == 0 and metrics["clipped"] == 0
    torch.testing.assert_close(metrics["policy"], want, atol=1e-6, rtol=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in actor.net.parameters())


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("ratio", [0.95, 1.005, 1.3])
def test_ppo_loss_by_hand(advantage, ratio):
    """One row, one link: -min(A r, A clip(r)) + .5 (V - R)^2 + alpha * -log p(anchor)."""
    cfg = tiny(ft_steps=1, ft_bc=0.3, ft_value=0.5)
    actor = diwa.DiffusionActor(cfg, FEATURE)
    critic = zero_critic()
    b = minibatch(actor, 1)
    b["logprob"] = b["logprob"] - math.log(ratio)
    b["advantage"] = torch.tensor([advantage])
    b["returns"] = torch.tensor([3.0])
    loss, metrics = diwa.ppo_loss(cfg, actor, critic, b)
    policy = -min(advantage * ratio, advantage * min(max(ratio, 0.99), 1.01))
    value = (critic(b["feature"]).item() - 3) ** 2
    anchor = -actor.chain_logprob(b["feature"], b["anchor"]).item()
    assert metrics["policy"].item() == pytest.approx(policy, rel=1e-4)
    assert metrics["value"].item() == pytest.approx(value, rel=1e-4)
    assert loss.item() == pytest.approx(policy + 0.5 * value + 0.3 * anchor, rel=1e-4)
    assert metrics["clipped"].item() == (abs(ratio - 1) > 0.01)
    assert metrics["kl"].item() == pytest.approx(ratio - 1 - math.log(ratio), abs=1e-5)


def test_denoising_discount_favours_the_last_step():
    """Step j's advantage is discounted once for each step that is left: gamma^2, gamma, 1 for K' = 3."""
    cfg = tiny(ft_steps=3, ft_gamma_denoise=0.5, ft_clip=0.9, ft_clip_first=0.9, ft_bc=0.0)
    actor = diwa.DiffusionActor(cfg, FEATURE)
    critic = zero_critic()
    b = minibatch(actor, 4)
    b["advantage"] = torch.ones(4)
    for j, discount in enumerate((0.25, 0.5, 1.0)):
        moved = {**b, "logprob": b["logprob"].clone()}
        moved["logprob"][:, j] -= math.log(1.5)
        after = diwa.ppo_loss(cfg, actor, critic, moved)[1]["policy"]
        before = diwa.ppo_loss(cfg, actor, critic, b)[1]["policy"]
        assert (after - before).item() == pytest.approx(-0.5 * discount / 3, rel=1e-4)


def test_noisy_steps_have_the_tighter_clip():
    """A ratio of 1.005 is clipped at the noisiest step and free at the last."""
    cfg = tiny(ft_steps=2, ft_bc=0.0, ft_gamma_denoise=1.0)
    actor = diwa.DiffusionActor(cfg, FEATURE)
    critic = zero_critic()
    b = minibatch(actor, 3)
    b["advantage"] = torch.ones(3)
    b["logprob"] = b["logprob"] - math.log(1.005)
    _, metrics = diwa.ppo_loss(cfg, actor, critic, b)
    assert metrics["policy"].item() == pytest.approx(-(1.001 + 1.005) / 2, abs=2e-5)
    assert metrics["clipped"].item() == pytest.approx(0.5)


def test_anchor_pulls_towards_the_frozen_policy():
    """alpha_BC multiplies the mean negative log-prob of the frozen policy's chains, and its gradient raises
    that log-prob."""
    actor = diwa.DiffusionActor(tiny(), FEATURE)
    critic = zero_critic()
    with torch.no_grad():
        actor.net.last.bias.add_(0.3)
    b = minibatch(actor, 16)
    base = diwa.ppo_loss(tiny(ft_bc=0.0), actor, critic, b)[0]
    with_bc, metrics = diwa.ppo_loss(tiny(ft_bc=0.05), actor, critic, b)
    before = actor.chain_logprob(b["feature"][:4], b["anchor"][:4]).mean()          # a quarter of the 16 rows
    torch.testing.assert_close(with_bc - base, -0.05 * before, atol=1e-5, rtol=1e-4)
    metrics["anchor"].backward()
    with torch.no_grad():
        for p in actor.net.parameters():
            p.sub_(0.02 * p.grad / p.grad.norm().clamp(min=1e-8))
    assert actor.chain_logprob(b["feature"][:4], b["anchor"][:4]).mean() > before


def test_gaussian_actor():
    """The plain actor: one link whose density is Normal(tanh(net), ft_std); acting is the mean, frozen is
    the base net."""
    actor = diwa.build_actor(tiny(bc_actor="gaussian"), FEATURE)
    feature = torch.randn(4, FEATURE)
    chain = actor.sample_chain(feature)
    mean = actor.mean(actor.net, feature)
    assert chain.shape == (4, 2, 4, 7) and torch.equal(actor.act(feature), mean)
    want = Normal(mean, 0.1).log_prob(chain[:, 1]).clamp(-5, 2).mean((1, 2))
    torch.testing.assert_close(actor.chain_logprob(feature, chain)[:, 0], want, atol=1e-5, rtol=1e-4)
    before = actor.sample_chain(feature, explore=False, frozen=True)
    nn.init.zeros_(actor.net[-1].weight)
    nn.init.zeros_(actor.net[-1].bias)
    assert torch.equal(actor.sample_chain(feature, explore=False, frozen=True), before)
    assert (actor.act(feature) == 0).all()


def test_a_gaussian_is_cloned_by_its_mean():
    """Its chunk is tanh(net), learned by the mean square; exploring noise has the std ft_std, within 3."""
    actor = diwa.build_actor(tiny(bc_actor="gaussian"), FEATURE)
    with torch.no_grad():
        actor.net[-1].bias.add_(1.0)                        # no longer the base
    feature = torch.randn(500, FEATURE)
    chunk = torch.rand(500, 4, 7)
    mean = torch.tanh(actor.net(feature)).view(500, 4, 7)
    torch.testing.assert_close(actor.act(feature), mean.detach())
    torch.testing.assert_close(actor.bc_loss(feature, chunk), (mean - chunk).square().mean())
    noise = (actor.sample_chain(feature)[:, 1] - mean) / actor.cfg.ft_std
    assert 2.9 < noise.abs().max() < 3.001 and 0.96 < noise.std() < 1.01


def random_episodes(T=14, B=5):
    """Rewards, values and ends [T, B]; next_value is value[t + 1] except where an episode ends: there the
    true next feature has its own value."""
    g = torch.Generator().manual_seed(3)

    def rand(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    end = rand(T, B) < 0.25
    terminated = end & (rand(T, B) < 0.5)
    value = rand(T, B)
    following = torch.where(end, rand(T, B) + 5, torch.cat([value[1:], rand(1, B)]))
    return rand(T, B), value, following, terminated, end & ~terminated


def test_gae_is_the_brute_force_sum():
    """A_t = sum_l (gamma lambda)^l delta_{t+l} up to the end of the dream; a truncated dream bootstraps from
    its own next feature."""
    reward, value, following, terminated, truncated = random_episodes()
    assert terminated.any() and truncated.any()
    advantage, returns = diwa.gae(reward, value, following, terminated, truncated, 0.9, 0.8)
    T, B = reward.shape
    for e in range(B):
        for t in range(T):
            want = 0
            for l in range(t, T):
                bootstrap = 0 if terminated[l, e] else following[l, e]
                want += (0.9 * 0.8) ** (l - t) * (reward[l, e] + 0.9 * bootstrap - value[l, e])
                if terminated[l, e] or truncated[l, e]:
                    break
            assert advantage[t, e].item() == pytest.approx(float(want), abs=1e-9)
    torch.testing.assert_close(returns, advantage + value)


def test_gae_does_not_leak_across_episodes():
    """Nothing that happens after an end, terminated or truncated, reaches an advantage before it."""
    reward, value, following, _, _ = random_episodes()
    for which in (0, 1):
        ends = [torch.zeros_like(reward, dtype=torch.bool) for _ in range(2)]
        ends[which][6] = True
        a, _ = diwa.gae(reward, value, following, *ends, 0.99, 0.95)
        later = [x.clone() for x in (reward, value, following)]
        for x in later:
            x[7:] += 100
        b, _ = diwa.gae(*later, *ends, 0.99, 0.95)
        assert torch.equal(a[:7], b[:7]) and not torch.equal(a[7:], b[7:])


def test_gae_with_lambda_one_is_the_discounted_return():
    """lambda = 1: returns are discounted rewards plus the bootstrap, whatever the values in between."""
    reward, value, following, _, _ = random_episodes()
    none = torch.zeros_like(reward, dtype=torch.bool)
    following = torch.cat([value[1:], following[-1:]])
    _, returns = diwa.gae(reward, value, following, none, none, 0.9, 1.0)
    want = sum(0.9 ** t * reward[t] for t in range(14)) + 0.9 ** 14 * following[-1]
    torch.testing.assert_close(returns[0], want)


# ------------------------------------------------------------------------------------------------------------
# 3  World model: latents, KL, GRU

@pytest.mark.parametrize("unimix", [0.0, 0.01])
def test_categorical_kl(unimix):
    """KL of independent categoricals with a uniform share mixed in, summed over the latents, against
    torch.distributions."""
    cfg = tiny(wm_latent="categorical", wm_unimix=unimix)
    p, q = torch.randn(2, 3, 20, dtype=torch.float32) * 2
    a, b = (Categorical(probs=(1 - unimix) * x.view(3, 4, 5).softmax(-1) + unimix / 5) for x in (p, q))
    want = kl_divergence(a, b).sum(-1)
    torch.testing.assert_close(diwa.kl_divergence(p, q, cfg), want, atol=1e-5, rtol=1e-4)


def test_unimix_bounds_the_probabilities():
    """However extreme the logits, each class keeps its uniform share, so the KL stays finite."""
    cfg = tiny(wm_latent="categorical", wm_unimix=0.01)
    probs = diwa.log_probs(torch.tensor([500.0, 0, 0, 0, -500]).repeat(4), cfg).exp()
    assert probs.min().item() == pytest.approx(0.002, rel=1e-4)
    assert torch.allclose(probs.sum(-1), torch.ones(4))


def test_gaussian_kl():
    """KL of diagonal Gaussians, std = softplus(raw) + 0.1, against torch.distributions."""
    p, q = torch.randn(2, 3, 8)
    a, b = (Normal(x[:, :4], F.softplus(x[:, 4:]) + 0.1) for x in (p, q))
    want = kl_divergence(a, b).sum(-1)
    torch.testing.assert_close(diwa.kl_divergence(p, q, tiny()), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("latent, size", [("categorical", 20), ("gaussian", 8)])
@pytest.mark.parametrize("balance", [0.0, 0.5, 0.8, 1.0])
def test_balanced_kl(latent, size, balance):
    """Balancing changes no value; it gives `balance` of the gradient to the prior and the rest to the
    posterior."""
    cfg = tiny(wm_latent=latent, wm_balance=balance)
    post = torch.randn(3, size, requires_grad=True)
    prior = torch.randn(3, size, requires_grad=True)
    plain = diwa.kl_divergence(post, prior, cfg)
    balanced = diwa.balanced_kl(post, prior, cfg)
    torch.testing.assert_close(balanced, plain)
    full, got = (torch.autograd.grad(x.sum(), (post, prior)) for x in (plain, balanced))
    torch.testing.assert_close(got[0], (1 - balance) * full[0], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(got[1], balance * full[1], atol=1e-6, rtol=1e-4)


def test_free_nats():
    """Below the free nats an element counts as the floor and pulls at nothing; above, the KL is untouched."""
    cfg = tiny(wm_free=1.0)
    post = torch.randn(2, 8)
    prior = post.clone()
    prior[1] += 5
    post.requires_grad_()
    prior.requires_grad_()
    kl = diwa.balanced_kl(post, prior, cfg)
    assert kl[0].item() == pytest.approx(1.0)
    assert kl[1].item() == pytest.approx(diwa.kl_divergence(post, prior, cfg)[1].item())
    kl.sum().backward()
    assert (post.grad[0] == 0).all() and (prior.grad[0] == 0).all() and (prior.grad[1] != 0).any()


def test_straight_through():
    """Forward a one-hot; backward the softmax's Jacobian, p (w - <p, w>), whichever class was drawn."""
    cfg = tiny(wm_latent="categorical", wm_unimix=0.0)
    w = torch.randn(2, 4, 5)
    logits = torch.randn(2, 20, requires_grad=True)
    z = diwa.sample_latent(logits, cfg)
    assert z.shape == (2, 20)
    one_hot = torch.tensor([0.0, 0, 0, 0, 1]).expand(2, 4, 5)
    torch.testing.assert_close(z.detach().view(2, 4, 5).sort(-1).values, one_hot, atol=1e-6, rtol=0)
    (z.view(2, 4, 5) * w).sum().backward()
    p = logits.detach().view(2, 4, 5).softmax(-1)
    want = p * (w - (p * w).sum(-1, keepdim=True))
    torch.testing.assert_close(logits.grad.view(2, 4, 5), want, atol=1e-6, rtol=1e-4)


def test_latent_samples_follow_their_distribution():
    """Drawn classes have the stated probabilities; Gaussian latents the stated mean and std, and they are
    reparametrised."""
    cfg = tiny(wm_latent="categorical", wm_z=1)
    logits = torch.tensor([0.0, 1, 2, 3, -1])
    share = diwa.sample_latent(logits.expand(20_000, 5), cfg).mean(0)
    torch.testing.assert_close(share, diwa.log_probs(logits, cfg).exp()[0], atol=0.015, rtol=0)
    stats = torch.tensor([1.0, -2, 0, 1]).requires_grad_()
    z = diwa.sample_latent(stats.expand(20_000, 4), tiny(wm_z=2))
    mean, std = diwa.mean_std(stats)
    torch.testing.assert_close(z.mean(0), mean, atol=0.05, rtol=0)
    torch.testing.assert_close(z.std(0), std, atol=0.05, rtol=0)
    assert torch.autograd.grad(z.mean(), stats)[0][:2].tolist() == pytest.approx([0.5, 0.5], abs=1e-3)


@pytest.mark.parametrize("uniform, drawn", [(0.0, 1), (1 - 2 ** -24, 3)])
def test_impossible_classes_are_never_drawn(uniform, drawn, monkeypatch):
    """Whatever the uniform number is, from its least to its greatest."""
    monkeypatch.setattr(torch, "rand_like", lambda p: torch.full_like(p, uniform))
    cfg = tiny(wm_latent="categorical", wm_z=1, wm_unimix=0.0)
    assert diwa.sample_latent(torch.tensor([-500.0, 0, 0, 0, -500]), cfg).argmax() == drawn


def test_impossible_classes_are_no_nan():
    """Without unimix a class may have probability 0 in float32; the KL must stay finite."""
    cfg = tiny(wm_latent="categorical", wm_unimix=0.0)
    p = torch.zeros(2, 20)
    q = torch.zeros(2, 20)
    p[:, ::5] = 500.0
    q[:, 1::5] = 500.0
    assert diwa.kl_divergence(p, q, cfg).isfinite().all() and diwa.log_probs(p, cfg).isfinite().all()


def test_the_first_transposed_convolution_is_a_matrix():
    """DreamerV2's decoder begins with one pixel; given its weights, Linear makes of it the same 5 x 5."""
    cfg = tiny(wm_encoder="conv", wm_depth=4)
    camera = diwa.ConvDecoder(cfg, 10).static
    pixel = camera[0](torch.randn(3, 10))                                                 # [3, 32 * 4]
    dreamers = nn.ConvTranspose2d(32 * 4, 4 * 4, 5, 2)
    with torch.no_grad():
        camera[1].weight.copy_(dreamers.weight.flatten(1).T)
        camera[1].bias.copy_(dreamers.bias.repeat_interleave(25))
    torch.testing.assert_close(camera[3](camera[1](pixel)), dreamers(pixel[..., None, None]))


def test_norm_gru_formula():
    """One LayerNorm over all three gates, input order [x, h], gates in the order reset, candidate, update,
    and an update bias of -1."""
    gru = diwa.NormGRU(3, 4)
    x = torch.randn(5, 3)
    h = torch.randn(5, 4)
    with torch.no_grad():
        gru.norm.weight.normal_()
        gru.norm.bias.normal_()
        got = gru(x, h).numpy()
    pre = np.concatenate([x, h], 1) @ gru.linear.weight.detach().numpy().T
    pre = (pre - pre.mean(1, keepdims=True)) / np.sqrt(pre.var(1, keepdims=True) + 1e-3)
    pre = pre * gru.norm.weight.detach().numpy() + gru.norm.bias.detach().numpy()

    def sigmoid(v):
        return 1 / (1 + np.exp(-v))

    reset = sigmoid(pre[:, :4])
    candidate = pre[:, 4:8]
    update = sigmoid(pre[:, 8:] - 1)
    np.testing.assert_allclose(got, update * np.tanh(reset * candidate) + (1 - update) * h.numpy(), atol=1e-5)


def test_world_model_loss_is_the_stated_sum():
    """image + .3 KL + proprio weight * pose + state weight * state, and the same likelihood again for dreamed
    frames; each part finite; what weighs nothing has no head and is not reckoned."""
    for changes in (dict(wm_open=0.0), dict(wm_open=0.7, wm_proprio=3.0), dict(wm_open=0.7, wm_state=5.0),
                    dict(wm_open=0.0, wm_state=5.0), dict(wm_open=0.0, wm_inverse=2.0),
                    dict(wm_open=0.7, wm_proprio=0.0)):
        cfg = tiny(**changes)
        wm = diwa.WorldModel(cfg)
        loss, m = diwa.world_model_loss(wm, observations(cfg), cfg)
        want = m["image"] + 0.3 * m["kl"] + cfg.wm_proprio * m.get("pose", 0)
        want = want + cfg.wm_state * m.get("state", 0)
        want = want + cfg.wm_inverse * m.get("inverse", 0)
        if cfg.wm_open:
            told = cfg.wm_proprio * m.get("open_pose", 0) + cfg.wm_state * m.get("open_state", 0)
            want = want + 0.7 * (m["open_image"] + told)
        torch.testing.assert_close(loss, want)
        assert loss.isfinite() and ("open_image" in m) == bool(cfg.wm_open)
        assert ("state" in m) == bool(cfg.wm_state) and ("inverse" in m) == bool(cfg.wm_inverse)
        assert ("pose" in m) == bool(cfg.wm_proprio) == (wm.pose_head is not None)
        assert ("open_pose" in m) == bool(cfg.wm_open and cfg.wm_proprio)


def test_bfloat16_is_asked_for_and_nearly_the_same(monkeypatch):
    """wm_bf16: the same loss to a percent, weights and gradients in float32; only where the CPU has it."""
    cfg = tiny()
    wm = diwa.WorldModel(cfg).eval()
    batch = observations(cfg)
    losses = []
    for wanted in (0, 1):
        torch.manual_seed(0)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
        cfg.wm_bf16 = wanted
        with runs.half_precision(cfg, "cpu"):
            half = wm.fuse(torch.randn(1, wm.codec.size)).dtype == torch.bfloat16
            assert half == bool(wanted)
            losses.append(diwa.world_model_loss(wm, batch, cfg)[0])
    assert losses[0] != losses[1] and losses[1].dtype == torch.float32
    torch.testing.assert_close(*losses, rtol=0.01, atol=0)
    losses[1].backward()
    assert {p.grad.dtype for p in wm.parameters() if p.grad is not None} == {torch.float32}
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert not runs.has_bfloat16("cpu")
    with runs.half_precision(cfg, "cpu"):
        assert wm.fuse(torch.randn(1, wm.codec.size)).dtype == torch.float32


@pytest.mark.parametrize("wanted", [0, 1])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_half_precision_is_one_flag_on_both_kinds_of_device(monkeypatch, wanted, device):
    """wm_bf16 0 is float32 on a GPU, too; and a block for the one device does nothing on the other."""
    monkeypatch.setattr(runs, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype, enabled: (kind, dtype, enabled))
    cfg = tiny(device=device, wm_bf16=wanted)
    for kind in ("cpu", "cuda"):
        on = bool(wanted and kind == device)
        assert runs.half_precision(cfg, kind) == (kind, torch.bfloat16, on)


def test_convolutions_are_in_half_precision_on_a_gpu(monkeypatch):
    """Both cameras of the encoder, and the decoder, ask for it."""
    cfg = tiny(wm_encoder="conv")
    asked = []
    half = diwa.half_precision

    def noted(cfg, kind):
        asked.append(kind)
        return half(cfg, kind)

    monkeypatch.setattr(diwa, "half_precision", noted)
    wm = diwa.WorldModel(cfg)
    wm.embed(observations(cfg))
    assert asked == ["cuda"] * 2
    wm.decoder(torch.randn(2, wm.feature_size))
    assert asked == ["cuda"] * 3


@pytest.mark.parametrize("latent", ["gaussian", "categorical"])
def test_dreams_are_as_exact_as_the_training(monkeypatch, latent):
    """wm_bf16: a dreamed step is bfloat16's where training is; the command and what is kept of the memory
    stay float32."""
    cfg = tiny(wm_latent=latent)
    wm = world(cfg)
    env = dream(cfg, wm)
    env.reset()
    action = torch.rand(cfg.ft_dreams, 1, 7) * 2 - 1
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    seen = []
    wm.prior.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    new = []
    for wanted in (0, 1):
        cfg.wm_bf16 = wanted
        torch.manual_seed(0)
        new.append(diwa.dream_step(wm, env.state, action))
    assert seen == [torch.float32, torch.bfloat16]
    assert not torch.equal(new[0]["h"], new[1]["h"])
    torch.testing.assert_close(new[0]["h"], new[1]["h"], rtol=0, atol=0.02)
    for key in ("command", "target"):
        assert torch.equal(new[0][key], new[1][key])
    assert {value.dtype for value in new[1].values()} == {torch.float32}


@pytest.mark.parametrize("wanted", [0, 1])
@pytest.mark.parametrize("latent", ["gaussian", "categorical"])
def test_a_dream_casts_its_matrices_once(monkeypatch, latent, wanted):
    """The cell and the prior of a dream are bfloat16 beforehand, not at each step: the same numbers, and the
    model that the robot watches with stays as it is."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    cfg = tiny(wm_latent=latent, wm_bf16=wanted)
    wm = world(cfg)
    env = dream(cfg, wm)
    half = torch.bfloat16 if wanted else torch.float32
    matrices = (env.wm.from_z, env.wm.from_action, env.wm.gru.linear, env.wm.prior[0], env.wm.prior[-1])
    assert {layer.weight.dtype for layer in matrices} == {half}
    assert {p.dtype for p in (*wm.parameters(), *env.wm.pose_head.parameters())} == {torch.float32}
    chunk = torch.rand(cfg.ft_dreams, cfg.bc_chunk, 7) * 2 - 1
    seen = []
    for dreamer in (env.wm, wm):                            # the second casts at each step
        env.wm = dreamer
        torch.manual_seed(1)
        env.reset()
        seen.append([env.step(chunk)[0] for _ in range(3)])
    torch.testing.assert_close(*seen, rtol=0, atol=0)


def test_an_action_is_guessed_from_two_pictures():
    """WAM's term: the mean absolute error of what the head says of two consecutive embeddings, without the
    proprioception in them, against the actions between the two."""
    cfg = tiny(wm_inverse=1.0, wm_stride=2, wm_open=0.0)
    wm = diwa.WorldModel(cfg).eval()                        # without noise
    batch = observations(cfg, B=5)
    pixels = wm.embed(batch)[..., :cfg.wm_embed]
    want = []
    for t in range(1, batch["action"].shape[1]):
        guess = wm.inverse_head(torch.cat([pixels[:, t - 1], pixels[:, t]], -1))
        want.append((guess - batch["action"][:, t]).abs().mean())
    for _ in range(2):
        _, metrics = diwa.world_model_loss(wm, batch, cfg)
        torch.testing.assert_close(metrics["inverse"], torch.stack(want).mean())
        batch["proprio"] = torch.randn_like(batch["proprio"])


def test_the_scene_state_is_read_from_the_features():
    """The hybrid model: a head learns slider, drawer, button, switch and lamps, about unit scale, watched and
    dreamed; without it the model knows no such thing."""
    cfg, wm, dataset, rec = recorded(wm_state=5.0)
    scene = torch.from_numpy(np.array(dataset["scene_obs"]))
    torch.testing.assert_close(rec.batch(np.arange(9))["state"], scene[:9, :6] / data.STATE_SCALE)
    batch = observations(cfg, B=5)
    feature = torch.randn(5, 6, wm.feature_size)
    wm.rollout = lambda *a: (feature, (torch.zeros(5, 6, 8), torch.zeros(5, 6, 8)), 2 * feature)
    _, metrics = diwa.world_model_loss(wm, batch, cfg)
    error = 0.5 * (wm.state_head(feature) - batch["state"]).square().sum(-1)
    torch.testing.assert_close(metrics["state"], error.mean())
    assert diwa.WorldModel(tiny(wm_state=0.0)).state_head is None


def test_what_the_heads_ask_for_is_learned_below_them():
    """The state shapes the memory, and the guessed action the encoder."""
    cfg = tiny(wm_state=5.0, wm_inverse=1.0)
    wm = diwa.WorldModel(cfg).eval()
    _, metrics = diwa.world_model_loss(wm, observations(cfg, B=5), cfg)
    for name, weight in (("state", wm.gru.linear.weight), ("inverse", wm.fuse[0].weight)):
        (gradient,) = torch.autograd.grad(metrics[name], weight, retain_graph=True)
        assert gradient.abs().sum() > 0, name


def test_travel_is_about_unit_scale():
    """A fixture's whole way, in the units of its loss, is between one and four."""
    from calvin_sim import TASKS, sample_start
    rng = np.random.default_rng(0)
    scenes = [sample_start(task, rng)[1] for task in TASKS for _ in range(40)]
    way = np.ptp(np.array(scenes)[:, [0, 1, 3, 4, 5]], 0) / data.STATE_SCALE.numpy()[[0, 1, 3, 4, 5]]
    assert ((way > 1) & (way < 4)).all(), way


def test_short_windows_dream_at_least_their_last_frame():
    """--wm_context may exceed --wm_length: something must be left to dream, or the open-loop loss is 0 /
    0."""
    torch.manual_seed(0)
    cfg = tiny(wm_context=5)
    wm = world(cfg)
    batch = {k: v[:, :2] for k, v in observations(cfg, B=3).items()}
    for _ in range(5):
        assert diwa.world_model_loss(wm, batch, cfg)[0].isfinite()


def test_open_loop_loss_counts_dreamed_frames_only():
    """The open-loop terms average over the frames from `context` on, row by row, and over no watched one."""
    cfg = tiny(wm_decode=1.0, wm_context=4, wm_state=5.0)
    wm = world(cfg)
    batch = observations(cfg, B=5)
    seen = {}
    rollout = wm.rollout

    def noted(*args):
        seen.update(context=args[3], out=rollout(*args))
        return seen["out"]

    wm.rollout = noted
    _, metrics = diwa.world_model_loss(wm, batch, cfg)
    dreamed = seen["out"][2]
    pairs = [(i, t) for i, n in enumerate(seen["context"]) for t in range(n, 6)]
    image = wm.image_error(dreamed, batch)
    pose = 0.5 * (wm.proprio(dreamed) - batch["proprio"]).square().sum(-1)
    state = 0.5 * (wm.state_head(dreamed) - batch["state"]).square().sum(-1)
    assert 1 <= seen["context"].min() < seen["context"].max() <= 4
    for name, error in (("open_image", image), ("open_pose", pose), ("open_state", state)):
        torch.testing.assert_close(metrics[name], torch.stack([error[p] for p in pairs]).mean())


def test_a_short_windows_dream_waits_at_its_end(no_noise):
    """Windows of several lengths in one batch: each ends as it does alone, and is not dreamed on past its
    last frame."""
    from types import SimpleNamespace
    wm = world(tiny())
    sizes = dict(action=7, command=7, proprio=15, state=6, codes=wm.codec.size)
    every = {name: torch.randn(20, size) for name, size in sizes.items()}
    made_up = SimpleNamespace(batch=lambda frames: {k: v[torch.from_numpy(frames)] for k, v in every.items()})
    seen, dreamed, frames = wm.watch_and_dream(made_up, np.array([0, 9]), 8, np.array([4, 16]))
    alone = wm.watch_and_dream(made_up, np.array([0]), 5)
    assert frames[0].tolist() == [0, 1, 2, 3, 4, 4, 4, 4]
    for together, single in zip((seen, dreamed), alone):
        assert torch.allclose(together[0, :5], single[0], atol=1e-5)
        assert torch.equal(together[0, 4:], together[0, 4:5].expand(4, -1))
        assert not torch.equal(together[1, 6], together[1, 7])


def test_a_stride_skips_frames_and_stays_inside(no_noise):
    """Windows of every second frame, each ending on the last such frame of its episode."""
    cfg, wm, dataset, rec = recorded(wm_stride=2)
    seen, dreamed, frames = wm.eval().watch_and_dream(rec, np.array([2, 21]), 8, np.array([7, 27]))
    assert frames.tolist() == [[2, 4, 6, 6], [21, 23, 25, 27]]
    assert seen.shape == dreamed.shape == (2, 4, wm.feature_size)
    assert torch.equal(dreamed[0, 2], dreamed[0, 3]) and not torch.equal(dreamed[1, 2], dreamed[1, 3])


@pytest.mark.parametrize("encoder", ["conv", "linear"])
def test_image_error_is_summed(encoder):
    """Half the squared error summed over channels and pixels, or codes; averaged, the KL weight would mean
    something else.  The gripper camera has
    its own weight."""
    cfg = tiny(wm_encoder=encoder, wm_gripper=0.3)
    wm = world(cfg)
    batch = observations(cfg)
    feature = torch.randn(2, 6, wm.feature_size)
    if encoder == "conv":
        truth = [batch[key].float() / 127.5 - 1 for key in ("rgb_static", "rgb_gripper")]
        static, gripper = (((i - t) ** 2).flatten(2) for i, t in zip(wm.decoder(feature), truth))
        assert static.shape == gripper.shape == (2, 6, 64 * 64 * 3)
    else:
        static, gripper = ((wm.decoder(feature) - batch["codes"]) ** 2).split([8, 4], -1)
    torch.testing.assert_close(wm.image_error(feature, batch), 0.5 * (static.sum(-1) + 0.3 * gripper.sum(-1)))


def moving_dot(n, size=16):
    """u8 frames [n, S, S, 3] of a bright square that walks to the right, one pixel a frame."""
    frames = torch.zeros(n, size, size, 3, dtype=torch.uint8)
    for t in range(n):
        frames[t, 5:9, [(t + k) % size for k in range(4)]] = 200
    return frames


def test_linear_codec_is_an_autoencoder():
    """Principal components: decode(encode(x)) = x where the frames span few directions, and code distances
    are image distances."""
    codec = diwa.LinearCodec(tiny(image_size=16, wm_codes=40))
    frames = moving_dot(48)
    for name in ("static", "gripper"):
        codec.fit_camera(name, frames)
    codes = codec.encode(frames, frames)
    assert codes.shape == (48, 60) and codec.size == 60
    x = frames.float() / 127.5 - 1
    for image in codec.decode(codes):
        torch.testing.assert_close(image, x, atol=1e-3, rtol=0)
    distance = (codes[0] - codes[5]).square().sum()
    torch.testing.assert_close(distance, 2 * (x[0] - x[5]).square().sum(), atol=1e-2, rtol=1e-4)
    assert codec.whiten(codes).isfinite().all()


def test_frames_are_encoded_in_pieces():
    """More frames than are taken at once, windows of them and a single one have the codes that they have one
    by one."""
    codec = diwa.LinearCodec(tiny(image_size=16, wm_codes=40))
    frames = torch.randint(0, 255, (2, 150, 16, 16, 3), dtype=torch.uint8)
    assert frames[..., 0, 0, 0].numel() > linear.AT_ONCE
    for name in ("static", "gripper"):
        codec.fit_camera(name, frames.flatten(0, 1))
    codes = codec.encode(frames, frames.flip(1))
    for i, t in ((0, 0), (1, 100), (1, 149)):
        alone = codec.encode(frames[i, t], frames.flip(1)[i, t])
        torch.testing.assert_close(codes[i, t], alone, atol=1e-4, rtol=1e-4)
    assert codes.shape == (2, 150, 60) and alone.shape == (60,)


def test_components_are_fitted_without_held_out_frames():
    """The PCA sees no frame of the episodes that judge: those are white here, and the mean stays black."""
    from types import SimpleNamespace
    codec = diwa.LinearCodec(tiny(image_size=16, wm_codes=8))
    frames = moving_dot(40).numpy()
    frames[20:30] = 255
    split = np.array([[0, 19], [30, 39]]), np.array([[20, 29]])

    class Recorded(SimpleNamespace):
        def __getitem__(self, name):
            return frames

    codec.fit(Recorded(split=lambda: split), 0)
    seen = np.concatenate([frames[:20], frames[30:]]).reshape(30, -1) / 127.5 - 1
    np.testing.assert_allclose(codec.static_mean.numpy(), seen.mean(0), atol=1e-5)


def test_a_camera_that_shows_nothing_is_no_nan():
    """A robot without a gripper camera gives black frames: their codes have no spread, and a network's input
    stays finite."""
    codec = diwa.LinearCodec(tiny(image_size=16, wm_codes=40))
    frames = moving_dot(48)
    codec.fit_camera("static", frames)
    codec.fit_camera("gripper", torch.zeros_like(frames))
    codes = codec.encode(frames, torch.zeros_like(frames))
    assert (codec.gripper_std == 0).all() and codec.whiten(codes).isfinite().all()


# ------------------------------------------------------------------------------------------------------------
# 5  Reward

@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_nt_xent_brute_force(tau):
    """Supervised contrastive loss, written as the double loop of the paper: the anchor is in neither sum."""
    e = torch.randn(9, 5, dtype=torch.float64)  # class 2 has no partner
    label = torch.tensor([0, 0, 1, 1, 1, 0, 1, 0, 2])
    z = F.normalize(e, dim=-1)
    total = 0.0
    for i in range(9):
        others = [j for j in range(9) if j != i]
        partners = [j for j in others if label[j] == label[i]]
        below = sum(math.exp(z[i] @ z[j] / tau) for j in others)
        if partners:
            total -= sum(math.log(math.exp(z[i] @ z[j] / tau) / below) for j in partners) / len(partners)
    assert diwa.nt_xent(e, label, tau).item() == pytest.approx(total / 9, abs=1e-6)


def test_classifier_loss_and_verdict():
    """NT-Xent + .5 weighted cross-entropy; success is 1.0 exactly where class 1 wins; the verdict rests on
    the first feature and the change."""
    cfg = tiny()
    model = diwa.Classifier(cfg, FEATURE)
    first = torch.randn(8, FEATURE)
    feature = torch.randn(8, FEATURE)
    label = torch.arange(8) % 2
    weight = torch.rand(8)
    embedding, logits = model(first, feature)
    loss, _ = diwa.classifier_loss(model, first, feature, label, weight, cfg)
    entropy = (F.cross_entropy(logits, label, reduction="none") * weight).sum() / weight.sum()
    torch.testing.assert_close(loss, diwa.nt_xent(embedding, label, 0.5) + 0.5 * entropy)
    assert torch.equal(model.success(first, feature), (logits[:, 1] > logits[:, 0]).float())
    assert (model(first + 1, feature + 1)[1] - logits).abs().max() > 1e-3
    with torch.no_grad():
        model.embedding[0].weight[:, :FEATURE] = 0                    # blind to the first: the change is left
    moved = model(first + 1, feature + 1)[1]
    torch.testing.assert_close(moved, model(first, feature)[1], atol=1e-4, rtol=1e-4)


def test_what_succeeds_elsewhere_is_not_paid():
    """Strict labels: of the three classes the second alone is a success."""
    model = diwa.Classifier(tiny(reward_labels="strict"), FEATURE)
    nn.init.zeros_(model.head.weight)
    for winner, paid in ((0, 0.0), (1, 1.0), (2, 0.0)):
        model.head.bias.data = F.one_hot(torch.tensor(winner), 3).float()
        assert (model.success(torch.randn(4, FEATURE), torch.randn(4, FEATURE)) == paid).all()


# ------------------------------------------------------------------------------------------------------------
# Actions and poses

def test_executed_clips_and_binarises():
    """The arm gets motions in [-1, 1] and a gripper of -1 or +1, as the simulator does; 0 opens."""
    a = torch.tensor([[3.0, -3, 0.5, 0, 0, 0, 0.01], [0, 0, 0, 1.5, -1.5, 0.2, -0.01], [0] * 7])
    want = torch.tensor([[1.0, -1, 0.5, 0, 0, 0, 1], [0, 0, 0, 1, -1, 0.2, -1], [0, 0, 0, 0, 0, 0, 1]])
    assert torch.equal(diwa.executed(a), want) and a[0, 0] == 3


def test_pose_code_has_no_jump_and_an_inverse():
    """Roll lies near +-pi, where Euler angles jump: the code must not; and decoding gives the same
    orientation back."""
    pose = data.HOME_POSE.repeat(2, 1)
    pose[:, 3] = torch.tensor([math.pi - 1e-3, -math.pi + 1e-3])
    a, b = data.encode_pose(pose)
    assert (a - b).abs().max() < 0.01
    width = torch.tensor([0.4, 0.4, 0.4, 2, 2, 2])
    pose = data.HOME_POSE + torch.rand(50, 6) * width - width / 2
    back = data.decode_pose(data.encode_pose(pose))
    torch.testing.assert_close(back[:, :3], pose[:, :3])
    torch.testing.assert_close(torch.cos(back[:, 3:] - pose[:, 3:]), torch.ones(50, 3))
    assert data.encode_pose(data.HOME_POSE).abs().max() < 1e-6


def test_proprio_code_keeps_every_number():
    """Each of the 15 numbers of robot_obs moves its own slot of the code and no other, and home is near
    zero."""
    obs = torch.cat([data.HOME_POSE, torch.tensor([0.04]), data.HOME_JOINTS, torch.tensor([1.0])])
    code = data.encode_proprio(obs)
    assert code.shape == (15,) and code[:14].abs().max() < 1e-5 and code[14] == 1
    for i in range(15):
        other = obs.clone()
        other[i] += 0.01
        assert (data.encode_proprio(other) - code).abs().gt(1e-4).nonzero().flatten().tolist() == [i]


def robot_walk(n, rng):
    """robot_obs [n, 15] of an arm that wanders about home, its roll on both sides of pi."""
    robot = np.zeros((n, 15), np.float32)
    robot[:, :6] = data.HOME_POSE.numpy() + rng.normal(size=(n, 6)) * 0.02
    robot[:, 3] = (robot[:, 3] + np.pi) % (2 * np.pi) - np.pi
    robot[:, 6] = 0.04
    robot[:, 14] = rng.choice([-1, 1], n)
    robot[:, 7:14] = data.HOME_JOINTS.numpy()
    return robot


@pytest.mark.parametrize("lead", [True, False])
def test_commanded_targets_step_by_step(lead):
    """The vectorised integration of commands is the simulator's own advance_target, one step after the
    other, episode by episode."""
    rng = np.random.default_rng(0)
    robot = robot_walk(30, rng)
    actions = rng.uniform(-1, 1, (30, 7)).astype(np.float32)
    episodes = np.array([[0, 11], [12, 12], [13, 29]])
    got = data.commanded_targets(robot, actions, episodes, lead)
    for a, b in episodes:
        target = robot[a, :6]
        for t in range(a, b + 1):
            np.testing.assert_allclose(got[t], target, atol=1e-6)
            target = calvin_sim.advance_target(target if lead else robot[t, :6], actions[t], robot[t, :6])


def test_advance_target_is_one_code_path():
    """numpy and torch integrate alike; a free arm moves 20 mm a unit; a blocked one does not wind up; inputs
    stay untouched."""
    rng = np.random.default_rng(1)
    target = robot_walk(8, rng)[:, :6]
    action = rng.uniform(-1, 1, (8, 7)).astype(np.float32)
    tcp = robot_walk(8, rng)[:, :6]
    kept = target.copy()
    got = calvin_sim.advance_target(*(torch.from_numpy(x) for x in (target, action, tcp)))
    np.testing.assert_allclose(got, calvin_sim.advance_target(target, action, tcp), atol=1e-6)
    assert np.array_equal(target, kept)
    free = calvin_sim.advance_target(np.zeros(6), np.array([1.0, 0, 0, 0, 0, 1, 0]), np.zeros(6))
    np.testing.assert_allclose(free, [0.02, 0, 0, 0, 0, 0.05])
    blocked = np.zeros(6)
    for _ in range(100):
        blocked = calvin_sim.advance_target(blocked, np.ones(7), np.zeros(6))
    np.testing.assert_allclose(blocked, [calvin_sim.WINDUP_POS] * 3 + [calvin_sim.WINDUP_ORN] * 3)


# ------------------------------------------------------------------------------------------------------------
# Alignment: step t consumes the action executed before frame t

@pytest.mark.parametrize("latent", ["gaussian", "categorical"])
@pytest.mark.parametrize("which", ["action", "command"])
def test_rollout_is_causal(latent, which):
    """action[t] and command[t] reach the features from t on and never before: reconstruction would forgive a
    shift, dreams would not."""
    cfg = tiny(wm_latent=latent)
    wm = world(cfg)
    embedding, action, command = sequence(cfg, wm)
    def run():
        torch.manual_seed(1)
        seen, _, dreamed = wm.rollout(embedding, action, command, torch.tensor([1, 2, 3]))
        return seen[..., :-7], dreamed[..., :-7]                                            # h and z
    before = run()
    (action if which == "action" else command)[:, 3] += 2
    for a, b in zip(before, run()):
        assert torch.equal(a[:, :3], b[:, :3])
        assert (a[:, 3] - b[:, 3]).abs().amax(-1).min() > 1e-4                            # every row, at once


def test_noise_only_while_learning(monkeypatch):
    """Codes and commands get wm_noise and actions three times as much, fresh at each step, and only in
    training; the features hold the clean command."""
    cfg, wm, _, rec = recorded(wm_noise=0.05)
    batch = rec.batch(np.tile(np.arange(0, 20), (40, 1)))
    told = []
    hear = wm.moved

    def noted(action, command):
        told.append((action, command))
        return hear(action, command)

    monkeypatch.setattr(wm, "moved", noted)
    for learning in (True, False):
        wm.train(learning)
        feature, _, _ = wm.rollout(wm.embed(batch), batch["action"], batch["command"])
        assert torch.equal(feature[..., -7:], batch["command"][..., -7:])
        assert torch.equal(wm.embed(batch), wm.embed(batch)) == (not learning)
    for noisy, clean, key, std in zip(told[0], told[1], ("action", "command"), (0.15, 0.05)):
        assert torch.equal(clean, batch[key]) and abs((noisy - batch[key]).std() / std - 1) < 0.03
        assert abs((noisy - batch[key]).mean(1).std() * 20 ** 0.5 / std - 1) < 0.1


@pytest.mark.parametrize("stride", [1, 2])
def test_rollout_by_hand(no_noise, stride):
    """h_t = GRU(h_{t-1}, [z_{t-1}, a_t, c_t]) from zero; z_t from the posterior while watching, from the
    prior once the eyes are closed."""
    cfg = tiny(wm_stride=stride)
    wm = world(cfg)
    embedding, action, command = sequence(cfg, wm, B=1)
    seen, (post, prior), dreamed = wm.rollout(embedding, action, command, torch.tensor([2]))
    for blind, features in ((99, seen), (2, dreamed)):
        h = torch.zeros(1, cfg.wm_h)
        z = torch.zeros(1, cfg.wm_z)
        for t in range(6):
            h = wm.step(h, z, action[:, t], command[:, t])
            stats = wm.prior(h) if t >= blind else wm.posterior(h, embedding[:, t])
            z = stats[:, :cfg.wm_z]
            torch.testing.assert_close(features[:, t], torch.cat([h, z, command[:, t, -7:]], -1))
            if blind == 99:
                torch.testing.assert_close(post[:, t], stats)
                torch.testing.assert_close(prior[:, t], wm.prior(h))


@pytest.mark.parametrize("latent", ["gaussian", "categorical"])
def test_the_dreaming_stream_closes_its_eyes(latent):
    """It equals the watching stream while t < context, then no frame can reach it; row by row, because
    contexts differ."""
    cfg = tiny(wm_latent=latent)
    wm = world(cfg)
    embedding, action, command = sequence(cfg, wm)
    context = torch.tensor([1, 3, 5])
    def run(e):
        torch.manual_seed(1)
        seen, _, dreamed = wm.rollout(e, action, command, context)
        return seen, dreamed
    seen, dreamed = run(embedding)
    late = embedding.clone()
    early = embedding.clone()
    for i, n in enumerate(context):
        assert torch.equal(seen[i, :n], dreamed[i, :n]) and (seen[i, n:] - dreamed[i, n:]).abs().max() > 1e-3
        late[i, n:] += 3
        early[i, n - 1] += 3
    seen2, dreamed2 = run(late)
    assert torch.equal(dreamed2, dreamed) and not torch.equal(seen2, seen)
    seen3, dreamed3 = run(early)
    for i, n in enumerate(context):
        assert torch.equal(dreamed3[i, :n - 1], dreamed[i, :n - 1])
        assert torch.equal(dreamed3[i, n - 1], seen3[i, n - 1])
    assert not torch.equal(dreamed3, dreamed)               # the last watched frame does count


class FakeDataset:
    """A recording in memory, with what Recording asks of a Dataset."""

    def __init__(self, episodes, source="test", size=16):
        self.meta = dict(source=source)
        rng = np.random.default_rng(0)
        n = episodes[-1][1] + 1
        self.episodes = np.array(episodes)
        self.segments = []
        actions = rng.uniform(-1, 1, (n, 7)).astype(np.float32)
        actions[:, 6] = np.sign(actions[:, 6])
        self.arrays = dict(
            robot_obs=robot_walk(n, rng),
            rel_actions=actions,
            scene_obs=np.zeros((n, 24), np.float32),
            rgb_static=moving_dot(n, size).numpy(),
            rgb_gripper=moving_dot(n, size).numpy()[::-1].copy(),
        )

    def __getitem__(self, key):
        return self.arrays[key]

    def __len__(self):
        return len(self.arrays["robot_obs"])


def recorded(source="test", **changes):
    cfg = tiny(image_size=16, wm_codes=12, **changes)
    wm = diwa.WorldModel(cfg)
    dataset = FakeDataset([(0, 19), (20, 44)], source)
    for name in ("static", "gripper"):
        wm.codec.fit_camera(name, torch.from_numpy(dataset[f"rgb_{name}"]))
    return cfg, wm, dataset, data.Recording(cfg, dataset, wm)


def test_recording_shifts_actions_by_one():
    """A window's action[t] is the one given at frame t - 1; the first is erased, as nothing came before;
    episodes do not touch."""
    cfg, wm, dataset, rec = recorded()
    batch = rec.batch(np.arange(3, 9)[None])
    assert (batch["action"][0, 0] == 0).all()
    np.testing.assert_array_equal(batch["action"][0, 1:], dataset["rel_actions"][3:8])
    first = rec.batch(np.array([[19, 20, 21]]))                                       # 20 begins an episode
    assert (first["action"][0, 1] == 0).all()
    np.testing.assert_array_equal(first["action"][0, 2], dataset["rel_actions"][20])
    target = data.commanded_targets(dataset["robot_obs"], dataset["rel_actions"], dataset.episodes)
    np.testing.assert_allclose(batch["command"][0, :, :6], data.encode_pose(torch.from_numpy(target[3:9])))
    np.testing.assert_array_equal(batch["command"][0, :, 6], dataset["rel_actions"][2:8, 6])
    assert first["command"][0, 1, 6] == dataset["robot_obs"][20, 14]


def test_a_step_is_told_all_that_led_to_its_frame():
    """With a stride of 2 a step holds the two actions since the frame before, and the commands that they led
    to; a window's first repeats its command."""
    _, _, dataset, rec = recorded(wm_stride=2)
    batch = rec.batch(np.array([[3, 5, 7]]))
    actions = dataset["rel_actions"]
    command = rec.command.numpy()
    nothing = np.zeros(14, np.float32)
    want = np.stack([nothing, np.r_[actions[3], actions[4]], np.r_[actions[5], actions[6]]])
    np.testing.assert_array_equal(batch["action"][0], want)
    want = np.stack([np.r_[command[a], command[b]] for a, b in ((3, 3), (4, 5), (6, 7))])
    np.testing.assert_array_equal(batch["command"][0], want)
    np.testing.assert_array_equal(batch["proprio"][0], rec.proprio[[3, 5, 7]])


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("source, lead", [("test", 1), ("calvin", 0)])
def test_the_robot_filters_as_training_does(no_noise, source, lead, stride):
    """Agent, fed an episode frame by frame with the executed actions, computes the features that training
    saw: same order, same alignment,
    same commanded pose, also for CALVIN's recordings, whose actions are differences of measured poses: there
    the target forgets its lead."""
    cfg, wm, dataset, rec = recorded(source, wm_stride=stride)
    assert rec.keeps_target == lead
    dataset.meta["keeps_target"] = not lead                 # a robot's own recording may say it itself
    assert data.Recording(cfg, dataset, wm).keeps_target != lead
    wm.keeps_target.fill_(rec.keeps_target)
    wm.eval().requires_grad_(False)
    batch = rec.batch(np.arange(20, 32, stride)[None])
    want, _, _ = wm.rollout(wm.embed(batch), batch["action"], batch["command"])
    agent = diwa.Agent(cfg, wm, None)
    agent.reset(1)
    for t in range(12):
        frame = {k: [dataset[k][20 + t]] for k in ("rgb_static", "rgb_gripper", "robot_obs")}
        torch.testing.assert_close(agent.observe(frame), want[:, t // stride], atol=1e-4, rtol=1e-4)
        agent.action = torch.from_numpy(dataset["rel_actions"][20 + t:21 + t])


def test_the_robot_executes_whole_chunks():
    """Agent asks its actor once every H frames and gives the arm, and its own memory, what the arm can do:
    clipped, gripper binary."""
    cfg, wm, dataset, _ = recorded()
    class Actor:
        asked = 0
        def act(self, feature):
            self.asked += 1
            steps = torch.linspace(0.1, 0.4, 4)[None, :, None].expand(1, 4, 7)
            return steps * torch.tensor([1.0, 1, 1, 1, 1, 9, -1])
    actor = Actor()
    agent = diwa.Agent(cfg, wm, actor)
    agent.reset(1)
    for t in range(6):
        action = agent.act({k: [dataset[k][t]] for k in ("rgb_static", "rgb_gripper", "robot_obs")})
        x = 0.1 * (t % 4 + 1)
        np.testing.assert_allclose(action[0], [x, x, x, x, x, min(9 * x, 1), -1], atol=1e-6)
        np.testing.assert_array_equal(agent.action, action)
        assert actor.asked == t // 4 + 1


# ------------------------------------------------------------------------------------------------------------
# 6  Dream

def test_dream_step_integrates_the_command():
    """Without a believed pose, the target moves 20 mm a unit and the command carries the gripper; the old
    state stays as it was."""
    cfg = tiny(wm_proprio=0.0)
    wm = world(cfg)
    env = dream(cfg, wm)
    env.reset()
    state = {k: v.clone() for k, v in env.state.items()}
    action = diwa.executed(torch.randn(6, 7))
    new = diwa.dream_step(wm, env.state, action[:, None])
    there = state["target"][:, :3] + calvin_sim.MAX_REL_POS * action[:, :3]
    torch.testing.assert_close(new["target"][:, :3], there)
    torch.testing.assert_close(new["command"], data.encode_command(new["target"], action[:, 6:]))
    torch.testing.assert_close(new["h"], wm.step(state["h"], state["z"], action, new["command"]))
    for k, v in state.items():
        assert torch.equal(env.state[k], v)


@pytest.mark.parametrize("lead", [1, 0])
def test_a_stride_integrates_every_action(lead):
    """One step of the world model hears two actions and both commands; between them the arm is not measured
    again, so even a target that forgets
    its lead goes on from itself there."""
    cfg = tiny(wm_stride=2)
    wm = world(cfg)
    wm.keeps_target.fill_(lead)
    env = dream(cfg, wm)
    feature = env.reset()
    action = diwa.executed(torch.randn(6, 2, 7))
    state = env.state
    pose = wm.tcp(feature)
    commands = []
    target = calvin_sim.advance_target(state["target"], action[:, 0], pose, lead)
    for a, now in zip(action.unbind(1), (target, calvin_sim.advance_target(target, action[:, 1], pose))):
        commands.append(data.encode_command(now, a[:, 6:]))
    new = diwa.dream_step(wm, state, action)
    want = wm.step(state["h"], state["z"], action.flatten(1), torch.cat(commands, -1))
    torch.testing.assert_close(new["h"], want)
    torch.testing.assert_close(new["command"], commands[1])
    assert diwa.feature_of(new).shape == feature.shape


def test_a_dream_misplaces_the_arm_unseen():
    """What the world model hears is shifted by the same few millimetres for a whole dream, each dream by its
    own; what the policy sees is not."""
    cfg = tiny(ft_shift=0.01)
    env = dream(cfg, world(cfg))
    wm = env.wm                                             # the dream's own copy
    heard = []
    tell = wm.step

    def spy(h, z, action, command):
        heard.append(command.clone())
        return tell(h, z, action, command)
    wm.step = spy
    env.reset()
    shift = env.state["shift"]
    start = len(heard)
    assert shift[:, 3:].abs().max() == 0
    assert shift[:, :3].std() > 0.02
    assert len(shift[:, 0].unique()) == len(shift)
    feature, *_, final = env.step(torch.zeros(6, cfg.bc_chunk, 7))
    told = heard[start + cfg.bc_chunk - 1]             # the chunk's last step; a draw of fresh starts follows
    torch.testing.assert_close(told - final[:, -7:], shift)
    still = ~(env.state["age"] == 0)
    assert torch.equal(env.state["shift"][still], shift[still])
    wm.keeps_target.zero_()            # the target begins at the believed pose, where the shift would return
    env.reset()
    assert env.state["shift"].abs().max() == 0


def test_success_must_show_in_both_dreams_of_an_arm():
    """ft_twice: the same start and the same actions, but latents of its own; paid is what both show."""
    cfg = tiny(ft_twice=1, ft_shift=0.01)
    wm = world(cfg)
    env = dream(cfg, wm)
    env.reset()
    state = env.state
    assert torch.equal(state["h"], state["h2"]) and not torch.equal(state["z"], state["z2"])
    chunk = torch.randn(6, cfg.bc_chunk, 7)
    verdicts = iter(torch.tensor([[1., 1., 0., 0., 1., 1.]] * 2 + [[1., 0., 1., 0., 1., 0.]] * 2))
    env.classifier = SimpleNamespace(success=lambda first, feature: next(verdicts))
    torch.manual_seed(4)
    _, reward, terminated, _, final = env.step(chunk)
    assert reward.tolist() == [1, 0, 0, 0, 1, 0] and torch.equal(terminated, reward > 0)
    torch.manual_seed(4)
    for h, z, is_final in (("h", "z", True), ("h2", "z2", False)):
        now = dict(state, h=state[h], z=state[z])
        for action in diwa.executed(chunk).split(1, 1):
            now = diwa.dream_step(wm, now, action, state["shift"])
        if is_final:
            assert torch.equal(diwa.feature_of(now), final)
        on = ~terminated
        assert torch.equal(env.state[h][on], now["h"][on]) and torch.equal(env.state[z][on], now["z"][on])


@pytest.mark.parametrize("latent", ["gaussian", "categorical"])
def test_where_priors_disagree_the_reward_is_less(latent):
    """wm_heads: each learns the prior's KL term, and nothing else learns from them; ft_doubt: how far apart
    the heads' distributions are is taken from a chunk's reward, and a success is a success all the same."""
    cfg = tiny(wm_latent=latent, wm_heads=3, ft_doubt=0.5, wm_open=0.0)
    wm = diwa.WorldModel(cfg)
    batch = observations(cfg)
    torch.manual_seed(1)
    loss, _ = diwa.world_model_loss(wm, batch, cfg)
    loss.backward()
    alone = {name: p.grad.clone() for name, p in wm.named_parameters() if not name.startswith("more_priors")}
    torch.manual_seed(1)
    feature, (post, _), _ = wm.rollout(wm.embed(batch), batch["action"], batch["command"])
    kl = [diwa.kl_divergence(post, head(feature[..., :cfg.wm_h]), cfg).mean() for head in wm.more_priors]
    for head in wm.more_priors:
        assert all(p.grad.abs().sum() > 0 for p in head.parameters())
    wm.zero_grad()
    wm.cfg.wm_heads, heads = 0, wm.more_priors
    wm.more_priors = nn.ModuleList()
    torch.manual_seed(1)
    without, _ = diwa.world_model_loss(wm, batch, cfg)
    torch.testing.assert_close(loss, without + cfg.wm_kl * sum(kl))
    without.backward()
    assert all(torch.equal(p.grad, alone[name]) for name, p in wm.named_parameters())

    wm.more_priors = heads.eval()
    env = dream(cfg, wm.eval().requires_grad_(False))
    env.reset()
    env.classifier = SimpleNamespace(success=lambda first, feature: torch.tensor([1.0, 0, 0, 0, 0, 0]))
    _, reward, terminated, _, final = env.step(torch.randn(6, cfg.bc_chunk, 7))
    h = final[:, :cfg.wm_h]
    if latent == "gaussian":
        doubt = torch.stack([head(h)[:, :cfg.wm_z] for head in heads]).std(0).mean(-1)
    else:
        told = torch.stack([diwa.probs(head(h), cfg) for head in heads])                  # [heads, B, Z, C]
        doubt = told.std(0).square().sum(-1).sqrt().mean(-1)
    torch.testing.assert_close(reward, torch.tensor([1.0, 0, 0, 0, 0, 0]) - 0.5 * doubt)
    assert doubt.min() > 0 and terminated.tolist() == [True] + [False] * 5


def test_doubt_makes_no_success_undone():
    """However great it is, a dream that succeeds has ended."""
    cfg = tiny(wm_heads=3, ft_doubt=100.0)
    env = dream(cfg, world(cfg), SimpleNamespace(success=lambda *a: torch.tensor([1.0, 0, 0, 0, 0, 0])))
    env.reset()
    _, reward, terminated, *_ = env.step(torch.randn(6, cfg.bc_chunk, 7))
    assert (reward < 0).all() and terminated.tolist() == [True] + [False] * 5


def test_heads_that_say_the_same_are_not_in_doubt():
    """A softmax does not hear what is added to all logits of a latent, and training never takes it away."""
    cfg = tiny(wm_latent="categorical", wm_heads=3, ft_doubt=0.5, wm_open=0.0)
    wm = diwa.WorldModel(cfg).eval().requires_grad_(False)
    for head in wm.more_priors:
        head.load_state_dict(wm.more_priors[0].state_dict())
        head[-1].bias += torch.randn(cfg.wm_z, 1).expand(-1, cfg.wm_classes).flatten()
    env = dream(cfg, wm)
    env.reset()
    env.classifier = SimpleNamespace(success=lambda first, feature: torch.zeros(6))
    _, reward, *_ = env.step(torch.randn(6, cfg.bc_chunk, 7))
    torch.testing.assert_close(reward, torch.zeros(6), atol=1e-4, rtol=0)


def test_the_rule_on_the_decoded_scene():
    """reward_labels state: CALVIN's rule on what the world model tells of the scene, of both features."""
    cfg = tiny(wm_state=1.0, reward_labels="state", task="move_slider_right")
    wm = world(cfg)
    wm.state_head = nn.Linear(wm.feature_size, 6, bias=False)           # the first six numbers
    wm.state_head.weight.data = torch.eye(6, wm.feature_size)
    wm.requires_grad_(False)
    rule = diwa.build_classifier(cfg, wm)
    first = torch.zeros(4, wm.feature_size)
    first[:, 0] = torch.tensor([0.28, 0.28, 0.15, 0.10]) / data.STATE_SCALE[0]
    now = torch.zeros(4, wm.feature_size)
    now[:, 0] = torch.tensor([0.12, 0.14, 0.01, 0.0]) / data.STATE_SCALE[0]            # by 16, 14, 14, 10 cm
    assert rule.success(first, now).tolist() == [1, 0, 0, 0]
    assert rule.success(now, first).tolist() == [0, 0, 0, 0], "to the left"
    assert not list(rule.parameters()) and rule(first, now)[1].softmax(-1).shape == (4, 2)


def test_dream_step_believes_its_own_pose():
    """With proprioception the lead is measured from the pose that the model reads out of its feature, as the
    arm measures its own."""
    cfg = tiny()
    wm = world(cfg)
    env = dream(cfg, wm)
    feature = env.reset()
    action = diwa.executed(torch.randn(6, 7))
    pose = data.decode_pose(wm.proprio(feature)[:, :6])
    torch.testing.assert_close(wm.tcp(feature), pose)
    want = calvin_sim.advance_target(env.state["target"], action, pose)
    torch.testing.assert_close(diwa.dream_step(wm, env.state, action[:, None])["target"], want)
    wm.keeps_target.zero_()        # a model of CALVIN's recordings: the target starts from the arm, each time
    want = calvin_sim.advance_target(pose, action, pose)
    torch.testing.assert_close(diwa.dream_step(wm, env.state, action[:, None])["target"], want)
    wm.keeps_target.fill_(1)
    # the pose is predicted as a lag behind the command: no lag, no difference
    for p in wm.pose_head.parameters():
        p.zero_()
    torch.testing.assert_close(wm.tcp(feature), env.state["target"])


@pytest.mark.parametrize("latent", ["gaussian", "categorical"])
def test_env_step_is_four_dream_steps(latent):
    """DreamEnv.step(chunk) executes the H actions in order, clipped and binarised, with the prior's draws
    and no others."""
    cfg = tiny(wm_latent=latent)
    wm = world(cfg)
    env = dream(cfg, wm)
    env.reset()
    now = env.state
    chunk = torch.randn(6, 4, 7) * 2
    torch.manual_seed(4)
    final = env.step(chunk)[4]
    torch.manual_seed(4)
    for k in range(4):
        now = diwa.dream_step(wm, now, diwa.executed(chunk[:, k:k + 1]))
    assert torch.equal(final, diwa.feature_of(now))


def test_dreams_start_from_recorded_frames(no_noise):
    """A start is the posterior of one recorded frame from the zero state, with no action before it: what
    training's first step is."""
    cfg = tiny()
    wm = world(cfg)
    embedding, command, target = starts = made_up_starts(cfg, wm)
    env = dream(cfg, wm, starts=starts)
    feature = env.reset()
    want, _, _ = wm.rollout(embedding[:, None], torch.zeros(9, 1, 7), command[:, None])
    distance = torch.cdist(feature, want[:, 0])
    assert distance.min(1).values.max() < 1e-3 and len(set(distance.argmin(1).tolist())) > 1
    assert torch.equal(env.state["target"], target[distance.argmin(1)])


class Judge:
    """A classifier that says what the test wants, and remembers what it was asked."""

    def __init__(self):
        self.verdict = torch.zeros(6)
        self.asked = []

    def success(self, first, feature):
        self.asked.append((first, feature))
        return self.verdict


def test_env_flags_and_restarts():
    """Success ends a dream, the horizon cuts it, success at the horizon counts as success; an ended dream
    restarts, the others go on."""
    cfg = tiny()
    judge = Judge()
    env = dream(cfg, world(cfg), judge, horizon=2)
    begin = env.reset()
    judge.verdict = torch.tensor([1.0, 0, 0, 0, 0, 0])
    f1, r1, term1, trunc1, final1 = env.step(torch.randn(6, 4, 7))
    assert r1.tolist() == [1, 0, 0, 0, 0, 0] and term1.tolist() == [True] + 5 * [False] and not trunc1.any()
    assert torch.equal(f1[1:], final1[1:]) and (f1[0] - final1[0]).abs().max() > 1e-3  # the first begins anew
    judge.verdict = torch.tensor([0, 1.0, 0, 0, 0, 0])
    f2, r2, term2, trunc2, final2 = env.step(torch.randn(6, 4, 7))
    assert term2.tolist() == [False, True] + 4 * [False]
    assert trunc2.tolist() == [False, False] + 4 * [True]    # row 0 is one chunk old, row 1 succeeded in time
    assert torch.equal(f2[0], final2[0]) and (f2[1:] - final2[1:]).abs().amax(1).min() > 1e-3
    # the last two frames of each chunk
    assert len(judge.asked) == 4
    assert torch.equal(judge.asked[0][0], begin)
    assert torch.equal(judge.asked[1][1], final1)
    # each against its own first feature
    assert torch.equal(judge.asked[3][0][0], f1[0]) and torch.equal(judge.asked[3][0][1:], begin[1:])
    assert torch.equal(env.state["first"][1:], f2[1:]) and env.state["age"].tolist() == [1, 0, 0, 0, 0, 0]
    assert torch.equal(diwa.feature_of(env.state), f2)


def test_a_flicker_is_no_success():
    """The reward asks the last two frames of a chunk, and both must look like success."""
    cfg = tiny()
    wm = world(cfg)
    first = torch.randn(6, diwa.WorldModel(cfg).feature_size)
    env = dream(cfg, wm)
    env.reset()
    seen = iter([torch.tensor([1.0, 1, 0, 0, 1, 1]), torch.tensor([1.0, 0, 1, 0, 1, 0])])
    judge = type("Flickering", (), {"success": lambda self, first, feature: next(seen)})()
    state, reward = diwa.dream_chunk(wm, judge, env.state, first, torch.randn(6, 4, 7).clamp(-1, 1))
    assert reward.tolist() == [1, 0, 0, 0, 1, 0] and diwa.feature_of(state).shape == first.shape


def test_rollout_of_the_policy():
    """collect_rollout stores what was true when it was sampled: features in order, log-probs of the chain,
    values of the true next feature."""
    cfg = tiny()
    wm = world(cfg)
    env = dream(cfg, wm, Judge())
    actor = diwa.build_actor(cfg, wm.feature_size)
    critic = diwa.mlp([wm.feature_size, 8, 1], nn.Mish, norm=False)
    reset = env.reset
    begin = []

    def noted():
        begin.append(reset())
        return begin[0]

    env.reset = noted
    roll = diwa.collect_rollout(cfg, env, actor, critic)
    assert roll["feature"].shape == (5, 6, wm.feature_size)
    assert roll["chain"].shape == (5, 6, 11, 4, 7)
    assert roll["logprob"].shape == (5, 6, 10)
    assert len(begin) == 1 and torch.equal(roll["feature"][0], begin[0])
    assert roll["truncated"].any(1).tolist() == [False, False, True, False, False]          # horizon 3
    torch.testing.assert_close(roll["value"], critic(roll["feature"])[..., 0])
    going = ~(roll["truncated"] | roll["terminated"])[:-1]
    torch.testing.assert_close(roll["next_value"][:-1][going], roll["value"][1:][going])
    # across the cut they are different dreams
    assert (roll["next_value"][2] - roll["value"][3]).abs().min() > 0
    with torch.no_grad():
        again = actor.chain_logprob(roll["feature"][3], roll["chain"][3])
        torch.testing.assert_close(again, roll["logprob"][3])


@pytest.mark.parametrize("kind", [
    dict(),
    dict(wm_latent="categorical"),
    dict(bc_actor="gaussian"),
    dict(ft_steps=1),
    dict(ft_bc=0.0),
])
def test_fine_tuning_needs_no_simulator(kind, monkeypatch):
    """With a simulator that cannot even be built, a PPO iteration in the dream runs; warm-up moves the
    critic alone."""
    def refuse(*a, **k):
        raise AssertionError("fine-tuning started a simulator")
    monkeypatch.setattr(calvin_sim.Tabletop, "__init__", refuse)
    cfg = tiny(**kind)
    wm = world(cfg)
    env = dream(cfg, wm)
    actor = diwa.build_actor(cfg, wm.feature_size)
    critic = diwa.mlp([wm.feature_size, 8, 1], nn.Mish, norm=False)
    optimizers = optimizers_for(actor, critic)
    model = weights(wm)
    for train_actor in (False, True):
        before = [weights(m) for m in (actor.net, critic, actor.base)]
        learning = optimizers if train_actor else optimizers[:1]
        metrics = diwa.ppo_iteration(cfg, env, actor, critic, *learning)
        after = [weights(m) for m in (actor.net, critic, actor.base)]
        assert [not torch.equal(a, b) for a, b in zip(before, after)] == [train_actor, True, False]
        assert all(v.isfinite() for v in metrics.values())
    assert torch.equal(weights(wm), model)                                         # the world model is frozen


def test_dreams_that_have_not_ended_are_no_successes():
    """Two of four dreams end in success, one in failure, one not at all within a short rollout: half of them
    succeeded."""
    cfg = tiny(ft_chunks=2, ft_horizon=4, ft_dreams=4)
    wm = world(cfg)
    env = dream(cfg, wm)
    actor = diwa.build_actor(cfg, wm.feature_size)
    critic = diwa.mlp([wm.feature_size, 8, 1], nn.Mish, norm=False)
    # the third fails, begins anew, and then succeeds
    ends = iter([([1, 0, 0, 0], [0, 0, 1, 0]), ([0, 1, 1, 0], [0, 0, 0, 0])])
    def step(chunk):
        terminated, truncated = (torch.tensor(x, dtype=torch.bool) for x in next(ends))
        feature = torch.zeros(4, wm.feature_size)
        return feature, terminated.float(), terminated, truncated, feature
    env.step = step
    optimizer = optimizers_for(actor, critic)[0]
    metrics = diwa.ppo_iteration(cfg, env, actor, critic, optimizer)
    assert metrics["dream_success"] == 0.5


def test_iteration_bookkeeping(monkeypatch):
    """What ppo_iteration learns from: dreams cut at their horizon, advantages of mean 0 and std 1, chains of
    the tuned and anchors of the frozen net."""
    cfg = tiny(ft_epochs=1, ft_minibatches=1)
    wm = world(cfg)
    env = dream(cfg, wm, Judge())
    actor = diwa.build_actor(cfg, wm.feature_size)
    actor.net = Perfect(actor, -0.5)
    actor.base = Perfect(actor, 0.5)
    critic = diwa.mlp([wm.feature_size, 8, 1], nn.Mish, norm=False)
    seen = {}
    loss = diwa.ppo_loss
    gae = diwa.gae

    def noted_gae(reward, value, next_value, terminated, truncated, *discounts):
        seen.update(over=terminated | truncated, discounts=discounts)
        return gae(reward, value, next_value, terminated, truncated, *discounts)

    def noted_loss(cfg, actor, critic, b):
        seen.update(b)
        return loss(cfg, actor, critic, b)

    monkeypatch.setattr(diwa, "gae", noted_gae)
    monkeypatch.setattr(diwa, "ppo_loss", noted_loss)
    diwa.ppo_iteration(cfg, env, actor, critic, torch.optim.AdamW(critic.parameters()))
    # horizon 3, 5 chunks
    assert seen["over"].tolist() == [[False] * 6] * 2 + [[True] * 6] + [[False] * 6] * 2
    assert seen["discounts"] == (cfg.ft_gamma, cfg.ft_lambda) and len(seen["advantage"]) == 30
    assert seen["advantage"].mean().abs() < 1e-5
    assert seen["advantage"].std().item() == pytest.approx(1, abs=1e-3)
    assert seen["chain"][:, -1].mean().item() == pytest.approx(-0.5, abs=0.05)
    assert seen["anchor"][:, -1].mean().item() == pytest.approx(0.5, abs=0.05)


def test_the_anchor_is_what_the_cloned_policy_tries(monkeypatch):
    """Its chains are drawn with the exploring std, by the frozen net, at what the rollout saw."""
    cfg = tiny(ft_epochs=1, ft_minibatches=1)
    wm = world(cfg)
    env = dream(cfg, wm, Judge())
    actor = diwa.build_actor(cfg, wm.feature_size)
    actor.net = Perfect(actor, -0.5)
    actor.base = Perfect(actor, 0.5)
    critic = diwa.mlp([wm.feature_size, 8, 1], nn.Mish, norm=False)
    seen = {}
    loss = diwa.ppo_loss

    def noted(cfg, actor, critic, batch):
        seen.update(batch)
        return loss(cfg, actor, critic, batch)

    monkeypatch.setattr(diwa, "ppo_loss", noted)
    diwa.ppo_iteration(cfg, env, actor, critic, torch.optim.AdamW(critic.parameters()))
    last = seen["anchor"][:, -1]
    assert last.mean().item() == pytest.approx(0.5, abs=0.02)
    assert last.std().item() == pytest.approx(cfg.ft_std, rel=0.1)


def test_ppo_learns_a_bandit():
    """End to end: rewarded for a positive first action, the policy makes it more often after a few dozen
    updates."""
    cfg = tiny(ft_steps=3, bc_steps=5, ft_bc=0.0, ft_clip=0.1, ft_clip_first=0.02)
    actor = diwa.build_actor(cfg, FEATURE)
    critic = zero_critic()
    feature = torch.zeros(128, FEATURE)
    before = actor.act(feature)[:, 0, 0].mean().item()
    optimizer = torch.optim.AdamW(actor.net.parameters(), lr=1e-3)
    for _ in range(25):
        chain = actor.sample_chain(feature)
        gain = chain[:, -1, 0, 0]
        with torch.no_grad():
            b = dict(feature=feature, chain=chain, logprob=actor.chain_logprob(feature, chain))
            b["advantage"] = (gain - gain.mean()) / gain.std()
            b["returns"] = gain
        for _ in range(4):
            loss, _ = diwa.ppo_loss(cfg, actor, critic, b)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert actor.act(feature)[:, 0, 0].mean().item() > before + 0.1


# ------------------------------------------------------------------------------------------------------------
# Any device: on `meta` a tensor that was made on the wrong device, or a look at a value, is an error

def observations(cfg, B=2, T=6):
    """A made-up training batch on cfg.device."""
    told = 7 * cfg.wm_stride
    sizes = dict(action=told, command=told, proprio=15, state=6)
    batch = {k: torch.randn(B, T, n) for k, n in sizes.items()}
    if cfg.wm_encoder == "linear":
        batch["codes"] = torch.randn(B, T, cfg.wm_codes + cfg.wm_codes // 2)
    else:
        for key in ("rgb_static", "rgb_gripper"):
            batch[key] = torch.randint(0, 256, (B, T, 64, 64, 3), dtype=torch.uint8)
    return {k: v.to(cfg.device) for k, v in batch.items()}


def test_meta_would_notice():
    """The control: mixing devices, or asking for a value, does fail on meta."""
    with pytest.raises(RuntimeError):
        torch.ones(3, device="meta") + torch.ones(3)
    with pytest.raises(RuntimeError):
        torch.ones(3, device="meta").sum().item()
    with pytest.raises(RuntimeError):
        bool(torch.ones(3, device="meta").any())


@pytest.mark.parametrize("encoder", ["linear", "conv"])
@pytest.mark.parametrize("latent", ["gaussian", "categorical"])
@pytest.mark.parametrize("changes", [
    dict(),
    dict(wm_open=0.0, wm_proprio=0.0),
    dict(wm_decode=0.5, wm_free=1.0),
    dict(wm_stride=2),
])
def test_world_model_runs_on_any_device(encoder, latent, changes):
    """The training step of the world model makes its tensors where its inputs are."""
    cfg = tiny(device="meta", wm_encoder=encoder, wm_latent=latent, **changes)
    wm = diwa.WorldModel(cfg).to("meta")
    loss, metrics = diwa.world_model_loss(wm, observations(cfg), cfg)
    loss.backward()
    assert loss.is_meta and all(m.is_meta for m in metrics.values()) and next(wm.parameters()).grad.is_meta
    feature = torch.randn(2, wm.feature_size, device="meta")
    assert all(i.is_meta and i.dtype == torch.uint8 for i in wm.images(feature))
    assert not cfg.wm_proprio or wm.tcp(feature).is_meta


@pytest.mark.parametrize("latent", ["gaussian", "categorical"])
@pytest.mark.parametrize("kind", [
    dict(),
    dict(bc_net="unet"),
    dict(bc_actor="gaussian"),
    dict(ft_steps=1),
    dict(ft_steps=3),
    dict(wm_proprio=0.0),
    dict(wm_stride=2),
])
def test_fine_tuning_runs_on_any_device(latent, kind):
    """Dream, policy, reward scaling, GAE and PPO make their tensors where the dream is, and never look at a
    value."""
    settings = dict(device="meta", wm_latent=latent, bc_steps=3, ft_steps=2, ft_chunks=2, ft_epochs=1)
    cfg = tiny(**{**settings, **kind})
    wm = world(cfg)
    env = dream(cfg, wm)
    actor = diwa.build_actor(cfg, wm.feature_size)
    critic = diwa.mlp([wm.feature_size, 8, 1], nn.Mish, norm=False).to("meta")
    metrics = diwa.ppo_iteration(cfg, env, actor, critic, *optimizers_for(actor, critic))
    feature = env.reset()
    assert feature.is_meta and all(v.is_meta for v in metrics.values())
    chunk = torch.randn(6, 4, 7, device="meta")
    assert actor.bc_loss(feature, chunk).is_meta and actor.act(feature).is_meta
    diwa.ema_update(actor.base, actor.net, 0.995, 3)


def test_cloning_stops_just_after_success():
    """What a demonstration holds beyond four frames after its success is neither cloned nor called
    success."""
    from types import SimpleNamespace
    scene = np.zeros((60, 24), np.float32)
    # closes at frame 20; the second never closes
    scene[:, calvin_sim.DRAWER] = np.r_[np.full(20, 0.2), np.zeros(20), np.full(20, 0.2)]
    class MadeUp(SimpleNamespace):
        has_rule = data.Recording.has_rule
        success = data.Recording.success

    segments = [("close_drawer", 0, 39), ("close_drawer", 40, 59)]
    made_up = MadeUp(scene=scene, ds=SimpleNamespace(segments=segments, has_scene=True))

    def watch_and_dream(recording, starts, length, last):
        frames = np.minimum(starts[:, None] + np.arange(length), last[:, None])
        return torch.zeros(*frames.shape, 2), torch.ones(*frames.shape, 2), frames
    cfg = tiny(task="close_drawer")
    wm = SimpleNamespace(watch_and_dream=watch_and_dream)
    feature, first, frame, start = diwa.demonstration_features(cfg, wm, made_up)
    assert set(frame) == {*range(25), *range(40, 60)}
    assert len(feature) == len(first) == len(frame) == len(start)
    assert all(s <= f and (f < 40) == (s < 40) for s, f in zip(start, frame))


def test_classifier_runs_on_any_device():
    """The classifier's loss and verdict too."""
    cfg = tiny(device="meta")
    model = diwa.Classifier(cfg, FEATURE).to("meta")
    first, feature = torch.randn(2, 8, FEATURE, device="meta")
    label = torch.zeros(8, dtype=torch.long, device="meta")
    weight = torch.ones(8, device="meta")
    loss, metrics = diwa.classifier_loss(model, first, feature, label, weight, cfg)
    assert loss.is_meta and all(m.is_meta for m in metrics.values()) and model.success(first, feature).is_meta


# ------------------------------------------------------------------------------------------------------------
# Training sanity

def test_the_papers_learning_rate_stays():
    """A cosine from the peak to its end, after a warm-up; an end of 1, the paper preset's, is constant."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])

    def rates(end):
        found = []
        for i in (49, 99, 499, 999):
            diwa.cosine_lr(optimizer, 0.2, i, 1000, floor=end)
            found.append(optimizer.param_groups[0]["lr"])
        return found

    assert rates(1.0) == pytest.approx([0.1, 0.2, 0.2, 0.2]) and diwa.PRESETS["paper"]["wm_lr_end"] == 1
    assert rates(0.1)[2:] == pytest.approx([0.11, 0.02], abs=1e-3)


def test_cloning_keeps_both_modes():
    """Demonstrations that go either left or right: the loss falls, samples land on both modes and hardly
    between, which no mean can do."""
    cfg = tiny(bc_hidden=128)
    actor = diwa.build_actor(cfg, FEATURE)
    optimizer = torch.optim.AdamW(actor.net.parameters(), lr=1e-2, betas=(0.9, 0.99))
    losses = []
    feature = torch.zeros(256, FEATURE)
    for i in range(700):
        diwa.cosine_lr(optimizer, 1e-2, i, 700, warmup=30, floor=0.02)
        chunk = 0.5 * torch.randint(0, 2, (256, 1, 1)).mul(2).sub(1).expand(256, 4, 7).float()
        loss = actor.bc_loss(feature, chunk)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    actor.base.load_state_dict(actor.net.state_dict())
    side = actor.act(torch.zeros(400, FEATURE)).mean((1, 2))
    assert np.mean(losses[-50:]) < 0.1 * np.mean(losses[:20])
    assert ((side.abs() - 0.5).abs() < 0.2).float().mean() > 0.85 and 0.25 < (side > 0).float().mean() < 0.75


@pytest.mark.parametrize("latent", ["gaussian", "categorical"])
def test_world_model_learns_a_moving_dot(latent):
    """The loss, watched and dreamed, falls over a few updates on a recording that is predictable."""
    cfg, wm, dataset, rec = recorded(wm_latent=latent, wm_decode=1.0)
    optimizer = torch.optim.AdamW(wm.parameters(), lr=3e-3)
    rng = np.random.default_rng(0)
    history = []
    for i in range(60):
        start = rng.integers(20, 34, 8)[:, None]
        loss, metrics = diwa.world_model_loss(wm, rec.batch(start + np.arange(10)), cfg)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append([metrics["image"].item(), metrics["open_image"].item(), loss.item()])
    assert (np.mean(history[-5:], 0) < 0.7 * np.mean(history[:5], 0)).all()


@pytest.mark.parametrize("encoder", ["linear", "conv"])
def test_the_benchmark_eats_what_the_default_eats(encoder):
    """tests/bench.py makes up batches of its own: they must have all that a loss asks for."""
    cfg = tiny(wm_encoder=encoder)
    assert cfg.wm_state and cfg.wm_open                     # as by default
    wm = diwa.WorldModel(cfg)
    before = wm.prior[0].weight.detach().clone()
    bench.world_model_update(cfg, wm)()
    assert not torch.equal(before, wm.prior[0].weight)
    update, samples = bench.ppo_update(dataclasses.replace(cfg, ft_dreams=128, ft_chunks=2), world(cfg))
    update()
    assert samples > 0
