"""presets.py: named sets of settings, each a difference to the defaults of diwa.Config."""

PRESETS = {                         # the default's batches of 128 were tried on the tabletop alone
    "cpu": {},
    "gpu": dict(wm_encoder="conv", wm_depth=16, wm_updates=5000, wm_batch=32, wm_lr=1e-3),
    "paper": dict(
        play_frames=500_000, wm_encoder="conv", wm_latent="categorical", wm_z=32, wm_h=1024, wm_hidden=1000,
        wm_embed=1024, wm_updates=2_000_000, wm_batch=50, wm_stride=1, wm_length=50, wm_lr=3e-4,
        wm_lr_end=1.0, wm_open=0.0, wm_state=0.0, wm_proprio=0.0, wm_gripper=1.0, wm_decode=1.0,
        wm_unimix=0.0, wm_noise=0.0, wm_octaves=0, bc_hidden=512, bc_updates=50_000, bc_lr=1e-4,
        reward_labels="demos", reward_hidden=512, reward_lr=1e-6, reward_updates=20_000,
        ft_iterations=770, ft_dreams=50, ft_chunks=36, ft_starts=0.0, ft_play=0.0, ft_shift=0.0,
        ft_epochs=10, ft_minibatches=1, ft_actor_lr=1e-5, ft_gamma=0.999,
        ft_clip=0.01, ft_clip_first=0.001, ft_ema=0.0, ft_snapshot=70),
    "class": dict(
        play_frames=40_000, play_tasks="move_slider_left,move_slider_right", wm_updates=1500, wm_batch=32,
        wm_lr=1e-3, bc_updates=2000, reward_updates=750, ft_iterations=18, ft_snapshot=3),
    "smoke": dict(
        play_frames=2000, play_episode=200, play_replay=2, demo_count=8, wm_codes=64, wm_h=64, wm_hidden=64,
        wm_embed=64, wm_z=16, wm_updates=60, wm_batch=16, wm_length=20, bc_hidden=64, bc_updates=150,
        reward_hidden=64, reward_updates=60, ft_iterations=3, ft_dreams=16, ft_epochs=2, ft_warmup=1,
        ft_snapshot=2, eval_episodes=8, eval_curve=4, eval_official=2),
}

# What a simulator needs that the presets do not say, by measurement (docs/EXPERIMENTS.md, "What does the
# world model see of CALVIN's door?", "Strict labels", "Twice the updates, in bfloat16", "Longer practice on
# CALVIN")
BY_SIMULATOR = {
    "calvin": dict(reward_labels="strict", wm_updates=18_000, wm_batch=32, wm_lr=1e-3,
                   wm_latent="categorical", wm_z=32, ft_iterations=72, ft_ema=0.0, ft_snapshot=18),
    "none": dict(wm_state=0.0),     # recordings of real robots know no scene state
}
