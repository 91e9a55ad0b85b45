"""What is printed about results: intervals against published values, the world model's judges on made-up
dreams, and the README's own table."""
import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import ablate
import calvin_sim
import diwa
from data import Recording
from support import interactions, report
from support.runs import changed_settings, check_config, parse


@pytest.mark.parametrize("k, n, low, high", [
    (0, 10, 0.0, 0.2775),
    (10, 10, 0.7225, 1.0),
    (50, 100, 0.4038, 0.5962),
    (81, 263, 0.2553, 0.3662),
])
def test_wilson_interval(k, n, low, high):
    """81 of 263 is Newcombe's (1998) example."""
    assert report.wilson(k, n) == pytest.approx((low, high), abs=2e-4)


def test_paired_difference():
    """5 gained, none lost: the exact McNemar p is 2 / 2^5; swapping the two mirrors everything; equal
    policies differ by nothing."""
    before = [0] * 5 + [1] * 15
    after = [1] * 20
    d = report.paired(before, after)
    mirrored = report.paired(after, before)
    assert (d["gained"], d["lost"], d["difference"], d["p"]) == (5, 0, 0.25, 0.0625)
    assert d["low"] < 0.25 < d["high"]
    assert mirrored["low"] == pytest.approx(-d["high"]) and mirrored["difference"] == -0.25
    same = report.paired(before, before)
    assert same["difference"] == 0 and same["p"] == 1
    assert same["low"] == pytest.approx(-same["high"]) and same["high"] > 0


def test_paired_interval_covers():
    """Of 95 % intervals about 95 % contain the true difference."""
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(500):
        before = rng.random(100) < 0.6
        after = np.where(before, rng.random(100) < 0.95, rng.random(100) < 0.6)      # gains .24, loses .03
        d = report.paired(before, after)
        inside.append(d["low"] <= 0.21 <= d["high"])
    assert 0.92 < np.mean(inside) < 0.98


def test_the_probe_reads_what_is_no_sum():
    """Whether two latents agree is no linear function of their one-hots.  The error is on rows that
    the probe was not fitted on."""
    torch.manual_seed(0)
    first, second = torch.randint(4, (2, 4000))
    feature = torch.cat([torch.eye(4)[first], torch.eye(4)[second], torch.randn(4000, 8)], -1)
    target = 10 * torch.stack([(first == second).float(), feature[:, 8]], -1)
    probe = report.fit_probe(feature[:3000], target[:3000], 300)
    error = (probe(feature[3000:]) - target[3000:]).abs().mean(0)
    assert (error < torch.tensor([1.0, 1.0])).all()


def test_missed_events_and_false_alarms():
    """Four windows: a door that opens and is dreamed to, one that is missed, one that stands still in both,
    one that opens in the dream only."""
    truth = torch.zeros(4, 73, 8)
    guess = torch.zeros(4, 73, 8)
    truth[:2, 5:, 0] = 0.2
    guess[[0, 3], 5:, 0] = 0.18
    row = next(r for r in report.open_loop_errors(guess, truth) if (r["what"], r["step"]) == ("slider", 40))
    assert row["events"] == row["windows"] == 2 and row["hits"] == row["false"] == 0.5
    assert row["error"] == pytest.approx((0.02 + 0.2 + 0.18) / 4)
    assert row["error_moving"] == pytest.approx(0.11) and row["still"] == pytest.approx(0.1)
    led = next(r for r in report.open_loop_errors(guess, truth) if (r["what"], r["step"]) == ("led", 40))
    assert led["events"] == 0 and np.isnan(led["hits"]) and led["false"] == 0
    assert report.share_of_change(guess[..., 0][:2], truth[..., 0][:2]) == 0.5


def test_trust_counts_attempts_by_truth_and_verdict():
    """A verdict that reads the feature, which here is the truth for half of the windows, lands in the right
    cells; impossible starts are left out."""
    scene = np.zeros((400, 24), np.float32)
    scene[100:120, 1] = np.linspace(0.2, 0, 20)             # a drawer that closes after frame 100
    scene[200:210, 1] = 0.2                                 # open but left alone at 200

    class MadeUp(SimpleNamespace):
        has_rule = Recording.has_rule
        success = Recording.success

    held_out = np.array([[100, 119], [200, 209], [300, 330]])
    split = SimpleNamespace(
        has_scene=True,
        window_length=lambda: length,
        split=lambda: (np.zeros((0, 2), int), held_out),
        segments=[],
    )
    play = MadeUp(ds=split, scene=scene)
    segments = [("close_drawer", 100, 119), ("open_drawer", 0, 9)]
    judges = MadeUp(ds=SimpleNamespace(has_scene=True, segments=segments), scene=scene)

    def views(recording, starts, length, last=None):
        frames = starts[:, None] + np.arange(length)
        frames = frames if last is None else np.minimum(frames, last[:, None])
        return None, torch.from_numpy(scene[frames]), frames

    def optimist(first, feature):
        assert (first == feature[:, :1]).all()
        return torch.ones(feature.shape[:2])

    def honest(first, feature):
        return torch.from_numpy(calvin_sim.success("close_drawer", first.numpy(), feature.numpy())).float()

    length = 10
    rng = np.random.default_rng(0)
    tables = report.trust("close_drawer", honest, play, judges, views, rng)
    want = dict(demonstrations=[[0, 0], [0, 0]], play=[[0, 0], [0, 9]])
    assert tables == want, ("in 10 frames it closes by less than .12: 8 starts with room, 1 left alone; "
                            "the demonstration is cut before it succeeds")
    length = 19
    tables = report.trust("close_drawer", optimist, play, judges, views, rng)
    want = dict(demonstrations=[[1, 0], [0, 0]], play=[[2, 0], [0, 0]])
    assert tables == want, "2 windows of 19 frames and the demonstration"
    tables = dict(demonstrations=[[1, 2], [3, 4]], play=[[5, 6], [7, 8]])
    assert report.trusted(tables) == ("1 of 3 in demonstrations, 5 of 11 in play", "10 of 22")


def test_what_was_not_tested_is_no_zero():
    """A task without a rule has no recorded failure, and a policy that is never believed no precision."""
    assert report.trusted(dict(demonstrations=[[3, 1], [0, 0]], play=[[0, 0], [0, 0]])) == (
        "3 of 4 in demonstrations", "not tested")
    assert report.precision_recall([0, 0], [0, 1]) == [None, 0.0]
    assert report.precision_recall([1, 0], [0, 0]) == [0.0, None]
    assert report.mean_known([None, 0.5, 1.0]) == "0.75" and report.mean_known([None]) == "-"
    assert report.rate([0] * 40).startswith("0 % [0, ")


def test_each_seeds_own_difference():
    rows = [dict(seed=seed, before=[0, 0, 1, 1], after=after)
            for seed, after in ((1, [1, 1, 1, 1]), (0, [0, 0, 1, 1]), (0, [0, 1, 1, 1]))]
    assert report.seeds_differences(rows) == " (seeds +12, +50)" and report.seeds_differences(rows[:1]) == ""


def test_success_counts_when_it_shows_twice():
    """Two steps running, and never at the start."""
    seen = torch.tensor([[1, 1, 0, 1, 1, 0], [0, 1, 0, 1, 0, 1], [0, 0, 1, 1, 1, 1.]])
    want = [[0, 1, 0, 0, 1, 0], [0] * 6, [0, 0, 0, 1, 1, 1]]
    assert report.twice(seen).int().tolist() == want


@pytest.mark.parametrize("folder, page", [
    ("results", "docs/RESULTS.md"),
    ("results/calvin", "docs/RESULTS.md"),
    ("results/gpu", "docs/RESULTS.md"),
    ("results/gpu_pixels", "docs/EXPERIMENTS.md"),
    ("results/class", "docs/RESULTS.md"),
    ("results/calvin_play30000", "docs/RESULTS.md"),
    ("results/calvin_unlabelled", "docs/RESULTS.md"),
    ("results/calvin_labelled", "docs/EXPERIMENTS.md"),
    ("results/predicate9000", "docs/EXPERIMENTS.md"),
    ("results/demos10_rounds", "docs/EXPERIMENTS.md"),
    ("results/demos10_mixed", "docs/EXPERIMENTS.md"),
])
def test_the_pages_show_what_the_rows_say(folder, page):
    """The results tables in the README and in EXPERIMENTS.md are what report.py prints from the committed
    rows."""
    rows = [json.loads(p.read_text()) for p in sorted((ROOT / "docs" / folder).glob("*.json"))]
    text = (ROOT / page).read_text()
    assert rows and all(line in text for line in report.table(rows))
    kind = {"results": report.compact_table, "results/calvin": report.short_table}.get(folder)
    if kind:
        assert all(line in (ROOT / "README.md").read_text() for line in kind(rows))


def test_the_pages_show_variants_and_rival_as_their_rows_say():
    """Tables of --ablations and of the simulator's steps, from the committed rows."""
    results = ROOT / "docs" / "results"
    rows = []
    for task in ablate.TASKS:
        paths = [*results.glob(f"batch32/seed?_{task}.json"), *results.glob(f"ablations/*/seed?_{task}.json")]
        rows += [json.loads(path.read_text()) for path in sorted(paths)]
    text = (ROOT / "docs" / "EXPERIMENTS.md").read_text()
    lines = report.ablations(rows)
    assert len(lines) > 20 and all(line in text for line in lines)
    rows = [json.loads(path.read_text()) for path in sorted(results.glob("online/*.json"))]
    text = (ROOT / "docs" / "RESULTS.md").read_text()
    lines = interactions.table(rows)
    assert len(lines) == 14 and all(line in text for line in lines)


def test_share_of_failures_removed():
    """40 of 50 failures gone, nothing lost: 80 %, with about a binomial's interval; and a policy that got
    worse removes a negative share."""
    before = np.r_[np.zeros(50), np.ones(50)]
    after = np.r_[np.ones(40), np.zeros(10), np.ones(50)]
    words = report.removed(before, after).replace("% ", "").split()
    share, low, high = (float(x.strip("%[],")) for x in words)
    assert share == 80 and 67 <= low <= 71 and 88 <= high <= 92
    assert report.removed(after, before).startswith("-400 %")


def test_seeds_of_a_task_are_pooled():
    """Two seeds become one line with all their episodes and each seed's own success; their order does not
    matter."""
    row = dict(
        task="turn_on_led", before=[0, 0, 0, 1], after=[1, 1, 1, 1], dream_before=0.5, dream=1.0, curve={},
        replay_share={"turn_on_led": 0.8}, trust={"play": [[3, 1], [0, 6]]}, classifier=[1.0, 0.5],
        minutes={"wm": 20},
    )
    other = dict(
        row, seed=1, before=[1, 1, 0, 1], after=[1, 1, 0, 1], replay_share={"turn_on_led": 0.6},
        trust={"play": [[1, 1], [2, 6]]}, minutes={"wm": 30},
    )
    line = report.table([other, dict(row, seed=0)])[2]
    assert line == report.table([dict(row, seed=0), other])[2]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:3] == ["turn_on_led", "0, 1", "8"]
    assert cells[3].startswith("50 % [") and cells[3].endswith("(25, 75)")
    assert cells[4].endswith("(100, 75)") and cells[5].startswith("+38")
    assert cells[7] == "0.70" and cells[8] == "4 of 6 in play; 2 of 14" and cells[11] == "25"


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 180 and not [line for line in lines if len(line) > 120]


def test_the_compact_table_is_the_mean_over_seeds():
    rows = [dict(task="turn_on_led", before=[0, 1], after=[1, 1]),
            dict(task="turn_on_led", before=[0], after=[1]),
            dict(task="move_slider_left", before=[0, 0, 0, 0], after=[1, 0, 0, 0])]
    assert report.compact_table(rows) == [
        "| % | slider left | led on | mean |", "|---|---|---|---|",
        "| cloned | 0 | 25 | **17** |", "| fine-tuned | 25 | 100 | **75** |"]


def test_ablations_compare_with_the_default_on_the_same_starts():
    """Two seeds of the default, one of a variant: it is compared with its own seed's row alone."""
    def row(seed, changed, before, after, dream):
        return dict(task="turn_on_led", seed=seed, changed=changed, before=before, after=after, dream=dream,
                    minutes=dict(wm=3.0, eval=1.0), preset="cpu", versions=dict(sim="tabletop"))

    half = [0, 1] * 20
    rows = [row(0, {}, half, half, 0.75), row(1, {}, half, [1] * 40, 1.0),
            row(0, dict(ft_bc=0.0, bc_net="unet"), [0] * 40, [1] * 40, 0.9)]
    rows[0]["minutes"]["online"] = 9.0                      # a rival's, in the same folder: no part of it
    default, variant = (line.strip("| ").split(" | ") for line in report.ablations(rows)[2:])
    assert default[:3] == ["nothing", "2", "80"] and default[5:] == ["-", "+12", "4"]
    assert variant[0] == "`--ft_bc 0.0 --bc_net unet`" and variant[3].startswith("0 %")
    assert variant[4].startswith("100 %") and variant[5] == report.difference(half, [1] * 40, 1)[0]
    assert variant[5].startswith("+50.0 [") and variant[6] == "-10"
    with pytest.raises(report.InputError, match="same --eval_episodes"):
        report.ablations([*rows, row(1, dict(ft_bc=0.0), [1], [1], 1.0)])
    with pytest.raises(report.InputError, match="turn_on_led, seed 0, .*older version"):
        report.ablations([dict(task="turn_on_led", seed=0)])
    with pytest.raises(report.InputError, match="two rows of turn_on_led, seed 0"):
        report.ablations([*rows, rows[0]])
    # Flags that all rows have are the default's, too; those of another preset or simulator are a variant
    for one in rows:
        one["changed"] = dict(ft_dreams=8, **one["changed"])
    default, variant = (line.strip("| ").split(" | ") for line in report.ablations(rows)[2:])
    assert default[0] == "`--ft_dreams 8`" and default[5] == "-" and variant[5].startswith("+50.0 [")
    plain = dict(rows[2], changed={})
    others = dict(plain, preset="class"), dict(plain, versions=dict(sim="calvin"))
    lines = report.ablations([rows[0], *others])[2:]
    assert [line.split("|")[1].strip(" `") for line in lines] == ["--ft_dreams 8", "--preset class",
                                                                  "--sim calvin"]


def test_rows_beside_rows_are_compared_start_by_start():
    """Two seeds, what was and what is: paired within task and seed, in whatever order they are given."""
    def row(task, seed, before, after, dream, **more):
        return dict(task=task, seed=seed, before=before, after=after, dream=dream,
                    versions=dict(sim="tabletop"), **more)

    none, even, odd, each = [0] * 40, [1, 0] * 20, [0, 1] * 20, [1] * 40
    was = [row("turn_on_led", 0, even, none, 0.1, classifier=[0.5, None]),
           row("turn_on_led", 1, odd, even, 0.4, classifier=[0.7, 0.4])]
    now = [row("turn_on_led", 1, each, even, 0.5, classifier=[1.0, 0.9]),
           row("turn_on_led", 0, each, odd, 1.0)]
    led, both = (line.strip("| ").split(" | ") for line in report.beside([*was, *now])[2:])
    paired = report.difference(none + even, odd + even, 1)[0]           # seed 0 gained half, seed 1 nothing
    assert paired != report.difference(none + even, even + odd, 1)[0]
    assert led == ["turn_on_led", "0, 1", "80", "50.0 %, 100.0 %", "25.0 %, 50.0 %", paired, "10.0, 25.0",
                   "0.60, 0.40; 1.00, 0.90"]
    assert led[5].startswith("+25.0 [") and both == ["all", *led[1:]]
    other = [row("open_drawer", 2, none, none, 0.0), row("open_drawer", 2, none, each, 1.0)]
    drawer, led, both = (line.strip("| ").split(" | ") for line in report.beside([*was, *other, *now])[2:])
    assert drawer[4] == "0.0 %, 100.0 %" and drawer[7] == "-; -" and both[1:3] == ["0, 1, 2", "120"]
    short = row("turn_on_led", 1, [1], [1], 1.0)
    elsewhere = dict(now[0], versions=dict(sim="calvin"))
    for wrong in ([*was, now[0]], [*was, *now, now[0]], [*was, short, now[1]], [*was, elsewhere, now[1]],
                  [*was, *was]):
        with pytest.raises(report.InputError, match="turn_on_led, seed .: give two rows of the same"):
            report.beside(wrong)


def test_a_table_pools_seeds_of_one_recipe(capsys):
    """Rows of a variant beside the default's, or one row twice, would be pooled as one policy's."""
    default, gaussian = (ROOT / "docs" / "results" / name for name in (
        "batch32/seed0_turn_on_led.json", "ablations/bc_gaussian/seed0_turn_on_led.json"))
    other = ROOT / "docs" / "results" / "calvin" / "seed1_turn_on_led.json"
    assert report.main([str(default)]) == report.main(["--ablations", str(default), str(gaussian)]) == 0
    assert report.main(["--beside", str(default), str(gaussian)]) == 0
    assert report.main(["--beside", str(default), str(other)]) == 2
    assert "turn_on_led, seed 0: give two rows" in capsys.readouterr().err
    for kind in ([], ["--short"], ["--compact"]):
        for rows, words in (([default, gaussian], "--bc_actor gaussian"), ([default, other], "--sim calvin"),
                            ([default, default], "two rows of turn_on_led, seed 0")):
            assert report.main([*kind, *map(str, rows)]) == 2
            assert words in capsys.readouterr().err


def test_a_variant_begins_as_the_default(tmp_path):
    """Checkpoints and settings are copies, recordings links; rows and evaluations are its own.

    So are the rival's counts: they are of the default's policy."""
    base = tmp_path / "seed3"
    (base / "play").mkdir(parents=True)
    for name in ("wm.pt", "config.json", "log.csv", "result_turn_on_led.json", "eval_turn_on_led.json",
                 "online_turn_on_led.json"):
        (base / name).write_text(name)
    (base / "log.csv").write_text("wm,,20,kl,3\nbc,turn_on_led,50,loss,1\n")
    ablate.begin(tmp_path, 3, "wm_pixels")
    run = tmp_path / "seed3_wm_pixels"
    assert sorted(path.name for path in run.iterdir()) == ["config.json", "log.csv", "play", "wm.pt"]
    assert (run / "play").samefile(base / "play") and not (run / "wm.pt").samefile(base / "wm.pt")
    (run / "wm.pt").write_text("its own")
    (base / "log.csv").write_text("wm,,20,kl,3\nbc,turn_on_led,50,loss,1\nbc,open_drawer,50,loss,2\n")
    (run / "log.csv").write_text("wm,,20,kl,4\nbc,turn_on_led,50,loss,5\n")
    for _ in range(2):                                      # goes on after a kill: what it made stays
        ablate.begin(tmp_path, 3, "wm_pixels")
        assert (run / "wm.pt").read_text() == "its own"
        # and what a task brings that a later call adds
        assert (run / "log.csv").read_text() == ("wm,,20,kl,4\nbc,turn_on_led,50,loss,5\n"
                                                 "bc,open_drawer,50,loss,2\n")


@pytest.mark.parametrize("flag", ["--task", "--run=mine", "--stage"])
def test_ablate_sets_some_flags_itself(flag, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ablate.py", flag, "turn_on_led"])
    with pytest.raises(SystemExit) as stop:
        ablate.main()
    assert stop.value.code == 2 and "give --tasks" in capsys.readouterr().err


@pytest.mark.parametrize("name", ablate.VARIANTS)
def test_a_variant_is_the_default_but_for_its_flags(name):
    flags = ablate.VARIANTS[name].split()
    cfg = check_config(parse(["--device", "cpu", *flags], diwa.Config, diwa.PRESETS, "", ""))
    assert {f"--{key}" for key in changed_settings(cfg)} == set(flags[::2])


def test_a_ninth_task_is_in_every_table():
    """The papers do not know it; it counts in the mean and has its own line or column."""
    row = json.loads(next((ROOT / "docs" / "results").glob("*open_drawer.json")).read_text())
    own = dict(row, task="pour_tea")
    for rows in ([own], [row, own]):
        found, = [line for line in report.short_table(rows) if line.startswith("| pour_tea |")]
        assert found.endswith("- | - |")
        lines = report.compact_table(rows)
        assert "pour tea" in lines[0] and len({line.count("|") for line in lines}) == 1
    wam = [report.short_table(rows)[-1].split(" | ")[-1] for rows in ([row], [row, own])]
    assert wam[0] == wam[1]


def test_ranges_are_read_from_rows():
    """Healthy ranges: the lowest and highest end of each term over the rows that know it."""
    rows = [{"ends": {"bc.loss": 0.2, "wm.kl": 50.0}}, {"ends": {"bc.loss": 0.1}}, {}]
    assert [line.split(" | ")[:3] for line in report.ranges(rows)[2:]] == [
        ["| wm", "kl", "50 to 50"], ["| bc", "loss", "0.1 to 0.2"]]
    assert report.end_of([9.0] * 18 + [1.0, 2.0]) == 1.5 and report.end_of([3.0]) == 3.0


@pytest.mark.parametrize("changed, without", [
    (dict(wm_encoder="conv"), ["wm.image", "wm.norm", "wm.open_image"]),    # every pixel counts
    (dict(bc_actor="gaussian"), ["bc.loss", "finetune.anchor"]),            # an action's error, not noise's
    (dict(ft_steps=1), ["finetune.anchor"]),
    (dict(ft_bc=0.0), ["finetune.anchor"]),                                 # not reckoned
    (dict(ft_gamma=0.9), []),
])
def test_a_range_is_of_one_meaning(changed, without):
    """Where a setting changes what a term is, the range of the default's runs says nothing of it."""
    default = dataclasses.asdict(diwa.Config())
    assert report.healthy_terms(default) == list(report.HEALTHY)
    kept = report.healthy_terms(dict(default, **changed))
    assert sorted(".".join(term) for term in report.HEALTHY if term not in kept) == without


def test_a_term_outside_its_range_is_named():
    low, high, _ = report.HEALTHY["bc", "loss"]
    lines = report.health_lines({"bc.loss": high + 1})
    assert "**outside**" in lines[-1] and lines[-1].startswith("| bc | loss |")
    assert "**outside**" not in report.health_lines({"bc.loss": (low + high) / 2})[-1]


def test_official_starts_are_a_column_where_rows_have_them():
    row = json.loads(next((ROOT / "docs" / "results").glob("*.json")).read_text())
    other = dict(row, official=[[0, 1, 0, 0], [1, 1, 1, 0]], seed=row["seed"] + 1)
    assert report.OFFICIAL not in report.table([row])[0]
    lines = report.table([row, other])
    assert report.OFFICIAL in lines[0] and len({line.count("|") for line in lines[:4]}) == 1
    assert "| 25 %, 75 % [30, 95] |" in lines[2] and "| 25 %, 75 % [30, 95] |" in lines[3]
    short = report.short_table([row, other])
    assert len({line.count("|") for line in short}) == 1 and "25 %, 75 %" in short[2]


def test_the_rows_we_keep_are_healthy():
    """The ranges hold for the runs that they are drawn from, and are not much wider: at least a fifth of each
    is used."""
    folder = ROOT / "docs" / "results"
    paths = [*sorted(folder.glob("*.json")), *sorted(folder.glob("*/*.json"))]
    rows = [json.loads(path.read_text()) for path in paths]
    rows = [row for row in rows if "ends" in row]
    assert len(rows) >= 6
    for row in rows:
        terms = report.healthy_terms(dict(diwa.PRESETS[row["preset"]], **row.get("changed", {})))
        assert set(row["ends"]) == {".".join(term) for term in terms}, (row["seed"], row["task"])
    text = (ROOT / "docs" / "RESULTS.md").read_text()
    assert all(line in text for line in report.ranges(rows)), "the table of ranges is what --ranges prints"
    for (stage, metric), (low, high, _) in report.HEALTHY.items():
        values = [r["ends"][f"{stage}.{metric}"] for r in rows if f"{stage}.{metric}" in r["ends"]]
        assert low <= min(values) and max(values) <= high, (stage, metric, min(values), max(values))
        assert max(values) - min(values) > (high - low) / 5, (stage, metric, min(values), max(values))
