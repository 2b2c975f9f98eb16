"""Duplicates: the cells against brute force, what is kept against the definition."""

import dataclasses

import numpy as np
import pytest

from lens_jax.bench import vectors as made
from lens_jax.data.engine.dedup import cells, exact, near, priority, resolve, run
from lens_jax.data.engine.dedup.embedded import Embedded
from lens_jax.data.engine.dedup.found import Cut, read_found, write_found
from lens_jax.data.engine.dedup.rows import load_arrays
from lens_jax.data.engine.dedup.short import leading_axes, shorten
from lens_jax.data.engine.dedup.task import margin_for

DIM = 256
HERE = Embedded()


def kept_of(names: np.ndarray, pairs) -> set[bytes]:
    """Keep first, one row after the other: what is kept is defined by this."""
    before = {}
    for a, b in pairs:
        before.setdefault(b, []).append(a)
    kept = set()
    for name in sorted(key.tobytes() for key in priority.as_bytes(names)):
        if not any(a in kept for a in before.get(name, ())):
            kept.add(name)
    return kept


@pytest.fixture(scope="module")
def rows():
    """(keys, vectors) of 5,000 rows: clusters, a chain, a clique of 600, pairs a millionth from the threshold.

    In float64 the pairs at the border are where they should be: they are chosen after rounding to float16.
    """
    draw = np.random.default_rng(3)
    plain = made.clustered(4240, DIM).astype(np.float64)
    one = lambda: made.beside(plain[:1], np.zeros(1), draw)[0]
    chain = [one()]
    for _ in range(39):  # neighbours are duplicates, the next but one are not
        chain.append(made.beside(chain[-1][None], np.array([0.9925]), draw)[0])
    clique = made.beside(np.tile(one(), (600, 1)), draw.uniform(0.995, 0.9999, 600), draw)
    vectors = np.concatenate([plain, np.array(chain), clique, _border(draw)]).astype(np.float16)
    vectors = vectors[draw.permutation(len(vectors))]
    return made.keys(len(vectors)), vectors


def _border(draw, each: int = 30) -> np.ndarray:
    """Pairs whose cosine after rounding is within 1e-6 of the threshold, as many above it as below."""
    found = {True: [], False: []}
    while min(map(len, found.values())) < each:
        a = draw.standard_normal((2000, DIM))
        a /= np.linalg.norm(a, axis=1, keepdims=True)
        b = made.beside(a, np.full(len(a), made.COSINE), draw)
        a, b = (x.astype(np.float16).astype(np.float64) for x in (a, b))
        cosine = (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
        for row in np.flatnonzero(abs(cosine - made.COSINE) < 1e-6):
            found[bool(cosine[row] > made.COSINE)].append((a[row], b[row]))
    return np.array([pair for pairs in found.values() for pair in pairs[:each]]).reshape(-1, DIM)


@pytest.fixture(scope="module")
def wanted(rows):
    return made.brute_force(*rows)


def find(folder, rows, units=5, margin=None, search=HERE, centroids=0, max_cell=20_000, **options):
    """(outcome, pairs, what is dropped) of a search among rows."""
    names, vectors = rows
    task = made.make_task(folder / "work", made.store(folder / "rows", vectors, names), units, margin, **options)
    outcome = run.find(task, search, True, centroids, max_cell, 0)
    tables = sorted((task.folder / "pairs").glob("*/*.parquet"))
    pairs, _ = read_found(tables, made.WIDTH)
    resolved = load_arrays(task.folder / "resolved", resolve.Resolved)
    return outcome, made.as_set(pairs), resolved


def dropped(resolved) -> set[bytes]:
    return {key.tobytes() for key in priority.as_bytes(resolved.keys[~resolved.kept])}


def test_the_made_rows_are_hard(rows, wanted):
    assert len(rows[0]) == 5000
    assert len(wanted) > 600 * 599 / 2 + 30
    assert sum(abs(cosine - made.COSINE) < 1e-6 for cosine in wanted.values()) >= 30


@pytest.mark.parametrize("max_cell", [20_000, 150])
def test_pairs_are_those_of_brute_force(tmp_path, rows, wanted, max_cell):
    """At margin 1, whatever the cells: also where those that are too large were divided, or are of one row."""
    outcome, pairs, _ = find(tmp_path, rows, centroids=70 if max_cell > 150 else 0, max_cell=max_cell, limit=10_000)
    assert pairs == wanted.keys()
    assert outcome.starved == 0


def test_kept_is_what_one_by_one_would_keep(tmp_path, rows, wanted):
    """Lists are cut off after 256 here, and some of those of the cliques are."""
    names, _ = rows
    outcome, pairs, resolved = find(tmp_path, rows)
    assert len(pairs) < len(wanted)
    kept = kept_of(names, wanted)
    assert dropped(resolved) == {key.tobytes() for key in priority.as_bytes(names)} - kept
    # Each dropped row names the first kept one of its duplicates, and their cosine.
    for place in np.flatnonzero(~resolved.kept):
        name, other = (priority.as_bytes(resolved.keys[[x]]).tobytes() for x in (place, resolved.duplicate_of[place]))
        assert other in kept
        assert abs(resolved.cosine[place] - wanted[other, name]) < 1e-6
    assert outcome.near == len(dropped(resolved))


def test_short_vectors_rule_out_no_duplicate(rows):
    """Their cosine is never the smaller one, for any axes, and leaves few pairs of these vectors to be compared."""
    units = cells.unit_vectors(rows[1][:2000])
    cosine = units.astype(np.float64) @ units.T.astype(np.float64)
    chosen = leading_axes(units, made.COSINE)
    assert chosen.shape[1] < DIM
    for axes in (chosen, chosen[:, :1], np.linalg.qr(np.random.default_rng(0).standard_normal((DIM, DIM)))[0]):
        short = shorten(axes.astype(np.float32), units)
        assert short.shape == (2000, axes.shape[1] + 1)
        bound = short @ short.T
        assert (bound - cosine).min() > -1e-6
    assert np.mean(shorten(chosen, units) @ shorten(chosen, units).T > made.COSINE) < 0.03


def test_the_margin_is_smaller_for_more_vectors():
    assert [margin_for(vectors) for vectors in (1, 10_000_000, 10_000_001, 8e8)] == [1, 1, 0.2, 0.2]


def test_recall_at_a_fifth_of_the_margin(tmp_path, wanted, rows):
    _, pairs, _ = find(tmp_path, rows, margin=0.2, limit=10_000)
    assert pairs <= wanted.keys()
    # Of 1,000 rows that have a duplicate at most one is left without any. One row of the clique of 600, which makes
    # nearly all pairs, may lie across a bisector that others do not: a three-hundredth of the pairs.
    having = lambda pairs: {key for pair in pairs for key in pair}
    assert len(having(pairs)) >= 0.999 * len(having(wanted))
    assert len(pairs) >= 0.99 * len(wanted)


@pytest.mark.parametrize("margin", [1.0, 0.2])
def test_order_and_units_do_not_matter(tmp_path, rows, margin):
    rows = rows[0][:1500], rows[1][:1500]
    order = np.random.default_rng(9).permutation(1500)
    _, pairs, resolved = find(tmp_path / "a", rows, margin=margin)
    _, others, again = find(
        tmp_path / "b", (rows[0][order], rows[1][order]), units=17, margin=margin, search=Embedded(2)
    )
    assert others == pairs
    assert all(np.array_equal(a, b) for a, b in zip(resolved, again))


def test_lists_that_decide_nothing_are_made_longer(tmp_path):
    """A row whose listed neighbours were all dropped, by a row that is not its duplicate, needs the others."""
    degrees = lambda angle: np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle)), 0, 0])
    # Duplicates are up to 9.9 degrees apart. The first drops the next eight. These fill the lists of the last two, of
    # which the one is kept and the other is its duplicate.
    angles = [0, *[7 + 0.1 * n for n in range(8)], 12, 16]
    vectors = np.stack([degrees(angle) for angle in angles]).astype(np.float16)
    names = priority.as_keys(np.arange(len(angles), dtype=np.uint8)[:, None].repeat(16, 1))
    outcome, _, resolved = find(tmp_path, (names, vectors), units=2, limit=8, centroids=1)
    assert outcome.starved == 2
    kept = kept_of(names, made.brute_force(names, vectors))
    assert len(kept) == 2
    assert dropped(resolved) == {key.tobytes() for key in priority.as_bytes(names)} - kept


def test_copies_of_one_image_take_time_by_their_number():
    """Not by its square: rows whose lists are full are compared no further; a cell that is one spot is not divided."""
    count, limit = 6000, 32
    vectors = made.beside(np.tile(np.eye(1, 16), (count, 1)), np.full(count, 0.9999), np.random.default_rng(0))
    tree = cells.make_cells(cells.unit_vectors(vectors)[:1000], count, 1, 100, 0.17)
    assert len(tree.parent) == 1
    vectors = vectors.astype(np.float16)
    short = shorten(np.eye(16, 4, dtype=np.float32), cells.unit_vectors(vectors))
    home = np.ones(count, bool)
    pairs, cut = near.compare(made.keys(count), home, short, vectors.__getitem__, made.COSINE, limit)
    assert len(cut) == count - limit
    assert len(pairs.first) == limit * (limit - 1) // 2 + limit * len(cut)
    resolved = resolve.resolve(pairs)
    assert resolved.kept.sum() == 1
    assert not len(resolve.starved(resolved, cut))
    assert (resolved.component == count).all()


@pytest.mark.parametrize("rising", [True, False])
def test_a_long_chain_is_decided_link_by_link(rising):
    names = np.sort(made.keys(1001))
    order = np.arange(1001) if rising else np.random.default_rng(0).permutation(1001)
    first, second = np.minimum(order[1:], order[:-1]), np.maximum(order[1:], order[:-1])
    pairs = near.Pairs(names[first], names[second], np.full(1000, 0.99, np.float32))
    resolved = resolve.resolve(pairs)
    kept = kept_of(names, made.as_set(pairs))
    assert {key.tobytes() for key in priority.as_bytes(resolved.keys[resolved.kept])} == kept
    if rising:
        assert len(kept) == 501


def test_priority():
    """More of each comes first, none last, and the id decides."""
    aesthetic = np.array([5, 5.5, np.nan, -1, 5, 5, -0.0, 0.0], np.float32)
    area = np.array([100, 1, 10**9, 7, 101, 100, 5, 5], np.int64)
    ids = np.arange(8, dtype=np.uint8)[:, None].repeat(16, 1)
    names = priority.make_keys(("aesthetic", "area", "id"), {"aesthetic": aesthetic, "area": area, "id": ids})
    assert priority.ids(names)[np.argsort(names)][:, 0].tolist() == [1, 4, 0, 5, 6, 7, 3, 2]


def test_exact_duplicates(tmp_path):
    draw = np.random.default_rng(0)
    names = made.keys(3000)
    sha = priority.as_keys(draw.integers(0, 256, (3000, 32), np.uint8))
    sha[draw.integers(0, 3000, 900)] = sha[:900]
    read = made.store(tmp_path / "rows", np.zeros((3000, 4), np.float16), names, sha)
    task = made.make_task(tmp_path / "work", read)
    outcome = run.find(task, Embedded(), True, 0, 20_000, 0)
    best = {}
    for file, key in zip(sha.tolist(), names.tolist()):
        best[file] = min(best.get(file, key), key)
    kept = exact.first_of_each(sha, names, task.firsts())
    assert kept.tolist() == [best[file] for file in sha.tolist()]
    assert outcome.exact == 3000 - len(best)
    # None of them has a vector: nothing is compared.
    assert (outcome.rows, outcome.vectors, outcome.cells, outcome.near) == (3000, 0, 0, 0)


def test_rows_without_a_direction_are_left_alone(tmp_path):
    names, vectors = made.keys(40), made.clustered(40, 8)
    vectors[:3], vectors[3, 0], vectors[4, 2], vectors[5] = 0, np.nan, np.inf, vectors[6]
    outcome, pairs, _ = find(tmp_path, (names, vectors), units=50)  # some units are empty
    assert outcome.vectors == 35
    assert pairs == made.brute_force(names[5:], vectors[5:]).keys()
    assert len(pairs) >= 1


def test_what_is_there_is_not_made_again(tmp_path, monkeypatch):
    """A search that ended between any two of its files ends as one that was never interrupted."""
    rows = made.keys(800), made.clustered(800, 32)
    whole, pairs, resolved = find(tmp_path / "a", rows)
    done, allowed = [], [0]

    def fail(path, found, cut):
        if len(done) == allowed[0]:
            raise KeyboardInterrupt
        done.append(path)
        write_found(path, found, cut)

    monkeypatch.setattr("lens_jax.data.engine.dedup.embedded.write_found", fail)
    monkeypatch.setattr("lens_jax.data.engine.dedup.embedded._GROUP", 200)
    for allowed[0] in (0, 1, 3):
        done.clear()
        with pytest.raises(KeyboardInterrupt):
            find(tmp_path / "b", rows)
    monkeypatch.undo()
    monkeypatch.setattr("lens_jax.data.engine.dedup.embedded._GROUP", 200)
    outcome, others, again = find(tmp_path / "b", rows)
    assert (outcome, others) == (whole, pairs)
    assert all(np.array_equal(a, b) for a, b in zip(resolved, again))
    assert dataclasses.asdict(outcome)["near"]


def test_tables_of_pairs_go_round(tmp_path):
    names = made.keys(50)
    pairs = near.Pairs(names[:20], names[20:40], np.linspace(0.985, 1, 20, dtype=np.float32))
    cut = Cut(names[40:], np.arange(10))
    write_found(tmp_path / "x.parquet", pairs, cut)
    write_found(tmp_path / "y.parquet", near.Pairs(*(column[:0] for column in pairs)), Cut(*(c[:0] for c in cut)))
    found, found_cut = read_found([tmp_path / "x.parquet", tmp_path / "y.parquet"], made.WIDTH)
    assert made.as_set(found) == made.as_set(pairs)
    assert dict(zip(found_cut.keys.tolist(), found_cut.cells)) == dict(zip(cut.keys.tolist(), cut.cells))
