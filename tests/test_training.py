"""Training: the scales fold away exactly, a known map is learnt, the best epoch is never worse than the start, a stop loses nothing."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from feature_alignment.adapters import fitting, training
from feature_alignment.adapters.closed_form import moments
from feature_alignment.adapters.fitting import Batch, Checkpoint, ProcessShare, best_of
from feature_alignment.adapters.hidden import HiddenAdapter
from feature_alignment.adapters.training import Scale, start_from_linear, train_chained, train_hidden
from feature_alignment.cli.console import UserError
from feature_alignment.measurement import metrics, scoring
from feature_alignment.storage.hidden_states import HiddenStates
from feature_alignment.train_hidden_adapter import TrainConfig

D = 8
HEAD = torch.randn(12, D, generator=torch.Generator().manual_seed(5)) / 100
TURN = torch.randn(D, 2, generator=torch.Generator().manual_seed(1)) @ torch.randn(2, D, generator=torch.Generator().manual_seed(2))


EMBEDDINGS = torch.randn(12, D, generator=torch.Generator().manual_seed(3))


def bent(g):
    """A nonlinear map: a linear bottleneck cannot fit all of it."""
    return g + torch.tanh((g - 3) / torch.logspace(-2, 2, D)) @ TURN


def states(n, seed, change=bent, s=6):
    torch.manual_seed(seed)
    g = torch.randn(n, s, D) * torch.logspace(-2, 2, D) + 3.0
    mask = torch.arange(s)[None] < torch.randint(2, s + 1, (n, 1))
    rows = [{"id": f"s{i}", "sequence": f"{seed}-{i}"} for i in range(n)]
    return HiddenStates(g, change(g), torch.zeros(n, s, dtype=torch.long), mask, mask.sum(1), rows, {})


def config(**more):
    return TrainConfig(**{"bottleneck": 16, "linear_units": 4, "num_epochs": 12, "batch_size": 16, "lr": 1e-2, **more})


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_scales_fold_into_the_plain_adapter():
    torch.manual_seed(0)
    adapter = HiddenAdapter(D, D, 5)
    torch.nn.init.normal_(adapter.up.weight)
    scale = Scale(torch.randn(D), torch.rand(D) + 0.1, torch.rand(D) + 0.1)
    g = torch.randn(20, D)
    torch.testing.assert_close(scale.folded(adapter)(g), scale.predict(adapter, g), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kl", [0.0, 0.5])
@pytest.mark.parametrize("linear_units", [0, 4])
def test_a_known_map_is_learned(kl, linear_units):
    cfg = config(kl_weight=kl, linear_units=linear_units)
    adapter, history = train_hidden(states(300, 1), states(60, 2), HEAD, cfg)
    identity = float(((states(60, 2).draft - states(60, 2).target)[states(60, 2).mask] ** 2).mean() / states(300, 1).target.var(0).mean())
    assert best_of(history)["validation_mse"] < 0.1 * identity
    assert best_of(history)["validation_loss"] <= history[0]["validation_loss"]
    assert adapter.num_parameters == D * 16 + 16 + 16 * D + D


def test_the_adapter_starts_as_the_best_linear_map_of_its_rank():
    """Units at GELU's inflection point are linear up to third order."""
    torch.manual_seed(3)
    g = torch.randn(4000, D) @ torch.randn(D, D) * 2 + 1
    low = torch.randn(D, 3) @ torch.randn(3, D)
    change = (g @ low) / 10 + 2 + 0.05 * torch.randn(4000, D)
    found = moments([(g, change)], D, D)
    adapter = HiddenAdapter(D, D, 16)
    linear = found.ridge(1e-6, 3)
    start_from_linear(adapter, linear, found.covariance())
    left = lambda y: float((y - change).pow(2).mean() / change.var(0).mean())  # noqa: E731
    with torch.no_grad():
        assert left(linear(g)) < 0.01 and left(adapter.correction(g)) < 0.05 < left(change.mean(0).expand_as(change))
        assert float((adapter.up.weight[:, 3:] != 0).sum()) == 0  # the other units are muted, and free to learn


def test_an_epoch_that_does_not_help_is_not_returned():
    train, validation = states(40, 1), states(40, 2, change=lambda g: g)
    adapter, history = train_hidden(train, validation, HEAD, config(linear_units=0, kl_weight=0.0))
    assert best_of(history)["epoch"] == 0
    assert torch.equal(adapter(validation.draft), validation.draft)


def test_training_stops_when_nothing_improves():
    _, history = train_hidden(states(40, 1), states(40, 2, change=lambda g: g), HEAD, config(linear_units=0, patience=3))
    assert history[-1]["epoch"] == 3


class Stopped(Exception):
    pass


@pytest.mark.parametrize("adapter", ["hidden", "chained"])
@pytest.mark.parametrize("after", [1, 4])
def test_a_resumed_training_ends_with_the_same_bits(tmp_path, monkeypatch, after, adapter):
    whole, history = learn(adapter, ProcessShare(), num_epochs=6)
    checkpoint = Checkpoint(tmp_path / "unfinished.pt", "these settings")
    real, count = training.losses, 0

    def killed(*args):
        nonlocal count
        count += torch.is_grad_enabled()
        if count > (after * 4 + 2) * (3 if adapter == "chained" else 1):  # in the middle of an epoch of four steps, of three drafts each
            raise Stopped
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(training, "losses", killed)
        learn(adapter, ProcessShare(), checkpoint, num_epochs=6)
    assert len(checkpoint.load()["history"]) == after + 1
    resumed, again = learn(adapter, ProcessShare(), checkpoint, num_epochs=6)
    assert same(whole, resumed) and again == history
    other = dataclasses.replace(checkpoint, identity="other settings")
    assert other.load() is None and dataclasses.replace(checkpoint, resume=False).load() is None


def scripted(scores, **more):
    """The history and the epoch kept of a training whose validation scores (tokens per pass, loss) are given."""
    layer, waiting = torch.nn.Linear(1, 1), iter(scores)
    weights = []

    def evaluate():
        weights.append(float(layer.weight.detach()))
        tokens, loss = next(waiting)
        return {"tokens_per_pass": tokens, "loss": loss}

    def epoch(_):
        yield Batch((layer(torch.ones(1, 1)) - 9).square().mean(), {}, 1)

    kept, history = fitting.fit(layer, epoch, 1, evaluate, lambda: layer, config(num_epochs=len(scores) - 1, **more), [])
    return history, weights.index(float(kept.weight.detach()))


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([(1.0, 9.0), (2.0, 5.0), (1.9, 4.0), (1.8, 3.0)], 1),  # the loss falls on, the rounds do not become longer
        ([(1.0, 1.0), (1.1, 2.0), (1.2, 3.0)], 2),
        ([(1.5, 3.0), (1.5, 2.0), (1.5, 2.0), (1.4, 1.0)], 1),  # of equal rounds the lower loss, of equal losses the first
        ([(2.0, 1.0), (1.0, 0.5)], 0),
    ],
)
def test_the_epoch_with_most_tokens_per_pass_is_kept(scores, best):
    history, kept = scripted(scores, patience=9)
    assert kept == best == best_of(history)["epoch"] and len(history) == len(scores)


def test_training_stops_when_rounds_become_no_longer():
    scores = [(1.0, 9.0), (2.0, 8.0), (1.9, 7.0), (1.9, 6.0), (1.9, 5.0), (3.0, 4.0)]
    history, kept = scripted(scores, patience=3)
    assert kept == 1 and [h["epoch"] for h in history] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("adapter", ["hidden", "chained"])
def test_tokens_per_pass_are_those_that_measuring_finds(adapter):
    """Validation scores of the best epoch against the measurement of the adapter that was kept. The head reads all channels alike, and not
    their means: tokens vary."""
    head = HEAD / torch.logspace(-2, 2, D) * 100
    head[:, 0] -= head.sum(1)
    train, validation = (labelled(states(*which), head) for which in ((60, 1), (20, 2)))
    cfg = config(num_epochs=2, linear_units=0)
    if adapter == "hidden":
        kept, history = train_hidden(train, validation, head, cfg)
        match = scoring.score({"it": scoring.reads(kept)}, validation, head)["it"].match
    else:
        train, validation = (dataclasses.replace(some, events=some.draft[:, :3]) for some in (train, validation))
        kept, history = train_chained(train, validation, head, EMBEDDINGS, cfg)
        match = scoring.chain_scores(kept, validation, head, EMBEDDINGS, 5)[0].match
    blocks = metrics.decoding_blocks(match, validation.mask, 5, validation.ended)
    assert 0.1 < blocks.acceptance_rate(len(match)).value < 0.9
    assert best_of(history)["validation_tokens_per_pass"] == pytest.approx(blocks.tokens_per_pass(validation.lengths))


@pytest.mark.parametrize("adapter", ["hidden", "chained"])
def test_of_a_large_vocabulary_training_reads_the_ids_of_its_texts(adapter, monkeypatch):
    """Other ids, here every second one, change no score."""
    few, many = ([labelled(states(*which), HEAD) for which in ((60, 1), (20, 2))] for _ in range(2))
    if adapter == "chained":
        few = [dataclasses.replace(some, events=some.draft[:, :3]) for some in few]
    many = [dataclasses.replace(some, token_ids=2 * some.token_ids) for some in few]
    found = []
    for some, head, embeddings in ((few, HEAD, EMBEDDINGS), (many, *(x.repeat_interleave(2, 0) for x in (HEAD, EMBEDDINGS)))):
        monkeypatch.setattr(training, "MOST_IDS", 11)
        given = (*some, head) if adapter == "hidden" else (*some, head, embeddings)
        found.append((train_hidden if adapter == "hidden" else train_chained)(*given, config(num_epochs=2, linear_units=0))[1])
    assert len(few[0].token_ids[few[0].mask].unique()) > 2
    assert all(a == pytest.approx(b, rel=1e-5, abs=1e-6) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("adapter", ["hidden", "chained"])
def test_a_loss_that_is_not_finite_is_refused(adapter):
    with pytest.raises(UserError, match=r"in epoch 1, step 0, on 16 samples \(s\d+, s\d+, s\d+, …\); try a lower --lr \(now 0.01\)"):
        learn(adapter, ProcessShare(), mse_weight=float("inf"))


@pytest.mark.parametrize("positions", [1, 2, 6])
@pytest.mark.parametrize("linear_units", [0, 4])
def test_one_row_is_enough_to_train_on(positions, linear_units):
    """A single text, even of one position: the covariance is of rank zero or one, and the loss stays finite."""
    one = states(1, 1, s=max(2, positions))
    one.mask[:] = torch.arange(one.mask.shape[1]) < positions
    one = dataclasses.replace(one, lengths=one.mask.sum(1))
    adapter, history = train_hidden(one, states(5, 2), HEAD, config(linear_units=linear_units, num_epochs=2))
    assert all(math.isfinite(v) for h in history for v in h.values())
    assert torch.isfinite(adapter(states(5, 2).draft)).all()


@pytest.mark.parametrize("what", ["constant", "two channels", "copies"])
def test_degenerate_states_can_be_trained_on(what):
    """Covariances without full rank: all states equal, equal channels, equal rows."""
    few = states(20, 1)
    g = few.draft.clone()
    if what == "constant":
        g[:] = 2.5
    elif what == "two channels":
        g[..., 1:] = g[..., :1]
    else:
        g[:] = g[:1]
    few = dataclasses.replace(few, draft=g, target=bent(g))
    _, history = train_hidden(few, states(5, 2), HEAD, config(num_epochs=2))
    assert all(math.isfinite(v) for h in history for v in h.values())


def test_the_chained_adapter_learns_from_one_short_text():
    one, few = states(1, 1), states(5, 2)
    one.mask[:] = torch.arange(6) < 2
    one, few = (dataclasses.replace(x, lengths=x.mask.sum(1), events=x.draft[:, :1]) for x in (one, few))
    _, history = train_chained(one, few, HEAD, torch.randn(12, D), config(num_epochs=2))
    assert all(math.isfinite(v) for h in history for v in h.values())


def test_a_linear_fit_of_constant_inputs_is_the_mean():
    found = moments([(torch.full((9, 3), 4.0), torch.arange(27.0).view(9, 3))], 3, 3)
    for rank in (None, 2):
        torch.testing.assert_close(found.ridge(1e-6, rank)(torch.full((1, 3), 4.0)), torch.tensor([[12.0, 13.0, 14.0]]))


def test_every_epoch_has_its_own_order():
    orders = [torch.cat(fitting.shuffled(40, 7, 0, epoch)).tolist() for epoch in range(4)]
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert torch.cat(fitting.shuffled(40, 7, 0, 1)).tolist() == orders[1]
    assert torch.cat(fitting.shuffled(40, 7, 1, 1)).tolist() != orders[1]


class FirstOfTwo(ProcessShare):
    """The first of two processes; `others` holds what the second would add to the number of positions and to the gradients."""

    others: tuple[torch.Tensor, ...] = ()

    def all_reduce(self, *tensors):
        for tensor, other in zip(tensors, self.others[:1] if tensors[0].ndim == 0 else self.others[1:], strict=True):
            tensor += other


def test_gradients_of_uneven_shares_add_up_to_the_gradient_of_the_batch(monkeypatch):
    """One process has 3 positions, the other 9: each position counts the same, not each process."""
    torch.manual_seed(0)
    x, y = torch.randn(12, 4), torch.randn(12, 2)
    steps = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: steps.append([p.grad.clone() for p in self.param_groups[0]["params"]]))

    def run(part, rows):
        torch.manual_seed(1)
        layer = torch.nn.Linear(4, 2)
        epoch = lambda number: iter([Batch((layer(x[rows]) - y[rows]).pow(2).mean() / 50, {}, len(rows))])  # noqa: E731
        fitting.fit(
            layer, epoch, 1, lambda: {"loss": 1.0, "cosine": 0.0, "token_match": 0.0}, lambda: layer, config(num_epochs=1), [], None, part
        )
        return layer

    own, other = torch.arange(3), torch.arange(3, 12)
    run(ProcessShare(), torch.arange(12))
    torch.manual_seed(1)
    fresh = torch.nn.Linear(4, 2)
    ((fresh(x[other]) - y[other]).pow(2).mean() / 50 * 9 / 12).backward()
    FirstOfTwo.others = (torch.tensor(9.0), *(p.grad.clone() for p in fresh.parameters()))
    run(FirstOfTwo(0, 2), own)
    for whole, added in zip(*steps, strict=True):
        torch.testing.assert_close(added, whole)


def test_gradients_are_clipped_to_length_one(monkeypatch):
    """AdamW hides missing clipping after one step, so the test looks at the gradients themselves."""
    norms, real = [], torch.optim.AdamW.step

    def step(self):
        norms.append(float(torch.stack([p.grad.norm() for group in self.param_groups for p in group["params"]]).norm()))
        return real(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    train_hidden(states(60, 1), states(20, 2), HEAD, config(num_epochs=2, mse_weight=1000.0, linear_units=0))
    assert len(norms) == 8 and max(norms) == pytest.approx(1.0, abs=1e-4)


def test_the_shares_of_a_batch_are_all_of_its_rows():
    batch = torch.arange(13)
    parts = [ProcessShare(rank, 3).rows(batch) for rank in range(3)]
    assert sorted(torch.cat(parts).tolist()) == list(range(13))
    assert ProcessShare(1, 3).rows(batch[:2]).tolist() == [0, 1]  # fewer rows than processes: each process reads both


def learn(adapter, part, checkpoint=None, **more):
    """A short training of either adapter, on rows of very different lengths."""
    train, validation, cfg = labelled(states(60, 1)), labelled(states(20, 2)), config(**{"num_epochs": 3, **more})
    if adapter == "hidden":
        return train_hidden(train, validation, HEAD, cfg, checkpoint, part)
    train, validation = (dataclasses.replace(some, events=some.draft[:, :3]) for some in (train, validation))
    return train_chained(train, validation, HEAD, EMBEDDINGS, cfg, checkpoint, part)


def labelled(some, head=HEAD):
    """The states with the tokens that they emit."""
    return dataclasses.replace(some, token_ids=(some.target @ head.T).argmax(-1) * some.mask)


TWO = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_training import ProcessShare, learn
from feature_alignment.storage.processes import process_group
rank, world, _, wait = process_group("cpu")
for name in ("hidden", "chained"):
    adapter, history = learn(name, ProcessShare(rank, world))
    if rank == 0:
        torch.save({"state": adapter.state_dict(), "loss": [h["validation_loss"] for h in history]}, f"{sys.argv[2]}/{name}.pt")
wait()
"""


@pytest.mark.slow
def test_two_processes_learn_the_same_as_one(tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tmp_path / "two.py"), str(ROOT / "tests"), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("hidden", "chained"):
        found = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        alone, history = learn(name, ProcessShare())
        assert found["loss"] == pytest.approx([h["validation_loss"] for h in history], rel=1e-3)
        for key, value in alone.state_dict().items():
            torch.testing.assert_close(found["state"][key], value, atol=2e-3, rtol=2e-3)


def test_a_new_adapter_is_the_identity():
    g = torch.randn(3, 4, 24)
    assert torch.equal(HiddenAdapter(24, 24, 6)(g), g)
    assert torch.equal(HiddenAdapter(24, 8, 6)(g), g[..., -8:])  # of three layers side by side, the last
    assert not HiddenAdapter(24, 9, 6).residual
    assert HiddenAdapter(4096, 4096, 256).num_parameters == 2_101_504


@pytest.mark.parametrize("kl", [0.0, 0.5])
def test_the_loss_is_the_sum_of_its_weighted_parts(kl):
    """Also in training, where the head is only used if it has a weight."""
    torch.manual_seed(0)
    predicted, target = torch.randn(5, D), torch.randn(5, D)
    cfg = config(mse_weight=0.7, cosine_weight=0.2, kl_weight=kl)
    mse = float((predicted - target).pow(2).mean()) / 3.0
    cosine = sum(float(p @ t / p.norm() / t.norm()) for p, t in zip(predicted, target, strict=True)) / 5
    said, wanted = (HEAD @ predicted.T).T, (HEAD @ target.T).T
    divergence = sum(float((w.softmax(0) * (w.softmax(0) / s.softmax(0)).log()).sum()) for s, w in zip(said, wanted, strict=True)) / 5
    by_hand = 0.7 * mse + 0.2 * (1 - cosine) + kl * divergence
    for learning in (True, False):
        with torch.set_grad_enabled(learning):
            loss, parts = training.losses(predicted, target, HEAD, 3.0, cfg)
        assert float(loss) == pytest.approx(by_hand, rel=1e-5) and float(parts["loss"]) == float(loss)
        assert float(parts["mse"]) == pytest.approx(mse, rel=1e-5) and float(parts["cosine"]) == pytest.approx(cosine, abs=1e-6)
        assert ("kl" in parts) == ("token_match" in parts) == (bool(kl) or not learning)
    assert float(parts["token_match"]) == float((said.argmax(1) == wanted.argmax(1)).float().mean())


@pytest.mark.parametrize("kind", ["ce", "tv"])
def test_the_other_losses_by_hand(kind):
    torch.manual_seed(0)
    predicted, target = torch.randn(5, D), torch.randn(5, D) * 300
    q, p = ((x @ HEAD.T).double().softmax(-1) for x in (predicted, target))
    kl = float((p * (p / q).log()).sum(-1).mean())
    rejected = float((1 - torch.minimum(p, q).sum(-1)).mean())
    loss, parts = training.losses(predicted, target, HEAD, 3.0, config(loss=kind, kl_weight=0.0))
    assert float(loss) == pytest.approx(kl if kind == "ce" else 0.9 * rejected + 0.1 * kl, rel=1e-4)
    assert float(parts["kl"]) == pytest.approx(kl, rel=1e-4) and rejected > 0.1


def test_later_draft_steps_of_the_chained_adapter_weigh_less_in_tv(monkeypatch):
    """Of three steps with losses 0, 1 and 2 on as many positions each."""
    n, s = 4, 4
    g = torch.randn(n, s, D, generator=torch.Generator().manual_seed(1))
    rows, ids = [{"id": f"s{i}", "sequence": str(i)} for i in range(n)], torch.zeros(n, s, dtype=torch.long)
    some = HiddenStates(g, bent(g), ids, torch.ones(n, s, dtype=torch.bool), torch.full((n,), s), rows, {}, g[:, :3])
    sizes = [n * (s - 1), n * (s - 2), n * (s - 3)]

    def graded(predicted, *_):
        loss = predicted.sum() * 0 + sizes.index(len(predicted))
        return loss, {"loss": loss, "cosine": loss, "token_match": loss}

    monkeypatch.setattr(training, "losses", graded)
    for kind, decay in (("ce_cosine", 1.0), ("tv", 0.9)):
        _, history = train_chained(some, some, HEAD, EMBEDDINGS, config(num_epochs=1, loss=kind))
        weights = [size * decay**k for k, size in enumerate(sizes)]
        assert history[0]["validation_loss"] == pytest.approx((weights[1] + 2 * weights[2]) / sum(weights))


def test_the_learning_rate_warms_up_then_decays_to_zero(monkeypatch):
    """lr: warm-up over 5 % of the steps, then half a cosine."""
    rates, real = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: (rates.append(self.param_groups[0]["lr"]), real(self, *a))[1])
    train_hidden(states(60, 1), states(20, 2), HEAD, config(num_epochs=15, lr=0.01, patience=99))
    steps = 15 * 4
    by_hand = [0.01 * min(1, (s + 1) / 3) * (1 + math.cos(math.pi * s / steps)) / 2 for s in range(steps)]
    assert rates == pytest.approx(by_hand)


def test_muon_takes_the_weights_of_linear_layers(monkeypatch):
    """Each parameter has one optimizer, both follow the same learning rate, and a step turns a matrix as far in all its directions."""
    rates, real = [], torch.optim.Muon.step
    monkeypatch.setattr(torch.optim.Muon, "step", lambda self, *a: (rates.append(self.param_groups[0]["lr"]), real(self, *a))[1])
    settings = config(optimizer="muon", num_epochs=2, lr=0.01, weight_decay=0.5)
    train_hidden(states(60, 1), states(20, 2), HEAD, settings)
    assert rates == pytest.approx([0.01 * (1 + math.cos(math.pi * s / 8)) / 2 for s in range(8)])

    model = torch.nn.Sequential(torch.nn.Embedding(9, 6), torch.nn.Linear(6, 20), torch.nn.RMSNorm(20), torch.nn.GRU(20, 8))
    rest, linear = fitting.optimizers_of(model, settings)
    (alone,) = fitting.optimizers_of(model, config())
    of_muon, of_adamw, of_one = ([id(p) for group in o.param_groups for p in group["params"]] for o in (linear, rest, alone))
    assert of_muon == [id(model[1].weight)] and sorted(of_muon + of_adamw) == sorted(of_one) == sorted(map(id, model.parameters()))
    assert [type(o).__name__ for o in (rest, linear, alone)] == ["AdamW", "Muon", "AdamW"]
    assert {o.param_groups[0]["weight_decay"] for o in (rest, linear)} == {0.5}

    before, gradient = model[1].weight.detach().clone(), torch.randn(20, 6) @ torch.diag(10.0 ** -torch.arange(6.0))
    model[1].weight.grad = gradient
    linear.step()
    turned = torch.linalg.svdvals((before * (1 - 0.01 * 0.5) - model[1].weight.detach()) / (0.01 * 0.2 * 20**0.5))
    assert turned[2] > 0.3 and turned[0] < 1.4  # the gradient's own third is a hundredth of its first


def test_means_over_positions_weigh_each_batch_by_its_positions():
    batches = iter([(3, {"loss": torch.tensor(1.0)}), (1, {"loss": torch.tensor(5.0)})])
    assert fitting.mean_over_positions(batches) == {"loss": 2.0}


@pytest.mark.parametrize("adapter", ["hidden", "chained"])
def test_the_scores_of_an_epoch_are_means_over_its_batches(adapter):
    """Without learning and with texts of equal length, they equal the scores of the same rows as validation."""
    n, s = 32, 5
    g = torch.randn(n, s, D, generator=torch.Generator().manual_seed(1))
    rows = [{"id": f"s{i}", "sequence": str(i)} for i in range(n)]
    ids = torch.zeros(n, s, dtype=torch.long)
    some = HiddenStates(g, bent(g), ids, torch.ones(n, s, dtype=torch.bool), torch.full((n,), s), rows, {}, g[:, :3])
    cfg = config(lr=0.0, num_epochs=2, batch_size=8, linear_units=0, kl_weight=0.5, patience=9)
    if adapter == "hidden":
        _, history = train_hidden(some, some, HEAD, cfg)
    else:
        _, history = train_chained(some, some, HEAD, torch.ones(12, D), cfg)
    assert [h["epoch"] for h in history] == [0, 1, 2]
    for h in history[1:]:
        for name in ("loss", "mse", "cosine", "kl", "token_match"):
            assert h[f"train_{name}"] == pytest.approx(h[f"validation_{name}"], rel=1e-4, abs=1e-6), name
