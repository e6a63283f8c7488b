"""Tests of prior/model.py: the order of codes, the cache, sampling, and checkpoints."""

import pytest
import torch

from prior.model import CodePrior, sample_codes


def reading_order(prior: CodePrior) -> list[tuple[int, int, int]]:
    """Return grid, row and column of each code in reading order, grid after grid."""
    order = []
    for n, grid in enumerate(prior.grids):
        for row in range(grid.height):
            for column in range(grid.width):
                order.append((n, row, column))
    return order


def changed_logits(prior, grids, grid, row, column, before, where) -> list[torch.Tensor]:
    """Change one code; return for each grid which logits change, (B, h, w)."""
    changed_grids = [codes.clone() for codes in grids]
    code = changed_grids[grid][:, row, column]
    changed_grids[grid][:, row, column] = (code + 1) % 6
    after = prior(changed_grids, *where)
    return [(new != old).any(-1) for new, old in zip(after, before, strict=True)]


def test_a_code_changes_only_later_logits(prior, inputs):
    """Logits up to its own stay the same, bit for bit; some later one changes in every slice."""
    codes, *where = inputs
    grids = prior.to_grids(codes)
    order = reading_order(prior)
    sizes = [grid[0].numel() for grid in grids]
    assert len(order) == sum(sizes)
    # The place of each code in the order, in all grids flattened and joined.
    places = [sum(sizes[:g]) + i * grids[g].shape[-1] + j for g, i, j in order]
    with torch.no_grad():
        before = prior(grids, *where)
        for n, (grid, row, column) in enumerate(order):
            changed = changed_logits(prior, grids, grid, row, column, before, where)
            flat = torch.cat([grid_changed.flatten(1) for grid_changed in changed], 1)[:, places]
            assert not flat[:, : n + 1].any()
            assert flat[:, n + 1 :].all(0).any() == (n < len(order) - 1)


def test_every_earlier_code_matters(prior, inputs):
    """The first row matters to the last code, out of reach of convolutions, and to the next grid.

    The next grid's first code is meant.
    """
    codes, *where = inputs
    grids = prior.to_grids(codes)
    with torch.no_grad():
        before = prior(grids, *where)
        for n in range(len(grids)):
            for column in (0, -1):
                changed = changed_logits(prior, grids, n, 0, column, before, where)
                assert changed[n][:, -1, -1].any()
                if n + 1 < len(grids):
                    assert changed[n + 1][:, 0, 0].any()


def test_code_by_code_gives_the_same_logits_as_all_at_once(prior, inputs):
    codes, *where = inputs
    grids = prior.to_grids(codes)
    logits = []
    for n, grid_codes in enumerate(grids):
        num_codes = 20 if n == len(grids) - 1 else 6
        logits.append(torch.zeros(*grid_codes.shape, num_codes))
    order = []

    def choose(index, code_logits, row, column):
        order.append((index, row, column))
        logits[index][:, row, column] = code_logits
        return grids[index][:, row, column]

    assert torch.equal(prior.decode(*where, choose), codes)
    assert order == reading_order(prior)
    with torch.no_grad():
        expected = prior(grids, *where)
    for result, right in zip(logits, expected, strict=True):
        torch.testing.assert_close(result, right, rtol=1e-4, atol=1e-4)


def test_position_and_view_matter_and_a_position_may_be_unknown(prior, inputs):
    codes, position, view = inputs
    grids = prior.to_grids(codes)
    with torch.no_grad():
        before = prior(grids, position, view)
        for other in ((1 - position, view), (position, (view + 1) % 4)):
            for logits, changed in zip(before, prior(grids, *other), strict=True):
                assert logits.isfinite().all()
                assert (changed != logits).flatten(1).any(1)[:2].all()


# ---------------------------------------------------------------- sampling


def test_samples_repeat_and_differ_with_the_seed(prior):
    position = torch.full((4,), 0.5)
    view = torch.zeros(4, dtype=torch.long)

    def sample(seed, **options):
        return prior.sample(position, view, torch.Generator().manual_seed(seed), **options)

    first = sample(1)
    assert torch.equal(first, sample(1))
    assert not torch.equal(first, sample(2))
    assert len(first.flatten(1).unique(dim=0)) == 4
    most_likely = sample(1, temperature=0)
    assert torch.equal(most_likely, sample(2, temperature=0))
    assert torch.equal(most_likely, sample(3, top_k=1))
    assert torch.equal(most_likely, sample(4, top_p=1e-9))


def test_samples_of_one_code_have_the_requested_probabilities():
    logits = 2 * torch.randn(20, generator=torch.Generator().manual_seed(0))

    draws = torch.rand(3000, generator=torch.Generator().manual_seed(0))

    def sample(**options):
        return sample_codes(logits.expand(3000, 20), draws, **options)

    probabilities = logits.softmax(0)
    frequencies = torch.bincount(sample(), minlength=20) / 3000
    torch.testing.assert_close(frequencies, probabilities, atol=0.03, rtol=0)
    ranked = probabilities.argsort(descending=True)
    for extreme in (0.0, 1.0):
        (code,) = sample_codes(logits[None], torch.tensor([extreme]), top_k=3).tolist()
        assert code == ranked[2 if extreme else 0]
    assert set(sample(top_k=3).tolist()) == set(ranked[:3].tolist())
    nucleus_size = int((probabilities[ranked].cumsum(0) < 0.6).sum()) + 1
    assert set(sample(top_p=0.6).tolist()) == set(ranked[:nucleus_size].tolist())
    frequencies = torch.bincount(sample(temperature=0.5), minlength=20) / 3000
    torch.testing.assert_close(frequencies, (2 * logits).softmax(0), atol=0.03, rtol=0)


def test_prefix_rows_are_kept_and_the_others_are_sampled(prior, inputs):
    codes, position, view = inputs
    generator = torch.Generator().manual_seed(0)
    sampled = prior.sample(position, view, generator, prefix=codes, prefix_rows=4)
    assert torch.equal(sampled[:, :4], codes[:, :4])
    assert not torch.equal(sampled[:, 4:], codes[:, 4:])


# ---------------------------------------------------------------- codebooks, checkpoints, mistakes


def test_a_prior_recognises_its_codebook():
    prior = CodePrior(20, 5, 8, 16, channels=16, num_heads=2)
    embedding = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    codes = torch.randint(20, (9, 8, 16), generator=torch.Generator().manual_seed(0))
    prior.initialize(embedding, torch.linspace(-1, 1, 20), codes, torch.linspace(0, 1, 9))
    assert prior.has_codebook(embedding)
    assert not prior.has_codebook(embedding.flip(0))
    assert not prior.has_codebook(embedding[:19])


def test_tensors_have_the_names_of_earlier_checkpoints():
    """Renaming an attribute would make the checkpoints of earlier versions unreadable."""
    names = set(CodePrior(20, 5, 8, 16, channels=16, num_layers=1, num_heads=2).state_dict())
    grid = "bias brightness columns embedding rows first.weight near.2.weight mix.2.weight"
    grid += " spread.weight perceptron.3.weight last.1.weight"
    block = "norm2.weight queries_keys_values.weight project.weight perceptron.2.weight"
    expected = {f"grids.0.{name}" for name in grid.split()}
    expected |= {f"blocks.0.{name}" for name in block.split()}
    expected |= {"grids.1.context.2.weight", "views", "places.2.weight", "norm.weight"}
    assert expected <= names
    assert len(names) == 85


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((6, 8), {"num_grids": 2}, "grid is 6 x 8; expected sides divisible by 4 and 8"),
        ((8, 12), {"num_grids": 3}, "grid is 8 x 12; expected sides divisible by 8 and 16"),
        ((8, 16), {"channels": 30}, "channels is 30; expected a multiple of num_heads 4"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(shape, options, message):
    with pytest.raises(ValueError, match=message):
        CodePrior(20, 5, *shape, **options)
