"""The prior over codes: order, cache, drawing; its training, by train_prior.py; and coding under it."""

import math
import sys
from pathlib import Path

import pytest
import torch

from prior.model import CodePrior

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

ROOT = Path(__file__).parents[1]
COLUMNS = ["epoch", "step", "train_loss", "train_outline_2", "train_codes", "val_loss", "val_bits",
           "val_outline_bits", "lr", "seconds"]  # fmt: skip


def untrained(num_grids: int) -> CodePrior:
    """A prior of 8 x 16 codes out of 20, with outlines out of 6."""
    torch.manual_seed(0)
    shape = {
        "channels": 16,
        "num_layers": 2,
        "num_heads": 2,
        "num_outlines": 6,
        "num_grids": num_grids,
    }
    prior = CodePrior(20, 5, 8, 16, **shape).eval()
    prior.initialize(
        torch.randn(20, 5), torch.randn(20), torch.randint(20, (9, 8, 16)), torch.linspace(0, 1, 9)
    )
    return prior


@pytest.fixture(params=[1, 2, 3])
def prior(request) -> CodePrior:
    """With no, one and two outlines; its logits differ widely."""
    prior = untrained(request.param)
    for grid in prior.grids:
        torch.nn.init.normal_(grid.last[1].weight, std=0.5)
    return prior


@pytest.fixture
def inputs() -> tuple:
    """CodeDataset of three slices, where they lie (one unknown), and how they are mirrored."""
    codes = torch.randint(20, (3, 8, 16), generator=torch.Generator().manual_seed(1))
    return codes, torch.tensor([0.1, 0.9, math.nan]), torch.tensor([0, 1, 3])


def order(prior: CodePrior) -> list[tuple[int, int, int]]:
    """Grid, row and column of each code, in which order they come: reading order, grid after grid."""
    return [
        (n, i, j)
        for n, grid in enumerate(prior.grids)
        for i in range(grid.height)
        for j in range(grid.width)
    ]


# ---------------------------------------------------------------- the model


def test_a_later_code_never_changes_an_earlier_logit(prior, inputs):
    """Each code in turn is changed: logits up to its own stay, bit for bit; some later one's are other ones."""
    codes, *where = inputs
    pyramid, places = prior.pyramid(codes), order(prior)
    assert len(places) == sum(one[0].numel() for one in pyramid)
    with torch.no_grad():
        before = prior(pyramid, *where)
        for n, (grid, i, j) in enumerate(places):
            given = [one.clone() for one in pyramid]
            given[grid][:, i, j] = (given[grid][:, i, j] + 1) % 6
            changed = [
                (new != old).any(-1) for new, old in zip(prior(given, *where), before, strict=True)
            ]
            assert not any(changed[g][:, a, b].any() for g, a, b in places[: n + 1])
            later = [changed[g][:, a, b].all() for g, a, b in places[n + 1 :]]  # in every slice
            assert any(later) == (n < len(places) - 1)


def test_every_earlier_code_is_seen(prior, inputs):
    """The first row of a grid matters to its last code, out of reach of convolutions, and to the next grid's first."""
    codes, *where = inputs
    pyramid = prior.pyramid(codes)
    with torch.no_grad():
        before = prior(pyramid, *where)
        for n in range(len(pyramid)):
            for column in (0, -1):
                given = [one.clone() for one in pyramid]
                given[n][:, 0, column] = (given[n][:, 0, column] + 1) % 6
                changed = [
                    (new != old).any(-1)
                    for new, old in zip(prior(given, *where), before, strict=True)
                ]
                assert changed[n][:, -1, -1].any()
                assert all(after[:, 0, 0].any() for after in changed[n + 1 : n + 2])


def test_code_by_code_with_a_cache_is_the_same_as_all_at_once(prior, inputs):
    codes, *where = inputs
    pyramid = prior.pyramid(codes)
    logits = [
        torch.zeros(*one.shape, 20 if n == len(pyramid) - 1 else 6) for n, one in enumerate(pyramid)
    ]
    walked = []

    def choose(number, found, row, column):
        walked.append((number, row, column))
        logits[number][:, row, column] = found
        return pyramid[number][:, row, column]

    assert torch.equal(prior.walk(*where, choose), codes) and walked == order(prior)
    with torch.no_grad():
        for found, right in zip(logits, prior(pyramid, *where), strict=True):
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


def test_place_and_view_matter_and_may_be_unknown(prior, inputs):
    codes, position, view = inputs
    pyramid = prior.pyramid(codes)
    with torch.no_grad():
        before = prior(pyramid, position, view)
        for other in ((1 - position, view), (position, (view + 1) % 4)):
            for logits, changed in zip(before, prior(pyramid, *other), strict=True):
                assert logits.isfinite().all()
                assert (changed != logits).flatten(1).any(1)[:2].all()


def test_at_first_it_predicts_the_frequencies(inputs):
    """Of an outline about its place, in slices of that part of the volume; of codes where that outline stands."""
    prior = untrained(2)
    codes = (
        torch.randint(20, (400, 8, 16), generator=torch.Generator().manual_seed(0)).square() // 20
    )  # not all alike
    lies = torch.linspace(0, 1, 400)
    prior.initialize(torch.randn(20, 5), torch.randn(20), codes, lies)
    outline, _ = prior.pyramid(codes)
    mine, position, view = prior.pyramid(inputs[0]), *inputs[1:]
    first, second = prior(mine, position, view)

    def check(logits, seen):
        every = codes if logits.numel() == 20 else outline
        overall = torch.bincount(every.flatten(), minlength=logits.numel()) + 0.1
        counts = (
            torch.bincount(seen.flatten(), minlength=logits.numel()) + 20 * overall / overall.sum()
        )
        torch.testing.assert_close(logits.softmax(0), counts / counts.sum(), rtol=1e-4, atol=1e-6)

    near = outline[:, 1:4, 2:5]  # around (2, 3)
    check(first[0, 2, 3], near[lies < 0.2])  # position 0.1, as it is
    check(first[1, 4 - 1 - 2, 3], near[lies >= 0.8])  # position 0.9, mirrored left-right
    check(first[2, 4 - 1 - 2, 8 - 1 - 3], near)  # unknown, mirrored both ways
    where = outline == mine[0][0, 2, 5]
    check(second[0, 4, 11], codes[:, 0::2, 1::2][where])


def test_an_outline_tells_how_bright_codes_are():
    """Levels by k-means over the means of 2 x 2 codes; where those take few values, each has its level."""
    prior = CodePrior(4, 3, 8, 16, channels=16, num_heads=2, num_outlines=4, num_grids=3).eval()
    generator = torch.Generator().manual_seed(0)
    which = torch.randint(4, (50, 4, 8), generator=generator)
    codes = which.repeat_interleave(2, 1).repeat_interleave(2, 2)
    brightness = torch.tensor([-1.0, 2.0, 0.5, 0.0])
    prior.initialize(torch.eye(4, 3), brightness, codes, torch.zeros(50), generator)
    coarse, outline, same = prior.pyramid(codes)
    assert torch.equal(same, codes)
    torch.testing.assert_close(prior.grids[1].brightness, torch.tensor([-1.0, 0.0, 0.5, 2.0]))
    assert torch.equal(outline, torch.tensor([0, 3, 2, 1])[which])
    means = torch.nn.functional.avg_pool2d(brightness[which], 2)
    nearest = (means[..., None] - prior.grids[0].brightness).abs().argmin(-1)
    assert torch.equal(coarse, nearest) and len(coarse.unique()) == 4
    # An outline's embedding is the mean of those that it stands for, beside its brightness: here, of one code each.
    expected, found = prior.grids[2].embedding, prior.grids[1].embedding[torch.tensor([0, 3, 2, 1])]
    torch.testing.assert_close(
        torch.corrcoef(torch.stack([expected.flatten(), found[:, :3].flatten()]))[0, 1].item(), 1.0
    )


def test_drawing_repeats_and_differs_with_the_seed(prior):
    position, view = torch.full((4,), 0.5), torch.zeros(4, dtype=torch.long)

    def draw(seed, **options):
        return prior.sample(position, view, torch.Generator().manual_seed(seed), **options)

    assert torch.equal(draw(1), draw(1))
    assert (
        not torch.equal(draw(1), draw(2))
        and len({tuple(one.flatten().tolist()) for one in draw(1)}) == 4
    )
    likeliest = draw(1, temperature=0)
    assert torch.equal(likeliest, draw(2, temperature=0))
    assert torch.equal(likeliest, draw(3, top_k=1)) and torch.equal(likeliest, draw(4, top_p=1e-9))


def test_top_k_and_top_p_leave_the_unlikely_out(prior, monkeypatch):
    """Many draws of one code, whose probabilities are known."""
    logits = 2 * torch.randn(20, generator=torch.Generator().manual_seed(0))

    def walk(position, view, choose, progress):
        return choose(0, logits.expand(3000, 20), 0, 0)

    monkeypatch.setattr(prior, "walk", walk)

    def draw(**options):
        return prior.sample(torch.zeros(3000), None, torch.Generator().manual_seed(0), **options)

    codes = draw()
    chances = logits.softmax(0)
    shares = torch.bincount(codes, minlength=20) / 3000
    torch.testing.assert_close(shares, chances, atol=0.03, rtol=0)
    ranked = chances.argsort(descending=True)
    assert set(draw(top_k=3).tolist()) == set(ranked[:3].tolist())
    enough = int((chances[ranked].cumsum(0) < 0.6).sum()) + 1
    assert set(draw(top_p=0.6).tolist()) == set(ranked[:enough].tolist())
    sharper = torch.bincount(draw(temperature=0.5), minlength=20) / 3000
    torch.testing.assert_close(sharper, (2 * logits).softmax(0), atol=0.03, rtol=0)


def test_given_rows_are_kept_and_the_rest_is_drawn(prior, inputs):
    codes, position, view = inputs
    drawn = prior.sample(
        position, view, torch.Generator().manual_seed(0), given=codes, given_rows=4
    )
    assert torch.equal(drawn[:, :4], codes[:, :4]) and not torch.equal(drawn[:, 4:], codes[:, 4:])


def test_shapes_it_has_no_room_for():
    with pytest.raises(
        ValueError, match="the code grid is 6 x 8; expected sides divisible by 4 and 8"
    ):
        CodePrior(20, 5, 6, 8, num_grids=2)
    with pytest.raises(
        ValueError, match="the code grid is 8 x 12; expected sides divisible by 8 and 16"
    ):
        CodePrior(20, 5, 8, 12, num_grids=3)
    with pytest.raises(ValueError, match="channels is 30; expected a multiple of num_heads 4"):
        CodePrior(20, 5, 8, 16, channels=30)


# ---------------------------------------------------------------- coding
